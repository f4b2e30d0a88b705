"""`verify`: run every check on every model, and record the findings one by one."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import SUFFIX, Edit, earlier_edits, load_edit
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import ResolvedModel, fingerprint, resolve
from slsgu_cli.engine.edited_model import add_edits
from slsgu_cli.engine.gradients import check_inputs
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.engine.set_edits import current_edit
from slsgu_cli.engine.text_structure import prompts_without
from slsgu_cli.errors import MissingError, NoImagesError
from slsgu_cli.figures.curves import relearning_plot
from slsgu_cli.records.codec import digest
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.verification import (
    KIND,
    Check,
    Finding,
    Settings,
    Verification,
    VerifiedModel,
    VerifyRequest,
)
from slsgu_cli.sources.prompts import read_names
from slsgu_cli.store.artifacts import Artifact, plot_path, read_manifest, resume
from slsgu_cli.store.store import Store
from slsgu_cli.verification.checks.description import unnamed_descriptions
from slsgu_cli.verification.checks.paraphrase import unused_templates
from slsgu_cli.verification.model import (
    ModelUnderTest,
    PartialResults,
    SkippedCheck,
    open_model,
)
from slsgu_cli.verification.registry import spec_of


@dataclass(frozen=True, slots=True)
class Verified:
    """The record, the verified models (the original first), and the files written."""

    record: Verification
    models: tuple[VerifiedModel, ...]
    reused: int
    files: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to verify: its record, the checkpoint, and the edits to apply.

    `edits` end with the edit to verify, after those it is based on.
    """

    record: VerifiedModel
    model: ResolvedModel
    edits: tuple[Edit, ...] = ()


def verify(store: Store, name: str, request: VerifyRequest = VerifyRequest()) -> Verified:
    """Run checks on the original model of set `name` and on the models compared with it.

    Findings on record are reused. Raises MissingError, InputError, and StaleError if an edit
    belongs to other weights.
    """
    manifest, path = read_manifest(store, name), Artifact.VERIFICATION.path(name)
    store.require_writable(path)
    settings = _read_settings(store, manifest, request)
    request = replace(request, settings=settings, device=pick_device(request.device))
    checks = sorted({Check.BASELINE, *request.checks}, key=list(Check).index)
    _require_packages(checks)
    fresh = Verification(
        name=name,
        concept=manifest.concept,
        data={role: ref.fingerprint for role, ref in sorted(manifest.blocks().items())},
        subjects=(),
        version=slsgu_cli.__version__,
    )
    record = resume(store, Artifact.VERIFICATION, name, fresh)
    sources = model_sources(store, manifest, request)
    run = _VerifyRun(store, manifest, record, request, sources)
    models = tuple(run.verified(source, checks).of_checks(checks) for source in sources)
    store.write_record(path, run.record)
    files = [store.where(path)]
    if any(spec_of(check).fills == "curves" for check in checks):
        plot = plot_path(name, "relearning")
        store.write_bytes(plot, relearning_plot(models, concept=manifest.concept))
        files.append(store.where(plot))
    return Verified(run.record, models, run.reused, tuple(files))


def _read_settings(store: Store, manifest: SetManifest, request: VerifyRequest) -> Settings:
    """Return the settings with the neutral prompts, and the content of files of the request."""
    settings = replace(request.settings, prompts=digest(prompts_without([manifest])))
    if not settings.templates:
        templates = unused_templates(store, manifest, request.templates)
        settings = replace(settings, templates=templates)
    if request.spellings is not None:
        names = read_names(request.spellings, "--spellings")
        spellings = tuple(f"{kind}{KIND}{text}" for kind, text in names)
        settings = replace(settings, spellings=spellings)
    if request.descriptions is not None:
        descriptions = unnamed_descriptions(request.descriptions, manifest.concept)
        settings = replace(settings, descriptions=descriptions)
    if request.look_alikes is not None:
        names = read_names(request.look_alikes, "--look-alikes")
        settings = replace(settings, look_alikes=tuple(name for _, name in names))
    return settings


def _require_packages(checks: Sequence[Check]) -> None:
    lacking = [check for check in checks if spec_of(check).needs_sklearn]
    if lacking and not find_spec("sklearn"):
        raise MissingError(
            f"scikit-learn is not installed, which these checks need: {', '.join(lacking)}",
            hint="pip install 'slsgu[verify]', or give --checks without them",
        )


