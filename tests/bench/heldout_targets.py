"""Measure the edits of searches on targets, on test prompts, seeds and images.

    python tests/bench/heldout_targets.py --target models/sd            # 5 concepts, by seed 0
    python tests/bench/heldout_targets.py --target models/llava --store heldout-targets
    python tests/bench/heldout_targets.py --target models/sd --concepts facebook,castle
    python tests/bench/heldout_targets.py --target models/sd --words

Concepts are drawn from the embedded model's classes that have at least ten held-out images.
Each is built and graded as in the demo, then searched on the target with the defaults of
`search --target`, except for the options given here. With --words, sets are made from the names
alone, and the search looks at the pipeline's text encoder; pictures only give the figures. Run it
again on the same store to resume.
"""

import argparse
import random
import tempfile
from pathlib import Path

from heldout import enough_images
from heldout_words import class_file, words_request

from slsgu_cli.cli.demo import demo_request
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.figures import meets
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.records.targets import STATES, GradientOf, TargetSearchOptions
from slsgu_cli.sets.build import build_sets
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store
from slsgu_cli.targets.search import TargetSearchResult, search_target

HEADS = (
    "concept",
    "layer",
    "share",
    "times",
    "trials",
    "judge",
    "before",
    "still",
    "95%",
    "of",
    "IRA",
    "lost",
    "of",
    "seconds",
)


def drawn(wanted: str, seed: int) -> list[str]:
    """Return concepts: some drawn by seed, or some by name."""
    if not wanted.isdecimal():
        return wanted.split(",")
    return random.Random(seed).sample(sorted(enough_images()), int(wanted))


def rows(name: str, result: TargetSearchResult) -> list[list[str]]:
    """Return what each judge still recognises of the concept, and others' losses, in percent.

    `times` is the step divided by the shortest step of its layer that reaches the goal.
    """
    trials, chosen = result.trials, result.chosen
    enough = [
        trial.step
        for trial in trials.trials
        if trial.layer == chosen.layer and meets(trials.goal, trial.concept)
    ]
    times = f"{chosen.step / min(enough):.2f}" if enough else "-"
    about = [name, chosen.layer, f"{chosen.share:.2f}", times, str(len(trials.trials))]
    table = []
    for by in result.figures.by_judge:
        was, now = by.before, by.after
        low, high = now.concept.interval
        figures = [was.concept.percent, now.concept.percent]
        lost = was.ira - now.ira
        table.append(
            [
                *about,
                Path(by.judge).name,
                *(f"{figure:.1f}" for figure in figures),
                f"{low:.1f} to {high:.1f}",
                str(now.concept.total),
                f"{now.ira:.1f}",
                f"{lost:.1f}",
                str(now.others.total),
                f"{trials.seconds:.0f}",
            ]
        )
    return table


def main() -> None:
    usual = TargetSearchOptions(target=Path())
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, required=True, help="folder of a pipeline or LLaVA")
    parser.add_argument("--concepts", default="5", help="how many, or names with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="keep everything here, to resume later")
    parser.add_argument("--judge", action="append", default=[], help="another model, by its folder")
    parser.add_argument("--words", action="store_true", help="no images, and no pictures to search")
    parser.add_argument("--gradient", type=GradientOf, help="CLIP's loss or the target's")
    parser.add_argument("--direction", type=Direction, default=usual.direction)
    parser.add_argument("--overshoot", type=float, default=usual.overshoot)
    wanted = parser.parse_args()
    further = [ModelSpec(f"{LOCAL}{folder}") for folder in wanted.judge]
    judges = (ModelSpec("set"), *further) if further or wanted.words else ()
    if wanted.words:
        judges = (ModelSpec(STATES), *judges)
    options = TargetSearchOptions(
        target=wanted.target,
        direction=wanted.direction,
        overshoot=wanted.overshoot,
        judges=judges,
        gradient_of=wanted.gradient,
    )
    folder = wanted.store or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    store, classes = Store(str(folder / "store")), class_file(folder)
    concepts = drawn(wanted.concepts, wanted.seed)
    print(f"seed {wanted.seed}: {', '.join(concepts)}\n")
    print("\t".join(HEADS), flush=True)
    table: list[list[str]] = []
    for name in concepts:
        request = demo_request(name)
        if wanted.words:
            request = words_request(name, "classes", classes)
        if not store.exists(Artifact.POINTER.path(request.name)):
            build_sets(store, request)
            compute_gradients(store, request.name, model=None, options=PassOptions())
        try:
            found = rows(name, search_target(store, request.name, options=options))
        except SlsguError as error:
            print(f"{name}\t{error}", flush=True)
            continue
        table += found
        print("\n".join("\t".join(row) for row in found), flush=True)
    by_pictures = [row for row in table if row[HEADS.index("judge")] != STATES]
    still, lost = (
        [float(row[HEADS.index(head)]) for row in by_pictures] for head in ("still", "lost")
    )
    if by_pictures:
        mean = (f"{sum(each) / len(each):.1f}, at most {max(each):.1f}" for each in (still, lost))
        print("\nstill recognised: {}\nothers lost: {}".format(*mean))


if __name__ == "__main__":
    main()
