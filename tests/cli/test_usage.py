"""Usage errors: reported like every other error, with a hint."""

import json
import shlex

import pytest
import typer
from processes import inside

from slsgu_cli.cli import app, usage

GROUP = typer.main.get_command(app)
ERROR = {"schema", "command", "error"}
LISTS = "`slsgu {} --help` lists its options"

REFUSED = [
    # Options: misspelt, of another command, of no command, before the command.
    ("rank x --towr text", "rank has no option --towr", "near: --tower"),
    ("rank x --towr=text", "rank has no option --towr", "near: --tower"),
    ("rank x --top 3", "rank has no option --top; search has it", LISTS.format("rank")),
    ("rank x -s a", "rank has no option -s; build-sets and sweep have it", LISTS.format("rank")),
    ("rank x --version", "rank has no option --version; slsgu has it", LISTS.format("rank")),
    ("rank x --qqqq", "rank has no option --qqqq", LISTS.format("rank")),
    ("rank x -qz", "rank has no option -z", LISTS.format("rank")),
    ("--json rank x", "--json must follow the command", "slsgu COMMAND ... --json"),
    ("--qqqq", "slsgu has no option --qqqq", "`slsgu --help` lists its commands"),
    # Commands.
    ("rnk x", "there is no command rnk", "near: rank"),
    ("buildsets", "there is no command buildsets", "near: build-sets"),
    ("zzzz --json", "there is no command zzzz", "`slsgu --help` lists its commands"),
    # What is missing: arguments, options, values.
    ("rank", "Missing argument 'NAME'", LISTS.format("rank")),
    ("show --json", "Missing argument 'NAME'", LISTS.format("show")),
    (
        "apply --force",
        "Missing argument 'NAME|EDIT...'",
        LISTS.format("apply"),
    ),
    (
        "generate x",
        "Missing option '--target'",
        LISTS.format("generate"),
    ),
    ("rank x --tower", "Option '--tower' requires an argument", LISTS.format("rank")),
    ("grad x --device", "Option '--device' requires an argument", LISTS.format("grad")),
    ("apply x --out=", "--out needs a value", "--out PATH"),
    (["apply", "x", "--out", ""], "--out needs a value", "--out PATH"),
    (
        "rank x --store --json",
        "--store needs a value, and --json is an option",
        "--store STORE",
    ),
    ("rank x --json=3", "Option '--json' does not take a value", LISTS.format("rank")),
    # What is too much.
    ("rank x y", "Got unexpected extra argument", LISTS.format("rank")),
    ("ls x 'y z'", "Got unexpected extra argument", LISTS.format("ls")),
    ("ls --store a --store b", "--store is given 2 times but takes one value", "give it once"),
    (
        "apply x -o a --out b --out c",
        "--out is given 3 times but takes one value",
        "give it once",
    ),
    # Values that are none of those there are.
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


def test_help_is_given_whatever_else_is_wrong():
    for words in ("rank x y --help", "ls --store a --store b --help", "rank -h"):
        done = inside(*split(words))
        assert (done.exit_code, done.stderr) == (0, "")
        assert "Common options" in done.stdout


def test_options_that_may_be_repeated_and_flags_are_taken_more_than_once(tmp_path):
    done = inside("ls", "-q", "-q", "--json", "--json", store=tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    repeated = refusal(["search", "x", "--layer", "a", "--layer", "b", "--steps", "0"])
    assert "--steps 0 is out of range" in repeated[0]


def test_other_errors_of_the_parser_get_a_hint():
    context = GROUP.get_command(None, "rank").make_context("rank", ["x"])
    error = usage.usage_error(typer.BadParameter("something odd.", ctx=context))
    assert (error.message, error.hint) == (
        "Invalid value: something odd",
        "`rank --help` lists its options",
    )


def test_a_shell_that_completes_is_not_refused():
    group = GROUP.make_context("slsgu", ["nosuch"], resilient_parsing=True)
    assert group.command is GROUP
    command = GROUP.get_command(None, "rank")
    assert command.make_context("rank", ["x", "y", "--store"], resilient_parsing=True)
