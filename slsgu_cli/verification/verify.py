"""`verify`: every check on every model, recorded one by one."""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
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
from slsgu_cli.clip.tokenizers import token_words, tokenizer
from slsgu_cli.clip.towers import text_tower
from slsgu_cli.engine.gradients import check_inputs
from slsgu_cli.engine.moved_model import add_edits
from slsgu_cli.engine.resumable import KeptArrays
from slsgu_cli.engine.set_edits import current_edit
from slsgu_cli.figures.curves import relearning_plot
from slsgu_cli.records.codec import digest
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.verification import (
    KIND,
    Check,
    Finding,
    ProbeFigures,
    Settings,
    Verification,
    VerifiedModel,
    VerifyRequest,
)
from slsgu_cli.sets.prompt_files import read_names
from slsgu_cli.store.artifacts import Artifact, plot_path, read_manifest, resume
from slsgu_cli.store.store import Store
from slsgu_cli.verification.attacks import inversion, prefix, ring_a_bell
from slsgu_cli.verification.image_probes import augment, probe, retrieval
from slsgu_cli.verification.model import Gallery, LeftOut, ModelUnderTest, Parts, open_model
from slsgu_cli.verification.probes import (
    nearest,
    neighbours,
    paraphrase,
    quantise,
    spelling,
    unseen_templates,
)
from slsgu_cli.verification.training import finetune, membership, relearn

ORIGINAL = "original"

# Part of every key: a change in what a check measures must change it.
REVISION = 1
REVISIONS = {Check.QUANTISE: 2, Check.PREFIX: 2}
_SAMPLE = ("rows", "seed")
_TRAINING = ("steps", "learning_rate", "batch_size", *_SAMPLE)

# Which settings change what a check finds.
USES: dict[Check, tuple[str, ...]] = {
    Check.BASELINE: _SAMPLE,
    Check.PARAPHRASE: ("templates", *_SAMPLE),
    Check.SPELLING: ("spellings", "aliases", "seed"),
    Check.AUGMENT: ("seed",),
    Check.QUANTISE: _SAMPLE,
    Check.FINETUNE: _TRAINING,
    Check.RELEARN: ("shots", *_TRAINING),
    Check.NEIGHBOURS: (),
    Check.NEAREST: (),
    Check.PROBE: ("seed",),
    Check.RETRIEVAL: (),
    Check.MEMBERSHIP: _SAMPLE,
    Check.PREFIX: ("attack_tokens", "attack_steps", "attack_starts", "seed"),
    Check.RING_A_BELL: ("population", "generations", "seed"),
    Check.INVERSION: ("shots", "inversion_steps", "seed"),
}


@dataclass(frozen=True, slots=True)
class Verified:
    """The record, the models of the request in it, the original first, and the files."""

    record: Verification
    models: tuple[VerifiedModel, ...]
    reused: int
    files: tuple[str, ...]


