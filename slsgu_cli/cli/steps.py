"""The five steps, and what goes with them: each command parses, calls, prints.

Nothing heavy is imported here: every command imports what it needs when it runs.
"""

from collections.abc import Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.cli.app import Name, Names, Session, command
from slsgu_cli.cli.usage import Asked
from slsgu_cli.errors import MissingError, UsageError
from slsgu_cli.records.figures import Assertion, read_assertions, require_known
from slsgu_cli.records.options import (
    ApplyRequest,
    BuildRequest,
    MetadataSource,
    PassOptions,
    RankOptions,
    SearchOptions,
    StrengthOptions,
)
from slsgu_cli.records.sets import LOCAL, ModelSpec, ShowOptions, read_names
from slsgu_cli.records.targets import SourceRequest, TargetSearchOptions
from slsgu_cli.records.words import DEVICE_OPTION, EVALUATION, MODEL, OUTPUT, ROWS, SEARCH, Option

if TYPE_CHECKING:
    from slsgu_cli.cli.console import Console
    from slsgu_cli.records.sets import Concept
    from slsgu_cli.sets.inspection import InspectedRow, Inspection
    from slsgu_cli.store.store import Store


NamesFile = Annotated[
    str | None,
    Option(
        ("--names",),
        "File of many names: NAME<tab>alias<tab>!exclusion a line.",
        ROWS,
        metavar="FILE",
        without="NAME alone",
    ),
]
Replay = Annotated[
    bool, Option(("--replay",), "Build NAME again as it was built, dropped rows too.", ROWS)
]


@command("build-sets")
def build_sets(
    session: Session,
    request: Asked[BuildRequest],
    metadata: Asked[MetadataSource],
    images: Asked[SourceRequest],
    names: NamesFile = None,
    replay: Replay = False,
) -> None:
    """Example: slsgu build-sets facebook -m local-dir:clip -s laion.tar --eval brands=test.tar"""
    from slsgu_cli.cli import tables
    from slsgu_cli.sets import build
    from slsgu_cli.sets.replay import replay as rebuild
    from slsgu_cli.sets.requests import with_collection

    store, console = session.store, session.console
    if replay:
        tables.replayed(console, rebuild(store, _replayed(session, request)))
        return
    if "prompts" not in images:
        images.refuse("for --generate", hint="--generate PROMPT", beside=[request])
    if "metadata" not in metadata:
        metadata.refuse("for --metadata", hint="--metadata PARQUET")
    wanted, concepts = _wanted(request.record(), names)
    if "prompts" in images:
        from slsgu_cli.targets.generated_sets import forgetting_generated

        wanted = forgetting_generated(store, wanted, replace(images.record(), seed=wanted.seed))
    wanted = with_collection(wanted, concepts, metadata.record())
    if not concepts:
        tables.manifest(console, build.build_sets(store, wanted))
        return
    built, failed = build.build_many(store, wanted, concepts)
    tables.manifests(console, built)
    build.require_all(failed)


def _replayed(session: Session, request: Asked[BuildRequest]) -> str:
    """Return the name to build again. Raises UsageError where more is asked for."""
    if "name" not in request:
        raise UsageError("--replay needs the name of a set", hint="slsgu build-sets NAME --replay")
    if others := [name for name in session.options if name != "--replay"]:
        raise UsageError(
            "--replay builds a set as it was built and takes no other options: "
            f"not {', '.join(others)}",
            hint="leave --replay out to build another",
        )
    return str(request.words["name"])


def _wanted(request: BuildRequest, names: str | None) -> tuple[BuildRequest, "list[Concept]"]:
    """Return the request with the first of a file of names, and all of these."""
    if bool(request.name) == (names is not None):
        raise UsageError("build-sets needs either NAME or --names FILE")
    if not request.model.name:
        raise UsageError("build-sets needs the model the sets are for", hint="--model MODEL")
    if names is None:
        return request, []
    concepts = read_names(names)
    first = concepts[0].name
    return replace(request, name=first, concept=request.concept or first), concepts


