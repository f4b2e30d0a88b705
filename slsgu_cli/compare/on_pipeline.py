"""`compare --target`: every method on one diffusion pipeline; each row is recorded."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from time import perf_counter

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, load_edit, warn_of_other_encoders
from slsgu_cli.checkpoints.targets import Family
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.metrics import frechet_distance
from slsgu_cli.compare.comparison import ComparisonRun
from slsgu_cli.compare.pass_times import ROLES, PassTimes
from slsgu_cli.compare.pipeline_data import PipelineData
from slsgu_cli.compare.registry import label_of, on_pipeline
from slsgu_cli.errors import MissingError, StaleError, UsageError
from slsgu_cli.figures.sheets import Strip, Tile, sheet_png
from slsgu_cli.records.codec import digest
from slsgu_cli.records.comparison import (
    PIPELINE_METHODS,
    Method,
    MethodSetting,
    PipelineCompareOptions,
    PipelineComparison,
    PipelineOutcome,
    PipelinePlan,
)
from slsgu_cli.records.method import GradientPointer
from slsgu_cli.records.sets import Split
from slsgu_cli.records.targets import TargetTrials
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer, target_edit
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store
from slsgu_cli.targets.judge import judge_specs
from slsgu_cli.targets.judged_prompts import JudgedPrompts
from slsgu_cli.targets.models import Pipeline, folder_fingerprint, new_values, require_family
from slsgu_cli.text import enumerated

# Images of a row in the contact sheet.
SHOWN = 8


def compare_on_pipeline(
    store: Store, name: str, *, options: PipelineCompareOptions
) -> PipelineComparison:
    """Run and measure every method on the pipeline; write the contact sheet.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    judges = judge_specs(store, name, options.judges)
    if len(judges) > 1:
        raise UsageError("methods are compared by one judge", hint="give --judge once")
    options = replace(options, judges=judges)
    run = PipelineComparisonRun.open(store, name, options)
    settings = {
        method: settings_of(method, options.rates)
        for method in PIPELINE_METHODS
        if method in (Method.ORIGINAL, *options.methods)
    }
    if Method.OURS in settings:
        # Report a missing edit before anything is trained.
        run.at(Method.OURS, None)
    rows = [run.row(method, setting) for method, each in settings.items() for setting in each]
    pictures = {row: run.pictures(row) for row in rows}
    store.write_bytes(sheet_path(name, options.target), sheet(run.judged, pictures, options.target))
    return replace(run.record, outcomes=tuple(rows))


def settings_of(method: Method, rates: Sequence[float]) -> Sequence[float | None]:
    """Return the settings of a method: learning rates, or the grid of a closed form."""
    spec = on_pipeline(method)
    if spec is None:
        return (None,)
    return spec.hyperparameter.grid if spec.hyperparameter else rates


def sheet_path(name: str, target: Path) -> str:
    """Return the path of the contact sheet of a comparison."""
    return f"{_folder(name, target)}/sheet.png"


def _folder(name: str, target: Path) -> str:
    return Artifact.TARGET_COMPARISON.folder_of(target_edit(name, target))


