"""What `--json` prints: one document for every command, with keys that never depend on data."""

import dataclasses
import importlib.util
import json
import types
import typing
from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

import pytest
from documents import validated
from places import ROOT
from processes import inside

from slsgu_cli.cli.app import COMMANDS
from slsgu_cli.cli.compare import show_pipeline_comparison
from slsgu_cli.cli.console import Console
from slsgu_cli.cli.generate import show_answer_set, show_answers, show_generation
from slsgu_cli.cli.search_on_target import show_target_search
from slsgu_cli.engine.search import search
from slsgu_cli.records.codec import by_name, document
from slsgu_cli.records.comparison import PipelineComparison
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.targets import Answers, AnswerSet, Generation
from slsgu_cli.targets.search import TargetSearchResult


@pytest.fixture(scope="module")
def described():
    """The module that writes the schema."""
    spec = importlib.util.spec_from_file_location("schema", ROOT / "docs" / "schema.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def filled(kind):
    """Return a record, or whatever the type is, with something in each of its fields."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return filled(next(each for each in arguments if each is not type(None)))
    if origin is dict:
        return {"x": filled(arguments[1]), "two words": filled(arguments[1])}
    if origin is not None and issubclass(origin, Iterable):
        return (filled(arguments[0]),)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return kind(**{each.name: filled(hints[each.name]) for each in dataclasses.fields(kind)})
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return next(iter(kind))
    return {str: "x", int: 1, float: 1.5, bool: True, Path: Path("x")}[kind]


def test_the_schema_is_that_of_the_commands_as_they_are(described):
    assert set(described.documents()) == set(COMMANDS)
    for path, text in described.texts().items():
        assert path.read_text() == text, "run `python docs/schema.py`"


def test_no_key_depends_on_data(described):
    """Every object of the schema names its keys, but for what a set's request was."""

    def objects(schema):
        if isinstance(schema, dict):
            if schema.get("type") == "object":
                yield schema
            for each in schema.values():
                yield from objects(each)
        elif isinstance(schema, list):
            for each in schema:
                yield from objects(each)

    *known, failed = described.schema()["anyOf"]
    for each in objects([known, described.DEFINITIONS]):
        assert each.get("additionalProperties") is False or set(each) == {"type", "required"}
    assert failed["required"] == ["schema", "command", "error"]


def test_maps_are_rows():
    record = filled(Generation)
    encoded = document(record)
    assert (
        encoded["edits"]
        == by_name(record.edits)
        == [{"name": "x", "value": "x"}, {"name": "two words", "value": "x"}]
    )
    assert document({"a": {"b": record.edits}}) == {"a": {"b": record.edits}}


class Output:
    @staticmethod
    def where(name):
        return f"out/{name}"


@pytest.mark.parametrize(
    ("command", "kind", "show"),
    [
        ("search", TargetSearchResult, lambda c, r: show_target_search(c, Output, r)),
        ("generate", Generation, lambda c, r: show_generation(c, r, Output)),
        ("generate", AnswerSet, show_answer_set),
        ("ask", Answers, lambda c, r: show_answers(c, r, Output)),
        ("compare", PipelineComparison, lambda c, r: show_pipeline_comparison(c, r, "sheet.png")),
    ],
)
def test_outputs_of_models_built_on_clip(command, kind, show, capsys):
    console = Console(command, as_json=True)
    show(console, filled(kind))
    console.flush()
    assert len(validated(capsys.readouterr().out)) > 2


def test_outputs_of_the_other_commands(world, tmp_path):
    """`inside` holds each to the schema; what other tests run is held to it there."""
    search(world.store, "blue", options=SearchOptions(layers=["visual.proj"], steps=4))
    for words in (
        ["show", "blue"],
        ["eval", "blue", "--assert", "fa1<=100"],
        [
            "verify",
            "blue",
            "--rows",
            "20",
            "--checks",
            "augment,neighbours,nearest,probe,retrieval,membership",
        ],
        ["report", "blue", "--no-examples", "--out", tmp_path / "page.html"],
        ["ls"],
    ):
        done = inside(*words, "--json", store=world.store.root)
        assert done.exit_code == 0, done.stderr
        assert "error" not in json.loads(done.stdout)


def test_an_error_is_a_document_with_the_finished_results(world):
    refused = inside("rank", "nobody", "--json", store=world.store.root)
    said = json.loads(refused.stdout)
    assert said["error"]["message"] == refused.stderr.splitlines()[0].removeprefix("error: ")
    assert said["error"]["exit_code"] == refused.exit_code == 3
    failed = inside("eval", "blue", "--assert", "fa1<=1", "--json", store=world.store.root)
    said = json.loads(failed.stdout)
    assert failed.exit_code == said["error"]["exit_code"] == 5
    assert said["assertions"][0]["result"] == "fails"
    assert said["accuracy"]
