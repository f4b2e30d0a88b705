"""Guesses and cosines before and after an edit, against models that run as a whole."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from slsgu_cli.checkpoints.edits import load_edit, write_edit
from slsgu_cli.clip import in_place
from slsgu_cli.clip.evaluation import prepare_shared
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.edited_model import edited_values
from slsgu_cli.engine.examples import GuessingModels, guesses_of
from slsgu_cli.engine.set_edits import direct_edit
from slsgu_cli.engine.shown_classes import choose_shown
from slsgu_cli.errors import StaleError
from slsgu_cli.store.store import Store

LAYERS = {"visual.transformer.resblocks.1.mlp.c_proj.weight": 3.0, "text_projection": 0.5}


@pytest.fixture(scope="module")
def edited(shared_world, tmp_path_factory):
    """A world with an edit made by hand, one in each tower."""
    found = {}
    for layer, share in LAYERS.items():
        folder = tmp_path_factory.mktemp("looks") / "store"
        shutil.copytree(shared_world.store.root, folder)
        world = replace(shared_world, store=Store(str(folder)))
        edit = direct_edit(world.store, world.name, layer=layer, step=1.0)
        edit = edit.restepped(share / edit.header.share)
        header = replace(edit.header, step=share / edit.header.share, share=share)
        made = replace(edit, header=header, factor=1.0)
        delta = edit.factor * edit.delta()
        write_edit(world.store, replace(made, load={"delta": delta, "before": edit.before()}.get))
        found[layer] = world
    return found


@pytest.mark.parametrize("layer", list(LAYERS))
def test_guesses_and_cosines_equal_those_of_whole_models(layer, edited):
    world = edited[layer]
    edit = load_edit(world.store, world.name)
    guessed = GuessingModels(world.store, device="cpu").before_after(world.manifest, edit.header)

    model = resolve(world.model)
    module = load(model)
    with torch.no_grad():
        evaluation = prepare_shared(
            world.store, [world.manifest], module, tokenize=tokenizer(model), device="cpu"
        )
        evaluation.base_pass((), cache_bytes=0)
        scale = float(module.logit_scale.exp())
        plain = [choose_shown(evaluation, [world.manifest]).cosines()]
        guesses = [guesses_of(evaluation.forget[world.name], scale)]
        with in_place.edited(module, edited_values(module, [edit])):
            evaluation.base_pass((), cache_bytes=0)
        plain.append(choose_shown(evaluation, [world.manifest]).cosines())
        guesses.append(guesses_of(evaluation.forget[world.name], scale))

    np.testing.assert_allclose(guessed.before, plain[0], atol=1e-5)
    np.testing.assert_allclose(guessed.after, plain[1], atol=1e-5)
    assert np.abs(guessed.after - guessed.before).max() > 0.01
    assert guessed.names[0] == world.name
    assert [example.label for example in guessed.examples[:4]] == [world.name] * 4
    for number, example in enumerate(guessed.examples[:4]):
        for got, wanted in ((example.before, guesses[0]), (example.after, guesses[1])):
            assert [name for name, _ in got] == [name for name, _ in wanted[number]]
            assert [p for _, p in got] == pytest.approx([p for _, p in wanted[number]], abs=1e-4)
    assert len({example.label for example in guessed.examples[4:]}) == len(guessed.examples) - 4


def test_a_model_with_other_weights_is_refused(edited):
    world = edited["text_projection"]
    header = replace(load_edit(world.store, world.name).header, model_fingerprint="other")
    models = GuessingModels(world.store, device="cpu")
    with pytest.raises(StaleError, match="other weights"):
        models.before_after(world.manifest, header)
