"""The commands `ls`, `check` and `gc`."""

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.formats import artifact_name, file_size
from slsgu_cli.cli.usage import ParsedOptions
from slsgu_cli.errors import (
    AbsentError,
    InputError,
    MissingError,
    UsageError,
)
from slsgu_cli.records.option_fields import (
    OUTPUT,
    Option,
)
from slsgu_cli.records.options import (
    StrengthOptions,
)
from slsgu_cli.records.sets import LOCAL

if TYPE_CHECKING:
    from slsgu_cli.engine.find_edits import FoundEdit
    from slsgu_cli.store.catalog import Entry
    from slsgu_cli.store.check import Checked, Finding
    from slsgu_cli.store.store import Store


@command("ls")
def ls(session: Session) -> None:
    """Example: slsgu ls --json"""
    from slsgu_cli.store.catalog import entries

    if not session.store.exists(""):
        session.console.note(f"there is no store {session.store.where('').rstrip('/')} yet")
    listed = entries(session.store)
    columns = (
        Column("kind"),
        Column("name", shown=artifact_name),
        Column("bytes", "size", shown=file_size, label="size"),
        Column("state"),
        Column("reason", on_terminal=False),
        Column("made from", partial(_origin, session.console)),
    )
    session.console.table("store", columns, listed, data=listed)


def _origin(console: Console, entry: "Entry") -> str:
    # On a terminal there is no space for the reasons in a column of their own.
    reason = f"{entry.reason}; " if entry.reason and console.on_terminal else ""
    return reason + entry.summary()


@command("check")
def check(
    session: Session,
    names: Annotated[
        Sequence[str],
        Option(
            metavar="NAME|FILE...",
            help="Sets, edits or artifact files; with --edit, a model.",
        ),
    ] = (),
    edit: Annotated[
        Sequence[str],
        Option(
            ("--edit",),
            "Check whether the model contains this edit: a name or a file.",
            OUTPUT,
            metavar="EDIT",
        ),
    ] = (),
    *,
    strength: ParsedOptions[StrengthOptions],
    repair: Annotated[
        bool,
        Option(
            ("--repair",),
            "Remove damaged artifacts that can be recomputed, and unfinished writes.",
            OUTPUT,
        ),
    ] = False,
    irreplaceable: Annotated[
        bool,
        Option(
            ("--irreplaceable",),
            "With --repair, also remove artifacts that cannot be recomputed.",
            OUTPUT,
        ),
    ] = False,
) -> None:
    """Reads artifacts and compares them with their digests; without names, the whole store. The
    exit code is 3 if an artifact is damaged.

    With --edit, checks whether a checkpoint contains the edit: the exit code is 0 if it does, 5
    if it does not, and 3 if its weights are different ones.

    Example: slsgu check --repair
    """
    from slsgu_cli.clip.models import has_model
    from slsgu_cli.store.check import check as run

    if edit:
        if len(names) != 1 or repair or irreplaceable:
            raise UsageError(
                "--edit takes one model and cannot be combined with --repair",
                hint="slsgu check MODEL --edit NAME",
            )
        from slsgu_cli.engine.find_edits import find_edits

        model = Path(names[0].removeprefix(LOCAL))
        found = find_edits(session.store, edit, model, strength.record())
        show_presence(session.console, found, model)
        return
    strength.refuse("for --edit", hint="slsgu check MODEL --edit NAME")
    if not names:
        _require_store(session.store)
    if irreplaceable and not repair:
        raise UsageError("--irreplaceable requires --repair", hint="--repair --irreplaceable")
    checked = run(
        session.store, names, repair=repair, irreplaceable=irreplaceable, has_model=has_model
    )
    show_checked(session.console, checked)


def _require_store(store: "Store") -> None:
    """Raise MissingError if the store does not exist, so that typos do not look like success."""
    if not store.exists(""):
        raise MissingError(
            f"there is no store {store.where('').rstrip('/')}",
            hint="set --store or SLSGU_STORE",
        )


def show_checked(console: Console, result: "Checked") -> None:
    """Print the findings of a check. Raises InputError if an artifact is damaged."""
    from slsgu_cli.store.catalog import Standing

    _findings(console, "check", result.findings)
    counts = Counter(str(found.state) for found in result.findings if not found.removed)
    summary = ", ".join(f"{count} {state}" for state, count in counts.items()) or "all is well"
    read = f"read {result.artifacts} artifacts, {file_size(result.size)}"
    removed = sum(found.removed for found in result.findings)
    console.note(f"{read}: {summary}" + (f"; {removed} removed" if removed else ""))
    damaged = [one for one in result.findings if one.state is Standing.DAMAGED and not one.removed]
    if not damaged:
        return
    again = any(found.removable for found in damaged)
    raise InputError(
        f"{len(damaged)} artifact{'' if len(damaged) == 1 else 's'} damaged",
        hint="run `slsgu check --repair`, then the commands listed"
        if again
        else "run the commands listed, or restore copies; "
        "--repair --irreplaceable removes unreadable artifacts",
    )


def show_presence(console: Console, found: "Sequence[FoundEdit]", model: Path) -> None:
    """Print which edits a model contains. Raises AbsentError or InputError if one is missing."""
    from slsgu_cli.engine.find_edits import Presence

    columns = (
        Column("edit", "name"),
        Column("is", "presence"),
        Column("layer", shown=known_as),
        "dtype",
        "file",
    )
    console.table("edits", columns, found, title=f"edits in {model}", data=list(found))
    others = [one for one in found if one.presence is Presence.OTHER]
    for one in others[:1]:
        along = one.share is not None
        raise InputError(
            f"{one.layer} in {one.file} has neither the original weights nor those of the edit "
            f"{one.name}",
            hint=f"the weights match the edit at scale {one.share:.4g}: --scale {one.share:.4g}"
            if along
            else "name all edits of this layer, with their --scale or --rank",
        )
    absent = [one for one in found if one.presence is Presence.ABSENT]
    for one in absent[:1]:
        raise AbsentError(
            f"the edit {one.name} is not in {one.file}: {one.layer} has its original weights"
        )


@command("gc")
def gc(
    session: Session,
    yes: Annotated[bool, Option(("--yes", "-y"), "Remove the listed artifacts.", OUTPUT)] = False,
) -> None:
    """Example: slsgu gc --yes"""
    from slsgu_cli.store.check import garbage, remove

    _require_store(session.store)
    found = garbage(session.store)
    if yes:
        found = remove(session.store, found)
    _findings(session.console, "unused", found)
    size = file_size(sum(one.size for one in found))
    if yes:
        session.console.note(f"removed {size}")
    elif found:
        session.console.note(f"{size} can be freed; --yes removes them")


def _findings(console: Console, key: str, found: "Sequence[Finding]") -> None:
    columns = (
        Column("state"),
        Column("kind"),
        Column("name", shown=artifact_name),
        Column("bytes", "size", shown=file_size, label="size"),
        Column("reason"),
        Column("to mend it", "mend"),
        Column("removed"),
    )
    console.table(key, columns, found, data=list(found))
