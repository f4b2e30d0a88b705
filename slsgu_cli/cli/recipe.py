"""Whole jobs: recipes and their requests, the demonstration, and what a job runs on.

`slsgu demo` calls what the commands call, with the options it prints at the end, so a reader
can repeat every step by hand.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from slsgu_cli.checkpoints.layers import known_as
from slsgu_cli.cli.app import Session, command
from slsgu_cli.cli.formats import brief_state
from slsgu_cli.errors import InputError, UsageError, near
from slsgu_cli.figures.html import percent, roughly
from slsgu_cli.records.options import ApplyRequest, BuildRequest, DemoOptions, PassOptions
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.records.words import OUTPUT, Option, command_line

if TYPE_CHECKING:
    from slsgu_cli.cli.console import Console
    from slsgu_cli.recipes import RunEvent, RunResult
    from slsgu_cli.records.recipe import LedgerRow
    from slsgu_cli.study.recipe import PlannedStep

RecipeFile = Annotated[Path, Option(metavar="RECIPE", help="File of a recipe, in TOML.")]

DATA = Path(__file__).parents[1] / "demo"
RETAIN_SAMPLES = 800
LINE = 100


@command("demo")
def demo(session: Session, options: DemoOptions) -> None:
    """Example: slsgu demo castle --criterion fa5"""
    from slsgu_cli.cli.apply import show_applied
    from slsgu_cli.cli.build_sets import show_manifest
    from slsgu_cli.cli.evaluate import show_before_after
    from slsgu_cli.cli.grad import show_gradients
    from slsgu_cli.cli.rank import show_ranking
    from slsgu_cli.cli.search import chosen_figures, show_search
    from slsgu_cli.clip.models import pick_device
    from slsgu_cli.method.edit import apply, rank_and_plot, require_forgotten, search_and_plot
    from slsgu_cli.method.evaluate import draw_examples
    from slsgu_cli.method.gradients import compute_gradients
    from slsgu_cli.sets.build import build_sets
    from slsgu_cli.store.artifacts import plot_path

    store, console = session.store, session.console
    request = demo_request(options.concept)
    name, concept = request.name, request.concept
    device = pick_device(options.search.device)

    console.note(
        f"1/5 build-sets: icons of {concept!r} to forget, others to keep and to measure on"
    )
    manifest = build_sets(store, request)
    show_manifest(console, manifest)
    console.note("\n2/5 grad: one gradient pass over the forget set and one over the retain set")
    passes = PassOptions(device=device)
    show_gradients(console, compute_gradients(store, name, model=None, options=passes))
    console.note(
        "\n3/5 rank: the layers that matter much to the concept (importance) "
        "and little to the rest (alignment)"
    )
    ranked = replace(options.ranking, device=device)
    ranking, plots = rank_and_plot(store, name, options=ranked)
    show_ranking(console, ranking, plots, front_only=True)
    console.note(
        "\n4/5 search: for each of these layers, the step at which the concept is forgotten"
    )
    search = replace(options.search, device=device)
    result = search_and_plot(store, name, options=search)
    show_search(console, store, result, brief=True)
    require_forgotten(result)
    console.note("\n5/5 apply: a copy of the checkpoint with one layer moved")
    out = Path(store.root if store.is_local else ".") / "checkpoints" / f"clip-without-{name}"
    edited = apply(store, ApplyRequest(names=[name], out=out, overwrite=True))
    show_applied(console, edited)

    after = ModelSpec(f"{LOCAL}{out}")
    picture = plot_path(name, "before-after")
    drawn = draw_examples(store, manifest, before=manifest.model, after=after, device=device)
    store.write_bytes(picture, drawn)
    show_before_after(console, chosen_figures(result))
    console.paths("pictures", [store.where(picture)])
    commands = _commands(request, store.url, options, out)
    console.value(
        "commands",
        "\nThe same, command by command; put your own model and images in their place:\n\n"
        + "\n".join(f"  {_folded(words)}" for words in commands),
        data=[shlex.join(words) for words in commands],
    )


def demo_request(concept: str) -> BuildRequest:
    """Return what to build for one of the embedded classes. Raises UsageError."""
    classes: dict[str, list[str]] = json.loads((DATA / "classes.json").read_text())
    known = [name for names in classes.values() for name in names]
    if concept not in known:
        raise UsageError(
            f"the embedded CLIP knows 301 brands and objects, and {concept!r} is not one of them",
            hint=near(concept, known) or f"such as {', '.join(known[:6])}",
        )
    heldout, templates = DATA / "heldout.parquet", str(DATA / "templates.txt")
    return BuildRequest(
        name=concept,
        concept=concept,
        model=ModelSpec(f"{LOCAL}{DATA / 'clip'}"),
        sources=[f"{DATA / 'train.parquet'}?concept={concept}"],
        retain_sources=[str(DATA / "train.parquet")],
        retain_samples=RETAIN_SAMPLES,
        evals={"brands": f"{heldout}?kind=brand", "objects": f"{heldout}?kind=object"},
        templates={"brands": templates, "objects": templates},
    )


def _commands(
    request: BuildRequest, store: str, options: DemoOptions, out: Path
) -> list[list[str]]:
    """Return the words of each command that does what the demo did."""
    from slsgu_cli.sets.build import build_command

    name = request.name
    direction = command_line(options.ranking, fields=("direction", "damping"))
    criterion = command_line(options.search, fields=("criterion",), also=("criterion",))
    return [
        ["export", f"SLSGU_STORE={store}"],
        build_command(request),
        ["slsgu", "grad", name],
        ["slsgu", "rank", name, *direction],
        ["slsgu", "search", name, *criterion],
        ["slsgu", "apply", name, "--out", f"{out}-again"],
        ["slsgu", "eval", name, "--model", f"{LOCAL}{out}"],
    ]


def _folded(words: Sequence[str]) -> str:
    """Return a command for the shell, a long one with a line for each option."""
    line = shlex.join(words)
    if len(line) <= LINE:
        return line
    return "".join(
        f" \\\n      {shlex.quote(word)}" if word.startswith("--") else f" {shlex.quote(word)}"
        for word in words
    ).lstrip()


BEGIN = """\
# What is to be removed from which model, how that is measured, and what is written.
# `slsgu run {file} --plan` shows what it takes, `slsgu run {file}` does it.
# Keys are the options of the commands: `slsgu build-sets --help` has those of [sets].
# Paths are as on the command line: from the folder that the command runs in.

