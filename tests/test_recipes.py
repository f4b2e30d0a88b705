"""`slsgu run`: what is done, what is done again, what comes of requests that come and go."""

import hashlib
import json
import shutil
import statistics
import sys
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from processes import inside, rows
from worlds import World

import slsgu_cli
from slsgu_cli import progress, recipes
from slsgu_cli.clip.models import load, resolve
from slsgu_cli.errors import AssertionsError, InputError, UsageError
from slsgu_cli.method.evaluate import evaluate
from slsgu_cli.method.export import export
from slsgu_cli.method.gradients import compute_gradients
from slsgu_cli.method.ranking import rank
from slsgu_cli.records.codec import decode
from slsgu_cli.records.figures import Assertion
from slsgu_cli.records.method import Direction
from slsgu_cli.records.options import (
    BuildRequest,
    ExportRequest,
    PassOptions,
    RankOptions,
    ReportRequest,
    SearchOptions,
)
from slsgu_cli.records.recipe import (
    Ledger,
    Outputs,
    Recipe,
    RemovalRequest,
    RequestState,
    Stage,
    Together,
    read_recipe,
)
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import Check, Settings, VerifyRequest
from slsgu_cli.report.page import write_report
from slsgu_cli.sets.build import build_sets
from slsgu_cli.sets.evaluation_sets import drop_from_set
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.rows import Columns
from slsgu_cli.store import catalog
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.store import Store
from slsgu_cli.study.joint import joint_search
from slsgu_cli.study.recipe import RecipePlan
from slsgu_cli.verification import verify as verification
from slsgu_cli.verification.model import LeftOut
from slsgu_cli.verification.verdicts import rows as verdicts

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
    return [(step.stage, *step.names) for step in result.done]


@pytest.fixture(scope="module")
def finished(shared_world, made_once):
    """A folder with the store and the outputs of a recipe for blue and red."""

    def make(folder):
        recipes.run(recipe_of(shared_world, folder, "blue", "red"), store=str(folder / "store"))
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

    def again(*names, **changes):
        return recipes.run(recipe_of(shared_world, folder, *names, **changes), store=store)

    again.folder, again.store = folder, store
    again.plan = lambda *names, **changes: recipes.plan(
        recipe_of(shared_world, folder, *names, **changes), store=store
    )
    return again


def test_a_run_makes_what_the_commands_make(finished, shared_world, tmp_path):
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
    assert ledger.figures == measured.figures()
    assert [row.after.top1 for row in ledger.rows] == [0.0, 0.0]
    assert {row.state for row in ledger.rows} == {RequestState.FORGOTTEN}


def test_what_is_done_is_not_done_again(job):
    job("blue", "red")
    before = digests(job.folder)
    assert stages(job("blue", "red")) == []
    assert digests(job.folder) == before
    assert {each.why for each in job.plan("blue", "red")} == {None}


def test_what_requests_share_is_looked_at_once(job, shared_world, monkeypatch):
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
    plan = RecipePlan(job.store, recipe)
    counting(plan.store, "read_record")
    assert set(plan.whys().values()) == {None}
    assert len([key for key in looked if key[0] == "attributes"]) == len(blocks) < 6
    assert len([key for key in looked if key[0] == "identity"]) == len(readers)
    assert set(looked.values()) == {1}
    # Another plan looks anew.
    assert set(plan.whys().values()) == {None}
    assert {looked[key] for key in looked if key[0] == "identity"} == {2}


class Told(progress.Sink):
    """What a run tells of how far it is."""

    def __init__(self):
        self.boards, self.bars, self.said = [], [], []

    def note(self, text):
        self.said.append(("note", text))

    @contextmanager
    def bar(self, label, total):
        self.bars.append(label)
        yield progress.Ticker()

    @contextmanager
    def board(self, stages, requests):
        self.boards.append((dict(stages), requests))
        yield self

    def begin(self, stage, about, *, left, at_least):
        self.said.append(("begin", stage, about, left, at_least))

    def end(self, stage, *, requests):
        self.said.append(("end", stage, requests))


