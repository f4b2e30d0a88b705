"""Sums under way that are written now and then, and that a later run resumes from."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import TYPE_CHECKING

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.records.method import (
    SumsHeader,
)
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Arrays, Store

if TYPE_CHECKING:
    from slsgu_cli.engine.gradient_pass import Sums


# Seconds between two writes of the sums of a pass, or so many times what one of them takes.
KEEP_SECONDS = 30.0


KEEP_SHARE = 30.0


@dataclass(slots=True)
class KeptArrays:
    """Sums of work under way, kept in a store under the digest of what they will make.

    What is kept is of all batches up to one, added up in their order: whoever goes on with
    it on a CPU ends with the bytes of a run that nothing stopped.
    """

    store: Store
    digest: str
    device: str
    _next: float = field(init=False)

    def __post_init__(self) -> None:
        self._next = perf_counter() + KEEP_SECONDS

    @property
    def path(self) -> str:
        """Where they are kept."""
        return Artifact.SUMS.path(self.digest)

    @property
    def due(self) -> bool:
        """Whether it is time to keep them."""
        return perf_counter() >= self._next

    def go_on(self, batches: int, use: Callable[[SumsHeader, Arrays], None]) -> int:
        """Let `use` go on with what was kept; return of how many batches it is.

        What cannot be used is removed; `use` raises StaleError for it before all else.
        """
        try:
            header = self.store.read_header(self.path, SumsHeader)
            kept = self.store.read_tensors(self.path)
            if header.made_from != self._about(batches, 0, 0).made_from:
                raise StaleError("they are of another pass")
            use(header, kept)
        except MissingError:
            return 0
        except (InputError, StaleError) as error:
            progress.note(f"sums that were kept of a pass cannot be used: {error}")
            self.store.remove(self.path)
            return 0
        return header.done

    def write(self, arrays: Callable[[], Arrays], batches: int, *, added: int, done: int) -> None:
        """Write sums; where they cannot be written, the work goes on without."""
        start = perf_counter()
        kept = arrays()
        try:
            self.store.write_tensors(self.path, kept, self._about(batches, added, done))
        except InputError as error:
            progress.warn(f"{error.message}; the sums so far are not kept")
            self._next = math.inf
            return
        now = perf_counter()
        self._next = now + max(KEEP_SECONDS, KEEP_SHARE * (now - start))

    def remove(self) -> None:
        """Remove what was kept, if anything was."""
        self.store.remove(self.path)

    def _about(self, batches: int, added: int, done: int) -> SumsHeader:
        return SumsHeader(
            gradient=self.digest,
            device=self.device.partition(":")[0],
            batches=batches,
            added=added,
            done=done,
            version=slsgu_cli.__version__,
        )


@dataclass(slots=True)
class KeptSums(KeptArrays):
    """The sums of a pass under way, kept for the gradient of a role that they will make.

    With `squares`, those of the gradients' squares are among them.
    """

    role: str
    squares: bool

    def restore(self, sums: "Sums") -> None:
        """Put what was kept into sums over nothing."""
        batches = len(sums.losses)

        def use(header: SumsHeader, kept: Arrays) -> None:
            sums.resume(kept, header.added, header.done)

        if self.go_on(batches, use):
            progress.note(
                f"the {self.role} gradient goes on after {sums.done} of its {batches} mini-batches"
            )

    def keep(self, sums: "Sums") -> None:
        """Write the sums."""
        self.write(sums.state, len(sums.losses), added=sums.added, done=sums.done)

    def _about(self, batches: int, added: int, done: int) -> SumsHeader:
        return replace(KeptArrays._about(self, batches, added, done), squares=self.squares)
