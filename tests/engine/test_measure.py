"""The figures of `eval` are the ones the search met, before and after the edit."""

import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
from PIL import Image
from processes import inside, rows
from reference import Reference
from safetensors.numpy import load_file, save_file
from worlds import plain_options

import slsgu_cli.engine.evaluate
from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.clip.zeroshot import ImageSide
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.evaluate import evaluate
from slsgu_cli.engine.search import search
from slsgu_cli.engine.set_edits import direct_edit
from slsgu_cli.errors import StaleError
from slsgu_cli.records.figures import read_assertions
from slsgu_cli.records.options import ApplyRequest
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact


def measured(world, model=None):
    return evaluate(world.store, [world.name], model=model, device="cpu")


def find(world, **options):
    return search(world.store, world.name, options=plain_options(**options))


def applied(world, out):
    request = ApplyRequest(names=[world.name], out=out)
    return ModelSpec(apply(world.store, request).model)


def assert_figures(model, forget, utility):
    assert model.forget == {"blue": forget}
    assert model.utility == utility


@pytest.mark.parametrize("layer", ["visual.proj", "transformer.resblocks.1.ln_1.weight"])
def test_the_applied_checkpoint_has_the_searchs_figures(layer, world, tmp_path):
    result = find(world, steps=6, layers=[layer])
    model = applied(world, tmp_path / "out")
    before, after = measured(world, model).models
    assert (before.label, after.label) == ("original", str(model))
    assert_figures(before, result.trials.baseline_forget, result.trials.baseline_utility)
    assert_figures(after, result.chosen.forget, result.chosen.utility)
    assert after.forget["blue"].top1 < before.forget["blue"].top1
    figures = Reference(world, open_clip.create_model(model.name).eval()).figures()
    assert figures.forget == pytest.approx((after.forget["blue"].top1, after.forget["blue"].top5))


def test_without_another_model_the_sets_edit_is_measured(world):
    result = find(world, steps=4, layers=["visual.proj"])
    before, after = measured(world).models
    assert (before.label, after.label) == ("original", "edit blue")
    assert_figures(before, result.trials.baseline_forget, result.trials.baseline_utility)
    assert_figures(after, result.chosen.forget, result.chosen.utility)


@pytest.mark.parametrize("layer", ["visual.proj", "transformer.resblocks.1.ln_1.weight"])
def test_known_image_features_are_not_recomputed(layer, world, monkeypatch):
    """Those of the original are in the store, and an edit of the text tower leaves them."""
    find(world, steps=4, layers=[layer])
    pixels, read = [], ImageSide._pixels
    monkeypatch.setattr(
        ImageSide, "_pixels", lambda side, rows: pixels.extend(rows) or read(side, rows)
    )
    counts, found = [], []
    for _ in ("fresh", "known"):
        pixels.clear()
        found.append(measured(world).models)
        counts.append(len(pixels))
    for fresh, known in zip(*found, strict=True):
        assert (fresh.forget, fresh.utility) == (known.forget, known.utility)
        np.testing.assert_array_equal(fresh.cosines, known.cosines)
    assert counts[0] > counts[1]
    assert (counts[1] > 0) == layer.startswith("visual")


def test_an_edit_of_other_weights_is_not_measured(world):
    edit = direct_edit(world.store, "blue", layer="visual.proj", step=0.5)
    header = replace(edit.header, digests=dict.fromkeys(edit.header.digests, "another"))
    write_edit(world.store, replace(edit, header=header))
    with pytest.raises(StaleError, match=r"edit blue was made for another visual\.proj"):
        measured(world)


def test_apply_warns_of_weights_that_differ_in_other_layers(world, tmp_path, listener):
    write_edit(world.store, direct_edit(world.store, "blue", layer="visual.proj", step=0.5))
    applied(world, tmp_path / "same")
    assert not any("more than the edited layers" in text for text in listener.heard)
    folder = tmp_path / "other"
    shutil.copytree(world.folder, folder)
    (weights,) = folder.glob("*.safetensors")
    tensors = load_file(weights)
    save_file(tensors | {"text_projection": tensors["text_projection"] * 2}, weights)
    for name, where in (
        ("one", {"model": ModelSpec(f"local-dir:{folder}")}),
        ("two", {"target": folder}),
        ("three.safetensors", {"target": weights}),
    ):
        listener.heard.clear()
        apply(world.store, ApplyRequest(names=["blue"], out=tmp_path / name, **where))
        assert sum("more than the edited layers" in text for text in listener.heard) == 1
    # What an edit makes of the layer counts as the original does.
    listener.heard.clear()
    edited = ModelSpec(f"local-dir:{tmp_path / 'same'}")
    request = {"names": ["blue"], "out": tmp_path / "back", "revert": True, "model": edited}
    apply(world.store, ApplyRequest(**request))
    assert not any("more than the edited layers" in text for text in listener.heard)


