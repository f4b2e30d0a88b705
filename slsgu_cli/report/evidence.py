"""`evidence`: a folder of what was removed, how well, what is left of it, and how to check that.

A page for people, the same as JSON, an in-toto statement about the files that were written,
their digests for `sha256sum`, contact sheets and edits.
"""

import json
import platform
import re
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from markupsafe import Markup

import slsgu_cli
from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.errors import InputError
from slsgu_cli.figures.numbers import count, percent
from slsgu_cli.records.codec import by_name, document
from slsgu_cli.records.recipe import EvidenceRequest, Recipe, RequestState
from slsgu_cli.report import edit_sections
from slsgu_cli.report.page import whole_page
from slsgu_cli.report.removals import (
    EDITS,
    SUMS,
    RemovalEvidence,
    RemovedRequest,
    content_of,
    done_for,
    figures_of,
    gather_removals,
    verified,
)
from slsgu_cli.report.result_sections import result
from slsgu_cli.report.sections import Cell, Column, Section, Table, codes, figures, fill, texts
from slsgu_cli.report.verification_sections import verification
from slsgu_cli.report.written import WrittenModel
from slsgu_cli.store.atomic import replacing, require_regular
from slsgu_cli.store.digests import file_sha256
from slsgu_cli.store.store import Store

PAGE, FIGURES = "evidence.html", "evidence.json"
STATEMENT, COMMANDS = "statement.json", "commands.sh"
SHEETS = "sheets"
# What an earlier evidence may have left in its folder.
OURS = re.compile(
    rf"({PAGE}|{FIGURES}|{STATEMENT}|{COMMANDS}|[^/]+\{SUMS}"
    rf"|{SHEETS}/[^/]+\.png|{EDITS}/[^/]+\.safetensors)"
)
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "urn:slsgu:removal:v1"
PACKAGES = ("torch", "open_clip_torch", "numpy")


@dataclass(frozen=True, slots=True)
class WrittenEvidence:
    """What was written: the folder, and what it says of each request."""

    out: str
    evidence: RemovalEvidence


def write_evidence(
    store: Store, request: EvidenceRequest, recipe: Recipe | None = None
) -> WrittenEvidence:
    """Write the evidence that `request` asks for. Raises UsageError, MissingError, InputError."""
    _require_place(request)
    evidence = gather_removals(store, request, recipe)
    with replacing(request.out) as partial:
        partial.mkdir()
        _fill(partial, evidence)
    return WrittenEvidence(str(request.out), evidence)


def _require_place(request: EvidenceRequest) -> None:
    out = request.out
    require_regular(out)
    if out.is_file():
        raise InputError(f"{out} is a file", hint="--out names a folder")
    present = [path for path in out.rglob("*") if not path.is_dir()] if out.is_dir() else []
    if present and not request.overwrite:
        raise InputError(f"{out} exists already", hint="another --out, or --overwrite")
    others = [name for p in present if not OURS.fullmatch(name := str(p.relative_to(out)))]
    if others:
        raise InputError(f"{out} holds {others[0]}, which would be lost", hint="another --out")


def _fill(folder: Path, evidence: RemovalEvidence) -> None:
    """Write every file of the evidence, the statement about them last."""
    for one in evidence.requests:
        if one.sheet is not None:
            _put(folder / SHEETS / f"{one.name}.png", one.sheet)
    for name, data in evidence.edits.items():
        _put(folder / EDITS / f"{name}.safetensors", data)
    for model in evidence.models:
        sums = "".join(f"{file.after}  {file.name}\n" for file in model.files if file.after)
        _put(folder / f"{model.label}{SUMS}", sums.encode())
    content = [content_of(one) for one in evidence.requests]
    _put(folder / FIGURES, _json({**_head(evidence), "requests": content}))
    _put(folder / COMMANDS, "".join(f"{line}\n" for line in evidence.commands).encode())
    _put(folder / PAGE, evidence_page(evidence).encode())
    _put(folder / STATEMENT, _json(_statement(folder, evidence)))


def _put(path: Path, data: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)


