"""A joint search forgets all its concepts with the edits in place that it writes."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
from places import DEMO
from processes import inside, rows
from reference import Reference, figures_without
from safetensors.torch import load_file
from worlds import plain_options

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.choice import utility_of
from slsgu_cli.engine.evaluate import evaluate
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.errors import InputError, NotForgottenError, UsageError
from slsgu_cli.records.directions import FALLBACK, Direction
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Criterion, Tower, Trials, UtilityMetric
from slsgu_cli.records.options import ApplyRequest, RankOptions, SearchOptions
from slsgu_cli.records.studies import JointMove, JointSearch, JointTrial
from slsgu_cli.store.artifacts import Artifact, joint_label
from slsgu_cli.store.catalog import Standing, entries
from slsgu_cli.study import joint as joint_module
from slsgu_cli.study.joint import JointSearchRun, joint_search, require_joint

NAMES = ("blue", "red", "green")
DEMO_LAYERS = (
    "visual.transformer.resblocks.6.attn.out_proj.weight",
    "transformer.resblocks.0.attn.out_proj.weight",
    "transformer.resblocks.0.mlp.c_proj.weight",
    "transformer.resblocks.2.attn.out_proj.weight",
)


@pytest.fixture(scope="module", autouse=True)
def plots():
    """Draw nothing, which takes longer than all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        for kind in ("several_plot", "cosine_maps"):
            patch.setattr(joint_module, kind, lambda *_, **__: b"a plot")
        patch.setattr("slsgu_cli.engine.evaluate.cosine_plot", lambda *_, **__: b"a plot")
        yield


def find(world, *names, **options):
    asked = plain_options(**{"steps": 10} | options)
    return joint_search(world.store, names or NAMES, options=asked)


@pytest.fixture(scope="module")
def searched(several_world, tmp_path_factory):
    """A world that is searched jointly, for tests that change nothing."""
    world = several_world.copied(tmp_path_factory.mktemp("searched") / "store")
    return world, find(world)


@pytest.fixture
def apart(searched, tmp_path):
    return searched[0].copied(tmp_path / "store"), searched[1]


def assert_figures(trial, figures):
    forget, kept = figures
    for name, found in trial.forget.items():
        assert (found.top1, found.top5) == pytest.approx(forget[name]), name
    for name, found in trial.utility.items():
        assert (found.top1, found.top5) == pytest.approx(kept[name]), name


def test_a_joint_search_is_the_summed_edits_by_plain_forwards(searched):
    world, result = searched
    assert result.forgotten
    assert {name: found.top1 for name, found in result.chosen.forget.items()} == dict.fromkeys(
        NAMES, 0.0
    )
    model = open_clip.create_model(world.model.name).eval()
    baseline = figures_without(world, model, NAMES)
    for name in NAMES:
        edit = load_edit(world.store, name)
        with torch.no_grad():
            model.get_parameter(edit.header.layer).add_(torch.from_numpy(edit.delta()))
    assert_figures(result.chosen, figures_without(world, model, NAMES))
    before = result.record
    kept = {name: (found.top1, found.top5) for name, found in before.baseline_utility.items()}
    assert kept == {name: pytest.approx(figures) for name, figures in baseline[1].items()}


def test_edits_are_of_the_original_gradients_and_say_that_they_belong_together(searched):
    world, result = searched
    headers = [load_edit(world.store, name).header for name in NAMES]
    assert len({header.joint.digest for header in headers}) == 1
    for header, move in zip(headers, result.chosen.moves, strict=True):
        assert header.joint.names == NAMES
        assert (header.name, header.layer, header.step) == (move.name, move.layer, move.step)
        assert header.forget == result.chosen.forget[header.name]
        assert header.utility == result.chosen.utility
        own = replace(world, name=header.name)
        assert header.gradient == own.pointer.forget
        gradient = Reference(own).gradient[header.layer]
        delta = load_edit(world.store, header.name).delta()
        np.testing.assert_allclose(delta, header.step * gradient, rtol=1e-6)


