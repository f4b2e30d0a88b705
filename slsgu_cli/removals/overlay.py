"""The options that a recipe gives to other commands, for their `--recipe`."""

from collections.abc import Sequence
from dataclasses import fields, replace

from slsgu_cli.records.option_fields import command_line
from slsgu_cli.records.verification import BOUNDED, CHECKS
from slsgu_cli.removals.recipe import Recipe, figure_of


def options_for(command: str, recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Return the words that give a command the options of a recipe. Raises UsageError."""
    first = names[0] if names else ""
    match command:
        case "build-sets":
            built = recipe.set_of(recipe.request(first))
            return command_line(built, fields=[f.name for f in fields(built) if f.name != "name"])
        case "eval":
            return [word for bound in _bounds(recipe, names) for word in ("--assert", bound)]
        case "apply" | "report" | "evidence":
            outputs = recipe.outputs
            places = {"apply": outputs.checkpoint, "report": outputs.report}
            out = places.get(command, outputs.evidence)
            return ["--out", str(out)] if out else []
        case "verify":
            request = recipe.verification_of(first)
            return command_line(request if request.checks else replace(request, checks=CHECKS))
        case "grad":
            return command_line(recipe.grad)
        case "rank":
            return command_line(recipe.rank)
        case _:
            return command_line(recipe.search)


def _bounds(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """Return the bounds of these requests on figures of `eval`, named as `eval` names them."""
    bounds = set()
    for name in names:
        for bound in recipe.bounds_of(recipe.request(name)):
            if bound.figure not in BOUNDED:
                several = len(names) > 1
                bounds.add(str(replace(bound, figure=figure_of(bound, name)) if several else bound))
    return sorted(bounds)