def _json(value: Any) -> bytes:
    return (json.dumps(document(value), indent=1, ensure_ascii=False) + "\n").encode()


def _head(evidence: RemovalEvidence) -> dict[str, Any]:
    """Return what all of the evidence is of."""
    return {
        "slsgu": slsgu_cli.__version__,
        "versions": by_name(_versions()),
        "model": str(evidence.model),
        "models": [
            {
                "place": str(m.place),
                "origin": m.origin,
                "files": m.files,
                "edits": m.edits,
                "troubles": m.troubles,
            }
            for m in evidence.models
        ],
        "commands": evidence.commands,
        "checks": evidence.checks,
    }


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def _statement(folder: Path, evidence: RemovalEvidence) -> dict[str, Any]:
    """Return the in-toto statement: its subjects are the files after, else the edits alone."""
    written = [(model, file) for model in evidence.models for file in model.files]
    subjects = [
        _descriptor(f"{model.label}/{file.name}", file.after)
        for model, file in written
        if file.after
    ]
    edits = [
        _descriptor(f"{EDITS}/{one.name}.safetensors", one.records.edit.sha256)
        for one in evidence.requests
        if one.records.edit.sha256
    ]
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        "_type": STATEMENT_TYPE,
        "subject": subjects or edits,
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "tool": {"name": "slsgu", "version": slsgu_cli.__version__},
            "materials": [
                _descriptor(file.name, file.before, uri=model.origin)
                for model, file in written
                if file.before
            ],
            "edits": edits,
            "requests": [done_for(one) for one in evidence.requests],
            "commands": evidence.commands,
            "evidence": [
                _descriptor(str(path.relative_to(folder)), file_sha256(path)) for path in files
            ],
        },
    }


def _descriptor(name: str, sha256: str, **more: str) -> dict[str, Any]:
    """Return what in-toto has of a file."""
    return {"name": name, **more, "digest": {"sha256": sha256}}


def evidence_page(evidence: RemovalEvidence) -> str:
    """Return the page: a summary, each request, then the files and how to check them."""
    names = ", ".join(one.records.concept for one in evidence.requests)
    articles = [(one.records.concept, _sections(one)) for one in evidence.requests]
    return whole_page(
        f"Removal evidence: {names}",
        kind="Removal evidence",
        heading=f"Removing {names}",
        summary=_summary(evidence),
        articles=[*articles, ("Files, and how to check them", _of_files(evidence))],
        origin="the records of its store, and from the files that it names",
    )


def _summary(evidence: RemovalEvidence) -> Markup:
    """Return in a few sentences and a table what was done, and what was not."""
    states = [one.row.state for one in evidence.requests if one.row]
    rows: list[tuple[Cell, ...]] = []
    for one in evidence.requests:
        row, edit = one.row, one.records.edit.record
        present = {model.holds(one.name) for model in evidence.models} - {None}
        recognised = [percent(each.top1) for each in one.forget] if one.forget else [None, None]
        cells = (
            one.records.concept,
            row.id if row else None,
            row.received if row else None,
            str(row.state) if row else None,
            known_as(edit.layer) if edit else None,
            *recognised,
            ", ".join(sorted(each for each in present if each)) or None,
            "run" if one.pair else "not run",
        )
        rows.append(cells)
    columns = [
        Column("request", "link"),
        Column("id", "whole"),
        Column("received", "whole"),
        *texts("state"),
        Column("layer", "whole"),
        *figures("recognised, original", "recognised now"),
        *texts("its edit in the model", "verification"),
    ]
    return fill(
        "evidence/summary.html",
        model=str(evidence.model),
        places=[str(model.place) for model in evidence.models],
        requests=len(evidence.requests),
        recorded=len(states),
        forgotten=sum(state is RequestState.FORGOTTEN for state in states),
        unverified=[one.name for one in evidence.requests if not one.pair],
        by_reference=evidence.by_reference,
        table=Table("Requested removals", columns, rows),
    )


