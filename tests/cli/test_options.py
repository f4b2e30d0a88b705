"""Options as records say them: help, refusals, command lines, completion."""

import re
from dataclasses import is_dataclass
from pathlib import Path

import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from slsgu_cli.cli import app
from slsgu_cli.cli.app import COMMANDS
from slsgu_cli.cli.usage import Command
from slsgu_cli.errors import UsageError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.method import Alignment, Criterion, Precision, Qkv, Tower
from slsgu_cli.records.option_fields import PANELS, build, command_line, option_fields
from slsgu_cli.records.options import ApplyRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.text import near

GROUP = typer.main.get_command(app)
LISTED = list(COMMANDS)


def ran(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def refusal(*words):
    """Return what a command that is refused says."""
    done = ran(*words)
    assert (done.exit_code, done.stdout) == (2, ""), done.output
    return " ".join(done.stderr.split())


def read(command, kind, words):
    """Return the record that the words of a command line ask for."""
    context = GROUP.get_command(None, command).make_context(command, list(words))
    words = {key: value for key, value in context.params.items() if value not in (None, [], ())}
    values = {
        p.path: p.value(words[p.option.key]) for p in option_fields(kind) if p.option.key in words
    }
    return build(kind, values)


def test_commands_are_listed_in_groups_in_the_order_of_use():
    shown = ran("--help").stdout
    lines = [line for line in shown.splitlines() if re.match(r"  [a-z-]+  +[A-Z]", line)]
    assert [line.split()[0] for line in lines if line.split()[0] in COMMANDS] == LISTED
    assert "..." not in shown.partition("Unlearning, step by step")[2]


@pytest.mark.parametrize("name", LISTED)
def test_every_option_has_a_help_text_within_80_columns(name):
    command = GROUP.get_command(None, name)
    assert isinstance(command, Command)
    for param in command.params:
        if param.param_type_name == "argument" or param.hidden:
            continue
        said = param.help
        assert said, param.name
        assert param.rich_help_panel in PANELS
        assert param.is_flag or not re.search(r"[<\[]", param.metavar), param.metavar
        whole = param.is_flag or param.required or param.multiple or param.name == "store"
        assert whole or "[default: " in said, param.name
        assert ("Repeatable." in said) or not param.multiple
    shown = ran(name, "--help").stdout
    assert max(map(len, shown.splitlines())) <= 80
    assert "..." not in shown.partition("Common options")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trajectory", "a", "--until", "-3"], "--until -3 is not a positive percentage"),
        (["search", "a", "--goal", "5"], "--goal is for a search on a model built on CLIP"),
        (["search", "a", "--top", "5", "--others", "3"], "--top, --others are for a search on"),
        (["search", "a", "--encoder", "e"], "try: slsgu search NAME --target FOLDER"),
        (["search", "a", "-t", "t", "--joint"], "--joint is for a search on"),
        *[
            (["search", "a", "-t", "t", option, value], f"{option} is for a")
            for option, value in (
                ("--criterion", "fa5"),
                ("--margin", "1"),
                ("--precision", "tf32"),
                ("--cache-budget", "1G"),
            )
        ],
        (["build-sets", "a", "--replay", "--seed", "5"], "takes no other options: not --seed"),
        (
            ["build-sets", "a", "--replay", "--max-forget", "3", "--count", "9"],
            "not --max-forget, --count",
        ),
        (["build-sets", "--replay"], "--replay needs the name of a set"),
        (["build-sets", "a", "-m", "m", "--count", "5"], "--count is for --generate"),
        (["build-sets", "a", "-m", "m", "--pipeline", "p"], "--pipeline is for --generate"),
        (["build-sets", "a", "-m", "m", "--retries", "2"], "--retries is for --metadata"),
        (["build-sets", "a", "-m", "m", "--url-col", "u"], "--url-col is for --metadata"),
        (["build-sets", "a", "-m", "m", "--generate", "p"], "--generate needs --pipeline"),
        (["build-sets", "a"], "build-sets needs the model the sets are for"),
        (["build-sets", "a", "-p", "openai"], "--pretrained needs --model"),
        (["generate", "a", "-t", "x", "--themes", "f"], "--themes is for an answer set"),
        (["compare", "a", "--iterations", "3"], "--iterations is for a diffusion pipeline"),
        (["generate", "a", "-t", "x", "--seeds", "few"], "--seeds few is not a list of numbers"),
        (["generate", "a", "-t", "x", "--seeds", "1-3,2"], "--seeds 1-3,2 names a number twice"),
        (["generate", "a", "-t", "x", "--seeds", "3-1"], "--seeds 3-1 names no number"),
        (["search", "a", "-t", "x", "--judge", "b", "--judge", "b"], "--judge names a judge twice"),
        (["rank", "a", "--direction", "gradient", "--damping", "1"], "for the whitened or kfac"),
    ],
)
def test_contradicting_options_are_refused(words, said):
    assert said in refusal(*words)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-s", "pairs"], "sweep needs a model try: --model MODEL"),
        (["-s", "pairs", "-m", "m"], "a sweep needs an evaluation set try: --eval"),
        (
            ["-s", "pairs?label={}", "-m", "m", "--eval", "all=rows"],
            "a --source with {} has rows of one class only, and none to retain",
        ),
    ],
)
def test_missing_options_of_a_sweep_are_named(words, said, tmp_path):
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    assert said in refusal("sweep", "colours", "--classes", tmp_path / "classes.txt", *words)


