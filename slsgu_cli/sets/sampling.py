"""Seeded samples of rows: each row has a fixed priority, and the first ones are drawn."""

import hashlib
import heapq
from dataclasses import dataclass, field

from slsgu_cli.records.sets import Origin
from slsgu_cli.sources.reader import Extent


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """A row that may be drawn; candidates sort by priority.

    `cleaned` is set if the caption had control characters.
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
        """A text that identifies the candidate, for a digest over a sample."""
        return f"{self.file}:{self.index}:{self.key}:{self.caption}"


class SeededSample:
    """The first `size` candidates of a stream by priority; all of them if None.

    Memory is proportional to `size`, not to the stream.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        self.offered = 0
        # Negated, so that the root is the candidate with the last priority.
        self._heap: list[tuple[int, int, int, Candidate]] = []

    def offer(self, candidate: Candidate) -> None:
        """Consider one more candidate."""
        self.offered += 1
        entry = (-candidate.priority, -candidate.file, -candidate.index, candidate)
        if self.size is None or len(self._heap) < self.size:
            heapq.heappush(self._heap, entry)
        else:
            heapq.heappushpop(self._heap, entry)

    def ranked(self) -> list[Candidate]:
        """Return the sample by priority."""
        return sorted(candidate for *_, candidate in self._heap)


def priority(seed: int, identity: str) -> int:
    """Return a row's position in the seeded order: a pseudo-random 64-bit number."""
    salt = str(seed).encode()[:64]
    data = identity.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=salt).digest(), "big")


def row_identity(file: str, row: int) -> str:
    """Return the identity of a row by the file where it was first found."""
    return f"{portable_path(file)}\0{row}"


def sample_size(wanted: int) -> int:
    """Return how many candidates to draw, so that half of them may turn out unusable."""
    return 2 * wanted + 1000


def portable_path(path: str) -> str:
    """Return the names of a file and its folder, which stay the same when a source moves."""
    return "/".join(path.rsplit("/", 2)[-2:])
