"""Recipes as they are read: what is refused, with its line; what a request's set is built of."""

import json
import re
import tomllib

import jsonschema
import pytest
from places import ROOT

from slsgu_cli.cli.recipe import recipe_text
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records.figures import Assertion
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.recipe import (
    Outputs,
    Recipe,
    RemovalRequest,
    Together,
    parse_recipe,
    read_recipe,
)
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import ATTACKED
from slsgu_cli.verification.verdicts import ATTACKS

WHOLE = """\
model = "local-dir:clip"
bounds = ["loss.brands <= 1"]

[sets]
sources = ["pairs.parquet?concept={}"]
retain_samples = 64
min_similarity = 0.2

[evaluation.brands]
source = "test.parquet"
templates = "templates.txt"

[rank]
damping = 0.1
[search]
criterion = "fa1"
layers = ["visual.proj"]

[outputs]
checkpoint = "out"
targets = "copies"

[[request]]
name = "acme"

[[request]]
name = "b b"
concept = "big bang"
aliases = ["bang"]
exclusions = ["theory"]
id = "R-2"
received = 2026-01-31
targets = ["sd"]
bounds = ["fa1 <= 0"]
"""


def read(text):
    return parse_recipe(text, "r.toml")


def test_every_table_becomes_the_record_of_its_command():
    recipe = read(WHOLE)
    first, second = recipe.requests
    assert (recipe.name, recipe.model, recipe.together) == (
        "r",
        ModelSpec("local-dir:clip"),
        Together.JOINT,
    )
    assert (recipe.rank.damping, recipe.search.layers) == (0.1, ("visual.proj",))
    assert (second.received, second.id, first.received) == ("2026-01-31", "R-2", None)
    assert recipe.bounds_of(second) == (
        Assertion("loss.brands", "<=", 1.0),
        Assertion("fa1", "<=", 0.0),
    )
    built = recipe.set_of(second)
    assert (built.name, built.concept, built.model) == ("b b", "big bang", recipe.model)
    assert built.sources == ("pairs.parquet?concept=big%20bang",)
    assert (built.match, built.not_match) == (("big bang", "bang"), ("theory",))
    assert (built.evals, built.templates) == (
        {"brands": "test.parquet"},
        {"brands": "templates.txt"},
    )
    assert built.screening.min_similarity == 0.2
    assert recipe.set_of(first).match == ()


def test_checks_are_those_of_the_table_and_of_the_bounds():
    text = WHOLE.replace("fa1 <= 0", "attack.ring-a-bell <= 10")
    first, second = read(text).requests
    assert (read(text).checks_of(first), read(text).checks_of(second)) == ((), ("ring-a-bell",))
    # `eval` knows nothing of attacks.
    assert read(text).words("eval", ["b b"]) == ["--assert", "loss.brands<=1"]
    table = '[verify]\nchecks = "relearn,spelling"\nsteps = 4\n\n[outputs]'
    with_table = read(text.replace("[outputs]", table))
    assert with_table.verify.settings.steps == 4
    assert with_table.checks_of(first) == ("spelling", "relearn")
    assert with_table.checks_of(second) == ("spelling", "relearn", "ring-a-bell")
    # Of the command line, `verify` tries the same on the same model; all where nothing is named.
    (written,) = (f"local-dir:{with_table.outputs.checkpoint}",)
    said = with_table.words("verify", ["b b"])
    assert said[:2] == ["--model", written]
    assert said[2:4] == ["--checks", "spelling,relearn,ring-a-bell"]
    assert said[4:] == ["--steps", "4"]
    assert read(text).words("verify", ["acme"]) == ["--model", written]
    with pytest.raises(InputError, match="about none of the figures"):
        read(WHOLE.replace("fa1 <= 0", "attack.relearn <= 10"))
    assert set(ATTACKS) == set(ATTACKED)


def test_a_shared_retain_set_is_about_none_of_the_requests():
    recipe = read("shared_retain = true\n" + WHOLE)
    excluded = {tuple(recipe.set_of(request).retain_exclude) for request in recipe.requests}
    assert excluded == {("acme", "big bang", "bang")}
    assert read(WHOLE).set_of(recipe.requests[0]).retain_exclude == ()


