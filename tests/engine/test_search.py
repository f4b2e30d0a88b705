"""The search finds what a plain search that measures everything finds."""

import math
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import tiny_clip
from open_clip.model import convert_to_custom_text_state_dict
from reference import Reference
from safetensors.numpy import load_file, save_file
from worlds import lose_covariance, plain_options

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip import batches, zeroshot
from slsgu_cli.clip.loading import load as load_model
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.towers import OpenClipText, OpenClipVision
from slsgu_cli.engine.choice import residual
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import require_forgotten, search
from slsgu_cli.engine.set_edits import ensure_edit
from slsgu_cli.engine.stored_covariances import find_covariances
from slsgu_cli.errors import InputError, MissingError, NotForgottenError, StaleError, UsageError
from slsgu_cli.records.directions import FALLBACK, Direction, DirectionSpec, Statistic
from slsgu_cli.records.method import Criterion, Precision, Trials, UtilityMetric
from slsgu_cli.records.options import PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Standing, entries
from slsgu_cli.store.store import Store

BUDGETS = [None, 2_000_000, 200_000, 0]
# One layer of each tower, where a search shows how it goes on and not how it chooses.
SOME = ("visual.proj", "transformer.resblocks.1.ln_1.weight")
STUBBORN = "transformer.resblocks.1.attn.out_proj.weight"


@pytest.fixture(scope="module")
def plain(shared_world):
    return Reference(shared_world)


def find(world, **options):
    return search(world.store, world.name, options=plain_options(**options))


def front(world):
    return [score.layer for score in world.ranking.scores if score.front]


def pair(accuracy):
    return pytest.approx((accuracy.top1, accuracy.top5))


def assert_same_search(result, reference, *, full=False, criterion=Criterion.FA1):
    """Compare (layer, step, forget accuracy) of every trial, the choice, and all utilities."""
    expected, chosen = reference
    trials = result.trials.trials
    assert len(trials) == len(expected)
    for trial, tried in zip(trials, expected, strict=True):
        layer, step, figures = tried.layer, tried.step, tried.figures
        assert (trial.layer, trial.step) == (layer, pytest.approx(step, rel=1e-6))
        assert figures.forget == pair(trial.forget), (layer, step)
        if full or trial.utility is not None:
            assert trial.utility is not None, (layer, step)
            assert set(trial.utility) == set(figures.utility)
            for name, found in trial.utility.items():
                assert figures.utility[name] == pair(found), (layer, step, name)
    assert result.chosen.layer == chosen.layer
    assert result.chosen.step == pytest.approx(chosen.step, rel=1e-6)
    assert result.chosen in trials
    assert result.chosen.utility is not None
    assert result.forgotten == (chosen.figures.residual(criterion) == 0)


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize("criterion", [Criterion.FA1, Criterion.FA5])
@pytest.mark.parametrize("utility", UtilityMetric)
def test_search_is_the_plain_search(utility, criterion, budget, world, plain):
    reference = plain.algorithm1(front(world), 6, criterion, utility)
    result = find(world, criterion=criterion, utility=utility, steps=6, cache_budget=budget)
    assert_same_search(result, reference, criterion=criterion)
    expected = reference[1].figures.expected(plain.original)
    assert result.chosen.expected == pytest.approx(expected, abs=1e-3)
    lost = reference[1].figures.largest_loss(plain.original)
    assert result.chosen.worst.lost == pytest.approx(lost, abs=1e-2)
    # Utility is spared where a step cannot win: else this would show nothing about sparing.
    least = reference[1].figures.residual(criterion)
    for trial in result.trials.trials:
        forget = trial.forget.top5 if criterion is Criterion.FA5 else trial.forget.top1
        assert trial.utility is None or forget == pytest.approx(least)
    assert any(trial.utility is None for trial in result.trials.trials)


