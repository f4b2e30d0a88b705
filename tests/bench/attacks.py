"""Attack models that forgot a concept by several methods, and compare with controls.

    python tests/bench/attacks.py                                  # facebook and castle
    python tests/bench/attacks.py --concepts 4 --store attacks-store
    python tests/bench/attacks.py --methods ours ga --checks typos prefix

Each concept is built, graded and ranked as in the demo. `ours` is the search with its defaults,
`paper` with the paper's choice. The others are tuned on the first concept as `compare` tunes
them, on the validation images. `ours+leace` is our edit after LEACE of the image projection.
`adversarial` repeats our search of the first text layer on gradients that include the words
that the attack tried on `ours`. The result of a method is written as a checkpoint and verified
as by `slsgu verify --model`. All figures are of test images. A cell has the mean over concepts,
after the slash that of the control, and in brackets the difference with the 95% interval of a
bootstrap over concepts. A last table pools the test images of all concepts: FA@1 and FA@5 as
counts with exact 95% intervals, and the mean loss of accuracy on the other classes with the
95% interval of a bootstrap over concepts. Run the script on the same store again to resume it.
"""

import argparse
import json
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import heldout
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.cli.demo import DATA, demo_request
from slsgu_cli.compare.comparison import ClipComparisonRun
from slsgu_cli.compare.registry import ClosedForm, baseline
from slsgu_cli.compare.tuning import tune
from slsgu_cli.engine.gradients import adversarial_prefixes, compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.records.comparison import CLIP_METHODS, CompareOptions, Method
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.figures import STRUCTURE, Accuracy, Share, TextStructure
from slsgu_cli.records.options import PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.records.verification import Check, VerifiedModel, VerifyRequest
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store
from slsgu_cli.verification.bootstrap import percentile_interval, resampled_means
from slsgu_cli.verification.checks.neutral_prompts import EDIT, RANDOM
from slsgu_cli.verification.results import verdict_rows
from slsgu_cli.verification.verify import verify

OURS = {"ours": "default", "paper": "paper"}
BOTH = "ours+leace"
ADVERSARIAL = "adversarial"
FIRST_LAYER = "transformer.resblocks.0.mlp.c_proj.weight"
CLOSED_FORMS = [m for m in CLIP_METHODS if isinstance(baseline(m), ClosedForm)]
HARDENED = SearchOptions(layers=(FIRST_LAYER,), direction=Direction.WHITENED, overshoot=2.0)
OTHERS = (Method.GA, Method.SALUN, Method.SSD, Method.UCE, Method.ALPHAEDIT, Method.MEMIT)
CHECKS = (
    Check.TYPOS,
    Check.AUGMENT,
    Check.QUANTISE,
    Check.RELEARN,
    Check.PROBE,
    Check.PREFIX,
    Check.RING_A_BELL,
    Check.INVERSION,
)
MODEL = DATA / "clip"
# Retain rows for trained methods: about as many as there are forget rows.
RETAIN_ROWS = 128


def checkpoint(store: Store, name: str, method: Method, folder: Path) -> ModelSpec:
    """Return the model after a method; run the method if it is missing."""
    target = folder / "models" / f"{name}-{method}"
    if not (target / "open_clip_model.safetensors").exists():
        options = CompareOptions(methods=(method,), rates=None, retain_rows=RETAIN_ROWS)
        run = ClipComparisonRun.open(store, name, options)
        setting = tuned(run, method, folder)
        model = run.baselines.model
        if method in CLOSED_FORMS:
            outcome = run.row(method, setting)
            change = run.layer_edits.change(method, setting, outcome.layer)
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
    """Return the setting of a method tuned on the first concept; tune it if necessary."""
    known = folder / "settings" / f"{method}.json"
    if not known.exists():
        setting = tune(method, partial(run.row, method))[0].setting or 0.0
        known.parent.mkdir(parents=True, exist_ok=True)
        known.write_text(json.dumps(setting))
    return float(json.loads(known.read_text()))


