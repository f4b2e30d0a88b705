"""The first pass over a source: which captions qualify, and which rows are drawn of them."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slsgu_cli import progress
from slsgu_cli.draw import Candidate, Draw, first_met, line_for, priority, tail
from slsgu_cli.samples import Origin, Reader, Row, printable
from slsgu_cli.sources import scan
from slsgu_cli.workshop import Workshop

TAKE = ""
# What a caption is refused for; TAKE if it qualifies, None if it is of no concern.
Rule = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Upstream:
    """Rows that were seen and left out before they could come to a source."""

    seen: int
    refused: dict[str, int]


@dataclass(slots=True)
class Tally:
    """What the first pass found for one set."""

    role: str
    rule: Rule
    wanted: int | None
    sources: Sequence[str]
    readers: Sequence[Reader]
    seen: int = 0
    captions: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    draw: Draw = field(init=False)
    upstream: Upstream | None = None

    def __post_init__(self) -> None:
        self.draw = Draw(None if self.wanted is None else line_for(self.wanted))

    def follow(self, upstream: Upstream) -> None:
        """Count what was left out upstream as well."""
        self.upstream = upstream
        self.refused.update(upstream.refused)

    def meet(self, number: int, row: Row, seed: int) -> None:
        """Take one row of the source into account."""
        self.seen += 1
        reader = self.readers[number]
        caption = row.caption
        if caption is None and reader.labels_are_captions and row.label:
            caption = " ".join(row.label.replace("_", " ").split())
        cleaned = printable(caption) if caption else ""
        if not cleaned:
            self.refused["no caption"] += 1
            return
        caption, odd = cleaned, cleaned != caption
        self.captions += 1
        if len(self.examples) < 3:
            self.examples.append(caption)
        verdict = self.rule(caption)
        if verdict == TAKE and not row.has_image:
            verdict = "no image"
        if verdict == TAKE:
            origin = row.origin or Origin(reader.path, row.index)
            place = priority(seed, _identity(reader, row))
            drawn = Candidate(place, number, row.index, row.key, caption, odd, origin, row.extent)
            self.draw.offer(drawn)
        elif verdict is not None:
            self.refused[verdict] += 1


def _identity(reader: Reader, row: Row) -> str:
    """Return what decides a row's place in the draw: where it lies in its source.

    A row that was brought here from elsewhere is known by where it was first met: downloads
    come in any order.
    """
    origin = row.origin
    if origin is not None and origin.file != reader.path:
        return first_met(origin.file, origin.row)
    return f"{tail(reader.path)}\0{row.index}\0{row.key}"


def first_pass(
    shop: Workshop, readers: Sequence[Reader], tallies: Sequence[Tally], seed: int
) -> None:
    """Read every caption of a source once, for all the sets drawn from it."""
    trouble: Counter[str] = Counter()
    with progress.bar("reading captions", None) as ticker:
        for number, row in scan(readers, trouble, tick=ticker.advance):
            for tally in tallies:
                tally.meet(number, row, seed)
    for tally in tallies:
        tally.refused.update(trouble)
