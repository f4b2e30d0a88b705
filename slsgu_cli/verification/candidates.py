"""Which models are verified: the original, and an edit of it or another checkpoint."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slsgu_cli import progress
from slsgu_cli.edits import SUFFIX, Edit, load_edit
from slsgu_cli.gradients import check_inputs
from slsgu_cli.models import ResolvedModel, fingerprint, load, resolve, tokenizer
from slsgu_cli.pipeline import current_edit
from slsgu_cli.records import ModelSpec, SetManifest, digest
from slsgu_cli.store import Store
from slsgu_cli.verification.bench import Bench, add_edit, open_bench
from slsgu_cli.verification.records import Settings, Subject

ORIGINAL = "original"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model to verify, with what it takes to load it."""

    subject: Subject
    model: ResolvedModel
    edit: Edit | None


def candidates_of(
    store: Store, manifest: SetManifest, model: ModelSpec | None, edits: Sequence[str]
) -> list[Candidate]:
    """Return the original model, then those it is compared with."""
    original = resolve(manifest.model)
    own = fingerprint(original)

    def of(label: str, of_model: ResolvedModel, marks: str, edit: Edit | None) -> Candidate:
        key = marks if edit is None else digest({"model": marks, "edit": _identity(edit)})
        header = None if edit is None else edit.header
        return Candidate(Subject(key, label, of_model.spec, marks, header), of_model, edit)

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


def open_candidate(
    store: Store, manifest: SetManifest, candidate: Candidate, settings: Settings, *, device: str
) -> Bench:
    """Load a candidate and measure its features as it is."""
    check_inputs(manifest, candidate.model)
    module = load(candidate.model, device, warn=progress.warn)
    if candidate.edit is not None:
        add_edit(module, candidate.edit)
    bench = open_bench(
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
