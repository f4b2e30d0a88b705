"""What building a block takes: a draw of rows, the model's inputs, images until their turn.

And which of the matching pairs are kept: those the model itself sees, and each image once.
`min_similarity` is the filter that LAION was made with: the cosine of a pair's own image
and caption. Near-duplicates are told by a perceptual hash: 64 bits that say which of the
lowest frequencies of the grey image are above their median, so that other sizes, qualities
and encodings of one picture differ in few bits.
"""

import hashlib
import heapq
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slsgu_cli import progress
from slsgu_cli.clip import devices, loading, models, tokenizers
from slsgu_cli.clip.decoding import Picture
from slsgu_cli.clip.memory import spare
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.sets import DataRef, InputSpec, Origin, Screening
from slsgu_cli.sources.rows import Extent, Reader
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.atomic import remedy
from slsgu_cli.store.blocks import DataBlock, Ints, Pixels
from slsgu_cli.store.store import ELSEWHERE, Store

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A row that was drawn; candidates sort by their place in the seeded order.

    `cleaned` says that the caption had control characters in it.
    """

    priority: int
    file: int
    index: int
    key: str
    caption: str
    cleaned: bool = False
    origin: Origin | None = None
    extent: Extent | None = field(default=None, compare=False)

    @property
    def place(self) -> tuple[int, int]:
        """The number of the file, and the row in it."""
        return self.file, self.index

    @property
    def identity(self) -> str:
        """What tells it from every other one, for a digest over the draw."""
        return f"{self.file}:{self.index}:{self.key}:{self.caption}"


class Draw:
    """Keeps the first `size` candidates of a stream in seeded order; all of them if None.

    Memory is proportional to `size`, not to the stream.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.offered = 0
        # Turned around, so that the root is the candidate to give up first.
        self._heap: list[tuple[int, int, int, Candidate]] = []

    def offer(self, candidate: Candidate) -> None:
        """Take a candidate into account."""
        self.offered += 1
        turned = (-candidate.priority, -candidate.file, -candidate.index, candidate)
        if self.size is None or len(self._heap) < self.size:
            heapq.heappush(self._heap, turned)
        else:
            heapq.heappushpop(self._heap, turned)

    def ranked(self) -> list[Candidate]:
        """Return the candidates kept, in seeded order."""
        return sorted(candidate for *_, candidate in self._heap)


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
            hint=remedy(error, ELSEWHERE),
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

    def standing(self, path: str, *, again: bool = False) -> DataBlock | None:
        """Return the block made before at `path`; None if there is none, or it is damaged.

        With `again`, what is damaged was told before.
        """
        if not self.store.exists(path):
            return None
        try:
            return DataBlock.at(self.store, path)
        except MissingError:
            return None
        except InputError as error:
            if not again:
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


# Images that are screened at a time.
SCREENED = 64
GRID, LOW = 32, 8
Cosines = Callable[[Pixels, Sequence[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Screen:
    """The tests of one build; `recipe` says what they depend on."""

    options: Screening
    cosines: Cosines | None
    recipe: list[Any]


@dataclass(slots=True)
class ScreenedSet:
    """Screens the rows of one set in their order, some at a time."""

    screen: Screen
    _reasons: dict[int, str] = field(default_factory=dict)
    _hashes: dict[int, int] = field(default_factory=dict)
    _kept: list[int] = field(default_factory=list)

    def judge(self, captions: Mapping[int, str], image: Callable[[int], Pixels]) -> None:
        """Test the next images, by number, with their captions; `refusal` tells what came of it."""
        self._reasons, self._hashes = {}, {}
        numbers = sorted(captions)
        for start in range(0, len(numbers), SCREENED):
            batch = numbers[start : start + SCREENED]
            pixels = np.stack([image(number) for number in batch])
            if self.screen.options.near_duplicates is not None:
                self._hashes |= {n: perceptual_hash(p) for n, p in zip(batch, pixels, strict=True)}
            if self.screen.cosines:
                cosines = self.screen.cosines(pixels, [captions[number] for number in batch])
                least = self.screen.options.min_similarity or 0.0
                for number, cosine in zip(batch, cosines, strict=True):
                    if cosine < least:
                        self._reasons[number] = "below --min-similarity"

    def refusal(self, number: int) -> str | None:
        """Return why the image is not kept; if there is nothing, it counts as kept."""
        reason = self._reasons.get(number)
        limit = self.screen.options.near_duplicates
        if reason or limit is None:
            return reason
        image_hash = self._hashes[number]
        kept = np.asarray(self._kept, dtype=np.uint64) ^ np.uint64(image_hash)
        differing = np.unpackbits(kept.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
        if differing.size and differing.min() <= limit:
            return "near-duplicate"
        self._kept.append(image_hash)
        return None


def screen_for(options: Screening, model: models.ResolvedModel, spec: InputSpec) -> Screen | None:
    """Return the tests that `options` ask for, None for none. Raises UsageError."""
    least, bits = options.min_similarity, options.near_duplicates
    if least is not None and not -1 <= least <= 1:
        raise UsageError(f"--min-similarity is {least}; a cosine lies between -1 and 1")
    if bits is not None and not 0 <= bits <= 32:
        raise UsageError(f"--near-duplicates is {bits}; give 0 to 32 of a hash's 64 bits")
    if least is None and bits is None:
        return None
    weights = None if least is None else models.fingerprint(model)
    cosines = None if least is None else _cosines(model, spec, options.device)
    return Screen(options, cosines, [least, weights, bits])


def perceptual_hash(pixels: Pixels) -> int:
    """Return 64 bits that say which low frequencies of the grey image are above their median."""
    grey = Image.fromarray(pixels).convert("L").resize((GRID, GRID), Image.Resampling.BOX)
    cosine = _cosine_basis()
    low = (cosine @ np.asarray(grey, dtype=np.float64) @ cosine.T).ravel()
    # The mean brightness says nothing of the picture.
    low[0] = np.median(low[1:])
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _cosine_basis() -> npt.NDArray[np.float64]:
    """Return the LOW slowest waves of the discrete cosine transform, (LOW, GRID)."""
    places = (np.arange(GRID) + 0.5) * np.pi / GRID
    return np.cos(np.arange(LOW)[:, None] * places)


def _cosines(model: models.ResolvedModel, spec: InputSpec, device: str) -> Cosines:
    """Return a function of images and captions that loads the model when first called."""

    @cache
    def parts() -> tuple["nn.Module", str, Any]:
        from slsgu_cli.clip.batches import pixel_normalizer

        where = devices.pick_device(device)
        module = loading.load(model, where, warn=progress.warn)
        return module, where, pixel_normalizer(spec, where)

    def cosines(pixels: Pixels, captions: Sequence[str]) -> npt.NDArray[np.float32]:
        import torch

        from slsgu_cli.clip.batches import to_tokens

        module, where, normalize = parts()
        encode: Any = module
        with torch.no_grad():
            images = encode.encode_image(normalize(pixels), normalize=True)
            tokens = to_tokens(tokenizers.tokenizer(model)(captions), where)
            texts = encode.encode_text(tokens, normalize=True)
            values: npt.NDArray[np.float32] = (images * texts).sum(-1).float().cpu().numpy()
        return values

    return cosines
