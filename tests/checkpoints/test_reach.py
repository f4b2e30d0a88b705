"""Which layers can influence a model, by what it reads."""

from slsgu_cli.checkpoints.reading import last_state, penultimate, vision_features, whole
from slsgu_cli.records.method import Tower

TEXT = "transformer.resblocks.{}.mlp.c_fc.weight"
VISION = "visual.transformer.resblocks.{}.attn.in_proj_weight"


def live(reach, *layers):
    return [layer for layer in layers if reach.why_not(layer) is None]


def test_a_last_hidden_state_leaves_the_projection_out():
    layers = (TEXT.format(0), TEXT.format(11), "ln_final.weight", "text_projection", "visual.proj")
    assert live(last_state(12), *layers) == list(layers[:3])
    assert live(last_state(11), *layers) == [TEXT.format(0), "ln_final.weight"]
    assert "text" not in str(last_state(12).why_not("visual.proj")).split("vision")[0]


def test_a_penultimate_state_leaves_the_last_block_out():
    layers = (TEXT.format(22), TEXT.format(23), "ln_final.weight", "text_projection")
    assert live(penultimate(24, norm=True), *layers) == [TEXT.format(22), "ln_final.weight"]
    assert live(penultimate(24, norm=False), *layers) == [TEXT.format(22)]
    reason = penultimate(24, norm=False).why_not(TEXT.format(23))
    assert reason == "it reads the penultimate hidden state, which comes before block 23"


def test_vision_features_come_from_before_the_last_block():
    outside = ("ln_pre.weight", "conv1.weight", "ln_post.weight", "proj")
    layers = [VISION.format(block) for block in (0, 22, 23)]
    layers += [*(f"visual.{name}" for name in outside), TEXT.format(0)]
    start = [VISION.format(0), VISION.format(22)]
    assert live(vision_features([-2], 24), *layers) == [*start, *layers[3:5]]
    assert live(vision_features([-1], 24), *layers) == [*start, *layers[2:5]]
    assert live(vision_features([3, 1], 24), *layers) == [VISION.format(0), *layers[3:5]]
    assert live(vision_features([23], 24), *layers) == live(vision_features([-2], 24), *layers)


def test_timms_names_are_known():
    reach = vision_features([-2], 12)
    dead = (
        "visual.trunk.blocks.11.norm1.weight",
        "visual.trunk.norm.weight",
        "visual.trunk.fc_norm.weight",
        "visual.head.proj.weight",
    )
    assert live(reach, *dead) == []
    alive = (
        "visual.trunk.blocks.10.norm1.weight",
        "visual.trunk.blocks.10.attn.proj.weight",
        "visual.trunk.patch_embed.proj.weight",
    )
    assert live(reach, *alive) == list(alive)


def test_every_layer_influences_a_clip():
    layers = ("text_projection", "visual.proj", TEXT.format(9), VISION.format(9))
    assert live(whole(set(Tower)), *layers) == list(layers)