@command("show")
def show(session: Session, name: Name, options: ShowOptions) -> None:
    """Example: slsgu show facebook --drop 000000012"""
    from slsgu_cli.sets.dropped_rows import drop_from_set, read_keys
    from slsgu_cli.sets.inspection import inspect_set

    part = options.part
    wanted = [*options.drop, *(read_keys(options.drop_from) if options.drop_from else ())]
    if wanted:
        drop_from_set(session.store, name, wanted, part=part)
        session.console.note(f"{part} of {name} has other rows now; what was made of it is stale")
    seen = inspect_set(session.store, name, part=part, images=options.images)
    show_inspection(session.console, session.store, seen)


@command("grad")
def grad(
    session: Session,
    name: Name,
    options: PassOptions,
    model: ModelSpec | None = None,
    squares: Annotated[
        bool, Option(("--squares",), "Mean squared mini-batch gradients as well (slower).", MODEL)
    ] = False,
    adversarial: Annotated[
        bool, Option(("--adversarial",), "Prefixes that `verify` found, and random ones.", ROWS)
    ] = False,
) -> None:
    """Example: slsgu grad facebook"""
    from slsgu_cli.cli import tables
    from slsgu_cli.engine.gradients import adversarial_prefixes, compute_gradients

    if adversarial:
        found = adversarial_prefixes(session.store, name)
        options = replace(options, prefixes=(*options.prefixes, *found))
    result = compute_gradients(session.store, name, model=model, options=options, squares=squares)
    tables.gradients(session.console, result)


@command("rank")
def rank(session: Session, name: Name, options: RankOptions) -> None:
    """Example: slsgu rank facebook --tower vision --json"""
    from slsgu_cli.cli import tables
    from slsgu_cli.engine.plots import rank_and_plot

    ranking, plots = rank_and_plot(session.store, name, options=options)
    tables.ranking(session.console, ranking, plots)


@command("search")
def search(
    session: Session,
    names: Names,
    options: Asked[SearchOptions],
    on_target: Asked[TargetSearchOptions],
    joint: Annotated[
        bool, Option(("--joint",), "Search edits that forget all of them together.", SEARCH)
    ] = False,
) -> None:
    """Several sets are searched one after another; with --joint, for edits that forget all
    their concepts together. With --target, on what a model built on CLIP generates or answers.

    Example: slsgu search facebook --criterion fa5
    """
    if "target" in on_target:
        from slsgu_cli.cli.downstream import search_on_target
        from slsgu_cli.processes import refuse_several

        refuse_several("search --target")
        if joint:
            raise UsageError("--joint is for a search on CLIP", hint="leave --target out")
        options.refuse("for a search on CLIP", hint="leave --target out", beside=[on_target])
        search_on_target(session, names, on_target.record())
        return
    from slsgu_cli.cli.study import search_jointly, search_sets

    on_target.refuse(
        "for a search on a model built on CLIP",
        hint="slsgu search NAME --target FOLDER",
        beside=[options],
    )
    run = search_jointly if joint else search_sets
    run(session, names, options.record())


@command("apply")
def apply(session: Session, request: ApplyRequest) -> None:
    """Example: slsgu apply facebook --target stable-diffusion --out sd-without-facebook"""
    from slsgu_cli.cli import tables
    from slsgu_cli.engine.apply import apply as run

    tables.applied(session.console, run(session.store, request))


@command("eval")
def evaluate(
    session: Session,
    names: Names,
    model: ModelSpec | None = None,
    device: Annotated[str, DEVICE_OPTION] = "auto",
    assertions: Annotated[
        Sequence[Assertion],
        Option(
            ("--assert",),
            "Exit with 5 unless so: fa1<=0, ta1.SET>=75, loss.SET<=0.5.",
            EVALUATION,
            metavar="ASSERTION",
            read=read_assertions,
        ),
    ] = (),
) -> None:
    """The original model is compared with --model, or else with the edits of the sets in
    memory.

    Example: slsgu eval facebook --model local-dir:clip-without-facebook
    """
    from slsgu_cli.cli import tables
    from slsgu_cli.store.artifacts import Artifact, read_manifest

    compared = model is not None or session.store.exists(Artifact.EDIT.path(names[0]))
    sets = read_manifest(session.store, names[0]).evals if assertions else ()
    require_known(assertions, names, sets, compared=compared)
    from slsgu_cli.engine import evaluate as evaluation

    result = evaluation.evaluate(session.store, names, model=model, device=device)
    tables.evaluated(session.console, result)
    tables.asserted(session.console, result, assertions)


