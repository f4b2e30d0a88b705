"""The command `build-sets`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.cli.app import Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.usage import ParsedOptions
from slsgu_cli.errors import UsageError
from slsgu_cli.records.option_fields import ROWS, Option
from slsgu_cli.records.options import (
    BuildRequest,
    MetadataSource,
)
from slsgu_cli.records.sets import SetManifest, read_names
from slsgu_cli.records.targets import SourceRequest

if TYPE_CHECKING:
    from slsgu_cli.records.sets import Concept
    from slsgu_cli.sets.build import Replayed


NamesFile = Annotated[
    str | None,
    Option(
        ("--names",),
        "File of several names, one per line: NAME<tab>alias<tab>!exclusion.",
        ROWS,
        metavar="FILE",
        without="NAME alone",
    ),
]


Replay = Annotated[
    bool, Option(("--replay",), "Rebuild NAME with its original options and dropped rows.", ROWS)
]


@command("build-sets")
def build_sets(
    session: Session,
    request: ParsedOptions[BuildRequest],
    metadata: ParsedOptions[MetadataSource],
    images: ParsedOptions[SourceRequest],
    names: NamesFile = None,
    replay: Replay = False,
) -> None:
    """Example: slsgu build-sets facebook -m local-dir:clip -s laion.tar --eval brands=test.tar"""
    from slsgu_cli.sets import build
    from slsgu_cli.sets.context import counted
    from slsgu_cli.sets.requests import with_collection

    store, console = session.store, session.console
    if replay:
        show_replayed(console, build.replay(store, _replayed(session, request)))
        return
    if "prompts" not in images:
        images.refuse("for --generate", hint="--generate PROMPT", shared=[request])
    if "metadata" not in metadata:
        metadata.refuse("for --metadata", hint="--metadata PARQUET")
    wanted, concepts = _wanted(request.record(), names)
    if "prompts" in images:
        from slsgu_cli.targets.generated_sets import forgetting_generated

        wanted = forgetting_generated(store, wanted, replace(images.record(), seed=wanted.seed))
    wanted = with_collection(wanted, concepts, metadata.record())
    if not concepts:
        show_manifest(console, build.build_sets(store, wanted))
        return
    built, failed = build.build_many(store, wanted, concepts)
    columns = (
        Column("set", "name"),
        Column("forget", "forget.rows"),
        Column("retain", "retain.rows"),
        Column("left out of forget", lambda manifest: counted(manifest.forget.refused)),
    )
    console.table("sets", columns, built, title="sets", data=list(built))
    build.require_all(failed)


def _replayed(session: Session, request: ParsedOptions[BuildRequest]) -> str:
    """Return the name of the set to rebuild. Raises UsageError if there are other options."""
    if "name" not in request:
        raise UsageError("--replay needs the name of a set", hint="slsgu build-sets NAME --replay")
    if others := [name for name in session.options if name != "--replay"]:
        raise UsageError(
            "--replay uses the original options of a set and takes no other options: "
            f"not {', '.join(others)}",
            hint="remove --replay to build a new set",
        )
    return str(request.values["name"])


def _wanted(request: BuildRequest, names: str | None) -> tuple[BuildRequest, "list[Concept]"]:
    """Return the request for the first concept of a file of names, and all its concepts."""
    if bool(request.name) == (names is not None):
        raise UsageError("build-sets needs either NAME or --names FILE")
    if not request.model.name:
        raise UsageError("build-sets needs the model the sets are for", hint="--model MODEL")
    if names is None:
        return request, []
    concepts = read_names(names)
    first = concepts[0].name
    return replace(request, name=first, concept=request.concept or first), concepts


def show_manifest(console: Console, built: SetManifest) -> None:
    """Print the parts of a set: rows, rows read, and rows excluded by reason."""
    parts = {"forget": built.forget, "retain": built.retain}
    parts |= {f"eval {name}": ref for name, ref in sorted(built.evals.items())}
    rows = [
        (
            part,
            ref.rows,
            ref.seen,
            ", ".join(f"{count} {reason}" for reason, count in ref.refused.items() if count),
            ref.path,
        )
        for part, ref in parts.items()
    ]
    columns = ("part", "rows", "seen", "left out", Column("path", on_terminal=False))
    console.table("set", columns, rows, title=f"set {built.name}", data=built)


def show_replayed(console: Console, result: "Replayed") -> None:
    """Print whether a rebuilt set equals the original."""
    cells = [(part, "same rows" if same else "other rows") for part, same in result.same.items()]
    title = f"set {result.manifest.name}, built again"
    console.table("replayed", ("part", "rows"), cells, title=title)
    for part, same in result.same.items():
        if not same:
            console.warn(f"the {part} rows differ from the original ones: a source has changed")
