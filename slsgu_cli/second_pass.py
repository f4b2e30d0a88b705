"""The second pass over sources: drawn rows are decoded, and kept in the order of the draw.

Where every row can be read where it lies, rows come a window at a time, and no more than a
window is held. Any other source is read from its beginning, so that all of its rows are held
until they can be put in order.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from slsgu_cli import progress
from slsgu_cli.curation.screening import Look
from slsgu_cli.decoding import Decoded, decode_in_order
from slsgu_cli.draw import Candidate
from slsgu_cli.scratch import Scratch, scratch
from slsgu_cli.sets import Pixels
from slsgu_cli.sources import RowId, fetch
from slsgu_cli.tally import Tally
from slsgu_cli.workshop import Workshop

SAME_AS_FORGET = "same image as a forget row"
WINDOW = 256
UNREADABLE = Decoded(None, "unreadable", b"")
# What came of each row, and the number its image was put under; -1 where there is none.
Found = dict[RowId, tuple[int, Decoded]]


@dataclass(slots=True)
class SecondPass:
    """One set's rows: which of the candidates are kept, and why others are not.

    Images whose encoded bytes are in `avoid` are left out.
    """

    shop: Workshop
    tally: Tally
    candidates: Sequence[Candidate]
    avoid: frozenset[bytes]
    refused: Counter[str] = field(default_factory=Counter)
    _met: set[tuple[bytes, str]] = field(init=False, default_factory=set)
    _look: Look | None = field(init=False)

    def __post_init__(self) -> None:
        self._look = self.shop.screen.start() if self.shop.screen else None

    @property
    def wanted(self) -> int:
        """How many rows are kept if none is refused."""
        count = len(self.candidates)
        return count if self.tally.wanted is None else min(count, self.tally.wanted)

    def kept(self) -> Iterator[tuple[Candidate, Decoded, Pixels]]:
        """Yield the rows that are kept, decoded, until as many as wanted are or none is left."""
        kept, start = 0, 0
        spec = self.shop.spec
        title = f"decoding the {self.tally.role} set"
        most = min(_some_more(self.wanted), len(self.candidates))
        with (
            progress.bar(title, most) as ticker,
            scratch(self.shop.store, height=spec.height, width=spec.width) as images,
        ):
            while kept < self.wanted and start < len(self.candidates):
                line = self.candidates[start : start + _some_more(self.wanted - kept)]
                start += len(line)
                for candidate, number, decoded in self._decoded(line, images, ticker):
                    if kept == self.wanted:
                        return
                    reason = self._refusal(candidate, number, decoded)
                    if reason:
                        self.refused[reason] += 1
                        continue
                    self._met.add((decoded.source_digest, candidate.caption))
                    kept += 1
                    yield candidate, decoded, images.get(number)

    def _decoded(
        self, line: Sequence[Candidate], images: Scratch, ticker: progress.Ticker
    ) -> Iterator[tuple[Candidate, int, Decoded]]:
        """Yield the line's rows in order, with the number of each one's image.

        An image is kept until the next window begins. The first images of that are decoded
        while the rows of this one are dealt with.
        """
        found: Found = {}
        for (window, place), decoded in decode_in_order(self._encoded(line), self.shop.decode):
            if place is not None:
                number = -1 if decoded.pixels is None else images.put(decoded.pixels)
                found[place] = number, decoded.without_pixels()
                ticker.advance()
                continue
            rows = [(row, *found.get(row.place, (-1, UNREADABLE))) for row in window]
            if self._look:
                whole = {number: row.caption for row, number, _ in rows if number >= 0}
                self._look.see(whole, images.get)
            yield from rows
            found = {}
            images.clear()

    def _encoded(
        self, line: Sequence[Candidate]
    ) -> Iterator[tuple[tuple[Sequence[Candidate], RowId | None], bytes | None]]:
        """Yield ((window, row), encoded image) as they lie; a window ends with no row."""
        at_hand = all(candidate.extent is not None for candidate in line)
        size = WINDOW if at_hand else len(line)
        for start in range(0, len(line), size):
            window = line[start : start + size]
            for place, data in fetch(self.tally.readers, {row.place: row.extent for row in window}):
                yield (window, place), data
            yield (window, None), None

    def _refusal(self, candidate: Candidate, number: int, decoded: Decoded) -> str | None:
        if decoded.reason:
            return decoded.reason
        if decoded.source_digest in self.avoid:
            return SAME_AS_FORGET
        if (decoded.source_digest, candidate.caption) in self._met:
            return "duplicate"
        return self._look.refusal(number) if self._look else None


def _some_more(rows: int) -> int:
    """Return a few more than are missing, so that one round is enough where few are broken."""
    return rows + max(16, rows // 32)
