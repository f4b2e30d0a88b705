"""Evidence of a removal in one folder: a page, the same as JSON, the report, digests, edits."""

import json
import platform
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

import slsgu_cli as slsgu
from slsgu_cli import Artifact, FoundEdit, Presence, Standing
from slsgu_cli.errors import InputError, MissingError, SlsguError, UsageError
from slsgu_cli.records.codec import by_name, digest, document
from slsgu_cli.records.figures import STRUCTURE, Share
from slsgu_cli.records.ledger import Ledger, LedgerRow, RequestState, StageKind, StageRecord
from slsgu_cli.records.options import ReportRequest, StrengthOptions
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.verification import CHECKS, Check, VerifiedModel
from slsgu_cli.removals.job import Job
from slsgu_cli.removals.recipe import EvidenceRequest
from slsgu_cli.removals.stage import file_sha256, files_of
from slsgu_cli.text import near

PAGE, FIGURES, REPORT = "evidence.html", "evidence.json", "report.html"
EDITS, SHEETS, SUMS = "edits", "sheets", ".sha256"
# Files that `evidence` writes and may replace.
OURS = re.compile(
    rf"({PAGE}|{FIGURES}|{REPORT}|[^/]+\{SUMS}|{SHEETS}/[^/]+\.png|{EDITS}/[^/]+\.safetensors)"
)
PACKAGES = ("torch", "open_clip_torch", "numpy")


@dataclass(frozen=True, slots=True)
class FileDigest:
    """The SHA-256 of a file in the original model and in the written one."""

    name: str
    before: str | None
    after: str | None


@dataclass(frozen=True, slots=True)
class WrittenModel:
    """A written model. `troubles` name unreadable files and changes since the run."""

    label: str
    place: str
    origin: str
    files: tuple[FileDigest, ...]
    names: tuple[str, ...]
    edits: tuple[FoundEdit, ...]
    troubles: tuple[str, ...]

    def presence(self, name: str) -> Presence | None:
        """Return whether an edit is in every copy of its layer; None if it was not checked."""
        presences = {edit.presence for edit in self.edits if edit.name == name}
        return max(presences, key=list(Presence).index, default=None)


def written_models(job: Job) -> list[WrittenModel]:
    """Return the checkpoint and the copies of targets that the runs of a recipe wrote."""
    models: list[WrittenModel] = []
    for record in job.ledger.stages:
        if record.output and record.kind in (StageKind.CHECKPOINT, StageKind.TARGET):
            label = Path(record.place or "").resolve().name
            if label in [each.label for each in models]:
                label = f"{label}-{len(models) + 1}"
            models.append(_written(job, label, record))
    return models


def _written(job: Job, label: str, record: StageRecord) -> WrittenModel:
    place, origin = Path(record.place or ""), record.origin or str(job.ledger.model)
    troubles = []
    before: dict[str, str] = {}
    after: dict[str, str] = {}
    edits: list[FoundEdit] = []
    try:
        resolved = None if record.origin else slsgu.resolve(job.ledger.model)
        before = _digests(resolved.folder or resolved.weights if resolved else Path(origin))
    except (SlsguError, OSError) as error:
        troubles.append(f"Cannot read the original {origin}: {error}.")
    try:
        after = _digests(place)
        if record.output != digest(after):
            troubles.append(f"The files of {place} have changed since the run wrote them.")
        if record.names:
            edits = slsgu.find_edits(job.store, record.names, place, StrengthOptions())
    except (SlsguError, OSError) as error:
        troubles.append(f"Cannot check {place}: {error}.")
    return WrittenModel(
        label,
        str(place),
        origin,
        tuple(FileDigest(n, before.get(n), after.get(n)) for n in sorted({*before, *after})),
        record.names,
        tuple(edits),
        tuple(troubles),
    )


def _digests(place: Path) -> dict[str, str]:
    if not place.exists():
        raise MissingError(f"there is no {place}")
    return {name: file_sha256(path) for name, path in files_of(place).items()}