def with_edit(folder: Path, name: str, model: ModelSpec) -> ModelSpec:
    """Return a model with our edit of a concept; write it if it is missing."""
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
    """Return an edit that also forgets the words tried on ours; make it if it is missing.

    Afterwards the set has its plain gradients and ranking again.
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
    """Yield the name of a column, its figure, and that of its control, if it has one."""
    none = float("nan")
    (before,), (after,) = (m.finding(Check.BASELINE).variants for m in (original, model))
    yield "FA@1", after.forget.top1, none
    yield "FA@5", after.forget.top5, none
    for name in sorted(after.utility):
        yield f"{name} lost", before.utility[name].top1 - after.utility[name].top1, none
    for row in verdict_rows(original, model):
        if row.check is Check.TYPOS:
            kind = "mean" if row.variant.endswith("mean") else "" if row.detail else "worst"
            if kind:
                yield f"typos, {kind}", row.after.top1, none
        elif row.check in (Check.AUGMENT, Check.QUANTISE):
            yield f"{row.check}, worst", row.after.top1, none
        elif row.check is not Check.BASELINE:
            yield row.check, row.after.top1, row.control.top1 if row.control else none
    if finding := model.finding(Check.PROBE):
        for score in finding.classifiers:
            yield f"{score.classifier}, {score.subject}: recall", score.recall, none
    if finding := model.finding(Check.NEUTRAL_PROMPTS):
        structure = finding.structure or {EDIT: TextStructure(0)}
        for name in STRUCTURE:
            edit, control = (getattr(structure.get(key), name, none) for key in (EDIT, RANDOM))
            yield f"neutral prompts, {name}", edit, control
    if finding := model.finding(Check.RETRIEVAL):
        for found in finding.retrieval.queries:
            yield f"mAP of {found.query} in {found.index}", found.precision, none


def main() -> None:
    methods = [*OURS, ADVERSARIAL, BOTH, *(m for m in CLIP_METHODS if baseline(m))]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", default="facebook,castle", help="as for heldout.py")
    parser.add_argument("--methods", nargs="+", choices=methods, default=[*OURS, *OTHERS])
    parser.add_argument("--checks", nargs="+", type=Check, choices=list(Check), default=CHECKS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="keep everything here, to resume later")
    options = parser.parse_args()
    folder = options.store or Path(tempfile.mkdtemp())
    concepts = heldout.draw(options.concepts, options.seed)
    print(f"seed {options.seed}: {', '.join(concepts)}")
    cells: dict[str, dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    forget: dict[str, list[Accuracy]] = defaultdict(list)
    for name in concepts:
        store = Store(str(folder / "store"))
        heldout.prepared(store, demo_request(name))
        for method in ("original", *options.methods):
            model, edits = None, ()
            if method == ADVERSARIAL:
                edits = hardened(store, name, folder)
            elif method in (*OURS, "original"):
                way = OURS.get(method, "default")
                heldout.searched(store, name, way, folder)
                edits = (str(folder / way / Artifact.EDIT.path(name)),)
            else:
                first = Method.LEACE_VISION if method == BOTH else Method(method)
                model = checkpoint(store, name, first, folder)
            if method == BOTH:
                model = with_edit(folder, name, model)
            request = VerifyRequest(model=model, edits=edits, checks=options.checks)
            original, other = verify(store, name, request).models
            model_after = original if method == "original" else other
            (baseline_after,) = model_after.finding(Check.BASELINE).variants
            forget[method].append(baseline_after.forget)
            columns: dict[str, list[tuple[float, float]]] = defaultdict(list)
            for column, figure, control in figures(original, model_after):
                columns[column].append((figure, control))
            for column, each in columns.items():
                cells[method][column].append(max(each))
            line = ", ".join(f"{column} {max(each)[0]:.1f}" for column, each in columns.items())
            print(f"# {name}: {method} done: {line}", flush=True)
    show(cells)
    show_pooled(cells, forget)


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


def show_pooled(
    cells: dict[str, dict[str, list[tuple[float, float]]]], forget: dict[str, list[Accuracy]]
) -> None:
    """Print a line for each method: FA of all test images, and the mean losses of accuracy."""
    lost = [column for column in next(iter(cells.values())) if column.endswith(" lost")]
    header = ["method", "FA@1", "95% interval", "FA@5", "95% interval"]
    print("\n" + "\t".join([*header, *(f"{column}, points" for column in lost)]))
    for method, accuracies in forget.items():
        top1 = pooled([(each.top1, each.rows) for each in accuracies])
        top5 = pooled([(each.top5, each.rows) for each in accuracies])
        words = [method]
        for share in (top1, top5):
            low, high = share.interval
            words.append(f"{share.count} of {share.total} ({share.percent or 0:.1f}%)")
            words.append(f"{low:.1f} to {high:.1f}")
        for column in lost:
            points = np.array([figure for figure, _ in cells[method][column]])
            low, high = percentile_interval(resampled_means(points))
            shown = f"{points.mean():.2f} ({low:.2f} to {high:.2f})"
            words.append("" if method == "original" else shown)
        print("\t".join(words))


def pooled(percents: list[tuple[float, int]]) -> Share:
    """Return the share over all concepts, given the percent and images of each."""
    shares = [Share.of(percent, total) for percent, total in percents]
    return Share(sum(share.count for share in shares), sum(share.total for share in shares))


def added(values: list[tuple[float, float]]) -> str:
    """Return the mean difference to the controls, with a 95% interval.

    The bootstrap draws concepts with their controls; their spread includes that of images.
    """
    points = np.array([figure - control for figure, control in values])
    if not len(points) or np.isnan(points).any():
        return ""
    low, high = percentile_interval(resampled_means(points))
    return f"({points.mean():+.1f}, {low:+.1f} to {high:+.1f})"


if __name__ == "__main__":
    main()
