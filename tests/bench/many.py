"""Measure on test images how many concepts one checkpoint can forget, jointly or in turn.

    python tests/bench/many.py --store many-store                       # 10, 50, 100 at once
    python tests/bench/many.py --store many-store --counts 10           # these only
    python tests/bench/many.py --store many-store --requests 10         # ten, one after another

Concepts are drawn by seed from the embedded model's classes with at least ten held-out images,
brands and objects in turn; a larger number extends a smaller one. At least a hundred are kept
out of every retain set, so that all sets share one retain set, its gradient and its covariances.
To forget many at once, each is searched by itself along the whitened direction of a few layers
(`--layers`), all on one base pass. Then their edits go into one checkpoint (`sum`), and so do
those of `search --joint` (`joint`). To forget one after another, each is searched with `--after`
on top of those before, on all fronts.

Figures are measured on the checkpoint that `apply` wrote, on test images; utility is of classes
that this run never forgets. Run it again on the same store to resume; it prints the seconds of
each stage from when it ran.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from heldout import draw, enough_images

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.cli.demo import demo_request
from slsgu_cli.clip.evaluation import SharedEvaluation, prepare_shared
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.edited_model import UNEDITED
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search, search_each
from slsgu_cli.errors import NotForgottenError, SlsguError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Criterion
from slsgu_cli.records.options import ApplyRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.sets.build import build_sets
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer
from slsgu_cli.store.store import Store
from slsgu_cli.study.joint import joint_search

# As many are kept out of the retain set in every run, so that runs can share a store.
EXCLUDED = 100
LAYERS = tuple(f"transformer.resblocks.{block}.mlp.c_proj.weight" for block in (3, 5, 6))
COLUMNS = (
    "concepts",
    "layers",
    "FA@1",
    "worst",
    "FA@5",
    "worst",
    "images",
    "brands lost",
    "objects lost",
    "seconds",
)


@dataclass(frozen=True)
class Bench:
    """A folder with a store, checkpoints, and the seconds of each stage."""

    folder: Path
    names: tuple[str, ...]
    excluded: tuple[str, ...]
    options: SearchOptions

    def part(self, searched: str) -> str:
        """Return the name of a group of edits, separate for each search option."""
        usual = SearchOptions()
        damping = "" if self.options.damping is None else f"-{self.options.damping:g}"
        criterion = (
            "" if self.options.criterion is usual.criterion else f"-{self.options.criterion}"
        )
        overshoot = (
            "" if self.options.overshoot == usual.overshoot else f"-x{self.options.overshoot:g}"
        )
        return f"{searched}{damping}{criterion}{overshoot}"

    @property
    def store(self) -> Store:
        """The store with sets, gradients, rankings and the edits of the last search."""
        return Store(str(self.folder / "store"))

    def edits(self, part: str, names: Sequence[str]) -> list[Path]:
        """Return the folder with a group's copies of edits, which later searches overwrite."""
        return [self.folder / part / Artifact.EDIT.path(name) for name in names]

    def keep(self, part: str, name: str) -> None:
        """Copy the edit of a set."""
        content = self.store.read_bytes(Artifact.EDIT.path(name))
        Store(str(self.folder / part)).write_bytes(Artifact.EDIT.path(name), content)

    def done(self, stage: str) -> float | None:
        """Return the seconds of a stage; None if it has not run."""
        record = self.folder / "seconds" / f"{stage}.json"
        return float(json.loads(record.read_text())) if record.exists() else None

    def timed(self, stage: str, run: Callable[[], object]) -> float:
        """Run a stage if necessary, and return its seconds."""
        if (seconds := self.done(stage)) is None:
            start = time.perf_counter()
            run()
            seconds = self.took(stage, time.perf_counter() - start)
        return seconds

    def took(self, stage: str, seconds: float) -> float:
        """Record that a stage is done."""
        record = self.folder / "seconds" / f"{stage}.json"
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps(seconds))
        return seconds

    def prepare(self, names: Sequence[str]) -> dict[str, float]:
        """Build, grade and rank sets; return the seconds of each stage. All share retain rows."""
        seconds = dict.fromkeys(("build", "gradients", "rank"), 0.0)
        for place, name in enumerate(names, start=1):
            request = replace(demo_request(name), retain_exclude=self.excluded)
            steps: dict[str, Callable[[], object]] = {
                "build": partial(build_sets, self.store, request),
                "gradients": partial(
                    compute_gradients, self.store, name, model=None, options=PassOptions()
                ),
                "rank": partial(rank, self.store, name, options=RankOptions()),
            }
            for stage, run in steps.items():
                seconds[stage] += self.timed(f"{stage}-{name}", run)
            if place % 10 == 0:
                print(f"# {place} sets are ranked", flush=True)
        retained = {read_pointer(self.store, read_manifest(self.store, n)).retain for n in names}
        print(f"# {len(names)} sets, {len(retained)} retain gradient", flush=True)
        return seconds

    def singles(self, names: Sequence[str]) -> float:
        """Search each concept by itself, if necessary; return the seconds of all."""
        part = self.part("single")
        waiting = [name for name in names if self.done(f"{part}-{name}") is None]
        start = time.perf_counter()
        for result in search_each(self.store, waiting, options=self.options):
            name = result.trials.name
            self.keep(part, name)
            self.took(f"{part}-{name}", time.perf_counter() - start)
            start = time.perf_counter()
            if not result.forgotten:
                print(f"# no step forgets {name} alone", flush=True)
        return sum(self.done(f"{part}-{name}") or 0.0 for name in names)

    def joint(self, names: Sequence[str]) -> None:
        """Search jointly for edits of some concepts, and copy them."""
        result = joint_search(self.store, names, options=self.options)
        if not result.forgotten:
            print(f"# the joint search of {len(names)} does not forget all", flush=True)
        for name in names:
            self.keep(self.part(f"joint-{len(names)}"), name)

    def after(self, name: str, earlier: Sequence[str]) -> float:
        """Search a concept on top of earlier ones, if necessary; return the seconds."""
        stage = f"after-{len(earlier) + 1}-{name}"
        if self.done(stage) is None:
            for each, edit in zip(earlier, self.edits("after", earlier), strict=True):
                self.store.write_bytes(Artifact.EDIT.path(each), edit.read_bytes())
            options = SearchOptions(after=tuple(earlier))
            start = time.perf_counter()
            search(self.store, name, options=options)
            self.keep("after", name)
            self.took(stage, time.perf_counter() - start)
        return self.done(stage) or 0.0

    def measured(self, part: str, names: Sequence[str]) -> "Figures":
        """Write the edits of a group into one checkpoint and measure it."""
        out = self.folder / "checkpoints" / f"{part}-{len(names)}"
        words = [str(edit) for edit in self.edits(part, names)]
        model = demo_request(names[0]).model
        apply(self.store, ApplyRequest(names=words, model=model, out=out, overwrite=True))
        return self.figures(ModelSpec(f"local-dir:{out}"), names)

    def figures(self, spec: ModelSpec, names: Sequence[str]) -> "Figures":
        """Return a model's accuracy on some concepts, and on the classes never forgotten."""
        evaluation = self._opened(spec)
        forget = {name: UNEDITED.forget_figures(evaluation.forget[name])[0] for name in names}
        manifests = [read_manifest(self.store, name) for name in self.names]
        return Figures(forget, UNEDITED.accuracies(evaluation.utility(manifests)))

    def _opened(self, spec: ModelSpec) -> SharedEvaluation:
        model = resolve(spec)
        manifests = [read_manifest(self.store, name) for name in self.names]
        with torch.no_grad():
            evaluation = prepare_shared(
                self.store, manifests, load(model, "cpu"), tokenize=tokenizer(model), device="cpu"
            )
            evaluation.base_pass((), cache_bytes=0)
        return evaluation


@dataclass(frozen=True)
class Figures:
    """FA of concepts, and the accuracy on each evaluation set."""

    forget: dict[str, Accuracy]
    kept: dict[str, Accuracy]

    def row(self, original: "Figures") -> list[str]:
        """Return mean and worst FA, the number of images, and points of TA@1 lost."""
        images = sum(accuracy.rows for accuracy in self.forget.values())
        words = []
        for top in ("top1", "top5"):
            values = {name: getattr(accuracy, top) for name, accuracy in self.forget.items()}
            worst = max(sorted(values), key=lambda name: values[name])
            mean = sum(values.values()) / len(values)
            words += [f"{mean:.2f}", f"{worst} {values[worst]:.0f}" if values[worst] else "0"]
        lost = [original.kept[name].top1 - now.top1 for name, now in sorted(self.kept.items())]
        return [*words, str(images), *(f"{points:.2f}" for points in lost)]


def together(bench: Bench, counts: Sequence[int], *, jointly: bool) -> None:
    """Print a row for each number of concepts forgotten at once, and each procedure."""
    before = bench.prepare(bench.names)
    original = begin(bench, "procedure")
    for count in counts:
        names = bench.names[:count]
        stages = {stage: seconds * count / len(bench.names) for stage, seconds in before.items()}
        stages["search"] = bench.singles(names)
        show(bench, "sum", bench.part("single"), names, original, sum(stages.values()))
        if jointly:
            part = bench.part(f"joint-{count}")
            stages["joint"] = bench.timed(part, partial(bench.joint, names))
            show(bench, "joint", part, names, original, sum(stages.values()))
        told = ", ".join(f"{stage} {seconds:.0f}" for stage, seconds in stages.items())
        print(f"# seconds of {count}: {told}", flush=True)


