"""`search` on a target: a layer and step by what it generates or answers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from pathlib import Path
from shlex import quote
from time import perf_counter

import torch

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.checkpoints.layers import Layer, find_layers, layers_of
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip.evaluation import Evaluation, prepare
from slsgu_cli.clip.inputs import spare
from slsgu_cli.clip.models import pick_device, tokenizer
from slsgu_cli.downstream.directions import Move, TargetRun, by_gain, moves_of
from slsgu_cli.downstream.models import PIPELINES, folder_fingerprint
from slsgu_cli.downstream.subjects import AskedSubject, PaintedSubject, Subject
from slsgu_cli.errors import InputError, NotForgottenError, StaleError, UsageError
from slsgu_cli.method.directions import RIDGE, layer_gradient
from slsgu_cli.method.gradients import load_graded
from slsgu_cli.method.scoring import next_step
from slsgu_cli.method.search_plan import compact, unmeasured_edit
from slsgu_cli.method.trial import Probe
from slsgu_cli.records.method import (
    Direction,
    Effect,
    GradientHeader,
    GradientPointer,
    LayerScore,
    Qkv,
    Share,
    TargetFigures,
    Tower,
)
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.records.targets import Budget, GradientOf, TargetTrial, TargetTrials
from slsgu_cli.store.artifacts import (
    gradient_path,
    read_manifest,
    read_pointer,
    recorded,
    target_edit,
    target_trials_path,
)
from slsgu_cli.store.store import Store

STEPS = 7


def clip_starts(
    store: Store, manifest: SetManifest, pointer: GradientPointer, rays: Sequence[Move], device: str
) -> dict[str, float]:
    """Return for each layer the shortest step met at which CLIP's FA@1 is 0, where one is."""
    device = pick_device(device)
    resolved, module = load_graded(manifest, pointer, device)
    whole = prepare(store, manifest, module, tokenize=tokenizer(resolved), device=device)
    few = Evaluation(whole.model, whole.vision, whole.text, whole.forget, {})
    few.base_pass((ray.layer for ray in rays), cache_bytes=spare(device))
    starts = {}
    for ray in rays:
        probe = Probe(few, _score(ray), ray.direction.to(device))
        tried: list[tuple[float, float]] = []
        for _ in range(STEPS):
            step = next_step(tried, 0.1 / ray.share(1.0))
            tried.append((step, probe.trial(step).forget.top1))
        enough = [step for step, left in tried if left == 0]
        if enough:
            starts[ray.layer] = min(enough)
    return starts


