"""Forget and retain sets: which captions qualify, which rows are drawn, what is kept.

The first pass offers every qualifying row to a seeded draw. The second decodes the drawn
rows, dropping what is broken or a duplicate and taking the next in line instead. Rows are
written in the order of the draw, so that neighbours in the source do not share a mini-batch.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from slsgu_cli import progress
from slsgu_cli.draw import BEYOND, Candidate, identities
from slsgu_cli.errors import InputError
from slsgu_cli.records import DataRef, digest, encode
from slsgu_cli.second_pass import SAME_AS_FORGET, SecondPass
from slsgu_cli.set_writer import block_writer
from slsgu_cli.sets import DataBlock
from slsgu_cli.tally import Tally
from slsgu_cli.tokenizing import tokenizing
from slsgu_cli.workshop import Workshop, block_path, counted, file_recipe, reference, text_digest

CLEANED = "control characters in the caption"
SAME_KEY = "key of another row too"


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
    rows = SecondPass(shop, tally, candidates, avoid)

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
