"""`compare --target`: every method on one pipeline, recorded as it ends."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from shlex import quote
from time import perf_counter

import torch
from torch import nn

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, load_edit, warn_of_other_encoders
from slsgu_cli.checkpoints.targets import Family, Target
from slsgu_cli.clip.inputs import spans
from slsgu_cli.clip.zeroshot import frechet_distance
from slsgu_cli.compare import diffusion
from slsgu_cli.compare.comparison import LABELS, ComparisonRun
from slsgu_cli.compare.diffusion import Denoiser
from slsgu_cli.compare.ours import ROLES, PassTimes
from slsgu_cli.downstream.judge import JudgedPrompt, JudgedPrompts, judge_specs
from slsgu_cli.downstream.models import (
    Pipeline,
    folder_fingerprint,
    new_values,
    require_family,
)
from slsgu_cli.errors import MissingError, StaleError, UsageError
from slsgu_cli.figures.pictures import Strip, Tile, sheet_png
from slsgu_cli.method.covariance import chosen_rows
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import GradientPointer
from slsgu_cli.records.sets import DataRef, SetManifest, Split
from slsgu_cli.records.studies import (
    Method,
    MethodSetting,
    PipelineCompareOptions,
    PipelineComparison,
    PipelineOutcome,
    PipelinePlan,
)
from slsgu_cli.records.targets import TargetTrials
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer, target_edit
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

SHOWN = 8
ROWS = 16


def compare_on_pipeline(
    store: Store, name: str, *, options: PipelineCompareOptions
) -> PipelineComparison:
    """Run every method on the pipeline and measure it; write the contact sheet.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    judges = judge_specs(store, name, options.judges)
    if len(judges) > 1:
        raise UsageError("methods are compared by one judge", hint="give --judge once")
    options = replace(options, judges=judges)
    run = PipelineComparisonRun.open(store, name, options)
    settings: dict[Method, Sequence[float | None]] = {
        Method.ORIGINAL: (None,),
        Method.ESD: options.rates,
        Method.SALUN: options.rates,
    }
    settings = {m: settings[m] for m in settings if m in (Method.ORIGINAL, *options.methods)}
    if Method.OURS in options.methods:
        settings[Method.OURS] = (None,)
        # A missing edit is told of before anything is trained.
        run.at(Method.OURS, None)
    rows = [run.row(method, setting) for method, each in settings.items() for setting in each]
    pictures = {row: run.pictures(row) for row in rows}
    store.write_bytes(sheet_path(name, options.target), sheet(run.judged, pictures, options.target))
    return replace(run.record, outcomes=tuple(rows))


def _require_unet(target: Target, options: PipelineCompareOptions) -> None:
    """Refuse to train what a pipeline does not have. Raises UsageError."""
    trained = [method for method in options.methods if method in (Method.ESD, Method.SALUN)]
    if trained and target.family in (Family.SD3, Family.FLUX):
        raise UsageError(
            f"{target.path} is {target.family}, which has a transformer: {' and '.join(trained)} "
            "train a UNet",
            hint="--methods ours",
        )


def sheet_path(name: str, target: Path) -> str:
    """Return where the contact sheet of a comparison lies."""
    return f"{_folder(name, target)}/sheet.png"


def _folder(name: str, target: Path) -> str:
    return Artifact.TARGET_COMPARISON.beside(target_edit(name, target))


