"""Draw rows from a stream by seed: each row has a fixed place in a seeded order.

A row's place depends on the seed and the row alone, so the draw is the same however the
stream is cut, and the first rows in that order are a uniform sample without replacement.
"""

import hashlib
import heapq
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from slsgu_cli.records.sets import Origin
from slsgu_cli.sources.rows import Extent

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
