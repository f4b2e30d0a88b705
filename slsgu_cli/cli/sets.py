"""`show`, and sets as tables."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from slsgu_cli.cli import options as opt
from slsgu_cli.cli.app import Session, app, command

if TYPE_CHECKING:
    from slsgu_cli.cli.console import Console
    from slsgu_cli.records.sets import Origin, SetManifest
    from slsgu_cli.sets.build import Replayed
    from slsgu_cli.sets.inspect import Inspection, SeenRow
    from slsgu_cli.store.store import Store


CAPTIONS_SHOWN = 12


def show_inspection(console: "Console", store: "Store", seen: "Inspection") -> None:
    """Print what a part of a set holds and where it comes from."""
    from slsgu_cli.sets.context import counted

    ref = seen.ref
    facts = [
        ("concept", seen.manifest.concept),
        ("patterns", ", ".join(seen.manifest.patterns) if seen.part == "forget" else ""),
        ("model", str(seen.manifest.model)),
        ("rows", ref.rows),
        ("captions", seen.captions),
        ("seen", ref.seen),
        ("left out", counted(ref.refused)),
        ("noted", counted(ref.noted)),
        ("fingerprint", ref.fingerprint),
    ]
    told = [(fact, value) for fact, value in facts if value not in ("", 0)]
    title = f"{seen.part} rows of {seen.manifest.name}"
    data = {"name": seen.manifest.name, "part": seen.part, **dict(facts)} | {
        "left out": ref.refused,
        "noted": ref.noted,
    }
    console.table("set", ("fact", "value"), told, title=title, data=data)
    console.table("sources", ("source", "rows"), seen.sources, title="sources")
    words = seen.words[:8] if console.brief else seen.words
    console.table("words", ("word", "captions"), words, title="words in the captions")
    show_rows(console, seen.rows)
    console.paths("sheets", [store.where(seen.sheet)])


def show_rows(console: "Console", shown: Sequence["SeenRow"]) -> None:
    """Print rows with their captions and origins; on a terminal the first of them."""
    from slsgu_cli.cli.console import Column

    columns = (
        Column("key"),
        Column("hash", shown=lambda digest: digest[:12]),
        Column("caption"),
        Column("file", on_terminal=False),
        Column("row", on_terminal=False),
        Column("url", on_terminal=False),
    )
    brief = shown[:CAPTIONS_SHOWN] if console.brief else shown
    cells = [(row.key, row.hash, row.caption, *_place(row.origin)) for row in brief]
    console.table("rows", columns, cells, title="rows")
    if len(brief) < len(shown):
        console.note(f"{len(shown) - len(brief)} more rows; -v shows them too")


def _place(origin: "Origin | None") -> tuple[str | None, int | None, str | None]:
    return (origin.file, origin.row, origin.url) if origin else (None, None, None)


def show_manifests(console: "Console", built: Sequence["SetManifest"]) -> None:
    """Print the sets that were built for many names."""
    from slsgu_cli.sets.context import counted

    cells = [(m.name, m.forget.rows, m.retain.rows, counted(m.forget.refused)) for m in built]
    columns = ("set", "forget", "retain", "left out of forget")
    console.table("sets", columns, cells, title="sets", data=list(built))


def show_replayed(console: "Console", result: "Replayed") -> None:
    """Print whether a set that was built again is what it was."""
    cells = [(part, "same rows" if same else "other rows") for part, same in result.same.items()]
    title = f"set {result.manifest.name}, built again"
    console.table("replayed", ("part", "rows"), cells, title=title, data=result.same)
    for part, same in result.same.items():
        if not same:
            console.warn(f"the {part} rows are not those they were: a source has changed")


@command(app, "show")
def show(
    session: Session,
    name: opt.Name,
    part: Annotated[
        str, typer.Option("--part", help="forget, retain or the name of an evaluation set.")
    ] = "forget",
    images: Annotated[
        int, typer.Option("--images", min=1, max=400, help="Images on the contact sheet.")
    ] = 48,
    drop: Annotated[
        list[str] | None,
        typer.Option("--drop", metavar="KEY", help="Take this row out: key or hash. Repeatable."),
    ] = None,
    drop_from: Annotated[
        str | None, typer.Option("--drop-from", help="File of keys or hashes, one a line.")
    ] = None,
) -> None:
    """Look at a set before it is used; drop rows.

    Example: slsgu show facebook --drop 000000012
    """
    from slsgu_cli.sets.inspect import drop_from_set, inspect_set, read_keys

    wanted = [*(drop or ()), *(read_keys(drop_from) if drop_from else ())]
    if wanted:
        drop_from_set(session.store, name, wanted, part=part)
        session.console.note(f"{part} of {name} has other rows now; what was made of it is stale")
    seen = inspect_set(session.store, name, part=part, images=images)
    show_inspection(session.console, session.store, seen)
