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

import slsgu_cli
from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.errors import InputError
from slsgu_cli.figures.html import (
    Child,
    Html,
    code,
    count,
    element,
    figure_of,
    image_html,
    joined,
    lines,
    numeric,
    paragraph,
    percent,
    table,
    terms,
)
from slsgu_cli.records.codec import by_name, document
from slsgu_cli.records.recipe import EvidenceRequest, Recipe, RequestState
from slsgu_cli.report import edit_sections, study_sections
from slsgu_cli.report.gather import Section, WrittenModel
from slsgu_cli.report.page import result, whole_page
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
    parts = [(one.records.concept, _sections(one)) for one in evidence.requests]
    return whole_page(
        f"Removal evidence: {names}",
        kind="Removal evidence",
        heading=f"Removing {names}",
        above=joined((_lead(evidence), _summary(evidence))),
        parts=[*parts, ("Files, and how to check them", _of_files(evidence))],
        origin="the records of its store, and from the files that it names",
    )


def _lead(evidence: RemovalEvidence) -> Html:
    """Return in a few sentences what was done, and what was not."""
    requests, places = evidence.requests, [str(model.place) for model in evidence.models]
    states = [one.row.state for one in requests if one.row]
    unverified = [one.name for one in requests if not one.pair]
    sentences = [
        f"From the model {evidence.model}, {len(requests)} "
        f"{'request asks' if len(requests) == 1 else 'requests ask'} for something to be removed. ",
        f"Written without it: {', '.join(places)}. "
        if places
        else "No model that was written without it is named here: what follows is of the edits. ",
    ]
    if states:
        met = sum(state is RequestState.FORGOTTEN for state in states)
        sentences.append(f"{met} of {len(states)} are forgotten within their bounds. ")
    sentences.append(
        f"Nobody tried to bring back {', '.join(unverified)}: no verification has been run. "
        if unverified
        else "What may bring it back was tried; section “What is left” says what did. "
    )
    if evidence.by_reference:
        sentences.append(
            "Names are confidential: each request is told by its reference, and captions, images "
            "and edits are not in this folder. "
        )
    return paragraph(*sentences, class_="lead")


def _summary(evidence: RemovalEvidence) -> Html:
    rows: list[tuple[Child, ...]] = []
    for number, one in enumerate(evidence.requests, start=1):
        row, edit = one.row, one.records.edit.record
        held = {model.holds(one.name) for model in evidence.models} - {None}
        recognised = [percent(each.top1) for each in one.forget] if one.forget else [None, None]
        cells = (
            element("a", one.records.concept, href=f"#n{number}"),
            _whole(row.id if row else None),
            _whole(row.received if row else None),
            str(row.state) if row else None,
            _whole(known_as(edit.layer) if edit else None),
            *recognised,
            ", ".join(sorted(each for each in held if each)) or None,
            "run" if one.pair else "not run",
        )
        rows.append(cells)
    figures = numeric("recognised, original", "recognised now")
    heads = (
        "request",
        "id",
        "received",
        "state",
        "layer",
        *figures,
        "its edit in the model",
        "verification",
    )
    return table(heads, rows, caption="What was asked to be removed")


def _whole(said: str | None) -> Html | None:
    return element("span", said, class_="whole") if said else None


def _sections(one: RemovedRequest) -> list[Section]:
    searched = edit_sections.request(one.records)
    sheet = None
    if one.sheet:
        images = image_html(one.sheet, alt=f"images taken for {one.name}", class_="sheet")
        order = "The first images that were taken for it, in the order of their draw"
        sheet = figure_of(images, order)
    parts = [
        Section("The request", _request(one)),
        replace(searched, title="What was searched", content=joined((searched.content, sheet))),
        replace(result(one.records), title="Figures of the edit"),
    ]
    if one.is_measured:
        parts.append(Section("Figures of the model that was written", _as_written(one)))
    tried = study_sections.verification(one.records, [each.key for each in one.pair[1:]])
    return [
        *parts,
        replace(tried, title="What was tried to bring it back"),
        Section("What is left", _left(one)),
        edit_sections.the_edit(one.records),
    ]