@pytest.mark.parametrize("budget", BUDGETS)
def test_rows_in_many_parts_have_the_same_figures(budget, world, plain, monkeypatch):
    """Several groups of prompts, each of its own length, and images a few at a time."""
    monkeypatch.setitem(batches.IMAGES_PER_FORWARD, "cpu", 7)
    monkeypatch.setitem(zeroshot.PROMPTS_PER_FORWARD, "cpu", 5)
    reference = plain.algorithm1(front(world), 6, Criterion.FA1)
    result = find(world, steps=6, cache_budget=budget, full=True)
    assert_same_search(result, reference, full=True)


def test_a_smaller_budget_recomputes_more_and_evaluates_no_more(world, monkeypatch):
    """However little is kept, trials are left after the same images."""
    monkeypatch.setattr(zeroshot, "LEAST_ROWS", 1)
    from_pixels, looked_at = [], []
    for budget in (None, 200_000, 0):
        with monkeypatch.context() as patch:
            rows, embedded = Rows().watch(patch), Rows().watch(patch, "embed")
            find(world, steps=6, cache_budget=budget)
        from_pixels.append(embedded[OpenClipVision])
        looked_at.append(rows[OpenClipVision])
        world.store.remove(Artifact.TRIALS.path("blue"))
        for name in Artifact.FEATURES.names(world.store):
            world.store.remove(Artifact.FEATURES.path(name))
    everything, part, nothing = from_pixels
    assert everything < part < nothing == looked_at[-1]
    # Where something is kept, the original runs over the concept's images once more.
    assert max(looked_at) - min(looked_at) <= 2 + 8


@pytest.mark.parametrize("budget", [200_000, 0])
def test_a_further_search_runs_the_original_over_few_images(budget, world, plain, monkeypatch):
    """Its features are in the store; what is searched with them is the plain search."""
    monkeypatch.setattr(zeroshot, "LEAST_ROWS", 1)
    reference = plain.algorithm1(front(world), 6, Criterion.FA1)
    embedded = []
    for damage in (b"", b"", b"damaged"):
        world.store.remove(Artifact.TRIALS.path("blue"))
        for name in Artifact.FEATURES.names(world.store) if damage else ():
            world.store.write_bytes(Artifact.FEATURES.path(name), damage)
        with monkeypatch.context() as patch:
            rows = Rows().watch(patch, "embed")
            result = find(world, steps=6, cache_budget=budget)
        assert_same_search(result, reference)
        embedded.append(rows[OpenClipVision])
    fresh, known, mended = embedded
    assert known < fresh == mended
    (entry,) = (entry for entry in entries(world.store) if entry.kind is Artifact.FEATURES)
    assert entry.state is Standing.OK


def test_every_candidate_layer_has_the_plain_figures(world, plain):
    layers = [score.layer for score in world.ranking.scores]
    assert len(layers) > 40
    reference = plain.algorithm1(layers, 2, Criterion.FA1)
    result = find(world, layers=layers, steps=2, full=True)
    assert_same_search(result, reference, full=True)


@pytest.mark.slow
def test_search_of_the_embedded_model_is_the_plain_search(demo_world, tmp_path):
    world = replace(demo_world, store=Store(str(tmp_path / "store")))
    shutil.copytree(demo_world.store.root, world.store.root)
    layers = [
        "visual.proj",
        "visual.transformer.resblocks.6.attn.out_proj.weight",
        "transformer.resblocks.0.attn.out_proj.weight",
    ]
    reference = Reference(world).algorithm1(layers, 4, Criterion.FA1)
    result = find(world, layers=layers, steps=4, cache_budget=20 << 20)
    assert_same_search(result, reference)
    assert result.forgotten
    assert len({trial.layer for trial in result.trials.trials if trial.utility}) > 1


