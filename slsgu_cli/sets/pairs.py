"""Forget and retain rows: captions selected, rows sampled, images decoded, blocks written."""

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
    block_path,
    counted,
    file_recipe,
    reference,
    text_digest,
)
from slsgu_cli.sets.image_buffer import ImageBuffer, image_buffer
from slsgu_cli.sets.pair_filter import FilteredSet
from slsgu_cli.sets.sampling import (
    Candidate,
    SeededSample,
    portable_path,
    priority,
    row_identity,
    sample_size,
)
from slsgu_cli.sets.scan import BEYOND, EXCLUDED
from slsgu_cli.sets.tokenizing import tokenizing
from slsgu_cli.sources.matching import matcher
from slsgu_cli.sources.opening import RowId, fetch, scan
from slsgu_cli.sources.reader import Reader, Row
from slsgu_cli.sources.texts import tokenizable
from slsgu_cli.store.blocks import DataBlock, Pixels, block_writer
from slsgu_cli.store.locks import held

TAKE = ""
MATCHES_CONCEPT = "about the concept"

# The reason to refuse a caption; TAKE accepts it, None ignores it.
Rule = Callable[[str], str | None]


def rules(request: BuildRequest) -> tuple[Rule, Rule]:
    """Return the rules by which the forget set and the retain set accept captions."""
    is_about = matcher(request.patterns, regex=request.regex and bool(request.match))
    is_excluded = matcher(request.not_match, regex=request.regex)
    not_retained = matcher(request.retain_exclude, regex=request.regex)

    def forget(caption: str) -> str | None:
        if not is_about(caption):
            return None
        return EXCLUDED if is_excluded(caption) else TAKE

    def retain(caption: str) -> str | None:
        if is_about(caption):
            return MATCHES_CONCEPT
        return EXCLUDED if is_excluded(caption) or not_retained(caption) else TAKE

    return forget, retain


@dataclass(frozen=True, slots=True)
class Upstream:
    """The rows that a collection read and refused, before they reached a source."""

    seen: int
    refused: dict[str, int]


@dataclass(slots=True)
class Selection:
    """The rows of a source for one set: a sample of those whose captions qualify."""

    role: str
    rule: Rule
    wanted: int | None
    sources: Sequence[str]
    readers: Sequence[Reader]
    seen: int = 0
    captions: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    sample: SeededSample = field(init=False)
    upstream: Upstream | None = None

    def __post_init__(self) -> None:
        self.sample = SeededSample(None if self.wanted is None else sample_size(self.wanted))

    def follow(self, upstream: Upstream) -> None:
        """Add the counts of the rows that a collection refused."""
        self.upstream = upstream
        self.refused.update(upstream.refused)

    def consider(self, number: int, row: Row, caption: str, *, cleaned: bool, seed: int) -> None:
        """Count one row of file `number`, and offer it to the sample if it qualifies.

        `caption` is its caption as it is tokenized; `cleaned` if that differs from the source.
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
            candidate = Candidate(
                place, number, row.index, row.key, caption, cleaned, origin, row.extent
            )
            self.sample.offer(candidate)
        elif verdict is not None:
            self.refused[verdict] += 1


def _identity(reader: Reader, row: Row) -> str:
    """Return the text that determines a row's priority: its place in its source.

    A collected row is identified by its original place, because downloads come in any order.
    """
    origin = row.origin
    if origin is not None and origin.file != reader.path:
        return row_identity(origin.file, origin.row)
    return f"{portable_path(reader.path)}\0{row.index}\0{row.key}"


def first_pass(readers: Sequence[Reader], selections: Sequence[Selection], seed: int) -> None:
    """Read every caption of a source once, for all sets drawn from it."""
    skipped: Counter[str] = Counter()
    with progress.bar("reading captions", None) as ticker:
        for number, row in scan(readers, skipped):
            ticker.advance()
            caption, cleaned = tokenized(readers[number], row)
            for selection in selections:
                selection.consider(number, row, caption, cleaned=cleaned, seed=seed)
    for selection in selections:
        selection.refused.update(skipped)


def tokenized(reader: Reader, row: Row) -> tuple[str, bool]:
    """Return a row's caption as it is tokenized, and whether that differs from the source."""
    caption = reader.caption(row)
    cleaned = tokenizable(caption) if caption else ""
    return cleaned, cleaned != caption


SAME_AS_FORGET = "same image as a forget row"
WINDOW = 256
UNREADABLE = Decoded(None, "unreadable", b"")


@dataclass(frozen=True, slots=True)
class DecodedRow:
    """A candidate and its decoded image, without pixels: these are in the image buffer.

    `number` is that of the buffer; None if the image is unreadable.
    """

    candidate: Candidate
    decoded: Decoded = UNREADABLE
    number: int | None = None


@dataclass(frozen=True, slots=True)
class WindowEnd:
    """The end of a run of encoded images: all available images of `candidates` were yielded."""

    candidates: Sequence[Candidate]


