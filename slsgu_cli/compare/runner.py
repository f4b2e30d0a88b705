"""Runs of trained baselines on the original model, loaded once for all of them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
from torch import nn

from slsgu_cli import progress
from slsgu_cli.clip.evaluation import Evaluation, prepare
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.compare.epochs import Weights, figures_of, follow, weights_of
from slsgu_cli.compare.pass_times import PassTimes
from slsgu_cli.compare.registry import Trained, baseline
from slsgu_cli.compare.training import LossTerm, train
from slsgu_cli.engine.gradient_pass import COSINE, GradientPass, arithmetic
from slsgu_cli.engine.gradients import load_graded
from slsgu_cli.records.comparison import ClipOutcome, ClipPlan, Method
from slsgu_cli.records.figures import Figures
from slsgu_cli.records.method import GradientHeader, GradientPointer, Precision
from slsgu_cli.records.options import PassOptions
from slsgu_cli.records.sets import Split
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock

Array = npt.NDArray[np.floating]


def evaluations(
    times: PassTimes, pointer: GradientPointer, model: nn.Module
) -> tuple[Evaluation, Evaluation]:
    """Open the validation and the test rows of a set; the same if it has no split."""
    tokenize = tokenizer(resolve(pointer.model))
    opened = partial(
        prepare, times.store, times.manifest, model, tokenize=tokenize, device=times.device
    )
    validation = opened(split=Split.VALIDATION)
    return validation, opened(split=Split.TEST) if times.manifest.is_split else validation


@dataclass
class BaselineRunner:
    """The original model, loaded once with its data; every run of a baseline starts from it.

    `validation` selects epochs and settings, figures are of `test`. Both are the same if the
    set has no split.
    """

    pointer: GradientPointer
    plan: ClipPlan
    times: PassTimes
    model: nn.Module
    validation: Evaluation
    test: Evaluation
    original_weights: Weights

    @classmethod
    def open(cls, pointer: GradientPointer, plan: ClipPlan, times: PassTimes) -> "BaselineRunner":
        """Load the model of the set's gradients. Raises StaleError and InputError."""
        _, model = load_graded(pointer, times.device)
        evaluated = evaluations(times, pointer, model)
        return cls(pointer, plan, times, model, *evaluated, weights_of(model))

    def restore(self) -> None:
        """Restore the original weights."""
        self.model.load_state_dict(self.original_weights)

    def original(self) -> Figures:
        """Measure the original model."""
        self.restore()
        return figures_of(self.test)

    def run(self, method: Method, setting: float) -> ClipOutcome:
        """Run a trained baseline on the original model and measure the reported epoch."""
        spec = baseline(method)
        if not isinstance(spec, Trained):
            raise TypeError(f"{method} is not trained")
        self.restore()
        seconds = self._seconds_before(spec)
        name = spec.hyperparameter.name if spec.hyperparameter else "lr"
        hint = None if spec.hyperparameter else "a smaller --lr"
        label = f"{method} {name} {setting:g}"
        with arithmetic(Precision.FP32), counted_by(label, hint=hint):
            epochs = self.epochs(spec, setting)
            reported = follow(epochs, self.validation, label=label, total=self.plan.epochs)
            same = self.test is self.validation
            figures = reported.figures if same else figures_of(self.test)
        forget_passes, retain_passes = self._passes(spec, reported.epochs)
        after = f"after epoch {reported.epoch} of {reported.epochs}"
        progress.detail(f"{label}: FA@1 {figures.forget.top1:.1f} {after}")
        return ClipOutcome(
            method=method,
            setting=setting,
            plan=spec.plan(self.plan),
            epoch=reported.epoch,
            forget=figures.forget,
            utility=figures.utility,
            seconds=seconds + reported.seconds,
            forget_passes=forget_passes,
            retain_passes=retain_passes,
            where=self.times.where,
            chosen_by=reported.figures,
        )

    def epochs(self, spec: Trained, setting: float) -> Iterator[int]:
        """Train the model by a baseline at a setting; yield the number of each epoch."""
        if spec.epochs is not None:
            return spec.epochs(self, setting)
        terms = [self.term(role) for role in spec.losses]
        mask = spec.mask(self) if spec.mask else None
        return train(self.model, terms, rate=setting, plan=self.plan, mask=mask)

    def gradient(self, role: str, *, squares: bool = False) -> Mapping[str, Array]:
        """Return the stored gradient of a role, or the mean of its squares."""
        artifact = Artifact.SQUARES if squares else Artifact.GRADIENT
        return self.times.store.read_tensors(artifact.path(getattr(self.pointer, role)))

    def _passes(self, spec: Trained, epochs: int) -> tuple[float, float]:
        """Return the number of full passes over the forget and the retain rows of a run."""
        share = self.plan.retain_rows / self.times.manifest.retain.rows
        return (
            float(("forget" in spec.gradients) + epochs * ("forget" in spec.losses)),
            float(("retain" in spec.gradients) + epochs * share * ("retain" in spec.losses)),
        )

    def _seconds_before(self, spec: Trained) -> float:
        """Return the time of the gradients that a baseline needs before its first epoch."""
        pointer, squares = self.pointer, spec.squares
        paths = [Artifact.SQUARES.path(getattr(pointer, role)) for role in spec.gradients]
        if squares and not all(map(self.times.store.exists, paths)):
            progress.note(f"{spec.label} needs squared gradients: computing them")
            self.times.compute(pointer, squares=True)
        return self.times.seconds(pointer, spec.gradients, squares=squares, model=self.model)

    def block(self, role: str) -> DataBlock:
        """Return the rows of the set to forget or to retain."""
        return DataBlock.open(self.times.store, getattr(self.times.manifest, role))

    def term(self, role: str) -> LossTerm:
        """Return the loss of the forget set, which methods ascend, or of the retain set."""
        store, manifest = self.times.store, self.times.manifest
        options = PassOptions(batch_size=self.plan.batch_size, device=self.times.device)
        rows = manifest.forget.rows if role == "forget" else self.plan.retain_rows
        path = Artifact.GRADIENT.path(self.pointer.retain)
        retain = store.read_header(path, GradientHeader).loss
        kind, spec = COSINE if role == "forget" else retain, manifest.input
        loss = GradientPass(self.model, kind, spec=spec, options=options)
        block = self.block(role)
        images, tokens = block.images(0, rows), np.asarray(block.tokens[:rows])
        sign = -1 if role == "forget" else 1
        return LossTerm(images, tokens, loss, sign, shuffled=role == "retain")