def test_search_of_a_sigmoid_model_is_the_plain_search(world, tmp_path):
    """The same model with a text tower of its own, and the loss of SigLIP."""
    custom = {"custom_text": True, "init_logit_bias": -2.0}
    model = tiny_clip.fresh_model(tiny_clip.CONFIG | custom)
    state = load_model(resolve(world.model)).state_dict()
    model.load_state_dict(convert_to_custom_text_state_dict(state), strict=False)
    folder = tiny_clip.write_folder(tmp_path / "siglip", model, **custom)
    own = replace(world, model=ModelSpec(f"local-dir:{folder}"))
    own.build()
    own.grade()
    reference = Reference(own).algorithm1(front(own), 4, Criterion.FA1)
    result = find(own, steps=4, full=True)
    assert_same_search(result, reference, full=True)
    assert result.forgotten
    assert any(trial.layer.startswith("text.") for trial in result.trials.trials)


def test_baseline_is_the_original_model(world, plain):
    trials = find(world, steps=1).trials
    figures = plain.figures()
    assert figures.forget == pair(trials.baseline_forget)
    assert {name: pair(found) for name, found in trials.baseline_utility.items()} == figures.utility
    assert trials.baseline_forget.rows == 8
    assert {name: found.rows for name, found in trials.baseline_utility.items()} == {
        "first": 56,
        "second": 40,
    }


def test_a_concept_outside_the_classes_is_measured_on_its_forget_set(world):
    world.build(evals={"second": world.sources["second"]}, templates={})
    world.grade()
    assert world.manifest.forget_eval is None
    reference = Reference(world).algorithm1(front(world), 4, Criterion.FA1)
    result = find(world, steps=4, full=True)
    assert_same_search(result, reference, full=True)
    assert result.trials.baseline_forget.rows == world.manifest.forget.rows
    assert result.trials.baseline_forget.top1 > 0


def test_shares_are_relative_to_the_layers_norm(world, plain):
    for trial in find(world, layers=SOME, steps=3).trials.trials:
        weight = plain.model.get_parameter(trial.layer).data.double().norm().item()
        moved = trial.step * np.linalg.norm(plain.gradient[trial.layer].astype(float))
        assert trial.share == pytest.approx(moved / weight, rel=1e-6)


def test_the_edit_is_the_chosen_trial(world, plain):
    result = find(world, steps=5)
    edit = load_edit(world.store, "blue")
    chosen, header = result.chosen, edit.header
    assert (header.layer, header.step, header.share) == (chosen.layer, chosen.step, chosen.share)
    assert (header.forget, header.utility) == (chosen.forget, chosen.utility)
    assert header.baseline_forget == result.trials.baseline_forget
    assert (header.name, header.concept, header.model) == ("blue", "blue", world.model)
    assert header.gradient == world.pointer.forget
    expected = chosen.step * plain.gradient[chosen.layer]
    np.testing.assert_allclose(edit.delta(), expected, rtol=1e-6, atol=0)
    original = plain.model.get_parameter(chosen.layer).data.numpy()
    np.testing.assert_array_equal(edit.before(), original)


def test_an_edit_of_half_precision_weights_keeps_them_in_half(world, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "half")
    path = folder / "open_clip_model.safetensors"
    save_file({name: w.astype(np.float16) for name, w in load_file(path).items()}, path)
    own = replace(world, model=ModelSpec(f"local-dir:{folder}"))
    own.build()
    own.grade()
    find(own, layers=SOME, steps=2)
    edit = load_edit(own.store, "blue")
    assert edit.before().dtype == np.float16
    np.testing.assert_array_equal(edit.before(), load_file(path)[edit.header.layer])
    assert edit.delta().dtype == np.float32


class Rows(Counter):
    """Counts the images and prompts that run through a part of a tower."""

    def watch(self, monkeypatch, part="head"):
        for kind in (OpenClipVision, OpenClipText):
            run = getattr(kind, part)

            def counted(tower, x, *inputs, run=run, kind=kind):
                self[kind] += x.shape[0]
                return run(tower, x, *inputs)

            monkeypatch.setattr(kind, part, counted)
        return self


