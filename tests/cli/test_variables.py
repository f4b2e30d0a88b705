"""Options that variables set: SLSGU_MAX_LOSS is --max-loss, and the command line wins."""

import json

import pytest
import typer
from processes import inside

from slsgu_cli.cli import app
from slsgu_cli.cli.app import COMMANDS
from slsgu_cli.removals.template import recipe_text

GROUP = typer.main.get_command(app)


def refusal(words, **variables):
    """Return what a command that is refused says."""
    done = inside(*words.split(), env=variables)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    return " ".join(done.stderr.split())


def params(command, words, monkeypatch, **variables):
    """Return what a command line comes to."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return GROUP.get_command(None, command).make_context(command, words.split()).params


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_option_of_every_command_has_a_variable(command, monkeypatch, tmp_path):
    known = {}
    arguments = []
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(recipe_text(recipe, demo=True))
    for param in GROUP.get_command(None, command).params:
        if param.param_type_name == "argument":
            arguments.append("x")
        elif param.name == "recipe" and param.required:
            arguments.append(f"--recipe {recipe}")
        elif not (param.hidden or param.is_eager or param.name == "recipe"):
            known[param.name] = param
            monkeypatch.setenv(f"SLSGU_{param.opts[0][2:].replace('-', '_').upper()}", "1")
    found = params(command, " ".join(arguments), monkeypatch)
    for name, param in known.items():
        expected = True if param.is_flag else ["1"] if param.multiple else "1"
        value = found[name]
        assert ([*map(str, value)] if param.multiple else value) == expected or str(value) == "1"


def test_the_command_line_wins(monkeypatch):
    variables = {"SLSGU_TOWER": "vision", "SLSGU_STORE": "a", "SLSGU_QUIET": "yes"}
    found = params("rank", "x --tower text", monkeypatch, **variables)
    assert (found["tower"], found["store"], found["quiet"]) == ("text", "a", True)
    found = params("rank", "x --store b", monkeypatch, SLSGU_QUIET="off", SLSGU_TOWER="")
    assert (found["tower"], found["store"], found["quiet"]) == (None, "b", False)


def test_several_values_are_separated_by_spaces(monkeypatch):
    found = params("search", "x", monkeypatch, SLSGU_LAYER="visual.proj c_fc")
    assert found["layer"] == ["visual.proj", "c_fc"]


@pytest.mark.parametrize(
    ("words", "variable", "value", "message"),
    [
        ("rank x", "SLSGU_TOWER", "txt", "--tower txt is not one of vision, text"),
        ("search x", "SLSGU_STEPS", "ten", "--steps ten is not a whole number"),
        ("search x -t m", "SLSGU_GOAL", "101", "--goal 101 is out of range: it must be from 0"),
        ("eval x", "SLSGU_ASSERT", "fa1", "--assert 'fa1' compares no figure with a number"),
        ("search x", "SLSGU_DAMPING", "1 2", "--damping 1 2 is not a number"),
    ],
)
def test_an_error_names_the_variable(words, variable, value, message):
    said = refusal(words, **{variable: value})
    assert f"error: {message}" in said
    option = f"--{variable.removeprefix('SLSGU_').lower()}"
    assert f"({variable} sets {option})" in said


def test_a_flag_takes_yes_or_no():
    message = refusal("ls", SLSGU_JSON="maybe")
    assert "Invalid value for '--json'" in message
    assert "(SLSGU_JSON sets --json)" in message


def test_variables_of_other_commands_and_modes_are_ignored(world, tmp_path):
    root = world.store.root
    environment = {"SLSGU_MAX_LOSS": "few", "SLSGU_NO_SUCH": "1", "SLSGU_GOAL": "5"}
    assert inside("ls", store=root, env=environment).exit_code == 0
    # Typed, these would be refused: for --replay, for --metadata, for a target.
    replay = inside("build-sets", "blue", "--replay", store=root, env={"SLSGU_SEED": "3"})
    assert replay.exit_code == 0, replay.stderr
    missing = inside("build-sets", "a", "-m", "m", store=root, env={"SLSGU_RETRIES": "2"})
    assert "--retries is for --metadata" not in missing.stderr
    searched = inside("search", "nobody", store=root, env={"SLSGU_TARGET": "t", "SLSGU_TOP": "2"})
    assert searched.exit_code == 3
    # A tag without a model is for commands that load one by name.
    graded = inside("grad", "blue", store=root, env={"SLSGU_PRETRAINED": "openai"})
    assert graded.exit_code == 0, graded.stderr


def test_a_variable_asks_for_errors_as_json(tmp_path):
    done = inside("rank", "x", "--towr", "y", store=tmp_path, env={"SLSGU_JSON": "1"})
    assert json.loads(done.stdout)["error"]["exit_code"] == done.exit_code == 2
