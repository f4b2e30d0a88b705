"""The command `eval`, and tables of accuracy before and after an edit."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from slsgu_cli.cli.app import Names, Session, command
from slsgu_cli.cli.console import Column, Console
from slsgu_cli.cli.formats import SIGNED
from slsgu_cli.errors import (
    AssertionsError,
)
from slsgu_cli.figures.numbers import percent, roughly
from slsgu_cli.records.figures import (
    STRUCTURE,
    Accuracy,
    Assertion,
    Share,
    read_assertions,
    require_known,
)
from slsgu_cli.records.option_fields import DEVICE_OPTION, EVALUATION, Option
from slsgu_cli.records.sets import ModelSpec

if TYPE_CHECKING:
    from slsgu_cli.engine.evaluate import EvalResult


# By the label of a model: its forget accuracy by the name of the set ("" for a single set), and
# its utility by evaluation set.
Figures = Mapping[str, tuple[dict[str, Accuracy], dict[str, Accuracy]]]


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
            "Exit with code 5 unless this holds: fa1<=0, ta1.SET>=75, loss.SET<=0.5, overlap>=80.",
            EVALUATION,
            metavar="ASSERTION",
            read=read_assertions,
        ),
    ] = (),
) -> None:
    """Compares the original model with --model, or with the edits of the sets.

    Example: slsgu eval facebook --model local-dir:clip-without-facebook
    """
    from slsgu_cli.store.artifacts import Artifact, read_manifest

    compared = model is not None or session.store.exists(Artifact.EDIT.path(names[0]))
    sets = read_manifest(session.store, names[0]).evals if assertions else ()
    require_known(assertions, names, sets, compared=compared)
    from slsgu_cli.engine import evaluate as evaluation

    result = evaluation.evaluate(session.store, names, model=model, device=device)
    single = len(result.names) == 1
    figures: Figures = {
        model.label: (
            {"" if single else name: forget for name, forget in model.forget.items()},
            model.utility,
        )
        for model in result.models
    }
    show_before_after(session.console, figures)
    _show_structure(session.console, result)
    session.console.paths("plots", [result.plot] if result.plot else [])
    show_asserted(session.console, result, assertions)


def _show_structure(console: Console, result: "EvalResult") -> None:
    """Print how much of the structure of text embeddings remains in the other model."""
    others = [(each.label, each.structure) for each in result.models[1:]]
    rows = [(label, each.prompts, each.spread, each.overlap) for label, each in others if each]
    columns = [Column("model"), Column("prompts")]
    columns += [Column(name, shown=percent) for name in STRUCTURE]
    if rows:
        title = "neutral prompts: spread of their text embeddings, overlap of the nearest prompts"
        console.table("neutral-prompts", columns, rows, title=title)


def show_asserted(console: Console, result: "EvalResult", assertions: Sequence[Assertion]) -> None:
    """Print each assertion with its figure. Raises AssertionsError if one fails."""
    if not assertions:
        return
    figures = result.figures()
    values = [figures.get(each.figure, math.nan) for each in assertions]
    rows = [
        (str(each), value, "holds" if each.holds(value) else "fails")
        for each, value in zip(assertions, values, strict=True)
    ]
    columns = (Column("assertion"), Column("figure", shown=roughly), Column("result"))
    console.table("assertions", columns, rows, title="assertions")
    if failed := [f"{words} is {value:.4g}" for words, value, holds in rows if holds == "fails"]:
        raise AssertionsError(f"{len(failed)} of {len(rows)} assertions fail: {'; '.join(failed)}")


def show_before_after(console: Console, models: Figures) -> None:
    """Print forget accuracy and utility, with a column for each model."""
    labels = list(models)
    forgets, utilities = zip(*models.values(), strict=True)
    rows: list[tuple[Any, ...]] = []
    data: list[dict[str, Any]] = []
    for name in forgets[0]:
        for k in (1, 5):
            figures = (getattr(forget[name], f"top{k}") for forget in forgets)
            rows.append((f"FA@{k} {name}".rstrip(), *figures))
    for name in sorted(utilities[0]):
        for k in (1, 5):
            figures = (getattr(utility.get(name), f"top{k}", None) for utility in utilities)
            rows.append((f"TA@{k} {name}", *figures))
    columns = [Column("figure"), *(Column(label, shown=percent) for label in labels)]
    for name, first, *others in rows:
        before, edited = others[0] if others[1:] else None, others[-1] if others else None
        change = None if edited is None else round(edited - first, 2)
        figures_of = {"original": first, "before": before, "edited": edited, "change": change}
        data.append({"figure": name, **figures_of, "model": labels[-1]})
    if len(labels) == 2:
        rows = [(*row, None if row[2] is None else round(row[2] - row[1], 2)) for row in rows]
        columns.append(Column("change", shown=SIGNED))
    title = "accuracy: FA on the concept to forget, TA on everything else"
    console.table("accuracy", columns, rows, title=title, data=data)
    for name, forget in forgets[-1].items():
        console.note(recognised(name or "the concept", forget))


def recognised(name: str, forget: Accuracy) -> str:
    """Return a sentence that says how often a concept is recognised, and on which images."""
    rows = forget.measured_on
    rows = f"test {rows}" if forget.is_test else f"{rows}, which the edit was chosen by"
    share = Share.of(forget.top1, forget.rows)
    return f"{name} is recognised in {share.in_words(rows)}"
