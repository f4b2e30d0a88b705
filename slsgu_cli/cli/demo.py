"""What `slsgu demo` does: the whole job on the embedded CLIP and icons.

It calls what the commands call, with the options it prints at the end, so a reader can
repeat every step by hand.
"""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slsgu_cli.cli import tables
from slsgu_cli.cli.app import Session
from slsgu_cli.clip.models import LOCAL, pick_device
from slsgu_cli.errors import UsageError, near
from slsgu_cli.records.options import ApplyRequest, BuildRequest, DemoOptions, PassOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.words import command_line

DATA = Path(__file__).parents[1] / "demo"
RETAIN_SAMPLES = 800
LINE = 100


def demonstrate(session: Session, options: DemoOptions) -> None:
    """Forget one of the embedded classes, and show each step's result.

    Raises UsageError for a concept the embedded model does not know.
    """
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
    tables.manifest(console, manifest)
    console.note("\n2/5 grad: one gradient pass over the forget set and one over the retain set")
    passes = PassOptions(device=device)
    tables.gradients(console, compute_gradients(store, name, model=None, options=passes))
    console.note(
        "\n3/5 rank: the layers that matter much to the concept (importance) "
        "and little to the rest (alignment)"
    )
    ranked = replace(options.ranking, device=device)
    ranking, plots = rank_and_plot(store, name, options=ranked)
    tables.ranking(console, ranking, plots, front_only=True)
    console.note(
        "\n4/5 search: for each of these layers, the step at which the concept is forgotten"
    )
    search = replace(options.search, device=device)
    result = search_and_plot(store, name, options=search)
    tables.search(console, store, result, brief=True)
    require_forgotten(result)
    console.note("\n5/5 apply: a copy of the checkpoint with one layer moved")
    out = Path(store.root if store.is_local else ".") / "checkpoints" / f"clip-without-{name}"
    edited = apply(store, ApplyRequest(names=[name], out=out, overwrite=True))
    tables.applied(console, edited)

    after = ModelSpec(f"{LOCAL}{out}")
    picture = plot_path(name, "before-after")
    store.write_bytes(
        picture,
        draw_examples(store, manifest, before=manifest.model, after=after, device=device),
    )
    tables.before_after(console, tables.chosen_figures(result))
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
    direction = command_line(options.ranking, fields=("direction", "ridge"))
    steer = command_line(options.search, fields=("steer",), also=("steer",))
    return [
        ["export", f"SLSGU_STORE={store}"],
        build_command(request),
        ["slsgu", "grad", name],
        ["slsgu", "rank", name, *direction],
        ["slsgu", "search", name, *steer],
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