def test_without_an_edit_the_original_stands_alone(world):
    assert not world.store.exists(Artifact.EDIT.path("blue"))
    assert [model.label for model in measured(world).models] == ["original"]


def test_cosines_are_means_over_images_of_a_class(world):
    find(world, steps=4, layers=["visual.proj"])
    found = measured(world)
    before, after = (model.cosines for model in found.models)
    reference = Reference(world)
    block = reference.blocks["first"]
    spec = world.manifest.input
    mean, std = np.array(spec.mean), np.array(spec.std)
    pixels = ((block.images(0, block.rows) / 255 - mean) / std).transpose(0, 3, 1, 2)
    with torch.no_grad():
        v = reference.model.encode_image(torch.tensor(pixels).float(), normalize=True).numpy()
        texts = [template.format("blue") for template in block.templates]
        t = reference.model.encode_text(reference.tokenize(texts), normalize=True).numpy().mean(0)
    own = block.labels == block.class_names.index("blue")
    expected = float((v[own] @ (t / np.linalg.norm(t))).mean())
    assert before.shape == (8, 8)
    assert before[0, 0] == pytest.approx(expected, abs=1e-5)
    assert after[0, 0] < before[0, 0]


@pytest.mark.usefixtures("drawing")
def test_the_plot_is_at_its_path(world):
    find(world, steps=2, layers=["visual.proj"])
    found = measured(world)
    with Image.open(found.plot) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 100


def test_a_concept_outside_the_classes_is_measured_too(world):
    world.build(evals={"second": world.sources["second"]}, templates={})
    world.grade()
    result = find(world, steps=3)
    before, after = measured(world).models
    assert_figures(before, result.trials.baseline_forget, result.trials.baseline_utility)
    assert_figures(after, result.chosen.forget, result.chosen.utility)
    assert before.cosines.shape == (6, 6)


def test_a_model_with_other_inputs_is_refused(world, tmp_path):
    vision = tiny_clip.CONFIG["vision_cfg"] | {"image_size": 24}
    folder = tiny_clip.write_folder(tmp_path / "small", vision_cfg=vision)
    with pytest.raises(StaleError, match="takes other inputs"):
        measured(world, ModelSpec(f"local-dir:{folder}"))


@pytest.fixture
def forgotten(world):
    find(world, steps=6, layers=["visual.proj"])
    return world


def asserting(world, *assertions, names=("blue",)):
    words = [word for each in assertions for word in ("--assert", each)]
    return inside("eval", *names, *words, store=world.store.root)


def test_assertions_hold_or_end_with_exit_code_5(forgotten):
    before, after = measured(forgotten).models
    lost = before.utility["first"].top1 - after.utility["first"].top1
    kept = after.utility["second"].top1
    holding = ("fa1<=0", f"ta1.second>={kept}", f"loss.first <= {lost + 0.01}", "ta5.first>1")
    done = asserting(forgotten, *holding)
    assert done.exit_code == 0, done.stderr
    table = rows(done.stdout)[-1]
    assert table[0] == ["assertion", "figure", "result"]
    assert table[1] == ["fa1<=0", "0", "holds"]
    assert float(table[3][1]) == pytest.approx(lost)
    failed = asserting(forgotten, "fa1<=0", f"ta1.second>{kept}", "fa5>200")
    assert failed.exit_code == 5
    assert [row[2] for row in rows(failed.stdout)[-1][1:]] == ["holds", "fails", "fails"]
    assert "2 of 3 assertions fail: " in failed.stderr


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        ("fa2<=0", "fa1, fa5, ta1.first, ta5.first, loss.first, ta1.second", "--assert 'fa1<=0'"),
        ("ta1.frist>=3", "about an unknown figure", "near: ta1.first"),
        ("fa1<=", "compares no figure with a number", "--assert 'fa1<=0'"),
        ("fa1=0", "compares no figure with a number", "--assert 'fa1<=0'"),
        ("fa1<=nan", "compares no figure with a number", "--assert 'fa1<=0'"),
    ],
)
def test_invalid_assertions_are_refused_before_the_work(words, said, hint, forgotten, monkeypatch):
    monkeypatch.setattr(slsgu_cli.engine.evaluate, "evaluate", None)
    done = asserting(forgotten, words)
    assert done.exit_code == 2
    assert said in done.stderr and hint in done.stderr


def test_nan_meets_no_assertion():
    for words in ("fa1<=0", "fa1>=0", "fa1==0", "fa1<1e9"):
        (assertion,) = read_assertions("--assert", [words])
        assert not assertion.holds(float("nan"))
        assert assertion.holds(0.0)