@dataclass
class PipelineComparisonRun(ComparisonRun[PipelineOutcome]):
    """The comparison on one pipeline, which is loaded only for rows that are not recorded."""

    record: PipelineComparison
    pointer: GradientPointer
    options: PipelineCompareOptions
    judged: JudgedPrompts

    artifact = Artifact.TARGET_COMPARISON

    @classmethod
    def open(
        cls, store: Store, name: str, options: PipelineCompareOptions
    ) -> "PipelineComparisonRun":
        """Read the record of a set and a pipeline. Raises MissingError and StaleError."""
        manifest = read_manifest(store, name)
        pointer = read_pointer(store, manifest)
        store.require_writable(cls.artifact.path(name))
        family = require_family(options.target, answers=False).family
        specs = {method: on_pipeline(method) for method in options.methods}
        of_unet = [method for method, spec in specs.items() if spec and not spec.text]
        if of_unet and family in (Family.SD3, Family.FLUX):
            others = [m for m in options.methods if m not in (Method.ORIGINAL, *of_unet)]
            raise UsageError(
                f"{options.target} is {family}, which has a transformer: "
                f"{enumerated(of_unet)} edit a UNet",
                hint=f"--methods {','.join(others or [Method.OURS])}",
            )
        judges = options.judges or (pointer.model,)
        judged = JudgedPrompts.of_set(
            store, manifest, judges, options.budget, split=Split.TEST, device=options.device
        )
        fresh = PipelineComparison(
            name=name,
            concept=judged.name,
            target=str(options.target),
            target_fingerprint=folder_fingerprint(options.target),
            forget=pointer.forget,
            forget_data=pointer.forget_data,
            retain_data=pointer.retain_data,
            evals=manifest.measured_on(),
            judge=str(judged.judge.spec),
            budget=options.budget,
            outcomes=(),
            version=slsgu_cli.__version__,
            asked=judged.digest,
        )
        times = PassTimes(store, manifest, pick_device(options.device))
        edit = target_edit(name, options.target)
        return cls(store, edit, fresh, times, pointer, options, judged)

    @cached_property
    def pipe(self) -> Pipeline:
        """The loaded pipeline."""
        return Pipeline.load(self.options.target, device=self.options.device)

    @cached_property
    def our_edit(self) -> tuple[Edit, float]:
        """The edit searched for on the pipeline, and the seconds of its search."""
        return our_edit(self.store, self.pointer, self.options.target)

    def at(self, method: Method, setting: float | None) -> MethodSetting:
        """Return the setting and plan of a method, or the digest of our edit."""
        if method is Method.OURS:
            return MethodSetting(method, edit=digest(self.our_edit[0].header))
        return MethodSetting(method, setting, self._plan(method, setting))

    def _plan(self, method: Method, rate: float | None) -> PipelinePlan | None:
        spec = on_pipeline(method)
        if spec is None or spec.hyperparameter or rate is None:
            return None
        steps, seed = self.options.budget.diffusion.steps, self.options.budget.seed
        iterations = spec.updates or self.options.iterations
        return PipelinePlan(iterations=iterations, rate=rate, steps=steps, seed=seed)

    def run(self, method: Method, setting: float | None) -> PipelineOutcome:
        """Apply a method to the pipeline; generate, judge and store images."""
        judged, at, plan = self.judged, self.at(method, setting), self._plan(method, setting)
        prompts, images = [*judged.of_concept, *judged.of_others], []
        with (
            self._applied(at) as seconds,
            progress.bar(f"images of {label_of(method)}", len(prompts)) as ticker,
        ):
            for image in judged.generated(self.pipe, prompts):
                images.append(image)
                ticker.advance()
        split, is_original = len(judged.of_concept), method is Method.ORIGINAL
        original = images if is_original else self.pictures(self.row(Method.ORIGINAL))
        features = judged.judge.features
        outcome = PipelineOutcome(
            method=method,
            setting=None if plan else setting,
            plan=plan,
            edit=at.edit,
            effect=judged.effects(images[:split], images[split:])[str(judged.judge.spec)],
            distance=frechet_distance(features(original[split:]), features(images[split:])),
            seconds=seconds,
            where=None if is_original else self.times.where,
        )
        for place, image in enumerate(images):
            self.store.write_bytes(self._file(outcome, place), image)
        return outcome

    @contextmanager
    def _applied(self, at: MethodSetting) -> Iterator[float]:
        """Apply a method to the pipeline for a block; yield the seconds that it took."""
        spec, pipe = on_pipeline(at.method), self.pipe
        if at.method is Method.ORIGINAL:
            yield 0.0
        elif spec is None:
            edit, seconds = self.our_edit
            seconds += self.times.seconds(self.pointer, ROLES, squares=False)
            with pipe.edited(new_values(pipe.encoders, [edit])):
                yield seconds
        else:
            texts = [live.module for live in pipe.encoders]
            modules = texts if spec.text else [pipe.pipeline.unet]
            before = [{n: v.clone() for n, v in each.state_dict().items()} for each in modules]
            start = perf_counter()
            try:
                spec.edit(self._data, at.setting if spec.hyperparameter else at.plan)
                yield perf_counter() - start
            finally:
                for module, weights in zip(modules, before, strict=True):
                    module.load_state_dict(weights)

    @cached_property
    def _data(self) -> PipelineData:
        manifest, anchor = self.times.manifest, self.pointer.anchor
        forget, retain = (
            DataBlock.open(self.store, each) for each in (manifest.forget, manifest.retain)
        )
        return PipelineData(self.pipe, self.judged, forget, retain, anchor)

    def pictures(self, outcome: PipelineOutcome) -> list[bytes]:
        """Return the stored images of a row, the concept's first."""
        count = len(self.judged.of_concept) + len(self.judged.of_others)
        return [self.store.read_bytes(self._file(outcome, place)) for place in range(count)]

    def _file(self, outcome: PipelineOutcome, place: int) -> str:
        folder = _folder(self.record.name, self.options.target)
        return f"{folder}/{outcome.label.replace(' ', '-')}/{place:04}.png"


def our_edit(store: Store, pointer: GradientPointer, target: Path) -> tuple[Edit, float]:
    """Return the edit and the seconds of its search, without those of the gradient passes.

    Raises MissingError without an edit, StaleError if no recorded trial matches it.
    """
    name = target_edit(pointer.name, target)
    hint = f"run `slsgu search {quote(pointer.name)} --target {quote(str(target))}`"
    if not store.exists(Artifact.EDIT.path(name)):
        raise MissingError(f"{store.url} has no edit {name} to compare", hint=hint)
    edit = load_edit(store, name)
    warn_of_other_encoders([edit])
    path = Artifact.TARGET_TRIALS.path(name)
    trials = store.read_record(path, TargetTrials) if store.exists(path) else None
    if trials is not None and trials.forget == pointer.forget:
        key = (edit.header.layer, edit.header.step)
        if key in {(trial.layer, trial.step) for trial in trials.trials}:
            return edit, trials.seconds
    raise StaleError(f"the edit {name} is not among the recorded trials of its search", hint=hint)


def sheet(
    judged: JudgedPrompts, pictures: Mapping[PipelineOutcome, Sequence[bytes]], target: Path
) -> bytes:
    """Return a PNG of the first images of each row, labelled by the judge's first guess."""
    strips = []
    for prompts, start in ((judged.of_concept, 0), (judged.of_others, len(judged.of_concept))):
        shown = prompts[:SHOWN]
        labels = list(dict.fromkeys(prompt.label for prompt in shown))
        tiles = {}
        for row, images in pictures.items():
            setting = row.made_by.setting
            title = label_of(row.method) + (f" {setting:g}" if setting is not None else "")
            some = images[start : start + len(shown)]
            tiles[title] = list(map(Tile, some, judged.judge.verdicts(some)))
        strips.append(Strip(f"prompts: {', '.join(labels)}", labels == [judged.name], tiles))
    return sheet_png(f"Forgetting {judged.name}: {target.name}", strips)