def verify(store: Store, name: str, request: VerifyRequest = VerifyRequest()) -> Verified:
    """Run checks on the original model of set `name` and on those it is compared with.

    Raises MissingError, InputError, and StaleError where an edit belongs to other weights.
    """
    manifest = read_manifest(store, name)
    store.require_writable(Artifact.VERIFICATION.path(name))
    settings = request.settings
    if not settings.templates:
        templates = unseen_templates(store, name, request.templates)
        settings = replace(settings, templates=templates)
    if request.spellings is not None:
        names = tuple(f"{kind}{KIND}{text}" for kind, text in read_names(request.spellings))
        settings = replace(settings, spellings=names)
    request = replace(request, settings=settings, device=pick_device(request.device))
    sources = model_sources(store, manifest, request)
    run = _VerifyRun(store, manifest, _record(store, manifest), request, sources[0])
    checks = sorted({Check.BASELINE, *request.checks}, key=list(Check).index)
    models = tuple(run.verified(source, checks).of_checks(checks) for source in sources)
    store.write_record(Artifact.VERIFICATION.path(name), run.record)
    files = [store.where(Artifact.VERIFICATION.path(name))]
    if {Check.FINETUNE, Check.RELEARN} & set(checks):
        path = plot_path(name, "relearning")
        store.write_bytes(path, relearning_plot(models, concept=manifest.concept))
        files.append(store.where(path))
    return Verified(run.record, models, run.reused, tuple(files))


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to verify as the record names it, what it is loaded from, and what goes into it.

    `edits` are the one to verify and those that it stands on.
    """

    record: VerifiedModel
    model: ResolvedModel
    edits: tuple[Edit, ...] = ()


def model_sources(store: Store, manifest: SetManifest, request: VerifyRequest) -> list[ModelSource]:
    """Return the original model, then those it is compared with."""
    original = resolve(manifest.model)
    weights = fingerprint(original)
    sources = [_source(ORIGINAL, original, weights)]
    if request.model is not None:
        other = resolve(request.model)
        sources.append(_source(str(request.model), other, fingerprint(other)))
    edits = {text: load_edit(store, text) for text in request.edits}
    if request.model is None and not request.edits:
        edits = {manifest.name: current_edit(store, manifest.name)}
    labels = _labels(list(edits))
    return sources + [
        _source(labels[text], original, weights, edit, earlier_edits(store, [edit]))
        for text, edit in edits.items()
    ]


def _source(
    label: str,
    model: ResolvedModel,
    weights: str,
    edit: Edit | None = None,
    earlier: Sequence[Edit] = (),
) -> ModelSource:
    key = weights if edit is None else digest({"model": weights, "edit": _identity(edit)})
    header = None if edit is None else edit.header
    edits = () if edit is None else (*earlier, edit)
    return ModelSource(VerifiedModel(key, label, model.spec, weights, header), model, edits)


def _labels(texts: Sequence[str]) -> dict[str, str]:
    """Return what each edit is called: a file by its stem, where no other has the same."""
    stems = {text: Path(text).stem if text.endswith(SUFFIX) else text for text in texts}
    shared = {stem for stem, count in Counter(stems.values()).items() if count > 1}
    return {text: f"edit {text if stem in shared else stem}" for text, stem in stems.items()}


def _identity(edit: Edit) -> dict[str, Any]:
    """Return what tells an edit from every other one: its header and what it adds."""
    added = hashlib.sha256(edit.delta().tobytes()).hexdigest()
    return {"header": digest(edit.header), "delta": added, "factor": edit.factor}


def load_source(
    store: Store, manifest: SetManifest, source: ModelSource, request: VerifyRequest
) -> ModelUnderTest:
    """Load a model and measure its features as it is."""
    check_inputs(manifest, source.model)
    module = load(source.model, request.device, warn=progress.warn)
    add_edits(module, source.edits)
    model = open_model(
        store,
        manifest,
        module,
        tokenize=tokenizer(source.model),
        settings=request.settings,
        device=request.device,
        is_original=source.record.label == ORIGINAL,
        words=partial(token_words, source.model),
    )
    with counted_by(source.record.label):
        model.evaluation.base_pass((), cache_bytes=0)
    return model


@dataclass(slots=True)
class _VerifyRun:
    """The state of one verification: what is recorded so far, and how much of it was there."""

    store: Store
    manifest: SetManifest
    record: Verification
    request: VerifyRequest
    original: ModelSource
    reused: int = 0
    # The original's image features, once a check has asked for them.
    gallery: Gallery | None = None

    def verified(self, source: ModelSource, checks: Sequence[Check]) -> VerifiedModel:
        """Return a model with the findings of some checks, running those not on record."""
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
        """Load a model and run checks on it, recording each as it is done."""
        model = load_source(self.store, self.manifest, source, self.request)
        model.original = lambda: self._original_gallery(model)
        if not model.is_original:
            model.original_text = lambda: text_tower(load(self.original.model, model.device))
        for check, key in keys.items():
            label = f"{verified.label}: {check}"
            model.parts = self._parts(check, key)
            model.keeper = partial(self._keeper, key, model.device)
            with progress.bar(label, None) as model.ticker, counted_by(label):
                finding = _run_check(model, check, key, self.request.settings)
            verified = verified.with_finding(finding)
            self.record = replace(self.record.with_model(verified), under_way=None)
            self.store.write_record(Artifact.VERIFICATION.path(self.record.name), self.record)
        return verified

    def _parts(self, check: Check, key: str) -> Parts:
        """Return what an earlier run found of a check that it did not end, and how to keep more."""
        part, _ = CHECKS[check]
        known, path = self.record.under_way, Artifact.VERIFICATION.path(self.record.name)

        def keep(found: Sequence[Any]) -> None:
            parts: dict[str, Any] = {part: tuple(found)}
            finding = Finding(check, key, _used(check, self.request.settings), **parts)
            self.record = replace(self.record, under_way=finding)
            self.store.write_record(path, self.record)

        found = getattr(known, part) if known is not None and known.key == key else ()
        if found:
            progress.note(f"{check} goes on after {len(found)} of its parts")
        return Parts(list(found), keep)

    def _keeper(self, key: str, device: str, what: str) -> KeptArrays:
        """Return where the state of a training is kept that the check of that key does."""
        return KeptArrays(self.store, digest([key, what]), device)

    def _original_gallery(self, model: ModelUnderTest) -> Gallery:
        """Return the original's image features: of `model` if it is that, else loaded once."""
        if self.gallery is None:
            if not model.is_original:
                model = load_source(self.store, self.manifest, self.original, self.request)
            self.gallery = model.gallery()
        return self.gallery

    def _key(self, model: VerifiedModel, check: Check) -> str:
        """Return a digest of everything that a finding is made from."""
        made_from: dict[str, Any] = {
            "revision": REVISIONS.get(check, REVISION),
            "subject": model.key,
            "concept": self.record.concept,
            "data": self.record.data,
            "check": check,
            "settings": _used(check, self.request.settings),
        }
        if check in (Check.RETRIEVAL, Check.RING_A_BELL):
            made_from["original"] = self.original.record.key
        return digest(made_from)


