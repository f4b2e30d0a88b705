"""A search on top of earlier edits: what it measures, chooses, records, and what is applied."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from processes import inside
from reference import Reference, figures_without
from safetensors.numpy import load_file, save_file
from worlds import plain_options

from slsgu_cli.checkpoints.edits import load_edit, write_edit
from slsgu_cli.clip.batches import pixel_normalizer
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.choice import utility_of
from slsgu_cli.engine.directions import layer_gradient
from slsgu_cli.engine.effect import EarlierConcepts
from slsgu_cli.engine.evaluate import evaluate
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search, search_each
from slsgu_cli.engine.search_plan import read_plan, share_evaluation
from slsgu_cli.errors import InputError, NotForgottenError, StaleError, UsageError
from slsgu_cli.method.directions import LayerStatistics
from slsgu_cli.method.directions.whitened import Whitened, mean_square_output
from slsgu_cli.method.layer_statistics import layer_statistics
from slsgu_cli.records.codec import digest
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.options import ApplyRequest, RankOptions, SearchOptions
from slsgu_cli.records.verification import Check, VerifyRequest
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.catalog import entries
from slsgu_cli.study.joint import joint_search
from slsgu_cli.verification.verify import verify

# One layer that forgets each colour: all edits are of it.
SHARED = "visual.proj"


@pytest.fixture(scope="module", params=["fronts", "one layer"])
def after(request, several_world, tmp_path_factory):
    """A world where red was searched after blue, on any layers or all on the same one."""
    world = several_world.copied(tmp_path_factory.mktemp("after") / "store")
    layers = (SHARED,) if request.param == "one layer" else ()
    first = search(world.store, "blue", options=plain_options(steps=8, layers=layers))
    options = plain_options(steps=8, layers=layers, after=("blue",))
    return world, first, search(world.store, "red", options=options)


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def applied(world, *names, out, **options):
    request = ApplyRequest(names=names, out=Path(out), **options)
    apply(world.store, request)
    return Path(out)


def plain_figures(world, folder):
    """Return FA of blue and red, and TA without both, by plain forwards of a checkpoint."""
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    return figures_without(world, model, ("blue", "red"))


def pair(accuracy):
    return pytest.approx((accuracy.top1, accuracy.top5))


def test_its_figures_are_those_of_the_checkpoint_that_apply_writes(after, tmp_path):
    world, first, result = after
    assert result.forgotten
    folders = {"original": world.folder, "before": applied(world, "blue", out=tmp_path / "blue")}
    folders["after"] = applied(world, "blue", "red", out=tmp_path / "both")
    plain = {when: plain_figures(world, folder) for when, folder in folders.items()}
    report = result.report
    figures = {
        "original": report.before,
        "before": report.base_edits.figures,
        "after": report.after,
    }
    for when, (forget, utility) in plain.items():
        assert forget["red"] == pair(figures[when].forget), when
        assert forget["blue"] == pair(getattr(report.base_edits.edits["blue"], when)), when
        assert utility == {n: pair(now) for n, now in figures[when].utility.items()}, when
    # The trials are of the model with the earlier edit in it.
    assert result.trials.baseline_forget == report.base_edits.figures.forget
    assert result.trials.baseline_utility == report.base_edits.figures.utility
    assert result.chosen.utility == report.after.utility
    assert first.chosen.forget.top1 == report.base_edits.edits["blue"].after.top1 == 0


def test_the_edit_records_earlier_edits_and_the_original_layer(after):
    world, _, result = after
    blue, red = (load_edit(world.store, name) for name in ("blue", "red"))
    assert red.header.after == {"blue": digest(blue.header)} == result.trials.after
    assert red.header.base_edits == result.report.base_edits
    assert red.header.baseline_forget == result.report.before.forget
    original = load_file(world.folder / "open_clip_model.safetensors")[red.header.layer]
    np.testing.assert_array_equal(red.before(), original)
    gradient = Reference(replace(world, name="red")).gradient[red.header.layer]
    np.testing.assert_allclose(red.delta(), red.header.step * gradient, rtol=1e-6)


def test_the_edit_is_applied_on_top_and_reverted(after, tmp_path):
    world, _, _ = after
    both = applied(world, "red", "blue", out=tmp_path / "both")
    first = applied(world, "blue", out=tmp_path / "first")
    model = replace(world.model, name=f"local-dir:{first}")
    onto = applied(world, "red", out=tmp_path / "onto", model=model)
    assert (
        digests(onto)
        == digests(both)
        == digests(applied(world, "blue", "red", out=tmp_path / "again"))
    )
    model = replace(world.model, name=f"local-dir:{onto}")
    back = applied(world, "red", out=tmp_path / "back", model=model, revert=True)
    assert digests(back) == digests(first) != digests(onto)
    restored = applied(world, "red", "blue", out=tmp_path / "none", model=model, revert=True)
    assert digests(restored) == digests(world.folder)
    with pytest.raises(StaleError, match="already holds the edit red"):
        applied(world, "red", out=tmp_path / "twice", model=model)


def test_half_precision_is_rounded_once(several_world, tmp_path):
    world = several_world.copied(tmp_path / "store")
    options = plain_options(steps=4, layers=(SHARED,))
    search(world.store, "blue", options=options)
    search(world.store, "red", options=replace(options, after=("blue",)))
    whole = load_file(world.folder / "open_clip_model.safetensors")
    half = {n: v.astype("f2") if v.dtype == np.float32 else v for n, v in whole.items()}
    save_file(half, tmp_path / "half.safetensors")
    target = tmp_path / "half.safetensors"
    made = {"both": ("blue", "red"), "first": ("blue",)}
    for name, names in made.items():
        applied(world, *names, out=tmp_path / f"{name}.safetensors", target=target)
    target = tmp_path / "first.safetensors"
    applied(world, "red", out=tmp_path / "onto.safetensors", target=target)
    both, onto = (load_file(tmp_path / f"{name}.safetensors") for name in ("both", "onto"))
    np.testing.assert_array_equal(onto[SHARED], both[SHARED])


def test_a_checkpoint_without_the_earlier_edit_is_refused(after, tmp_path):
    world, _, _ = after
    with pytest.raises(StaleError, match="lacks the edit blue, which the edit red builds on") as e:
        applied(world, "red", out=tmp_path / "alone")
    assert "slsgu apply blue red" in e.value.hint
    assert not (tmp_path / "alone").exists()


def test_eval_applies_the_earlier_edits_too(after):
    world, _, result = after
    evaluated = evaluate(world.store, ["red"])
    assert evaluated.names == ("red", "blue")
    original, edited = evaluated.models
    assert edited.label == "edit red after blue"
    assert edited.forget["red"] == result.report.after.forget
    assert edited.forget["blue"] == result.report.base_edits.edits["blue"].after
    assert edited.utility == result.report.after.utility
    assert original.utility == result.report.before.utility


def test_verify_applies_the_earlier_edits_too(after):
    world, _, result = after
    found = verify(world.store, "red", VerifyRequest(checks=(Check.NEAREST,)))
    baselines = [model.finding(Check.BASELINE).variants[0].forget for model in found.models]
    assert baselines == [result.report.before.forget, result.report.after.forget]


def test_a_step_that_brings_an_earlier_concept_back_is_not_chosen(
    several_world, tmp_path, monkeypatch, listener
):
    world = several_world.copied(tmp_path / "store")
    options = plain_options(steps=6)
    search(world.store, "blue", options=options)
    options = replace(options, after=("blue",))
    result = search(world.store, "red", options=options)
    assert any("would bring back blue and " in told for told in listener.heard)
    with monkeypatch.context() as patch:
        patch.setattr(EarlierConcepts, "returned", lambda *_: [])
        careless = search(world.store, "red", options=options)
    assert careless.forgotten and result.forgotten
    assert utility_of(careless.chosen, options.utility) >= utility_of(
        result.chosen, options.utility
    )
    back = careless.report.base_edits.edits["blue"]
    assert (
        back.after.top1 > back.before.top1 == result.report.base_edits.edits["blue"].after.top1 == 0
    )
    monkeypatch.setattr(EarlierConcepts, "returned", lambda *_: ["blue"])
    with pytest.raises(NotForgottenError, match="every step of red brings back"):
        search(world.store, "red", options=options)


def test_the_metric_has_the_forget_rows_of_earlier_concepts(several_world, tmp_path):
    layers = (SHARED, "transformer.resblocks.1.mlp.c_proj.weight")
    world = several_world.copied(tmp_path / "store")
    search(world.store, "blue", options=plain_options(steps=1, layers=(SHARED,)))
    rank(world.store, "red", options=RankOptions(direction=Direction.WHITENED, include=layers))

    def directions(*after):
        plan = read_plan(world.store, "red", options=plain_options(layers=layers, after=after))
        with torch.no_grad():
            evaluation = plan.measured(share_evaluation(world.store, [plan]))
            found = {each.layer: each for each in plan.evaluators(world.store, evaluation)}
        return plan, evaluation.model, {name: each.along for name, each in found.items()}

    _, _, alone = directions()
    plan, model, together = directions("blue")
    blue = read_manifest(world.store, "blue")
    block = DataBlock.open(world.store, blue.forget)
    images = pixel_normalizer(blue.input, "cpu")(torch.from_numpy(block.images(0, block.rows)))
    tokens = torch.from_numpy(block.tokens).long()
    forgotten = layer_statistics(model, layers, [(images, tokens)])
    (direction,) = plan.directions
    for layer in layers:
        inputs, added = plan.covariances.inputs(layer), forgotten[layer].inputs.matrix
        both = replace(inputs, matrix=inputs.matrix.double() + added)
        gradient = torch.from_numpy(layer_gradient(world.store, plan.pointer.forget, layer))
        metric = Whitened(**direction.parameters).metric(LayerStatistics(1.0, both))
        expected = metric.steepest(gradient).float()
        assert float((together[layer] - expected).norm() / expected.norm()) < 1e-4

        def moved(along, gradient=gradient, added=added, axis=inputs.axis):
            """Return how far a step that gains as much moves the outputs on blue."""
            return mean_square_output(along, added, axis) ** 0.5 / float((along * gradient).sum())

        assert moved(together[layer]) < 0.9 * moved(alone[layer])


def test_undoing_an_earlier_edit_brings_its_concept_back(after):
    world, _, _ = after
    plan = read_plan(world.store, "red", options=plain_options(after=("blue",)))
    blue = load_edit(world.store, "blue")
    with torch.no_grad():
        shared = share_evaluation(world.store, [plan])
        along = torch.from_numpy(-blue.delta())
        undo = Evaluator(plan.measured(shared), blue.header.layer, 1.0, along)
        earlier = EarlierConcepts(shared, plan.earlier)
        assert earlier.returned(undo.change(1.0)) == ["blue"]
        assert earlier.returned(undo.change(0.0)) == []
        # Images of what is forgotten already are not among those that something is kept on.
        rows = sum(len(group.images) for group in undo.evaluation.utility.values())
        of_red = sum(len(group.images) for group in shared.of(plan.manifest).utility.values())
    assert of_red - rows == len(shared.forget["blue"].images)


def test_a_chain_of_three(several_world, tmp_path):
    world = several_world.copied(tmp_path / "store")
    options = plain_options(steps=6)
    search(world.store, "blue", options=options)
    search(world.store, "red", options=replace(options, after=("blue",)))
    (third,) = search_each(world.store, ["green"], options=replace(options, after=("red",)))
    assert list(third.report.base_edits.edits) == ["blue", "red"]
    with pytest.raises(UsageError, match="belongs to the set blue itself"):
        search(world.store, "blue", options=replace(options, after=("green",)))
    folder = applied(world, "blue", out=tmp_path / "1")
    for number, name in ((2, "red"), (3, "green")):
        model = replace(world.model, name=f"local-dir:{folder}")
        folder = applied(world, name, out=tmp_path / f"{number}", model=model)
    all_at_once = applied(world, "green", "red", "blue", out=tmp_path / "all")
    assert digests(folder) == digests(all_at_once)


def test_an_edit_is_stale_once_an_earlier_one_is_remade(after, tmp_path):
    world = after[0].copied(tmp_path / "store")
    state = {(e.kind, e.name): e for e in entries(world.store)}
    assert state[Artifact.EDIT, "red"].state == state[Artifact.TRIALS, "red"].state == "ok"
    assert state[Artifact.EDIT, "red"].made_from["after"] == "blue"
    blue = load_edit(world.store, "blue")
    again = replace(blue.header, step=2 * blue.header.step)
    write_edit(world.store, replace(blue, header=again))
    for kind in (Artifact.EDIT, Artifact.TRIALS):
        entry = next(e for e in entries(world.store) if (e.kind, e.name) == (kind, "red"))
        assert entry.state == "stale" and "the edit blue, which it builds on" in entry.reason
    with pytest.raises(StaleError, match="builds on an edit blue that has been remade") as refused:
        applied(world, "blue", "red", out=tmp_path / "both")
    assert refused.value.hint == "run `slsgu search red --after blue`"


def test_trials_on_other_earlier_edits_are_not_reused(after, tmp_path):
    world, _, result = after
    world = world.copied(tmp_path / "store")
    layers = tuple({trial.layer for trial in result.trials.trials})
    options = plain_options(steps=8, layers=layers, after=("blue",))
    again = search(world.store, "red", options=options)
    assert again.reused == len(result.trials.trials)
    alone = search(world.store, "red", options=replace(options, after=(), steps=2))
    assert alone.reused == 0 and alone.report.base_edits is None
    assert load_edit(world.store, "red").header.after == {}


def test_contradictory_requests_are_refused(after, tmp_path):
    world = after[0].copied(tmp_path / "store")
    root = world.store.root
    said = inside("search", "red", "green", "--joint", "--after", "blue", store=root)
    assert said.exit_code == 2 and "--after applies to separate searches" in said.stderr
    said = inside("search", "red", "-t", root, "--after", "blue", store=root)
    assert said.exit_code == 2 and "--after is for a search on CLIP" in said.stderr
    with pytest.raises(UsageError, match="joint search starts from the original"):
        joint_search(world.store, ["red", "green"], options=SearchOptions(after=("blue",)))
    other = replace(world, name="green")
    other.build(evals={"first": world.sources["first"]}, templates={})
    other.grade()
    with pytest.raises(InputError, match="not measured on the same rows"):
        search(world.store, "green", options=plain_options(after=("blue",)))


def test_the_command_reports_the_earlier_concept(after, tmp_path):
    world, _, result = after
    root = world.copied(tmp_path / "store").store.root
    layers = [w for t in {t.layer for t in result.trials.trials} for w in ("--layer", t)]
    words = ("--steps", "8", "--criterion", "fa1", "--overshoot", "1", "--direction", "gradient")
    done = inside("search", "red", "--after", "blue", *words, *layers, "--json", store=root)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    (earlier,) = said["earlier"]["edits"]
    assert (earlier["name"], earlier["after"]["top1"]) == ("blue", 0)
    assert None not in said["accuracy"][0].values()


def test_its_page_names_the_earlier_edits_and_how_to_repeat_it(after, tmp_path):
    world = after[0].copied(tmp_path / "store")
    page = tmp_path / "red.html"
    done = inside("report", "red", "--out", str(page), store=world.store.root)
    assert done.exit_code == 0, done.stderr
    said = page.read_text()
    assert "Needs the edits" in said
    assert "--after blue" in said and "slsgu apply blue red --out without-red" in said
