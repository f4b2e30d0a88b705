"""`slsgu run`: which stages run, run again, and what added and withdrawn requests change."""

import hashlib
import json
import shutil
import statistics
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from processes import inside, rows
from worlds import World

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.engine.evaluate import evaluate
from slsgu_cli.engine.export import export
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.errors import AssertionsError, InputError, UsageError
from slsgu_cli.records.codec import decode
from slsgu_cli.records.directions import FALLBACK, Direction
from slsgu_cli.records.figures import Assertion
from slsgu_cli.records.ledger import Ledger, RequestState, StageKind
from slsgu_cli.records.options import (
    BuildRequest,
    ExportRequest,
    RankOptions,
    ReportRequest,
    SearchOptions,
)
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import Check, Settings, VerifyRequest
from slsgu_cli.removals import planning, running
from slsgu_cli.removals.job import Job
from slsgu_cli.removals.reading import read_recipe
from slsgu_cli.removals.recipe import Outputs, Recipe, RemovalRequest, Together
from slsgu_cli.report.page import write_report
from slsgu_cli.sets.build import build_sets
from slsgu_cli.sets.dropped_rows import drop_from_set
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.reader import Columns
from slsgu_cli.store import catalog
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.store import Store
from slsgu_cli.study.joint import joint_search
from slsgu_cli.verification.checks import prefix
from slsgu_cli.verification.model import SkippedCheck
from slsgu_cli.verification.results import verdict_rows as verdicts

RANK = RankOptions(direction=Direction.GRADIENT)
SEARCH = SearchOptions(steps=4, layers=["visual.proj"])


def recipe_of(world, folder, *names, **changes):
    """Return a recipe of colours to forget on the tiny model."""
    sets = BuildRequest(
        sources=[world.sources["pairs"]],
        retain_samples=60,
        test_fraction=0,
        label_column="label",
        evals={"first": world.sources["first"]},
    )
    outputs = Outputs(checkpoint=folder / "clip", edits=folder / "edits")
    usual = Recipe(
        name="colours",
        model=world.model,
        sets=sets,
        rank=RANK,
        search=SEARCH,
        outputs=outputs,
        requests=tuple(RemovalRequest(name=name) for name in names),
    )
    return replace(usual, **changes)


