"""The command `compare`."""

import math
from typing import Annotated

import typer

from slsgu_cli import options as opt
from slsgu_cli.app import app
from slsgu_cli.baselines.records import Method
from slsgu_cli.errors import UsageError
from slsgu_cli.session import Session, command

AUTO = "auto"


@command(app, "compare")
def compare(
    session: Session,
    names: Annotated[list[str], typer.Argument(metavar="NAME...", help="Sets to compare on.")],
    methods: Annotated[
        list[str] | None,
        typer.Option("--methods", help="Of ft, ga, gaft, salun, ssd, ours. Default: all."),
    ] = None,
    rates: Annotated[
        list[str] | None,
        typer.Option("--lr", help="Learning rates, or auto. Default: the paper's 1e-6,1e-7."),
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Epochs of a baseline.")] = 10,
    batch_size: opt.BatchSize = 32,
    retain_rows: Annotated[
        int | None,
        typer.Option("--retain-rows", min=2, help="Train on this many retain rows at most."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the order of retain rows.")] = 0,
    device: opt.Device = "auto",
) -> None:
    """Compare with other unlearning methods (the paper's Table 1).

    Example: slsgu compare facebook --lr auto --retain-rows 256
    """
    from slsgu_cli.baselines import show
    from slsgu_cli.baselines.compare import PAPER_RATES, CompareOptions
    from slsgu_cli.baselines.compare import compare as run
    from slsgu_cli.baselines.table import mean_rows
    from slsgu_cli.layout import joint_label, plot_path

    names = list(dict.fromkeys(names))
    options = CompareOptions(
        methods=_methods(methods),
        rates=_rates(rates) if rates else PAPER_RATES,
        epochs=epochs,
        batch_size=batch_size,
        retain_rows=retain_rows,
        seed=seed,
        device=device,
    )
    compared = run(session.store, names, options=options, console=session.console)
    rows = mean_rows(compared.concepts, compared.chosen)
    path = plot_path(joint_label(names), "comparison")
    title = f"forgetting {', '.join(names)}"
    session.store.write_bytes(path, show.comparison_plot(rows, title=title))
    show.comparison(session.console, rows, names, session.store.where(path))


def _methods(values: list[str] | None) -> list[Method]:
    """Return the methods named, with the original model. Raises UsageError."""
    if not values:
        return list(Method)
    known = {str(method): method for method in Method}
    named = _listed(values)
    for name in named:
        if name not in known:
            raise UsageError(
                f"--methods {name} is no method", hint=f"one or more of {', '.join(known)}"
            )
    return [Method.ORIGINAL, *(known[name] for name in named)]


def _rates(values: list[str]) -> list[float] | None:
    """Return the learning rates given, None for `auto`. Raises UsageError."""
    words = _listed(values)
    if words == [AUTO]:
        return None
    rates = []
    for word in words:
        try:
            rate = float(word)
        except ValueError:
            rate = math.nan
        if not 0 < rate < math.inf:
            raise UsageError(
                f"--lr {word} is no learning rate", hint="--lr 1e-6,1e-7, or --lr auto alone"
            )
        rates.append(rate)
    return list(dict.fromkeys(rates))


def _listed(values: list[str]) -> list[str]:
    """Return the words of a repeatable option that also takes commas."""
    return [word.strip().lower() for text in values for word in text.split(",") if word.strip()]
