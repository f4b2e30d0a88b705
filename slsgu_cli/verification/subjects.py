"""The models to verify: the original, the original with edits, or another checkpoint."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import SUFFIX, Edit, earlier_edits, load_edit
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import ResolvedModel, fingerprint, resolve
from slsgu_cli.clip.tokenizers import token_words, tokenizer
from slsgu_cli.engine.gradients import check_inputs
from slsgu_cli.engine.moved_model import add_edits
from slsgu_cli.engine.set_edits import current_edit
from slsgu_cli.records.codec import digest
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.verification import VerifiedModel, VerifyRequest
from slsgu_cli.store.store import Store
from slsgu_cli.verification.model import ModelUnderTest, open_model

ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model to verify: its record, the checkpoint, and the edits to apply.

    `edits` end with the edit to verify, after those it is based on.
    """

    record: VerifiedModel
    model: ResolvedModel
    edits: tuple[Edit, ...] = ()


def model_sources(store: Store, manifest: SetManifest, request: VerifyRequest) -> list[ModelSource]:
    """Return the original model, then the models to compare with it."""
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
    """Return a label for each edit: of a file its stem, if that is unique."""
    stems = {text: Path(text).stem if text.endswith(SUFFIX) else text for text in texts}
    shared = {stem for stem, count in Counter(stems.values()).items() if count > 1}
    return {text: f"edit {text if stem in shared else stem}" for text, stem in stems.items()}


def _identity(edit: Edit) -> dict[str, Any]:
    """Return what identifies an edit: its header and its change."""
    added = hashlib.sha256(edit.delta().tobytes()).hexdigest()
    return {"header": digest(edit.header), "delta": added, "factor": edit.factor}


def load_source(
    store: Store, manifest: SetManifest, source: ModelSource, request: VerifyRequest
) -> ModelUnderTest:
    """Load a model and compute its features."""
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
