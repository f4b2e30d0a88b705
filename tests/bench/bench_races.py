"""Race the steps of searches in many random row orders, and compare with the exact choice.

    python tests/bench/bench_races.py                              # generated figures
    python tests/bench/bench_races.py --store slsgu-store --names facebook     # measured ones

Generated figures differ in every search. For each set of a searched store, the steps that may
win are measured once on all rows, with and without the text layers; then the search is repeated
many times, each time with rows in another order.

A row of the table says how often the choice differed from the exact one, and by how much utility
at most; in how many searches a step was stopped although its utility exceeds the chosen one's by
more than the tolerance (at most one in a hundred, by the risk); and the fraction of images looked
at, over all steps, by racing and by the exact rule.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

import torch

from slsgu_cli.clip.metrics import margins
from slsgu_cli.engine.choice import utility_of
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.layer_search import LayerSearch
from slsgu_cli.engine.search_plan import read_plan, share_evaluation
from slsgu_cli.engine.utility import TOLERANCE
from slsgu_cli.records.method import Measurement, Tower, Trials, UtilityMetric
from slsgu_cli.records.options import NO_BOUND, SearchOptions
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from raced import GivenFigures, made_up

# The bound on classes is another reason to choose; switch it off here.
OPTIONS = SearchOptions(max_class_loss=NO_BOUND)


def measured(store: Store, name: str) -> GivenFigures:
    """Return the margins under the steps that may win, from a recorded search."""
    plan = read_plan(store, name, options=OPTIONS)
    with torch.no_grad():
        evaluation = plan.measured(share_evaluation(store, [plan]), resumed=True)
        trials = store.read_record(Artifact.TRIALS.path(name), Trials).trials
        search = LayerSearch(trials, evaluation, OPTIONS)
        for evaluator in plan.evaluators(store, evaluation):
            search.along(evaluator)
        evaluators = search.evaluators
        keys = sorted(
            search.lengthened,
            key=lambda key: (
                evaluators[key[0]].tower is Tower.VISION,
                -evaluators[key[0]].stage,
            ),
        )
        original = {
            name: margins(group.images.features @ group.prompts.embeddings.T, group.images.labels)
            for name, group in evaluation.utility.items()
        }
        after = [left(evaluators[line], step) for line, step in keys]
    return GivenFigures(original, after, [evaluators[line].tower for line, _ in keys])


def left(evaluator: Evaluator, step: float) -> Mapping[str, torch.Tensor]:
    """Return the margins of all images after a step."""
    found = {}
    with evaluator.stepped(step):
        for name, group in evaluator.evaluation.utility.items():
            features, classes = group.images.features, group.prompts.embeddings
            if evaluator.tower is Tower.VISION:
                features = group.images.after_edit(evaluator.stage)
            else:
                classes = group.prompts.after_edit(evaluator.stage)
            found[name] = margins(features @ classes.T, group.images.labels)
    return found


def vision_alone(figures: GivenFigures) -> GivenFigures:
    """Return the steps of vision layers alone, so that no text layer sets the score to beat."""
    chosen = [index for index, tower in enumerate(figures.towers) if tower is Tower.VISION]
    return GivenFigures(figures.original, [figures.steps[index] for index in chosen])


@dataclass
class Exact:
    """The exact choice of a search: its utility, the rows looked at, the utility of each step."""

    figures: GivenFigures
    utility: UtilityMetric

    def __post_init__(self) -> None:
        choice, _ = self.figures.searched(utility=self.utility, exact=True, max_class_loss=NO_BOUND)
        self.kept, self.looked = utility_of(choice, self.utility), self.figures.looked
        self.keeps = self.figures.keeps(self.utility)

    @property
    def rows(self) -> int:
        """Return the number of images, counted once for each vision step."""
        towers = self.figures.towers or [Tower.VISION] * len(self.keeps)
        return towers.count(Tower.VISION) * sum(map(len, self.figures.original.values()))


def compared(figures_of: Callable[[int], GivenFigures], utility: UtilityMetric, seeds: int) -> str:
    """Return a row of the results of searches with many seeds."""
    exact_of = lru_cache(maxsize=1)(lambda figures: Exact(figures, utility))
    losses, wrong, looked, proven, rows = [], 0, 0, 0, 0
    for seed in range(seeds):
        exact = exact_of(figures_of(seed))
        choice, search = exact.figures.searched(utility=utility, seed=seed, max_class_loss=NO_BOUND)
        best = utility_of(choice, utility)
        ways = [
            search.trials[evaluator.move, 1.0].measurement
            for evaluator in exact.figures.evaluators()
        ]
        wrong += any(
            way is Measurement.EARLY_STOPPED and each > best + TOLERANCE
            for way, each in zip(ways, exact.keeps, strict=True)
        )
        losses.append(exact.kept - best)
        looked, proven = looked + exact.figures.looked, proven + exact.looked
        rows += exact.rows
    others = sum(loss > 0 for loss in losses)
    return (
        f"{len(losses)} | {others} | {max(losses):.3f} | {wrong} "
        f"| {looked / rows:.3f} | {proven / rows:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="store with searched sets")
    parser.add_argument("--names", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=200)
    args = parser.parse_args()
    print(
        "| figures | compared by | searches | other choices | lost, points | steps wrongly left "
        "| rows, raced | rows, proven |\n|---|---|---|---|---|---|---|---|"
    )
    worlds: dict[str, Callable[[int], GivenFigures]] = {"made up": made_up}
    for name in args.names:
        figures = measured(Store(args.store), name)
        worlds[name] = partial(always, figures)
        worlds[f"{name}, vision alone"] = partial(always, vision_alone(figures))
    for name, figures_of in worlds.items():
        for utility in UtilityMetric:
            row = compared(figures_of, utility, args.seeds)
            print(f"| {name} | {utility} | {row}", flush=True)


def always(figures: GivenFigures, seed: int) -> GivenFigures:
    """Return the same figures for any seed: only the order of rows changes."""
    return figures


if __name__ == "__main__":
    main()
