"""Forget and retain rows: captions considered, rows drawn, images decoded, blocks written."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from slsgu_cli import progress
from slsgu_cli.clip.pixels import Decoded, decode_in_order
from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import digest, encode
from slsgu_cli.records.sets import DataRef, Origin
from slsgu_cli.sets.context import (
    BuildContext,
    Scratch,
    block_path,
    counted,
    file_recipe,
    reference,
    scratch,
    text_digest,
    tokenizing,
)
from slsgu_cli.sets.screening import Judgement
from slsgu_cli.sources.draw import (
    BEYOND,
    Candidate,
    Draw,
    first_met,
    identities,
    line_for,
    priority,
    tail,
)
from slsgu_cli.sources.opening import RowId, fetch, scan
from slsgu_cli.sources.rows import Reader, Row, printable
from slsgu_cli.store.blocks import DataBlock, Pixels, block_writer

TAKE = ""

# What a caption is refused for; TAKE if it qualifies, None if it is of no concern.
Rule = Callable[[str], str | None]


@dataclass(frozen=True, slots=True)
class Upstream:
    """Rows that were seen and left out before they could come to a source."""

    seen: int
    refused: dict[str, int]


@dataclass(slots=True)
class Selection:
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
    shop: BuildContext, readers: Sequence[Reader], tallies: Sequence[Selection], seed: int
) -> None:
    """Read every caption of a source once, for all the sets drawn from it."""
    trouble: Counter[str] = Counter()
    with progress.bar("reading captions", None) as ticker:
        for number, row in scan(readers, trouble, tick=ticker.advance):
            for tally in tallies:
                tally.meet(number, row, seed)
    for tally in tallies:
        tally.refused.update(trouble)


SAME_AS_FORGET = "same image as a forget row"
WINDOW = 256
UNREADABLE = Decoded(None, "unreadable", b"")

# What came of each row, and the number its image was put under; -1 where there is none.
Found = dict[RowId, tuple[int, Decoded]]


@dataclass(slots=True)
class DecodedRows:
    """One set's rows: which of the candidates are kept, and why others are not.

    Images whose encoded bytes are in `avoid` are left out.
    """

    shop: BuildContext
    tally: Selection
    candidates: Sequence[Candidate]
    avoid: frozenset[bytes]
    refused: Counter[str] = field(default_factory=Counter)
    _met: set[tuple[bytes, str]] = field(init=False, default_factory=set)
    _look: Judgement | None = field(init=False)

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


CLEANED = "control characters in the caption"
SAME_KEY = "key of another row too"


def build_pairs(
    shop: BuildContext, tally: Selection, *, seed: int, avoid: frozenset[bytes] = frozenset()
) -> tuple[DataRef, DataBlock]:
    """Make the block of a forget or retain set, or find it made.

    Images whose encoded bytes are in `avoid` are left out.
    """
    candidates = tally.draw.ranked()
    recipe = _recipe(shop, tally, candidates, seed)
    # Where nothing had to be avoided, the set is the same for every concept, and so its place.
    plain = block_path(recipe)
    avoiding = block_path(recipe | {"avoid": digest(sorted(d.hex() for d in avoid))})
    block = _made_before(shop, (avoiding, plain) if avoid else (plain,), avoid)
    if block is not None:
        path, found = block
        progress.note(f"{tally.role}: {found.rows} rows were decoded before and are used again")
    else:
        path, found = _make(shop, tally, candidates, avoid, (plain, avoiding, recipe))
    refused = tally.refused + Counter(found.attributes["refused"])
    if tally.role == "forget":
        taken = found.rows + sum(found.attributes["refused"].values())
        refused[BEYOND] += max(0, tally.draw.offered - taken)
    seen = tally.upstream.seen if tally.upstream else tally.seen
    return reference(path, found, seen=seen, refused=refused, sources=tally.sources), found


def _recipe(
    shop: BuildContext, tally: Selection, candidates: Sequence[Candidate], seed: int
) -> dict[str, Any]:
    return {
        "role": tally.role,
        "files": file_recipe(tally.readers),
        "pixels": shop.pixel_recipe(),
        "tokens": [shop.spec.tokenizer, shop.spec.context_length],
        "seed": seed,
        "wanted": tally.wanted,
        "screen": shop.screen.recipe if shop.screen else None,
        # The rows in line stand for the patterns: patterns that choose alike make one set.
        "rows": text_digest(identities(candidates)),
    }


def _made_before(
    shop: BuildContext, paths: Sequence[str], avoid: frozenset[bytes]
) -> tuple[str, DataBlock] | None:
    for path in paths:
        block = shop.standing(path)
        if block and avoid.isdisjoint(row.tobytes() for row in block.source_digests):
            return path, block
    return None


def _make(
    shop: BuildContext,
    tally: Selection,
    candidates: Sequence[Candidate],
    avoid: frozenset[bytes],
    place: tuple[str, str, dict[str, Any]],
) -> tuple[str, DataBlock]:
    plain, avoiding, recipe = place
    rows = DecodedRows(shop, tally, candidates, avoid)

    def path() -> str:
        return avoiding if rows.refused[SAME_AS_FORGET] else plain

    height, width = shop.spec.height, shop.spec.width
    with (
        tokenizing(shop.tokenize) as captions,
        block_writer(
            shop.store, plain, height=height, width=width, rows=rows.wanted, into=path
        ) as writer,
    ):
        noted: Counter[str] = Counter()
        for candidate, decoded, pixels in rows.kept():
            captions.add(candidate.caption)
            writer.add(
                pixels,
                key=candidate.key,
                caption=candidate.caption,
                source_digest=decoded.source_digest,
                origin=candidate.origin,
            )
            noted.update(decoded.oddities)
            noted[CLEANED] += candidate.cleaned
        if not writer.rows:
            raise InputError(
                f"no row is left for the {tally.role} set: {counted(rows.refused)}",
                hint="check that the sources hold whole images",
            )
        keys = Counter(writer.keys)
        noted[SAME_KEY] = sum(count for count in keys.values() if count > 1)
        attributes = {
            "role": tally.role,
            "sources": list(tally.sources),
            "seen": tally.seen,
            "refused": dict(rows.refused),
            "noted": {what: count for what, count in sorted(noted.items()) if count},
            "input": encode(shop.spec),
            "recipe": recipe,
        }
        writer.finish(captions.tokens(), attributes)
    return path(), DataBlock.at(shop.store, path())
