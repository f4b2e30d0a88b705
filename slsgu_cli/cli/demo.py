"""What `slsgu demo` does: the whole job on the embedded CLIP and icons.

It calls what the commands call, with the options it prints at the end, so a reader can
repeat every step by hand.
"""

import difflib
import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slsgu_cli.cli import tables
from slsgu_cli.cli.app import Session
from slsgu_cli.clip.models import LOCAL, pick_device
from slsgu_cli.errors import UsageError
from slsgu_cli.records.method import PassOptions, Steer
from slsgu_cli.records.sets import ModelSpec

if TYPE_CHECKING:
    from slsgu_cli.method.ranking import RankOptions
    from slsgu_cli.sets.request import BuildRequest


DATA = Path(__file__).parents[1] / "demo"
RETAIN_SAMPLES = 800
LINE = 100


def demonstrate(
    session: Session, concept: str, *, steer: Steer, ranked: "RankOptions", device: str
) -> None:
    """Forget `concept`, one of the embedded classes, and show each step's result.

    `ranked` says along which direction. Raises UsageError for a concept the embedded
    model does not know.
    """
    from slsgu_cli.method.edit import (
        ApplyRequest,
        apply_named,
        rank_and_plot,
        require_forgotten,
        search_and_plot,
    )
    from slsgu_cli.method.gradients import compute_gradients
    from slsgu_cli.method.guesses import draw_examples
    from slsgu_cli.method.search_plan import SearchOptions
    from slsgu_cli.sets.build import build_sets
    from slsgu_cli.store.artifacts import plot_path

    store, console = session.store, session.console
    request = demo_request(concept)
    name = request.name
    device = pick_device(device)

    console.note(
        f"1/5 build-sets: icons of {concept!r} to forget, others to keep and to measure on"
    )
    manifest = build_sets(store, request)
    tables.manifest(console, manifest)
    console.note("\n2/5 grad: one gradient pass over the forget set and one over the retain set")
    options = PassOptions(device=device)
    tables.gradients(console, compute_gradients(store, name, model=None, options=options))
    console.note(
        "\n3/5 rank: the layers that matter much to the concept (importance) "
        "and little to the rest (alignment)"
    )
    ranked = replace(ranked, device=device)
    ranking, plots = rank_and_plot(store, name, options=ranked)
    tables.ranking(console, ranking, plots, front_only=True)
    console.note(
        "\n4/5 search: for each of these layers, the step at which the concept is forgotten"
    )
    search = SearchOptions(steer=steer, device=device)
    result = search_and_plot(store, name, options=search)
    tables.search(console, store, result, brief=True)
    require_forgotten(result)
    console.note("\n5/5 apply: a copy of the checkpoint with one layer moved")
    out = Path(store.root if store.is_local else ".") / "checkpoints" / f"clip-without-{name}"
    apply = ApplyRequest(names=[name], out=out, overwrite=True)
    tables.applied(console, apply_named(store, apply))

    after = ModelSpec(f"{LOCAL}{out}")
    picture = plot_path(name, "before-after")
    store.write_bytes(
        picture,
        draw_examples(store, manifest, before=manifest.model, after=after, device=device),
    )
    tables.before_after(console, tables.chosen_figures(result))
    console.paths("pictures", [store.where(picture)])
    commands = _commands(request, store.url, steer, ranked, out)
    console.value(
        "commands",
        "\nThe same, command by command; put your own model and images in their place:\n\n"
        + "\n".join(f"  {_folded(words)}" for words in commands),
        data=[shlex.join(words) for words in commands],
    )


def demo_request(concept: str) -> "BuildRequest":
    """Return what to build for one of the embedded classes. Raises UsageError."""
    from slsgu_cli.sets.request import BuildRequest

    classes: dict[str, list[str]] = json.loads((DATA / "classes.json").read_text())
    known = [name for names in classes.values() for name in names]
    if concept not in known:
        near = difflib.get_close_matches(concept, known, 4, 0.4)
        raise UsageError(
            f"the embedded CLIP knows 301 brands and objects, and {concept!r} is not one of them",
            hint=f"near: {', '.join(near)}" if near else f"such as {', '.join(known[:6])}",
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
    request: "BuildRequest", store: str, steer: Steer, ranked: "RankOptions", out: Path
) -> list[list[str]]:
    """Return the words of each command that does what the demo did."""
    from slsgu_cli.sets.request import build_command

    name = request.name
    return [
        ["export", f"SLSGU_STORE={store}"],
        build_command(request),
        ["slsgu", "grad", name],
        ["slsgu", "rank", name, *_direction_flags(ranked)],
        ["slsgu", "search", name, "--steer", str(steer)],
        ["slsgu", "apply", name, "--out", f"{out}-again"],
        ["slsgu", "eval", name, "--model", f"{LOCAL}{out}"],
    ]


def _direction_flags(ranked: "RankOptions") -> list[str]:
    """Return the flags of a direction that is not the default."""
    from slsgu_cli.method.ranking import RankOptions

    usual = RankOptions()
    flags = []
    if ranked.direction is not usual.direction:
        flags += ["--direction", str(ranked.direction)]
    if ranked.ridge != usual.ridge:
        flags += ["--ridge", f"{ranked.ridge:g}"]
    return flags


def _folded(words: Sequence[str]) -> str:
    """Return a command for the shell, a long one with a line for each option."""
    line = shlex.join(words)
    if len(line) <= LINE:
        return line
    return "".join(
        f" \\\n      {shlex.quote(word)}" if word.startswith("--") else f" {shlex.quote(word)}"
        for word in words
    ).lstrip()
