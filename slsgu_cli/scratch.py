"""Decoded images, kept for as long as a block is being put in order.

Images come in the order of their source and are written in the order of the draw. Those
that fit in a part of the free memory stay there, the rest goes to a file.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np

from slsgu_cli.errors import InputError
from slsgu_cli.memory import spare
from slsgu_cli.sets import Pixels
from slsgu_cli.store import Store


class Scratch:
    """Images of one size by the number they were put under, the first `room` in memory."""

    def __init__(self, file: IO[bytes], *, height: int, width: int, room: int) -> None:
        self._file = file
        self._shape = (height, width, 3)
        self._bytes = height * width * 3
        self._held: list[Pixels] = []
        self._room = room
        self._filed = 0

    def put(self, image: Pixels) -> int:
        """Keep an image and return its number. Raises InputError on a full disk."""
        if len(self._held) < self._room:
            self._held.append(image)
            return len(self._held) - 1
        with _explained():
            # A memory map would end the process with a signal on a full disk; this raises.
            self._file.seek(self._filed * self._bytes)
            self._file.write(np.ascontiguousarray(image).data)
        self._filed += 1
        return len(self._held) + self._filed - 1

    def clear(self) -> None:
        """Drop all images; numbers begin again."""
        self._held.clear()
        self._filed = 0

    def get(self, number: int) -> Pixels:
        """Return the image kept under `number`."""
        if number < len(self._held):
            return self._held[number]
        with _explained():
            self._file.seek((number - len(self._held)) * self._bytes)
            data = self._file.read(self._bytes)
        return np.frombuffer(data, dtype=np.uint8).reshape(self._shape)


@contextmanager
def scratch(store: Store, *, height: int, width: int) -> Iterator[Scratch]:
    """Yield room for images: half of what may be taken of the memory, then a file.

    The file lies beside the store's data, where there is room for the data itself. It has
    no name: it is gone with the process, however that ends.
    """
    with _explained():
        folder = Path(store.root) if store.is_local else None
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed below
    try:
        room = spare("cpu") // 2 // (height * width * 3)
        yield Scratch(file, height=height, width=width, room=room)
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