@pytest.mark.parametrize("criterion", [Criterion.FA5, Criterion.MARGIN])
def test_interpolated_steps_are_those_of_bisection(criterion, world):
    """Each line's last two steps, and what is chosen; with fewer trials than bisection takes."""
    layers = [score.layer for score in world.ranking.scores][::5]
    options = {"layers": layers, "steps": 10, "criterion": criterion, "overshoot": 1.25}
    proven = find(world, **options)
    world.store.remove(Artifact.TRIALS.path("blue"))
    sought = find(world, **options, exact=False)
    assert len(sought.trials.trials) < 0.85 * len(proven.trials.trials)
    known = {(t.layer, t.step): t for t in proven.trials.trials}

    def ends(result, layer):
        """Return the longest step that leaves something, and the shortest that does not."""
        trials = [trial for trial in result.trials.trials if trial.layer == layer]
        left = {t.step: residual(t.forget, t.gap, criterion, margin) for t in trials}
        enough = min((step for step in left if left[step] == 0), default=math.inf)
        return max((step for step in left if left[step] and step < enough), default=0.0), enough

    margin = SearchOptions().margin
    for layer in layers:
        assert ends(sought, layer) == ends(proven, layer), layer
    for trial in sought.trials.trials:
        same = known.get((trial.layer, trial.step))
        assert same is None or (same.forget, same.gap) == (trial.forget, trial.gap)
    assert sought.chosen == proven.chosen
    again = find(world, **options, exact=False)
    assert again.reused == len(sought.trials.trials) == len(again.trials.trials)


def test_recorded_trials_run_nothing_again(world, monkeypatch):
    first = find(world, layers=SOME, steps=4, full=True)
    rows = Rows().watch(monkeypatch)
    again = find(world, layers=SOME, steps=4, full=True)
    assert (first.reused, again.reused) == (0, len(first.trials.trials))
    assert (again.trials, again.chosen) == (first.trials, first.chosen)
    prompts = 3 * (8 + 5)
    # The original over the concept's images, and an image of each set to see what it takes;
    # and what the chosen edit does to all.
    assert rows == {OpenClipVision: 8 + 2 + 64 + 40, OpenClipText: prompts}


def test_trials_of_a_machine_with_other_last_digits_are_found(world, monkeypatch):
    options = {"layers": SOME, "steps": 4, "overshoot": 1.3}
    first = find(world, **options)
    other = tuple(replace(trial, step=trial.step * (1 + 1e-12)) for trial in first.trials.trials)
    assert all(one.step != two.step for one, two in zip(first.trials.trials, other, strict=True))
    world.store.write_record(Artifact.TRIALS.path("blue"), replace(first.trials, trials=other))
    monkeypatch.setattr(Evaluator, "measure", None)
    again = find(world, **options)
    assert again.trials.trials == other
    assert again.chosen == replace(first.chosen, step=again.chosen.step)


def test_recorded_forget_accuracies_are_reused(world):
    first = find(world, layers=SOME, steps=3)
    path = Artifact.TRIALS.path("blue")
    told = [
        replace(trial, forget=replace(trial.forget, top1=100.0)) for trial in first.trials.trials
    ]
    world.store.write_record(path, replace(first.trials, trials=tuple(told)))
    again = find(world, layers=SOME, steps=3)
    # With every first step said to fail, the search goes on by doubling it.
    found = {(trial.layer, trial.step) for trial in again.trials.trials}
    for layer in SOME:
        first_step = next(trial.step for trial in told if trial.layer == layer)
        assert (layer, 2 * first_step) in found


@pytest.mark.parametrize("criterion", list(Criterion))
def test_more_steps_resume_the_search(criterion, world):
    short = find(world, layers=SOME, steps=3, criterion=criterion)
    longer = find(world, layers=SOME, steps=6, criterion=criterion)
    assert longer.reused == len(short.trials.trials)
    world.store.remove(Artifact.TRIALS.path("blue"))
    fresh = find(world, layers=SOME, steps=6, criterion=criterion)

    def figures(result):
        return {(t.layer, t.step): t.forget for t in result.trials.trials}

    assert figures(longer) == figures(fresh)
    assert longer.chosen == fresh.chosen


