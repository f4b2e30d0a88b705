"""`slsgu evidence`: what is filed of a removal, and how a reader checks it."""

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from processes import inside, rows

from slsgu_cli import recipes
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.method import Direction
from slsgu_cli.records.options import BuildRequest, RankOptions, SearchOptions
from slsgu_cli.records.recipe import EvidenceRequest, Outputs, Recipe, RemovalRequest, Stage
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import Check, Settings, VerifyRequest
from slsgu_cli.report.evidence import write_evidence
from slsgu_cli.store.store import Store
from slsgu_cli.verification.verify import verify

WEIGHTS = "open_clip_model.safetensors"


def recipe_of(world, **changes):
    """Return a recipe of two colours, with paths from the folder that it is run in."""
    sets = BuildRequest(
        sources=[world.sources["pairs"]],
        retain_samples=60,
        test_fraction=0.5,
        label_column="label",
        evals={"first": world.sources["first"]},
    )
    blue = RemovalRequest(
        name="blue",
        aliases=["navy"],
        exclusions=["sky"],
        id="R-7",
        received="2026-02-03",
        note="asked by letter",
        reference="case 7/26",
    )
    usual = Recipe(
        name="colours",
        model=world.model,
        sets=sets,
        rank=RankOptions(direction=Direction.GRADIENT),
        search=SearchOptions(steps=4, layers=["visual.proj"]),
        outputs=Outputs(checkpoint=Path("clip"), evidence=Path("filed")),
        requests=(blue, RemovalRequest(name="red", id="R-8")),
    )
    return replace(usual, **changes)