def _request(one: RemovedRequest) -> Html:
    row, manifest = one.row, one.records.manifest.record
    if row is None:
        return paragraph("No request is recorded: this was made without a recipe.")
    excluded = manifest.exclusions if manifest else []
    return terms(
        {
            "Request": one.name,
            "Concept": row.concept if row.concept != row.name else None,
            "Number": row.id,
            "Received": row.received,
            "Reference": row.reference,
            "Note": row.note,
            "Captions without": lines([code(text) for text in excluded]),
            "State": str(row.state),
            "What became of it": lines([f"{event.day}: {event.state}" for event in row.events]),
        }
    )


def _as_written(one: RemovedRequest) -> Html:
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
    heads = ("figure", *numeric("original", "written", "images", "95% interval, written"))
    parts: list[Child] = [
        table(heads, rows, caption="The model that was written, without all requests"),
        paragraph("On images that nothing was chosen by, where the set has any.", class_="quiet"),
    ]
    bounds = [
        (
            check.bound,
            "not known" if check.figure is None else percent(check.figure),
            "holds" if check.holds else "is not met",
        )
        for check in (one.row.checks if one.row else ())
    ]
    if bounds:
        of_bounds = ("bound", *numeric("figure"), "result")
        parts.append(table(of_bounds, bounds, caption="Bounds of the request"))
    return joined(parts)


def _left(one: RemovedRequest) -> Html:
    """Say in plain words what still finds it, and what this evidence does not tell."""
    manifest = one.records.manifest.record
    sentences: list[Child] = []
    if one.pair:
        verification = verified(one)
        sentences += verification["conclusion"]
        if one.is_measured and one.pair[1].edit is not None:
            sentences.append("That was tried with this edit alone, not with all that were written.")
        if verification["not tried"]:
            sentences.append(f"Not tried: {', '.join(verification['not tried'])}.")
    else:
        unknown = (
            "No verification has been run on it: whether other words, changed images, further "
            "training or an attack bring it back is not known. To find out: "
        )
        sentences.append(joined((unknown, code(one.records.verification.run))))
    sentences += [
        "One layer was changed, no training image was deleted: the original model and every copy "
        "of it know the concept as before.",
        "Figures are of the images and prompts named here. Of others the intervals say how far "
        "the share may lie, if they are drawn alike; they say nothing of images that are not.",
    ]
    if manifest is not None:
        sentences.append(
            f"{count(manifest.forget.rows)} images of it are in the store that this was made "
            "from, and wherever they were taken from, until somebody removes them there."
        )
    return element("ul", *(element("li", each) for each in sentences))


def _of_files(evidence: RemovalEvidence) -> list[Section]:
    checks = [
        paragraph(
            "Two commands tell, from the folder that the run was in, whether the edits are in a "
            "model, and whether its files are those below. The first needs slsgu and the edit, "
            "the second nothing."
        ),
        edit_sections.command_lines(evidence.checks),
    ]
    if evidence.by_reference:
        apart = "EDIT is a file that is kept apart; its SHA-256 is told with each request."
        checks.append(paragraph(apart))
    if not evidence.checks:
        alone = "No model is named here. `slsgu check MODEL --edit EDIT` tells whether an edit is "
        checks = [paragraph(alone, "in one.")]
    same = paragraph("The same sources, model and versions give the same edits.")
    again = edit_sections.command_lines(evidence.commands)
    return [
        Section("Check it", joined(checks)),
        *(_written(model, evidence) for model in evidence.models),
        Section("Repeat it", joined((same, again))),
        Section("Made with", terms({"slsgu": slsgu_cli.__version__, **_versions()})),
    ]


def _written(model: WrittenModel, evidence: RemovalEvidence) -> Section:
    """Show the files of a model before and after, and which edits are in it."""
    rows = [
        (
            code(file.name),
            lines([code(file.before or "not there"), code(file.after or "not there")]),
            "unchanged" if file.before == file.after else "changed" if file.before else "new",
        )
        for file in model.files
    ]
    found = ", ".join(
        f"{one.name}: {model.holds(one.name) or 'not looked for'}" for one in evidence.requests
    )
    heads = ("file", "SHA-256 before, and after", "")
    content = (
        terms({"Place": code(str(model.place)), "Made from": code(model.origin), "Edits": found}),
        *(paragraph(trouble, class_="notice") for trouble in model.troubles),
        table(heads, rows, caption=f"Files of {model.label}"),
    )
    return Section(f"Files: {model.label}", joined(content))
