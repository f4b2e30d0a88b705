"""`verify`: run every check on every model, and record the findings one by one."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.towers import text_tower
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.errors import MissingError
from slsgu_cli.figures.curves import relearning_plot
from slsgu_cli.records.codec import digest
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.verification import (
    CHECKS,
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
from slsgu_cli.verification.checks.paraphrase import unused_templates
from slsgu_cli.verification.model import Gallery, ModelUnderTest, SkippedCheck
from slsgu_cli.verification.registry import spec_of
from slsgu_cli.verification.resumable import PartialResults
from slsgu_cli.verification.subjects import ModelSource, load_source, model_sources

INSTALL = "pip install 'slsgu[verify]'"


@dataclass(frozen=True, slots=True)
class Verified:
    """The record, the verified models (the original first), and the files written."""

    record: Verification
    models: tuple[VerifiedModel, ...]
    reused: int
    files: tuple[str, ...]


def verify(store: Store, name: str, request: VerifyRequest = VerifyRequest()) -> Verified:
    """Run checks on the original model of set `name` and on the models compared with it.

    Findings on record are reused. Raises MissingError, InputError, and StaleError if an edit
    belongs to other weights.
    """
    manifest = read_manifest(store, name)
    store.require_writable(Artifact.VERIFICATION.path(name))
    settings = request.settings
    if not settings.templates:
        templates = unused_templates(store, name, request.templates)
        settings = replace(settings, templates=templates)
    if request.spellings is not None:
        names = tuple(f"{kind}{KIND}{text}" for kind, text in read_names(request.spellings))
        settings = replace(settings, spellings=names)
    request = replace(request, settings=settings, device=pick_device(request.device))
    checks = sorted({Check.BASELINE, *request.checks}, key=list(Check).index)
    _require_packages(checks)
    sources = model_sources(store, manifest, request)
    run = _VerifyRun(store, manifest, _record(store, manifest), request, sources[0])
    models = tuple(run.verified(source, checks).of_checks(checks) for source in sources)
    store.write_record(Artifact.VERIFICATION.path(name), run.record)
    files = [store.where(Artifact.VERIFICATION.path(name))]
    if any(spec_of(check).fills == "curves" for check in checks):
        path = plot_path(name, "relearning")
        store.write_bytes(path, relearning_plot(models, concept=manifest.concept))
        files.append(store.where(path))
    return Verified(run.record, models, run.reused, tuple(files))


def _require_packages(checks: Sequence[Check]) -> None:
    """Raise MissingError if checks require a package that is not installed."""
    required = {check: spec_of(check).requires for check in checks}
    lacking = [check for check, package in required.items() if package and not find_spec(package)]
    if lacking:
        verb = "need" if len(lacking) > 1 else "needs"
        others = [check for check in checks if check in CHECKS and check not in lacking]
        raise MissingError(
            f"{' and '.join(lacking)} {verb} scikit-learn, which is not installed",
            hint=f"{INSTALL}, or skip them: --checks {','.join(others or CHECKS[:1])}",
        )


@dataclass(slots=True)
class _VerifyRun:
    """One verification: the record so far, and how many findings were reused."""

    store: Store
    manifest: SetManifest
    record: Verification
    request: VerifyRequest
    original: ModelSource
    reused: int = 0
    # The original's image features, computed for the first check that needs them.
    gallery: Gallery | None = None

    def verified(self, source: ModelSource, checks: Sequence[Check]) -> VerifiedModel:
        """Return a model with the findings of checks; run those that are not on record."""
        model = replace(source.record, findings=self.record.findings_of(source.record.key))
        keys = {check: self._key(model, check) for check in checks}
        recorded_keys = {finding.key for finding in model.findings}
        missing = {check: key for check, key in keys.items() if key not in recorded_keys}
        self.reused += len(keys) - len(missing)
        self.record = self.record.with_model(model)
        return self._run(source, model, missing) if missing else model

    @torch.no_grad()
    def _run(
        self, source: ModelSource, verified: VerifiedModel, keys: dict[Check, str]
    ) -> VerifiedModel:
        """Load a model, run checks on it, and record each finding."""
        model = load_source(self.store, self.manifest, source, self.request)
        model.original = lambda: self._original_gallery(model)
        if not model.is_original:
            model.original_text = lambda: text_tower(load(self.original.model, model.device))
        for check, key in keys.items():
            label = f"{verified.label}: {check}"
            model.results = self._results(check, key)
            model.saved_state = lambda name, key=key: SavedSums(
                self.store, digest([key, name]), model.device
            )
            with progress.bar(label, None) as model.ticker, counted_by(label):
                finding = _run_check(model, check, key, self.request.settings)
            verified = verified.with_finding(finding)
            self.record = replace(self.record.with_model(verified), under_way=None)
            self.store.write_record(Artifact.VERIFICATION.path(self.record.name), self.record)
        return verified

    def _results(self, check: Check, key: str) -> PartialResults:
        """Return the partial results of an interrupted check, which saves further ones."""
        part = spec_of(check).fills
        known, path = self.record.under_way, Artifact.VERIFICATION.path(self.record.name)

        def save(results: Sequence[Any]) -> None:
            parts: dict[str, Any] = {part: tuple(results)}
            finding = Finding(check, key, _used(check, self.request.settings), **parts)
            self.record = replace(self.record, under_way=finding)
            self.store.write_record(path, self.record)

        results = getattr(known, part) if known is not None and known.key == key else ()
        if results:
            progress.note(f"{check} resumes after {len(results)} of its results")
        return PartialResults(list(results), save)

    def _original_gallery(self, model: ModelUnderTest) -> Gallery:
        """Return the original's image features; load the original once if `model` is another."""
        if self.gallery is None:
            if not model.is_original:
                model = load_source(self.store, self.manifest, self.original, self.request)
            self.gallery = model.gallery()
        return self.gallery

    def _key(self, model: VerifiedModel, check: Check) -> str:
        """Return a digest of everything that a finding depends on."""
        made_from: dict[str, Any] = {
            "revision": spec_of(check).revision,
            "subject": model.key,
            "concept": self.record.concept,
            "data": self.record.data,
            "check": check,
            "settings": _used(check, self.request.settings),
        }
        if spec_of(check).needs_original:
            made_from["original"] = self.original.record.key
        return digest(made_from)


def _used(check: Check, settings: Settings) -> dict[str, str]:
    """Return the settings that change the result of a check, as text."""
    values = {name: getattr(settings, name) for name in sorted(spec_of(check).settings)}
    return {
        name: " | ".join(value) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }


def _record(store: Store, manifest: SetManifest) -> Verification:
    """Return the record of the set, with the findings that are still valid."""
    fresh = Verification(
        name=manifest.name,
        concept=manifest.concept,
        data={role: ref.fingerprint for role, ref in sorted(manifest.blocks().items())},
        subjects=(),
        version=slsgu_cli.__version__,
    )
    return resume(store, Artifact.VERIFICATION, manifest.name, fresh)


def _run_check(model: ModelUnderTest, check: Check, key: str, settings: Settings) -> Finding:
    spec, used = spec_of(check), _used(check, settings)
    try:
        value = spec.run(model, settings)
    except SkippedCheck as reason:
        return Finding(check, key, used, skipped=str(reason))
    fields: dict[str, Any] = {spec.fills: tuple(value) if isinstance(value, list) else value}
    return Finding(check, key, used, **fields)
