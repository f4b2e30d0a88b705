"""Put models that forgot a concept by several methods to attacks, each beside its control.

    python tests/bench/attacks.py                                  # facebook and castle
    python tests/bench/attacks.py --concepts 4 --store attacks-store
    python tests/bench/attacks.py --methods ours ga --checks spelling prefix

Each concept is built, graded and ranked as the demo does it. `ours` is the search by its
defaults, `paper` by the paper's choice; the others are tuned on the first concept as `compare`
tunes them, on the validation split. `ours+leace` is our edit in the model that LEACE leaves
of the image projection. `adversarial` is our search of the first text layer once more, on
gradients that go through the words which the attack tried on `ours` as well. What a method
leaves is written as a checkpoint and verified as `slsgu verify --model` does it. All figures are
of images that chose nothing; a mean over concepts stands in each cell, behind the slash that of
its control, in brackets by how much it exceeds it, with the 95% interval of a bootstrap over
concepts. A run that is repeated on a store goes on where the last one ended.
"""

import argparse
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import unseen
from safetensors.torch import load_file, save_file

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.cli.recipe import DATA, demo_request
from slsgu_cli.compare.closed_forms import ClosedForms
from slsgu_cli.compare.comparison import ClipComparisonRun, tune
from slsgu_cli.method.gradients import adversarial_prefixes, compute_gradients
from slsgu_cli.method.ranking import rank
from slsgu_cli.method.search import search
from slsgu_cli.records.method import Direction
from slsgu_cli.records.options import PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.records.studies import CLOSED_FORMS, CompareOptions, Method
from slsgu_cli.records.verification import Check, VerifiedModel, VerifyRequest
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store
from slsgu_cli.verification.verdicts import rows
from slsgu_cli.verification.verify import verify

OURS = {"ours": "default", "paper": "paper"}
BOTH = "ours+leace"
ADVERSARIAL = "adversarial"
FIRST_LAYER = "transformer.resblocks.0.mlp.c_proj.weight"
HARDENED = SearchOptions(layers=(FIRST_LAYER,), direction=Direction.WHITENED, overshoot=2.0)
OTHERS = (Method.GA, Method.SALUN, Method.SSD, Method.UCE, Method.ALPHAEDIT, Method.MEMIT)
CHECKS = (
    Check.SPELLING,
    Check.AUGMENT,
    Check.QUANTISE,
    Check.RELEARN,
    Check.PROBE,
    Check.PREFIX,
    Check.RING_A_BELL,
    Check.INVERSION,
)
MODEL = DATA / "clip"
# That trained methods see: about as many as there are to forget.
RETAIN_ROWS = 128
# Of a bootstrap.
DRAWS = 20_000


def checkpoint(store: Store, name: str, method: Method, folder: Path) -> ModelSpec:
    """Return the model that a method leaves of a set's, run if it is not there yet."""
    target = folder / "models" / f"{name}-{method}"
    if not (target / "open_clip_model.safetensors").exists():
        options = CompareOptions(methods=(method,), rates=None, retain_rows=RETAIN_ROWS)
        run = ClipComparisonRun.open(store, name, options)
        setting = tuned(run, method, folder)
        model = run.baselines.model
        if method in CLOSED_FORMS:
            outcome = run.row(method, setting)
            change = ClosedForms(run.baselines, run.layers).change(method, setting, outcome.layer)
            run.baselines.restore()
            weight = model.get_parameter(outcome.layer).data
            weight.add_(outcome.step * change.to(weight.dtype).reshape_as(weight))
        else:
            run.baselines.run(method, setting)
        shutil.copytree(MODEL, target, dirs_exist_ok=True)
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        save_file(state, target / "open_clip_model.safetensors")
    return ModelSpec(f"{LOCAL}{target}")


def tuned(run: ClipComparisonRun, method: Method, folder: Path) -> float:
    """Return the setting of a method that the first concept was tuned to, tuned now if none was."""
    known = folder / "settings" / f"{method}.json"
    if not known.exists():
        setting = tune(method, partial(run.row, method))[0].setting or 0.0
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(setting))
    return float(json.loads(known.read_text()))


def with_edit(folder: Path, name: str, model: ModelSpec) -> ModelSpec:
    """Return a model with our edit of a concept in it, written if it is not there yet."""
    target = folder / "models" / f"{name}-{BOTH}"
    file = target / "open_clip_model.safetensors"
    if not file.exists():
        edit = load_edit(Store(str(folder / OURS["ours"])), name)
        shutil.copytree(model.name.removeprefix(LOCAL), target, dirs_exist_ok=True)
        state = load_file(file)
        layer = Layer.parse(edit.header.layer)
        layer.rows(state[layer.parameter]).add_(torch.from_numpy(edit.delta()))
        save_file(state, file)
    return ModelSpec(f"{LOCAL}{target}")


