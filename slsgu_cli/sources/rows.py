"""What every kind of source yields: rows first, image bytes later and only when asked.

A source is read twice. The first pass yields a `Row` for each sample and touches no
image; the second yields the encoded images of the rows that were chosen, in the order
they lie in. So a source of any size is read in constant memory.
"""

import hashlib
import heapq
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import fsspec

from slsgu_cli.errors import InputError
from slsgu_cli.records.sets import Origin

IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "img")
)
# The most bytes that a caption or a label may have, and an encoded image.
TEXT_LIMIT, IMAGE_LIMIT = 1 << 16, 1 << 26
TOO_LARGE = "oversized file"
BOMB = "decompression bomb"
CAPTION_FIELDS = ("caption", "text")
LABEL_FIELDS = ("label", "concept", "class", "cls")
Filters = dict[str, frozenset[str]]
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ud800-\udfff]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns to read, where they are not to be found by their usual names.

    `needs` names what cannot be done without: `caption`, `label`.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    needs: frozenset[str] = frozenset()


# The first byte of an encoded image in a file, and how many there are.
Extent = tuple[int, int]

# The rows whose images are wanted, with their extents where the first pass told them.
Wanted = Mapping[int, Extent | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One sample without its image; `index` is its place in the file, filters aside.

    `origin` is set where the file is not where the sample was first met, or has URLs;
    `extent` where the image lies in the file as it is.
    """

    index: int
    key: str
    caption: str | None
    label: str | None
    has_image: bool = True
    origin: Origin | None = None
    extent: Extent | None = field(default=None, compare=False)


class Unread(bytes):
    """No bytes, for an image that costs too much; `reason` is what it is counted under."""

    reason: str

    def __new__(cls, reason: str) -> "Unread":
        """Return what stands for an image that is left out for a reason."""
        made = super().__new__(cls)
        made.reason = reason
        return made


class Reader(Protocol):
    """One file or folder of samples."""

    @property
    def path(self) -> str:
        """The file or folder."""

    @property
    def labels_are_captions(self) -> bool:
        """Whether a label stands in where a row has no caption."""

    def identity(self) -> Any:
        """Return JSON that changes when the images read may be others."""

    def rows(self, trouble: Counter[str]) -> Iterator[Row]:
        """Yield the rows that pass the filters; count what cannot be read in `trouble`."""

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield (index, encoded image) of the wanted rows in order; None where there is none."""


def file_identity(path: str) -> list[Any]:
    """Return a file's path, size and time of change, as far as its file system tells them."""
    fs, inner = fsspec.core.url_to_fs(path)
    return [path, *stamp(fs.info(inner))]


def stamp(info: dict[str, Any]) -> list[Any]:
    """Return size and time of change from a file system's entry."""
    times = ("mtime", "LastModified", "last_modified", "updated", "ETag", "etag", "created")
    return [info.get("size"), str(next((info[name] for name in times if info.get(name)), ""))]


def as_text(value: Any) -> str | None:
    """Return a field as stripped text; None where it is missing or blank.

    Of several captions the first one counts.
    """
    if isinstance(value, list | tuple):
        value = value[0] if value else None
    if isinstance(value, bytes):
        value = value.decode(errors="replace")
    return (str(value).strip() or None) if value is not None else None


def label_words(label: str) -> str:
    """Return a label as words: names of folders often have underscores for spaces."""
    return " ".join(label.replace("_", " ").split())


def caption_of(reader: Reader, row: Row) -> str | None:
    """Return a row's caption, its label as words where that stands in for one."""
    if row.caption is None and reader.labels_are_captions and row.label:
        return label_words(row.label)
    return row.caption


def tokenizable(text: str) -> str:
    """Return `text` with NULs, other controls and halves of characters as spaces.

    Tokenizers would take them for letters, or fail. Line breaks stay: they are white space.
    """
    return _UNPRINTABLE.sub(" ", text).strip()


def passes(filters: Filters, fields: dict[str, Any]) -> bool:
    """Return whether a sample's fields have one of the wanted values for every filter."""
    return all(as_text(fields.get(name)) in values for name, values in filters.items())


def no_column(path: str, name: str, columns: list[str], hint: str) -> InputError:
    """Return the error for a column that a source does not have."""
    listed = ", ".join(columns) or "none"
    return InputError(f"{path} has no {name}; its columns are: {listed}", hint=hint)


BEYOND = "beyond --max-forget"


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


def priority(seed: int, identity: str) -> int:
    """Return a row's place: a 64-bit number that looks random and is fixed by the seed."""
    salt = str(seed).encode()[:64]
    data = identity.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=salt).digest(), "big")


def first_met(file: str, row: int) -> str:
    """Return what decides the place in the draw of a row that was first met there."""
    return f"{tail(file)}\0{row}"


def line_for(wanted: int) -> int:
    """Return how many rows to have in line, so that every other one may be unusable."""
    return 2 * wanted + 1000


def tail(path: str) -> str:
    """Return a file's name and its folder's: what is left of a path when a source moves."""
    return "/".join(path.rsplit("/", 2)[-2:])


class Draw:
    """Keeps the first `size` candidates of a stream in seeded order; all of them if None.

    Memory is proportional to `size`, not to the stream.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.offered = 0
        self._heap: list[_Worst] = []

    def offer(self, candidate: Candidate) -> None:
        """Take a candidate into account."""
        self.offered += 1
        if self.size is None or len(self._heap) < self.size:
            heapq.heappush(self._heap, _Worst(candidate))
        elif candidate < self._heap[0].candidate:
            heapq.heapreplace(self._heap, _Worst(candidate))

    def ranked(self) -> list[Candidate]:
        """Return the candidates kept, in seeded order."""
        return sorted(worst.candidate for worst in self._heap)


@dataclass(frozen=True, slots=True)
class _Worst:
    """Turns the order around, so that the heap's root is the candidate to give up first."""

    candidate: Candidate

    def __lt__(self, other: "_Worst") -> bool:
        return other.candidate < self.candidate


def identities(candidates: Iterable[Candidate]) -> Iterator[str]:
    """Yield what tells each candidate from every other one, for a digest over the draw."""
    for candidate in candidates:
        yield f"{candidate.file}:{candidate.index}:{candidate.key}:{candidate.caption}"