def test_the_time_is_on_record_of_a_search_that_made_all_trials(world):
    first = find(world, layers=SOME, steps=2).trials.took
    assert first.seconds > 0
    assert first.where.startswith("cpu")
    assert find(world, layers=SOME, steps=2).trials.took == first
    assert find(world, layers=SOME, steps=3).trials.took is None


def test_fewer_steps_choose_among_those_alone(world):
    find(world, layers=SOME, steps=6)
    fewer = find(world, layers=SOME, steps=2)
    world.store.remove(Artifact.TRIALS.path("blue"))
    assert fewer.chosen == find(world, layers=SOME, steps=2).chosen


def test_trials_of_another_criterion_are_reused(world):
    find(world, layers=SOME, steps=5, criterion=Criterion.FA5)
    mixed = find(world, layers=SOME, steps=5)
    world.store.remove(Artifact.TRIALS.path("blue"))
    assert mixed.chosen == find(world, layers=SOME, steps=5).chosen
    assert mixed.reused > 0


def test_trials_without_expected_utility_are_measured_again(world):
    path = Artifact.TRIALS.path("blue")
    fresh = find(world, layers=SOME, steps=3, utility=UtilityMetric.EXPECTED)
    record = world.store.read_record(path, Trials)
    bare = [replace(trial, expected=None) for trial in record.trials]
    world.store.write_record(path, replace(record, trials=tuple(bare)))
    assert find(world, layers=SOME, steps=3).chosen.expected is None
    again = find(world, layers=SOME, steps=3, utility=UtilityMetric.EXPECTED)
    assert again.chosen == fresh.chosen
    assert again.chosen.expected is not None


def test_trials_of_another_layer_stay(world):
    find(world, steps=2, layers=SOME[:1])
    both = find(world, steps=2, layers=SOME[1:])
    assert {trial.layer for trial in both.trials.trials} == set(SOME)
    assert both.chosen.layer == SOME[1]


def test_trials_on_other_evaluation_rows_are_not_used(world):
    find(world, layers=SOME, steps=2)
    world.build(
        evals={"first": world.sources["first"]}, templates={"first": world.sources["templates"]}
    )
    result = find(world, layers=SOME, steps=2)
    assert result.reused == 0
    assert set(result.chosen.utility) == {"first"}


def test_a_layer_is_named_by_a_part_that_fits_it_alone(world):
    named = find(world, steps=1, layers=["visual.proj"])
    assert {trial.layer for trial in named.trials.trials} == {"visual.proj"}
    part = find(world, steps=1, layers=["visual.transformer.resblocks.2.mlp.c_fc"])
    assert part.chosen.layer == "visual.transformer.resblocks.2.mlp.c_fc.weight"


@pytest.mark.parametrize(
    ("text", "count"),
    [("resblocks.2.mlp.c_fc", 2), ("nothing", 0), ("visual.proj2", 0), ("visual.ln_post.bias", 0)],
)
def test_a_part_that_fits_several_layers_or_none_is_refused(text, count, world):
    with pytest.raises(UsageError, match=f"fits {count} ranked layers") as error:
        find(world, steps=1, layers=[text])
    assert "slsgu rank blue" in error.value.hint
    if count:
        assert "transformer.resblocks.2.mlp.c_fc.weight" in str(error.value)


@pytest.mark.parametrize("direction", [Direction.WHITENED, Direction.BOTH])
def test_layers_without_covariance_are_searched_along_their_gradient(direction, world, listener):
    layer = "visual.conv1.weight"
    options = RankOptions(direction=direction)
    rank(world.store, "blue", options=options)
    lose_covariance(world, layer)
    ranked = rank(world.store, "blue", options=options)
    listener.heard.clear()
    result = find(world, steps=1, layers=[layer, "visual.proj"], direction=Direction.WHITENED)
    assert {trial.move for trial in result.trials.trials} == {
        (layer, FALLBACK),
        ("visual.proj", ranked.directions[-1]),
    }
    assert any("1 of 2 layers are searched along their gradient" in told for told in listener.heard)