@dataclass(frozen=True, slots=True)
class TrainedPipeline:
    """A pipeline, the pictures it is judged by, and the set it is to forget."""

    store: Store
    manifest: SetManifest
    pipe: Pipeline
    judged: JudgedPrompts

    def painted(self, label: str) -> list[bytes]:
        """Return the judged's pictures by the pipeline as it is now, the concept's first."""
        prompts = [*self.judged.of_concept, *self.judged.of_others]
        images = []
        with progress.bar(f"pictures of {label}", len(prompts)) as ticker:
            for image in self.judged.painted(self.pipe, prompts):
                images.append(image)
                ticker.advance()
        return images

    @contextmanager
    def edited(self, edit: Edit) -> Iterator[None]:
        """Have our edit in place for the length of a block."""
        with self.pipe.edited(new_values(self.pipe.encoders, [edit])):
            yield

    @contextmanager
    def trained(self, method: Method, plan: PipelinePlan) -> Iterator[float]:
        """Have the UNet trained by a method for the length of a block; yield the seconds."""
        pipeline = self.pipe.pipeline
        unet, vae = pipeline.unet, pipeline.vae
        kinds = unet.dtype, vae.dtype
        before = {name: value.clone() for name, value in unet.state_dict().items()}
        start = perf_counter()
        try:
            _cast((unet, torch.float32), (vae, torch.float32))
            self._train(method, plan)
            _cast((unet, kinds[0]), (vae, kinds[1]))
            yield perf_counter() - start
        finally:
            unet.load_state_dict(before)

    def _train(self, method: Method, plan: PipelinePlan) -> None:
        denoiser = Denoiser(self.pipe.pipeline, self.pipe.device)
        if method is Method.ESD:
            name, templates = self.judged.name, self.judged.templates
            prompts = [self.judged.prompt(name, number) for number in range(len(templates))]
            diffusion.erase(denoiser, prompts, plan)
            return
        forget, _ = self._latents(denoiser, self.manifest.forget)
        retain, captions = self._latents(denoiser, self.manifest.retain)
        data = diffusion.SalunData(
            forget=forget,
            retain=retain,
            captions=captions,
            concept=self.judged.name,
            others=[name for name in self.judged.judge.names if name != self.judged.name],
            prompt=self.judged.prompt,
        )
        diffusion.unlearn(denoiser, data, plan)

    def _latents(self, denoiser: Denoiser, ref: DataRef) -> tuple[torch.Tensor, Sequence[str]]:
        """Return latents and captions of a block, as many rows as covariances take at most."""
        block = DataBlock.open(self.store, ref)
        rows = chosen_rows(block.rows)
        parts = [
            denoiser.latents(block.take(rows[start:stop])) for start, stop in spans(len(rows), ROWS)
        ]
        return torch.cat(parts), [block.captions[row] for row in rows]


def _cast(*parts: tuple[nn.Module, torch.dtype]) -> None:
    """Give parts of the pipeline a precision; diffusers warns of any."""
    with progress.quiet():
        for module, kind in parts:
            module.to(kind)


@dataclass
class PipelineComparisonRun(ComparisonRun[PipelineOutcome]):
    """The comparison on one pipeline; it is loaded for what is not on record."""

    record: PipelineComparison
    pointer: GradientPointer
    options: PipelineCompareOptions
    judged: JudgedPrompts

    artifact = Artifact.TARGET_COMPARISON

    @classmethod
    def open(
        cls, store: Store, name: str, options: PipelineCompareOptions
    ) -> "PipelineComparisonRun":
        """Read what is on record of a set and a pipeline. Raises MissingError and StaleError."""
        manifest = read_manifest(store, name)
        pointer = read_pointer(store, manifest)
        store.require_writable(cls.artifact.path(name))
        _require_unet(require_family(options.target, answers=False), options)
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
        times = PassTimes(store, manifest, options.device)
        edit = target_edit(name, options.target)
        return cls(store, edit, fresh, times, pointer, options, judged)

    @cached_property
    def pipeline(self) -> TrainedPipeline:
        """The loaded pipeline."""
        pipe = Pipeline.load(self.options.target, device=self.options.device)
        return TrainedPipeline(self.store, self.times.manifest, pipe, self.judged)

    @cached_property
    def our_edit(self) -> tuple[Edit, float]:
        """The edit that was steered on the pipeline, and the seconds of its search."""
        return our_edit(self.store, self.pointer, self.options.target)

    def at(self, method: Method, setting: float | None) -> MethodSetting:
        """Return a method's learning rate and plan; of ours, the digest of the edit."""
        if method is Method.OURS:
            return MethodSetting(method, edit=digest(self.our_edit[0].header))
        return MethodSetting(method, setting, self._plan(setting))

    def _plan(self, rate: float | None) -> PipelinePlan | None:
        if rate is None:
            return None
        steps, seed = self.options.budget.paint.steps, self.options.budget.seed
        return PipelinePlan(iterations=self.options.iterations, rate=rate, steps=steps, seed=seed)

    def run(self, method: Method, setting: float | None) -> PipelineOutcome:
        """Paint by the pipeline as a method leaves it, judge, and keep the pictures."""
        plan = self._plan(setting)
        if plan is not None:
            with self.pipeline.trained(method, plan) as seconds:
                return self._judged(method, plan=plan, seconds=seconds)
        if method is Method.ORIGINAL:
            return self._judged(method)
        edit, seconds = self.our_edit
        seconds += self.times.seconds(self.pointer, ROLES, squares=False)
        with self.pipeline.edited(edit):
            return self._judged(method, edit=digest(edit.header), seconds=seconds)

    def _judged(
        self,
        method: Method,
        *,
        plan: PipelinePlan | None = None,
        edit: str | None = None,
        seconds: float = 0.0,
    ) -> PipelineOutcome:
        """Paint by the pipeline as it is now, judge, and keep the pictures."""
        judged = self.judged
        images = self.pipeline.painted(LABELS[method])
        split = len(judged.of_concept)
        shown, rest = images[:split], images[split:]
        original = rest
        if method is not Method.ORIGINAL:
            original = self.pictures(self.row(Method.ORIGINAL))[split:]
        features = judged.judge.features
        outcome = PipelineOutcome(
            method=method,
            plan=plan,
            edit=edit,
            effect=judged.effects(shown, rest)[str(judged.judge.spec)],
            distance=frechet_distance(features(original), features(rest)),
            seconds=seconds,
            where=None if method is Method.ORIGINAL else self.times.where,
        )
        for place, image in enumerate(images):
            self.store.write_bytes(self._file(outcome, place), image)
        return outcome

    def pictures(self, outcome: PipelineOutcome) -> list[bytes]:
        """Return a row's pictures as they were kept, the concept's first."""
        count = len(self.judged.of_concept) + len(self.judged.of_others)
        return [self.store.read_bytes(self._file(outcome, place)) for place in range(count)]

    def _file(self, outcome: PipelineOutcome, place: int) -> str:
        folder = _folder(self.record.name, self.options.target)
        return f"{folder}/{outcome.label.replace(' ', '-')}/{place:04}.png"