def test_a_sweep_over_no_classes_is_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("\n")
    done = ran("sweep", "colours", "--classes", tmp_path / "classes.txt", "-m", "m")
    assert (done.exit_code, done.stdout) == (3, "")
    assert "classes.txt is not a list of classes: it is empty" in done.stderr


def test_similar_names_are_suggested():
    names = ["ViT-B-32", "ViT-B-16-SigLIP", "RN50"]
    assert near("ViT-B32", names).startswith("near: ViT-B-32")
    assert near("siglip", names) == "near: ViT-B-16-SigLIP"
    assert near("opnai", ["openai", "laion2b"]) == "near: openai"
    assert near("zzzz", names) is None
    assert near("--retain", ["--direction", "--pretrained"]) is None
    assert near("--retain", ["--pretrained", "--retain-source"]) == "near: --retain-source"


numbers = st.floats(1e-6, 1e6, allow_nan=False)
FLAGS = {flag for name in LISTED for p in GROUP.get_command(None, name).params for flag in p.opts}
# A flag is not a value of another option.
texts = st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1).filter(
    lambda text: str(Path(text)) not in FLAGS
)
lists = st.lists(texts, max_size=3).map(tuple)
RECORDS = {
    "grad": st.builds(
        PassOptions,
        batch_size=st.integers(2, 999),
        precision=st.sampled_from(Precision),
        memory_budget=st.none() | st.integers(1, 1 << 40),
        device=st.sampled_from(["cpu", "auto"]),
    ),
    "rank": st.builds(
        RankOptions,
        alignment=st.sampled_from(Alignment),
        damping=st.none() | numbers,
        qkv=st.sampled_from(Qkv),
        include=lists,
        exclude=lists,
        target=st.none() | texts,
        tower=st.none() | st.sampled_from(Tower),
        device=st.just("cuda:1"),
    ),
    "search": st.builds(
        SearchOptions,
        layers=lists,
        direction=st.none() | st.sampled_from(Direction),
        damping=st.none() | numbers,
        criterion=st.sampled_from(Criterion),
        margin=numbers,
        steps=st.integers(1, 99),
        full=st.booleans(),
        precision=st.sampled_from(Precision),
    ),
    "apply": st.builds(
        ApplyRequest,
        names=st.lists(st.from_regex(r"[a-z]+", fullmatch=True), min_size=1, max_size=2).map(tuple),
        out=texts.map(Path),
        model=st.none() | st.builds(ModelSpec, texts, st.none() | texts),
        step=st.none() | st.floats(allow_nan=False),
        scale=numbers,
        revert=st.booleans(),
    ),
}


@pytest.mark.parametrize("name", RECORDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_the_command_line_of_a_record_gives_the_record(name, data):
    record = data.draw(RECORDS[name])
    assert is_dataclass(record)
    words = command_line(record)
    arguments = [] if name == "apply" else ["blue"]
    assert read(name, type(record), [*arguments, *words]) == record


def test_a_missing_value_is_named():
    with pytest.raises(UsageError, match="NAME"):
        build(ApplyRequest, {})