@pytest.mark.slow
def test_brands_of_the_embedded_model_are_forgotten_together(demo_world, tmp_path):
    names = ("facebook", "github")
    world = demo_world.copied(tmp_path / "store")
    for name in names:
        own = replace(world, name=name)
        own.build(
            sources=[f"{DEMO / 'train.parquet'}?concept={name}"],
            retain_sources=[world.sources["pairs"]],
            retain_samples=32,
            retain_exclude=names,
            max_forget=16,
        )
        own.grade()
    result = find(world, *names, layers=DEMO_LAYERS)
    assert result.forgotten
    assert all(before.top1 > 60 for before in result.record.baseline_forget.values())
    model = open_clip.create_model(world.model.name).eval()
    for name in names:
        edit = load_edit(world.store, name)
        with torch.no_grad():
            model.get_parameter(edit.header.layer).add_(torch.from_numpy(edit.delta()))
    assert_figures(result.chosen, figures_without(world, model, names))


def test_apply_writes_a_joint_search_as_it_was_searched(searched, tmp_path, listener):
    world, result = searched
    request = ApplyRequest(names=NAMES, out=tmp_path / "out")
    apply(world.store, request)
    assert not any("searched jointly" in told for told in listener.heard)
    model = open_clip.create_model(f"local-dir:{tmp_path / 'out'}").eval()
    assert_figures(result.chosen, figures_without(world, model, NAMES))
    before = load_file(world.folder / "open_clip_model.safetensors")
    after = load_file(tmp_path / "out" / "open_clip_model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {move.layer for move in result.chosen.moves}


def test_apply_warns_of_missing_edits(apart, tmp_path, listener):
    world, _ = apart
    request = ApplyRequest(names=("blue", "green"), out=tmp_path / "out", dry_run=True)
    apply(world.store, request)
    assert any("blue, green: searched jointly with red" in told for told in listener.heard)
    listener.heard.clear()
    # The edit of a set that was searched alone since is not the one of the joint search.
    search(world.store, "red", options=SearchOptions(steps=3))
    apply(world.store, replace(request, names=NAMES))
    assert any("blue, green: searched jointly with red" in told for told in listener.heard)


def test_stages_are_the_first_moves(searched):
    _, result = searched
    found = result.record
    assert [tuple(m.name for m in stage.moves) for stage in found.stages] == [
        NAMES[:1],
        NAMES[:2],
        NAMES,
    ]
    for count, stage in enumerate(found.stages, start=1):
        assert stage.moves == result.chosen.moves[:count]
    assert result.chosen.moves in [trial.moves for trial in found.trials]


def test_a_concept_moves_the_layer_whose_edit_costs_least(searched):
    """What it keeps, here by TA@1, less a tenth of how far cosines move."""
    world, result = searched
    for move in result.chosen.moves:
        trials = world.store.read_record(Artifact.TRIALS.path(move.name), Trials).trials
        forgets = [trial for trial in trials if trial.moved is not None]
        assert len(forgets) > 1
        best = max(
            forgets, key=lambda trial: utility_of(trial, UtilityMetric.TA1) - 10 * trial.moved
        )
        assert best.layer == move.layer


@pytest.mark.parametrize(("concepts", "forgets"), [(2, True), (20, False)])
def test_each_concept_is_worth_its_share_of_the_cost(concepts, forgets, monkeypatch):
    """The last one of many is not worth most of what is to be kept."""
    names = [str(number) for number in range(concepts)]

    def trial(run, steps, *, slopes=False):
        left = {name: Accuracy(0.0 if step > 2 else 50.0, 50.0, 2) for name, step in steps.items()}
        moves = tuple(
            JointMove(name, "a layer", Tower.TEXT, FALLBACK, step, step)
            for name, step in steps.items()
        )
        gaps = dict.fromkeys(steps, 0.0)
        return JointTrial(moves, left, gaps, None, 0.1 + 0.3 * (steps["0"] > 2), {})

    monkeypatch.setattr(JointSearchRun, "_trial", trial)
    longer = {"0": 1.0} | dict.fromkeys(names[1:], 3.0)
    forget = Accuracy(100.0, 100.0, 8)
    alone = {
        name: SimpleNamespace(alone=SimpleNamespace(step=longer[name], forget=forget))
        for name in names
    }
    options = SearchOptions(criterion=Criterion.FA1, overshoot=1.0)
    run = JointSearchRun(None, alone, options, None, {}, lambda trials: None)
    assert run.forgets(run.run()) is forgets


def test_a_repeated_joint_search_measures_nothing(apart, monkeypatch):
    world, result = apart
    before = world.store.read_bytes(Artifact.JOINT.path(joint_label(NAMES)))
    monkeypatch.setattr(JointSearchRun, "_measured", None)
    again = find(world)
    assert again.record == result.record
    assert again.reused == len(result.record.trials)
    assert world.store.read_bytes(Artifact.JOINT.path(joint_label(NAMES))) == before


class Interrupted(Exception):
    """Stands for a kill, after some trials."""


def test_an_interrupted_joint_search_resumes_to_the_same_bytes(apart, monkeypatch):
    world, result = apart
    path = Artifact.JOINT.path(joint_label(NAMES))
    before = world.store.read_bytes(path)
    edits = [world.store.read_bytes(Artifact.EDIT.path(name)) for name in NAMES]
    world.store.remove(path)
    measure = JointSearchRun._measured
    measured = []

    def counted(run, moves, **options):
        measured.append(moves)
        if len(measured) == 4:
            raise Interrupted
        return measure(run, moves, **options)

    monkeypatch.setattr(JointSearchRun, "_measured", counted)
    with pytest.raises(Interrupted):
        find(world)
    left = world.store.read_record(path, JointSearch)
    assert (len(left.trials), left.stages) == (3, ())
    assert left.trials == result.record.trials[:3]
    again = find(world)
    assert again.reused == 3
    assert len(set(measured)) == len(measured) - 1
    assert world.store.read_bytes(path) == before
    assert [world.store.read_bytes(Artifact.EDIT.path(name)) for name in NAMES] == edits


def slopes_and_differences(world, monkeypatch, **options):
    """Return the slopes of a joint search's first trial, and what differences of the cost say."""
    runs = []
    run = joint_module.JointSearchRun.run

    def kept(self):
        runs.append(self)
        return run(self)

    monkeypatch.setattr(joint_module.JointSearchRun, "run", kept)
    first = find(world, "blue", "red", steps=3, **options).record.trials[0]
    steps = {move.name: move.step for move in first.moves}

    def cost(name, change):
        with torch.no_grad():
            moved = steps | {name: steps[name] * (1 + change)}
            return runs[0]._trial(moved, slopes=True).cost

    change = 1e-2
    differences = {
        name: (cost(name, change) - cost(name, -change)) / (2 * change) for name in steps
    }
    return first, differences


@pytest.mark.parametrize(
    ("layers", "options"),
    [
        (["transformer.resblocks.1.attn.in_proj_weight"], {}),
        (["visual.transformer.resblocks.1.mlp.c_proj.weight"], {"criterion": Criterion.FA5}),
    ],
)
def test_slopes_are_those_of_the_cost(apart, monkeypatch, layers, options):
    world, _ = apart
    first, differences = slopes_and_differences(world, monkeypatch, layers=layers, **options)
    assert any(first.slopes.values())
    for name, slope in first.slopes.items():
        assert slope == pytest.approx(differences[name], rel=0.05, abs=1e-3), name


def test_validation_images_decide_whether_a_concept_is_forgotten(apart, monkeypatch):
    """Of an image that nothing was chosen by, the figures tell."""
    world, _ = apart
    reported = joint_module._reported

    def recognised(*asked):
        trial, ranks = reported(*asked)
        return replace(trial, forget=dict.fromkeys(trial.forget, Accuracy(50.0, 50.0, 2))), ranks

    monkeypatch.setattr(joint_module, "_reported", recognised)
    result = find(world)
    assert all(found.top1 == 50.0 for found in result.chosen.forget.values())
    assert all(load_edit(world.store, name).header.forgotten for name in NAMES)


def test_whitened_directions_and_margins_join_as_well(apart):
    world, _ = apart
    for name in ("blue", "red"):
        rank(world.store, name, options=RankOptions(direction=Direction.WHITENED))
    result = find(world, "blue", "red", criterion=Criterion.MARGIN, margin=0.01)
    header = load_edit(world.store, "red").header
    assert header.direction.kind is Direction.WHITENED
    assert (header.direction, header.margin) == (result.chosen.moves[1].direction, 0.01)
    assert result.forgotten == all(gap >= 0.01 for gap in result.chosen.gaps.values())
    assert header.forgotten == (result.chosen.gaps["red"] >= 0.01)
    before = open_clip.create_model(world.model.name).get_parameter(header.layer).data
    moved = np.linalg.norm(load_edit(world.store, "red").delta()) / before.norm().item()
    assert moved == pytest.approx(header.share, rel=1e-4)


def test_a_failed_joint_search_raises_and_saves_its_edits(apart):
    world, _ = apart
    result = find(world, steps=1, layers=["transformer.resblocks.1.attn.out_proj.weight"])
    assert not result.forgotten
    with pytest.raises(NotForgottenError, match="no steps forget blue, red, green") as error:
        require_joint(result)
    assert error.value.exit_code == 5
    assert "--joint" in error.value.hint
    assert load_edit(world.store, "blue").header.joint is not None


def test_sets_that_are_measured_on_other_rows_are_refused(apart):
    world, _ = apart
    other = replace(world, name="red")
    other.build(evals={"first": world.sources["first"]}, templates={}, retain_exclude=NAMES)
    other.grade()
    with pytest.raises(InputError, match="blue and red are not measured on the same rows"):
        find(world)
    with pytest.raises(InputError, match="not measured on the same rows"):
        evaluate(world.store, NAMES, model=None, device="cpu")
    listed = {entry.kind: entry for entry in entries(world.store)}
    assert listed[Artifact.JOINT].state is Standing.STALE


def test_names_that_make_no_joint_search_are_refused(several_world):
    with pytest.raises(UsageError, match="several names"):
        find(several_world, "blue")
    with pytest.raises(UsageError, match="twice"):
        find(several_world, "blue", "blue")


def test_many_blocks_have_few_cached_stages():
    assert joint_module.growth(4) == [1, 2, 3, 4]
    assert joint_module.growth(11) == [1, 2, 5, 10, 11]
    assert joint_module.growth(100) == [1, 2, 5, 10, 20, 50, 100]
    assert joint_module.growth(120) == [1, 2, 5, 10, 20, 50, 100, 120]


def test_long_lists_have_short_labels():
    assert joint_label(NAMES) == "blue+red+green"
    label = joint_label([f"concept {index}" for index in range(50)])
    assert label.startswith("concept 0+49-")
    assert len(label) < 100


def test_eval_of_several_has_the_figures_of_the_search(searched):
    world, result = searched
    found = evaluate(world.store, NAMES, model=None, device="cpu")
    before, after = found.models
    assert before.forget == result.record.baseline_forget
    assert before.utility == result.record.baseline_utility
    assert after.forget == result.chosen.forget
    assert after.utility == result.chosen.utility
    # Three colours that were forgotten, and the other five.
    assert before.cosines.shape == (8, 8)
    for place in range(3):
        assert after.cosines[place, place] < before.cosines[place, place]


def test_the_record_survives_a_round_trip(searched):
    world, result = searched
    assert (
        world.store.read_record(Artifact.JOINT.path(joint_label(NAMES)), JointSearch)
        == result.record
    )
    listed = {(entry.kind, entry.name): entry for entry in entries(world.store)}
    joint = listed[Artifact.JOINT, "blue+red+green"]
    assert joint.state is Standing.OK
    assert joint.made_from["names"] == "blue, red, green"


def test_the_commands(apart):
    root = apart[0].store.root
    done = inside(
        "search",
        *NAMES,
        "--joint",
        "--criterion",
        "fa1",
        "--utility",
        "ta1",
        "--overshoot",
        "1",
        store=root,
    )
    assert done.exit_code == 0
    edits, stages = rows(done.stdout)
    assert [row[0] for row in edits] == ["set", *NAMES]
    assert edits[0][1:4] == ["layer", "direction", "step"]
    assert [row[:2] for row in stages[1:]] == [
        ["0", "-"],
        ["1", "blue"],
        ["2", "red"],
        ["3", "green"],
    ]
    assert stages[0][3:] == [
        "FA@1 at most",
        "TA@1 first",
        "TA@5 first",
        "TA@1 second",
        "TA@5 second",
    ]
    found = json.loads(inside("eval", *NAMES, "--json", store=root).stdout)
    assert [row["figure"] for row in found["accuracy"]][:2] == ["FA@1 blue", "FA@5 blue"]
    failed = inside(
        "search",
        *NAMES,
        "--joint",
        "--steps",
        "1",
        "--layer",
        "transformer.resblocks.1.attn.out_proj.weight",
        store=root,
    )
    assert failed.exit_code == 5
    assert inside("search", "blue", "--joint", store=root).exit_code == 2
