import numpy as np
import pytest
import tiny_clip
import torch

from slsgu_cli.checkpoints.layers import Layer, find_layers, known_as, selected
from slsgu_cli.method.layers import is_candidate
from slsgu_cli.records.method import Tower


def candidates(model):
    return {name for name, _ in model.named_parameters() if is_candidate(name)}


def test_candidates_of_a_clip_are_its_matrices_and_norms():
    model = tiny_clip.fresh_model()
    block = (
        "attn.in_proj_weight",
        "attn.out_proj.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
        "ln_1.weight",
        "ln_2.weight",
    )
    expected = {
        f"{tower}transformer.resblocks.{index}.{part}"
        for tower in ("", "visual.")
        for index in range(3)
        for part in block
    }
    expected |= {"visual.conv1.weight", "visual.ln_pre.weight", "visual.ln_post.weight"}
    expected |= {"visual.proj", "text_projection", "ln_final.weight"}
    assert candidates(model) == expected


def test_candidates_with_a_text_tower_of_its_own_are_the_same():
    plain = {n for n in candidates(tiny_clip.fresh_model()) if Layer.parse(n).tower is Tower.TEXT}
    config = tiny_clip.CONFIG | {"custom_text": True, "init_logit_bias": -2.0}
    custom = candidates(tiny_clip.fresh_model(config))
    texts = {name.removeprefix("text.") for name in custom if Layer.parse(name).tower is Tower.TEXT}
    assert texts == plain


@pytest.mark.parametrize(
    "name",
    [
        "logit_scale",
        "logit_bias",
        "positional_embedding",
        "token_embedding.weight",
        "visual.class_embedding",
        "visual.positional_embedding",
        "visual.ln_post.bias",
        "visual.transformer.resblocks.0.attn.in_proj_bias",
        "visual.trunk.pos_embed",
        "visual.trunk.cls_token",
        "visual.trunk.reg_token",
        "visual.trunk.blocks.0.attn.q_bias",
        "visual.trunk.blocks.0.gamma_1",
        "visual.transformer.resblocks.0.ls_1.gamma",
        "text.cls_emb",
        "text.transformer.embeddings.word_embeddings.weight",
        "text.transformer.embed_tokens.weight",
        "text.transformer.shared.weight",
        "visual.trunk.attn_pool.latent",
        "visual.attn_pool.query",
        "visual.attn_pool_contrastive.query",
        "text_decoder.resblocks.0.mlp.c_fc.weight",
    ],
)
def test_biases_scales_and_embeddings_are_no_candidates(name):
    assert not is_candidate(name)


@pytest.mark.parametrize(
    "name",
    [
        "visual.trunk.patch_embed.proj.weight",
        "visual.trunk.blocks.11.attn.qkv.weight",
        "visual.trunk.norm.weight",
        "visual.trunk.head.weight",
        "visual.layer1.0.conv1.weight",
        "visual.attnpool.q_proj.weight",
        "visual.trunk.attn_pool.q.weight",
        "text.transformer.encoder.layer.0.attention.self.query.weight",
        "text.text_projection.weight",
    ],
)
def test_layers_of_other_families_are_candidates(name):
    assert is_candidate(name)
    assert Layer.parse(name).tower is (Tower.VISION if name.startswith("visual") else Tower.TEXT)


def test_scales_and_decoders_belong_to_no_tower():
    assert Layer.parse("logit_scale").tower is None
    assert Layer.parse("text_decoder.ln_final.weight").tower is None
    assert Layer.parse("token_embedding.weight").tower is Tower.TEXT


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ([], [], True),
        (["attn"], [], True),
        (["ATTN"], [], False),
        (["mlp", "visual.*"], [], True),
        (["visual"], ["in_proj"], False),
        (["visual.proj?"], [], False),
        (["*in_proj_weight"], [], True),
        (["in_proj_w"], [], True),
        ([], ["visual.*attn*"], False),
        ([], ["resblocks.1."], True),
    ],
)
def test_patterns_select(include, exclude, expected):
    name = "visual.transformer.resblocks.11.attn.in_proj_weight"
    assert selected(name, include=include, exclude=exclude) is expected


@pytest.mark.parametrize(
    ("name", "block"),
    [
        ("visual.transformer.resblocks.11.mlp.c_fc.weight", 11),
        ("visual.trunk.blocks.3.attn.qkv.weight.v", 3),
        ("text_model.encoder.layers.4.self_attn.k_proj.weight", 4),
        ("visual.layer1.0.conv1.weight", None),
        ("model.down_blocks.2.weight", None),
    ],
)
def test_the_name_gives_the_block(name, block):
    assert Layer.parse(name).block == block


@pytest.mark.parametrize("make", [np.asarray, torch.tensor])
def test_the_rows_of_a_layer_are_read_and_replaced_in_arrays_and_tensors(make):
    values = make(np.arange(12.0).reshape(6, 2))
    layer = Layer.parse("transformer.resblocks.0.attn.in_proj_weight.k")
    assert layer.rows(values).tolist() == [[4, 5], [6, 7]]
    new = layer.replaced(values, make(np.zeros((2, 2))))
    assert new.tolist() == [[0, 1], [2, 3], [0, 0], [0, 0], [8, 9], [10, 11]]
    assert values.tolist()[2] == [4, 5]
    whole = Layer.parse(layer.parameter)
    assert whole.rows(values) is values and whole.replaced(values, new) is new


def test_names_in_tables_are_short_and_unique():
    names = sorted(candidates(tiny_clip.fresh_model()))
    known = [known_as(name) for name in names]
    assert len(set(known)) == len(names)
    assert max(map(len, known)) < 30
    assert {"visual.conv1", "visual.2.mlp.c_fc", "2.mlp.c_fc", "text_projection"} <= set(known)


def test_a_layer_is_found_by_its_name_its_short_name_or_a_part():
    names = sorted(candidates(tiny_clip.fresh_model()))
    for name in names:
        assert find_layers(name, names) == [name]
        assert find_layers(known_as(name), names) == [name]
    assert find_layers("conv1", names) == ["visual.conv1.weight"]
    assert len(find_layers("c_fc", names)) == 6
    assert find_layers("nosuch", names) == []