def test_changed_weights_are_refused(world, tmp_path):
    folder = shutil.copytree(world.folder, tmp_path / "clip")
    own = replace(world, model=ModelSpec(f"local-dir:{folder}"))
    own.build()
    own.grade()
    path = folder / "open_clip_model.safetensors"
    weights = load_file(path)
    weights["visual.proj"][0, 0] += 1
    save_file(weights, path)
    with pytest.raises(StaleError, match="has other weights than when its gradients") as error:
        find(own, steps=1)
    assert "slsgu grad blue" in error.value.hint
    assert not own.store.exists(Artifact.EDIT.path("blue"))


def test_a_ranking_of_other_gradients_is_refused(world):
    compute_gradients(world.store, "blue", model=None, options=PassOptions(batch_size=8))
    with pytest.raises(StaleError, match="ranking of blue was made from other gradients"):
        find(world, steps=1)
    rank(world.store, "blue", options=RankOptions(direction=Direction.GRADIENT))
    assert find(world, steps=1).trials.forget == world.pointer.forget


def test_a_missing_ranking_is_an_error_with_the_command_that_makes_it(world):
    world.store.remove(Artifact.RANKING.path("blue"))
    with pytest.raises(MissingError, match="ranking of blue") as error:
        find(world, steps=1)
    assert "slsgu rank blue" in error.value.hint


def test_a_set_without_evaluation_rows_is_refused(world):
    world.build(evals={}, templates={})
    with pytest.raises(InputError, match="nothing to measure on") as error:
        find(world, steps=1)
    assert "--eval" in error.value.hint


def test_a_search_that_forgets_nothing_says_so_and_saves_its_work(world):
    result = find(world, steps=1, layers=[STUBBORN])
    assert not result.forgotten
    assert result.chosen.forget.top1 > 0
    with pytest.raises(NotForgottenError, match="no step forgets blue") as error:
        require_forgotten(result)
    assert error.value.exit_code == 5
    assert "--steps" in error.value.hint
    assert world.store.read_record(Artifact.TRIALS.path("blue"), Trials) == result.trials
    edit = load_edit(world.store, "blue")
    assert (edit.header.layer, edit.header.forget) == (STUBBORN, result.chosen.forget)


def test_a_search_in_bf16_is_refused(world):
    with pytest.raises(UsageError, match="bf16"):
        find(world, precision=Precision.BF16)


DAMPING = 0.03


def whitened(world, **options):
    """Rank for the whitened direction, then search along it."""
    return along(world, Direction.WHITENED, **options)


def along(world, direction, **options):
    """Rank for a direction, then search along it."""
    ranking = RankOptions(direction=direction, damping=DAMPING, device="cpu")
    rank(world.store, world.name, options=ranking)
    return find(world, **options)


def damped(damping, kind=Direction.WHITENED):
    return DirectionSpec.of(kind, damping=damping)


def dense_direction(world, layer, gradient, damping, kind=Direction.WHITENED):
    """Return a direction by the definition, from the stored statistics."""
    covariances = find_covariances(world.store, world.pointer)

    def stored(statistic):
        path, about = covariances.places[statistic][layer]
        matrix = world.store.read_tensors(path, [layer])[layer].astype(float)
        floor = damping * np.mean(matrix if matrix.ndim == 1 else matrix.diagonal())
        floor = floor if matrix.ndim == 1 else floor * np.eye(len(matrix))
        return matrix + floor, about.axis

    inputs, axis = stored(Statistic.INPUTS)
    rows = gradient.reshape(len(gradient), -1).astype(float)
    rows = rows.T if axis == 0 else rows
    found = rows / inputs if inputs.ndim == 1 else rows @ np.linalg.inv(inputs)
    if kind is Direction.KFAC:
        outputs, _ = stored(Statistic.DERIVATIVES)
        found = found / outputs if outputs.ndim == 1 else np.linalg.inv(outputs) @ found
    found = found.T if axis == 0 else found
    return found.reshape(gradient.shape).astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "budget"),
    [(Direction.WHITENED, None), (Direction.WHITENED, 0), (Direction.KFAC, None)],
)
def test_a_search_along_a_direction_is_the_plain_search(kind, budget, world):
    result = along(world, kind, steps=5, cache_budget=budget, full=True)
    reference = Reference(world)
    reference.gradient = {
        layer: dense_direction(world, layer, reference.gradient[layer], DAMPING, kind)
        for layer in front(world)
    }
    assert_same_search(result, reference.algorithm1(front(world), 5, Criterion.FA1), full=True)
    assert {trial.direction for trial in result.trials.trials} == {damped(DAMPING, kind)}
    edit = load_edit(world.store, "blue")
    header = edit.header
    assert header.direction == damped(DAMPING, kind)
    assert header.retain_data == world.manifest.retain.fingerprint
    expected = header.step * reference.gradient[header.layer]
    np.testing.assert_allclose(edit.delta(), expected, rtol=1e-4, atol=1e-6)