def digests(folder):
    """Return the digest of every file below a folder, the times of measured seconds aside."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def stages(result):
    return [(stage.kind, *stage.names) for stage in result.done]


@pytest.fixture(scope="module")
def finished(shared_world, made_once):
    """A folder with the store and the outputs of a recipe for blue and red."""

    def make(folder):
        running.run(recipe_of(shared_world, folder, "blue", "red"), store=str(folder / "store"))
        return folder

    return made_once("recipe", make)


@pytest.fixture
def job(finished, shared_world, tmp_path):
    """`job(*names, **changes)` runs a recipe again where that for blue and red was run."""
    folder = tmp_path / "job"
    shutil.copytree(finished, folder)
    store = Store(str(folder / "store"))
    moved = store.read_bytes("ledgers/colours.json").decode()
    record = store.read_record("ledgers/colours.json", Ledger)
    assert str(finished) in moved
    stages = tuple(
        replace(each, place=each.place and each.place.replace(str(finished), str(folder)))
        for each in record.stages
    )
    store.write_record("ledgers/colours.json", replace(record, stages=stages))

    def again(*names, on_event=lambda event: None, **changes):
        recipe = recipe_of(shared_world, folder, *names, **changes)
        return running.run(recipe, store=store, on_event=on_event)

    again.folder, again.store = folder, store
    again.plan = lambda *names, **changes: planning.plan(
        Job(recipe_of(shared_world, folder, *names, **changes), store)
    )
    return again


def test_a_run_writes_the_same_bytes_as_the_commands(finished, shared_world, tmp_path):
    store, recipe = Store(str(tmp_path / "store")), recipe_of(shared_world, tmp_path, "blue", "red")
    for request in recipe.requests:
        build_sets(store, recipe.set_of(request))
        compute_gradients(store, request.name)
        rank(store, request.name, options=RANK)
    joint_search(store, ["blue", "red"], options=SEARCH)
    for name in ("blue", "red"):
        path = Artifact.EDIT.path(name)
        made = (finished / "store" / path).read_bytes()
        assert made == store.read_bytes(path)
        assert made == (finished / "edits" / f"{name}.safetensors").read_bytes()
    measured = evaluate(store, ["blue", "red"], model=ModelSpec(f"local-dir:{finished / 'clip'}"))
    ledger = Store(str(finished / "store")).read_record("ledgers/colours.json", Ledger)
    assert ledger.written.figures == measured.figures()
    assert [row.after.top1 for row in ledger.rows] == [0.0, 0.0]
    assert {row.state for row in ledger.rows} == {RequestState.FORGOTTEN}


def test_finished_stages_do_not_run_again(job):
    job("blue", "red")
    before = digests(job.folder)
    assert stages(job("blue", "red")) == []
    assert digests(job.folder) == before
    assert {each.reason for each in job.plan("blue", "red")} == {None}


def test_shared_inputs_are_read_once(job, shared_world, monkeypatch):
    looked = Counter()

    def counting(owner, name):
        plain = getattr(owner, name)

        def counted(*args, **options):
            looked[name, *map(str, args)] += 1
            return plain(*args, **options)

        monkeypatch.setattr(owner, name, counted)

    readers = open_sources([shared_world.sources[name] for name in ("pairs", "first")], Columns())
    for kind in {type(reader) for reader in readers}:
        counting(kind, "identity")
    counting(catalog, "attributes")
    sets = [read_manifest(job.store, name) for name in ("blue", "red")]
    blocks = {ref.path for manifest in sets for ref in manifest.blocks().values()}
    recipe = recipe_of(shared_world, job.folder, "blue", "red")
    counted_job = Job(recipe, job.store)
    counting(job.store, "read_record")
    assert set(planning.reasons(counted_job).values()) == {None}
    assert len([key for key in looked if key[0] == "attributes"]) == len(blocks) < 6
    assert len([key for key in looked if key[0] == "identity"]) == len(readers)
    assert set(looked.values()) == {1}
    # Another job looks at them again.
    assert set(planning.reasons(Job(recipe, job.store)).values()) == {None}
    assert {looked[key] for key in looked if key[0] == "identity"} == {2}


class Sink(progress.Sink):
    """Keeps notes and the labels of bars."""

    def __init__(self):
        self.bars, self.notes = [], []

    def note(self, text):
        self.notes.append(text)

    @contextmanager
    def bar(self, label, total):
        self.bars.append(label)
        yield progress.Ticker()


def test_an_added_request_costs_only_itself(job):
    events = []
    done = stages(job("blue", "red", "green", on_event=events.append))
    begun = [each for each in events if each.event == "begin"]
    assert [each.stage for each in begun] == [kind for kind, *_ in done]
    lefts = [each.left for each in begun]
    assert lefts == sorted(lefts, reverse=True)
    assert all(left > 0 for left in lefts)
    own = [(stage, "green") for stage in (StageKind.SET, StageKind.GRADIENTS, StageKind.RANKING)]
    assert [each for each in done if len(each) == 2] == own
    assert (StageKind.SEARCH, "blue", "red", "green") in done


def test_a_withdrawn_request_is_in_no_output(job, shared_world, tmp_path):
    result = job("blue")
    rest = ["search", "apply", "edits", "eval"]
    assert [stage for stage, *_ in stages(result)] == rest
    alone = recipe_of(shared_world, tmp_path / "alone", "blue")
    running.run(alone, store=str(tmp_path / "store"))
    for output in ("clip", "edits"):
        assert digests(job.folder / output) == digests(tmp_path / "alone" / output)
    blue, red = result.ledger.rows
    assert (blue.state, red.state) == (RequestState.FORGOTTEN, RequestState.WITHDRAWN)
    assert [event.state for event in red.events][-2:] == [
        RequestState.FORGOTTEN,
        RequestState.WITHDRAWN,
    ]
    job()
    weights = "open_clip_model.safetensors"
    original = (shared_world.folder / weights).read_bytes()
    assert (job.folder / "clip" / weights).read_bytes() == original
    assert not list((job.folder / "edits").iterdir())


def test_copies_of_targets_have_the_edits_of_requests_that_name_them(job, shared_world):
    outputs = Outputs(checkpoint=job.folder / "clip", targets=job.folder / "targets")
    red = RemovalRequest(name="red", targets=[shared_world.folder])
    requests = (RemovalRequest(name="blue"), red)
    done = stages(job(requests=requests, outputs=outputs))
    assert done == [(StageKind.TARGET, "red")]
    copy = job.folder / "targets" / shared_world.folder.name
    held = inside("check", copy, "--edit", "red", store=job.store.root)
    assert held.exit_code == 0, held.stderr
    done = stages(job("blue", "red", outputs=outputs))
    assert done == [(StageKind.TARGET,)]
    assert digests(copy) == digests(shared_world.folder)
    assert job("blue", "red", outputs=outputs).done == ()


def test_a_lora_has_all_requests_and_text_layers_only(shared_world, tmp_path):
    def run(*names, layer="transformer.resblocks.1.mlp.c_proj.weight", **changes):
        out = Outputs(lora=tmp_path / "out" / "colours.safetensors")
        options = replace(SEARCH, layers=[layer] if layer else [], steps=6)
        recipe = recipe_of(shared_world, tmp_path, *names, search=options, outputs=out, **changes)
        return running.run(recipe, store=str(tmp_path / "store"))

    result = run("blue")
    place, store = result.recipe.outputs.lora, Store(str(tmp_path / "store"))
    assert (StageKind.LORA, "blue") in stages(result)
    export(store, ExportRequest(names=["blue"], out=tmp_path / "l.safetensors"))
    assert place.read_bytes() == (tmp_path / "l.safetensors").read_bytes()
    assert run("blue").done == ()
    assert stages(run()) == [(StageKind.LORA,)]
    assert not place.exists()
    assert run().done == ()
    with pytest.raises(UsageError, match="but other layers are ranked too"):
        run("blue", layer=None)


def test_a_lora_of_other_layers_is_refused(job):
    outputs = Outputs(lora=job.folder / "l.safetensors")
    with pytest.raises(InputError, match=r"no client supports a LoRA of visual\.proj"):
        job("blue", "red", outputs=outputs)
    assert not outputs.lora.exists()


def test_a_plan_estimates_seconds_from_earlier_runs(job, shared_world, tmp_path):
    ledger = job.store.read_record("ledgers/colours.json", Ledger)
    planned = {each.stage.kind: each.seconds for each in job.plan("green")}
    for kind in (StageKind.SET, StageKind.GRADIENTS, StageKind.RANKING):
        took = [each.took.seconds for each in ledger.stages if each.kind is kind]
        assert planned[kind] == pytest.approx(statistics.median(took))
    # The search was for two requests.
    (joint,) = (each.took.seconds for each in ledger.stages if each.kind is StageKind.SEARCH)
    assert planned[StageKind.SEARCH] == pytest.approx(joint / 2)
    elsewhere = recipe_of(shared_world, tmp_path, "green")
    fresh = planning.plan(Job(elsewhere, str(tmp_path / "new")))
    assert {each.seconds for each in fresh} == {None}


def test_changed_options_rerun_the_stages_that_use_them(job):
    changed = job.plan("blue", "red", search=replace(SEARCH, steps=5))
    assert [str(each.stage.kind) for each in changed if each.reason] == [
        "search",
        "apply",
        "edits",
        "eval",
    ]
    assert "options" in next(each.reason for each in changed if each.reason)
    ranked = job.plan("blue", "red", rank=replace(RANK, exclude=["text"]))
    assert {str(each.stage.kind) for each in ranked if not each.reason} == {"build-sets", "grad"}


def test_damaged_or_changed_outputs_are_written_again(job, finished):
    weights = job.folder / "clip" / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert stages(job("blue", "red")) == [(StageKind.CHECKPOINT, "blue", "red")]
    assert digests(job.folder / "clip") == digests(finished / "clip")
    rank(job.store, "red", options=RankOptions(direction=Direction.GRADIENT, tower="text"))
    assert stages(job("blue", "red"))[0] == (StageKind.RANKING, "red")


def test_manually_dropped_rows_stay_out(job, tmp_path):
    manifest = read_manifest(job.store, "blue")
    block = Catalog(job.store)
    assert block.get(Artifact.SET, "blue") == manifest
    key = inside("show", "blue", "--json", store=job.store.root)
    first = json.loads(key.stdout)["rows"][0]["hash"]
    drop_from_set(job.store, "blue", [first], part="forget")
    done = stages(job("blue", "red"))
    assert done[0] == (StageKind.GRADIENTS, "blue")
    assert (StageKind.SET, "blue") not in done
    job("blue", "red", sets=replace(recipe_sets(job), max_forget=12))
    assert read_manifest(job.store, "blue").request["dropped"]["forget"] == [first]


def recipe_sets(job):
    manifest = read_manifest(job.store, "blue")
    request = decode(BuildRequest, manifest.request)
    return replace(request, name="", concept="", model=ModelSpec(""), dropped={})


def test_bounds_are_a_gate(job, shared_world):
    bounds = (Assertion("fa1", "<=", 0.0), Assertion("ta1.first", ">=", 101.0))
    result = job("blue", "red", bounds=bounds)
    assert result.done == ()
    assert {row.state for row in result.rows} == {RequestState.OUT_OF_BOUNDS}
    with pytest.raises(AssertionsError, match=r"2 bounds are not met: ta1.first>=101 of blue"):
        running.require_met(result)
    checks = [(c.bound, c.holds) for c in result.rows[0].checks]
    assert checks == [("fa1<=0", True), ("ta1.first>=101", False)]


def test_bounds_on_attacks_verify_the_written_model(job, shared_world, monkeypatch):
    few = Settings(attack_tokens=1, attack_steps=2, attack_starts=1, rows=20)
    asked = VerifyRequest(checks=[], settings=few)
    changes = {"bounds": (Assertion("attack.prefix", "<=", 100.0),), "verify": asked}
    result = job("blue", "red", **changes)
    assert stages(result) == [(StageKind.VERIFICATION, "blue"), (StageKind.VERIFICATION, "red")]
    record = Catalog(job.store).get(Artifact.VERIFICATION, "blue")
    original, written = record.subjects
    assert written.edit is None
    assert written.label == f"local-dir:{job.folder / 'clip'}"
    (row,) = (row for row in verdicts(original, written) if row.check is Check.PREFIX)
    (check,) = result.rows[0].checks
    assert (check.figure, check.holds) == (row.after.top1 - row.control.top1, True)
    page = job.folder / "page.html"
    asked_for = ReportRequest(names=["blue"], out=page, examples=False)
    write_report(job.store, asked_for)
    verified = "The verified model is the one that was written, with all its edits: "
    assert f"{verified}<code>{written.label}</code>" in page.read_text()
    assert job("blue", "red", **changes).done == ()
    failed = job("blue", "red", **changes | {"bounds": (Assertion("attack.prefix", "<", -100.0),)})
    assert failed.done == ()
    assert {row.state for row in failed.rows} == {RequestState.OUT_OF_BOUNDS}

    def left_out(model, settings):
        raise SkippedCheck("its text tower is run as a whole")

    monkeypatch.setattr(prefix, "SPEC", replace(prefix.SPEC, run=left_out))
    more = replace(asked, settings=replace(few, attack_steps=3))
    untried = job("blue", "red", **changes | {"verify": more})
    assert [(each.figure, each.holds) for each in untried.rows[0].checks] == [(None, False)]
    with pytest.raises(AssertionsError, match="its check could not run"):
        running.require_met(untried)
    # The verification of an earlier checkpoint is not shown for the new one.
    running.run(recipe_of(shared_world, job.folder, "red"), store=job.store)
    write_report(job.store, replace(asked_for, overwrite=True))
    assert verified not in page.read_text()


def test_a_changed_file_of_descriptions_is_verified_again(job):
    texts = job.folder / "texts.json"
    texts.write_text('[{"blue": ["blueish sky"]}]')
    asked = VerifyRequest(
        checks=[Check.DESCRIPTION], descriptions=str(texts), settings=Settings(rows=20)
    )
    bounds = tuple(Assertion(f"description.{figure}", "<=", 100.0) for figure in ("mean", "worst"))
    changes = {"bounds": bounds, "verify": asked}
    job("blue", "red", **changes)
    # Only the file changes, not its name.
    texts.write_text('[{"blue": ["azurite"]}]')
    result = job("blue", "red", **changes)
    assert (StageKind.VERIFICATION, "blue") in stages(result)
    record = Catalog(job.store).get(Artifact.VERIFICATION, "blue")
    assert record.subjects[1].finding(Check.DESCRIPTION).variants[0].name == "azurite"
    # The file has no text about red, and a bound on a skipped check does not hold.
    red = {row.name: row.checks for row in result.rows}["red"]
    assert {(each.figure, each.holds) for each in red} == {(None, False)}
    assert job("blue", "red", **changes).done == ()


def test_recipes_in_one_store_do_not_replace_each_others_sets(job, shared_world):
    own = Outputs()
    with pytest.raises(InputError, match="red is a request of the recipe colours") as refused:
        job("red", name="others", outputs=own)
    assert 'another name and concept = "red"' in refused.value.hint
    green = RemovalRequest(name="other-red", concept="red")
    assert job(requests=(green,), name="others", outputs=own).done
    assert job("blue", "red").done == ()
    # A withdrawn request is free for other recipes.
    job("blue")
    assert job("red", name="third", outputs=own).done


@pytest.mark.parametrize(("name", "call"), [("rank", 2), ("apply", 1)])
def test_a_killed_run_resumes_to_the_same_bytes(
    finished, shared_world, tmp_path, monkeypatch, name, call
):
    """It is killed between a stage and the ledger, after `name` is called."""
    plain, calls = getattr(slsgu_cli, name), []

    def killed(*arguments, **options):
        calls.append(1)
        made = plain(*arguments, **options)
        if len(calls) == call:
            raise KeyboardInterrupt
        return made

    recipe = recipe_of(shared_world, tmp_path, "blue", "red")
    with monkeypatch.context() as patch:
        patch.setattr(slsgu_cli, name, killed)
        with pytest.raises(KeyboardInterrupt):
            running.run(recipe, store=str(tmp_path / "store"))
    assert running.run(recipe, store=str(tmp_path / "store")).done
    for part in ("clip", "edits", "store/edits", "store/rankings", "store/gradients"):
        assert digests(tmp_path / part) == digests(finished / part)


@pytest.mark.parametrize("together", [Together.SUM, Together.AFTER])
def test_edits_are_searched_one_by_one(shared_world, tmp_path, together):
    recipe = recipe_of(shared_world, tmp_path, "blue", "red", together=together)
    store = Store(str(tmp_path / "store"))
    result = running.run(recipe, store=store)
    blue, red = (Catalog(store).get(Artifact.EDIT, name) for name in ("blue", "red"))
    assert (blue.joint, red.joint) == (None, None)
    assert list(red.after) == (["blue"] if together is Together.AFTER else [])
    both = evaluate(store, ["blue", "red"])
    assert result.figures == pytest.approx(both.figures(), abs=1e-4)
    assert running.run(recipe, store=store).done == ()
    alone = running.run(replace(recipe, requests=recipe.requests[1:]), store=store)
    assert ((StageKind.SEARCH, "red") in stages(alone)) == (together is Together.AFTER)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sources": ["nowhere/*.tar"]}, "nowhere"),
        ({"sources": ["{pairs}"], "name": "mauve"}, "nothing matches 'mauve'"),
        ({"evals": {"first": "{first}x"}}, "colourx"),
    ],
)
def test_a_run_that_cannot_succeed_does_not_start(shared_world, tmp_path, changes, said):
    filled = json.loads(
        json.dumps(changes)
        .replace("{pairs}", shared_world.sources["pairs"])
        .replace("{first}", shared_world.sources["first"])
    )
    name = filled.pop("name", "red")
    recipe = recipe_of(shared_world, tmp_path, "blue")
    sets = replace(recipe.sets, **filled)
    bad = replace(recipe, sets=sets, requests=(RemovalRequest(name=name),))
    with pytest.raises(InputError, match="nothing was started") as refused:
        running.run(bad, store=str(tmp_path / "store"))
    assert said in refused.value.message
    assert not list(tmp_path.rglob("data/*"))


def test_requests_are_planned_as_if_each_were_alone(shared_world, tmp_path):
    names = ("blue", "mauve", "red", "beige")
    store, sink = Store(str(tmp_path / "store")), Sink()
    with progress.using(sink):
        planned = planning.plan(Job(recipe_of(shared_world, tmp_path, *names), store))
    sets = [each for each in planned if each.stage.kind is StageKind.SET]
    alone = [
        planning.plan(Job(recipe_of(shared_world, tmp_path, name), store))[0] for name in names
    ]
    assert sets == alone
    assert [each.trouble is None for each in sets] == [True, False, True, False]
    assert sink.bars == ["checking what is done", "reading captions", "reading labels"]
    assert sink.notes == []


def test_weights_that_cannot_be_loaded_stop_a_run_at_the_start(shared_world, tmp_path):
    shutil.copytree(shared_world.folder, tmp_path / "model")
    config = tmp_path / "model" / "open_clip_config.json"
    content = json.loads(config.read_text())
    content["model_cfg"]["embed_dim"] += 8
    config.write_text(json.dumps(content))
    model = ModelSpec(f"local-dir:{tmp_path / 'model'}")
    recipe = recipe_of(shared_world, tmp_path, "blue", model=model)
    with pytest.raises(InputError, match="nothing was started"):
        running.run(recipe, store=str(tmp_path / "store"))


def test_foreign_files_are_not_replaced(shared_world, tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "notes.txt").write_text("mine")
    recipe = recipe_of(shared_world, tmp_path, "blue")
    with pytest.raises(InputError, match="exists already, and this recipe did not write it"):
        running.run(recipe, store=str(tmp_path / "store"))
    assert (tmp_path / "clip" / "notes.txt").read_text() == "mine"


RECIPE = """\
model = "{model}"
bounds = ["fa1 <= 0"]
[sets]
sources = ["{pairs}"]
retain_samples = 60
label_column = "label"
[evaluation.first]
source = "{first}"
templates = "{templates}"
[rank]
direction = "gradient"
[search]
layers = ["visual.proj"]
steps = 4
[outputs]
checkpoint = "{folder}/clip"
report = "{folder}/page.html"
[[request]]
name = "blue"
id = "R-7"
received = 2026-02-03
bounds = ["ta1.first >= {least}"]
"""


@pytest.fixture
def written(shared_world: World, tmp_path):
    """`written(least)` is a recipe in a file."""

    def write(least=0):
        path = tmp_path / "one.toml"
        path.write_text(
            RECIPE.format(
                model=shared_world.model, folder=tmp_path, least=least, **shared_world.sources
            )
        )
        return path

    return write


def test_the_command_checks_bounds_and_lists_the_ledger(written, tmp_path):
    store = tmp_path / "store"
    planned = inside("run", written(), "--plan", "--json", store=store)
    assert planned.exit_code == 0, planned.stderr
    assert {each["state"] for each in json.loads(planned.stdout)["plan"]} == {"to do"}
    assert not store.exists()
    lines = inside("run", written(), "--json-lines", store=store)
    assert lines.exit_code == 0, lines.stderr
    events = [json.loads(line) for line in lines.stdout.splitlines()]
    seen = [(each["event"], each.get("stage")) for each in events]
    done = ["build-sets", "grad", "rank", "search", "apply", "eval", "report"]
    assert seen[:-2] == [(kind, stage) for stage in done for kind in ("begin", "end")]
    assert [kind for kind, _ in seen[-2:]] == ["finished", "result"]
    assert all(each["holds"] for each in events[-1]["bounds"])
    assert (tmp_path / "page.html").is_file()
    failed = inside("run", written(101), store=store)
    assert failed.exit_code == 5
    figures, bounds, requests = rows(failed.stdout)
    assert figures[0] == ["figure", "original", "now", "change"]
    assert [row[-1] for row in bounds[1:]] == ["holds", "fails"]
    assert requests[1][:5] == ["blue", "R-7", "2026-02-03", "-", "out of bounds"]
    listed = inside("requests", written(101), "--json", store=store)
    assert json.loads(listed.stdout)["requests"][0]["state"] == "out of bounds"
    refused = inside("run", written(), "--json-lines", "--plan", store=store)
    assert refused.exit_code == 2


def test_commands_take_their_options_from_a_recipe(written, shared_world, tmp_path, monkeypatch):
    options = "--recipe", written(101)
    store = tmp_path / "store"
    for command in ("build-sets", "grad", "rank", "search"):
        done = inside(command, "blue", *options, store=store)
        assert done.exit_code == 0, done.stderr
    catalog = Catalog(Store(str(store)))
    recipe = read_recipe(written(101))
    manifest = catalog.get(Artifact.SET, "blue")
    assert decode(BuildRequest, manifest.request) == recipe.set_of(recipe.requests[0])
    assert catalog.get(Artifact.RANKING, "blue").directions == (FALLBACK,)
    assert {trial.layer for trial in catalog.get(Artifact.TRIALS, "blue").trials} == {"visual.proj"}
    # The command line wins, also over what the recipe has.
    ranked = inside("rank", "blue", *options, "--direction", "whitened", "--json", store=store)
    (direction,) = json.loads(ranked.stdout)["ranking"]["directions"]
    assert direction["kind"] == "whitened"
    gate = inside("eval", "blue", *options, "--json", store=store)
    assert gate.exit_code == 5
    results = {each["assertion"]: each["result"] for each in json.loads(gate.stdout)["assertions"]}
    assert results == {"fa1<=0": "holds", "ta1.first>=101": "fails"}
    monkeypatch.setenv("SLSGU_RECIPE", str(written()))
    assert inside("apply", "blue", store=store).exit_code == 0
    assert (tmp_path / "clip" / "open_clip_config.json").is_file()
    assert inside("report", "blue", "--no-examples", store=store).exit_code == 0
    tried = inside("verify", "blue", "--checks", "paraphrase", "--json", store=store)
    models = {each["model"] for each in json.loads(tried.stdout)["verification"]}
    assert models == {f"local-dir:{tmp_path / 'clip'}"}
    wrong = inside("build-sets", "blu", store=store)
    assert (wrong.exit_code, "near: blue" in wrong.stderr) == (2, True)


def test_init_writes_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert inside("init", "--json").exit_code == 0
    assert Path("recipe.toml").is_file()
    assert inside("init").exit_code == 3
    assert inside("init", "--demo", "--overwrite").exit_code == 0
    assert "embedded" not in inside("run", "recipe.toml", "--plan", "-q").stderr


def test_forget_runs_the_whole_job(shared_world, tmp_path):
    result = slsgu_cli.forget(
        model=shared_world.model,
        concept="blue",
        source=shared_world.sources["pairs"],
        evaluation={"first": shared_world.sources["first"]},
        out=tmp_path / "clip",
        store=str(tmp_path / "store"),
        retain_samples=60,
        label_column="label",
    )
    assert result.figures["fa1"] == 0
    assert result.checkpoint == tmp_path / "clip"
    assert (tmp_path / "clip" / "open_clip_config.json").is_file()
