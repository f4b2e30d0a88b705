"""What `slsgu compare --target` does: every method on one pipeline, recorded as it ends.

All are judged by the same prompts and seeds, which our search has not seen. A method that
is recorded for the same data and plan is not run again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from pathlib import Path

import slsgu_cli
from slsgu_cli.baselines.passes import ROLES, PassTimes
from slsgu_cli.erasing.records import TRAINED, Method, Outcome, PipelineComparison, Plan
from slsgu_cli.erasing.sheet import LABELS, sheet
from slsgu_cli.erasing.steered import steered_edit
from slsgu_cli.erasing.studio import Studio
from slsgu_cli.generation.gallery import Gallery
from slsgu_cli.generation.loading import folder_fingerprint, require_family
from slsgu_cli.generation.painting import Painter
from slsgu_cli.generation.records import Budget
from slsgu_cli.layout import read_manifest, read_pointer, target_comparison_path
from slsgu_cli.metrics import frechet_distance
from slsgu_cli.recorded import recorded
from slsgu_cli.records import Effect, GradientPointer, ModelSpec, SetManifest, digest
from slsgu_cli.store import Store

# Our search paints with the seeds from 0: these are others.
SEED = 1000
PAPER_RATES = (1e-5,)


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareOptions:
    """Which methods to run on which pipeline and how; the judge is the set's CLIP by default."""

    target: Path
    methods: Sequence[Method] = tuple(Method)
    rates: Sequence[float] = PAPER_RATES
    iterations: int = 1000
    budget: Budget = field(default_factory=lambda: Budget(seed=SEED))
    judge: ModelSpec | None = None
    device: str = "auto"


def compare(store: Store, name: str, *, options: CompareOptions) -> PipelineComparison:
    """Run every method on the pipeline and measure it; write the contact sheet.

    Raises MissingError, InputError, StaleError and UsageError.
    """
    run = _Run.open(store, name, options)
    ours = Method.OURS in options.methods
    if ours:
        steered_edit(store, run.pointer, options.target)
    rows = [run.original()]
    for method in (method for method in TRAINED if method in options.methods):
        rows += [run.trained(method, run.plan(rate)) for rate in options.rates]
    if ours:
        rows.append(run.ours())
    pictures = {row: run.pictures(row) for row in rows}
    store.write_bytes(
        sheet_path(name, options.target), sheet(run.gallery, pictures, options.target)
    )
    return replace(run.record, outcomes=tuple(rows))


def sheet_path(name: str, target: Path) -> str:
    """Return where the contact sheet of a comparison lies."""
    return f"{_folder(name, target)}/sheet.png"


def _folder(name: str, target: Path) -> str:
    return target_comparison_path(name, target).removesuffix(".json")


