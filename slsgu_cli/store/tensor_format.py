"""The header of a safetensors file, and digests of its tensors."""

import hashlib
from collections.abc import Callable
from typing import Any

from slsgu_cli.records.codec import parse_json

# A safetensors file begins with the length of its header.
LENGTH = 8
HEADER_LIMIT = 100_000_000

# Bytes that have a checksum of their own.
CHECKED = 4 << 20


def safetensors_header(read: Callable[[int, int], bytes], size: int) -> tuple[dict[str, Any], int]:
    """Return the header of a safetensors file of `size` bytes, and where its tensors begin.

    `read` returns the bytes from one offset to another. Raises ValueError with the reason.
    """
    length = int.from_bytes(read(0, LENGTH), "little")
    if size < LENGTH or length > min(HEADER_LIMIT, size - LENGTH):
        raise ValueError("the file ends before its header does")
    try:
        header = parse_json(read(LENGTH, LENGTH + length))
    except ValueError as error:
        raise ValueError(f"its header is not JSON ({error})") from error
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    return header, LENGTH + length


def content_digest(header: str, data: memoryview) -> str:
    """Return the SHA-256 of `header` and of the CRC-32C of each 4 MiB.

    It detects accidents, not forgery. One core computes CRC-32C at 11 GB/s, SHA-256 at 1.7 GB/s.
    """
    import google_crc32c

    whole = hashlib.sha256(header.encode())
    for start in range(0, len(data), CHECKED):
        part = bytes(data[start : start + CHECKED])
        whole.update(google_crc32c.value(part).to_bytes(4, "little"))
    return f"crc32c:{whole.hexdigest()}"
