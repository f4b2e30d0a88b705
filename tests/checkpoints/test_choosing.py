"""What a ranking for a target leaves out, by the target's path and by its kind."""

import pytest
import tiny_targets
from tiny_targets import llava, pipeline, tower

from slsgu_cli.checkpoints.target_layers import encoder_of_target
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.method.layers import is_candidate


@pytest.fixture(scope="module")
def shapes(state):
    return {name: tuple(value.shape) for name, value in state.items() if is_candidate(name)}


def live(shapes, target, encoder=None):
    aim, _ = encoder_of_target(str(target), shapes, encoder=encoder)
    return {name for name in shapes if aim.why_not(name) is None}


def text(shapes, *dead):
    own = {name for name in shapes if not name.startswith("visual.")}
    return {name for name in own if not any(part in name for part in dead)}


def vision(shapes, *dead):
    own = {name for name in shapes if name.startswith("visual.")}
    return {name for name in own if not any(part in name for part in dead)}


def test_kinds_and_paths_agree(tmp_path, state, shapes):
    encoder = ("CLIPTextModel", tower(state, "text"))
    sd = pipeline(tmp_path / "sd", "StableDiffusionPipeline", {"text_encoder": encoder})
    assert live(shapes, sd) == live(shapes, "sd1") == text(shapes, "text_projection")
    eyes = llava(tmp_path / "llava", state, "vision_tower.")
    seen = vision(shapes, "resblocks.2.", "ln_post", "visual.proj")
    assert live(shapes, eyes) == live(shapes, "llava") == seen
    assert live(shapes, "sd2") == text(shapes, "resblocks.2.", "text_projection")
    assert live(shapes, "clip") == set(shapes)


def test_llavas_configuration_says_which_layer_it_reads(tmp_path, state, shapes):
    last = llava(tmp_path / "a", state, "vision_tower.", vision_feature_layer=-1)
    assert live(shapes, last) == vision(shapes, "ln_post", "visual.proj")
    several = llava(tmp_path / "b", state, "vision_tower.", vision_feature_layer=[0, 1])
    assert live(shapes, several) == vision(
        shapes, "resblocks.1.", "resblocks.2.", "ln_post", "visual.proj"
    )
    original = llava(tmp_path / "c", state, "model.vision_tower.vision_tower.vision_model.")
    tiny_targets.write_json(
        original / "config.json", {"mm_vision_tower": "clip-large", "mm_vision_select_layer": -1}
    )
    assert live(shapes, original) == live(shapes, last)


def test_sdxl_reads_its_encoders_differently(tmp_path, state, shapes):
    weights = tower(state, "text")
    both = pipeline(
        tmp_path / "sdxl",
        "StableDiffusionXLPipeline",
        {
            "text_encoder": ("CLIPTextModel", weights),
            "text_encoder_2": ("CLIPTextModelWithProjection", weights),
        },
    )
    with pytest.raises(UsageError, match="several encoders of this shape"):
        live(shapes, both)
    first = text(shapes, "resblocks.2.", "ln_final", "text_projection")
    assert live(shapes, both, "text_encoder") == first
    assert live(shapes, both, "text_encoder_2") == text(shapes)
    assert live(shapes, "sdxl") == first
    assert live(shapes, "sdxl", "text_encoder_2") == text(shapes)
    wide = shapes | {"ln_final.weight": (1280,)}
    assert live(wide, "sdxl") == text(shapes)


def test_a_target_with_another_clip_is_refused(tmp_path, state, shapes):
    encoder = ("CLIPTextModel", tower(state, "text"))
    sd = pipeline(tmp_path / "sd", "StableDiffusionPipeline", {"text_encoder": encoder})
    wider = {name: tuple(2 * size for size in shape) for name, shape in shapes.items()}
    with pytest.raises(InputError, match="is not the one that the gradients are of"):
        live(wider, sd)


def test_a_llava_without_its_tower_is_refused(tmp_path, shapes):
    tiny_targets.write_json(
        tmp_path / "config.json", {"model_type": "llava_llama", "mm_vision_tower": "some/clip"}
    )
    with pytest.raises(InputError, match="points to some/clip") as caught:
        live(shapes, tmp_path)
    assert "mm_vision_tower" in str(caught.value.hint)


def test_a_path_without_a_model_is_refused(tmp_path, shapes):
    with pytest.raises(MissingError, match="there is no model"):
        live(shapes, tmp_path / "nothing")
    with pytest.raises(MissingError, match=r"has no config\.json"):
        live(shapes, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match="cannot read"):
        live(shapes, tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="holds no weights of a CLIP"):
        live(shapes, tmp_path)