def write_evidence(job: Job, request: EvidenceRequest) -> dict[str, Any]:
    """Write the evidence of the requests, and return the content of its JSON file.

    Raises UsageError, MissingError and InputError.
    """
    from jinja2 import Environment

    _require_place(request)
    rows = _rows(job, request)
    store, names = job.store, [row.name for row in rows]
    models = written_models(job)
    written = [slsgu.written_fingerprint(job.ledger.model, Path(model.place)) for model in models]
    pairs: dict[str, list[VerifiedModel]] = {}
    for name in names:
        record, edit = (_usable(job, kind, name) for kind in (Artifact.VERIFICATION, Artifact.EDIT))
        # The original and a written model, or else the model with the edit alone.
        if record and (pair := slsgu.verified_pair(record, edit, [*filter(None, written)])):
            pairs[name] = pair
    versions = {name: version(name) for name in PACKAGES}
    content: dict[str, Any] = document(
        {
            "slsgu": slsgu.__version__,
            "versions": {"python": platform.python_version(), **versions},
            "model": str(job.ledger.model),
            "requests": [_content(job, row, models, pairs.get(row.name, [])) for row in rows],
            "models": models,
            "checks": [line for model in models for line in _checks(request, model)],
            "commands": [*_commands(job, request, pairs)],
        }
    )
    with slsgu.replacing(request.out) as folder:
        (folder / EDITS).mkdir(parents=True)
        (folder / SHEETS).mkdir()
        for name in names:
            if sheet := slsgu.inspect_set(store, name).sheet:
                (folder / SHEETS / f"{name}.png").write_bytes(store.read_bytes(sheet))
        for name in sorted({*names, *(name for model in models for name in model.names)}):
            edit = store.read_bytes(Artifact.EDIT.path(name))
            (folder / EDITS / f"{name}.safetensors").write_bytes(edit)
        for model in models:
            sums = "".join(f"{file.after}  {file.name}\n" for file in model.files if file.after)
            (folder / f"{model.label}{SUMS}").write_text(sums)
        slsgu.write_report(store, ReportRequest(names=names, out=folder / REPORT, examples=False))
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / FIGURES).write_text(f"{text}\n", encoding="utf-8")
        template = files("slsgu_cli.removals").joinpath(PAGE).read_text("utf-8")
        environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
        page = environment.from_string(template).render(content)
        (folder / PAGE).write_text(page, encoding="utf-8")
    return content


def _require_place(request: EvidenceRequest) -> None:
    out = request.out
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is not a folder", hint="--out names a folder")
    present = [path for path in out.rglob("*") if not path.is_dir()]
    if present and not request.overwrite:
        raise InputError(f"{out} exists already", hint="another --out, or --overwrite")
    others = [name for p in present if not OURS.fullmatch(name := str(p.relative_to(out)))]
    if others:
        raise InputError(f"{out} contains {others[0]}, which would be lost", hint="another --out")


def _rows(job: Job, request: EvidenceRequest) -> list[LedgerRow]:
    """Return the ledger's rows of the requests. Raises UsageError, MissingError."""
    rows = {row.name: row for row in job.ledger.rows}
    names = list(dict.fromkeys(request.names))
    if names == ["all"]:
        names = [name for name, row in rows.items() if row.state is not RequestState.WITHDRAWN]
    run = f"slsgu run {request.recipe}"
    if not rows or not names:
        raise MissingError(f"{job.store.url} has no requests of {job.recipe.name}", hint=run)
    if unknown := [name for name in names if name not in rows]:
        raise UsageError(
            f"the recipe {job.recipe.name} never had a request {unknown[0]}",
            hint=near(unknown[0], rows) or f"its requests: {', '.join(rows)}",
        )
    if unmeasured := [name for name in names if not (rows[name].before and rows[name].after)]:
        raise MissingError(f"{unmeasured[0]} has not been measured yet", hint=run)
    return [rows[name] for name in names]


def _usable(job: Job, kind: Artifact, name: str) -> Any:
    """Return a record of the store; None if it is missing, stale or damaged."""
    record = job.catalog.get(kind, name)
    if record is None or job.catalog.standing(kind, name, record)[0] is not Standing.OK:
        return None
    return record


