"""The tables of a recipe: which keys each has, and the record that it becomes."""

from collections.abc import Collection
from dataclasses import dataclass, replace

from slsgu_cli.records.figures import Assertion
from slsgu_cli.records.options import BuildRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.verification import VerifyRequest
from slsgu_cli.records.words import ROWS, OptionField, option, option_fields
from slsgu_cli.removals.recipe import BOUNDS, EvaluationRows, Outputs, RemovalRequest, Together


@dataclass(frozen=True, slots=True)
class Table:
    """A table of a recipe: its record, its description, and the fields that are no keys.

    There may be `many` of it, as a list or each under its own name.
    """

    kind: type
    about: str
    omit: Collection[str] = ()
    many: bool = False

    def option_fields(self) -> dict[str, OptionField]:
        """Return the options of the record by key, each named by its key."""
        keyed = {
            each.path[-1]: each
            for each in option_fields(self.kind)
            if each.path[0] not in self.omit
        }
        return {
            key: replace(each, option=replace(each.option, flags=(key,)))
            for key, each in keyed.items()
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Head:
    """The keys of a recipe before its first table."""

    name: str = option("", help="Name of the recipe.", without="that of the file")
    model: str = option(..., help="The model, as for --model.")
    pretrained: str | None = option(None, help="Weights of a model name, as for --pretrained.")
    bounds: tuple[Assertion, ...] = option((), help="Bounds of every request.", **BOUNDS)
    together: Together = option(
        Together.JOINT, help="Search requests jointly, each alone (sum), or each after the others."
    )
    shared_retain: bool = option(
        False, help="Share one retain set without any requested concept.", panel=ROWS
    )


HEAD = Table(Head, "A removal job: model, data, options, requests, outputs.")
# Fields that other tables set, or that have no use in a recipe.
OF_REQUEST = ("name", "concept", "model", "match", "not_match", "collect", "dropped")
OF_EVALUATION = ("evals", "classes", "templates", "tests", "forget_eval")
TABLES = {
    "sets": Table(BuildRequest, "Sources of the sets.", (*OF_REQUEST, *OF_EVALUATION)),
    "evaluation": Table(EvaluationRows, "Evaluation sets by name.", many=True),
    "grad": Table(PassOptions, "How to compute gradients.", ("shard",)),
    "rank": Table(RankOptions, "How to rank layers.", ("shard",)),
    "search": Table(SearchOptions, "How to search for edits.", ("after", "shard")),
    "verify": Table(VerifyRequest, "How to verify the result.", ("model", "edits")),
    "request": Table(RemovalRequest, "A concept to remove.", many=True),
    "outputs": Table(Outputs, "What to write."),
}
