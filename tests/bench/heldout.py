"""Measure the edits of many searches on test images.

    python tests/bench/heldout.py                       # 16 concepts drawn by seed 0
    python tests/bench/heldout.py --concepts all --folds 8 --store heldout-store
    python tests/bench/heldout.py --ways default paper
    python tests/bench/heldout.py --ways text-gradient text-whitened vision-gradient

Concepts are drawn from the embedded model's classes with at least ten held-out images, as many
brands as objects. Each is built, graded and ranked as in the demo, then searched in several ways
on the same gradients. Figures are of the test half of the held-out images, as edits record them.
The ways are the defaults, other overshoots (`short`, `long`), plain TA@1 as utility (`count`), the
paper's choice, and the layers that a direction tries in one tower. With `--folds`, concepts are
split as `sweep` splits classes: those of a fold share a retain set without any of them, its
gradient and its covariances, and all share the features of the original model. Run it again on
the same store to resume. At the end it prints the seconds per concept.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import pyarrow.parquet as pq

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.cli.demo import DATA, demo_request
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.directions import REGISTRY, Direction, DirectionSpec
from slsgu_cli.records.method import EditHeader, Tower, UtilityMetric
from slsgu_cli.records.options import BuildRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.studies import SweepRequest
from slsgu_cli.sets.build import build_sets
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer, read_ranking
from slsgu_cli.store.store import Store

LEAST_IMAGES = 10
WAYS = {
    "default": SearchOptions(),
    "short": SearchOptions(overshoot=1.0),
    "long": SearchOptions(overshoot=1.5),
    "count": SearchOptions(utility=UtilityMetric.TA1),
    "paper": SearchOptions(paper=True),
}
TOWER_WAYS = {f"{tower}-{way}": (tower, way) for tower in Tower for way in REGISTRY}
ALL_WAYS = (*WAYS, *TOWER_WAYS)


@dataclass(frozen=True)
class Row:
    """A concept, the way of its search, and the effect of its edit on test images."""

    name: str
    kind: str
    way: str
    header: EditHeader
    seconds: float

    @property
    def figures(self) -> tuple[float, ...]:
        """FA@1, FA@5, and points of TA@1 lost on brands, objects, and the nearest names."""
        edit = self.header
        lost = (
            edit.baseline_utility[name].top1 - edit.utility[name].top1
            for name in ("brands", "objects")
        )
        nearest = sum(each.lost for each in edit.nearest) / (len(edit.nearest) or 1)
        return (edit.forget.top1, edit.forget.top5, *lost, nearest)


def enough_images() -> list[str]:
    """Return the classes with enough held-out images for a validation and a test part."""
    column = pq.read_table(DATA / "heldout.parquet", columns=["concept"])["concept"]
    return [name for name, count in Counter(column.to_pylist()).items() if count >= LEAST_IMAGES]


def draw(wanted: str, seed: int) -> dict[str, str]:
    """Return concepts with their kind: all, some drawn by seed, or some by name."""
    held = enough_images()
    classes = json.loads((DATA / "classes.json").read_text())
    kinds = {name: kind for kind, names in sorted(classes.items()) for name in sorted(names)}
    if wanted == "all":
        return dict(random.Random(seed).sample(sorted(kinds.items()), len(kinds)))
    if not wanted.isdecimal():
        return {name: kinds[name] for name in wanted.split(",")}
    rng, drawn = random.Random(seed), {}
    for kind in sorted(classes):
        enough = [n for n, its in kinds.items() if its == kind and n in held]
        drawn |= dict.fromkeys(rng.sample(enough, int(wanted) // 2), kind)
    return drawn


def requested(concepts: Iterable[str], folds: int | None) -> dict[str, BuildRequest]:
    """Return the build request of each concept as in the demo, in folds if there are any."""
    requests = {name: demo_request(name) for name in concepts}
    if folds is None:
        return requests
    sweep = SweepRequest(name="heldout", classes=tuple(requests), folds=folds)
    return {
        name: replace(request, retain_exclude=sweep.fold(name))
        for name, request in requests.items()
    }


def prepared(store: Store, request: BuildRequest) -> float | None:
    """Build, grade and rank a set if necessary; return the seconds that it took."""
    if store.exists(Artifact.RANKING.path(request.name)):
        return None
    start = time.perf_counter()
    build_sets(store, request)
    compute_gradients(store, request.name, model=None, options=PassOptions())
    rank(store, request.name, options=RankOptions())
    return time.perf_counter() - start


def asked(store: Store, name: str, way: str) -> SearchOptions:
    """Return the search options of one way; rank for its directions if necessary."""
    tower, direction = TOWER_WAYS.get(way, (None, Direction.BOTH))
    ranking = read_ranking(store, read_pointer(store, read_manifest(store, name)))
    if not set(direction.each) <= {each.kind for each in ranking.directions}:
        ranking = rank(store, name, options=RankOptions(direction=direction))
    if way in WAYS:
        return WAYS[way]
    scores = ranking.by_direction()[DirectionSpec.of(direction)]
    layers = [score.layer for score in scores if score.front and score.tower is tower]
    return SearchOptions(layers=layers, direction=direction)


def searched(store: Store, name: str, way: str, folder: Path) -> tuple[EditHeader, float]:
    """Return the edit of a set by one way, and the seconds of the search."""
    records = Store(str(folder / way))
    done = folder / way / f"{name}.seconds"
    if not done.exists():
        trials = Store(str(folder / "default")).where(Artifact.TRIALS.path(name))
        if way not in ("default", "paper") and Path(trials).exists():
            records.write_bytes(Artifact.TRIALS.path(name), Path(trials).read_bytes())
        start = time.perf_counter()
        search(store, name, options=asked(store, name, way), records=records)
        done.write_text(str(time.perf_counter() - start))
    return load_edit(records, name).header, float(done.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", default="16", help="how many, `all`, or names with commas")
    parser.add_argument("--ways", nargs="+", choices=ALL_WAYS, default=["default", "paper"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folds", type=int, help="number of retain sets")
    parser.add_argument("--store", type=Path, help="keep everything here, to resume later")
    options = parser.parse_args()
    folder = options.store or Path(tempfile.mkdtemp())
    concepts = draw(options.concepts, options.seed)
    print(f"seed {options.seed}: {', '.join(concepts)}\n")
    print(
        "concept\tway\tlayer\tdirection\tshare\tof\tFA@1\tFA@5\tbrands\tobjects\tnearest\tworst\tseconds"
    )
    rows: list[Row] = []
    preparing: list[float] = []
    requests = requested(concepts, options.folds)
    for name, kind in concepts.items():
        store = Store(str(folder / "store"))
        try:
            seconds = prepared(store, requests[name])
        except SlsguError as error:
            print(f"{name}\tall\t{error}")
            continue
        preparing += [seconds] if seconds is not None else []
        for way in options.ways:
            try:
                header, searching = searched(store, name, way, folder)
            except SlsguError as error:
                print(f"{name}\t{way}\t{error}")
                continue
            rows.append(Row(name, kind, way, header, searching))
            show(rows[-1])
    figures = ("FA@1", "FA@5", "brands", "objects", "nearest")
    print("\nway\tconcepts\tof\t" + "".join(f"{name}\tworst\t" for name in figures) + "seconds")
    for way in options.ways:
        searches = [row for row in rows if row.way == way]
        for kind in sorted(set(concepts.values())):
            summarise(f"{way}, {kind}", [row for row in searches if row.kind == kind])
        summarise(way, searches)
    for stage, took in {
        "build-sets, grad and rank": preparing,
        **{f"search, {way}": [r.seconds for r in rows if r.way == way] for way in options.ways},
    }.items():
        if took:
            print(f"{stage}: {median(took):.1f} s a concept, {sum(took):.0f} s in all")


def show(row: Row) -> None:
    """Print the result of one search."""
    edit = row.header
    harmed = edit.harmed[0] if edit.harmed else None
    worst = f"{harmed.name} {harmed.lost:.0f} of {harmed.rows}" if harmed else ""
    words = [row.name, row.way, edit.layer, str(edit.direction), f"{edit.share:.3f}"]
    words += [str(edit.forget.rows), *(f"{value:.2f}" for value in row.figures)]
    print("\t".join([*words, worst, f"{row.seconds:.1f}"]), flush=True)


def summarise(label: str, rows: list[Row]) -> None:
    """Print the number of images, and the mean and worst figures over concepts."""
    if not rows:
        return
    words = [label, str(len(rows)), str(sum(row.header.forget.rows for row in rows))]
    for values in zip(*(row.figures for row in rows), strict=True):
        words += [f"{sum(values) / len(values):.2f}", f"{max(values):.2f}"]
    print("\t".join([*words, f"{sum(row.seconds for row in rows) / len(rows):.1f}"]))


if __name__ == "__main__":
    main()
