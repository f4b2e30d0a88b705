"""Which overshoot beyond the shortest step that forgets predicts test images best.

    python tests/bench/overshoots.py                         # 16 concepts drawn by seed 0
    python tests/bench/overshoots.py --concepts all --store heldout-store

Concepts are drawn, built, graded and ranked as in heldout.py. Along each direction of each text
layer on the fronts, the shortest step tried is found at which no image to choose by has the
name among its first five. Then it is lengthened by three kinds of rule, each at several sizes:

- factor: the step times so much;
- margin: until the name is so far below the fifth best other, as a cosine, at every image;
- spread: until it is that far below on average, in standard deviations over the images.

A rule goes through the same lengths, up to three times the shortest step, and stops at the
first that satisfies it. For each rule stand the mean length that it takes, the mean FA@5 on
test images, in how many of the lines any is left, and what is lost of the expected TA@1 on
test images, in points, the mean over lines, and the best line of each concept by what is
kept of the images to choose by.
"""

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import heldout
import torch
from torch import Tensor

from slsgu_cli.clip.evaluation import Evaluation
from slsgu_cli.clip.metrics import gaps
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.gradient_pass import arithmetic
from slsgu_cli.engine.layer_search import LayerSearch
from slsgu_cli.engine.moved_model import moved_model
from slsgu_cli.engine.search_plan import read_plan, share_evaluation
from slsgu_cli.engine.utility import UtilityMeter
from slsgu_cli.records.method import Tower
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import Split
from slsgu_cli.store.store import Store

LENGTHS = (1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.6, 1.8, 2.0, 2.5, 3.0)
SIZES = {
    "factor": (1.0, 1.1, 1.25, 1.5, 2.0),
    "margin": (0.005, 0.01, 0.02, 0.05, 0.08),
    "spread": (1.0, 1.5, 2.0, 2.5, 3.0),
}


@dataclass(frozen=True)
class Length:
    """A length of a line: gaps of images to choose by, FA@5 of unseen ones, points lost by both."""

    length: float
    gaps: Tensor
    unseen: float
    lost: float
    lost_unseen: float

    def satisfies(self, rule: str, size: float) -> bool:
        """Return whether a rule ends here."""
        if rule == "factor":
            return self.length >= size
        if rule == "margin":
            return float(self.gaps.min()) >= size
        return float(self.gaps.mean()) >= size * float(self.gaps.std())


def concept_gaps(evaluation: Evaluation, evaluator: Evaluator, step: float) -> Tensor:
    """Return by how much the name is below the fifth best other, for each concept image."""
    with moved_model(evaluation, [(evaluator, step)]) as model:
        return gaps(*model.cosines(evaluation.forget))


def expected(meter: UtilityMeter, evaluator: Evaluator, step: float) -> float:
    """Return the TA@1 expected after a step, in percent, a mean over the sets."""
    return meter.measure(evaluator, step).expected


def lines(store: Store, name: str) -> Iterator[list[Length]]:
    """Yield each text line of a concept that forgets it, at all lengths."""
    plan = read_plan(store, name, options=SearchOptions())
    with torch.no_grad(), arithmetic(plan.options.precision):
        choosing = share_evaluation(store, [plan]).of(plan.manifest)
        shared = share_evaluation(store, [plan], Split.TEST)
        reported = shared.of(plan.manifest)
        meters = UtilityMeter(choosing), UtilityMeter(reported)
        search = LayerSearch((), choosing, plan.options)
        for evaluator in plan.evaluators(store, choosing):
            if evaluator.score.tower is Tower.VISION:
                continue
            search.bisect(evaluator, plan.options.steps)
            shortest = search.shortest(evaluator.move)
            if shortest is None:
                continue
            own = Evaluator(reported, evaluator.score, evaluator.along, evaluator.direction)
            measured = list(zip(meters, (evaluator, own), strict=True))
            base = [expected(meter, each, 0.0) for meter, each in measured]
            found = []
            for length in LENGTHS:
                step = length * shortest
                left = 100 * float((concept_gaps(reported, own, step) < 0).double().mean())
                lost = [
                    before - expected(meter, each, step)
                    for before, (meter, each) in zip(base, measured, strict=True)
                ]
                found.append(Length(length, concept_gaps(choosing, evaluator, step), left, *lost))
            yield found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", default="16", help="as of heldout.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="that of heldout.py serves as well")
    options = parser.parse_args()
    store = Store(str((options.store or Path(tempfile.mkdtemp())) / "store"))
    concepts = heldout.draw(options.concepts, options.seed)
    print(f"seed {options.seed}: {', '.join(concepts)}", flush=True)
    found: dict[str, list[list[Length]]] = defaultdict(list)
    for name in concepts:
        heldout.prepared(store, name)
        found[name] = list(lines(store, name))
        print(f"# {name}: {len(found[name])} lines", flush=True)
    print("rule\tsize\tlength\tFA@5\tlines with any\tlost\tFA@5 of best\tlost by best")
    for rule, sizes in SIZES.items():
        for size in sizes:
            show(rule, size, found)


def show(rule: str, size: float, found: dict[str, list[list[Length]]]) -> None:
    """Print what a rule of a size comes to over all lines, and over each concept's best."""
    every, best = [], []
    for own in found.values():
        ends = [next((at for at in line if at.satisfies(rule, size)), line[-1]) for line in own]
        every += ends
        best.append(min(ends, key=lambda end: end.lost))

    def mean(of: Callable[[Length], float], ends: list[Length]) -> str:
        return f"{sum(map(of, ends)) / len(ends):.2f}"

    words = [rule, f"{size:g}", mean(lambda end: end.length, every)]
    words += [mean(lambda end: end.unseen, every), f"{sum(e.unseen > 0 for e in every)}"]
    words += [mean(lambda end: end.lost_unseen, every), mean(lambda end: end.unseen, best)]
    print("\t".join([*words, mean(lambda end: end.lost_unseen, best)]), flush=True)


if __name__ == "__main__":
    main()
