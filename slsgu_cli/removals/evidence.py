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
from slsgu_cli import Artifact, Catalog, Standing, Store
from slsgu_cli.errors import InputError, MissingError, UsageError, near
from slsgu_cli.records.codec import by_name, document
from slsgu_cli.records.figures import Accuracy, Share
from slsgu_cli.records.ledger import Ledger, LedgerRow, RequestState, StageKind
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.options import ReportRequest
from slsgu_cli.records.sets import LOCAL, ModelSpec, SetManifest
from slsgu_cli.records.verification import CHECKS, VerifiedModel
from slsgu_cli.removals.reading import read_recipe
from slsgu_cli.removals.recipe import EvidenceRequest, Recipe
from slsgu_cli.removals.written import WrittenModel, written_model

ALL = "all"
PAGE, FIGURES, REPORT = "evidence.html", "evidence.json", "report.html"
EDITS, SHEETS, SUMS = "edits", "sheets", ".sha256"
# The files that an earlier evidence may have written to its folder.
OURS = re.compile(
    rf"({PAGE}|{FIGURES}|{REPORT}|[^/]+\{SUMS}|{SHEETS}/[^/]+\.png|{EDITS}/[^/]+\.safetensors)"
)
PACKAGES = ("torch", "open_clip_torch", "numpy")


@dataclass(frozen=True, slots=True)
class WrittenEvidence:
    """Evidence that was written: its folder, and the content of its JSON file."""

    out: str
    content: dict[str, Any]

    @property
    def troubles(self) -> list[str]:
        """What could not be read, or differs from what was written."""
        return [trouble for model in self.content["models"] for trouble in model["troubles"]]


@dataclass(frozen=True, slots=True)
class _Request:
    """What the store has of one request. Stale or damaged records count as missing."""

    name: str
    manifest: SetManifest
    row: LedgerRow | None
    edit: EditHeader | None
    edit_sha256: str | None
    pair: Sequence[VerifiedModel]
    sheet: str | None

    @property
    def is_measured(self) -> bool:
        """Whether the written model was measured, not only the edit."""
        return self.row is not None and self.row.before is not None and self.row.after is not None


def write_evidence(
    store: Store, request: EvidenceRequest, recipe: Recipe | None = None
) -> WrittenEvidence:
    """Write the evidence of the requests. Raises UsageError, MissingError, InputError."""
    _require_place(request)
    if recipe is None and request.recipe is not None:
        recipe = read_recipe(request.recipe)
    catalog = Catalog(store)
    ledger = _ledger(catalog, request, recipe)
    names = _names(catalog, request, ledger)
    manifests = [store.read_record(Artifact.SET.path(name), SetManifest) for name in names]
    original = ledger.model if ledger else manifests[0].model
    models = _models(store, request, ledger, names=names, original=original)
    prints = [key for each in models if (key := slsgu.written_fingerprint(original, each.place))]
    requests = [_request(catalog, manifest, ledger, prints) for manifest in manifests]
    edits = sorted({*names, *(name for model in models for name in model.sharing(names))})
    content: dict[str, Any] = document(
        {
            "slsgu": slsgu.__version__,
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in PACKAGES},
            },
            "model": str(original),
            "requests": [_content(each, ledger, models) for each in requests],
            "models": [
                {
                    "label": model.label,
                    "place": str(model.place),
                    "origin": model.origin,
                    "files": model.files,
                    "edits": model.edits,
                    "troubles": model.troubles,
                }
                for model in models
            ],
            "checks": [line for model in models for line in _checks(request, model, names)],
            "commands": [*_commands(store, request, ledger, requests)],
        }
    )
    with slsgu.replacing(request.out) as folder:
        (folder / EDITS).mkdir(parents=True)
        (folder / SHEETS).mkdir()
        for each in requests:
            if each.sheet:
                (folder / SHEETS / f"{each.name}.png").write_bytes(store.read_bytes(each.sheet))
        for name in edits:
            if store.exists(path := Artifact.EDIT.path(name)):
                (folder / EDITS / f"{name}.safetensors").write_bytes(store.read_bytes(path))
        for model in models:
            sums = "".join(f"{file.after}  {file.name}\n" for file in model.files if file.after)
            (folder / f"{model.label}{SUMS}").write_text(sums)
        slsgu.write_report(store, ReportRequest(names=names, out=folder / REPORT, examples=False))
        text = json.dumps(content, indent=1, ensure_ascii=False)
        (folder / FIGURES).write_text(f"{text}\n", encoding="utf-8")
        (folder / PAGE).write_text(evidence_page(content), encoding="utf-8")
    return WrittenEvidence(str(request.out), content)


