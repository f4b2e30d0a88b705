"""A buffer of decoded images: in memory first, then in a temporary file."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import numpy as np

from slsgu_cli.clip.memory import spare
from slsgu_cli.errors import InputError
from slsgu_cli.store.atomic import remedy
from slsgu_cli.store.blocks import Pixels
from slsgu_cli.store.store import ELSEWHERE, Store


class ImageBuffer:
    """Images of one size by number."""

    def __init__(self, file: IO[bytes], *, height: int, width: int) -> None:
        self._file = file
        self._shape = (height, width, 3)
        self._bytes = height * width * 3
        self._images = 0

    def put(self, image: Pixels) -> int:
        """Add an image and return its number. Raises InputError if the disk is full."""
        with _disk_errors():
            # On a full disk, a memory map would end the process with a signal; this raises.
            self._file.seek(self._images * self._bytes)
            self._file.write(np.ascontiguousarray(image).data)
        self._images += 1
        return self._images - 1

    def clear(self) -> None:
        """Drop all images; numbers start at zero again."""
        self._images = 0

    def get(self, number: int) -> Pixels:
        """Return the image with a number."""
        with _disk_errors():
            self._file.seek(number * self._bytes)
            data = self._file.read(self._bytes)
        return np.frombuffer(data, dtype=np.uint8).reshape(self._shape)


@contextmanager
def image_buffer(store: Store, *, height: int, width: int) -> Iterator[ImageBuffer]:
    """Yield a buffer that uses a quarter of the available memory, then a file.

    The file lies in the store's folder, which has space for the data itself. It has no name, so
    it disappears with the process, however that ends.
    """
    folder = store.root if store.is_local else None
    with _disk_errors():
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    # Without a limit of at least one byte, the file would stay in memory.
    memory = max(1, spare("cpu") // 4)
    with tempfile.SpooledTemporaryFile(memory, dir=folder) as file:
        yield ImageBuffer(cast(IO[bytes], file), height=height, width=width)


@contextmanager
def _disk_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write decoded images to a temporary file: {error.strerror or error}",
            hint=remedy(error, ELSEWHERE),
        ) from error