@dataclass
class _Run:
    """The record of one concept; the pipeline is loaded for what is missing in it."""

    store: Store
    manifest: SetManifest
    pointer: GradientPointer
    options: CompareOptions
    gallery: Gallery
    record: PipelineComparison
    times: PassTimes

    @classmethod
    def open(cls, store: Store, name: str, options: CompareOptions) -> "_Run":
        manifest = read_manifest(store, name)
        pointer = read_pointer(store, manifest)
        require_family(options.target, answers=False)
        judge = options.judge or pointer.model
        gallery = Gallery.of_set(store, manifest, judge, options.budget, device=options.device)
        record = PipelineComparison(
            name=name,
            concept=gallery.name,
            target=str(options.target),
            target_fingerprint=folder_fingerprint(options.target),
            forget=pointer.forget,
            forget_data=pointer.forget_data,
            retain_data=pointer.retain_data,
            evals={known: ref.fingerprint for known, ref in sorted(manifest.evals.items())},
            judge=str(judge),
            budget=options.budget,
            outcomes=(),
            version=slsgu_cli.__version__,
        )
        times = PassTimes(store, manifest, options.device)
        run = cls(store, manifest, pointer, options, gallery, record, times)
        run._read()
        return run

    @cached_property
    def studio(self) -> Studio:
        """The loaded pipeline."""
        painter = Painter.load(self.options.target, device=self.options.device)
        return Studio(self.store, self.manifest, painter, self.gallery)

    def plan(self, rate: float) -> Plan:
        """Return how a trained method runs at a learning rate."""
        steps, seed = self.options.budget.paint.steps, self.options.budget.seed
        return Plan(iterations=self.options.iterations, rate=rate, steps=steps, seed=seed)

    def original(self) -> Outcome:
        """Return the row of the pipeline as it is."""
        return self._known(Method.ORIGINAL) or self._measured(Method.ORIGINAL)

    def trained(self, method: Method, plan: Plan) -> Outcome:
        """Return the row of a trained method, run or recorded."""
        known = self._known(method, plan=plan)
        if known is not None:
            return known
        with self.studio.trained(method, plan) as seconds:
            return self._measured(method, plan=plan, seconds=seconds)

    def ours(self) -> Outcome:
        """Return the row of the edit that was steered on the pipeline."""
        edit, seconds = steered_edit(self.store, self.pointer, self.options.target)
        made = digest(edit.header)
        known = self._known(Method.OURS, edit=made)
        if known is not None:
            return known
        seconds += self.times.seconds(self.pointer, ROLES, squares=False)
        with self.studio.edited(edit):
            return self._measured(Method.OURS, edit=made, seconds=seconds)

    def _measured(
        self, method: Method, *, plan: Plan | None = None, edit: str | None = None,
        seconds: float = 0.0) -> Outcome:  # fmt: skip
        """Paint by the pipeline as it is now, judge, and record the row and its pictures."""
        images = self.studio.painted(LABELS[method])
        split = len(self.gallery.own)
        own, rest = images[:split], images[split:]
        gallery = self.gallery
        effect = Effect(
            gallery.recognised(gallery.own, own), gallery.recognised(gallery.rest, rest)
        )
        original = rest if method is Method.ORIGINAL else self.pictures(self.original())[split:]
        features = gallery.judge.features
        outcome = Outcome(
            method=method,
            plan=plan,
            edit=edit,
            effect=effect,
            distance=frechet_distance(features(original), features(rest)),
            seconds=seconds,
            where=None if method is Method.ORIGINAL else self.times.where,
        )
        for place, image in enumerate(images):
            self.store.write_bytes(self._file(outcome, place), image)
        self._add(outcome)
        return outcome

    def pictures(self, outcome: Outcome) -> list[bytes]:
        """Return a row's pictures as they were kept, the concept's first."""
        count = len(self.gallery.own) + len(self.gallery.rest)
        return [self.store.read_bytes(self._file(outcome, place)) for place in range(count)]

    def _file(self, outcome: Outcome, place: int) -> str:
        folder = _folder(self.manifest.name, self.options.target)
        return f"{folder}/{outcome.label.replace(' ', '-')}/{place:04}.png"

    def _known(
        self, method: Method, *, plan: Plan | None = None, edit: str | None = None
    ) -> Outcome | None:
        for outcome in self.record.outcomes:
            if (outcome.method, outcome.plan, outcome.edit) == (method, plan, edit):
                return outcome
        return None

    def _add(self, outcome: Outcome) -> None:
        """Record a row; another of the same label gave its pictures their place before."""
        others = [known for known in self.record.outcomes if known.label != outcome.label]
        self.record = replace(self.record, outcomes=(*others, outcome))
        path = target_comparison_path(self.manifest.name, self.options.target)
        self.store.write_record(path, self.record)

    def _read(self) -> None:
        """Take up the record in the store, if it was made from the same things."""
        path = target_comparison_path(self.manifest.name, self.options.target)
        unusable = "recorded outcomes cannot be used and are made again"
        found = recorded(self.store, path, PipelineComparison, unusable=unusable)
        made_from = attrgetter(
            "target_fingerprint", "forget", "forget_data", "retain_data", "evals", "judge", "budget"
        )
        if found and made_from(found) == made_from(self.record):
            self.record = found
