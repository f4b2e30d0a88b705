"""Partial sums that are saved from time to time, so that a later run can resume from them."""

import math
from dataclasses import dataclass, field
from time import perf_counter

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.records.method import SumsHeader
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Arrays, Store

# Wait at least so many seconds between two writes, and so many times the duration of a write.
KEEP_SECONDS = 30.0
KEEP_SHARE = 30.0


@dataclass(slots=True)
class SavedSums:
    """Partial sums in a store, under the `digest` of the result that they lead to.

    They cover the first batches, in order, so a resumed run on a CPU ends with the same bytes
    as an uninterrupted one. `squares` says whether squared gradients are summed as well.
    """

    store: Store
    digest: str
    device: str
    squares: bool = False
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._next = perf_counter() + KEEP_SECONDS

    @property
    def due(self) -> bool:
        """Whether it is time to write the sums."""
        return perf_counter() >= self._next

    def read(self, batches: int) -> tuple[int, Arrays]:
        """Return how many of the `batches` are summed, and the sums; unusable ones are removed."""
        path = Artifact.SUMS.path(self.digest)
        try:
            header = self.store.read_header(path, SumsHeader)
            if header.made_from != self._header(batches, 0).made_from:
                raise StaleError("they belong to another pass")
            return header.done, self.store.read_tensors(path)
        except MissingError:
            return 0, {}
        except (InputError, StaleError) as error:
            progress.note(f"the saved sums of a pass cannot be used: {error}")
            self.remove()
            return 0, {}

    def write(self, sums: Arrays, *, done: int, batches: int) -> None:
        """Write the sums of the first `done` batches. If that fails, warn and write no more."""
        start = perf_counter()
        try:
            path = Artifact.SUMS.path(self.digest)
            self.store.write_tensors(path, sums, self._header(batches, done))
        except InputError as error:
            progress.warn(f"{error.message}; the partial sums are not saved")
            self._next = math.inf
            return
        now = perf_counter()
        self._next = now + max(KEEP_SECONDS, KEEP_SHARE * (now - start))

    def remove(self) -> None:
        """Remove the sums from the store."""
        self.store.remove(Artifact.SUMS.path(self.digest))

    def _header(self, batches: int, done: int) -> SumsHeader:
        return SumsHeader(
            gradient=self.digest,
            device=self.device.partition(":")[0],
            batches=batches,
            done=done,
            version=slsgu_cli.__version__,
            squares=self.squares,
        )