@command("ls")
def ls(session: Session) -> None:
    """Example: slsgu ls --json"""
    from slsgu_cli.cli import tables
    from slsgu_cli.store.catalog import entries

    if not session.store.exists(""):
        session.console.note(f"there is no store {session.store.where('').rstrip('/')} yet")
    tables.listing(session.console, entries(session.store))


@command("check")
def check(
    session: Session,
    names: Annotated[
        Sequence[str],
        Option(
            metavar="NAME|FILE...",
            help="Sets, edits or files of artifacts; with --edit, a model.",
            completes="edit",
        ),
    ] = (),
    edit: Annotated[
        Sequence[str],
        Option(("--edit",), "Is this edit in the model? Name or file.", OUTPUT, metavar="EDIT"),
    ] = (),
    *,
    strength: Asked[StrengthOptions],
    repair: Annotated[
        bool,
        Option(("--repair",), "Remove what is damaged and made again, and dead writes.", OUTPUT),
    ] = False,
    irreplaceable: Annotated[
        bool,
        Option(("--irreplaceable",), "With --repair: what no command makes again too.", OUTPUT),
    ] = False,
) -> None:
    """Everything is read, and compared with the digests it carries. Without names, all of the
    store is. Exit code 3 where something is damaged.

    With --edit, a checkpoint is compared with it: exit code 0 where the edit is in it, 5 where
    it is not, 3 where other weights are.

    Example: slsgu check --repair
    """
    from slsgu_cli.cli import tables
    from slsgu_cli.clip.models import has_model
    from slsgu_cli.store.check import check as run

    if edit:
        if len(names) != 1 or repair or irreplaceable:
            raise UsageError(
                "--edit is looked for in one model, and nothing is repaired",
                hint="slsgu check MODEL --edit NAME",
            )
        from slsgu_cli.engine.find_edits import find_edits

        model = Path(names[0].removeprefix(LOCAL))
        found = find_edits(session.store, edit, model, strength.record())
        tables.presence(session.console, found, model)
        return
    strength.refuse("for --edit", hint="slsgu check MODEL --edit NAME")
    if not names:
        _require_store(session.store)
    if irreplaceable and not repair:
        raise UsageError("--irreplaceable goes with --repair", hint="--repair --irreplaceable")
    checked = run(
        session.store, names, repair=repair, irreplaceable=irreplaceable, has_model=has_model
    )
    tables.checked(session.console, checked)


def _require_store(store: "Store") -> None:
    """Raise MissingError where no store is: a mistyped one is not well."""
    if not store.exists(""):
        raise MissingError(
            f"there is no store {store.where('').rstrip('/')}",
            hint="name it with --store or SLSGU_STORE",
        )


@command("gc")
def gc(
    session: Session,
    yes: Annotated[bool, Option(("--yes", "-y"), "Remove what is listed.", OUTPUT)] = False,
) -> None:
    """Example: slsgu gc --yes"""
    from slsgu_cli.cli import tables
    from slsgu_cli.store.check import garbage, remove

    _require_store(session.store)
    found = garbage(session.store)
    tables.unused(session.console, remove(session.store, found) if yes else found)


CAPTIONS_SHOWN = 12


def show_inspection(console: "Console", store: "Store", seen: "Inspection") -> None:
    """Print what a part of a set holds and where it comes from."""
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


def show_rows(console: "Console", shown: Sequence["InspectedRow"]) -> None:
    """Print rows with their captions and origins; on a terminal the first of them."""
    from slsgu_cli.cli.console import Column

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
        console.note(f"{len(shown) - len(brief)} more rows; -v shows them too")