def _score(ray: Move) -> LayerScore:
    return LayerScore(
        layer=ray.layer,
        tower=Layer.parse(ray.layer).tower or Tower.TEXT,
        shape=tuple(ray.weight.shape),
        importance=ray.importance,
        alignment=0.0,
        forget_norm=0.0,
        retain_norm=0.0,
        weight_norm=float(ray.weight.norm()),
        front=True,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class SteerOptions:
    """How to search on a target. Without `layers`, the `top` most important are searched.

    `full` measures what every trial keeps, not only the shortest sufficient of each layer.

    `goal` is the unlearning accuracy to reach, in percent.
    """

    target: Path
    layers: Sequence[str] = ()
    top: int = 3
    gradient_of: GradientOf | None = None
    direction: Direction = Direction.WHITENED
    ridge: float = RIDGE
    qkv: Qkv = Qkv.FUSED
    goal: float = 90.0
    steps: int = 10
    full: bool = False
    budget: Budget = field(default_factory=Budget)
    judge: ModelSpec | None = None
    encoder: str | None = None
    device: str = "auto"


@dataclass(frozen=True, slots=True)
class SteerResult:
    """Every trial, the chosen one, whether it reaches the goal, and the edit's name."""

    trials: TargetTrials
    chosen: TargetTrial
    forgotten: bool
    reused: int
    edit: str


def search_target(store: Store, name: str, *, options: SteerOptions) -> SteerResult:
    """Search for the layer and step at which a target forgets, and write the edit.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    began = perf_counter()
    manifest = read_manifest(store, name)
    pointer = read_pointer(store, manifest)
    subject, judge, gradient_of = _subject(store, manifest, pointer, options)
    header = store.read_header(gradient_path(pointer.forget), GradientHeader)
    reached = [n for n in header.weights if subject.encoder.encoder.why_not(n) is None]
    layers = _named(layers_of(reached, options.qkv), options)
    _require_same_clip(subject, header, layers, options.target, name)
    if gradient_of is GradientOf.CLIP:
        gradients = {
            layer: torch.from_numpy(layer_gradient(store, pointer.forget, layer))
            for layer in layers
        }
    else:
        gradients = subject.forget_gradient(layers)
    found = by_gain(
        subject,
        moves_of(subject, gradients, direction=options.direction, ridge=options.ridge),
        gradients,
    )
    if not found:
        raise InputError(f"no layer that reaches {options.target} has a forget gradient")
    chosen_rays = found if options.layers else found[: options.top]
    progress.detail("layers by importance: " + ", ".join(ray.layer for ray in found[:10]))
    with torch.no_grad():
        trials = _resume(store, manifest, pointer, subject, judge, gradient_of, found, options)
        starts = {}
        if gradient_of is GradientOf.CLIP:
            starts = clip_starts(store, manifest, pointer, chosen_rays, options.device)
        path = target_trials_path(name, options.target)
        run = TargetRun(store, path, subject, trials, full=options.full, began=began)
        for ray in chosen_rays:
            run.bisect(ray, options.steps, starts.get(ray.layer))
        best = run.choose(chosen_rays)
        edit = _write_edit(store, manifest, pointer, run, best, chosen_rays)
    reached_goal = run.reaches(best)
    return SteerResult(run.trials, best, reached_goal, len(trials.trials), edit)


def require_reached(result: SteerResult) -> None:
    """Raise NotForgottenError where no step reached the goal."""
    if result.forgotten:
        return
    left = result.chosen.concept
    raise NotForgottenError(
        f"no step reaches the goal of {result.trials.goal:g}% on {result.trials.target}: the best "
        f"leaves the concept recognised in {left.count} of {left.total}",
        hint="the trials and this edit are kept; try more --steps, --top or another --layer",
    )


def _subject(
    store: Store, manifest: SetManifest, pointer: GradientPointer, options: SteerOptions
) -> tuple[Subject, ModelSpec | None, GradientOf]:
    """Load the target. A pipeline moves along CLIP's gradient, a LLaVA along its own."""
    family = read_target(options.target).family
    if family in PIPELINES:
        judge = options.judge or pointer.model
        painted = PaintedSubject.load(
            store,
            manifest,
            options.target,
            judge,
            options.budget,
            encoder=options.encoder,
            device=options.device,
        )
        if options.gradient_of is GradientOf.TARGET:
            raise UsageError(
                "a diffusion pipeline moves along CLIP's own forget gradient",
                hint="--gradient clip",
            )
        return painted, judge, GradientOf.CLIP
    asked = AskedSubject.load(
        store, manifest, options.target, options.budget, device=options.device
    )
    return asked, None, options.gradient_of or GradientOf.TARGET


def _require_same_clip(
    subject: Subject, header: GradientHeader, layers: Sequence[str], target: Path, name: str
) -> None:
    """Raise StaleError unless the target is built on the CLIP that the gradients are of.

    Norms tell: another precision changes them by a thousandth, another model by more.
    """
    for layer in sorted({Layer.parse(layer).parameter for layer in layers}):
        value, known = subject.encoder.value(layer), header.weights[layer]
        same = tuple(value.shape) == tuple(known.shape)
        if not same or not math.isclose(float(value.float().norm()), known.norm, rel_tol=0.01):
            raise StaleError(
                f"{target} is not built on the CLIP that the gradients of {name} are of: "
                f"its {layer} differs",
                hint=f"run `slsgu build-sets {quote(name)}` and `slsgu grad {quote(name)}` "
                "with that CLIP",
            )


def _named(candidates: list[str], options: SteerOptions) -> list[str]:
    """Return the layers that were asked for, or all that reach the target. Raises UsageError."""
    chosen = []
    for text in options.layers:
        fitting = find_layers(text, candidates)
        if len(fitting) != 1:
            near = ", ".join(fitting[:5]) or "none"
            raise UsageError(
                f"--layer {text} fits {len(fitting)} layers that reach {options.target}: {near}"
            )
        chosen += fitting
    return chosen or candidates


def _resume(
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    subject: Subject,
    judge: ModelSpec | None,
    gradient_of: GradientOf,
    found: Sequence[Move],
    options: SteerOptions,
) -> TargetTrials:
    """Return the recorded trials if they were made from the same things, else none."""
    path = target_trials_path(manifest.name, options.target)
    fresh = TargetTrials(
        name=manifest.name,
        target=str(options.target),
        target_fingerprint=folder_fingerprint(options.target),
        gradient_of=gradient_of,
        forget=pointer.forget,
        forget_data=pointer.forget_data,
        retain_data=pointer.retain_data,
        evals={name: ref.fingerprint for name, ref in sorted(manifest.evals.items())},
        direction=options.direction,
        ridge=options.ridge if options.direction is Direction.WHITENED else None,
        judge=None if judge is None else str(judge),
        budget=options.budget,
        goal=options.goal,
        importance={ray.layer: ray.importance for ray in found},
        before=None,
        trials=(),
        seconds=0.0,
        version=slsgu_cli.__version__,
    )
    made_from = attrgetter(
        "target_fingerprint", "gradient_of", "forget", "forget_data", "retain_data", "evals",
        "direction", "ridge", "judge", "budget",
    )  # fmt: skip
    unusable = "recorded trials cannot be used and are made again"
    old = recorded(store, path, TargetTrials, unusable=unusable)
    if old and old.before is not None and made_from(old) == made_from(fresh):
        return replace(fresh, before=old.before, trials=old.trials, seconds=old.seconds)
    return replace(fresh, before=Effect(subject.concept(), subject.others()))


def _write_edit(
    store: Store,
    manifest: SetManifest,
    pointer: GradientPointer,
    run: TargetRun,
    chosen: TargetTrial,
    tried: Sequence[Move],
) -> str:
    trials = run.trials
    ray = next(ray for ray in tried if ray.layer == chosen.layer)
    after = Effect(chosen.concept, chosen.others or Share(0, 0))
    edit = unmeasured_edit(
        manifest,
        pointer,
        layer=chosen.layer,
        tower=chosen.tower,
        step=chosen.step,
        share=chosen.share,
        direction=trials.direction,
        ridge=trials.ridge,
        retain_data=pointer.retain_data,
        delta=(chosen.step * ray.direction).cpu().numpy(),
        before=compact(ray.weight.cpu().numpy()),
    )
    measured = replace(
        edit.header,
        name=target_edit(manifest.name, Path(trials.target)),
        forgotten=run.reaches(chosen),
        target=TargetFigures(
            trials.target, trials.target_fingerprint, trials.before or after, after
        ),
    )
    write_edit(store, replace(edit, header=measured))
    return measured.name