def evidence_page(content: dict[str, Any]) -> str:
    """Return the page that shows the content of the JSON file."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template = files("slsgu_cli.removals").joinpath(PAGE).read_text("utf-8")
    return environment.from_string(template).render(content)


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


def _ledger(catalog: Catalog, request: EvidenceRequest, recipe: Recipe | None) -> Ledger | None:
    """Return the ledger of the recipe, or else the only one with these requests, if any."""
    if recipe is not None:
        ledger: Ledger | None = catalog.get(Artifact.LEDGER, recipe.name)
        if ledger is None:
            raise MissingError(
                f"{catalog.store.url} has no ledger of {recipe.name}",
                hint=f"slsgu run {request.recipe or f'{recipe.name}.toml'}",
            )
        return ledger
    ledgers = [
        each
        for each in catalog.readable(Artifact.LEDGER).values()
        if list(request.names) == [ALL] or {row.name for row in each.rows} & {*request.names}
    ]
    if len(ledgers) > 1:
        names = ", ".join(each.name for each in ledgers)
        raise UsageError(f"several recipes have such requests: {names}", hint="--recipe FILE")
    return ledgers[0] if ledgers else None


def _names(catalog: Catalog, request: EvidenceRequest, ledger: Ledger | None) -> list[str]:
    """Return the names of the requests. Raises UsageError, and MissingError without any."""
    names = list(request.names)
    rows = ledger.rows if ledger else ()
    if names == [ALL]:
        names = [row.name for row in rows if row.state is not RequestState.WITHDRAWN]
        if ledger is None:
            edits = catalog.readable(Artifact.EDIT)
            names = [name for name, header in edits.items() if header.target is None]
        if not names:
            raise MissingError("there is no request in the store", hint="slsgu run RECIPE")
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{twice[0]} is named twice")
    known = [row.name for row in rows]
    if ledger and (unknown := [name for name in names if name not in known]):
        raise UsageError(
            f"the recipe {ledger.name} never had a request {unknown[0]}",
            hint=near(unknown[0], known) or f"its requests: {', '.join(known)}",
        )
    return names


def _models(
    store: Store,
    request: EvidenceRequest,
    ledger: Ledger | None,
    *,
    names: Sequence[str],
    original: ModelSpec,
) -> list[WrittenModel]:
    """Return the models of `--model`, or else those that the recipe's runs wrote."""
    places: list[tuple[Path, ModelSpec | Path, Sequence[str], str | None]] = [
        (Path(str(place).removeprefix(LOCAL)), original, names, None) for place in request.models
    ]
    if ledger and not places:
        places = [
            (
                Path(each.place),
                Path(each.origin) if each.origin else original,
                each.names,
                each.output,
            )
            for each in ledger.stages
            if each.place and each.output and each.kind in (StageKind.CHECKPOINT, StageKind.TARGET)
        ]
    models: list[WrittenModel] = []
    for place, origin, edits, output in places:
        label = place.resolve().name
        if label in [each.label for each in models]:
            label = f"{label}-{len(models) + 1}"
        models.append(written_model(store, label, place, origin=origin, names=edits, output=output))
    return models


def _request(
    catalog: Catalog, manifest: SetManifest, ledger: Ledger | None, prints: Sequence[str]
) -> _Request:
    name = manifest.name
    edit = _usable(catalog, Artifact.EDIT, name)
    verification = _usable(catalog, Artifact.VERIFICATION, name)
    path = Artifact.EDIT.path(name)
    is_usable = _usable(catalog, Artifact.SET, name) is not None
    return _Request(
        name,
        manifest,
        row=ledger.row(name) if ledger else None,
        edit=edit,
        edit_sha256=sha256(catalog.store.read_bytes(path)).hexdigest() if edit else None,
        pair=slsgu.verified_pair(verification, edit, prints) if verification else (),
        sheet=slsgu.inspect_set(catalog.store, name).sheet if is_usable else None,
    )


def _usable(catalog: Catalog, kind: Artifact, name: str) -> Any:
    """Return a record of the store; None if it is missing, stale or damaged."""
    record = catalog.get(kind, name)
    if record is None or catalog.standing(kind, name, record)[0] is not Standing.OK:
        return None
    return record


