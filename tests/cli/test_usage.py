"""Usage errors: reported like every other error, with a hint."""

import json
import shlex

import pytest
import typer
from processes import inside

from slsgu_cli.cli import app

GROUP = typer.main.get_command(app)
ERROR = {"schema", "command", "error"}
HELP = "slsgu {} --help"
AFTER = "options follow the command: slsgu COMMAND [OPTIONS]"

REFUSED = [
    # Options: misspelt, unknown, before the command.
    (
        "rank x --towr text",
        "No such option: --towr (Possible options: --store, --tower)",
        HELP.format("rank"),
    ),
    ("rank x --qqqq", "No such option: --qqqq", HELP.format("rank")),
    ("rank x -qz", "No such option: -z", HELP.format("rank")),
    ("--json rank x", "No such option: --json", AFTER),
    ("--qqqq", "No such option: --qqqq", AFTER),
    # Commands.
    ("rnk x", "there is no command rnk", "near: rank"),
    ("buildsets", "there is no command buildsets", "near: build-sets"),
    ("zzzz --json", "there is no command zzzz", "slsgu --help"),
    # Missing arguments, options and values.
    ("rank", "Missing argument 'NAME'", HELP.format("rank")),
    ("show --json", "Missing argument 'NAME'", HELP.format("show")),
    (
        "apply --force",
        "Missing argument 'NAME|EDIT...'",
        HELP.format("apply"),
    ),
    (
        "generate x",
        "Missing option '--target'",
        HELP.format("generate"),
    ),
    ("rank x --tower", "Option '--tower' requires an argument", HELP.format("rank")),
    ("grad x --device", "Option '--device' requires an argument", HELP.format("grad")),
    ("apply x --out=", "--out needs a value", "--out PATH"),
    (["apply", "x", "--out", ""], "--out needs a value", "--out PATH"),
    ("rank x --json=3", "Option '--json' does not take a value", HELP.format("rank")),
    # Extra arguments.
    ("rank x y", "Got unexpected extra argument", HELP.format("rank")),
    ("ls x 'y z'", "Got unexpected extra argument", HELP.format("ls")),
    # Values.
    ("rank x --tower txt", "--tower txt is not one of vision, text", "near: text"),
    ("verify x --checks relern", "--checks relern is not one of paraphrase, ", "near: relearn"),
    ("search x --steps ten", "--steps ten is not a whole number", "for example --steps 4"),
    ("search x --steps 0", "--steps 0 is out of range: it must be 1 or more", "--steps 1"),
    (
        "search x -t m --goal 101",
        "--goal 101 is out of range: it must be from 0 to 100",
        "--goal 100",
    ),
    (
        "grad x --device gpu",
        "--device 'gpu' is not one of auto, cpu, cuda, cuda:N",
        "--device auto",
    ),
]


def split(words):
    return shlex.split(words) if isinstance(words, str) else words


def refusal(words):
    """Return the lines that a refused command line prints to stderr; it prints no results."""
    done = inside(*words)
    assert done.exit_code == 2, done.output
    assert not done.stdout if "--json" not in words else set(json.loads(done.stdout)) == ERROR
    return done.stderr.splitlines()


@pytest.mark.parametrize(("words", "message", "hint"), REFUSED)
def test_a_usage_error_is_one_line_with_a_hint(words, message, hint):
    first, *rest = refusal(split(words))
    assert first.startswith(f"error: {message}")
    assert rest == [f"  try: {hint}"]


def test_a_usage_error_under_json_is_a_document():
    plain = refusal(["rank", "--no-such-option"])
    done = inside("rank", "--json", "--no-such-option")
    assert (done.exit_code, done.stderr.splitlines()) == (2, plain)
    document = json.loads(done.stdout)
    hint = plain[1].removeprefix("  try: ") if plain[1:] else None
    message = plain[0].removeprefix("error: ")
    assert document["error"] == {"message": message, "hint": hint, "exit_code": 2}
    assert (document["schema"], document["command"]) == (1, "rank")


def test_help_is_shown_even_if_the_command_line_is_wrong():
    for words in ("rank x y --help", "rank -h"):
        done = inside(*split(words))
        assert (done.exit_code, done.stderr) == (0, "")
        assert "Common options" in done.stdout


def test_flags_and_repeatable_options_may_be_given_twice(tmp_path):
    done = inside("ls", "-q", "-q", "--json", "--json", store=tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    repeated = refusal(["search", "x", "--layer", "a", "--layer", "b", "--steps", "0"])
    assert "--steps 0 is out of range" in repeated[0]


def test_a_shell_that_completes_is_not_refused():
    group = GROUP.make_context("slsgu", ["nosuch"], resilient_parsing=True)
    assert group.command is GROUP
    command = GROUP.get_command(None, "rank")
    assert command.make_context("rank", ["x", "y", "--store"], resilient_parsing=True)
