"""From a set's name to an edited checkpoint, alone and several concepts at once."""

import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from reference import Reference
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_tensors
from worlds import plain_options

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.engine import plots
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.search import search
from slsgu_cli.engine.set_edits import direct_edit, ensure_edit
from slsgu_cli.errors import NotForgottenError, StaleError, UsageError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.method import Tower
from slsgu_cli.records.options import ApplyRequest, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact

STUBBORN = "transformer.resblocks.1.attn.out_proj.weight"
ALONE = "[t]ransformer.resblocks.1.attn.out_proj.weight"
PLAIN = RankOptions(direction=Direction.GRADIENT)
LAYER = "visual.transformer.resblocks.1.attn.out_proj.weight"


def apply_to(world, out, names=("blue",), **request):
    return apply(world.store, ApplyRequest(names=names, out=out, **request))


def find(world, name="blue", **options):
    return search(world.store, name, options=plain_options(**options))


def weights(folder):
    return load_file(folder / "open_clip_model.safetensors")


def gradient(world):
    return world.store.read_tensors(Artifact.GRADIENT.path(world.pointer.forget))


def changed(world, out):
    """Return what an applied checkpoint has added to each layer it changed."""
    before, after = weights(world.folder), weights(out)
    assert set(before) == set(after)
    return {n: after[n] - before[n] for n in before if not np.array_equal(before[n], after[n])}


def assert_same_change(found, expected):
    """Compare changes of a layer of weights around 1, each rounded once to fp32."""
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.fixture
def two(world):
    """The world with a second set, of the colour red."""
    red = replace(world, name="red")
    red.build()
    red.grade()
    return world, red


def forget_accuracy(world, folder):
    model = open_clip.create_model(f"local-dir:{folder}").eval()
    return Reference(world, model).figures().forget[0]


@pytest.mark.parametrize(
    "layers",
    [("visual.proj", "transformer.resblocks.0.ln_1.weight"), ("visual.proj", "visual.proj")],
)
def test_two_concepts_are_forgotten_by_the_sum_of_their_edits(layers, two, tmp_path):
    for world, layer in zip(two, layers, strict=True):
        assert find(world, world.name, steps=6, layers=[layer]).forgotten
    apply_to(two[0], tmp_path / "out", names=["blue", "red"])
    sums = {}
    for world, layer in zip(two, layers, strict=True):
        sums[layer] = sums.get(layer, 0) + load_edit(world.store, world.name).delta()
    found = changed(two[0], tmp_path / "out")
    assert set(found) == set(sums)
    for layer, expected in sums.items():
        assert_same_change(found[layer], expected)
    for world in two:
        before = forget_accuracy(world, world.folder)
        assert forget_accuracy(world, tmp_path / "out") < before


def test_apply_runs_missing_steps_and_says_so(world, tmp_path, listener):
    world.store.remove(Artifact.RANKING.path("blue"))
    result = apply_to(world, tmp_path / "out")
    assert world.store.exists(Artifact.RANKING.path("blue"))
    assert world.store.exists(Artifact.EDIT.path("blue"))
    assert any("has no ranking yet" in text for text in listener.heard)
    assert any("has no edit yet" in text for text in listener.heard)
    header = load_edit(world.store, "blue").header
    assert header.forget.top1 == 0
    assert set(changed(world, tmp_path / "out")) == {header.layer}
    assert result.model == f"local-dir:{tmp_path / 'out'}"


def test_an_existing_edit_is_used(world, tmp_path):
    find(world, steps=3)
    world.store.remove(Artifact.RANKING.path("blue"))
    apply_to(world, tmp_path / "out")
    assert not world.store.exists(Artifact.RANKING.path("blue"))


def test_a_search_that_fails_writes_no_checkpoint_and_warns_after(world, tmp_path, listener):
    plots.rank_and_plot(
        world.store, "blue", options=RankOptions(direction=Direction.GRADIENT, include=[ALONE])
    )
    with pytest.raises(NotForgottenError):
        ensure_edit(world.store, "blue", options=SearchOptions(steps=1))
    assert world.store.exists(Artifact.TRIALS.path("blue"))
    apply_to(world, tmp_path / "out")
    assert any("does not forget completely" in text for text in listener.heard)
    assert set(changed(world, tmp_path / "out")) == {STUBBORN}


def test_an_edit_of_other_gradients_is_refused(world, tmp_path):
    find(world, steps=2)
    world.grade(batch_size=8)
    with pytest.raises(StaleError, match="the edit blue was made from other gradients") as error:
        apply_to(world, tmp_path / "out")
    assert "slsgu search blue" in error.value.hint
    assert not (tmp_path / "out").exists()


def test_a_step_by_hand_moves_the_layer_along_the_gradient(world, tmp_path):
    apply_to(world, tmp_path / "out", layer=LAYER, step=0.02, direction=Direction.GRADIENT)
    found = changed(world, tmp_path / "out")
    assert set(found) == {LAYER}
    expected = 0.02 * gradient(world)[LAYER]
    assert_same_change(found[LAYER], expected)
    assert forget_accuracy(world, tmp_path / "out") < forget_accuracy(world, world.folder)


def test_a_step_by_hand_needs_no_ranking(world):
    world.store.remove(Artifact.RANKING.path("blue"))
    edit = direct_edit(world.store, "blue", layer=LAYER, step=0.5, options=PLAIN)
    moved = 0.5 * np.linalg.norm(gradient(world)[LAYER])
    assert edit.header.share == pytest.approx(moved / np.linalg.norm(edit.before()), rel=1e-5)
    assert (edit.header.tower, edit.header.criterion) == (Tower.VISION, None)
    assert edit.header.gradient == world.pointer.forget


