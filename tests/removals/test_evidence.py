"""`slsgu evidence`: what it says about a removal, and how a reader checks it."""

import hashlib
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from processes import inside, rows

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.ledger import StageKind
from slsgu_cli.records.options import BuildRequest, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import Check, Settings, VerifyRequest
from slsgu_cli.removals import running
from slsgu_cli.removals.evidence import write_evidence
from slsgu_cli.removals.job import Job
from slsgu_cli.removals.recipe import EvidenceRequest, Outputs, Recipe, RemovalRequest
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


# Enough of the recipe to find its ledger.
COLOURS = """\
model = "local-dir:clip"
sets.sources = ["pairs"]
evaluation.first.source = "first"
request = [{name = "blue"}, {name = "red"}]
"""
RECIPE = Path("colours.toml")


def write(job, recipe, **changes):
    request = EvidenceRequest(**{"names": ["all"], "out": job / "new", "recipe": RECIPE, **changes})
    return write_evidence(Job(recipe, "store"), request)


@pytest.fixture(scope="module")
def filed(shared_world, tmp_path_factory):
    """A folder in which the recipe was run."""
    folder = tmp_path_factory.mktemp("filed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        running.run(recipe_of(shared_world), store="store")
    (folder / "colours.toml").write_text(COLOURS)
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


def evidence_in(folder):
    return json.loads((folder / "evidence.json").read_text())


def test_the_files_before_and_after_are_those_of_the_models(filed, shared_world):
    (model,) = evidence_in(filed / "filed")["models"]
    before = {each["name"]: each["before"] for each in model["files"]}
    after = {each["name"]: each["after"] for each in model["files"]}
    written = {path.name: path for path in (filed / "clip").iterdir()}
    assert after == {name: sha256(path) for name, path in written.items()}
    assert before[WEIGHTS] == sha256(shared_world.folder / WEIGHTS) != after[WEIGHTS]
    listed = (filed / "filed" / "clip.sha256").read_text().splitlines()
    assert dict(reversed(line.split("  ")) for line in listed) == after


def test_the_page_shows_the_request_and_names_missing_verifications(filed):
    page = (filed / "filed" / "evidence.html").read_text()
    for text in ("R-7", "2026-02-03", "case 7/26", "asked by letter", "navy", "sky", "in it"):
        assert text in page
    assert page.count("No verification has been run.") == 2
    assert "Verification has not been run for blue, red." in re.sub(r"\s+", " ", page)
    for name in ("evidence.html", "report.html"):
        text = (filed / "filed" / name).read_text()
        assert "<script" not in text
        links = set(re.findall(r'(?:src|href)="([^"#:]*)', text)) - {"", "data"}
        assert all((filed / "filed" / link).is_file() for link in links)
    first, second = evidence_in(filed / "filed")["requests"]
    figures = {each["figure"]: each for each in first["figures"]}
    assert (figures["FA@1"]["after"], figures["FA@1"]["from"]) == (0, 0)
    assert 0 < figures["FA@1"]["to"] < 100
    assert figures["FA@1"]["test"] is True
    assert "TA@1 first" in figures
    # The edit is of the vision tower.
    assert first["neutral prompts"] == {"spread": 100, "overlap": 100}
    assert "prompts have 100.00% of the original's spread" in re.sub(r"\s+", " ", page)
    assert [each["state"] for each in (first, second)] == ["forgotten within bounds"] * 2


def test_two_commands_check_a_model_and_detect_a_change(job):
    by_edit, by_digest = evidence_in(job / "filed")["checks"]
    held = inside(*by_edit.split()[1:], store=job / "elsewhere")
    assert held.exit_code == 0, held.stderr
    assert subprocess.run(by_digest, shell=True, capture_output=True, check=False).returncode == 0
    weights = job / "clip" / WEIGHTS
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert subprocess.run(by_digest, shell=True, capture_output=True, check=False).returncode != 0
    options = "--recipe", RECIPE
    again = inside(
        "evidence", "all", *options, "--out", "filed", "--overwrite", store=job / "store"
    )
    assert "have changed since the run wrote them" in again.stderr
    shutil.copy(weights, job / "kept")
    original = ModelSpec(evidence_in(job / "filed")["model"])
    shutil.copy(original.name.removeprefix("local-dir:") + f"/{WEIGHTS}", weights)
    assert inside(*by_edit.split()[1:], store=job / "elsewhere").exit_code == 5
    done = inside("evidence", "blue", *options, "--out", "one", store=job / "store")
    assert rows(done.stdout)[0][1][:4] == ["blue", "forgotten within bounds", "absent", "not run"]


def test_the_evidence_has_the_conclusion_of_the_verification(job, shared_world):
    request = VerifyRequest(
        model=ModelSpec("local-dir:clip"),
        checks=[Check.PARAPHRASE, Check.LOOK_ALIKES, Check.NEUTRAL_PROMPTS],
        settings=Settings(rows=20),
    )
    verify(Store("store"), "blue", request)
    write(job, recipe_of(shared_world))
    blue, red = evidence_in(job / "new")["requests"]
    assert red["verification"] is None
    page = (job / "new" / "evidence.html").read_text()
    assert all(sentence in page for sentence in blue["verification"]["conclusion"])
    assert "prefix" in blue["verification"]["not run"]
    assert "paraphrase" not in blue["verification"]["not run"]
    like, control = blue["verification"]["look-alikes"]
    assert (like["group"], control["group"]) == ("look-alikes", "random classes")
    assert like["beyond"]["points"] == pytest.approx(like["lost"] - control["lost"])
    (neutral,) = blue["verification"]["neutral prompts"]
    assert (neutral["name"], neutral["spread"], neutral["overlap"]) == ("the edit", 100, 100)
    assert page.count("No verification has been run.") == 1


def test_a_run_rewrites_the_evidence_if_its_inputs_change(job, shared_world):
    before = texts(job / "filed")
    assert running.run(recipe_of(shared_world), store="store").done == ()
    recipe = recipe_of(shared_world)
    noted = replace(recipe.requests[0], note="asked twice")
    changed = replace(recipe, requests=(noted, recipe.requests[1]))
    done = running.run(changed, store="store").done
    assert [stage.kind for stage in done] == [StageKind.EVIDENCE]
    assert "asked twice" in (job / "filed" / "evidence.html").read_text()
    done = running.run(recipe, store="store").done
    assert [stage.kind for stage in done] == [StageKind.EVIDENCE]
    assert texts(job / "filed") == before


def test_foreign_files_are_not_replaced(job, shared_world):
    recipe, place = recipe_of(shared_world), {"names": ["blue"], "out": job / "filed"}
    with pytest.raises(InputError, match="exists already"):
        write(job, recipe, **place)
    (job / "filed" / "letter.txt").write_text("mine")
    with pytest.raises(InputError, match=r"letter.txt, which would be lost"):
        write(job, recipe, **place, overwrite=True)
    (job / "filed" / "letter.txt").unlink()
    write(job, recipe, **place, overwrite=True)
    assert not (job / "filed" / "sheets" / "red.png").exists()


def test_requests_without_figures_have_no_evidence(job, shared_world):
    recipe = recipe_of(shared_world)
    with pytest.raises(UsageError, match="never had a request"):
        write(job, recipe, names=["blue", "mauve"])
    with pytest.raises(MissingError, match="has no requests of others"):
        write(job, replace(recipe, name="others"))
    unmeasured = Job(recipe, "store")
    unmeasured.save(unmeasured.ledger.with_rows([replace(unmeasured.row("red"), after=None)]))
    with pytest.raises(MissingError, match="red has not been measured yet"):
        write(job, recipe)
    assert not (job / "new").exists()
