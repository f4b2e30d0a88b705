"""Forget and retain sets: which captions qualify, which rows are drawn, what is kept.

The first pass offers every qualifying row to a seeded draw. The second decodes the drawn
rows, dropping what is broken or a duplicate and taking the next in line instead. Rows are
written in the order of the draw, so that neighbours in the source do not share a mini-batch.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from slsgu_cli.decoding import Decoded, decode_in_order
from slsgu_cli.draw import BEYOND, Candidate, identities
from slsgu_cli.errors import InputError
from slsgu_cli.records import DataRef, digest, encode
from slsgu_cli.scratch import Scratch, scratch
from slsgu_cli.set_writer import block_writer
from slsgu_cli.sets import DataBlock
from slsgu_cli.sources import RowId, fetch
from slsgu_cli.tally import Tally
from slsgu_cli.workshop import Workshop, block_path, counted, file_recipe, reference, text_digest

SAME_AS_FORGET = "same image as a forget row"
CLEANED = "control characters in the caption"
SAME_KEY = "key of another row too"


@dataclass(frozen=True, slots=True)
class Kept:
    """A row that is in the set: the candidate, and its decoded image in the scratch file."""

    candidate: Candidate
    number: int
    decoded: Decoded


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
        refused[BEYOND] += max(0, tally.draw.offered - taken)
    seen = tally.upstream.seen if tally.upstream else tally.seen
    return reference(path, found, seen=seen, refused=refused, sources=tally.sources), found


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
        "screen": shop.screen.recipe if shop.screen else None,
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
        with (
            ThreadPoolExecutor(1, thread_name_prefix="tokenize") as aside,
            block_writer(shop.store, path, height=height, width=width, rows=len(kept)) as writer,
        ):
            tokens = aside.submit(shop.tokens, [row.candidate.caption for row in kept])
            for row in kept:
                writer.add(
                    images.get(row.number),
                    key=row.candidate.key,
                    caption=row.candidate.caption,
                    source_digest=row.decoded.source_digest,
                    origin=row.candidate.origin,
                )
            attributes = {
                "role": tally.role,
                "sources": list(tally.sources),
                "seen": tally.seen,
                "refused": dict(refused),
                "noted": _noted(kept),
                "input": encode(shop.spec),
                "recipe": recipe,
            }
            writer.finish(tokens.result(), attributes)
    return path, DataBlock.at(shop.store, path)


def _noted(kept: Sequence[Kept]) -> dict[str, int]:
    """Count what is odd about rows that were kept, by what it is."""
    keys = Counter(row.candidate.key for row in kept)
    noted = Counter(what for row in kept for what in row.decoded.oddities)
    noted[CLEANED] = sum(row.candidate.cleaned for row in kept)
    noted[SAME_KEY] = sum(keys[row.candidate.key] > 1 for row in kept)
    return {what: count for what, count in sorted(noted.items()) if count}


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
    look = shop.screen.start() if shop.screen else None
    while len(kept) < wanted and start < len(candidates):
        missing = wanted - len(kept)
        # A few more than are missing, so that one round is enough where few are broken.
        line = candidates[start : start + missing + max(16, missing // 32)]
        start += len(line)
        found = _decode_round(shop, tally, line, images)
        if look:
            look.see(_whole(line, found), images.get)
        for candidate in line:
            if len(kept) == wanted:
                break
            number, decoded = found.get((candidate.file, candidate.index), (-1, None))
            reason = _refusal(candidate, decoded, met, avoid)
            if look and not reason:
                reason = look.refusal(number)
            if decoded is None or reason:
                refused[reason or "unreadable"] += 1
                continue
            met.add((decoded.source_digest, candidate.caption))
            kept.append(Kept(candidate, number, decoded))
    return kept, refused


def _whole(line: Sequence[Candidate], found: Mapping[RowId, tuple[int, Decoded]]) -> dict[int, str]:
    """Return the captions of the images that could be decoded, by the image's number."""
    places = ((found.get((c.file, c.index), (-1, None))[0], c.caption) for c in line)
    return {number: caption for number, caption in places if number >= 0}


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
        extents = {(c.file, c.index): c.extent for c in line}
        encoded = fetch(tally.readers, extents)
        for place, decoded in decode_in_order(encoded, shop.decode):
            number = -1 if decoded.pixels is None else images.put(decoded.pixels)
            found[place] = number, decoded.without_pixels()
            ticker.advance()
    return found