def test_a_request_that_is_added_costs_only_itself(job):
    told = Told()
    with progress.using(told):
        done = stages(job("blue", "red", "green"))
    # What a terminal shows: nothing is over its total, and all of it is done at the end.
    counts, requests = told.boards[0]
    assert counts["build-sets"] == (2, 3)
    assert counts["search"] == (0, 1)
    assert requests == 3
    begun = [said for said in told.said if said[0] == "begin"]
    ended = [said[1:] for said in told.said if said[0] == "end"]
    assert [stage for _, stage, *_ in begun] == [stage for stage, *_ in done]
    assert len(ended) == sum(total - done for done, total in counts.values())
    # The search is for all of them, so none is done before the last step is.
    assert [requests for _, requests in ended] == [0] * (len(ended) - 1) + [3]
    lefts = [(left, at_least) for *_, left, at_least in begun]
    assert lefts == sorted(lefts, reverse=True)
    assert all(left > 0 and not at_least for left, at_least in lefts)
    own = [(stage, "green") for stage in (Stage.SET, Stage.GRADIENTS, Stage.RANKING)]
    assert [each for each in done if len(each) == 2] == own
    assert (Stage.SEARCH, "blue", "red", "green") in done


def test_a_request_that_is_withdrawn_is_in_no_output(job, shared_world, tmp_path):
    result = job("blue")
    rest = ["search", "apply", "edits", "eval"]
    assert [stage for stage, *_ in stages(result)] == rest
    alone = recipe_of(shared_world, tmp_path / "alone", "blue")
    recipes.run(alone, store=str(tmp_path / "store"))
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


def test_copies_of_targets_hold_the_edits_of_those_who_name_them(job, shared_world):
    outputs = Outputs(checkpoint=job.folder / "clip", targets=job.folder / "targets")
    red = RemovalRequest(name="red", targets=[shared_world.folder])
    requests = (RemovalRequest(name="blue"), red)
    done = stages(job(requests=requests, outputs=outputs))
    assert done == [(Stage.TARGET, "red")]
    copy = job.folder / "targets" / shared_world.folder.name
    held = inside("check", copy, "--edit", "red", store=job.store.root)
    assert held.exit_code == 0, held.stderr
    done = stages(job("blue", "red", outputs=outputs))
    assert done == [(Stage.TARGET,)]
    assert digests(copy) == digests(shared_world.folder)
    assert job("blue", "red", outputs=outputs).done == ()


def test_a_lora_is_of_all_requests_and_of_text_layers(shared_world, tmp_path):
    def run(*names, layer="transformer.resblocks.1.mlp.c_proj.weight", **changes):
        out = Outputs(lora=tmp_path / "out" / "colours.safetensors")
        options = replace(SEARCH, layers=[layer] if layer else [], steps=6)
        recipe = recipe_of(shared_world, tmp_path, *names, search=options, outputs=out, **changes)
        return recipes.run(recipe, store=str(tmp_path / "store"))

    result = run("blue")
    place, store = result.recipe.outputs.lora, Store(str(tmp_path / "store"))
    assert (Stage.LORA, "blue") in stages(result)
    export(store, ExportRequest(names=["blue"], out=tmp_path / "l.safetensors"))
    assert place.read_bytes() == (tmp_path / "l.safetensors").read_bytes()
    assert run("blue").done == ()
    assert stages(run()) == [(Stage.LORA,)]
    assert not place.exists()
    assert run().done == ()
    with pytest.raises(UsageError, match="other layers are ranked too"):
        run("blue", layer=None)


def test_what_no_lora_can_be_of_is_told_before_anything_is_begun(job):
    outputs = Outputs(lora=job.folder / "l.safetensors")
    with pytest.raises(InputError, match=r"no client supports a LoRA of visual\.proj"):
        job("blue", "red", outputs=outputs)