@dataclass(slots=True)
class DecodedRows:
    """The second pass for one set: the accepted candidates, and counts of the refused ones.

    Images whose encoded bytes are in `avoid` are refused.
    """

    context: BuildContext
    selection: Selection
    candidates: Sequence[Candidate]
    avoid: frozenset[bytes]
    refused: Counter[str] = field(default_factory=Counter)
    _accepted: set[tuple[bytes, str]] = field(init=False, default_factory=set)
    _filtered: FilteredSet | None = field(init=False)

    def __post_init__(self) -> None:
        self._filtered = FilteredSet(self.context.filter) if self.context.filter else None

    @property
    def wanted(self) -> int:
        """The number of rows if none is refused."""
        count = len(self.candidates)
        return count if self.selection.wanted is None else min(count, self.selection.wanted)

    def accepted(self) -> Iterator[tuple[DecodedRow, Pixels]]:
        """Yield accepted rows until there are as many as wanted, or no candidates remain."""
        accepted, start = 0, 0
        spec = self.context.spec
        title = f"decoding the {self.selection.role} set"
        most = min(_some_more(self.wanted), len(self.candidates))
        with (
            progress.bar(title, most) as ticker,
            image_buffer(self.context.store, height=spec.height, width=spec.width) as images,
        ):
            while accepted < self.wanted and start < len(self.candidates):
                part = self.candidates[start : start + _some_more(self.wanted - accepted)]
                start += len(part)
                for row in self._decoded(part, images, ticker):
                    if accepted == self.wanted:
                        return
                    reason = self._refusal(row)
                    if reason is not None or row.number is None:
                        self.refused[reason or "unreadable"] += 1
                        continue
                    self._accepted.add((row.decoded.source_digest, row.candidate.caption))
                    accepted += 1
                    yield row, images.get(row.number)

    def _decoded(
        self, part: Sequence[Candidate], images: ImageBuffer, ticker: progress.Ticker
    ) -> Iterator[DecodedRow]:
        """Yield the rows of some candidates in order, decoded and filtered.

        The buffer keeps images until the end of their window. The first images of the next
        window are decoded while the caller handles these rows.
        """
        by_candidate: dict[RowId, DecodedRow] = {}
        for item, decoded in decode_in_order(self._encoded(part), self.context.decode):
            if isinstance(item, Candidate):
                number = None if decoded.pixels is None else images.put(decoded.pixels)
                row = DecodedRow(item, decoded.without_pixels(), number)
                by_candidate[item.place] = row
                ticker.advance()
                continue
            rows = [by_candidate.get(c.place, DecodedRow(c)) for c in item.candidates]
            if self._filtered:
                captions = {r.number: r.candidate.caption for r in rows if r.number is not None}
                self._filtered.test(captions, images.get)
            yield from rows
            by_candidate.clear()
            images.clear()

    def _encoded(
        self, part: Sequence[Candidate]
    ) -> Iterator[tuple[Candidate | WindowEnd, bytes | None]]:
        """Yield candidates with their encoded images in file order, and the end of each window."""
        seekable = all(candidate.extent is not None for candidate in part)
        size = WINDOW if seekable else len(part)
        for start in range(0, len(part), size):
            window = part[start : start + size]
            candidates = {candidate.place: candidate for candidate in window}
            extents = {place: candidate.extent for place, candidate in candidates.items()}
            for place, data in fetch(self.selection.readers, extents):
                yield candidates[place], data
            yield WindowEnd(window), None

    def _refusal(self, row: DecodedRow) -> str | None:
        """Return the reason to refuse a row; None accepts it."""
        source = row.decoded.source_digest
        if row.decoded.reason:
            return row.decoded.reason
        if source in self.avoid:
            return SAME_AS_FORGET
        if (source, row.candidate.caption) in self._accepted:
            return "duplicate"
        if self._filtered is None or row.number is None:
            return None
        return self._filtered.refusal(row.number)


def _some_more(rows: int) -> int:
    """Return a few more than are missing, so that one round suffices if few are unreadable."""
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
    """Build the block of a forget or retain set, or reuse an earlier one.

    Images whose encoded bytes are in `avoid` are left out.
    """
    role, candidates = selection.role, selection.sample.ranked()
    recipe = _recipe(context, selection, candidates, seed)
    avoided = digest(sorted(image.hex() for image in avoid))
    # Without an avoided image the block is the same for every concept, and so is its path.
    plain, avoiding = block_path(recipe), block_path(recipe | {"avoid": avoided})
    paths = (avoiding, plain) if avoid else (plain,)
    with held(context.store, plain, what=f"{role} rows"):
        existing = _existing_block(context, paths, avoid)
        if existing is not None:
            path, block = existing
            progress.note(f"{role}: reusing {block.rows} decoded rows")
        else:
            rows = DecodedRows(context, selection, candidates, avoid)
            path = _write(rows, recipe, plain=plain, avoiding=avoiding)
            block = DataBlock.at(context.store, path)
    refused = selection.refused + Counter(block.attributes["refused"])
    if role == "forget":
        used = block.rows + sum(block.attributes["refused"].values())
        refused[BEYOND] += max(0, selection.sample.offered - used)
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
        "screen": context.filter.recipe if context.filter else None,
        # The candidates replace the patterns: patterns with the same matches give the same set.
        "rows": text_digest(candidate.identity for candidate in candidates),
    }


def _existing_block(
    context: BuildContext, paths: Sequence[str], avoid: frozenset[bytes]
) -> tuple[str, DataBlock] | None:
    """Return path and block of an earlier build, if the block has no image to avoid."""
    for path in paths:
        block = context.existing_block(path)
        if block and avoid.isdisjoint(row.tobytes() for row in block.source_digests):
            return path, block
    return None


def _write(rows: DecodedRows, recipe: dict[str, Any], *, plain: str, avoiding: str) -> str:
    """Write the block of the accepted rows; return its path.

    The path is `avoiding` if an image had to be avoided, and `plain` otherwise.
    """
    context, selection = rows.context, rows.selection
    height, width = context.spec.height, context.spec.width
    noted: Counter[str] = Counter()
    with (
        tokenizing(context.tokenize) as captions,
        block_writer(context.store, plain, height=height, width=width, rows=rows.wanted) as writer,
    ):
        for row, pixels in rows.accepted():
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
                f"the {selection.role} set has no usable rows: {counted(rows.refused)}",
                hint="check that the images in the sources are complete",
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
