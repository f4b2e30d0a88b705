"""Decoded images on disk for as long as a block is being put in order.

Images come in the order of their source and are written in the order of the draw; neither
order fits in memory.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from slsgu_cli.errors import InputError
from slsgu_cli.store import Store

Pixels = npt.NDArray[np.uint8]


class Scratch:
    """Images of one size in a file, by the number they were put under."""

    def __init__(self, file: IO[bytes], *, height: int, width: int) -> None:
        self._file = file
        self._shape = (height, width, 3)
        self._bytes = height * width * 3
        self._count = 0

    def put(self, image: Pixels) -> int:
        """Store an image and return its number. Raises InputError on a full disk."""
        with _explained():
            # A memory map would end the process with a signal on a full disk; this raises.
            self._file.seek(self._count * self._bytes)
            self._file.write(image.tobytes())
        self._count += 1
        return self._count - 1

    def get(self, number: int) -> Pixels:
        """Return the image stored under `number`."""
        with _explained():
            self._file.seek(number * self._bytes)
            data = self._file.read(self._bytes)
        return np.frombuffer(data, dtype=np.uint8).reshape(self._shape)


@contextmanager
def scratch(store: Store, *, height: int, width: int) -> Iterator[Scratch]:
    """Yield a scratch file beside the store's data, where there is room for the data itself.

    The file has no name: it is gone with the process, however that ends.
    """
    with _explained():
        folder = Path(store.root) if store.is_local else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
    try:
        yield Scratch(file, height=height, width=width)
    finally:
        with _explained():
            file.close()


@contextmanager
def _explained() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot keep decoded images in a temporary file: {error.strerror or error}",
            hint="free some space, or choose another store with --store",
        ) from error