def test_each_damping_is_searched_and_recorded(world):
    for damping in (0.1, 0.001):
        result = whitened(world, steps=2, layers=SOME[:1], damping=damping)
        assert result.chosen.direction == damped(damping)
    assert Counter(trial.direction for trial in result.trials.trials) == {
        damped(0.1): 2,
        damped(0.001): 2,
    }
    again = find(world, steps=3, layers=SOME[:1], damping=0.1)
    assert again.reused == 4
    assert Counter(trial.direction for trial in again.trials.trials) == {
        damped(0.1): 3,
        damped(0.001): 2,
    }
    assert again.chosen.direction == damped(0.1)


def test_the_direction_is_that_of_the_ranking(world):
    with pytest.raises(StaleError, match="ranked for the direction gradient, not whi") as error:
        find(world, steps=1, direction=Direction.WHITENED)
    assert "slsgu rank blue --direction whitened" in error.value.hint
    with pytest.raises(UsageError, match="--damping is for the whitened or kfac direction"):
        find(world, steps=1, damping=0.1)
    along = find(world, layers=SOME, steps=2)
    assert along.trials.directions == (Direction.GRADIENT,)
    assert whitened(world, layers=SOME, steps=2).reused == 0


def test_covariances_of_other_retain_rows_are_not_used(world):
    whitened(world, layers=SOME, steps=1)
    assert len(world.store.names("covariances")) == 1
    world.build(retain_samples=40)
    world.grade()
    assert not find_covariances(world.store, world.pointer).places[Statistic.INPUTS]
    with pytest.raises(StaleError, match="made from other retain rows") as error:
        ensure_edit(world.store, "blue", options=SearchOptions())
    assert "slsgu search blue" in error.value.hint
    assert whitened(world, layers=SOME, steps=1).reused == 0
    assert len(world.store.names("covariances")) == 2


def test_damaged_covariances_are_computed_again(world, listener):
    whitened(world, layers=SOME, steps=1)
    (name,) = world.store.names("covariances")
    world.store.write_bytes(f"covariances/{name}", b"{}")
    listener.heard.clear()
    assert whitened(world, layers=SOME, steps=1).trials.trials
    assert any("lack the covariances" in text for text in listener.heard)


@pytest.mark.parametrize("margin", [0.0, 0.05])
def test_the_chosen_step_meets_the_margin_and_shorter_ones_do_not(margin, world):
    result = find(world, layers=["visual.proj"], steps=8, criterion=Criterion.MARGIN, margin=margin)
    assert result.forgotten
    assert result.chosen.gap >= margin
    assert result.chosen.forget.top5 == 0
    least = min(trial.step for trial in result.trials.trials if trial.gap >= margin)
    shorter = [trial for trial in result.trials.trials if trial.step < least]
    assert shorter
    assert all(trial.gap < margin for trial in shorter)
    header = load_edit(world.store, "blue").header
    assert (header.criterion, header.margin, header.forgotten) == (Criterion.MARGIN, margin, True)