def test_a_plan_estimates_by_what_the_store_has(job, shared_world, tmp_path):
    ledger = job.store.read_record("ledgers/colours.json", Ledger)
    peaks = {each.stage: each.memory for each in ledger.stages}
    options = PassOptions(memory_budget=1 << 30)
    planned = {each.step.stage: each for each in job.plan("green", grad=options)}
    if sys.platform == "linux":
        # PyTorch itself takes more than this.
        assert all(peak > 50e6 for peak in peaks.values())
        assert planned[Stage.SEARCH].memory == peaks[Stage.SEARCH]
    catalog = Catalog(job.store)
    manifests = [catalog.get(Artifact.SET, name) for name in ("blue", "red")]
    paths = [[Artifact.SET.path(m.name), m.forget.path, m.retain.path] for m in manifests]
    sizes = [sum(bytes_in(job.folder / "store" / path) for path in each) for each in paths]
    assert planned[Stage.SET].disk == round(statistics.median(sizes))
    assert planned[Stage.CHECKPOINT].disk == bytes_in(shared_world.folder)
    assert planned[Stage.FIGURES].disk is None
    elsewhere = recipe_of(shared_world, tmp_path, "green", grad=options)
    fresh = {each.step.stage: each for each in recipes.plan(elsewhere, store=str(tmp_path / "new"))}
    assert {stage for stage, each in fresh.items() if each.disk} == {Stage.CHECKPOINT}
    state = load(resolve(shared_world.model)).state_dict()
    weights = sum(tensor.numel() for tensor in state.values())
    assert {stage: each.memory for stage, each in fresh.items() if each.memory} == {
        Stage.GRADIENTS: (1 << 30) + 12 * weights
    }


def bytes_in(path):
    """Return the bytes of a file or of all below a folder."""
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(each.stat().st_size for each in files)


def test_other_options_cost_what_is_made_with_them(job):
    changed = job.plan("blue", "red", search=replace(SEARCH, steps=5))
    assert [str(each.step.stage) for each in changed if each.why] == [
        "search",
        "apply",
        "edits",
        "eval",
    ]
    assert "options" in next(each.why for each in changed if each.why)
    ranked = job.plan("blue", "red", rank=replace(RANK, exclude=["text"]))
    assert {str(each.step.stage) for each in ranked if not each.why} == {"build-sets", "grad"}


def test_what_was_damaged_or_made_otherwise_since_is_made_again(job, finished):
    weights = job.folder / "clip" / "open_clip_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert stages(job("blue", "red")) == [(Stage.CHECKPOINT, "blue", "red")]
    assert digests(job.folder / "clip") == digests(finished / "clip")
    rank(job.store, "red", options=RankOptions(direction=Direction.GRADIENT, tower="text"))
    assert stages(job("blue", "red"))[0] == (Stage.RANKING, "red")


def test_rows_that_a_person_took_out_stay_out(job, tmp_path):
    manifest = read_manifest(job.store, "blue")
    block = Catalog(job.store)
    assert block.get(Artifact.SET, "blue") == manifest
    key = inside("show", "blue", "--json", store=job.store.root)
    first = json.loads(key.stdout)["rows"][0]["hash"]
    drop_from_set(job.store, "blue", [first], part="forget")
    done = stages(job("blue", "red"))
    assert done[0] == (Stage.GRADIENTS, "blue")
    assert (Stage.SET, "blue") not in done
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
        recipes.require_met(result)
    checks = [(c.bound, c.holds) for c in result.rows[0].checks]
    assert checks == [("fa1<=0", True), ("ta1.first>=101", False)]


def test_bounds_on_attacks_run_what_they_need_on_what_was_written(job, shared_world, monkeypatch):
    few = Settings(attack_tokens=1, attack_steps=2, attack_starts=1, rows=20)
    asked = VerifyRequest(checks=[], settings=few)
    changes = {"bounds": (Assertion("attack.prefix", "<=", 100.0),), "verify": asked}
    result = job("blue", "red", **changes)
    assert stages(result) == [(Stage.VERIFICATION, "blue"), (Stage.VERIFICATION, "red")]
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
    told = "Tried on the model that was written, with all that was taken out of it: "
    assert f"{told}<code>{written.label}</code>" in page.read_text()
    assert job("blue", "red", **changes).done == ()
    failed = job("blue", "red", **changes | {"bounds": (Assertion("attack.prefix", "<", -100.0),)})
    assert failed.done == ()
    assert {row.state for row in failed.rows} == {RequestState.OUT_OF_BOUNDS}

    def left_out(model, settings):
        raise LeftOut("its text tower is run as a whole")

    monkeypatch.setitem(verification.CHECKS, Check.PREFIX, ("attempts", left_out))
    more = replace(asked, settings=replace(few, attack_steps=3))
    untried = job("blue", "red", **changes | {"verify": more})
    assert [(each.figure, each.holds) for each in untried.rows[0].checks] == [(None, False)]
    with pytest.raises(AssertionsError, match="could not be tried"):
        recipes.require_met(untried)
    # What was verified is not told of a model that is another since.
    recipes.run(recipe_of(shared_world, job.folder, "red"), store=job.store)
    write_report(job.store, replace(asked_for, overwrite=True))
    assert told not in page.read_text()


