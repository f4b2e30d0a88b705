"""Digests of tensors."""

import hashlib

# Bytes that have a checksum of their own.
CHECKED = 4 << 20

CRC32C = "crc32c:"


def content_digest(header: str, data: memoryview) -> str:
    """Return the SHA-256 of `header` and of the CRC-32C of each 4 MiB.

    It detects accidents, not forgery. One core computes CRC-32C at 11 GB/s, SHA-256 at 1.7 GB/s.
    """
    import google_crc32c

    whole = hashlib.sha256(header.encode())
    for start in range(0, len(data), CHECKED):
        part = bytes(data[start : start + CHECKED])
        whole.update(google_crc32c.value(part).to_bytes(4, "little"))
    return f"{CRC32C}{whole.hexdigest()}"
