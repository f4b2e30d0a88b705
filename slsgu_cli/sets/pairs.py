"""Forget and retain rows: captions considered, rows drawn, images decoded, blocks written."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from slsgu_cli import progress
from slsgu_cli.clip.decoding import Decoded, decode_in_order
from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import digest, encode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import DataRef, Origin
from slsgu_cli.sets.context import (
    BuildContext,
    Candidate,
    Draw,
    Scratch,
    ScreenedSet,
    block_path,
    counted,
    file_recipe,
    reference,
    scratch,
    text_digest,
    tokenizing,
)
from slsgu_cli.sets.metadata import BEYOND, EXCLUDED
from slsgu_cli.sources.captions import matcher
from slsgu_cli.sources.opening import RowId, fetch, scan
from slsgu_cli.sources.rows import (
    Reader,
    Row,
    caption_of,
    first_met,
    line_for,
    priority,
    tail,
    tokenizable,
)
from slsgu_cli.store.blocks import DataBlock, Pixels, block_writer
from slsgu_cli.store.locks import held

TAKE = ""
MATCHES_CONCEPT = "about the concept"

# What a caption is refused for; TAKE if it qualifies, None if it is of no concern.
Rule = Callable[[str], str | None]


def rules(request: BuildRequest) -> tuple[Rule, Rule]:
    """Return which captions the forget set and the retain set take."""
    about = matcher(request.patterns, regex=request.regex and bool(request.match))
    excluded = matcher(request.not_match, regex=request.regex)
    not_retained = matcher(request.retain_exclude, regex=request.regex)

    def forget(caption: str) -> str | None:
        if not about(caption):
            return None
        return EXCLUDED if excluded(caption) else TAKE

    def retain(caption: str) -> str | None:
        if about(caption):
            return MATCHES_CONCEPT
        return EXCLUDED if excluded(caption) or not_retained(caption) else TAKE

    return forget, retain


@dataclass(frozen=True, slots=True)
class Upstream:
    """Rows that were seen and left out before they could come to a source."""

    seen: int
    refused: dict[str, int]


@dataclass(slots=True)
class Selection:
    """The rows of a source that one set may take: the captions that qualify, and the draw."""

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

    def consider(self, number: int, row: Row, caption: str, *, odd: bool, seed: int) -> None:
        """Count one row of file `number`, and offer it to the draw if it qualifies.

        `caption` is its caption as it is tokenized, `odd` if that is not what stands there.
        """
        self.seen += 1
        if not caption:
            self.refused["no caption"] += 1
            return
        self.captions += 1
        if len(self.examples) < 3:
            self.examples.append(caption)
        verdict = self.rule(caption)
        if verdict == TAKE and not row.has_image:
            verdict = "no image"
        if verdict == TAKE:
            reader = self.readers[number]
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


def first_pass(readers: Sequence[Reader], selections: Sequence[Selection], seed: int) -> None:
    """Read every caption of a source once, for all the sets drawn from it."""
    trouble: Counter[str] = Counter()
    with progress.bar("reading captions", None) as ticker:
        for number, row in scan(readers, trouble):
            ticker.advance()
            caption, odd = tokenized(readers[number], row)
            for selection in selections:
                selection.consider(number, row, caption, odd=odd, seed=seed)
    for selection in selections:
        selection.refused.update(trouble)


def tokenized(reader: Reader, row: Row) -> tuple[str, bool]:
    """Return a row's caption as it is tokenized, and whether that is not what stands there."""
    caption = caption_of(reader, row)
    cleaned = tokenizable(caption) if caption else ""
    return cleaned, cleaned != caption


SAME_AS_FORGET = "same image as a forget row"
WINDOW = 256
UNREADABLE = Decoded(None, "unreadable", b"")


@dataclass(frozen=True, slots=True)
class DecodedRow:
    """A candidate, and what became of its image.

    `decoded` is without the pixels: they lie in the scratch under `number`; None for none.
    """

    candidate: Candidate
    decoded: Decoded = UNREADABLE
    number: int | None = None


@dataclass(frozen=True, slots=True)
class WindowEnd:
    """Ends a run of encoded images: those of these candidates that can be had have come."""

    candidates: Sequence[Candidate]