def _content(
    job: Job, row: LedgerRow, models: Sequence[WrittenModel], pair: Sequence[VerifiedModel]
) -> dict[str, Any]:
    """Return what the evidence says about a request."""
    manifest = job.store.read_record(Artifact.SET.path(row.name), SetManifest)
    edit = job.store.read_bytes(Artifact.EDIT.path(row.name))
    presences = {model.presence(row.name) for model in models} - {None}
    return {
        "request": row.name,
        "concept": row.concept,
        "id": row.id,
        "received": row.received,
        "reference": row.reference,
        "note": row.note,
        "state": row.state,
        "events": row.events,
        "captions with": manifest.patterns,
        "captions without": manifest.exclusions,
        "rows": by_name(manifest.blocks()),
        "layer": row.layer,
        "edit sha256": sha256(edit).hexdigest(),
        "edit in model": ", ".join(sorted(str(presence) for presence in presences)) or None,
        "figures": [*_figures(row, job.ledger)],
        "neutral prompts": _structure(job.ledger),
        "bounds": row.checks,
        "verification": _verification(row, pair) if pair else None,
    }


def _figures(row: LedgerRow, ledger: Ledger) -> Iterator[dict[str, Any]]:
    """Yield FA, and TA by evaluation set, of the written model with exact 95% intervals."""
    accuracies = [("FA", "", row.before, row.after)]
    if ledger.original and ledger.written:
        for name, accuracy in sorted(ledger.original.utility.items()):
            accuracies.append(("TA", name, accuracy, ledger.written.utility[name]))
    for kind, name, before, after in accuracies:
        if before is None or after is None:
            continue
        for k, field in ((1, "top1"), (5, "top5")):
            value = getattr(after, field)
            low, high = Share.of(value, after.rows).interval
            yield {
                "figure": f"{kind}@{k} {name}".strip(),
                "before": getattr(before, field),
                "after": value,
                "images": after.rows,
                "test": after.is_test,
                "from": round(low, 4),
                "to": round(high, 4),
            }


def _structure(ledger: Ledger) -> dict[str, float]:
    """Return how much of the structure of text embeddings remains in the written model."""
    figures = ledger.written.figures if ledger.written else {}
    return {name: figures[name] for name in STRUCTURE if name in figures}


def _verification(row: LedgerRow, pair: Sequence[VerifiedModel]) -> dict[str, Any]:
    """Return what verification found, in figures and in words, and which checks did not run."""
    original, other = pair
    ran = {finding.check for finding in other.findings if not finding.skipped}
    neutral = other.finding(Check.NEUTRAL_PROMPTS)
    return {
        "model": other.label,
        "edit alone": other.edit is not None,
        "checks": [each for each in slsgu.verdict_rows(original, other) if not each.detail],
        "look-alikes": slsgu.group_losses(original, other),
        "neutral prompts": by_name(neutral.structure or {}) if neutral else [],
        "conclusion": slsgu.conclusion(row.concept, original, other).sentences,
        "not run": [check for check in CHECKS if check not in ran],
    }


def _checks(request: EvidenceRequest, model: WrittenModel) -> Iterator[str]:
    """Yield the two commands that check a model: for its edits, and for its files' digests."""
    words = ["slsgu", "check", model.place]
    for name in model.names:
        words += ["--edit", f"{request.out / EDITS / name}.safetensors"]
    yield shlex.join(words)
    sums = shlex.quote(str(request.out / f"{model.label}{SUMS}"))
    place = Path(model.place)
    folder = place.parent if place.is_file() else place
    yield f"(cd {shlex.quote(str(folder))} && sha256sum -c -) < {sums}"


def _commands(
    job: Job, request: EvidenceRequest, pairs: dict[str, list[VerifiedModel]]
) -> Iterator[str]:
    """Yield the commands that repeat the removal."""
    yield f"export SLSGU_STORE={shlex.quote(job.store.url)}"
    yield f"slsgu run {shlex.quote(str(request.recipe))}"
    for name, (_, verified) in pairs.items():
        model = f" {verified.model.flags()}" if verified.edit is None else ""
        yield f"slsgu verify {shlex.quote(name)}{model}"
