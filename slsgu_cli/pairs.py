"""Forget and retain sets: which captions qualify, which rows are drawn, what is kept.

The first pass offers every qualifying row to a seeded draw. The second decodes the drawn
rows, dropping what is broken or a duplicate and taking the next in line instead. Rows are
written in the order of the draw, so that neighbours in the source do not share a mini-batch.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from slsgu_cli.decoding import Decoded, decode_in_order
from slsgu_cli.draw import Candidate, Draw, by_file, identities, priority
from slsgu_cli.errors import InputError
from slsgu_cli.records import DataRef, digest, encode
from slsgu_cli.samples import Reader, Row
from slsgu_cli.scratch import Scratch, scratch
from slsgu_cli.set_writer import block_writer
from slsgu_cli.sets import DataBlock
from slsgu_cli.sources import RowId, fetch, scan
from slsgu_cli.workshop import Workshop, block_path, counted, file_recipe, reference, text_digest

TAKE = ""
SAME_AS_FORGET = "same image as a forget row"
BEYOND = "beyond --max-forget"
# What a caption is refused for; TAKE if it qualifies, None if it is of no concern.
Rule = Callable[[str], str | None]


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

    def __post_init__(self) -> None:
        # Twice what is wanted: every other row may be broken before the set comes out short.
        self.draw = Draw(None if self.wanted is None else 2 * self.wanted + 1000)

    def meet(self, number: int, row: Row, seed: int) -> None:
        """Take one row of the source into account."""
        self.seen += 1
        reader = self.readers[number]
        caption = row.caption
        if caption is None and reader.labels_are_captions and row.label:
            caption = " ".join(row.label.replace("_", " ").split())
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
            shard = "/".join(reader.path.rsplit("/", 2)[-2:])
            place = priority(seed, f"{shard}\0{row.index}\0{row.key}")
            self.draw.offer(Candidate(place, number, row.index, row.key, caption))
        elif verdict is not None:
            self.refused[verdict] += 1


@dataclass(frozen=True, slots=True)
class Kept:
    """A row that is in the set: the candidate, and its decoded image in the scratch file."""

    candidate: Candidate
    number: int
    decoded: Decoded


def first_pass(
    shop: Workshop, readers: Sequence[Reader], tallies: Sequence[Tally], seed: int
) -> None:
    """Read every caption of a source once, for all the sets drawn from it."""
    trouble: Counter[str] = Counter()
    with shop.console.progress("reading captions", None) as ticker:
        for number, row in scan(readers, trouble, tick=ticker.advance):
            for tally in tallies:
                tally.meet(number, row, seed)
    for tally in tallies:
        tally.refused.update(trouble)


def build_pairs(
    shop: Workshop, tally: Tally, *, seed: int, avoid: frozenset[bytes] = frozenset()
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
        shop.console.note(f"{tally.role}: {found.rows} rows were decoded before and are used again")
    else:
        path, found = _make(shop, tally, candidates, avoid, (plain, avoiding, recipe))
    refused = tally.refused + Counter(found.attributes["refused"])
    if tally.role == "forget":
        taken = found.rows + sum(found.attributes["refused"].values())
        refused[BEYOND] = max(0, tally.draw.offered - taken)
    return reference(path, found, seen=tally.seen, refused=refused, sources=tally.sources), found


def _recipe(
    shop: Workshop, tally: Tally, candidates: Sequence[Candidate], seed: int
) -> dict[str, Any]:
    return {
        "role": tally.role,
        "files": file_recipe(tally.readers),
        "pixels": shop.pixel_recipe(),
        "tokens": [shop.spec.tokenizer, shop.spec.context_length],
        "seed": seed,
        "wanted": tally.wanted,
        # The rows in line stand for the patterns: patterns that choose alike make one set.
        "rows": text_digest(identities(candidates)),
    }


def _made_before(
    shop: Workshop, paths: Sequence[str], avoid: frozenset[bytes]
) -> tuple[str, DataBlock] | None:
    for path in paths:
        block = shop.standing(path)
        if block and avoid.isdisjoint(row.tobytes() for row in block.source_digests):
            return path, block
    return None


def _make(
    shop: Workshop,
    tally: Tally,
    candidates: Sequence[Candidate],
    avoid: frozenset[bytes],
    place: tuple[str, str, dict[str, Any]],
) -> tuple[str, DataBlock]:
    plain, avoiding, recipe = place
    height, width = shop.spec.height, shop.spec.width
    with scratch(shop.store, height=height, width=width) as images:
        kept, refused = _second_pass(shop, tally, candidates, avoid, images)
        if not kept:
            raise InputError(
                f"no row is left for the {tally.role} set: {counted(refused)}",
                hint="check that the sources hold whole images",
            )
        path = avoiding if refused[SAME_AS_FORGET] else plain
        with block_writer(shop.store, path, height=height, width=width, rows=len(kept)) as writer:
            for row in kept:
                writer.add(
                    images.get(row.number),
                    row.decoded.digest,
                    key=row.candidate.key,
                    caption=row.candidate.caption,
                    source_digest=row.decoded.source_digest,
                )
            attributes = {
                "role": tally.role,
                "sources": list(tally.sources),
                "seen": tally.seen,
                "refused": dict(refused),
                "input": encode(shop.spec),
                "recipe": recipe,
            }
            writer.finish(shop.tokens(writer.captions), attributes)
    return path, DataBlock.at(shop.store, path)


def _second_pass(
    shop: Workshop,
    tally: Tally,
    candidates: Sequence[Candidate],
    avoid: frozenset[bytes],
    images: Scratch,
) -> tuple[list[Kept], Counter[str]]:
    """Decode candidates in rounds until as many as wanted are kept, or none is left."""
    wanted = len(candidates) if tally.wanted is None else tally.wanted
    kept: list[Kept] = []
    refused: Counter[str] = Counter()
    met: set[tuple[bytes, str]] = set()
    start = 0
    while len(kept) < wanted and start < len(candidates):
        missing = wanted - len(kept)
        # A few more than are missing, so that one round is enough where few are broken.
        line = candidates[start : start + missing + max(16, missing // 32)]
        start += len(line)
        found = _decode_round(shop, tally, line, images)
        for candidate in line:
            if len(kept) == wanted:
                break
            number, decoded = found.get((candidate.file, candidate.index), (-1, None))
            reason = _refusal(candidate, decoded, met, avoid)
            if decoded is None or reason:
                refused[reason or "unreadable"] += 1
                continue
            met.add((decoded.source_digest, candidate.caption))
            kept.append(Kept(candidate, number, decoded))
    return kept, refused


def _refusal(
    candidate: Candidate,
    decoded: Decoded | None,
    met: set[tuple[bytes, str]],
    avoid: frozenset[bytes],
) -> str | None:
    if decoded is None or decoded.reason:
        return decoded.reason if decoded else "unreadable"
    if decoded.source_digest in avoid:
        return SAME_AS_FORGET
    return "duplicate" if (decoded.source_digest, candidate.caption) in met else None


def _decode_round(
    shop: Workshop, tally: Tally, line: Sequence[Candidate], images: Scratch
) -> dict[RowId, tuple[int, Decoded]]:
    """Return where each candidate's image was put; -1 where there is none."""
    found: dict[RowId, tuple[int, Decoded]] = {}
    with shop.console.progress(f"decoding the {tally.role} set", len(line)) as ticker:
        encoded = fetch(tally.readers, by_file(line))
        for place, decoded in decode_in_order(encoded, shop.decode):
            number = -1 if decoded.pixels is None else images.put(decoded.pixels)
            found[place] = number, decoded.without_pixels()
            ticker.advance()
    return found