def in_turn(bench: Bench) -> None:
    """Print a row after each request, searched on top of all before."""
    before = sum(bench.prepare(bench.names).values()) / len(bench.names)
    original = begin(bench, "request")
    done: list[str] = []
    for name in bench.names:
        try:
            seconds = bench.after(name, done)
        except NotForgottenError as error:
            print(f"# {name} is left out: {error.message}", flush=True)
            continue
        done.append(name)
        show(bench, name, "after", done, original, before + seconds)


def begin(bench: Bench, first: str) -> Figures:
    """Print the heads of a table; return the figures of the original model."""
    original = bench.figures(demo_request(bench.names[0]).model, bench.names)
    kept = ", ".join(f"{name} {now.top1:.2f} of {now.rows}" for name, now in original.kept.items())
    print(f"# TA@1 of the original model: {kept}", flush=True)
    print("\t".join((first, *COLUMNS)), flush=True)
    return original


def show(
    bench: Bench, label: str, part: str, names: Sequence[str], original: Figures, seconds: float
) -> None:
    """Print the row of some edits of a group, all in one checkpoint."""
    layers = {load_edit(bench.store, str(edit)).header.layer for edit in bench.edits(part, names)}
    row = [label, str(len(names)), str(len(layers)), *bench.measured(part, names).row(original)]
    print("\t".join([*row, f"{seconds:.0f}"]), flush=True)


def drawn(seed: int) -> list[str]:
    """Return all classes with enough images in an order by seed, brands and objects in turn."""
    kinds = draw("all", seed)
    rng, orders = random.Random(seed), []
    enough = set(enough_images())
    for kind in sorted(set(kinds.values())):
        names = [name for name, its in kinds.items() if its == kind and name in enough]
        orders.append(rng.sample(names, len(names)))
    return [name for pair in zip(*orders, strict=False) for name in pair]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=int, nargs="*", default=[10, 50, 100])
    parser.add_argument("--requests", type=int, help="forget so many one after another instead")
    parser.add_argument("--joint", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--layers", nargs="+", default=LAYERS)
    parser.add_argument("--damping", type=float, help="damping, by default that of `rank`")
    parser.add_argument("--criterion", type=Criterion, default=SearchOptions().criterion)
    parser.add_argument("--overshoot", type=float, default=SearchOptions().overshoot)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="keep everything here, to resume later")
    options = parser.parse_args()
    order = drawn(options.seed)
    counts = sorted({min(count, len(order)) for count in options.counts})
    names = order[: options.requests or counts[-1]]
    folder = options.store or Path(tempfile.mkdtemp())
    print(f"# seed {options.seed}: {', '.join(names)}", flush=True)
    excluded = tuple(order[: max(EXCLUDED, len(names))])
    how = SearchOptions(
        layers=options.layers,
        direction=Direction.WHITENED,
        damping=options.damping,
        criterion=options.criterion,
        overshoot=options.overshoot,
    )
    bench = Bench(folder, tuple(names), excluded, how)
    try:
        in_turn(bench) if options.requests else together(bench, counts, jointly=options.joint)
    except SlsguError as error:
        raise SystemExit(f"{error.message}; {error.hint}") from error


if __name__ == "__main__":
    main()