def _used(check: Check, settings: Settings) -> dict[str, str]:
    """Return the settings that a check depends on, as text."""
    values = {name: getattr(settings, name) for name in sorted(USES[check])}
    return {
        name: " | ".join(value) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
    }


def _record(store: Store, manifest: SetManifest) -> Verification:
    """Return the record of the set as it is built now, with what was found on it before."""
    fresh = Verification(
        name=manifest.name,
        concept=manifest.concept,
        data={role: ref.fingerprint for role, ref in sorted(manifest.blocks().items())},
        subjects=(),
        version=slsgu_cli.__version__,
    )
    return resume(store, Artifact.VERIFICATION, manifest.name, fresh)


def _baseline(model: ModelUnderTest, _settings: Settings) -> list[ProbeFigures]:
    groups = model.evaluation.utility.items()
    utility = {name: group.base_accuracy() for name, group in groups}
    return [ProbeFigures("as it is", model.evaluation.forget.base_accuracy(), utility)]


# What each check fills of a finding, and what runs it.
CHECKS: dict[Check, tuple[str, Callable[[ModelUnderTest, Settings], Any]]] = {
    Check.BASELINE: ("probes", _baseline),
    Check.PARAPHRASE: ("probes", paraphrase),
    Check.SPELLING: ("probes", spelling),
    Check.AUGMENT: ("probes", augment),
    Check.QUANTISE: ("probes", quantise),
    Check.FINETUNE: ("curves", finetune),
    Check.RELEARN: ("curves", relearn),
    Check.NEIGHBOURS: ("became", neighbours),
    Check.NEAREST: ("classes", nearest),
    Check.PROBE: ("told", probe),
    Check.RETRIEVAL: ("retrieval", retrieval),
    Check.MEMBERSHIP: ("attacks", membership),
    Check.PREFIX: ("attempts", prefix),
    Check.RING_A_BELL: ("attempts", ring_a_bell),
    Check.INVERSION: ("attempts", inversion),
}


def _run_check(model: ModelUnderTest, check: Check, key: str, settings: Settings) -> Finding:
    part, run = CHECKS[check]
    try:
        value = run(model, settings)
    except LeftOut as reason:
        return Finding(check, key, _used(check, settings), left_out=str(reason))
    parts: dict[str, Any] = {part: tuple(value) if isinstance(value, list) else value}
    return Finding(check, key, _used(check, settings), **parts)