def test_recipes_in_one_store_do_not_make_each_others_sets_anew(job, shared_world):
    own = Outputs()
    with pytest.raises(InputError, match="red is a request of the recipe colours") as refused:
        job("red", name="others", outputs=own)
    assert refused.value.message.count('name, and concept = "red"') == 1
    green = RemovalRequest(name="other-red", concept="red")
    assert job(requests=(green,), name="others", outputs=own).done
    assert job("blue", "red").done == ()
    # What the first one does not ask for any more is anybody's.
    job("blue")
    assert job("red", name="third", outputs=own).done


@pytest.mark.parametrize(("owner", "call"), [("Job._rank", 2), ("apply", 1)])
def test_a_run_that_is_killed_ends_with_the_same_bytes(
    finished, shared_world, tmp_path, monkeypatch, owner, call
):
    """It ends before, or in between a step and the ledger, where `owner` is called."""
    place, _, name = owner.rpartition(".")
    holder = getattr(recipes, place) if place else recipes
    plain, calls = getattr(holder, name), []

    def killed(*arguments, **options):
        calls.append(1)
        made = plain(*arguments, **options)
        if len(calls) == call:
            raise KeyboardInterrupt
        return made

    recipe = recipe_of(shared_world, tmp_path, "blue", "red")
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, killed)
        if place:
            patch.setitem(recipes._DO, Stage.RANKING, killed)
        with pytest.raises(KeyboardInterrupt):
            recipes.run(recipe, store=str(tmp_path / "store"))
    assert recipes.run(recipe, store=str(tmp_path / "store")).done
    for part in ("clip", "edits", "store/edits", "store/rankings", "store/gradients"):
        assert digests(tmp_path / part) == digests(finished / part)


