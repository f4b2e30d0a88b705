"""`report`: gather, look, and write one page."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from shlex import quote

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.errors import InputError, SlsguError, UsageError
from slsgu_cli.figures.html import (
    Child,
    Head,
    Html,
    change,
    code,
    element,
    joined,
    paragraph,
    percent,
    table,
)
from slsgu_cli.records.options import ReportRequest
from slsgu_cli.report import edit_sections, effect, study_sections
from slsgu_cli.report.gather import Section, SetRecords, absent, gather
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.files import replacing, require_regular
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class Report:
    """A page that was written: its sections by name, its path and its size."""

    out: str
    nbytes: int
    sections: dict[str, list[Section]]


def write_report(store: Store, request: ReportRequest) -> Report:
    """Write the page that `request` describes. Raises UsageError, MissingError, InputError."""
    _require_place(request)
    twice = [name for name in request.names if list(request.names).count(name) > 1]
    if twice:
        raise UsageError(f"{twice[0]} is named twice")
    catalog = Catalog(store)
    all_records = [gather(catalog, name) for name in request.names]
    image_sections = _image_sections(store, all_records, request)
    sections = {
        records.name: all_sections(records, image_sections[records.name], store.url)
        for records in all_records
    }
    for records in all_records:
        for evidence in records.evidence():
            if evidence.state is not None and evidence.trouble:
                progress.warn(f"{records.name}: {evidence.trouble} Not shown; run `{evidence.run}`")
    data = page(all_records, sections).encode()
    with replacing(request.out) as partial:
        partial.write_bytes(data)
    return Report(str(request.out), len(data), sections)


def _require_place(request: ReportRequest) -> None:
    require_regular(request.out)
    if request.out.is_dir():
        raise InputError(f"{request.out} is a folder", hint="--out report.html")
    if request.out.exists() and not request.overwrite:
        raise InputError(f"{request.out} exists already", hint="another --out, or --overwrite")


def all_sections(records: SetRecords, images: Sequence[Section], store: str) -> list[Section]:
    """Return the sections of one name in the page's order; `images` are those of images."""
    return [
        effect.result(records),
        edit_sections.request(records),
        *images,
        *effect.on_targets(records),
        study_sections.verification(records),
        edit_sections.front(records),
        edit_sections.search(records),
        study_sections.trajectories(records),
        *study_sections.joint_searches(records),
        *study_sections.sweeps(records),
        study_sections.comparison(records),
        edit_sections.gradients(records),
        edit_sections.the_edit(records),
        edit_sections.repeat(records, store),
        edit_sections.provenance(records),
    ]


def _image_sections(
    store: Store, all_records: Sequence[SetRecords], request: ReportRequest
) -> dict[str, list[Section]]:
    """Return the sections that need the model, or why they are not there."""
    if not request.examples:
        reason = "Left out on request, so that no model was run."
        return {
            records.name: _absent(reason, f"slsgu report {quote(records.name)} --out report.html")
            for records in all_records
        }
    from slsgu_cli.clip.models import pick_device
    from slsgu_cli.method.evaluate import GuessingModels

    models = GuessingModels(store, device=pick_device(request.device))
    sections = {}
    for records in all_records:
        manifest, edit = records.manifest, records.edit
        if manifest.record is None or edit.record is None:
            lacking = edit if manifest.record else manifest
            sections[records.name] = _absent(lacking.trouble or "", lacking.run)
            continue
        progress.note(
            f"{records.name}: running {edit.record.model} over a few images, "
            "before and after the edit (--no-examples leaves this out)"
        )
        try:
            guesses = models.before_after(manifest.record, edit.record)
            sections[records.name] = [effect.examples(guesses), effect.cosines(guesses)]
        except SlsguError as error:
            progress.warn(f"{records.name}: no images are shown: {error.message}")
            hint = error.hint or "slsgu report ... --no-examples"
            sections[records.name] = _absent(f"{error.message}.", hint)
    return sections


def _absent(trouble: str, run: str) -> list[Section]:
    return [absent(title, trouble, run) for title in (effect.IMAGES, effect.COSINES)]


# Nothing is fetched and nothing runs, whatever the page's texts hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"


def page(all_records: Sequence[SetRecords], sections: Mapping[str, Sequence[Section]]) -> str:
    """Return the page on some names; `sections` has those of each, in order."""
    names = ", ".join(records.concept for records in all_records)
    title = f"Unlearning report: {names}"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="generator", content=f"slsgu {slsgu_cli.__version__}"),
        element("title", title),
        element("style", Html(_style())),
    )
    articles = [
        _article(records, sections[records.name], number, alone=len(all_records) == 1)
        for number, records in enumerate(all_records, start=1)
    ]
    body = element(
        "body",
        element("a", "Skip to the report", href="#report", class_="skip"),
        element(
            "header",
            paragraph("Unlearning report", class_="kind"),
            element("h1", f"Forgetting {names}"),
            _summary(all_records) if len(all_records) > 1 else None,
            _contents(all_records, sections),
        ),
        element("main", *articles, id="report"),
        element(
            "footer",
            paragraph(
                f"Made by slsgu {slsgu_cli.__version__} from the records listed above. "
                "This page is whole in itself: it fetches nothing and runs nothing."
            ),
        ),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _style() -> str:
    return files("slsgu_cli.report").joinpath("report.css").read_text(encoding="utf-8")


def _summary(all_records: Sequence[SetRecords]) -> Html:
    """Return a table with a row for each name."""
    rows: list[tuple[Child, ...]] = []
    for number, records in enumerate(all_records, start=1):
        edit = records.edit.record
        link = element("a", records.concept, href=f"#n{number}")
        if edit is None or edit.forget is None or edit.baseline_forget is None:
            rows.append((link, None, None, None, None))
            continue
        losses = [
            now.top1 - was.top1
            for name, was in (edit.baseline_utility or {}).items()
            if (now := (edit.utility or {}).get(name)) is not None
        ]
        rows.append(
            (
                link,
                code(known_as(edit.layer)),
                percent(edit.baseline_forget.top1),
                percent(edit.forget.top1),
                change(min(losses)) if losses else None,
            )
        )
    heads = (Head("concept", False), Head("edited layer", False), Head("FA@1, original"),
             Head("FA@1, edited"), Head("TA@1, largest loss in points"))  # fmt: skip
    return table(heads, rows, caption="What this page reports, edit by edit")


def _contents(all_records: Sequence[SetRecords], sections: Mapping[str, Sequence[Section]]) -> Html:
    parts = []
    for number, records in enumerate(all_records, start=1):
        links = [
            element("li", element("a", one.title, href=f"#n{number}-{place}"))
            for place, one in enumerate(sections[records.name], start=1)
        ]
        named = element("p", records.concept) if len(all_records) > 1 else None
        parts.append(joined((named, element("ol", *links))))
    return element("nav", *parts, aria_label="Contents")


def _article(records: SetRecords, sections: Sequence[Section], number: int, *, alone: bool) -> Html:
    parts = [
        element(
            "section",
            element("h3", one.title, id=f"n{number}-{place}"),
            one.content,
            aria_labelledby=f"n{number}-{place}",
        )
        for place, one in enumerate(sections, start=1)
    ]
    # The page's own heading says the same of a single name, but not to who skips to here.
    heading = element("h2", records.concept, id=f"n{number}", class_="unseen" if alone else None)
    return element("article", heading, *parts, class_="name", aria_labelledby=f"n{number}")
