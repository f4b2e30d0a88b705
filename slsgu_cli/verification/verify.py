"""`verify`: every check on every model, recorded one by one."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import SUFFIX, Edit, load_edit
from slsgu_cli.clip.models import ResolvedModel, fingerprint, load, pick_device, resolve, tokenizer
from slsgu_cli.figures.curves import relearning_plot
from slsgu_cli.method.edit import current_edit
from slsgu_cli.method.gradients import check_inputs
from slsgu_cli.records.codec import digest
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.records.studies import (
    Check,
    Finding,
    ProbeFigures,
    Settings,
    Verification,
    VerifiedModel,
)
from slsgu_cli.store.artifacts import Artifact, plot_path, read_manifest, resume
from slsgu_cli.store.store import Store
from slsgu_cli.verification.membership import membership
from slsgu_cli.verification.model import ModelUnderTest, add_edit, open_model
from slsgu_cli.verification.probes import augment, neighbours, paraphrase, quantise
from slsgu_cli.verification.relearn import finetune, relearn

ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class TestedModel:
    """A model to verify, with what it takes to load it."""

    subject: VerifiedModel
    model: ResolvedModel
    edit: Edit | None


def tested_models(
    store: Store, manifest: SetManifest, model: ModelSpec | None, edits: Sequence[str]
) -> list[TestedModel]:
    """Return the original model, then those it is compared with."""
    original = resolve(manifest.model)
    own = fingerprint(original)

    def of(label: str, of_model: ResolvedModel, marks: str, edit: Edit | None) -> TestedModel:
        key = marks if edit is None else digest({"model": marks, "edit": _identity(edit)})
        header = None if edit is None else edit.header
        return TestedModel(VerifiedModel(key, label, of_model.spec, marks, header), of_model, edit)

    found = [of(ORIGINAL, original, own, None)]
    if model is not None:
        other = resolve(model)
        found.append(of(str(model), other, fingerprint(other), None))
    loaded = {text: load_edit(store, text) for text in edits}
    if model is None and not edits:
        loaded = {manifest.name: current_edit(store, manifest.name)}
    labels = _labels(list(loaded))
    return found + [of(labels[text], original, own, edit) for text, edit in loaded.items()]


def _labels(texts: Sequence[str]) -> dict[str, str]:
    """Return what each edit is called: a file by its stem, where no other has the same."""
    stems = {text: Path(text).stem if text.endswith(SUFFIX) else text for text in texts}
    shared = {stem for stem, count in Counter(stems.values()).items() if count > 1}
    return {text: f"edit {text if stem in shared else stem}" for text, stem in stems.items()}


def _identity(edit: Edit) -> dict[str, Any]:
    """Return what tells an edit from every other one: its header and what it adds."""
    added = hashlib.sha256(edit.delta().tobytes()).hexdigest()
    return {"header": digest(edit.header), "delta": added, "factor": edit.factor}


def open_tested(
    store: Store, manifest: SetManifest, candidate: TestedModel, settings: Settings, *, device: str
) -> ModelUnderTest:
    """Load a candidate and measure its features as it is."""
    check_inputs(manifest, candidate.model)
    module = load(candidate.model, device, warn=progress.warn)
    if candidate.edit is not None:
        add_edit(module, candidate.edit)
    bench = open_model(
        store,
        manifest,
        module,
        tokenize=tokenizer(candidate.model),
        device=device,
        rows=settings.rows,
        seed=settings.seed,
        is_original=candidate.subject.label == ORIGINAL,
    )
    bench.evaluation.base_pass((), cache_bytes=0)
    return bench


# Part of every key: a change in what a check measures must change it.
REVISION = 1
_SAMPLE = ("rows", "seed")
_TRAINING = ("steps", "learning_rate", "batch_size", *_SAMPLE)

# Which settings change what a check finds.
USES: dict[Check, tuple[str, ...]] = {
    Check.BASELINE: _SAMPLE,
    Check.PARAPHRASE: ("templates", "aliases", *_SAMPLE),
    Check.AUGMENT: ("seed",),
    Check.QUANTISE: _SAMPLE,
    Check.FINETUNE: _TRAINING,
    Check.RELEARN: ("shots", *_TRAINING),
    Check.NEIGHBOURS: (),
    Check.MEMBERSHIP: _SAMPLE,
}


@dataclass(frozen=True, slots=True)
class Verified:
    """The record, the models that were asked for in it, the original first, and the files."""

    record: Verification
    subjects: tuple[VerifiedModel, ...]
    reused: int
    files: tuple[str, ...]


def verify(
    store: Store,
    name: str,
    *,
    checks: Sequence[Check],
    settings: Settings,
    model: ModelSpec | None,
    edits: Sequence[str],
    device: str,
) -> Verified:
    """Run `checks` on the original of set `name` and on a model, some edits, or its own edit.

    Raises MissingError, InputError, and StaleError where an edit belongs to other weights.
    """
    manifest = read_manifest(store, name)
    device = pick_device(device)
    candidates = tested_models(store, manifest, model, edits)
    run = _VerifyRun(store, manifest, _recorded(store, manifest), settings, device)
    wanted = sorted({Check.BASELINE, *checks}, key=list(Check).index)
    shown = tuple(_only(run.checked(candidate, wanted), wanted) for candidate in candidates)
    store.write_record(Artifact.VERIFICATION.path(name), run.record)
    files = [store.where(Artifact.VERIFICATION.path(name))]
    if {Check.FINETUNE, Check.RELEARN} & set(wanted):
        path = plot_path(name, "relearning")
        store.write_bytes(path, relearning_plot(shown, concept=manifest.concept))
        files.append(store.where(path))
    return Verified(run.record, shown, run.reused, tuple(files))


@dataclass(slots=True)
class _VerifyRun:
    """The state of one verification: what is recorded so far, and how much of it was there."""

    store: Store
    manifest: SetManifest
    record: Verification
    settings: Settings
    device: str
    reused: int = 0

    def checked(self, candidate: TestedModel, wanted: Sequence[Check]) -> VerifiedModel:
        """Return a candidate with what the wanted checks found, running those not on record."""
        known = self.record.subject(candidate.subject.key)
        subject = replace(candidate.subject, findings=known.findings if known else ())
        keys = {check: _key(subject, self.record, check, self.settings) for check in wanted}
        there = {finding.key for finding in subject.findings}
        missing = {check: key for check, key in keys.items() if key not in there}
        self.reused += len(keys) - len(missing)
        self.record = _with(self.record, subject)
        return self._run(candidate, subject, missing) if missing else subject

    @torch.no_grad()
    def _run(
        self, candidate: TestedModel, subject: VerifiedModel, missing: dict[Check, str]
    ) -> VerifiedModel:
        """Load a candidate and run checks on it, recording each as it is done."""
        bench = open_tested(self.store, self.manifest, candidate, self.settings, device=self.device)
        for check, key in missing.items():
            with progress.bar(f"{subject.label}: {check}", None) as bench.ticker:
                finding = _found(bench, check, key, self.settings)
            subject = _with_finding(subject, finding)
            self.record = _with(self.record, subject)
            self.store.write_record(Artifact.VERIFICATION.path(self.record.name), self.record)
        return subject


def _key(subject: VerifiedModel, record: Verification, check: Check, settings: Settings) -> str:
    made_from = {
        "revision": REVISION,
        "subject": subject.key,
        "concept": record.concept,
        "data": record.data,
        "check": check,
        "settings": _used(check, settings),
    }
    return digest(made_from)


def _used(check: Check, settings: Settings) -> dict[str, str]:
    """Return the settings that a check depends on, as text."""
    values = asdict(settings)
    shown = {name: values[name] for name in sorted(USES[check])}
    return {
        name: " | ".join(value) if isinstance(value, tuple) else str(value)
        for name, value in shown.items()
    }


def _recorded(store: Store, manifest: SetManifest) -> Verification:
    """Return the record of the set as it is built now, with what was found on it before."""
    fresh = Verification(
        name=manifest.name,
        concept=manifest.concept,
        data={role: ref.fingerprint for role, ref in sorted(manifest.blocks().items())},
        subjects=(),
        version=slsgu_cli.__version__,
    )
    return resume(store, Artifact.VERIFICATION, manifest.name, fresh)


def _baseline(bench: ModelUnderTest, _settings: Settings) -> list[ProbeFigures]:
    groups = bench.evaluation.utility.items()
    utility = {name: group.base_accuracy() for name, group in groups}
    return [ProbeFigures("as it is", bench.evaluation.forget.base_accuracy(), utility)]


def _found(bench: ModelUnderTest, check: Check, key: str, settings: Settings) -> Finding:
    """Run one check."""
    part, run = CHECKS[check]
    value = run(bench, settings)
    parts: dict[str, Any] = {part: tuple(value) if isinstance(value, list) else value}
    return Finding(check, key, _used(check, settings), **parts)


# What each check fills of a finding, and what runs it.
CHECKS: dict[Check, tuple[str, Callable[[ModelUnderTest, Settings], Any]]] = {
    Check.BASELINE: ("probes", _baseline),
    Check.PARAPHRASE: ("probes", paraphrase),
    Check.AUGMENT: ("probes", augment),
    Check.QUANTISE: ("probes", quantise),
    Check.FINETUNE: ("curves", finetune),
    Check.RELEARN: ("curves", relearn),
    Check.NEIGHBOURS: ("became", neighbours),
    Check.MEMBERSHIP: ("attacks", membership),
}


def _with_finding(subject: VerifiedModel, finding: Finding) -> VerifiedModel:
    """Return the subject with a finding in the place of the check's last one."""
    kept = [found for found in subject.findings if found.check is not finding.check]
    order = list(Check)
    findings = sorted([*kept, finding], key=lambda found: order.index(found.check))
    return replace(subject, findings=tuple(findings))


def _with(record: Verification, subject: VerifiedModel) -> Verification:
    """Return the record with a subject in the place of the one of its key."""
    keys = [known.key for known in record.subjects]
    if subject.key not in keys:
        return replace(record, subjects=(*record.subjects, subject))
    place = keys.index(subject.key)
    subjects = (*record.subjects[:place], subject, *record.subjects[place + 1 :])
    return replace(record, subjects=subjects)


def _only(subject: VerifiedModel, wanted: Sequence[Check]) -> VerifiedModel:
    kept = tuple(finding for finding in subject.findings if finding.check in wanted)
    return replace(subject, findings=kept)
