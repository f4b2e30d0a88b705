"""Weights and features that are not finite are refused: nothing is counted as forgotten by them."""

import io
import itertools
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from processes import inside
from safetensors.numpy import load_file, save_file

from slsgu_cli.compare import epochs
from slsgu_cli.compare.ours import original_outcome
from slsgu_cli.compare.tuning import tune
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.search import search
from slsgu_cli.errors import NotFiniteError
from slsgu_cli.records.comparison import Method
from slsgu_cli.records.figures import Accuracy, Figures
from slsgu_cli.records.method import EditHeader, GradientHeader
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.targets.judge import Judge

WEIGHTS = "open_clip_model.safetensors"


def spoiled(world, folder, layer, value, place=0):
    """Return a copy of the world's model of which one weight is another."""
    shutil.copytree(world.folder, folder)
    tensors = {name: values.copy() for name, values in load_file(folder / WEIGHTS).items()}
    tensors[layer].reshape(-1)[place] = value
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    return f"local-dir:{folder}"


def spoil(store, path, header, layer):
    """Put one NaN into a tensor of a file of the store, as if it had been computed so."""
    kept = store.read_header(path, header)
    tensors = {name: values.copy() for name, values in store.read_tensors(path).items()}
    tensors[layer].reshape(-1)[1] = np.nan
    store.write_tensors(path, tensors, kept)


@pytest.fixture
def searched(world):
    search(world.store, "blue", options=SearchOptions(layers=["visual.proj"], steps=4))
    return world


@pytest.mark.parametrize(
    ("layer", "value", "place"),
    [
        ("visual.proj", np.inf, 0),
        ("transformer.resblocks.1.mlp.c_fc.weight", np.nan, 5),
        # A token that no prompt has.
        ("token_embedding.weight", np.nan, -30),
        ("logit_scale", -np.inf, 0),
    ],
)
@pytest.mark.parametrize("words", [["eval"], ["verify", "--checks", "neighbours"]], ids=" ".join)
def test_a_model_that_is_not_finite_is_refused(words, layer, value, place, world, tmp_path):
    model = spoiled(world, tmp_path / "broken", layer, value, place)
    done = inside(words[0], "blue", *words[1:], "--model", model, store=world.store.root)
    assert done.exit_code == 3, done.stderr
    assert "are not finite (row" in done.stderr
    assert f"weights that are not finite: 1 in {layer}" in done.stderr
    assert model in done.stderr
    assert "FA@1" not in done.stdout


@pytest.mark.parametrize("command", ["eval", "verify", "report"])
def test_an_edit_that_is_not_finite_is_refused(command, searched, tmp_path):
    spoil(searched.store, Artifact.EDIT.path("blue"), EditHeader, "delta")
    words = ["--out", tmp_path / "page.html"] if command == "report" else []
    done = inside(command, "blue", *words, store=searched.store.root)
    assert done.exit_code == 3
    assert "the edit blue changes visual.proj by values that are not finite" in done.stderr
    assert "slsgu search blue" in done.stderr


@pytest.mark.parametrize("layer", ["visual.proj", "transformer.resblocks.1.mlp.c_fc.weight"])
def test_a_gradient_that_is_not_finite_is_refused(layer, world):
    spoil(world.store, Artifact.GRADIENT.path(world.pointer.forget), GradientHeader, layer)
    done = inside("search", "blue", "--layer", layer, store=world.store.root)
    assert done.exit_code == 3
    assert f"the stored gradient of {layer} holds values that are not finite" in done.stderr
    assert not world.store.exists(Artifact.EDIT.path("blue"))


def test_a_step_that_overflows_is_refused(world, monkeypatch):
    monkeypatch.setattr(Evaluator, "first", 3e38)
    done = inside("search", "blue", "--layer", "visual.conv1.weight", store=world.store.root)
    assert done.exit_code == 3
    assert "visual.conv1.weight at step 3e+38: " in done.stderr
    assert "image features are not finite" in done.stderr


def test_training_that_diverges_does_not_count_as_forgetting(world, monkeypatch):
    measure = epochs.forget_accuracy

    def breaking_at(epoch):
        calls = itertools.count(1)

        def measured(evaluation):
            if next(calls) == epoch:
                evaluation.model.visual.proj.data[0, 0] = torch.nan
            return measure(evaluation)

        monkeypatch.setattr(epochs, "forget_accuracy", measured)

    words = ["compare", "blue", "--methods", "ft", "--epochs", 3, "--json", "--lr"]
    breaking_at(2)
    done = inside(*words, "1e-7", store=world.store.root)
    assert done.exit_code == 0, done.stderr
    assert "ft lr 1e-07: epoch 2 is dropped" in done.stderr
    assert json.loads(done.stdout)["comparison"][-1]["epoch"] == 1
    breaking_at(1)
    refused = inside(*words, "1e-8", store=world.store.root)
    assert refused.exit_code == 3
    assert "ft lr 1e-08: " in refused.stderr
    assert "a smaller --lr" in refused.stderr


def test_tuning_skips_rates_at_which_training_diverges(listener):
    def run(rate):
        if rate > 3e-6:
            raise NotFiniteError(f"lr {rate:g} diverges")
        forget, utility = Accuracy(0, 0, 10), {"first": Accuracy(100 * rate, 0, 10)}
        return replace(original_outcome(Figures(forget, utility)), setting=rate)

    chosen, tried = tune(Method.FT, run)
    assert [row.setting for row in tried] == [3e-7, 1e-6, 3e-6]
    assert chosen.setting == 3e-6
    assert listener.heard == ["skipped: lr 1e-05 diverges", "skipped: lr 0.0001 diverges"]


def test_a_judge_that_is_not_finite_is_refused(world, tmp_path):
    names = {"blue": ("{}",), "red": ("{}",)}
    model = ModelSpec(spoiled(world, tmp_path / "broken", "visual.proj", np.nan))
    judge = Judge.load(model, names, device="cpu")
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32)).save(buffer, "PNG")
    with pytest.raises(NotFiniteError, match="1 of 1 image features are not finite"):
        judge.verdicts([buffer.getvalue()])