def _content(
    each: _Request, ledger: Ledger | None, models: Sequence[WrittenModel]
) -> dict[str, Any]:
    """Return what the evidence says about a request."""
    row, manifest = each.row, each.manifest
    presences = {model.presence(each.name) for model in models} - {None}
    return {
        "request": each.name,
        "concept": manifest.concept,
        "id": row and row.id,
        "received": row and row.received,
        "reference": row and row.reference,
        "note": row and row.note,
        "state": row and row.state,
        "events": row.events if row else (),
        "captions with": manifest.patterns,
        "captions without": manifest.exclusions,
        "rows": by_name(manifest.blocks()),
        "sheet": f"{SHEETS}/{each.name}.png" if each.sheet else None,
        "layer": each.edit and each.edit.layer,
        "edit": each.edit,
        "edit sha256": each.edit_sha256,
        "edit in model": ", ".join(sorted(str(presence) for presence in presences)) or None,
        "measured on": "the written model" if each.is_measured else "the edit",
        "figures": [*_figures(each, ledger)],
        "bounds": row.checks if row else (),
        "verification": _verification(each) if each.pair else None,
    }


def _figures(each: _Request, ledger: Ledger | None) -> Iterator[dict[str, Any]]:
    """Yield figures with exact 95% intervals: of the written model, or else of the edit."""
    for figure, before, after in _accuracies(each, ledger):
        for k, field in ((1, "top1"), (5, "top5")):
            value = getattr(after, field)
            low, high = Share.of(value, after.rows).interval
            kind, _, name = figure.partition(" ")
            yield {
                "figure": f"{kind}@{k} {name}".strip(),
                "before": getattr(before, field),
                "after": value,
                "images": after.rows,
                "test": after.unseen,
                "from": round(low, 4),
                "to": round(high, 4),
            }


def _accuracies(each: _Request, ledger: Ledger | None) -> Iterator[tuple[str, Accuracy, Accuracy]]:
    """Yield FA, and the TA of each evaluation set, with the accuracy before and after."""
    edit, row = each.edit, each.row
    forget = (edit.baseline_forget, edit.forget) if edit else (None, None)
    before, after = (edit.baseline_utility or {}, edit.utility or {}) if edit else ({}, {})
    if row and row.before and row.after:
        forget = (row.before, row.after)
        if ledger and ledger.original and ledger.written:
            before, after = ledger.original.utility, ledger.written.utility
    if forget[0] and forget[1]:
        yield "FA", forget[0], forget[1]
    for name in sorted(before.keys() & after.keys()):
        yield f"TA {name}", before[name], after[name]


def _verification(each: _Request) -> dict[str, Any]:
    """Return what verification found, in figures and in words, and which checks did not run."""
    original, other = each.pair
    ran = {finding.check for finding in other.findings if not finding.left_out}
    return {
        "model": other.label,
        "edit alone": other.edit is not None,
        "checks": [row for row in slsgu.verdict_rows(original, other) if not row.detail],
        "conclusion": slsgu.conclusion(each.manifest.concept, original, other).sentences,
        "not run": [check for check in CHECKS if check not in ran],
    }


def _checks(request: EvidenceRequest, model: WrittenModel, names: Sequence[str]) -> Iterator[str]:
    """Yield the two commands that check a model: for its edits, and for its files' digests."""
    words = ["slsgu", "check", str(model.place)]
    for name in model.sharing(names):
        words += ["--edit", f"{request.out / EDITS / name}.safetensors"]
    yield shlex.join(words)
    sums = shlex.quote(str(request.out / f"{model.label}{SUMS}"))
    yield f"(cd {shlex.quote(str(model.root))} && sha256sum -c -) < {sums}"


def _commands(
    store: Store, request: EvidenceRequest, ledger: Ledger | None, requests: Sequence[_Request]
) -> Iterator[str]:
    """Yield the commands that repeat the removal. Without a recipe, the report has them."""
    if ledger is None:
        return
    yield f"export SLSGU_STORE={shlex.quote(store.url)}"
    yield f"slsgu run {shlex.quote(str(request.recipe or f'{ledger.name}.toml'))}"
    for each in requests:
        for verified in each.pair[1:]:
            model = f" {verified.model.flags()}" if verified.edit is None else ""
            yield f"slsgu verify {shlex.quote(each.name)}{model}"
