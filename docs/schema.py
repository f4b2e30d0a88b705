"""Write the JSON schemas of the output of `slsgu COMMAND --json`, and of recipes.

    python docs/schema.py

They are artifacts/documents.schema.json and artifacts/recipe.schema.json.

The types of records describe them. Tables are listed here with their columns. A test validates
the output of every command with the schema, and compares the files with what this script writes.
A command has one or several documents. A key that ends in `?` is optional.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

from slsgu_cli.checkpoints.model_copy import AppliedResult
from slsgu_cli.cli.console import SCHEMA
from slsgu_cli.engine.find_edits import FoundEdit
from slsgu_cli.records.comparison import PipelineComparison
from slsgu_cli.records.figures import BaseEdits, ClassLoss, TargetFigures
from slsgu_cli.records.ledger import LedgerRow
from slsgu_cli.records.method import Ranking, Trial, Trials
from slsgu_cli.records.option_fields import OptionField
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import JointSearch, Sweep
from slsgu_cli.records.targets import Answers, AnswerSet, Generation, TargetTrial, TargetTrials
from slsgu_cli.removals.reading import HEAD, TABLES, Table
from slsgu_cli.store.catalog import Entry
from slsgu_cli.store.check import Finding
from slsgu_cli.verification.results import Conclusion

FILE = Path(__file__).parent / "artifacts" / "documents.schema.json"
RECIPE = FILE.with_name("recipe.schema.json")
DRAFT = "https://json-schema.org/draft/2020-12/schema"
Schema = dict[str, Any]
CELL: Schema = {"type": ["string", "number", "boolean", "null"]}
PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", Path: "string"}


def an_object(properties: Mapping[str, Schema]) -> Schema:
    """Return the schema of an object with exactly these keys."""
    names = [name.removesuffix("?") for name in properties]
    return {
        "type": "object",
        "properties": dict(zip(names, properties.values(), strict=True)),
        "required": [name for name in properties if not name.endswith("?")],
        "additionalProperties": False,
    }


def a_list(items: Schema) -> Schema:
    """Return the schema of a list."""
    return {"type": "array", "items": items}


def table(*columns: str, **lists: Sequence[str]) -> Schema:
    """Return the schema of rows of cells; `lists` are columns that contain rows, by `name`."""
    cells = dict.fromkeys(columns, CELL)
    inner = {name: table("name", *more) for name, more in lists.items()}
    return a_list(an_object({**cells, **inner}))


PATHS = a_list({"type": "string"})


def documents() -> dict[str, list[dict[str, Any]]]:
    """Return the documents of each command by their keys."""
    accuracy = table("figure", "original", "before", "edited", "change", "model")
    effect = table("figure", "judge", "original", "unlearned", "change", "of", "95% interval")
    gradients = table("role", "loss", "mean loss", "rows", "batches", "gradient", "made", "squares")
    searched = {
        "trials": Trials,
        "chosen": Trial,
        "accuracy": accuracy,
        "earlier?": BaseEdits,
        "harmed": [ClassLoss],
        "nearest": [ClassLoss],
        "words?": [ClassLoss],
        "files": PATHS,
    }
    search = an_object(
        {
            "trials": record(TargetTrials),
            "chosen": record(TargetTrial),
            "forgotten": CELL,
            "edit": CELL,
            "figures": record(TargetFigures),
        }
    )
    targets = {
        "search": search,
        "chosen": TargetTrial,
        "effect?": effect,
        "edit": PATHS,
    }
    sentences = table("model", "check", "text")
    return {
        "build-sets": [
            {"set": SetManifest},
            {"sets": [SetManifest]},
            {"replayed": table("part", "rows")},
        ],
        "show": [
            {
                "set": an_object(
                    {
                        **dict.fromkeys(
                            (
                                "name",
                                "part",
                                "concept",
                                "patterns",
                                "model",
                                "rows",
                                "captions",
                                "seen",
                                "fingerprint",
                            ),
                            CELL,
                        ),
                        "left out": table("name", "value"),
                        "noted": table("name", "value"),
                    }
                ),
                "sources": table("source", "rows"),
                "words": table("word", "captions"),
                "rows": table("key", "hash", "caption", "file", "row", "url"),
                "sheets": PATHS,
            }
        ],
        "grad": [{"gradients": gradients}],
        "rank": [{"ranking": Ranking, "plots": PATHS}],
        "search": [
            searched,
            {"sets": a_list(an_object({"set": CELL, **_schemas(searched)}))},
            {
                "edits": JointSearch,
                "stages": table(
                    "concepts", "added", "layer", "FA@1 at most", utility=("TA@1", "TA@5")
                ),
                "files": PATHS,
            },
            targets,
            {"sets": a_list(an_object({"set": CELL, **_schemas(targets)}))},
        ],
        "apply": [{"applied": AppliedResult}],
        "export": [
            {
                "edits": table("edit", "layer", "rank", "of"),
                "strengths": table("strength", "set", "FA@1", "FA@5"),
                "files": PATHS,
            }
        ],
        "eval": [
            {
                "accuracy": accuracy,
                "neutral-prompts?": table("model", "prompts", "spread", "overlap"),
                "plots": PATHS,
                "assertions?": table("assertion", "figure", "result"),
            }
        ],
        "verify": [
            {
                "verification": table(
                    "check",
                    "variant",
                    "model",
                    "original FA@1",
                    "FA@1",
                    "original FA@5",
                    "FA@5",
                    "control FA@1",
                    "TA change",
                    "verdict",
                    "original control",
                    "added",
                    "added from",
                    "added to",
                    "note",
                    utility=("original TA@1", "TA@1"),
                ),
                "neighbourhood?": table("model", "what", "place", "name", "figure"),
                "classes?": table(
                    "what",
                    "set",
                    "class",
                    "model",
                    "cosine",
                    "rows",
                    "original TA@1",
                    "TA@1",
                    "change",
                ),
                "look-alikes?": table(
                    "classes",
                    "model",
                    "number",
                    "rows",
                    "original TA@1",
                    "TA@1",
                    "lost",
                    "from",
                    "to",
                    "lost most",
                    "most",
                    "beyond control",
                    "beyond from",
                    "beyond to",
                ),
                "neutral-prompts?": table("after", "model", "prompts", "spread", "overlap"),
                "classifiers?": table(
                    "classifier",
                    "looks for",
                    "model",
                    "images",
                    "original accuracy",
                    "accuracy",
                    "original recall",
                    "recall",
                    "rows",
                    "others",
                ),
                "retrieval?": table(
                    "query",
                    "index",
                    "model",
                    "original mAP",
                    "mAP",
                    "original recall@1",
                    "recall@1",
                    "recall@5",
                    "recall@10",
                    "queries",
                    "gallery",
                ),
                "index?": table(
                    "features of", "model", "rows", "identical", "moved", "mean", "largest"
                ),
                "membership?": table(
                    "figure",
                    "against",
                    "model",
                    "original mean",
                    "original sd",
                    "mean",
                    "sd",
                    "members",
                    "others",
                    "verdict",
                ),
                "attempts?": table("check", "model", "looked for", "text", "loss", "FA@1", "FA@5"),
                "curves?": table("check", "model", "trained name", "step", "FA@1", "FA@5"),
                "verdicts": sentences,
                "notes?": sentences,
                "conclusions": [Conclusion],
                "files": PATHS,
            }
        ],
        "report": [{"sections": table("name", "section", "state", "run"), "files": PATHS}],
        "compare": [
            {
                "comparison": table(
                    "method",
                    "setting",
                    "lr",
                    "value",
                    "layer",
                    "epoch",
                    "FA@1",
                    "FA@5",
                    "seconds",
                    "forget passes",
                    "retain passes",
                    "chosen",
                    utility=("TA@1", "TA@5"),
                ),
                "plots": PATHS,
            },
            {"comparison": PipelineComparison, "sheets": PATHS},
        ],
        "generate": [
            {"generation": Generation, "effect?": effect, "sheets": PATHS},
            {"answer set": AnswerSet},
        ],
        "ask": [{"answers": Answers, "pictures": PATHS}],
        "trajectory": [
            {
                "trajectory": Trials,
                "rises": table(
                    "layer",
                    "direction",
                    "steps",
                    "% of norm",
                    figures=("rise", "rise at % of norm"),
                ),
                "files": PATHS,
            }
        ],
        "sweep": [{"sweep": Sweep, "files": PATHS}],
        "init": [{"files": PATHS}],
        "run": [
            {"plan": table("stage", "requests", "for", "state", "seconds", "why")},
            {
                "figures": table("figure", "original", "now", "change"),
                "bounds?": table("request", "bound", "figure", "result"),
                "requests": [LedgerRow],
                "files": PATHS,
            },
        ],
        "requests": [{"requests": [LedgerRow]}],
        "evidence": [
            {
                "evidence": table(
                    "request", "state", "edit", "verification", "FA@1 before", "FA@1 after"
                ),
                "files": PATHS,
            }
        ],
        "env": [
            {
                "versions": table("package", "version"),
                "devices": table("device", "what"),
                "extras": table("extra", "package", "version", "for"),
            }
        ],
        "ls": [{"store": [Entry]}],
        "check": [{"check": [Finding]}, {"edits": [FoundEdit]}],
        "gc": [{"unused": [Finding]}],
        "demo": [
            {
                "set": SetManifest,
                "gradients": gradients,
                "ranking": Ranking,
                "plots": PATHS,
                "trials": Trials,
                "chosen": Trial,
                "files": PATHS,
                "applied": AppliedResult,
                "accuracy": accuracy,
                "pictures": PATHS,
                "commands": PATHS,
            }
        ],
    }


def _schemas(keys: Mapping[str, Any]) -> dict[str, Schema]:
    return {name: _schema(each) for name, each in keys.items()}


def _schema(what: Any) -> Schema:
    """Return the schema of a record, of a list of records, or the given schema."""
    if isinstance(what, list):
        return a_list(record(what[0]))
    return record(what) if dataclasses.is_dataclass(what) else what


DEFINITIONS: dict[str, Schema] = {}


def record(kind: Any) -> Schema:
    """Return a reference to the schema of a record, which is written once."""
    if kind.__name__ not in DEFINITIONS:
        DEFINITIONS[kind.__name__] = {}
        hints = typing.get_type_hints(kind)
        fields = {field.name: _of_type(hints[field.name]) for field in dataclasses.fields(kind)}
        DEFINITIONS[kind.__name__] = an_object(fields)
    return {"$ref": f"#/$defs/{kind.__name__}"}


def _of_type(kind: Any) -> Schema:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        several = [each for each in arguments if each is not type(None)]
        return {"anyOf": [*map(_of_type, several), {"type": "null"}]}
    if origin is dict:
        return _map_of(arguments[1])
    if origin is not None and issubclass(origin, Iterable):
        return a_list(_of_type(arguments[0]))
    if dataclasses.is_dataclass(kind):
        return record(kind)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return {"enum": [str(each) for each in kind]}
    # JSON has no NaN: such a figure is null.
    return {"type": [PLAIN[kind], "null"] if kind is float else PLAIN[kind]}


def _map_of(kind: Any) -> Schema:
    """Return the schema of a map as a list of its values, each with its name."""
    name = {"name": {"type": "string"}}
    if kind is Any:
        return a_list({"type": "object", "required": ["name"]})
    if not dataclasses.is_dataclass(kind):
        return a_list(an_object({**name, "value": _of_type(kind)}))
    record(kind)
    fields = DEFINITIONS[kind.__name__]["properties"]
    if "name" in fields:
        raise ValueError(f"{kind} has a name of its own")
    return a_list(an_object({**name, **fields}))


def schema() -> Schema:
    """Return the whole schema: the output of every command, with or without an error."""
    error = an_object(
        {
            "message": {"type": "string"},
            "hint": {"type": ["string", "null"]},
            "exit_code": {"type": "integer"},
        }
    )
    head = {"schema": {"const": SCHEMA}}
    commands = []
    for name, each in documents().items():
        for keys in each:
            known = {**head, "command": {"const": name}, **_schemas(keys)}
            commands.append(an_object({**known, "error?": error}))
    known = {key for each in commands for key in each["properties"]}
    names = [*documents(), None]
    failed = an_object({**head, "command": {"enum": names}, "error": error})
    failed["properties"] |= dict.fromkeys(sorted(known - set(failed["properties"])), True)
    return {
        "$schema": DRAFT,
        "title": "What `slsgu COMMAND --json` prints",
        "anyOf": [*commands, failed],
        "$defs": dict(sorted(DEFINITIONS.items())),
    }


def recipe_schema() -> Schema:
    """Return the schema of a recipe, for editors."""
    whole = _recipe_table(HEAD)
    for key, table in TABLES.items():
        each = _recipe_table(table)
        if key == "request":
            each = {"type": "array", "items": each, "description": table.about}
        elif table.many:
            about = {"description": table.about}
            each = {"type": "object", "additionalProperties": each, **about}
        whole["properties"][key] = each
    whole["required"] += ["evaluation"]
    return {"$schema": DRAFT, "title": "A recipe of slsgu", **whole}


def _recipe_table(table: Table) -> Schema:
    places = table.option_fields()
    return {
        "type": "object",
        "description": table.about,
        "properties": {key: _recipe_value(place) for key, place in places.items()},
        "required": [key for key, place in places.items() if place.required],
        "additionalProperties": False,
    }


def _recipe_value(place: OptionField) -> Schema:
    """Return the schema of a key: the values of its option, in the types of TOML."""
    said, kind = place.option, place.metavar
    (item,) = typing.get_args(place.kind)[:1] or (place.kind,)
    one: Schema = {"type": "string"}
    if place.is_flag:
        one = {"type": "boolean"}
    elif isinstance(item, type) and issubclass(item, StrEnum):
        one = {"enum": [str(each) for each in item]}
    elif said.read is not None and not place.repeatable:
        one = {"type": ["string", "integer"]}
    elif item in (int, float):
        limits = {"minimum": said.min, "maximum": said.max}
        one = {"type": PLAIN[item], **{k: v for k, v in limits.items() if v is not None}}
    about = f"{said.help} [{kind}]" if said.metavar else said.help
    without = place.default_words()
    if without is not None:
        about += f" Without it: {without}."
    return {**(a_list(one) if place.repeatable else one), "description": about}


def texts() -> dict[Path, str]:
    """Return the content of both files."""
    whole = {FILE: schema(), RECIPE: recipe_schema()}
    return {
        path: json.dumps(each, indent=1, ensure_ascii=False) + "\n" for path, each in whole.items()
    }


if __name__ == "__main__":
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
