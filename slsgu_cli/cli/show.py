"""The command `show`."""

from collections.abc import Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

from slsgu_cli.cli.app import Name, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.records.sets import ShowOptions

if TYPE_CHECKING:
    from slsgu_cli.sets.inspection import InspectedRow, Inspection
    from slsgu_cli.store.store import Store


CAPTIONS_SHOWN = 12


@command("show")
def show(session: Session, name: Name, options: ShowOptions) -> None:
    """Example: slsgu show facebook --drop 000000012"""
    from slsgu_cli.sets.dropped_rows import drop_from_set, read_keys
    from slsgu_cli.sets.inspection import inspect_set

    part = options.part
    wanted = [*options.drop, *(read_keys(options.drop_from) if options.drop_from else ())]
    if wanted:
        drop_from_set(session.store, name, wanted, part=part)
        session.console.note(
            f"the {part} rows of {name} have changed; artifacts made from them are stale"
        )
    seen = inspect_set(session.store, name, part=part, images=options.images)
    show_inspection(session.console, session.store, seen)


def show_inspection(console: Console, store: "Store", seen: "Inspection") -> None:
    """Print the contents of a part of a set and their sources."""
    from slsgu_cli.records.codec import by_name
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
    shown = [(fact, value) for fact, value in facts if value not in ("", 0)]
    title = f"{seen.part} rows of {seen.manifest.name}"
    data = {"name": seen.manifest.name, "part": seen.part, **dict(facts)} | {
        "left out": by_name(ref.refused),
        "noted": by_name(ref.noted),
    }
    console.table("set", ("fact", "value"), shown, title=title, data=data)
    console.table("sources", ("source", "rows"), seen.sources, title="sources")
    words = seen.words[:8] if console.brief else seen.words
    console.table("words", ("word", "captions"), words, title="words in the captions")
    show_rows(console, seen.rows)
    console.paths("sheets", [store.where(seen.sheet)] if seen.sheet else [])


def show_rows(console: Console, shown: Sequence["InspectedRow"]) -> None:
    """Print rows with their captions and origins; on a terminal, only the first ones."""

    columns = (
        Column("key"),
        Column("hash", shown=lambda digest: digest[:12]),
        Column("caption"),
        *(Column(name, on_terminal=False) for name in ("file", "row", "url")),
    )
    brief = shown[:CAPTIONS_SHOWN] if console.brief else shown
    cells = [
        (row.key, row.hash, row.caption, *(astuple(row.origin) if row.origin else [None] * 3))
        for row in brief
    ]
    console.table("rows", columns, cells, title="rows")
    if len(brief) < len(shown):
        console.note(f"{len(shown) - len(brief)} more rows; -v shows them")