@pytest.mark.parametrize("together", [Together.SUM, Together.AFTER])
def test_edits_that_are_searched_one_by_one(shared_world, tmp_path, together):
    recipe = recipe_of(shared_world, tmp_path, "blue", "red", together=together)
    store = Store(str(tmp_path / "store"))
    result = recipes.run(recipe, store=store)
    blue, red = (Catalog(store).get(Artifact.EDIT, name) for name in ("blue", "red"))
    assert (blue.joint, red.joint) == (None, None)
    assert list(red.after) == (["blue"] if together is Together.AFTER else [])
    both = evaluate(store, ["blue", "red"])
    assert result.figures == pytest.approx(both.figures(), abs=1e-4)
    assert recipes.run(recipe, store=store).done == ()
    alone = recipes.run(replace(recipe, requests=recipe.requests[1:]), store=store)
    assert ((Stage.SEARCH, "red") in stages(alone)) == (together is Together.AFTER)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sources": ["nowhere/*.tar"]}, "nowhere"),
        ({"sources": ["{pairs}"], "name": "mauve"}, "nothing matches 'mauve'"),
        ({"evals": {"first": "{first}x"}}, "colourx"),
    ],
)
def test_what_cannot_end_is_not_begun(shared_world, tmp_path, changes, said):
    filled = json.loads(
        json.dumps(changes)
        .replace("{pairs}", shared_world.sources["pairs"])
        .replace("{first}", shared_world.sources["first"])
    )
    name = filled.pop("name", "red")
    recipe = recipe_of(shared_world, tmp_path, "blue")
    sets = replace(recipe.sets, **filled)
    bad = replace(recipe, sets=sets, requests=(RemovalRequest(name=name),))
    with pytest.raises(InputError, match="nothing was begun") as refused:
        recipes.run(bad, store=str(tmp_path / "store"))
    assert said in refused.value.message
    assert not list(tmp_path.rglob("data/*"))


def test_a_plan_tells_of_each_request_what_a_plan_of_it_alone_does(shared_world, tmp_path):
    names = ("blue", "mauve", "red", "beige")
    store, told = Store(str(tmp_path / "store")), Told()
    with progress.using(told):
        planned = recipes.plan(recipe_of(shared_world, tmp_path, *names), store=store)
    sets = [each for each in planned if each.step.stage is Stage.SET]
    alone = [
        recipes.plan(recipe_of(shared_world, tmp_path, name), store=store)[0] for name in names
    ]
    assert sets == alone
    assert [each.trouble is None for each in sets] == [True, False, True, False]
    assert told.bars == ["looking at what is done", "reading captions", "reading labels"]
    assert told.said == []


def test_weights_that_cannot_be_loaded_are_told_first(shared_world, tmp_path):
    shutil.copytree(shared_world.folder, tmp_path / "model")
    config = tmp_path / "model" / "open_clip_config.json"
    content = json.loads(config.read_text())
    content["model_cfg"]["embed_dim"] += 8
    config.write_text(json.dumps(content))
    model = ModelSpec(f"local-dir:{tmp_path / 'model'}")
    recipe = recipe_of(shared_world, tmp_path, "blue", model=model)
    with pytest.raises(InputError, match="nothing was begun"):
        recipes.run(recipe, store=str(tmp_path / "store"))


def test_a_folder_of_others_is_left_alone(shared_world, tmp_path):
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "notes.txt").write_text("mine")
    recipe = recipe_of(shared_world, tmp_path, "blue")
    with pytest.raises(InputError, match="is there already, and not of this recipe"):
        recipes.run(recipe, store=str(tmp_path / "store"))
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


def test_the_command_is_a_gate_and_the_ledger_is_listed(written, tmp_path):
    store = tmp_path / "store"
    planned = inside("run", written(), "--plan", "--json", store=store)
    assert planned.exit_code == 0, planned.stderr
    assert {each["state"] for each in json.loads(planned.stdout)["plan"]} == {"to do"}
    assert not store.exists()
    lines = inside("run", written(), "--json-lines", store=store)
    assert lines.exit_code == 0, lines.stderr
    events = [json.loads(line) for line in lines.stdout.splitlines()]
    told = [(each["event"], each.get("stage")) for each in events]
    done = ["build-sets", "grad", "rank", "search", "apply", "eval", "report"]
    assert told[:-2] == [(kind, stage) for stage in done for kind in ("begin", "end")]
    assert [kind for kind, _ in told[-2:]] == ["finished", "result"]
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
    assert catalog.get(Artifact.RANKING, "blue").direction is Direction.GRADIENT
    assert {trial.layer for trial in catalog.get(Artifact.TRIALS, "blue").trials} == {"visual.proj"}
    # The command line wins, also over what the recipe has.
    ranked = inside("rank", "blue", *options, "--direction", "whitened", "--json", store=store)
    assert json.loads(ranked.stdout)["ranking"]["direction"] == "whitened"
    gate = inside("eval", "blue", *options, "--json", store=store)
    assert gate.exit_code == 5
    told = {each["assertion"]: each["result"] for each in json.loads(gate.stdout)["assertions"]}
    assert told == {"fa1<=0": "holds", "ta1.first>=101": "fails"}
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


def test_env_tells_what_bug_reports_need():
    said = json.loads(inside("env", "--json").stdout)
    versions = {each["package"]: each["version"] for each in said["versions"]}
    assert versions["slsgu"] == slsgu_cli.__version__
    assert "missing" not in versions.values()
    assert {each["extra"] for each in said["extras"]} == {"targets", "s3", "download"}


def test_forget_is_the_whole_job(shared_world, tmp_path):
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
