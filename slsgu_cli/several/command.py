"""What `slsgu search` runs: one set, several one after another, or several jointly."""

from collections.abc import Sequence

from slsgu_cli import show
from slsgu_cli.cases import SearchOptions
from slsgu_cli.errors import NotForgottenError
from slsgu_cli.pipeline import draw_steps, require_forgotten, search_and_plot
from slsgu_cli.session import Session
from slsgu_cli.several import show as show_several


def search_sets(session: Session, names: Sequence[str], options: SearchOptions) -> None:
    """Search sets one after another. Raises NotForgottenError at the end if a concept is left."""
    store, console = session.store, session.console
    if len(names) == 1:
        result = search_and_plot(store, names[0], options=options)
        show.search(console, store, result)
        require_forgotten(result)
        return
    from slsgu_cli.several.searches import search_each

    failed: list[NotForgottenError] = []
    for result in search_each(store, names, options=options):
        name = result.trials.name
        draw_steps(store, result)
        with console.part(name):
            console.value("set", f"set\t{name}", data=name, shown=f"\n{name}")
            show.search(console, store, result)
        try:
            require_forgotten(result)
        except NotForgottenError as error:
            failed.append(error)
    if failed:
        message = "; ".join(error.message for error in failed)
        raise NotForgottenError(message, hint=failed[0].hint)


def search_jointly(session: Session, names: Sequence[str], options: SearchOptions) -> None:
    """Search for edits that forget the concepts of several sets together."""
    from slsgu_cli.several.joint import joint_search, require_all_forgotten

    result = joint_search(session.store, names, options=options)
    show_several.joint(session.console, session.store, result)
    require_all_forgotten(result)