@pytest.fixture(scope="module")
def filed(shared_world, tmp_path_factory):
    """A folder in which the recipe was run."""
    folder = tmp_path_factory.mktemp("filed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        recipes.run(recipe_of(shared_world), store="store")
    return folder


@pytest.fixture
def job(filed, tmp_path, monkeypatch):
    """The same folder for one test, which runs in it."""
    shutil.copytree(filed, tmp_path / "job")
    monkeypatch.chdir(tmp_path / "job")
    return tmp_path / "job"


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def texts(folder):
    """Return the text of every file below a folder, with its name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.name: path.read_bytes().decode("utf-8", "replace") for path in files}


def test_the_statement_is_about_the_files_that_were_written(filed, shared_world):
    statement = json.loads((filed / "filed" / "statement.json").read_text())
    assert statement["_type"] == "https://in-toto.io/Statement/v1"
    subjects = {each["name"]: each["digest"]["sha256"] for each in statement["subject"]}
    written = {path.name: path for path in (filed / "clip").iterdir()}
    assert subjects == {f"clip/{name}": sha256(path) for name, path in written.items()}
    done = statement["predicate"]
    before = {each["name"]: each["digest"]["sha256"] for each in done["materials"]}
    assert before[WEIGHTS] == sha256(shared_world.folder / WEIGHTS) != subjects[f"clip/{WEIGHTS}"]
    told = {each["name"]: each["digest"]["sha256"] for each in done["evidence"]}
    held = {path for path in (filed / "filed").rglob("*") if path.is_file()}
    assert told == {
        str(path.relative_to(filed / "filed")): sha256(path)
        for path in held
        if path.name != "statement.json"
    }
    assert [each["state"] for each in done["requests"]] == ["forgotten within bounds"] * 2
    assert {each["verified"] for each in done["requests"]} == {False}


def test_the_page_tells_the_request_and_what_was_not_done(filed):
    page = (filed / "filed" / "evidence.html").read_text()
    for told in ("R-7", "2026-02-03", "case 7/26", "asked by letter", "navy", "sky", "in it"):
        assert told in page
    assert page.count("No verification has been run on it") == 2
    assert "<script" not in page
    assert set(re.findall(r'(?:src|href)="([^"#:]*)', page)) <= {"", "data"}
    content = json.loads((filed / "filed" / "evidence.json").read_text())
    figures = {each["figure"]: each for each in content["requests"][0]["figures"]}
    assert (figures["FA@1"]["after"], figures["FA@1"]["from"]) == (0, 0)
    assert 0 < figures["FA@1"]["to"] < 100
    assert "TA@1 first" in figures
    assert content["requests"][0]["measured on"] == "what was written"


def test_two_commands_check_a_model_and_tell_one_that_was_changed(job):
    checks = json.loads((job / "filed" / "evidence.json").read_text())["checks"]
    by_edit, by_digest = checks
    held = inside(*by_edit.split()[1:], store=job / "elsewhere")
    assert held.exit_code == 0, held.stderr
    assert subprocess.run(by_digest, shell=True, capture_output=True, check=False).returncode == 0
    weights = job / "clip" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert subprocess.run(by_digest, shell=True, capture_output=True, check=False).returncode != 0
    again = inside("evidence", "all", "--out", "filed", "--overwrite", store=job / "store")
    assert "others than those that the run wrote" in again.stderr
    shutil.copy(weights, job / "kept")
    original = ModelSpec(json.loads((job / "filed" / "evidence.json").read_text())["model"])
    shutil.copy(original.name.removeprefix("local-dir:") + f"/{WEIGHTS}", weights)
    assert inside(*by_edit.split()[1:], store=job / "elsewhere").exit_code == 5
    told = inside("evidence", "blue", "--out", "one", store=job / "store")
    assert rows(told.stdout)[0][1][:4] == ["blue", "forgotten within bounds", "absent", "not run"]


def test_where_names_are_confidential_no_file_has_them(job, shared_world):
    store = Store("store")
    checks = (Check.SPELLING, Check.NEIGHBOURS, Check.NEAREST, Check.PARAPHRASE)
    request = VerifyRequest(
        model=ModelSpec("local-dir:clip"), checks=checks, settings=Settings(rows=20)
    )
    verify(store, "blue", request)
    hidden = re.compile(r"(?<![a-z0-9])(blue|navy|red)(?![a-z0-9])|eulb|bule", re.IGNORECASE)
    told = inside("evidence", "all", "--by-reference", "--out", "secret", store=job / "store")
    assert told.exit_code == 0, told.stderr
    shown = texts(job / "secret")
    assert sorted(shown) == [
        "clip.sha256",
        "commands.sh",
        "evidence.html",
        "evidence.json",
        "statement.json",
    ]
    found = {name: match[0] for name, text in shown.items() if (match := hidden.search(text))}
    assert found == {}
    assert "case 7/26" in shown["evidence.html"]
    assert "Not tried" in shown["evidence.html"]
    recipes.run(recipe_of(shared_world, by_reference=True), store="store")
    assert sorted(texts(job / "filed")) == sorted(shown)
    # From then on the ledger knows: nobody has to say so again.
    inside("evidence", "blue", "--out", "again", store=job / "store")
    assert not hidden.search(texts(job / "again")["evidence.html"])


def test_a_reference_must_not_tell_the_name(job, shared_world):
    red = RemovalRequest(name="red", reference="the Red one")
    recipe = recipe_of(shared_world, by_reference=True)
    recipe = replace(recipe, requests=(recipe.requests[0], red))
    with pytest.raises(UsageError, match="leaves its name out"):
        recipes.run(recipe, store="store")
    with pytest.raises(UsageError, match="no reference to be told by"):
        replace(recipe, requests=(RemovalRequest(name="red"),))


def test_what_was_verified_is_told_in_words(job):
    request = VerifyRequest(
        model=ModelSpec("local-dir:clip"), checks=[Check.PARAPHRASE], settings=Settings(rows=20)
    )
    verify(Store("store"), "blue", request)
    write_evidence(Store("store"), EvidenceRequest(names=["all"], out=job / "new"))
    blue, red = json.loads((job / "new" / "evidence.json").read_text())["requests"]
    assert red["verification"] is None
    page = (job / "new" / "evidence.html").read_text()
    assert all(sentence in page for sentence in blue["verification"]["conclusion"])
    assert "prefix" in blue["verification"]["not tried"]
    assert "paraphrase" not in blue["verification"]["not tried"]
    assert page.count("No verification has been run on it") == 1


def test_a_run_files_it_again_where_it_would_tell_other_things(job, shared_world):
    before = texts(job / "filed")
    assert recipes.run(recipe_of(shared_world), store="store").done == ()
    recipe = recipe_of(shared_world)
    noted = replace(recipe.requests[0], note="asked twice")
    changed = replace(recipe, requests=(noted, recipe.requests[1]))
    done = recipes.run(changed, store="store").done
    assert [step.stage for step in done] == [Stage.EVIDENCE]
    assert "asked twice" in (job / "filed" / "evidence.html").read_text()
    assert [s.stage for s in recipes.run(recipe, store="store").done] == [Stage.EVIDENCE]
    assert texts(job / "filed") == before


def test_without_a_recipe_it_is_of_a_set_and_the_models_that_are_named(job):
    shutil.rmtree(job / "store" / "ledgers")
    told = inside("evidence", "blue", "--out", "plain", "--json", store=job / "store")
    assert told.exit_code == 0, told.stderr
    (row,) = json.loads(told.stdout)["evidence"]
    assert (row["state"], row["verification"], row["FA@1 after"]) == (None, "not run", 0)
    statement = json.loads((job / "plain" / "statement.json").read_text())
    assert [each["name"] for each in statement["subject"]] == ["edits/blue.safetensors"]
    assert "made without a recipe" in (job / "plain" / "evidence.html").read_text()
    assert "slsgu build-sets blue" in (job / "plain" / "commands.sh").read_text()
    named = inside("evidence", "blue", "--out", "named", "-m", "clip", store=job / "store")
    assert named.exit_code == 0, named.stderr
    statement = json.loads((job / "named" / "statement.json").read_text())
    assert f"clip/{WEIGHTS}" in [each["name"] for each in statement["subject"]]
    assert inside("evidence", "green", "--out", "no", store=job / "store").exit_code == 3


def test_files_of_others_are_not_replaced(job):
    request = EvidenceRequest(names=["blue"], out=job / "filed")
    with pytest.raises(InputError, match="exists already"):
        write_evidence(Store("store"), request)
    (job / "filed" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match=r"letter.txt, which would be lost"):
        write_evidence(Store("store"), replace(request, overwrite=True))
    (job / "filed" / "letter.txt").unlink()
    write_evidence(Store("store"), replace(request, overwrite=True))
    assert not (job / "filed" / "sheets" / "red.png").exists()
    with pytest.raises(UsageError, match="never had a request"):
        write_evidence(Store("store"), replace(request, names=["blue", "mauve"], overwrite=True))
