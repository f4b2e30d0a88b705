"""Reading recipes: errors with their lines, and the records that a recipe becomes."""

import json
import re
import tomllib

import jsonschema
import pytest
from places import ROOT

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records.figures import Assertion
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.removals.overlay import options_for
from slsgu_cli.removals.reading import parse_recipe, read_recipe
from slsgu_cli.removals.recipe import Outputs, Recipe, RemovalRequest, Together
from slsgu_cli.removals.template import recipe_text

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
    bounds = '"description.worst <= 10", "look-alikes.mean <= 2"'
    both = read(WHOLE.replace('"fa1 <= 0"', bounds))
    assert both.checks_of(both.requests[1]) == ("description", "look-alikes")
    # `eval` runs no attacks.
    assert options_for("eval", read(text), ["b b"]) == ["--assert", "loss.brands<=1"]
    table = '[verify]\nchecks = "relearn,typos"\nsteps = 4\n\n[outputs]'
    with_table = read(text.replace("[outputs]", table))
    assert with_table.verify.settings.steps == 4
    assert with_table.checks_of(first) == ("typos", "relearn")
    assert with_table.checks_of(second) == ("typos", "relearn", "ring-a-bell")
    # The command `verify` gets the same checks and model, and all checks by default.
    (written,) = (f"local-dir:{with_table.outputs.checkpoint}",)
    said = options_for("verify", with_table, ["b b"])
    assert said[:2] == ["--model", written]
    assert said[2:4] == ["--checks", "typos,relearn,ring-a-bell"]
    assert said[4:] == ["--steps", "4"]
    assert options_for("verify", read(text), ["acme"]) == ["--model", written]
    with pytest.raises(InputError, match="about an unknown figure"):
        read(WHOLE.replace("fa1 <= 0", "attack.relearn <= 10"))


def test_a_shared_retain_set_has_none_of_the_concepts():
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
        ("= 64", '= "64"', 6, "retain_samples '64' is not a number", None),
        ("= 64", "= true", 6, "retain_samples takes single values only", None),
        ('"fa1"', '"fa3"', 16, "criterion fa3 is not one of fa1, fa5, margin", None),
        ('["visual.proj"]', '"visual.proj"', 17, "layers is not a list", 'layers = ["..."]'),
        ("2026-01-31", '"soon"', 32, "received soon is not a date", "received = 2026-11-01"),
        ('["fa1 <= 0"]', '["fa1"]', 34, "bounds 'fa1' compares no figure", "bounds 'fa1<=0'"),
        ('name = "b b"', "", 26, "[request] has no name", "name: Name of the request"),
        ('name = "acme"', 'name = "/"', 24, "'/' cannot name a set", None),
        ("[[request]]", "[[request.x]]", 23, "request is not a table", "[[request]]"),
    ],
)
def test_errors_name_the_line(old, new, line, said, hint):
    with pytest.raises(InputError) as refused:
        read(WHOLE.replace(old, new))
    assert refused.value.message.startswith(f"r.toml, line {line}: ")
    assert said in refused.value.message
    assert hint is None or hint in refused.value.hint


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('name = "b b"', 'name = "acme"', "there are two requests acme"),
        (
            "loss.brands",
            "loss.objects",
            "the bound of acme loss.objects<=1 is about an unknown figure",
        ),
        ('targets = "copies"', "", "b b has targets, but there is no folder for their copies"),
        ('sources = ["pairs.parquet?concept={}"]', "", "the request acme has no sources"),
        ('["sd"]', '["a/sd", "b/sd"]', "two targets are called sd"),
        ("[rank]", "[rank", "is not TOML"),
    ],
)
def test_contradictions_are_refused(old, new, said):
    with pytest.raises(InputError, match=said):
        read(WHOLE.replace(old, new))


def test_a_recipe_made_in_python_is_checked_too():
    with pytest.raises(UsageError, match="there is no evaluation set"):
        Recipe(name="x", model=ModelSpec("m"), sets=BuildRequest())
    with pytest.raises(UsageError, match="near: acme"):
        try:
            read(WHOLE).request("acmee")
        except UsageError as error:
            raise UsageError(str(error.hint)) from error
    assert RemovalRequest(name="x").concept == "x"
    assert Outputs() == read(WHOLE.partition("[outputs]")[0]).outputs


def test_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(MissingError, match="there is no recipe"):
        read_recipe(tmp_path / "none.toml")


@pytest.mark.parametrize(
    ("page", "begin", "end"),
    [("README.md", "```toml\n", "```"), ("docs/guide/recipes.md", "<< 'END'\n", "> END")],
)
def test_recipes_in_the_documentation_can_be_read(page, begin, end):
    text = (ROOT / page).read_text().partition(begin)[2].partition(end)[0]
    recipe = read(re.sub(r"(?m)^> ?", "", text))
    assert recipe.names[:2] == ("facebook", "google")
    assert recipe.outputs.checkpoint


@pytest.mark.parametrize("demo", [True, False])
def test_recipes_of_init_can_be_read_and_fit_the_schema(tmp_path, demo):
    path = tmp_path / "begin.toml"
    path.write_text(recipe_text(path, demo=demo))
    recipe = read_recipe(path)
    assert len(recipe.requests) == (3 if demo else 1)
    assert recipe.name == "begin"
    schema = json.loads((ROOT / "docs" / "artifacts" / "recipe.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for text in (path.read_text(), WHOLE):
        # JSON has no dates: editors treat them as strings.
        content = json.loads(json.dumps(tomllib.loads(text), default=str))
        jsonschema.validate(content, schema)
        for wrong in ({"sets": {"source": []}}, {"together": "both"}):
            with pytest.raises(jsonschema.ValidationError):
                jsonschema.validate(content | wrong, schema)
