"""`slsgu search --steer-target` over one set or several: search, print, and say if it failed."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slsgu_cli.errors import UsageError
from slsgu_cli.generation import show
from slsgu_cli.generation.generate import judge_spec
from slsgu_cli.generation.records import Budget
from slsgu_cli.generation.steering import SteerOptions, require_reached, search_target
from slsgu_cli.session import Session


def search_on_target(
    session: Session,
    names: Sequence[str],
    target: Path | None,
    *,
    budget: Budget,
    judge: tuple[str | None, str | None],
    **options: Any,
) -> None:
    """Search each set on the target and print what is found; `options` are SteerOptions'.

    Raises NotForgottenError, after all of them, for the first that misses its goal.
    """
    if target is None:
        raise UsageError(
            "--target and --steer-target go together",
            hint="`slsgu rank NAME --target` first, and no --target here, steers on CLIP",
        )
    results = []
    for name in names:
        chosen = judge_spec(session.store, name, *judge)
        steer = SteerOptions(target=target, budget=budget, judge=chosen, **options)
        results.append(search_target(session.store, name, options=steer))
        show.steered(session.console, session.store, results[-1])
    for result in results:
        require_reached(result)
