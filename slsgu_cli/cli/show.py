"""The command `show`."""

from slsgu_cli.cli.app import Name, Session, command
from slsgu_cli.cli.console import Column
from slsgu_cli.records.codec import by_name
from slsgu_cli.records.sets import ShowOptions

CAPTIONS_SHOWN = 12


@command("show")
def show(session: Session, name: Name, options: ShowOptions) -> None:
    """Example: slsgu show facebook --drop 000000012"""
    from slsgu_cli.sets.context import counted
    from slsgu_cli.sets.dropped_rows import drop_from_set, read_keys
    from slsgu_cli.sets.inspection import inspect_set

    console, part = session.console, options.part
    wanted = [*options.drop, *(read_keys(options.drop_from) if options.drop_from else ())]
    if wanted:
        drop_from_set(session.store, name, wanted, part=part)
        console.note(f"the {part} rows of {name} have changed; artifacts made from them are stale")
    seen = inspect_set(session.store, name, part=part, images=options.images)
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
    brief = seen.rows[:CAPTIONS_SHOWN] if console.brief else seen.rows
    columns = (
        Column("key"),
        Column("hash", shown=lambda digest: digest[:12]),
        Column("caption"),
        Column("file", lambda row: row.origin and row.origin.file, on_terminal=False),
        Column("row", lambda row: row.origin and row.origin.row, on_terminal=False),
        Column("url", lambda row: row.origin and row.origin.url, on_terminal=False),
    )
    console.table("rows", columns, brief, title="rows")
    if len(brief) < len(seen.rows):
        console.note(f"{len(seen.rows) - len(brief)} more rows; -v shows them")
    console.paths("sheets", [session.store.where(seen.sheet)] if seen.sheet else [])
