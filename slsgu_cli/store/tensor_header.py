"""The header of a safetensors file."""

from collections.abc import Callable
from typing import Any

from slsgu_cli.records.codec import parse_json

# A safetensors file begins with the length of its header.
LENGTH = 8
HEADER_LIMIT = 100_000_000


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