def hardened(store: Store, name: str, folder: Path) -> tuple[str, ...]:
    """Return the edit of a set that goes through what was tried on ours, made if there is none.

    The set has its own gradients and ranking afterwards.
    """
    records = Store(str(folder / ADVERSARIAL))
    edit = records.where(Artifact.EDIT.path(name))
    if not Path(edit).exists():
        ours = (str(folder / OURS["ours"] / Artifact.EDIT.path(name)),)
        verify(store, name, VerifyRequest(edits=ours, checks=(Check.PREFIX,)))
        prefixes = adversarial_prefixes(store, name)
        compute_gradients(store, name, options=PassOptions(prefixes=prefixes))
        rank(store, name, options=RankOptions(include=(FIRST_LAYER,)))
        search(store, name, options=HARDENED, records=records)
    compute_gradients(store, name)
    rank(store, name)
    return (edit,)


def figures(original: VerifiedModel, model: VerifiedModel) -> Iterator[tuple[str, float, float]]:
    """Yield what a column is called, its figure, and that of its control, if it has one."""
    none = float("nan")
    (before,), (after,) = (m.finding(Check.BASELINE).probes for m in (original, model))
    yield "FA@1", after.forget.top1, none
    yield "FA@5", after.forget.top5, none
    for name in sorted(after.utility):
        yield f"{name} lost", before.utility[name].top1 - after.utility[name].top1, none
    for row in rows(original, model):
        if row.check is Check.SPELLING:
            kind = "mean" if row.probe.endswith("mean") else "" if row.detail else "worst"
            if kind:
                yield f"spelling, {kind}", row.after.top1, none
        elif row.check in (Check.AUGMENT, Check.QUANTISE):
            yield f"{row.check}, worst", row.after.top1, none
        elif row.check is not Check.BASELINE:
            yield row.check, row.after.top1, row.control.top1 if row.control else none
    if finding := model.finding(Check.PROBE):
        for told in finding.told:
            yield f"{told.classifier}, {told.subject}: recall", told.recall, none
    if finding := model.finding(Check.RETRIEVAL):
        for found in finding.retrieval.queries:
            yield f"mAP of {found.query} in {found.index}", found.precision, none


def main() -> None:
    methods = [*OURS, ADVERSARIAL, *OTHERS, BOTH, *CLOSED_FORMS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", default="facebook,castle", help="as of unseen.py")
    parser.add_argument("--methods", nargs="+", choices=methods, default=[*OURS, *OTHERS])
    parser.add_argument("--checks", nargs="+", type=Check, choices=list(Check), default=CHECKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="where to keep everything, to go on later")
    options = parser.parse_args()
    folder = options.store or Path(tempfile.mkdtemp())
    concepts = unseen.draw(options.concepts, options.seed)
    print(f"seed {options.seed}: {', '.join(concepts)}")
    cells: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for name in concepts:
        store = Store(str(folder / "store"))
        unseen.prepared(store, demo_request(name))
        for method in ("original", *options.methods):
            model, edits = None, ()
            if method == ADVERSARIAL:
                edits = hardened(store, name, folder)
            elif method in (*OURS, "original"):
                way = OURS.get(method, "default")
                unseen.searched(store, name, way, folder)
                edits = (str(folder / way / Artifact.EDIT.path(name)),)
            else:
                leaves = Method.LEACE_VISION if method == BOTH else Method(method)
                model = checkpoint(store, name, leaves, folder)
            if method == BOTH:
                model = with_edit(folder, name, model)
            request = VerifyRequest(model=model, edits=edits, checks=options.checks)
            original, other = verify(store, name, request).models
            found = figures(original, original if method == "original" else other)
            columns: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for column, figure, control in found:
                columns[column].append((figure, control))
            for column, each in columns.items():
                cells[method][column].append(max(each))
            told = ", ".join(f"{column} {max(each)[0]:.1f}" for column, each in columns.items())
            print(f"# {name}: {method} done: {told}", flush=True)
    show(cells)


def show(cells: dict[str, dict[str, list[tuple[float, float]]]]) -> None:
    """Print a line for each figure, a column for each method."""
    print("\t".join(["figure", *cells]))
    for column in next(iter(cells.values())):
        words = [column]
        for method in cells:
            values = cells[method].get(column, [])
            means = [sum(each) / len(values) for each in zip(*values, strict=True)]
            shown = " / ".join(f"{mean:.1f}" for mean in means if mean == mean) or "-"
            words.append(f"{shown} {added(values)}".strip())
        print("\t".join(words))


def added(values: list[tuple[float, float]]) -> str:
    """Return by how much figures exceed their controls on average, with a 95% interval.

    Concepts are drawn with repetition, each with its control: what one concept's images leave
    to chance is in how concepts differ.
    """
    points = np.array([figure - control for figure, control in values])
    if not len(points) or np.isnan(points).any():
        return ""
    drawn = np.random.default_rng(0).integers(0, len(points), (DRAWS, len(points)))
    low, high = np.percentile(points[drawn].mean(axis=1), [2.5, 97.5])
    return f"({points.mean():+.1f}, {low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
