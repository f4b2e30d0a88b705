"""Compare the gradient with the whitened direction at equal forgetting, on ten concepts.

    python tests/bench/directions.py                         # five brands, five objects
    python tests/bench/directions.py --concepts git mouse --towers text
    python tests/bench/directions.py --steer margin

The concepts are drawn by seed from the embedded model's classes that have at least ten
held-out images, which layer and step are chosen by as well. Each tower's whole front is
searched along each direction for the shortest step; `both` is the better of the two
towers. Losses are points of TA@1 at the chosen step, against the original model; a concept
that no step forgets counts in `forgotten` alone. Then the edits of three concepts are put
into one model.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from slsgu_cli.checkpoints.edits import Edit, load_edit
from slsgu_cli.cli.recipe import DATA, RETAIN_SAMPLES, demo_request
from slsgu_cli.clip.evaluation import EvaluationSet, prepare
from slsgu_cli.clip.models import tokenizer
from slsgu_cli.clip.towers import CacheBudget
from slsgu_cli.clip.zeroshot import ImageSide
from slsgu_cli.method.evaluate import with_edits
from slsgu_cli.method.gradients import compute_gradients, load_graded
from slsgu_cli.method.ranking import rank
from slsgu_cli.method.search import search
from slsgu_cli.records.method import Direction, Steer, Tower
from slsgu_cli.records.options import NO_BOUND, PassOptions, RankOptions, SearchOptions
from slsgu_cli.sets.build import build_sets
from slsgu_cli.sources.captions import find_class
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer
from slsgu_cli.store.store import Store

LEAST_IMAGES = 10


@dataclass(frozen=True)
class Row:
    """One search: a concept, a direction, a tower, and what its chosen step leaves and costs."""

    concept: str
    kind: str
    direction: Direction
    tower: str
    layer: str
    ridge: float | None
    share: float
    fa1: float
    fa5: float
    gap: float
    brands: float
    objects: float
    forgotten: bool
    seconds: float


def draw(seed: int, each: int) -> dict[str, str]:
    """Return concepts drawn by seed, with their kind: brands, then objects."""
    held = Counter(
        pq.read_table(DATA / "heldout.parquet", columns=["concept"])["concept"].to_pylist()
    )
    classes = json.loads((DATA / "classes.json").read_text())
    rng = random.Random(seed)
    drawn = {}
    for kind, names in sorted(classes.items()):
        enough = sorted(name for name in names if held[name] >= LEAST_IMAGES)
        drawn |= dict.fromkeys(rng.sample(enough, each), kind)
    return drawn


@contextmanager
def features_known() -> Iterator[None]:
    """Let edits of text layers be measured with the original model's image features."""
    plain = ImageSide.base_pass
    known: dict[str, torch.Tensor] = {}

    def base_pass(
        side: ImageSide, stages: Sequence[int], budget: CacheBudget, *how: Any
    ) -> Iterator[int]:
        if stages:
            yield from plain(side, stages, budget, *how)
            return
        place = side.block.where
        if place not in known:
            rows = np.arange(side.block.rows)
            whole = replace(side, rows=rows, labels=torch.zeros(len(rows), dtype=torch.long))
            for _ in plain(whole, stages, budget):
                pass
            known[place] = whole.features
        side.features = known[place][torch.from_numpy(side.rows)]
        yield len(side)

    ImageSide.base_pass = base_pass
    try:
        yield
    finally:
        ImageSide.base_pass = plain


def shortest(steer: Steer) -> SearchOptions:
    """Return how the paper chooses, but for the direction and the accuracy that steers."""
    return SearchOptions(steer=steer, reserve=1.0, max_class_loss=NO_BOUND)


def grade(store: Store, concept: str, others: Sequence[str], retain: int) -> None:
    """Build the set and its gradients; all concepts share one retain set."""
    request = replace(
        demo_request(concept), retain_exclude=list(others), retain_samples=retain, report_share=0
    )
    build_sets(store, request)
    compute_gradients(store, request.name, model=None, options=PassOptions())


def searched(
    store: Store, concept: str, kind: str, towers: Sequence[Tower], steer: Steer
) -> Iterator[Row]:
    """Search each tower along each direction; the best edit of a direction is kept aside."""
    for direction in Direction:
        rows, edits = [], []
        for tower in towers:
            start = time.perf_counter()
            options = RankOptions(direction=direction, tower=tower)
            rank(store, concept, options=options)
            result = search(store, concept, options=shortest(steer))
            chosen, baseline = result.chosen, result.trials.baseline_utility
            lost = {
                name: baseline[name].top1 - found.top1
                for name, found in (chosen.utility or {}).items()
            }
            rows.append(
                Row(
                    concept, kind, direction, str(tower), chosen.layer, chosen.ridge, chosen.share,
                    chosen.forget.top1, chosen.forget.top5, chosen.gap,
                    lost["brands"], lost["objects"], result.forgotten,
                    time.perf_counter() - start,
                )
            )  # fmt: skip
            edits.append(store.read_bytes(Artifact.EDIT.path(concept)))
        best = min(range(len(rows)), key=lambda i: (not rows[i].forgotten, loss(rows[i])))
        store.write_bytes(Artifact.EDIT.path(f"{concept}-{direction}"), edits[best])
        yield from rows
        if len(rows) > 1:
            yield replace(rows[best], tower="both", seconds=sum(row.seconds for row in rows))


