"""What building a block takes: the model's inputs, blocks made before, images until their turn."""

import hashlib
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from slsgu_cli import progress
from slsgu_cli.clip.inputs import Picture, spare
from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.sets import DataRef, InputSpec
from slsgu_cli.sources.rows import Reader
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock, Ints, Pixels
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.sets.screening import Screen


AT_ONCE = 512
Tokenize = Callable[[Sequence[str]], Ints]


class Tokenizing:
    """Captions that come one by one, and their tokens in the end; made by `tokenizing`."""

    def __init__(self, tokenize: Tokenize, pool: ThreadPoolExecutor) -> None:
        self._tokenize = tokenize
        self._pool = pool
        self._texts: list[str] = []
        self._parts: list[Future[Ints]] = []

    def add(self, text: str) -> None:
        """Take the next caption."""
        self._texts.append(text)
        if len(self._texts) == AT_ONCE:
            self._submit()

    def tokens(self) -> Ints:
        """Return the token ids of all captions, int32 (captions, length); there must be some."""
        if self._texts:
            self._submit()
        return np.concatenate([part.result() for part in self._parts])

    def _submit(self) -> None:
        self._parts.append(self._pool.submit(self._tokenize, self._texts))
        self._texts = []


@contextmanager
def tokenizing(tokenize: Tokenize) -> Iterator[Tokenizing]:
    """Yield what takes captions; what has not begun is dropped when the block is left."""
    pool = ThreadPoolExecutor(1, thread_name_prefix="tokenize")
    try:
        yield Tokenizing(tokenize, pool)
    finally:
        pool.shutdown(cancel_futures=True)


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


# Counts up when a block of the same recipe would come out differently.
FORMAT = 2


@dataclass(frozen=True, slots=True)
class BuildContext:
    """The store, and how the model takes its inputs."""

    store: Store
    spec: InputSpec
    decode: Callable[[bytes], Picture]
    tokenize: Tokenize
    screen: "Screen | None" = None

    def pixel_recipe(self) -> list[Any]:
        """Return what decides an image's pixels; mean and standard deviation do not."""
        spec = self.spec
        size = [spec.height, spec.width]
        return [*size, spec.interpolation, spec.resize_mode, spec.fill_color]

    def standing(self, path: str) -> DataBlock | None:
        """Return the block made before at `path`; None if there is none, or it is damaged."""
        if not self.store.exists(path):
            return None
        try:
            return DataBlock.at(self.store, path)
        except InputError as error:
            progress.warn(f"{error.message}; it is made again")
            return None


def block_path(recipe: Mapping[str, Any]) -> str:
    """Return where the block made by `recipe` lies."""
    return Artifact.DATA.path(digest({"format": FORMAT, **recipe}))


def file_recipe(readers: Sequence[Reader]) -> str:
    """Return a digest of every file of a source, its size and time of change."""
    return digest([reader.identity() for reader in readers])


def text_digest(texts: Iterable[str]) -> str:
    """Return a digest of a sequence of texts of any length."""
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def reference(
    path: str, block: DataBlock, *, seen: int, refused: Counter[str], sources: Sequence[str]
) -> DataRef:
    """Return the manifest's entry for a block."""
    counts = {reason: count for reason, count in sorted(refused.items()) if count}
    return DataRef(
        path=path,
        fingerprint=str(block.attributes["fingerprint"]),
        rows=block.rows,
        seen=seen,
        refused=counts,
        sources=tuple(sources),
        noted=dict(block.attributes.get("noted", {})),
    )


def counted(refused: Mapping[str, int]) -> str:
    """Return reasons with their counts as words, most frequent first."""
    ordered = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered if count)
