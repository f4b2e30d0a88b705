"""How the results of curation are printed."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slsgu_cli.console import Console
from slsgu_cli.store import Store
from slsgu_cli.tables import Column
from slsgu_cli.workshop import counted

if TYPE_CHECKING:
    from slsgu_cli.curation.inspection import Inspection, SeenRow
    from slsgu_cli.curation.replay import Replayed
    from slsgu_cli.records import SetManifest
    from slsgu_cli.samples import Origin

CAPTIONS_SHOWN = 12


def inspection(console: Console, store: Store, seen: "Inspection") -> None:
    """Print what a part of a set holds and where it comes from."""
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
    rows(console, seen.rows)
    console.paths("sheets", [store.where(seen.sheet)])


def rows(console: Console, shown: Sequence["SeenRow"]) -> None:
    """Print rows with their captions and origins; on a terminal the first of them."""
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


def manifests(console: Console, built: Sequence["SetManifest"]) -> None:
    """Print the sets that were built for many names."""
    cells = [(m.name, m.forget.rows, m.retain.rows, counted(m.forget.refused)) for m in built]
    columns = ("set", "forget", "retain", "left out of forget")
    console.table("sets", columns, cells, title="sets", data=list(built))


def replayed(console: Console, result: "Replayed") -> None:
    """Print whether a set that was built again is what it was."""
    cells = [(part, "same rows" if same else "other rows") for part, same in result.same.items()]
    title = f"set {result.manifest.name}, built again"
    console.table("replayed", ("part", "rows"), cells, title=title, data=result.same)
    for part, same in result.same.items():
        if not same:
            console.warn(f"the {part} rows are not those they were: a source has changed")