def loss(row: Row) -> float:
    """Return the mean loss of a row, by which the better tower is chosen."""
    return (row.brands + row.objects) / 2


def summary(rows: Sequence[Row]) -> list[str]:
    """Return the table: a line for each direction and tower."""
    lines = ["tower\tdirection\tforgotten\tbrands mean\tworst\tobjects mean\tworst\tseconds"]
    for tower in ("text", "vision", "both"):
        for direction in Direction:
            own = [row for row in rows if (row.tower, row.direction) == (tower, direction)]
            done = [row for row in own if row.forgotten]
            if not done:
                continue
            figures = []
            for name in ("brands", "objects"):
                lost = [getattr(row, name) for row in done]
                figures += [f"{sum(lost) / len(lost):.2f}", f"{max(lost):.2f}"]
            seconds = sum(row.seconds for row in own) / len(own)
            words = [tower, direction, f"{len(done)} of {len(own)}", *figures, f"{seconds:.0f}"]
            lines.append("\t".join(words))
    return lines


def joint(store: Store, concepts: Sequence[str]) -> list[str]:
    """Return what the edits of some concepts do together, a line for each direction."""
    manifest = read_manifest(store, concepts[0])
    resolved, model = load_graded(manifest, read_pointer(store, manifest), "cpu")
    evaluation = prepare(store, manifest, model, tokenize=tokenizer(resolved), device="cpu")
    lines = ["direction\tconcepts\tFA@1\tFA@5\tbrands lost\tobjects lost"]
    kept: dict[str, float] = {}
    found: dict[str, list[Edit]] = {"original": []}
    for direction in Direction:
        found[direction] = [load_edit(store, f"{c}-{direction}") for c in concepts]
    of_text = all(e.header.tower is Tower.TEXT for edits in found.values() for e in edits)
    with torch.no_grad(), features_known() if of_text else nullcontext():
        for label, edits in found.items():
            with with_edits(model, edits):
                evaluation.base_pass((), cache_bytes=0)
                forget, utility = shares(evaluation.forget, evaluation.utility, concepts)
            lost = [f"{kept.setdefault(name, top1) - top1:.2f}" for name, top1 in utility.items()]
            words = [label, ", ".join(concepts), *(f"{value:.1f}" for value in forget), *lost]
            lines.append("\t".join(words))
    return lines


def shares(
    forget: EvaluationSet, utility: dict[str, EvaluationSet], concepts: Sequence[str]
) -> tuple[tuple[float, float], dict[str, float]]:
    """Return FA over the images of all `concepts`, and TA@1 over the images of none of them."""
    gone, kept = [forget.base_ranks()], {}
    for name, group in sorted(utility.items()):
        own = [find_class(group.names, concept) for concept in concepts]
        shows = torch.isin(group.images.labels, torch.tensor([i for i in own if i is not None]))
        ranks = group.base_ranks()
        gone.append(ranks[shows])
        kept[name] = group.accuracy_of(ranks[~shows]).top1
    found = forget.accuracy_of(torch.cat(gone))
    return (found.top1, found.top5), kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", nargs="+", help="of those drawn, these only")
    parser.add_argument("--each", type=int, default=5, help="brands, and as many objects")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--towers", nargs="+", type=Tower, default=list(Tower))
    parser.add_argument("--retain", type=int, default=RETAIN_SAMPLES)
    parser.add_argument("--steer", type=Steer, default=Steer.FA5)
    parser.add_argument("--rows", type=Path, help="keep each search as a line of JSON here")
    parser.add_argument("--store", help="keep sets, gradients and edits here")
    args = parser.parse_args()
    drawn = draw(args.seed, args.each)
    concepts = [c for c in drawn if not args.concepts or c in args.concepts]
    with tempfile.TemporaryDirectory() as folder:
        store = Store(args.store or f"{folder}/store")
        rows: list[Row] = []
        for concept in concepts:
            grade(store, concept, list(drawn), args.retain)
            for row in searched(store, concept, drawn[concept], args.towers, args.steer):
                rows.append(row)
                sys.stderr.write(f"{json.dumps(asdict(row))}\n")
        if args.rows:
            args.rows.write_text("".join(f"{json.dumps(asdict(row))}\n" for row in rows))
        sys.stdout.write("\n".join(summary(rows)) + "\n\n")
        if len(concepts) >= 3:
            three = [*concepts[:2], concepts[-1]]
            sys.stdout.write("\n".join(joint(store, three)) + "\n")


if __name__ == "__main__":
    main()
