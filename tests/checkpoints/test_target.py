"""The CLIP encoders inside a model, and the commands that aim at one."""

import json

import pytest
import tiny_targets
import torch
from processes import inside
from safetensors.torch import load_file
from tiny_targets import llava, pipeline, save, tower, under

from slsgu_cli.checkpoints.targets import Family, read_target
from slsgu_cli.errors import InputError, MissingError


def names(target):
    return [encoder.name for encoder in target.encoders]


def test_a_pipelines_text_encoders_are_found_by_their_class(tmp_path, state):
    weights = tower(state, "text")
    path = pipeline(
        tmp_path / "sd",
        "StableDiffusionXLPipeline",
        {
            "text_encoder_2": ("CLIPTextModelWithProjection", weights),
            "text_encoder": ("CLIPTextModel", weights),
            "text_encoder_3": ("T5EncoderModel", {"shared.weight": torch.ones(2, 2)}),
        },
    )
    found = read_target(path)
    assert found.family is Family.SDXL
    assert names(found) == ["text_encoder", "text_encoder_2"]
    only = pipeline(tmp_path / "if", "IFPipeline", {"text_encoder": ("T5EncoderModel", weights)})
    with pytest.raises(InputError, match="has no CLIP text encoder"):
        read_target(only)
    (path / "text_encoder/model.safetensors").unlink()
    with pytest.raises(InputError, match="text_encoder holds no weights of a CLIP"):
        read_target(path)


def test_the_family_of_a_single_file_follows_from_its_names(tmp_path, state):
    text = tower(state, "text")
    own = {name: value for name, value in state.items() if not name.startswith("visual.")}
    cases = {
        Family.SD1: under("cond_stage_model.transformer.", text),
        Family.SD2: under("cond_stage_model.model.", own),
        Family.SDXL: under("conditioner.embedders.0.transformer.", text)
        | under("conditioner.embedders.1.model.", own),
        Family.CLIP: tiny_targets.transformers_weights(state),
    }
    for family, weights in cases.items():
        found = read_target(save(weights, tmp_path / f"{family}.safetensors"))
        assert found.family is family
        expected = {
            Family.SDXL: ["text_encoder", "text_encoder_2"],
            Family.CLIP: ["clip"],
        }.get(family, ["text_encoder"])
        assert names(found) == expected
    with pytest.raises(InputError, match="holds no weights of a CLIP"):
        read_target(save({"unet.weight": torch.ones(2, 2)}, tmp_path / "unet.safetensors"))
    with pytest.raises(MissingError):
        read_target(tmp_path / "nothing.safetensors")


def test_a_llava_file_is_read_with_the_configuration_next_to_it(tmp_path, state):
    folder = llava(tmp_path / "llava", state, "vision_tower.", vision_feature_layer=-1)
    (encoder,) = read_target(folder / "model.safetensors").encoders
    assert (encoder.name, encoder.read_from.blocks) == ("vision_tower", 3)
    (folder / "config.json").unlink()
    (encoder,) = read_target(folder / "model.safetensors").encoders
    assert encoder.read_from.blocks == 2


OUTSIDE = ("../model.safetensors", "/etc/model.safetensors", "a/../../b.bin")


@pytest.mark.parametrize("place", OUTSIDE)
def test_a_pipeline_with_parts_elsewhere_is_refused(tmp_path, state, place):
    encoder = ("CLIPTextModel", tower(state, "text"))
    path = pipeline(tmp_path / "sd", "StableDiffusionPipeline", {"text_encoder": encoder})
    index = json.loads((path / "model_index.json").read_text())
    tiny_targets.write_json(path / "model_index.json", {**index, place: index["text_encoder"]})
    with pytest.raises(InputError, match=r"model_index\.json names '.*', which is outside"):
        read_target(path)


@pytest.mark.parametrize("kind", ["llava_next", "vipllava"])
def test_relatives_of_llava_are_recognised_with_the_layer_they_read(tmp_path, state, kind):
    path = llava(tmp_path / "llava", state, "model.vision_tower.", model_type=kind)
    assert read_target(path).family is Family.LLAVA


def test_the_commands_aim_at_a_pipeline(world, tmp_path):
    own = load_file(world.folder / "open_clip_model.safetensors")
    encoder = ("CLIPTextModel", tower(own, "text"))
    path = pipeline(tmp_path / "sd", "StableDiffusionPipeline", {"text_encoder": encoder})
    root = world.store.root
    common = ("--target", path)
    ranked = inside("rank", world.name, *common, "--direction", "gradient", "--json", store=root)
    assert ranked.exit_code == 0, ranked.stderr
    ranking = json.loads(ranked.stdout)["ranking"]
    assert ranking["target"] == str(path)
    assert {score["tower"] for score in ranking["scores"]} == {"text"}
    unreached = {row["name"]: row["value"] for row in ranking["unreached"]}
    assert unreached["text_projection"].endswith("which is not projected")
    told = "layers cannot influence"
    assert told in ranked.stderr and "the vision tower is not part of it" in ranked.stderr
    by_hand = ("--direction", "gradient", "--step", "0.5", "--layer")
    out = tmp_path / "out"
    words = ("apply", world.name, *common, *by_hand, "1.mlp.c_proj", "--out", out, "--link")
    applied = inside(*words, store=root)
    assert applied.exit_code == 0, applied.stderr
    (row,) = applied.stdout.splitlines()[1:]
    assert row.startswith(f"{out}/text_encoder/model.safetensors\t")
    key = "text_model.encoder.layers.1.mlp.fc2.weight"
    after = load_file(out / "text_encoder/model.safetensors")
    assert not torch.equal(after[key], encoder[1][key])
    nowhere = ("--out", tmp_path / "no")
    dead = inside("apply", world.name, *common, *by_hand, "visual.proj", *nowhere, store=root)
    assert dead.exit_code == 3
    assert "the vision tower is not part of it" in dead.stderr
    both = inside("apply", world.name, *common, "-m", world.model.name, *nowhere, store=root)
    assert (both.exit_code, "takes the place of --model" in both.stderr) == (2, True)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_whole_clip_of_transformers_is_recognised_by_any_type_of_its_towers(
    tmp_path, state, kind
):
    named = {"architectures": ["CLIPModel"], "model_type": kind}
    tiny_targets.write_json(
        tmp_path / "config.json", {**named, "vision_config": {"model_type": f"{kind}_vision_model"}}
    )
    save(tiny_targets.transformers_weights(state), tmp_path / "model.safetensors")
    assert read_target(tmp_path).family is Family.CLIP
