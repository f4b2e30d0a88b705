"""Forget and retain rows: captions selected, rows sampled, images decoded, blocks written."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np

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
from slsgu_cli.sources.matching import matcher
from slsgu_cli.sources.opening import RowId, fetch, scan
from slsgu_cli.sources.reader import Reader, Row
from slsgu_cli.sources.texts import tokenizable
from slsgu_cli.store.blocks import DataBlock, Ints, Pixels, block_writer
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
    """The rows of a source for one set: a sample of those whose captions qualify.

    Where only captions are needed, rows qualify without images.
    """

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
    needs_images: bool = True

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
        if verdict == TAKE and self.needs_images and not row.has_image:
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


def _accepted(
    context: BuildContext,
    selection: Selection,
    candidates: Sequence[Candidate],
    avoid: frozenset[bytes],
    refused: Counter[str],
) -> Iterator[tuple[Candidate, Decoded, Pixels]]:
    """Yield accepted candidates with their images until there are enough; count the others.

    Images whose encoded bytes are in `avoid` are refused.
    """
    wanted = _most_rows(selection, candidates)
    spec = context.spec
    filtered = FilteredSet(context.filter) if context.filter else None
    pairs = set[tuple[bytes, str]]()
    start = 0
    with image_buffer(context.store, height=spec.height, width=spec.width) as images:
        while len(pairs) < wanted and start < len(candidates):
            part = candidates[start : start + _some_more(wanted - len(pairs))]
            start += len(part)
            for candidate, decoded, number in _decoded(context, selection, part, images, filtered):
                if len(pairs) == wanted:
                    return
                pair = (decoded.source_digest, candidate.caption)
                if decoded.reason is not None:
                    reason: str | None = decoded.reason
                elif decoded.source_digest in avoid:
                    reason = SAME_AS_FORGET
                elif pair in pairs:
                    reason = "duplicate"
                else:
                    pixels = images.get(number)
                    reason = filtered.refusal(number, pixels) if filtered else None
                    if reason is None:
                        pairs.add(pair)
                        yield candidate, decoded, pixels
                if reason is not None:
                    refused[reason] += 1


def _most_rows(selection: Selection, candidates: Sequence[Candidate]) -> int:
    """Return the number of rows if none is refused."""
    count = len(candidates)
    return count if selection.wanted is None else min(count, selection.wanted)


def _decoded(
    context: BuildContext,
    selection: Selection,
    candidates: Sequence[Candidate],
    images: ImageBuffer,
    filtered: FilteredSet | None,
) -> Iterator[tuple[Candidate, Decoded, int]]:
    """Yield candidates in order with the numbers of their images in the buffer.

    The buffer holds the images of one window. The first images of the next window are decoded
    while the caller handles these rows.
    """
    seekable = all(candidate.extent is not None for candidate in candidates)
    size = WINDOW if seekable else len(candidates)
    windows = [candidates[start : start + size] for start in range(0, len(candidates), size)]

    def encoded() -> Iterator[tuple[Candidate, bytes | None]]:
        for window in windows:
            by_place = {candidate.place: candidate for candidate in window}
            extents = {place: candidate.extent for place, candidate in by_place.items()}
            for place, data in fetch(selection.readers, extents):
                yield by_place[place], data

    stream = decode_in_order(encoded(), context.decode)
    with progress.bar(f"decoding the {selection.role} set", len(candidates)) as ticker:
        for window in windows:
            rows, captions = dict[RowId, tuple[Decoded, int]](), dict[int, str]()
            for candidate, decoded in islice(stream, len(window)):
                number = -1
                if decoded.pixels is not None:
                    number = images.put(decoded.pixels)
                    captions[number] = candidate.caption
                rows[candidate.place] = replace(decoded, pixels=None), number
                ticker.advance()
            if filtered:
                filtered.compare(captions, images.get)
            for candidate in window:
                yield candidate, *rows[candidate.place]
            images.clear()


def _some_more(rows: int) -> int:
    """Return a few more than are missing, so that one round suffices if few are refused."""
    return rows + max(16, rows // 32)


# Captions to tokenize in one call, while images are decoded.
CHUNK = 512
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
            path = _write(context, selection, candidates, avoid, recipe, (plain, avoiding))
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


def _write(
    context: BuildContext,
    selection: Selection,
    candidates: Sequence[Candidate],
    avoid: frozenset[bytes],
    recipe: dict[str, Any],
    paths: tuple[str, str],
) -> str:
    """Write the block of the accepted rows; return its path.

    Of the two paths, it is the second one if an image had to be avoided.
    """
    height, width = context.spec.height, context.spec.width
    refused, noted = Counter[str](), Counter[str]()
    captions, tokens = list[str](), list[Future[Ints]]()
    most = _most_rows(selection, candidates)
    with (
        ThreadPoolExecutor(1, "tokenize") as pool,
        block_writer(context.store, paths[0], height=height, width=width, rows=most) as writer,
    ):
        for candidate, decoded, pixels in _accepted(context, selection, candidates, avoid, refused):
            writer.add(
                pixels,
                key=candidate.key,
                caption=candidate.caption,
                source_digest=decoded.source_digest,
                origin=candidate.origin,
            )
            noted.update(decoded.oddities)
            noted[CLEANED] += candidate.cleaned
            captions.append(candidate.caption)
            if len(captions) == CHUNK:
                tokens.append(pool.submit(context.tokenize, captions))
                captions = []
        if not writer.rows:
            raise InputError(
                f"the {selection.role} set has no usable rows: {counted(refused)}",
                hint="check that the images in the sources are complete",
            )
        if captions:
            tokens.append(pool.submit(context.tokenize, captions))
        keys = Counter(writer.keys)
        noted[SAME_KEY] = sum(count for count in keys.values() if count > 1)
        attributes = {
            "role": selection.role,
            "sources": list(selection.sources),
            "seen": selection.seen,
            "refused": dict(refused),
            "noted": {what: count for what, count in sorted(noted.items()) if count},
            "input": encode(context.spec),
            "recipe": recipe,
        }
        path = paths[refused[SAME_AS_FORGET] > 0]
        all_tokens = np.concatenate([chunk.result() for chunk in tokens])
        writer.finish(all_tokens, attributes, path=path)
    return path
