"""The command `verify`."""

from typing import Annotated

import typer

from slsgu_cli import options as opt
from slsgu_cli.app import app
from slsgu_cli.session import Session, command
from slsgu_cli.verification.records import Check

CHOICES = tuple(check for check in Check if check is not Check.BASELINE)


def _checks(text: str | None) -> list[Check]:
    """Return the checks that a comma-separated list names; all without one. Raises UsageError."""
    from slsgu_cli.errors import UsageError

    if text is None:
        return list(CHOICES)
    known = {str(check): check for check in CHOICES}
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        what = f"{unknown[0]!r} is no check" if unknown else "it names no check"
        raise UsageError(f"--checks {text}: {what}; there are: {', '.join(known)}")
    return [known[name] for name in names]


@command(app, "verify")
def verify(
    session: Session,
    name: opt.Name,
    model: opt.Model = None,
    pretrained: opt.Pretrained = None,
    edit: Annotated[
        list[str] | None,
        typer.Option("--edit", help="Verify this edit, by name or file. Repeatable."),
    ] = None,
    checks: Annotated[
        str | None,
        typer.Option("--checks", help=f"Some of {','.join(CHOICES)}. Default: all."),
    ] = None,
    templates: Annotated[
        str | None,
        typer.Option("--templates", help="File of unseen templates, or a built-in list's name."),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option("--alias", help="Another name of the concept. Repeatable."),
    ] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Training steps.")] = 16,
    shots: Annotated[
        int, typer.Option("--shots", min=1, help="Images of the concept to relearn from.")
    ] = 8,
    lr: Annotated[
        float, typer.Option("--lr", min=0.0, help="Learning rate of the training.")
    ] = 3e-5,
    batch_size: opt.BatchSize = 16,
    rows: Annotated[
        int, typer.Option("--rows", min=1, help="Images of each evaluation set to measure TA on.")
    ] = 200,
    seed: Annotated[int, typer.Option("--seed", help="Seed of all draws.")] = 0,
    device: opt.Device = "auto",
) -> None:
    """Try to bring a forgotten concept back, and say what comes back.

    The original model is compared with --model, with each --edit, or else with the set's edit.

    Example: slsgu verify facebook --checks paraphrase,relearn --alias 'the social network'
    """
    chosen = _checks(checks)
    from slsgu_cli.verification import show
    from slsgu_cli.verification.paraphrase import unseen_templates
    from slsgu_cli.verification.records import Settings
    from slsgu_cli.verification.verify import verify as run

    result = run(
        session.store,
        name,
        checks=chosen,
        settings=Settings(
            templates=unseen_templates(session.store, name, templates),
            aliases=tuple(alias or ()),
            steps=steps,
            shots=shots,
            learning_rate=lr,
            batch_size=batch_size,
            rows=rows,
            seed=seed,
        ),
        model=opt.model_spec(model, pretrained),
        edits=edit or (),
        device=device,
    )
    show.verified(session.console, result)
