"""The mapping of names and shapes, against another table and against transformers itself."""

import hf_clip
import numpy as np
import pytest
import tiny_clip
import tiny_targets
import torch
from tower_models import CONFIGS, make

from slsgu_cli.checkpoints.layers import Layer, layers_of
from slsgu_cli.checkpoints.layouts import assembled, placed
from slsgu_cli.checkpoints.naming_schemes import (
    NamingScheme,
    TowerPlace,
    tensor_places,
    tower_places,
)
from slsgu_cli.records.method import Qkv, Tower


def mapped(state, keys):
    found = {}
    for place in tower_places(keys):
        for name, value in state.items():
            found |= (
                placed(tensor_places(name, place), value.numpy(), {}.get)
                if tensor_places(name, place)
                else {}
            )
    return found


def test_every_tensor_of_a_clip_has_its_place_in_transformers(state):
    expected = tiny_targets.transformers_weights(state)
    found = mapped(state, expected)
    assert sorted(found) == sorted(set(expected) - {"logit_scale"})
    assert all(np.array_equal(found[name], expected[name].numpy()) for name in found)


def test_features_are_equal_in_transformers():
    ours = tiny_clip.fresh_model()
    theirs = hf_clip.untrained()
    found = mapped(ours.state_dict(), theirs.state_dict())
    weights = {name: torch.from_numpy(value.copy()) for name, value in found.items()}
    theirs.load_state_dict({**weights, "logit_scale": ours.logit_scale})
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    texts = torch.zeros(2, 16, dtype=torch.long)
    texts[:, :4] = torch.tensor([[49406, 320, 1125, 49407], [49406, 2, 3, 49407]])
    with torch.no_grad():
        answers = theirs(input_ids=texts, pixel_values=images)
        for one, other in (
            (answers.image_embeds, ours.encode_image(images, normalize=True)),
            (answers.text_embeds, ours.encode_text(texts, normalize=True)),
        ):
            torch.testing.assert_close(one, other, rtol=0, atol=2e-6)


def test_a_layer_comes_back_from_its_parts(state):
    keys = tiny_targets.transformers_weights(state)
    for place in tower_places(keys):
        for name, value in state.items():
            places = tensor_places(name, place)
            if places:
                again = assembled(places, placed(places, value.numpy(), {}.get).get)
                assert np.array_equal(again, value.numpy()), name


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("text_model.embeddings.token_embedding.weight", "text_model."),
        ("embeddings.token_embedding.weight", ""),
        (
            "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight",
            "cond_stage_model.transformer.text_model.",
        ),
        ("conditioner.embedders.1.model.token_embedding.weight", "conditioner.embedders.1.model."),
        ("text.token_embedding.weight", "text."),
        ("token_embedding.weight", ""),
        ("module.text.transformer.encoder.layer.0.attention.self.key.weight", "module.text."),
        ("cond_stage_model.model.transformer.resblocks.3.ln_1.weight", "cond_stage_model.model."),
    ],
)
def test_text_towers_are_found_by_the_end_of_their_names(key, place):
    scheme = NamingScheme.TRANSFORMERS if "embeddings." in key else NamingScheme.OPEN_CLIP
    assert tower_places([key, "logit_scale"]) == [TowerPlace(Tower.TEXT, scheme, place)]


@pytest.mark.parametrize(
    ("key", "prefix", "scheme"),
    [
        (
            "model.vision_tower.vision_tower.vision_model.embeddings.patch_embedding.weight",
            "model.vision_tower.vision_tower.vision_model.",
            NamingScheme.TRANSFORMERS,
        ),
        (
            "vision_tower.embeddings.patch_embedding.weight",
            "vision_tower.",
            NamingScheme.TRANSFORMERS,
        ),
        ("module.visual.conv1.weight", "module.", NamingScheme.OPEN_CLIP),
        ("visual.trunk.blocks.0.attn.qkv.weight", "", NamingScheme.OPEN_CLIP),
        ("visual.transformer.resblocks.0.ln_1.weight", "", NamingScheme.OPEN_CLIP),
    ],
)
def test_vision_towers_are_found_too(key, prefix, scheme):
    assert tower_places([key]) == [TowerPlace(Tower.VISION, scheme, prefix)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_layers_of_every_family_of_open_clip_have_their_own_names(kind, tmp_path):
    names = [name for name, _ in make(kind, tmp_path).named_parameters()]
    layers = layers_of(names, Qkv.SPLIT)
    assert len(layers) > 10
    for prefix in ("", "module."):
        towers = tower_places(prefix + name for name in names)
        for layer in map(Layer.parse, layers):
            (place,) = [place for tower in towers for place in tensor_places(layer.name, tower)]
            assert (place.key, place.within) == (prefix + layer.parameter, layer.part)


def test_layers_without_a_counterpart_have_no_place():
    text = TowerPlace(Tower.TEXT, NamingScheme.TRANSFORMERS, "text_model.")
    assert tensor_places("visual.proj", text) == ()
    assert tensor_places("logit_scale", text) == ()
    assert tensor_places("text.transformer.resblocks.0.attn.q_norm.weight", text) == ()
    (place,) = tensor_places("text.text_projection", text)
    assert (place.key, place.transposed) == ("text_projection.weight", True)
