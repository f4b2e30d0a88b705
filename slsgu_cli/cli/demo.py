"""`demo`: forget a class of the embedded CLIP, and print the commands that do the same."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from slsgu_cli.cli.app import Session, command
from slsgu_cli.errors import UsageError
from slsgu_cli.records.option_fields import command_line
from slsgu_cli.records.options import ApplyRequest, BuildRequest, DemoOptions, PassOptions
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.text import near

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
    from slsgu_cli.clip.devices import pick_device
    from slsgu_cli.engine.apply import apply
    from slsgu_cli.engine.examples import draw_examples
    from slsgu_cli.engine.gradients import compute_gradients
    from slsgu_cli.engine.plots import rank_and_plot, search_and_plot
    from slsgu_cli.engine.search import require_forgotten
    from slsgu_cli.sets.build import build_sets
    from slsgu_cli.store.artifacts import plot_path

    store, console = session.store, session.console
    request = demo_request(options.concept)
    name, concept = request.name, request.concept
    device = pick_device(options.search.device)

    console.note(
        f"1/5 build-sets: icons of {concept!r} to forget, others to retain and to measure on"
    )
    manifest = build_sets(store, request)
    show_manifest(console, manifest)
    console.note("\n2/5 grad: one gradient pass over the forget set and one over the retain set")
    passes = PassOptions(device=device)
    show_gradients(console, compute_gradients(store, name, model=None, options=passes))
    console.note(
        "\n3/5 rank: layers with high importance for the concept and low alignment with the rest"
    )
    ranked = replace(options.ranking, device=device)
    ranking, plots = rank_and_plot(store, name, options=ranked)
    show_ranking(console, ranking, plots, front_only=True)
    console.note(
        "\n4/5 search: for each of these layers, a step size at which the concept is forgotten"
    )
    search = replace(options.search, device=device)
    result = search_and_plot(store, name, options=search)
    show_search(console, store, result, brief=True)
    require_forgotten(result)
    console.note("\n5/5 apply: a copy of the checkpoint with one edited layer")
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
        "\nThe same as single commands, for your own model and images:\n\n"
        + "\n".join(f"  {_folded(words)}" for words in commands),
        data=[shlex.join(words) for words in commands],
    )


def demo_request(concept: str) -> BuildRequest:
    """Return how to build the set of an embedded class. Raises UsageError."""
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
    """Return the words of commands that repeat the demo."""
    from slsgu_cli.sets.requests import build_command

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
    """Return a shell command, with one option a line if it is long."""
    line = shlex.join(words)
    if len(line) <= LINE:
        return line
    return "".join(
        f" \\\n      {shlex.quote(word)}" if word.startswith("--") else f" {shlex.quote(word)}"
        for word in words
    ).lstrip()