@dataclass(slots=True)
class DecodedRows:
    """The second pass for one set: which candidates are kept, and why others are not.

    Images whose encoded bytes are in `avoid` are left out.
    """

    context: BuildContext
    selection: Selection
    candidates: Sequence[Candidate]
    avoid: frozenset[bytes]
    refused: Counter[str] = field(default_factory=Counter)
    _kept: set[tuple[bytes, str]] = field(init=False, default_factory=set)
    _screened: ScreenedSet | None = field(init=False)

    def __post_init__(self) -> None:
        self._screened = ScreenedSet(self.context.screen) if self.context.screen else None

    @property
    def wanted(self) -> int:
        """How many rows are kept if none is refused."""
        count = len(self.candidates)
        return count if self.selection.wanted is None else min(count, self.selection.wanted)

    def kept(self) -> Iterator[tuple[DecodedRow, Pixels]]:
        """Yield the rows that are kept, until as many as wanted are or none is left."""
        kept, start = 0, 0
        spec = self.context.spec
        title = f"decoding the {self.selection.role} set"
        most = min(_some_more(self.wanted), len(self.candidates))
        with (
            progress.bar(title, most) as ticker,
            scratch(self.context.store, height=spec.height, width=spec.width) as images,
        ):
            while kept < self.wanted and start < len(self.candidates):
                line = self.candidates[start : start + _some_more(self.wanted - kept)]
                start += len(line)
                for row in self._decoded(line, images, ticker):
                    if kept == self.wanted:
                        return
                    reason = self._refusal(row)
                    if reason is not None or row.number is None:
                        self.refused[reason or "unreadable"] += 1
                        continue
                    self._kept.add((row.decoded.source_digest, row.candidate.caption))
                    kept += 1
                    yield row, images.get(row.number)

    def _decoded(
        self, line: Sequence[Candidate], images: Scratch, ticker: progress.Ticker
    ) -> Iterator[DecodedRow]:
        """Yield the line's rows in order, decoded and looked at by the screen.

        An image is kept until the next window begins. The first images of that are decoded
        while the rows of this one are dealt with.
        """
        by_candidate: dict[RowId, DecodedRow] = {}
        for item, decoded in decode_in_order(self._encoded(line), self.context.decode):
            if isinstance(item, Candidate):
                number = None if decoded.pixels is None else images.put(decoded.pixels)
                row = DecodedRow(item, decoded.without_pixels(), number)
                by_candidate[item.place] = row
                ticker.advance()
                continue
            rows = [by_candidate.get(c.place, DecodedRow(c)) for c in item.candidates]
            if self._screened:
                captions = {r.number: r.candidate.caption for r in rows if r.number is not None}
                self._screened.judge(captions, images.get)
            yield from rows
            by_candidate.clear()
            images.clear()

    def _encoded(
        self, line: Sequence[Candidate]
    ) -> Iterator[tuple[Candidate | WindowEnd, bytes | None]]:
        """Yield candidates with their encoded images as they lie, and the end of each window."""
        at_hand = all(candidate.extent is not None for candidate in line)
        size = WINDOW if at_hand else len(line)
        for start in range(0, len(line), size):
            window = line[start : start + size]
            candidates = {candidate.place: candidate for candidate in window}
            extents = {place: candidate.extent for place, candidate in candidates.items()}
            for place, data in fetch(self.selection.readers, extents):
                yield candidates[place], data
            yield WindowEnd(window), None

    def _refusal(self, row: DecodedRow) -> str | None:
        """Return why a row is not kept, None if it is."""
        source = row.decoded.source_digest
        if row.decoded.reason:
            return row.decoded.reason
        if source in self.avoid:
            return SAME_AS_FORGET
        if (source, row.candidate.caption) in self._kept:
            return "duplicate"
        if self._screened is None or row.number is None:
            return None
        return self._screened.refusal(row.number)