def _sections(one: RemovedRequest) -> list[Section]:
    searched = edit_sections.request(one.records)
    sheet = Markup()
    if one.sheet:
        sheet = fill("evidence/sheet.html", name=one.name, sheet=one.sheet)
    parts = [
        Section("The request", _request(one)),
        replace(searched, title="What was searched", content=searched.content + sheet),
        replace(result(one.records), title="Figures of the edit"),
    ]
    if one.is_measured:
        parts.append(Section("Figures of the model that was written", _as_written(one)))
    tried = verification(one.records, [each.key for each in one.pair[1:]])
    return [
        *parts,
        replace(tried, title="What was tried to bring it back"),
        Section("What is left", _left(one)),
        edit_sections.the_edit(one.records),
    ]


def _request(one: RemovedRequest) -> Markup:
    row, manifest = one.row, one.records.manifest.record
    if row is None:
        return fill("evidence/request.html", terms=None)
    terms = [
        ("Request", "", one.name),
        ("Concept", "", row.concept if row.concept != row.name else None),
        ("Number", "", row.id),
        ("Received", "", row.received),
        ("Reference", "", row.reference),
        ("Note", "", row.note),
        ("Captions without", "code", manifest.exclusions if manifest else None),
        ("State", "", str(row.state)),
        ("What became of it", "", [f"{event.day}: {event.state}" for event in row.events]),
    ]
    return fill("evidence/request.html", terms=terms)


def _as_written(one: RemovedRequest) -> Markup:
    """Show figures of the model that was written, all requests in place, and the bounds."""
    rows = [
        (
            each["figure"],
            percent(each["before"]),
            percent(each["after"]),
            count(each["images"]),
            f"{each['from']:.1f} to {each['to']:.1f}%",
        )
        for each in figures_of(one)
    ]
    columns = [
        *texts("figure"),
        *figures("original", "written", "images", "95% interval, written"),
    ]
    bounds = [
        (
            check.bound,
            "not known" if check.figure is None else percent(check.figure),
            "holds" if check.holds else "is not met",
        )
        for check in (one.row.checks if one.row else ())
    ]
    of_bounds = [*texts("bound"), *figures("figure"), *texts("result")]
    return fill(
        "evidence/written_model.html",
        figures=Table("The model that was written, without all requests", columns, rows),
        bounds=Table("Bounds of the request", of_bounds, bounds) if bounds else None,
    )


def _left(one: RemovedRequest) -> Markup:
    """Say what still finds the concept, and what this evidence does not cover."""
    manifest = one.records.manifest.record
    return fill(
        "evidence/left.html",
        verification=verified(one) if one.pair else None,
        edit_alone=bool(one.pair) and one.is_measured and one.pair[1].edit is not None,
        run=one.records.verification.run,
        images=count(manifest.forget.rows) if manifest is not None else None,
    )


def _of_files(evidence: RemovalEvidence) -> list[Section]:
    checks = fill(
        "evidence/checks.html", commands=evidence.checks, by_reference=evidence.by_reference
    )
    versions = [(name, "", value) for name, value in _versions().items()]
    made_with = [("slsgu", "", slsgu_cli.__version__), *versions]
    return [
        Section("Check it", checks),
        *(_written(model, evidence) for model in evidence.models),
        Section("Repeat it", fill("evidence/repeat.html", commands=evidence.commands)),
        Section("Made with", fill("evidence/request.html", terms=made_with)),
    ]


def _written(model: WrittenModel, evidence: RemovalEvidence) -> Section:
    """Show the files of a model before and after, and which edits are in it."""
    rows = [
        (
            file.name,
            [file.before or "not there", file.after or "not there"],
            "unchanged" if file.before == file.after else "changed" if file.before else "new",
        )
        for file in model.files
    ]
    edits = ", ".join(
        f"{one.name}: {model.holds(one.name) or 'not looked for'}" for one in evidence.requests
    )
    content = fill(
        "evidence/files.html",
        terms=[
            ("Place", "code", str(model.place)),
            ("Made from", "code", model.origin),
            ("Edits", "", edits),
        ],
        troubles=model.troubles,
        table=Table(
            f"Files of {model.label}",
            [*codes("file", "SHA-256 before, and after"), *texts("")],
            rows,
        ),
    )
    return Section(f"Files: {model.label}", content)