def test_a_step_by_hand_finds_the_layer_of_a_training_checkpoint(world, tmp_path):
    expected = direct_edit(world.store, "blue", layer=LAYER, step=0.5, options=PLAIN)
    folder = shutil.copytree(world.folder, tmp_path / "training")
    model = folder / "open_clip_model.safetensors"
    tensors = {f"module.{name}": value for name, value in load_tensors(model).items()}
    torch.save({"epoch": 1, "state_dict": tensors}, folder / "open_clip_pytorch_model.bin")
    model.unlink()
    pointer = replace(world.pointer, model=ModelSpec(f"local-dir:{folder}"))
    world.store.write_record(Artifact.POINTER.path("blue"), pointer)
    edit = direct_edit(world.store, "blue", layer=LAYER, step=0.5, options=PLAIN)
    assert edit.header.digests == expected.header.digests
    np.testing.assert_array_equal(edit.before(), expected.before())


def test_a_step_by_hand_is_the_searchs_edit_at_its_step(world):
    result = find(world, steps=3)
    own = load_edit(world.store, "blue")
    by_hand = direct_edit(
        world.store, "blue", layer=result.chosen.layer, step=result.chosen.step, options=PLAIN
    )
    np.testing.assert_array_equal(own.delta(), by_hand.delta())
    assert own.header.digests == by_hand.header.digests
    assert own.header.share == pytest.approx(by_hand.header.share)


def test_scale_and_step_set_how_far_an_edit_goes(world, tmp_path):
    chosen = find(world, steps=3).chosen
    full = chosen.step * gradient(world)[chosen.layer]
    for out, request, factor in (
        ("half", {"scale": 0.5}, 0.5),
        ("back", {"scale": -1.0}, -1.0),
        ("step", {"step": 2 * chosen.step}, 2.0),
        ("both", {"step": 2 * chosen.step, "scale": 0.25}, 0.5),
    ):
        apply_to(world, tmp_path / out, **request)
        assert_same_change(changed(world, tmp_path / out)[chosen.layer], factor * full)


def test_applying_and_reverting_gives_the_original_back(world, tmp_path):
    find(world, steps=3)
    model = apply_to(world, tmp_path / "out").model
    spec = replace(world.model, name=model)
    apply_to(world, tmp_path / "back", model=spec, revert=True)
    original, back = (
        (folder / "open_clip_model.safetensors").read_bytes()
        for folder in (world.folder, tmp_path / "back")
    )
    assert original == back


def test_edits_for_different_models_need_one_named(world, tmp_path):
    find(world, steps=2)
    edit = load_edit(world.store, "blue")
    other = replace(edit.header, name="other", model=replace(world.model, name="local-dir:else"))
    world.store.write_tensors(
        Artifact.EDIT.path("other"), {"delta": edit.delta(), "before": edit.before()}, other
    )
    with pytest.raises(UsageError, match="made for different models"):
        apply_to(world, tmp_path / "out", names=["blue", "other"])
    apply_to(world, tmp_path / "out", names=["blue", "other"], model=world.model)


@pytest.mark.usefixtures("drawing")
def test_plots_are_drawn_of_fronts_and_steps(world):
    options = RankOptions(direction=Direction.GRADIENT)
    _, drawn = plots.rank_and_plot(world.store, "blue", options=options)
    assert len(drawn) == 2
    result = plots.search_and_plot(
        world.store, "blue", options=SearchOptions(steps=2, layers=[LAYER])
    )
    drawn = world.store.names("plots", ".png")
    assert set(drawn) == {"blue-front-vision", "blue-front-text", f"blue-steps-{LAYER}"}
    assert result.chosen.layer == LAYER
    assert all(world.store.size(f"plots/{name}.png") > 1000 for name in drawn)


def test_a_whitened_step_by_hand_is_the_whitened_searchs(world):
    options = RankOptions(direction=Direction.WHITENED, damping=0.1, device="cpu")
    plots.rank_and_plot(world.store, "blue", options=options)
    result = find(world, steps=2, layers=[LAYER])
    own = load_edit(world.store, "blue")
    by_hand = direct_edit(
        world.store, "blue", layer=LAYER, step=result.chosen.step, options=options
    )
    np.testing.assert_allclose(by_hand.delta(), own.delta(), rtol=1e-5, atol=1e-7)
    for name in ("direction", "retain_data", "gradient"):
        assert getattr(by_hand.header, name) == getattr(own.header, name)
    assert by_hand.header.direction.kind is Direction.WHITENED


def test_an_edit_of_low_rank_goes_in_and_out_again(world, tmp_path):
    find(world, steps=3, layers=[LAYER])
    apply_to(world, tmp_path / "out", rank=1)
    found = changed(world, tmp_path / "out")
    assert set(found) == {LAYER}
    values = np.linalg.svd(found[LAYER].astype(float), compute_uv=False)
    whole = np.linalg.svd(load_edit(world.store, "blue").delta(), compute_uv=False)
    assert values[0] == pytest.approx(whole[0], rel=1e-2)
    assert values[1] < 0.05 * values[0]
    model = ModelSpec(f"local-dir:{tmp_path / 'out'}")
    apply_to(world, tmp_path / "back", model=model, revert=True, rank=1)
    assert not changed(world, tmp_path / "back")