def _some_more(rows: int) -> int:
    """Return a few more than are missing, so that one round is enough where few are broken."""
    return rows + max(16, rows // 32)


CLEANED = "control characters in the caption"
SAME_KEY = "key of another row too"


def build_pairs(
    context: BuildContext,
    selection: Selection,
    *,
    seed: int,
    avoid: frozenset[bytes] = frozenset(),
) -> tuple[DataRef, DataBlock]:
    """Make the block of a forget or retain set, or find it made.

    Images whose encoded bytes are in `avoid` are left out.
    """
    role, candidates = selection.role, selection.draw.ranked()
    recipe = _recipe(context, selection, candidates, seed)
    avoided = digest(sorted(image.hex() for image in avoid))
    # A set in which nothing had to be avoided is the same for every concept, and so its path.
    plain, avoiding = block_path(recipe), block_path(recipe | {"avoid": avoided})
    paths = (avoiding, plain) if avoid else (plain,)
    standing = _standing_block(context, paths, avoid)
    if standing is None:
        with held(context.store, plain, what=f"{role} rows"):
            # Another process may have made it meanwhile.
            standing = _standing_block(context, paths, avoid, again=True)
            if standing is None:
                rows = DecodedRows(context, selection, candidates, avoid)
                path = _write(rows, recipe, plain=plain, avoiding=avoiding)
                block = DataBlock.at(context.store, path)
    if standing is not None:
        path, block = standing
        progress.note(f"{role}: {block.rows} rows were decoded before and are used again")
    refused = selection.refused + Counter(block.attributes["refused"])
    if role == "forget":
        used = block.rows + sum(block.attributes["refused"].values())
        refused[BEYOND] += max(0, selection.draw.offered - used)
    seen = selection.upstream.seen if selection.upstream else selection.seen
    return reference(path, block, seen=seen, refused=refused, sources=selection.sources), block


def _recipe(
    context: BuildContext, selection: Selection, candidates: Sequence[Candidate], seed: int
) -> dict[str, Any]:
    return {
        "role": selection.role,
        "files": file_recipe(selection.readers),
        "pixels": context.pixel_recipe(),
        "tokens": [context.spec.tokenizer, context.spec.context_length],
        "seed": seed,
        "wanted": selection.wanted,
        "screen": context.screen.recipe if context.screen else None,
        # The rows in line stand for the patterns: patterns that choose alike make one set.
        "rows": text_digest(candidate.identity for candidate in candidates),
    }


def _standing_block(
    context: BuildContext, paths: Sequence[str], avoid: frozenset[bytes], *, again: bool = False
) -> tuple[str, DataBlock] | None:
    """Return the path and block made before, if one has nothing that is to be avoided."""
    for path in paths:
        block = context.standing(path, again=again)
        if block and avoid.isdisjoint(row.tobytes() for row in block.source_digests):
            return path, block
    return None


def _write(rows: DecodedRows, recipe: dict[str, Any], *, plain: str, avoiding: str) -> str:
    """Write the block of the rows that are kept; return its path.

    It is `avoiding` where rows depend on what was avoided, and else `plain`.
    """
    context, selection = rows.context, rows.selection
    height, width = context.spec.height, context.spec.width
    noted: Counter[str] = Counter()
    with (
        tokenizing(context.tokenize) as captions,
        block_writer(context.store, plain, height=height, width=width, rows=rows.wanted) as writer,
    ):
        for row, pixels in rows.kept():
            captions.add(row.candidate.caption)
            writer.add(
                pixels,
                key=row.candidate.key,
                caption=row.candidate.caption,
                source_digest=row.decoded.source_digest,
                origin=row.candidate.origin,
            )
            noted.update(row.decoded.oddities)
            noted[CLEANED] += row.candidate.cleaned
        if not writer.rows:
            raise InputError(
                f"no row is left for the {selection.role} set: {counted(rows.refused)}",
                hint="check that the sources hold whole images",
            )
        keys = Counter(writer.keys)
        noted[SAME_KEY] = sum(count for count in keys.values() if count > 1)
        attributes = {
            "role": selection.role,
            "sources": list(selection.sources),
            "seen": selection.seen,
            "refused": dict(rows.refused),
            "noted": {what: count for what, count in sorted(noted.items()) if count},
            "input": encode(context.spec),
            "recipe": recipe,
        }
        path = avoiding if rows.refused[SAME_AS_FORGET] else plain
        writer.finish(captions.tokens(), attributes, path=path)
    return path