def model_sources(store: Store, manifest: SetManifest, request: VerifyRequest) -> list[ModelSource]:
    """Return the original model, then the models to compare with it."""
    original = resolve(manifest.model)
    weights = fingerprint(original)
    record = VerifiedModel(weights, "original", original.spec, weights, None)
    sources = [ModelSource(record, original)]
    if request.model is not None:
        other = resolve(request.model)
        key = fingerprint(other)
        record = VerifiedModel(key, str(request.model), other.spec, key, None)
        sources.append(ModelSource(record, other))
    edits = {text: load_edit(store, text) for text in request.edits}
    if request.model is None and not edits:
        edits = {manifest.name: current_edit(store, manifest.name)}
    # The label of a file is its stem, if that is unique.
    stems = [Path(text).stem if text.endswith(SUFFIX) else text for text in edits]
    for (text, edit), stem in zip(edits.items(), stems, strict=True):
        identity = {
            "header": digest(edit.header),
            "delta": hashlib.sha256(edit.delta().tobytes()).hexdigest(),
            "factor": edit.factor,
        }
        key = digest({"model": weights, "edit": identity})
        label = f"edit {stem if stems.count(stem) == 1 else text}"
        record = VerifiedModel(key, label, original.spec, weights, edit.header)
        sources.append(ModelSource(record, original, (*earlier_edits(store, [edit]), edit)))
    return sources


def load_source(
    store: Store,
    manifest: SetManifest,
    source: ModelSource,
    request: VerifyRequest,
    original: Callable[[], ModelUnderTest] | None,
) -> ModelUnderTest:
    """Load a model and compute its features; `original` is None for the original model."""
    check_inputs(manifest, source.model)
    module = load(source.model, request.device, warn=progress.warn)
    add_edits(module, source.edits)
    settings, device = request.settings, request.device
    with counted_by(source.record.label):
        return open_model(
            store,
            manifest,
            module,
            source.model,
            settings=settings,
            device=device,
            original=original,
        )


@dataclass
class _VerifyRun:
    """One verification: the record so far, and how many findings were reused."""

    store: Store
    manifest: SetManifest
    record: Verification
    request: VerifyRequest
    sources: list[ModelSource]
    reused: int = 0

    @torch.no_grad()
    def verified(self, source: ModelSource, checks: Sequence[Check]) -> VerifiedModel:
        """Return a model with the findings of checks; run those that are not on record."""
        verified = replace(source.record, findings=self.record.findings_of(source.record.key))
        recorded = {finding.key for finding in verified.findings}
        keys = {check: self._key(source, check) for check in checks}
        missing = {check: key for check, key in keys.items() if key not in recorded}
        self.reused += len(checks) - len(missing)
        self.record = self.record.with_model(verified)
        if not missing:
            return verified
        if source is self.sources[0]:
            model = self.original
        else:
            model = load_source(
                self.store, self.manifest, source, self.request, original=lambda: self.original
            )
        for check, key in missing.items():
            finding = self._run(model, check, key, f"{verified.label}: {check}")
            verified = verified.with_finding(finding)
            self._write(replace(self.record.with_model(verified), under_way=None))
        return verified

    @cached_property
    def original(self) -> ModelUnderTest:
        """The original model, loaded once for all models that are compared with it."""
        return load_source(self.store, self.manifest, self.sources[0], self.request, original=None)

    def _run(self, model: ModelUnderTest, check: Check, key: str, label: str) -> Finding:
        """Run a check, from the results that an interrupted run recorded."""
        spec, settings = spec_of(check), self.request.settings
        finding, known = Finding(check, key, _used(check, settings)), self.record.under_way

        def filled(value: Any) -> Finding:
            results: dict[str, Any] = {spec.fills: value}
            return replace(finding, **results)

        def save(results: Sequence[Any]) -> None:
            self._write(replace(self.record, under_way=filled(tuple(results))))

        results = getattr(known, spec.fills) if known is not None and known.key == key else ()
        model.results = PartialResults(list(results), save)
        model.saved_state = lambda name: SavedSums(self.store, digest([key, name]), model.device)
        with progress.bar(label, None), counted_by(label):
            try:
                value = spec.run(model, settings)
            except SkippedCheck as reason:
                return replace(finding, skipped=str(reason))
            except NoImagesError:
                return replace(finding, skipped="it needs images, and the set is made from words")
        return filled(tuple(value) if isinstance(value, list) else value)

    def _write(self, record: Verification) -> None:
        self.record = record
        self.store.write_record(Artifact.VERIFICATION.path(record.name), record)

    def _key(self, source: ModelSource, check: Check) -> str:
        """Return a digest of everything that a finding depends on."""
        return digest(
            {
                "revision": spec_of(check).revision,
                "subject": source.record.key,
                "original": self.sources[0].record.key,
                "concept": self.record.concept,
                "data": self.record.data,
                "check": check,
                "settings": _used(check, self.request.settings),
            }
        )


def _used(check: Check, settings: Settings) -> dict[str, str]:
    """Return the settings that change the result of a check, as text."""
    values = {name: getattr(settings, name) for name in sorted(spec_of(check).settings)}
    return {
        name: " | ".join(value) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }
