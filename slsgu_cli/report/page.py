"""`report`: gather the records, run the model over example images, and write one HTML page."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from shlex import quote

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.errors import InputError, SlsguError
from slsgu_cli.figures.numbers import change, percent
from slsgu_cli.records.ledger import StageKind, written_at
from slsgu_cli.records.options import ReportRequest
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.report import edit_sections, study_sections
from slsgu_cli.report.commands import commands as commands_of
from slsgu_cli.report.gather import SetRecords, gather
from slsgu_cli.report.image_sections import cosines, examples, no_images
from slsgu_cli.report.result_sections import on_target, result, retained
from slsgu_cli.report.sections import (
    Cell,
    Column,
    Section,
    Table,
    codes,
    figures,
    fill,
    section,
    tables,
)
from slsgu_cli.report.verification_sections import verification
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.atomic import replacing, require_regular
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.store import Store


def write_report(store: Store, request: ReportRequest) -> dict[str, list[Section]]:
    """Write the page that `request` describes; return its sections by name.

    Raises MissingError and InputError.
    """
    _require_place(request)
    names = list(dict.fromkeys(request.names))
    catalog = Catalog(store)
    all_records = [gather(catalog, name) for name in names]
    image_sections = _image_sections(store, all_records, request)
    written = written_without(catalog, names)
    sections = {
        records.name: all_sections(
            records, image_sections[records.name], store.url, written[records.name]
        )
        for records in all_records
    }
    for records in all_records:
        for stored in records.all():
            if stored.state is not None and stored.trouble:
                progress.warn(f"{records.name}: {stored.trouble} Not shown; run `{stored.run}`")
    with replacing(request.out) as partial:
        partial.write_bytes(page(all_records, sections).encode())
    return sections


def _require_place(request: ReportRequest) -> None:
    require_regular(request.out)
    if request.out.is_dir():
        raise InputError(f"{request.out} is a folder", hint="--out report.html")
    if request.out.exists() and not request.overwrite:
        raise InputError(f"{request.out} exists already", hint="another --out, or --overwrite")


def written_without(catalog: Catalog, names: Sequence[str]) -> dict[str, set[str]]:
    """Return for each name the fingerprints of checkpoints that recipes wrote without it.

    They are fingerprints of the files as they are now.
    """
    written: dict[str, set[str]] = {name: set() for name in names}
    for ledger in catalog.readable(Artifact.LEDGER).values():
        for each in ledger.stages:
            without = written.keys() & {*each.names}
            if each.kind is not StageKind.CHECKPOINT or not (
                each.output and each.place and without
            ):
                continue
            if fingerprint := written_fingerprint(ledger.model, Path(each.place)):
                for name in without:
                    written[name].add(fingerprint)
    return written


def written_fingerprint(model: ModelSpec, place: Path) -> str | None:
    """Return the present fingerprint of a copy of a model; None if it is not a CLIP."""
    try:
        return fingerprint(resolve(written_at(model, place)))
    except (SlsguError, OSError):
        return None


def all_sections(
    records: SetRecords, images: Sequence[Section], store: str, written: Collection[str] = ()
) -> list[Section]:
    """Return all sections on one name in the page's order; `images` are those on images.

    `written` are fingerprints of written models, whose verification goes before the edit's.
    """
    edit, pointer = records.edit.record, records.pointer
    commands = [f"export SLSGU_STORE={quote(store)}", *commands_of(records)]
    # The edit carries its own figures. Only the search's record says whether the rows changed.
    doubt = records.trials.trouble
    return [
        section("Result", records.edit, result, records.manifest.record, doubt),
        section("Request", records.manifest, edit_sections.request),
        *images,
        *(
            section(f"On {label.rpartition('@')[2]}", stored, on_target)
            for label, stored in records.on_targets.items()
        ),
        verification(records, written),
        section("Pareto front of layers", records.ranking, edit_sections.front, edit),
        section("Step search", records.trials, edit_sections.search, edit),
        section("Trajectories", records.trajectory, study_sections.trajectories, edit),
        *(
            section(f"Forgotten together: {label}", stored, study_sections.joint_search)
            for label, stored in records.joint.items()
        ),
        *(
            section(f"Sweep: {label}", stored, study_sections.sweep, records.name)
            for label, stored in records.sweeps.items()
        ),
        section("Comparison with other methods", records.comparison, study_sections.comparison),
        section("Model and gradients", pointer, edit_sections.gradients, records.gradients),
        section("Edit", records.edit, edit_sections.the_edit, records),
        Section("How to repeat it", fill("repeat.html", commands=commands)),
        Section("Records behind this page", edit_sections.provenance(records)),
    ]


def _image_sections(
    store: Store, all_records: Sequence[SetRecords], request: ReportRequest
) -> dict[str, list[Section]]:
    """Return the sections that need the model, or notices in their place."""
    if not request.examples:
        reason = "No model was run, because of --no-examples."
        return {
            records.name: no_images(reason, f"slsgu report {quote(records.name)} --out report.html")
            for records in all_records
        }
    from slsgu_cli.clip.devices import pick_device
    from slsgu_cli.engine.examples import GuessingModels

    models = GuessingModels(store, device=pick_device(request.device))
    sections = {}
    for records in all_records:
        manifest, edit = records.manifest, records.edit
        if manifest.record is None or edit.record is None:
            lacking = edit if manifest.record else manifest
            sections[records.name] = no_images(lacking.trouble or "", lacking.run)
            continue
        progress.note(
            f"{records.name}: running {edit.record.model} on a few images, "
            "before and after the edit (--no-examples skips this)"
        )
        try:
            guesses = models.before_after(manifest.record, edit.record)
            sections[records.name] = [examples(guesses), cosines(guesses)]
        except SlsguError as error:
            progress.warn(f"{records.name}: no images are shown: {error.message}")
            hint = error.hint or "slsgu report ... --no-examples"
            sections[records.name] = no_images(f"{error.message}.", hint)
    return sections


def page(all_records: Sequence[SetRecords], sections: Mapping[str, Sequence[Section]]) -> str:
    """Return the page on some names; `sections` has those of each, in order."""
    return fill(
        "page.html",
        names=", ".join(records.concept for records in all_records),
        summary=tables(_summary(all_records)) if len(all_records) > 1 else "",
        articles=[(records.concept, sections[records.name]) for records in all_records],
        version=slsgu_cli.__version__,
    )


def _summary(all_records: Sequence[SetRecords]) -> Table:
    """Return a table with a row for each name."""
    rows: list[tuple[Cell, ...]] = []
    for records in all_records:
        edit = records.edit.record
        if edit is None or edit.forget is None or edit.baseline_forget is None:
            rows.append((records.concept, None, None, None, None))
            continue
        losses = [now.top1 - was.top1 for _, was, now in retained(edit) if now]
        loss = change(min(losses)) if losses else None
        forget = percent(edit.baseline_forget.top1), percent(edit.forget.top1)
        rows.append((records.concept, known_as(edit.layer), *forget, loss))
    columns = [
        Column("concept", "link"),
        *codes("edited layer"),
        *figures("FA@1, original", "FA@1, edited", "TA@1, largest loss in points"),
    ]
    return Table("All edits on this page", columns, rows)
