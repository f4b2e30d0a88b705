"""`report`: gather, look, and write one page, which begins with what the edit did."""

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from PIL import Image

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import SUFFIX
from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.errors import InputError, SlsguError, UsageError
from slsgu_cli.figures.html import (
    Child,
    Html,
    change,
    code,
    cosine,
    count,
    element,
    image_html,
    interval,
    joined,
    numeric,
    paragraph,
    percent,
    scrolled,
    table,
)
from slsgu_cli.records.figures import Accuracy, Share
from slsgu_cli.records.ledger import StageKind
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.options import ReportRequest
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.report import edit_sections, study_sections
from slsgu_cli.report.gather import (
    Section,
    SetRecords,
    absent,
    gather,
    section,
    written_fingerprint,
)
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.files import replacing, require_regular
from slsgu_cli.store.store import Store

if TYPE_CHECKING:
    from slsgu_cli.figures.pictures import Example, Guesses, Images, Matrix
    from slsgu_cli.method.evaluate import BeforeAfter

IMAGES, COSINES = "Single images", "Cosine similarities"


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
    written = written_without(catalog, request.names)
    sections = {
        records.name: all_sections(
            records, image_sections[records.name], store.url, written[records.name]
        )
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


def written_without(catalog: Catalog, names: Sequence[str]) -> dict[str, set[str]]:
    """Return for each request the fingerprints of checkpoints that recipes wrote without it.

    They are those of the checkpoints as they are now.
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


def all_sections(
    records: SetRecords, images: Sequence[Section], store: str, written: Collection[str] = ()
) -> list[Section]:
    """Return the sections of one name in the page's order; `images` are those of images.

    Of models that were `written`, by fingerprint, verification is shown rather than of the edit.
    """
    return [
        result(records),
        edit_sections.request(records),
        *images,
        *on_targets(records),
        study_sections.verification(records, written),
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
            sections[records.name] = [examples(guesses), cosines(guesses)]
        except SlsguError as error:
            progress.warn(f"{records.name}: no images are shown: {error.message}")
            hint = error.hint or "slsgu report ... --no-examples"
            sections[records.name] = _absent(f"{error.message}.", hint)
    return sections


def _absent(trouble: str, run: str) -> list[Section]:
    return [absent(title, trouble, run) for title in (IMAGES, COSINES)]


# Nothing is fetched and nothing runs, whatever the page's texts hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"


def page(all_records: Sequence[SetRecords], sections: Mapping[str, Sequence[Section]]) -> str:
    """Return the page on some names; `sections` has those of each, in order."""
    names = ", ".join(records.concept for records in all_records)
    parts = [(records.concept, sections[records.name]) for records in all_records]
    return whole_page(
        f"Unlearning report: {names}",
        kind="Unlearning report",
        heading=f"Forgetting {names}",
        above=_summary(all_records) if len(all_records) > 1 else None,
        parts=parts,
        origin="the records listed above",
    )


Parts = Sequence[tuple[str, Sequence[Section]]]


def whole_page(
    title: str, *, kind: str, heading: str, above: Child, parts: Parts, origin: str
) -> str:
    """Return a page whose `parts` have a title and sections each; `above` stands before them.

    `kind` says what it is, `origin` what it was made from.
    """
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
        _article(called, sections, number, alone=len(parts) == 1)
        for number, (called, sections) in enumerate(parts, start=1)
    ]
    body = element(
        "body",
        element("a", "Skip to the report", href="#report", class_="skip"),
        element(
            "header",
            paragraph(kind, class_="kind"),
            element("h1", heading),
            above,
            _contents(parts),
        ),
        element("main", *articles, id="report"),
        element(
            "footer",
            paragraph(
                f"Made by slsgu {slsgu_cli.__version__} from {origin}. "
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
        losses = [now.top1 - was.top1 for _, was, now in _on_sets(edit) if now]
        loss = change(min(losses)) if losses else None
        forget = percent(edit.baseline_forget.top1), percent(edit.forget.top1)
        rows.append((link, code(known_as(edit.layer)), *forget, loss))
    figures = numeric("FA@1, original", "FA@1, edited", "TA@1, largest loss in points")
    heads = ("concept", "edited layer", *figures)
    return table(heads, rows, caption="What this page reports, edit by edit")


def _contents(parts: Parts) -> Html:
    lists = []
    for number, (called, sections) in enumerate(parts, start=1):
        links = [
            element("li", element("a", one.title, href=f"#n{number}-{place}"))
            for place, one in enumerate(sections, start=1)
        ]
        named = element("p", called) if len(parts) > 1 else None
        lists.append(joined((named, element("ol", *links))))
    return element("nav", *lists, aria_label="Contents")


def _article(called: str, sections: Sequence[Section], number: int, *, alone: bool) -> Html:
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
    heading = element("h2", called, id=f"n{number}", class_="unseen" if alone else None)
    return element("article", heading, *parts, class_="name", aria_labelledby=f"n{number}")


def result(records: SetRecords) -> Section:
    """Tell in words and figures what the edit did."""
    # An edit carries its figures; only the search's record says that the rows are the same.
    doubt = records.trials.trouble and paragraph(
        "These figures are the edit's own, of the time it was made. ",
        records.trials.trouble,
        class_="notice",
    )
    return section(
        "Result",
        records.edit,
        lambda edit: joined((doubt, _result(edit, records.manifest.record))),
    )


def lead(edit: EditHeader) -> Html:
    """Return the result in two sentences; nothing for an edit that was never measured."""
    before, after = edit.baseline_forget, edit.forget
    if before is None or after is None:
        return paragraph("The edit was made by hand: it carries no figures.", class_="lead")
    seen = Share.of(after.top1, after.rows)
    sentences: list[Child] = [
        f"Of {count(after.rows)} {'unseen images' if after.unseen else 'images'} of ",
        element("strong", edit.concept),
        ", " if after.unseen else ", which the edit was chosen by, ",
        f"the model named {percent(before.top1)} rightly before the edit and ",
        element("strong", percent(after.top1)),
        " after it: ",
        f"not one of them any more, and {seen.bound} of other such images"
        if seen.count == 0
        else "not all of them are forgotten",
        f". The name was among its first five guesses for {percent(before.top5)} and is for "
        f"{percent(after.top5)}. ",
    ]
    for name, was, now in _on_sets(edit):
        if now is not None:
            sentences.append(
                f"Accuracy on {name} ({count(now.rows)} other images) went from "
                f"{percent(was.top1)} to {percent(now.top1)}. "
            )
    if edit.harmed:
        worst = edit.harmed[0]
        sentences.append(
            f"Most harmed is {worst.name}: {percent(worst.before)} of its {count(worst.rows)} "
            f"images before, {percent(worst.after)} after. "
        )
    return paragraph(*sentences, class_="lead")


def _on_sets(edit: EditHeader) -> list[tuple[str, Accuracy, Accuracy | None]]:
    """Return each evaluation set with the accuracy on it before the edit and after."""
    after = edit.utility or {}
    before = sorted((edit.baseline_utility or {}).items())
    return [(name, accuracy, after.get(name)) for name, accuracy in before]


def _result(edit: EditHeader, manifest: SetManifest | None) -> Html:
    rows = [
        _row(f"TA@{k} {name}" if name else f"FA@{k}", was, now, attribute)
        for name, was, now in [("", edit.baseline_forget, edit.forget), *_on_sets(edit)]
        for k, attribute in ((1, "top1"), (5, "top5"))
    ]
    heads = (
        "figure",
        *numeric("original", "edited", "change, points", "images", "95% interval, edited"),
    )
    held_out = (
        ""
        if manifest is None or manifest.forget_eval
        else "The images that measure FA were also used for the gradient. "
    )
    meaning = paragraph(
        "The search did not reach its goal. " if edit.forgotten is False else None,
        f"The edit was searched for together with those of {', '.join(edit.joint.names)}, and its "
        "figures are those with all of them in place. "
        if edit.joint
        else None,
        "FA: how often images of the concept get its name, first (@1) or among the first five "
        "(@5). TA: the same for everything else. ",
        held_out,
        "The interval says how far the share of ever more such images may lie from the one seen "
        "(Clopper and Pearson's exact one, 95%).",
        class_="quiet",
    )
    caption = f"Accuracy with {known_as(edit.layer)} as it was and as edited"
    return joined((lead(edit), table(heads, rows, caption=caption), meaning, _harm(edit)))


def _harm(edit: EditHeader) -> Html | None:
    """Show the classes that lost most, and those with the nearest names."""
    if not (edit.harmed or edit.nearest):
        return None
    heads = ("class", *numeric("images", "original", "edited", "change"))
    tables = []
    for losses, caption in (
        (edit.harmed, "Classes that lost most, TA@1"),
        (edit.nearest, "Classes with the nearest names, TA@1"),
    ):
        rows = [
            (
                loss.name,
                count(loss.rows),
                percent(loss.before),
                percent(loss.after),
                change(-loss.lost),
            )
            for loss in losses
        ]
        tables.append(table(heads, rows, caption=caption))
    return element("details", element("summary", "What single classes lost"), *tables)


def on_targets(records: SetRecords) -> list[Section]:
    """Show what each edit did to the model built on CLIP that its search was steered on."""
    return [
        section(f"On {evidence.path.rpartition('@')[2].removesuffix(SUFFIX)}", evidence, _on_target)
        for evidence in records.on_targets.values()
    ]


def _on_target(edit: EditHeader) -> Html:
    figures = edit.target
    if figures is None:
        return paragraph("The edit carries no figures of its target.")
    rows: list[tuple[Child, ...]] = []
    for by in figures.by_judge:
        for figure, was, now in (
            ("UA", by.before.unlearned, by.after.unlearned),
            ("IRA", by.before.others, by.after.others),
        ):
            before, after = was.percent or 0.0, now.percent or 0.0
            cells = percent(before), percent(after), change(after - before)
            rows.append((by.judge, figure, *cells, count(now.total), interval(now)))
    heads = (
        "judged by",
        "figure",
        *numeric("original", "edited", "change, points", "of", "95% interval, edited"),
    )
    unseen = "that chose nothing" if figures.unseen else "which the edit was chosen by"
    caption = f"What {figures.target} shows, on prompts or images {unseen}"
    meaning = paragraph(
        "The search did not reach its goal. " if edit.forgotten is False else None,
        f"The edit moves {known_as(edit.layer)}. UA: how much of what should show the concept is "
        "not taken for it. IRA: how much of everything else is taken for what it is.",
        class_="quiet",
    )
    return joined((table(heads, rows, caption=caption), meaning))


def _row(
    figure: str, was: Accuracy | None, now: Accuracy | None, attribute: str
) -> tuple[Child, ...]:
    before = None if was is None else getattr(was, attribute)
    after = None if now is None else getattr(now, attribute)
    return (
        figure,
        None if before is None else percent(before),
        None if after is None else percent(after),
        None if before is None or after is None else change(after - before),
        count(was.rows) if was else None,
        interval(Share.of(getattr(now, attribute), now.rows)) if now and now.rows else None,
    )


def examples(guesses: "BeforeAfter") -> Section:
    """Show single images with the names they got before and after."""
    concept = guesses.names[0]
    cards = [
        example_card(example, concept=concept, number=number)
        for number, example in enumerate(guesses.examples, start=1)
    ]
    intro = paragraph(
        f"The first images of {concept}, and of other names with many images, in the order of the "
        "evaluation set: none was picked for how it came out. The five names the model finds "
        "most probable, the right one in bold."
    )
    return Section(IMAGES, joined((intro, element("div", *cards, class_="examples"))))


def cosines(guesses: "BeforeAfter") -> Section:
    """Show how near images and names are, before and after."""
    span = (
        float(min(guesses.before.min(), guesses.after.min())),
        float(max(guesses.before.max(), guesses.after.max())),
    )
    tables = [
        cosine_table(values, guesses.names, guesses.thumbnails, span=span, caption=caption)
        for values, caption in ((guesses.before, "Before"), (guesses.after, "After"))
    ]
    concept = guesses.names[0]
    was, now = (cosine(float(values[0, 0])) for values in (guesses.before, guesses.after))
    few, many = count(min(guesses.images)), count(max(guesses.images))
    intro = paragraph(
        "Mean cosine similarity of a name's images (rows) with each name (columns); the "
        f"stronger the tint, the nearer. Images of {concept} and its name: {was} before, "
        f"{now} after. {few if few == many else f'{few} to {many}'} images a row."
    )
    return Section(COSINES, joined((intro, *tables)))


# Twice the size at which they are shown, for screens and printers of high density.
THUMBNAIL, PICTURE = 64, 192


def picture(image: "Images", *, alt: str, size: int, class_: str) -> Html:
    """Return an image of at most `size` pixels a side, inside the page as PNG data."""
    small = Image.fromarray(image)
    small.thumbnail((size, size), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "PNG", optimize=True)
    return image_html(
        buffer.getvalue(), alt=alt, width=small.width, height=small.height, class_=class_
    )


def example_card(example: "Example", *, concept: str, number: int) -> Html:
    """Return an image with its most probable names before and after."""
    forgotten = example.label == concept
    shown = picture(
        example.image, alt=f"image {number}, of {example.label}", size=PICTURE, class_="picture"
    )
    head = element("h4", example.label, class_="forgotten" if forgotten else None)
    before = _guess_bars("before", example.before, example.label)
    after = _guess_bars("after", example.after, example.label)
    return element(
        "article", element("div", shown, head, class_="subject"), before, after, class_="example"
    )


def _guess_bars(when: str, guesses: "Guesses", label: str) -> Html:
    rows = []
    for name, probability in guesses:
        share = f"{100 * probability:.1f}"
        bar = element(
            "span", element("i", style=f"width:{share}%"), class_="bar", aria_hidden="true"
        )
        rows.append(
            element(
                "tr",
                element("th", name, scope="row"),
                element("td", bar, class_="bars", aria_hidden="true"),
                element("td", f"{share}%", class_="fig"),
                class_="true" if name == label else None,
            )
        )
    return element("table", element("caption", when), element("tbody", *rows), class_="guesses")


def cosine_table(
    values: "Matrix",
    names: Sequence[str],
    thumbnails: "Images",
    *,
    span: tuple[float, float],
    caption: str,
) -> Html:
    """Return mean cosines of images (rows) with names (columns), tinted between `span`."""
    low, high = span
    corner = element("th", element("span", "images of", class_="quiet"), scope="col")
    columns = [
        element("th", element("span", name), scope="col", class_="turned" + " own" * (i == 0))
        for i, name in enumerate(names)
    ]
    rows = []
    for i, name in enumerate(names):
        small = picture(thumbnails[i], alt="", size=THUMBNAIL, class_="thumbnail")
        cells = []
        for j in range(len(names)):
            value = float(values[i, j])
            tint = (value - low) / (high - low) if high > low else 0.0
            classes = "fig own" if i == j == 0 else "fig"
            cells.append(
                element("td", cosine(value), class_=classes, style=f"--tint:{100 * tint:.0f}%")
            )
        head = element(
            "th",
            element("span", small, element("span", name)),
            scope="row",
            class_="own" if i == 0 else None,
        )
        rows.append(element("tr", head, *cells))
    table = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", corner, *columns)),
        element("tbody", *rows),
        class_="cosines",
    )
    return scrolled(table, caption)
