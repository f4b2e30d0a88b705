"""A SiglipModel of transformers as a model: the same features, gradients and edits as open_clip."""

import dataclasses
import json
import shutil
from importlib.util import find_spec

import hf_siglip
import pytest
import tiny_targets
import torch
from open_clip.loss import SigLipLoss
from safetensors.torch import load_file
from worlds import World

from slsgu_cli.checkpoints.layouts import read_weight_set
from slsgu_cli.checkpoints.naming_schemes import tensor_places
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.checkpoints.transformers_families import model_config
from slsgu_cli.checkpoints.transformers_inputs import preprocess_config
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.model_folder import require_weights
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.clip.tokenizers import input_spec, tokenizer
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.set_edits import direct_edit
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.options import ApplyRequest, RankOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

LAYERS = (
    "visual.trunk.blocks.1.attn.qkv.weight",
    "visual.trunk.blocks.0.attn.qkv.weight.k",
    "visual.trunk.attn_pool.kv.weight",
    "text.text_projection.weight",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny SigLIP as transformers saves it; do not write to it."""
    return hf_siglip.write_folder(tmp_path_factory.mktemp("hf") / "siglip")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "siglip")


@pytest.fixture(scope="module")
def state(folder):
    return hf_siglip.in_open_clip(load_file(folder / "model.safetensors"))


@pytest.fixture(scope="module")
def built(folder, shared_world, tmp_path_factory):
    """A set built and graded on the folder, each loss in one mini-batch; do not write to it."""
    store = Store(str(tmp_path_factory.mktemp("store") / "store"))
    world = World(store, "blue", ModelSpec(str(folder)), shared_world.sources)
    world.build()
    world.grade(batch_size=500)
    return world


def change(path, **changes):
    content = json.loads(path.read_text())
    for name, value in changes.items():
        part, _, field = name.rpartition("__")
        (content[part] if part else content)[field] = value
    path.write_text(json.dumps(content))


def test_it_is_the_same_model_in_open_clip_and_transformers(folder, state):
    model = resolve(ModelSpec(str(folder)))
    require_weights(model)
    loaded = load(model)
    held = loaded.state_dict()
    assert held.keys() == state.keys()
    assert all(torch.equal(held[name], state[name]) for name in state)
    ours, theirs = hf_siglip.open_clips(state), hf_siglip.model()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 32, 32, generator=generator)
    texts = torch.randint(0, 64, (3, 10), generator=generator)
    with torch.no_grad():
        answer = theirs(input_ids=texts, pixel_values=images)
        for found, plain in (
            (loaded.encode_image(images), ours.encode_image(images)),
            (loaded.encode_text(texts), ours.encode_text(texts)),
        ):
            torch.testing.assert_close(found, plain, rtol=0, atol=1e-6)
        for found, other in (
            (loaded.encode_image(images, normalize=True), answer.image_embeds),
            (loaded.encode_text(texts, normalize=True), answer.text_embeds),
            (loaded.get_logits(images, texts)[0], answer.logits_per_image),
        ):
            torch.testing.assert_close(found, other, rtol=0, atol=1e-5)


def inputs(world, ref):
    """Return the pixels and tokens of a block of the set."""
    block = DataBlock.open(world.store, ref)
    images = torch.from_numpy(block.images(0, block.rows)).permute(0, 3, 1, 2) / 255
    return (images - 0.5) / 0.5, torch.from_numpy(block.tokens).long()


def test_gradients_are_those_of_open_clip_and_of_transformers(built, state):
    ours, theirs = hf_siglip.open_clips(state), hf_siglip.model()
    for role in ("forget", "retain"):
        pixels, tokens = inputs(built, getattr(built.manifest, role))
        answer = theirs(input_ids=tokens, pixel_values=pixels)
        features = (
            (ours.encode_image(pixels, normalize=True), ours.encode_text(tokens, normalize=True)),
            (answer.image_embeds, answer.text_embeds),
        )
        for model, (image, text) in zip((ours, theirs), features, strict=True):
            model.zero_grad()
            scale, bias = model.logit_scale.exp(), model.logit_bias
            loss = SigLipLoss()(image, text, scale, bias)
            if role == "forget":
                loss = (1 - (image * text).sum(-1)).mean()
            loss.backward()
        plain, told = (
            {
                name: torch.zeros_like(p) if p.grad is None else p.grad
                for name, p in model.named_parameters()
            }
            for model in (ours, theirs)
        )
        plain = {name.replace("visual.", "visual.trunk."): grad for name, grad in plain.items()}
        other = hf_siglip.in_open_clip(told)
        stored = built.store.read_tensors(Artifact.GRADIENT.path(getattr(built.pointer, role)))
        assert len(stored) > 40
        for name, value in stored.items():
            found, size = torch.from_numpy(value), plain[name].abs().max()
            torch.testing.assert_close(found, plain[name], rtol=0, atol=float(3e-6 * size + 1e-8))
            torch.testing.assert_close(found, other[name], rtol=0, atol=float(1e-4 * size + 1e-7))


def test_texts_are_cut_by_the_folders_own_tokenizer(folder):
    model = resolve(ModelSpec(str(folder)))
    (ids,) = tokenizer(model)(["A Blue, ring!"])
    words = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert ids.tolist() == [words["a"], words["blue"], words["ring"], 1, *[0] * 6]
    spec = input_spec(model)
    assert (spec.context_length, spec.resize_mode, spec.mean) == (10, "squash", (0.5, 0.5, 0.5))


@pytest.mark.parametrize("layer", LAYERS)
def test_edits_go_into_the_folder_and_out_again(built, folder, state, tmp_path, layer):
    from transformers import SiglipModel

    world = built.copied(tmp_path / "store")
    options = RankOptions(direction=Direction.GRADIENT)
    edit = direct_edit(world.store, world.name, layer=layer, step=1.0, options=options)
    request = ApplyRequest(
        names=[world.name],
        out=tmp_path / "out",
        model=world.model,
        layer=layer,
        step=1.0,
        direction=Direction.GRADIENT,
    )
    apply(world.store, request)
    parameter = layer.removesuffix(".k")
    expected = dict(state) | {parameter: state[parameter].clone()}
    rows = expected[parameter].chunk(3)[1] if parameter != layer else expected[parameter]
    rows += torch.from_numpy(edit.delta())
    found = hf_siglip.in_open_clip(load_file(tmp_path / "out/model.safetensors"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-7, msg=name)
    assert not torch.equal(found[parameter], state[parameter])
    pixels, tokens = inputs(world, world.manifest.forget)
    ours, theirs = hf_siglip.open_clips(expected), SiglipModel.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = theirs(input_ids=tokens, pixel_values=pixels).logits_per_image
        torch.testing.assert_close(ours.get_logits(pixels, tokens)[0], logits, rtol=0, atol=1e-4)
    target = dataclasses.replace(
        request, model=None, target=tmp_path / "out", out=tmp_path / "back", revert=True
    )
    apply(world.store, target)
    back, before = tmp_path / "back/model.safetensors", folder / "model.safetensors"
    assert back.read_bytes() == before.read_bytes()


def test_shards_and_other_containers_are_the_same_model(copy, folder, state):
    expected = fingerprint(resolve(ModelSpec(str(folder))))
    weights = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    tiny_targets.save_shards(weights, copy, 3)
    assert fingerprint(resolve(ModelSpec(str(copy)))) == expected
    for path in copy.glob("model*"):
        path.unlink()
    tiny_targets.save(weights, copy / "pytorch_model.bin")
    assert fingerprint(resolve(ModelSpec(str(copy)))) == expected
    (places,) = {
        tensor_places("visual.trunk.attn_pool.kv.bias", place)
        for place in read_weight_set([copy / "pytorch_model.bin"]).towers
        if place.tower == "vision"
    }
    weights[places[0].key][-1] += 1
    tiny_targets.save(weights, copy / "pytorch_model.bin")
    assert fingerprint(resolve(ModelSpec(str(copy)))) != expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vision_config__layer_norm_eps", 1e-5),
        ("text_config__layer_norm_eps", "small"),
        ("text_config__hidden_act", "relu"),
        ("vision_config__num_channels", 4),
        ("vision_config__vision_use_head", False),
        ("text_config__projection_size", 40),
    ],
)
def test_models_that_open_clip_cannot_express_are_refused(copy, field, value):
    change(copy / "config.json", **{field: value})
    with pytest.raises(InputError, match=f"has {field.split('__')[1]} .*{value}.*open_clip's Sigl"):
        resolve(ModelSpec(str(copy)))


@pytest.mark.parametrize(("text", "vision"), [("gelu", "gelu_pytorch_tanh"), ("gelu",) * 2])
def test_each_tower_has_the_activation_that_its_configuration_says(copy, text, vision):
    from transformers import SiglipModel

    images, texts = torch.linspace(-9, 9, 3072).reshape(1, 3, 32, 32), torch.arange(10)[None]
    default = load(resolve(ModelSpec(str(copy))))
    change(copy / "config.json", vision_config__hidden_act=vision, text_config__hidden_act=text)
    found, theirs = load(resolve(ModelSpec(str(copy)))), SiglipModel.from_pretrained(copy)
    with torch.no_grad():
        for one, same, other in (
            (found.encode_image, theirs.get_image_features(pixel_values=images), default.visual),
            (found.encode_text, theirs.get_text_features(input_ids=texts), default.text),
        ):
            inputs = images if one == found.encode_image else texts
            torch.testing.assert_close(one(inputs), same.pooler_output, rtol=0, atol=3e-6)
            changed = (one(inputs) - other(inputs)).abs().max() > 1e-5
            assert changed == (one == found.encode_text or vision == "gelu")


def test_missing_keys_of_a_configuration_mean_googles_base_model(tmp_path):
    tiny_targets.write_json(tmp_path / "config.json", {"model_type": "siglip"})
    config = model_config(tmp_path)
    assert (config["embed_dim"], config["vision_cfg"]["patch_size"]) == (768, 16)
    text = config["text_cfg"]
    assert (text["context_length"], text["vocab_size"]) == (64, 32000)
    halves = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    assert preprocess_config(tmp_path) == halves | {"resize_mode": "squash"}
    told = {"resample": 2, "size": {"height": 32, "width": 32}}
    tiny_targets.write_json(tmp_path / "preprocessor_config.json", told)
    expected = halves | {"interpolation": "bilinear", "resize_mode": "squash"}
    assert preprocess_config(tmp_path) == expected


def test_a_folder_without_its_tokenizer_says_where_it_belongs(copy):
    change(copy / "tokenizer_config.json", tokenizer_class="SiglipTokenizer")
    if find_spec("sentencepiece") is None:
        with pytest.raises(MissingError, match="requires the SentencePiece") as caught:
            tokenizer(resolve(ModelSpec(str(copy))))
        assert caught.value.hint == "pip install sentencepiece protobuf"
    for path in copy.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(MissingError, match=r"has no tokenizer_config\.json") as caught:
        tokenizer(resolve(ModelSpec(str(copy))))
    assert "next to the weights" in caught.value.hint


def test_naflex_is_refused_by_name(copy):
    change(copy / "config.json", model_type="siglip2", architectures=["Siglip2Model"])
    for door in (lambda: resolve(ModelSpec(str(copy))), lambda: read_target(copy)):
        with pytest.raises(Exception, match=r"Siglip2Model \(siglip2\)") as caught:
            door()
        assert "NaFlex, which takes images in their own aspect ratios" in caught.value.hint