@pytest.mark.parametrize(
    ("old", "new", "line", "said", "hint"),
    [
        ("[rank]", "[ranks]", 13, "no key or table ranks", "near: rank"),
        ("model =", "modle =", 1, "no key or table modle", "near: model"),
        ("criterion", "critrion", 16, "[search] has no key critrion", "near: criterion"),
        ("aliases", "alias", 29, "[request] has no key alias", "near: aliases"),
        ("templates", "template", 11, "[evaluation.brands] has no key template", "near: templates"),
        ("= 64", "= 0", 6, "retain_samples 0 is out of range", "retain_samples 1"),
        ("= 64", '= "64"', 6, "retain_samples '64' is no number", None),
        ("= 64", "= true", 6, "retain_samples is not of one value", None),
        ('"fa1"', '"fa3"', 16, "criterion fa3 is not one of fa1, fa5, margin", None),
        ('["visual.proj"]', '"visual.proj"', 17, "layers is no list", 'layers = ["..."]'),
        ("2026-01-31", '"soon"', 32, "received soon is no date", "received = 2026-11-01"),
        ('["fa1 <= 0"]', '["fa1"]', 34, "bounds 'fa1' compares no figure", "bounds 'fa1<=0'"),
        ('name = "b b"', "", 26, "[request] has no name", "name: Name of the request"),
        ('name = "acme"', 'name = "/"', 24, "'/' cannot name a set", None),
        ("[[request]]", "[[request.x]]", 23, "request is no table", "[[request]]"),
    ],
)
def test_what_is_refused_is_told_with_its_line(old, new, line, said, hint):
    with pytest.raises(InputError) as refused:
        read(WHOLE.replace(old, new))
    assert refused.value.message.startswith(f"r.toml, line {line}: ")
    assert said in refused.value.message
    assert hint is None or hint in refused.value.hint


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "b b"', 'name = "acme"', "the request acme is there twice"),
        ("loss.brands", "loss.objects", "the bound of acme loss.objects<=1 is about none"),
        ('targets = "copies"', "", "b b has targets, and nothing says where they go"),
        ('sources = ["pairs.parquet?concept={}"]', "", "the request acme has no sources"),
        ('["sd"]', '["a/sd", "b/sd"]', "two targets are called sd"),
        ("[rank]", "[rank", "is not TOML"),
    ],
)
def test_what_contradicts_itself_is_refused(old, new, said):
    with pytest.raises(InputError, match=said):
        read(WHOLE.replace(old, new))


def test_a_recipe_of_a_program_is_held_to_the_same():
    with pytest.raises(UsageError, match="there is no evaluation set"):
        Recipe(name="x", model=ModelSpec("m"), sets=BuildRequest())
    with pytest.raises(UsageError, match="near: acme"):
        try:
            read(WHOLE).request("acmee")
        except UsageError as error:
            raise UsageError(str(error.hint)) from error
    assert RemovalRequest(name="x").concept == "x"
    assert Outputs() == read(WHOLE.partition("[outputs]")[0]).outputs


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(MissingError, match="there is no recipe"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("page", "begin", "end"),
    [("README.md", "```toml\n", "```"), ("docs/guide/recipes.md", "<< 'END'\n", "> END")],
)
def test_recipes_of_the_documents_read(page, begin, end):
    text = (ROOT / page).read_text().partition(begin)[2].partition(end)[0]
    recipe = read(re.sub(r"(?m)^> ?", "", text))
    assert recipe.names[:2] == ("facebook", "google")
    assert recipe.outputs.checkpoint


@pytest.mark.parametrize("demo", [True, False])
def test_what_init_writes_reads_and_fits_the_schema(tmp_path, demo):
    path = tmp_path / "begin.toml"
    path.write_text(recipe_text(path, demo=demo))
    recipe = read_recipe(path)
    assert len(recipe.requests) == (3 if demo else 1)
    assert recipe.name == "begin"
    schema = json.loads((ROOT / "docs" / "artifacts" / "recipe.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for text in (path.read_text(), WHOLE):
        # JSON has no dates: editors take them for texts.
        content = json.loads(json.dumps(tomllib.loads(text), default=str))
        jsonschema.validate(content, schema)
        for wrong in ({"sets": {"source": []}}, {"together": "both"}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(content | wrong, schema)