model = {model}
# pretrained = "laion2b_s34b_b79k"  # weights of a model that is named
# together = "joint"                # "sum": each alone, "after": each on top of the others
bounds = ["fa1 <= 0"{bounds}]  # of every request; exit code 5 where one is not met

[sets]
sources = [{source}]  # {{}} stands for the concept
{retain}
[evaluation.brands]  # labelled images to measure on; half of each class chooses nothing
source = {rows}
{templates}
[search]
criterion = "fa5"  # or "fa1"

[outputs]
checkpoint = {checkpoint}
edits = {edits}
report = {report}
"""
REQUEST = """
[[request]]
name = {name}
# aliases = ["other words"]       # captions with these words are of it too
# exclusions = ["of other things"]
# id = "R-17"
received = 2026-11-01
# reference = "what the requester knows it by"
# bounds = ["loss.brands <= 1"]
"""


@command("init")
def init(
    session: Session,
    path: Annotated[
        Path, Option(metavar="FILE", help="Where the recipe goes: recipe.toml without it.")
    ] = Path("recipe.toml"),
    demo: Annotated[
        bool, Option(("--demo",), "Three brands and the embedded CLIP; it runs as it is.", OUTPUT)
    ] = False,
    overwrite: Annotated[
        bool, Option(("--overwrite",), "Replace what is at FILE.", OUTPUT)
    ] = False,
) -> None:
    """Example: slsgu init brands.toml --demo && slsgu run brands.toml"""
    from slsgu_cli.store.files import replacing, require_regular

    require_regular(path)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already", hint="another FILE, or --overwrite")
    with replacing(path) as partial:
        partial.write_text(recipe_text(path, demo=demo), encoding="utf-8")
    session.console.paths("files", [str(path)])
    session.console.note(f"now: slsgu run {shlex.quote(str(path))} --plan")


def recipe_text(path: Path, *, demo: bool) -> str:
    """Return the text of a recipe to begin from."""
    # Each as a user will have it, and as the demonstration does.
    places = {
        "model": (f"{LOCAL}my-clip", f"{LOCAL}{DATA / 'clip'}"),
        "source": ("my-pairs/*.tar", f"{DATA / 'train.parquet'}?concept={{}}"),
        "rows": ("my-brands.parquet", f"{DATA / 'heldout.parquet'}?kind=brand"),
        "checkpoint": ("my-clip-without-them", f"{path.stem}/checkpoint"),
        "edits": ("edits", f"{path.stem}/edits"),
        "report": ("report.html", f"{path.stem}/report.html"),
    }
    quoted = {key: json.dumps(ours if demo else own) for key, (own, ours) in places.items()}
    names, retain, templates, bounds = ["facebook"], "# retain_samples = 8000\n", "", ""
    if demo:
        names = ["facebook", "spotify", "github"]
        train = json.dumps(str(DATA / "train.parquet"))
        retain = f"retain_sources = [{train}]\nretain_samples = {RETAIN_SAMPLES}\n"
        templates = f"templates = {json.dumps(str(DATA / 'templates.txt'))}\n"
        bounds = ', "loss.brands <= 2"'
    text = BEGIN.format(file=path, retain=retain, templates=templates, bounds=bounds, **quoted)
    return text + "".join(REQUEST.format(name=json.dumps(name)) for name in names)


@command("run")
def run(
    session: Session,
    recipe: RecipeFile,
    plan: Annotated[
        bool, Option(("--plan",), "Show what is there and what is to be done; do nothing.", OUTPUT)
    ] = False,
    json_lines: Annotated[
        bool, Option(("--json-lines",), "Print an event a line, as JSON.", OUTPUT)
    ] = False,
) -> None:
    """What is done already is not done again, so the same command goes on with a run that was
    interrupted, and takes in requests that were added to the recipe or taken out of it. Exit
    code 5 where a bound is not met.

    Example: slsgu run brands.toml --plan
    """
    from slsgu_cli import recipes

    console = session.console
    console.streams = json_lines
    if json_lines and (console.as_json or plan):
        raise UsageError(
            "--json-lines is for a run that prints nothing else", hint="leave --json or --plan out"
        )
    if plan:
        show_plan(console, recipes.plan(recipe, store=session.store))
        return

    def tell(event: "RunEvent") -> None:
        if json_lines:
            console.value("event", json.dumps(asdict(event)))

    result = recipes.run(recipe, store=session.store, tell=tell)
    if json_lines:
        said = {"event": "result", "figures": result.figures}
        bounds = [{"request": row.name, **asdict(c)} for row in result.rows for c in row.checks]
        console.value("event", json.dumps({**said, "bounds": bounds}))
    else:
        show_run(console, result)
    recipes.require_met(result)


@command("requests")
def requests(session: Session, recipe: RecipeFile) -> None:
    """Example: slsgu requests brands.toml --json"""
    from slsgu_cli.recipes import requests_of

    show_requests(session.console, requests_of(recipe, store=session.store))


def show_plan(console: "Console", planned: "Sequence[PlannedStep]") -> None:
    """Print every step of a recipe: what is done, what is to be done and why."""
    from rich.filesize import decimal

    from slsgu_cli.cli.console import Column

    def shown(size: int) -> str:
        return decimal(size) if size else ""

    def state(each: "PlannedStep") -> str:
        if each.trouble:
            return "cannot"
        return "to do" if each.why else "done"

    rows = [
        (
            each.step.stage,
            ",".join(each.step.names),
            each.step.about,
            state(each),
            each.seconds,
            each.memory,
            each.disk,
            each.trouble or each.why,
        )
        for each in planned
    ]
    columns = (
        "stage",
        Column("requests", on_terminal=False),
        "for",
        "state",
        Column("seconds", shown=lambda s: f"{s:.0f}" if s else "", label="~ s"),
        Column("memory", shown=shown, label="~ memory"),
        Column("disk", shown=shown, label="~ disk"),
        "why",
    )
    left = [each for each in planned if each.why]
    title = f"{len(planned) - len(left)} of {len(planned)} steps are done"
    console.table("plan", columns, rows, title=title)
    seconds = sum(each.seconds or 0.0 for each in left)
    memory = max((each.memory or 0 for each in left), default=0)
    disk = sum(each.disk or 0 for each in left)
    estimates = [
        f"{seconds:.0f} s" if seconds else "",
        f"up to {decimal(memory)} of memory" if memory else "",
        f"{decimal(disk)} of disk" if disk else "",
    ]
    if known := ", ".join(filter(None, estimates)):
        console.note(f"estimates, by what is there: {known}; nothing is known where it says -")


def show_run(console: "Console", result: "RunResult") -> None:
    """Print what a recipe has come to: figures, bounds, requests."""
    from slsgu_cli.cli.console import Column

    ledger = result.ledger
    rows = [
        (name, ledger.original[name], value, round(value - ledger.original[name], 6))
        for name, value in ledger.figures.items()
        if name not in ("fa1", "fa5") and not name.startswith("loss.")
    ]
    columns = (
        Column("figure"),
        *(Column(name, shown=percent) for name in ("original", "now", "change")),
    )
    console.table("figures", columns, rows, title="on images that nothing was chosen by")
    checks = [
        (row.name, check.bound, check.figure, "holds" if check.holds else "fails")
        for row in result.rows
        for check in row.checks
    ]
    if checks:
        head = ("request", "bound", Column("figure", shown=percent), "result")
        console.table("bounds", head, checks, title="bounds")
    show_requests(console, ledger.rows)
    places = astuple(result.recipe.outputs)
    if result.done or console.as_json:
        console.paths("files", [str(place) for place in places if place is not None])
    else:
        console.note("everything was done already")


def show_requests(console: "Console", rows: "Sequence[LedgerRow]") -> None:
    """Print the requests of a ledger with what became of them."""
    from slsgu_cli.cli.console import Column

    listed = [
        (
            row.name,
            row.id,
            row.received,
            row.reference,
            row.state,
            row.events[-1].day if row.events else None,
            row.layer,
            row.before.top1 if row.before else None,
            row.after.top1 if row.after else None,
            row.events[-1].digests.get("edit") if row.events else None,
            row.note,
        )
        for row in rows
    ]
    columns = (
        "request",
        "id",
        "received",
        "reference",
        Column("state", shown=brief_state),
        "since",
        Column("layer", shown=known_as),
        Column("FA@1 before", shown=roughly, on_terminal=False),
        Column("FA@1 after", shown=roughly, label="FA@1 now"),
        Column("edit", on_terminal=False),
        Column("note", on_terminal=False),
    )
    console.table("requests", columns, listed, title="requests", data=list(rows))


# What may be installed beside slsgu: the packages of each extra, and what they are for.
EXTRAS = {
    "targets": (("diffusers", "transformers"), "pipelines and LLaVA: criterion, generate, ask"),
    "s3": (("s3fs",), "stores and sources on S3"),
    "download": (("img2dataset",), "build-sets --metadata"),
}
PACKAGES = (
    "torch",
    "torchvision",
    "open_clip_torch",
    "numpy",
    "pyarrow",
    "zarr",
    "safetensors",
    "pillow",
    "fsspec",
    "matplotlib",
    "typer",
    "rich",
)


@command("env")
def env(session: Session) -> None:
    """Example: slsgu env --json"""
    import os
    import platform

    import torch

    import slsgu_cli
    from slsgu_cli.clip.models import device_name

    versions = [("python", platform.python_version()), ("system", platform.platform())]
    versions.append(("slsgu", slsgu_cli.__version__))
    versions += [(name, _version(name) or "missing") for name in PACKAGES]
    session.console.table("versions", ("package", "version"), versions, title="versions")
    devices = [("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads")]
    devices += [(f"cuda:{i}", device_name(f"cuda:{i}")) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(("mps", device_name("mps")))
    session.console.table("devices", ("device", "what"), devices, title="devices")
    extras = [
        (extra, name, _version(name) or "not installed", split)
        for extra, (names, split) in EXTRAS.items()
        for name in names
    ]
    columns = ("extra", "package", "version", "for")
    session.console.table("extras", columns, extras, title="extras: pip install 'slsgu[EXTRA]'")


def _version(package: str) -> str | None:
    """Return the version of a package that is installed; None of one that is not."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None