def our_edit(store: Store, pointer: GradientPointer, target: Path) -> tuple[Edit, float]:
    """Return the edit and the seconds of its search, without those of the gradient passes.

    Raises MissingError without an edit, StaleError where it is of no recorded trial.
    """
    name = target_edit(pointer.name, target)
    hint = f"run `slsgu search {quote(pointer.name)} --target {quote(str(target))}`"
    if not store.exists(Artifact.EDIT.path(name)):
        raise MissingError(f"{store.url} has no edit {name} to compare", hint=hint)
    edit = load_edit(store, name)
    warn_of_other_encoders([edit])
    path = Artifact.TARGET_TRIALS.path(target_edit(pointer.name, target))
    trials = store.read_record(path, TargetTrials) if store.exists(path) else None
    if trials is not None and trials.forget == pointer.forget:
        key = (edit.header.layer, edit.header.step)
        if key in {(trial.layer, trial.step) for trial in trials.trials}:
            return edit, trials.seconds
    raise StaleError(f"the edit {name} is not among the recorded trials of its search", hint=hint)


def sheet(
    judged: JudgedPrompts, pictures: Mapping[PipelineOutcome, Sequence[bytes]], target: Path
) -> bytes:
    """Return a PNG of the first of each row's pictures, below each what the judge takes it for."""
    split = len(judged.of_concept)
    strips = [
        _strip(
            judged,
            prompts[:SHOWN],
            {
                _title(row): images[start : start + SHOWN][: len(prompts)]
                for row, images in pictures.items()
            },
        )
        for prompts, start in ((judged.of_concept, 0), (judged.of_others, split))
    ]
    return sheet_png(f"Forgetting {judged.name}: {target.name}", strips)


def _strip(
    judged: JudgedPrompts, prompts: Sequence[JudgedPrompt], rows: Mapping[str, Sequence[bytes]]
) -> Strip:
    labels = list(dict.fromkeys(prompt.label for prompt in prompts))
    tiles = {title: _tiles(judged, images) for title, images in rows.items()}
    return Strip(f"asked for {', '.join(labels)}", labels == [judged.name], tiles)


def _tiles(judged: JudgedPrompts, images: Sequence[bytes]) -> list[Tile]:
    said = judged.judge.verdicts(images)
    return [Tile(image, name) for image, name in zip(images, said, strict=True)]


def _title(row: PipelineOutcome) -> str:
    return LABELS[row.method] + (f" {row.plan.rate:g}" if row.plan else "")
