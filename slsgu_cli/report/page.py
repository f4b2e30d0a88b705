"""The whole page: style, summary, contents, and the sections of every name."""

from collections.abc import Mapping, Sequence
from importlib.resources import files

import slsgu_cli
from slsgu_cli.naming import known_as
from slsgu_cli.report.figures import change, percent
from slsgu_cli.report.gather import Dossier
from slsgu_cli.report.grids import Head, code, paragraph, table
from slsgu_cli.report.markup import Child, Html, element, joined
from slsgu_cli.report.sections import Section

# Nothing is fetched and nothing runs, whatever the page's texts hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'"


def page(dossiers: Sequence[Dossier], sections: Mapping[str, Sequence[Section]]) -> str:
    """Return the page on some names; `sections` has those of each, in order."""
    names = ", ".join(dossier.concept for dossier in dossiers)
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
        _article(dossier, sections[dossier.name], number, alone=len(dossiers) == 1)
        for number, dossier in enumerate(dossiers, start=1)
    ]
    body = element(
        "body",
        element("a", "Skip to the report", href="#report", class_="skip"),
        element(
            "header",
            paragraph("Unlearning report", class_="kind"),
            element("h1", f"Forgetting {names}"),
            _summary(dossiers) if len(dossiers) > 1 else None,
            _contents(dossiers, sections),
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


def _summary(dossiers: Sequence[Dossier]) -> Html:
    """Return a table with a row for each name."""
    rows: list[tuple[Child, ...]] = []
    for number, dossier in enumerate(dossiers, start=1):
        edit = dossier.edit.record
        link = element("a", dossier.concept, href=f"#n{number}")
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


def _contents(dossiers: Sequence[Dossier], sections: Mapping[str, Sequence[Section]]) -> Html:
    parts = []
    for number, dossier in enumerate(dossiers, start=1):
        links = [
            element("li", element("a", one.title, href=f"#n{number}-{place}"))
            for place, one in enumerate(sections[dossier.name], start=1)
        ]
        named = element("p", dossier.concept) if len(dossiers) > 1 else None
        parts.append(joined((named, element("ol", *links))))
    return element("nav", *parts, aria_label="Contents")


def _article(dossier: Dossier, sections: Sequence[Section], number: int, *, alone: bool) -> Html:
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
    heading = element("h2", dossier.concept, id=f"n{number}", class_="unseen" if alone else None)
    return element("article", heading, *parts, class_="name", aria_labelledby=f"n{number}")
