"""A command line that cannot be: told as every other error, by what was meant."""

import json
import shlex

import pytest
import typer
from processes import inside

from slsgu_cli.cli import app, usage
from slsgu_cli.cli.app import COMMANDS
from slsgu_cli.errors import UsageError

GROUP = typer.main.get_command(app)
ERROR = {"schema", "command", "error"}
LISTS = "`slsgu {} --help` lists what it takes"
QUOTES = f"put quotes around what has spaces; {LISTS}"

REFUSED = [
    # Options: misspelt, of another command, of no command, before the command.
    ("rank x --towr text", "rank has no option --towr", "near: --tower"),
    ("rank x --towr=text", "rank has no option --towr", "near: --tower"),
    ("rank x --top 3", "rank has no option --top; search has it", LISTS.format("rank")),
    ("rank x -s a", "rank has no option -s; build-sets and sweep have it", LISTS.format("rank")),
    ("rank x --version", "rank has no option --version; slsgu has it", LISTS.format("rank")),
    ("rank x --qqqq", "rank has no option --qqqq", LISTS.format("rank")),
    ("rank x -qz", "rank has no option -z", LISTS.format("rank")),
    ("--json rank x", "--json stands behind a command", "slsgu COMMAND ... --json"),
    ("--qqqq", "slsgu has no option --qqqq", "`slsgu --help` lists the commands"),
    # Commands.
    ("rnk x", "there is no command rnk", "near: rank"),
    ("buildsets", "there is no command buildsets", "near: build-sets"),
    ("zzzz --json", "there is no command zzzz", "`slsgu --help` lists the commands"),
    # What is missing: arguments, options, values.
    ("rank", "rank needs NAME: Name of the set", "slsgu rank NAME"),
    ("show --json", "show needs NAME: Name of the set", "slsgu show NAME"),
    (
        "apply --force",
        "apply needs NAME|EDIT...: Sets, or edit files",
        "slsgu apply NAME|EDIT... --out PATH",
    ),
    (
        "generate x",
        "generate needs --target: Folder of the model that is built on CLIP",
        "slsgu generate NAME|EDIT... --target PATH",
    ),
    ("rank x --tower", "--tower needs a value", "--tower vision|text"),
    ("grad x --device", "--device needs a value", "--device DEVICE"),
    ("apply x --out=", "--out needs a value", "--out PATH"),
    (["apply", "x", "--out", ""], "--out needs a value", "--out PATH"),
    (
        "rank x --store --json",
        "--store needs a value, and --json is an option",
        "--store STORE, or --store=--json if that is its value",
    ),
    ("rank x --json=3", "--json takes no value", "--json alone"),
    # What is too much.
    ("rank x y", "rank takes one NAME: y is too much", QUOTES.format("rank")),
    ("ls x 'y z'", "ls takes no arguments: x, 'y z' are too much", QUOTES.format("ls")),
    ("ls --store a --store b", "--store is given 2 times and takes one value", "give it once"),
    (
        "apply x -o a --out b --out c",
        "--out is given 3 times and takes one value",
        "give it once",
    ),
    # Values that are none of those there are.
    ("rank x --tower txt", "--tower txt is none of vision, text", "near: text"),
    ("verify x --checks relern", "--checks relern is none of paraphrase, ", "near: relearn"),
    ("search x --steps ten", "--steps ten is no whole number", "such as --steps 4"),
    ("search x --steps 0", "--steps 0 is out of range: it must be 1 or more", "--steps 1"),
    (
        "search x -t m --goal 101",
        "--goal 101 is out of range: it must be from 0 to 100",
        "--goal 100",
    ),
    ("grad x --device gpu", "--device 'gpu' is none of auto, cpu, cuda, cuda:N", "--device auto"),
]


def split(words):
    return shlex.split(words) if isinstance(words, str) else words


def told(words):
    """Return what a refused command line says, line by line; it prints no results."""
    done = inside(*words)
    assert done.exit_code == 2, done.output
    assert not done.stdout if "--json" not in words else set(json.loads(done.stdout)) == ERROR
    return done.stderr.splitlines()


@pytest.mark.parametrize(("words", "message", "hint"), REFUSED)
def test_what_is_refused_is_told_in_one_line_with_what_mends_it(words, message, hint):
    first, *rest = told(split(words))
    assert first.startswith(f"error: {message}")
    assert rest == [f"  try: {hint}"]


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_refuses_alike_also_under_json(name):
    plain = told([name, "--no-such-option"])
    assert plain[0].startswith(f"error: {name} has no option --no-such-option")
    done = inside(name, "--json", "--no-such-option")
    assert (done.exit_code, done.stderr.splitlines()) == (2, plain)
    document = json.loads(done.stdout)
    hint = plain[1].removeprefix("  try: ") if plain[1:] else None
    message = plain[0].removeprefix("error: ")
    assert document["error"] == {"message": message, "hint": hint, "exit_code": 2}
    assert (document["schema"], document["command"]) == (1, name)


def test_help_is_given_whatever_else_is_wrong():
    for words in ("rank x y --help", "ls --store a --store b --help", "rank -h"):
        done = inside(*split(words))
        assert (done.exit_code, done.stderr) == (0, "")
        assert "Common options" in done.stdout


def test_options_that_may_be_repeated_and_flags_are_taken_more_than_once(tmp_path):
    done = inside("ls", "-q", "-q", "--json", "--json", store=tmp_path)
    assert (done.exit_code, done.stderr) == (0, "")
    repeated = told(["search", "x", "--layer", "a", "--layer", "b", "--steps", "0"])
    assert "--steps 0 is out of range" in repeated[0]


def test_what_the_parser_says_otherwise_is_passed_on_in_the_same_form():
    context = GROUP.get_command(None, "rank").make_context("rank", ["x"])
    odd = pytest.raises(UsageError, match=r"^rank: something odd$")
    with odd as caught, usage.explained(context):
        raise typer.BadParameter("something odd.")
    assert caught.value.hint == "`rank --help` lists what it takes"


def test_a_shell_that_completes_is_not_refused():
    group = GROUP.make_context("slsgu", ["nosuch"], resilient_parsing=True)
    assert group.command is GROUP
    command = GROUP.get_command(None, "rank")
    assert command.make_context("rank", ["x", "y", "--store"], resilient_parsing=True)
