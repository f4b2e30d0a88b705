"""Models that are written for another client: the same features, and the same bytes elsewhere."""

import json
import shutil
from dataclasses import replace

import hf_metaclip
import hf_siglip
import numpy as np
import open_clip
import pytest
import tiny_clip
import tiny_targets
import torch
from edit_headers import edit
from PIL import Image
from processes import inside
from safetensors.torch import load_file, save_file
from tower_models import CONFIGS

from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip import other_layouts
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import model_layer, resolve
from slsgu_cli.clip.other_layouts import other_layout
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.apply import apply
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.method import ModelLayout
from slsgu_cli.records.options import ApplyRequest
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.store import Store

LAYER = "transformer.resblocks.1.attn.in_proj_weight"
HF, OPEN_CLIP, COMFY = ModelLayout.HF, ModelLayout.OPEN_CLIP, ModelLayout.COMFY
TEXTS = ["a blue ring", "the red square!", "ring ring the the red"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP in open_clip's layout, with a card; do not write to it."""
    written = tiny_clip.write_folder(tmp_path_factory.mktemp("layouts") / "tiny")
    (written / "README.md").write_text("---\nlicense: mit\n---\n# Theirs\n")
    return written


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A tiny SigLIP as transformers saves it; do not write to it."""
    return hf_siglip.write_folder(tmp_path_factory.mktemp("layouts") / "siglip")


@pytest.fixture(scope="module")
def named_by_timm():
    """The tiny SigLIP's vision tower, by a name of timm's."""
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def vit_tiny_patch8_siglip_32(pretrained=False, **kwargs):
        sizes = hf_siglip.VISION
        arguments = {
            "img_size": sizes["image_size"],
            "patch_size": sizes["patch_size"],
            "embed_dim": sizes["hidden_size"],
            "depth": sizes["num_hidden_layers"],
            "num_heads": sizes["num_attention_heads"],
            "class_token": False,
            "mlp_ratio": sizes["intermediate_size"] / sizes["hidden_size"],
            "act_layer": "gelu_tanh",
            "global_pool": "map",
        }
        known = {"num_classes", "global_pool", "device", "dtype"}
        return VisionTransformer(**arguments | {k: v for k, v in kwargs.items() if k in known})

    vit_tiny_patch8_siglip_32.__module__ = "timm.models.vision_transformer"
    register_model(vit_tiny_patch8_siglip_32)


def applied(tmp_path, model, out, *, layer=LAYER, **options):
    """Put an edit into a model, and return what apply says."""
    store = Store(str(tmp_path / "store"))
    if not store.exists("edits/facebook.safetensors"):
        before = model_layer(resolve(model), layer)
        delta = np.random.default_rng(0).normal(size=before.shape).astype(np.float32)
        write_edit(store, edit(layer, 0.1 * delta, before))
    request = {"names": ["facebook"], "out": tmp_path / out} | options
    return apply(store, ApplyRequest(**{"model": model} | request))


def spec(folder):
    return ModelSpec(str(folder))


def pictures():
    """Return images of the models' size, as they need no resizing."""
    rng = np.random.default_rng(0)
    size = (tiny_clip.SIZE, tiny_clip.SIZE, 3)
    return [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for _ in range(3)]


def our_features(name):
    """Return features of pictures and texts by open_clip's module, preprocessing and tokenizer."""
    _, _, preprocess = open_clip.create_model_and_transforms(name)
    model = resolve(ModelSpec(name))
    module, tokens = load(model), torch.from_numpy(tokenizer(model)(TEXTS)).long()
    with torch.no_grad():
        images = module.encode_image(torch.stack([preprocess(image) for image in pictures()]))
        return images, module.encode_text(tokens)


def their_features(name, kind, processor):
    """Return features of pictures and texts as transformers computes them from a folder."""
    made = processor.from_pretrained(name)(
        text=TEXTS, images=pictures(), return_tensors="pt", padding="max_length", truncation=True
    )
    with torch.no_grad():
        answer = kind.from_pretrained(name).eval()(
            input_ids=made["input_ids"], pixel_values=made["pixel_values"]
        )
    return answer.image_embeds, answer.text_embeds


def require_same(found, expected):
    for one, other in zip(found, expected, strict=True):
        one, other = (torch.nn.functional.normalize(each, dim=-1) for each in (one, other))
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def require_same_tensors(one, other):
    """Two files hold the same tensors, to the bit."""
    one, other = (load_file(path / name) for path, name in (one, other))
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def test_an_open_clip_model_is_written_for_transformers_and_back(folder, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    plain = applied(tmp_path, spec(folder), "plain")
    result = applied(tmp_path, spec(folder), "hf", layout=HF)
    assert (result.model, result.client) == (str(tmp_path / "hf"), "transformers")
    assert result.files[0].nbytes == (tmp_path / "hf/model.safetensors").stat().st_size
    theirs = their_features(tmp_path / "hf", CLIPModel, CLIPProcessor)
    require_same(theirs, our_features(plain.model))
    edited = load_file(tmp_path / "plain/open_clip_model.safetensors")
    wanted = tiny_targets.transformers_weights(edited)
    found = load_file(tmp_path / "hf/model.safetensors")
    assert wanted.keys() == found.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    card = (tmp_path / "hf/README.md").read_text()
    assert "library_name: transformers\n" in card and "license: mit" in card
    assert card.endswith("# Theirs\n")
    assert "library_name: open_clip\n" in (tmp_path / "plain/README.md").read_text()

    again = applied(tmp_path, spec(tmp_path / "hf"), "back", layout=OPEN_CLIP, revert=True)
    assert again.model == f"local-dir:{tmp_path / 'back'}"
    weights = "open_clip_model.safetensors"
    require_same_tensors((folder, weights), (tmp_path / "back", weights))
    assert (tmp_path / "back/README.md").read_text().startswith("---\nlicense: mit")
    require_same(our_features(again.model), our_features(f"local-dir:{folder}"))


def test_the_tokenizer_that_is_written_is_clips_own(folder, tmp_path):
    from transformers import AutoTokenizer

    applied(tmp_path, spec(folder), "hf", layout=HF)
    loaded = AutoTokenizer.from_pretrained(tmp_path / "hf")
    own = open_clip.SimpleTokenizer(context_length=16)
    texts = [*TEXTS, "Naïve café, 1234 & 'quotes'...", "a photo of a pug-dog.", "日本語"]
    for text in texts:
        ids = own([text])[0].tolist()
        assert loaded(text, truncation=True)["input_ids"] == ids[: ids.index(max(ids)) + 1], text


@pytest.mark.parametrize("half", [False, True])
def test_a_file_of_weights_keeps_its_precision(folder, tmp_path, half):
    from transformers import CLIPModel

    state = load_file(folder / "open_clip_model.safetensors")
    state = {f"module.{k}": v.half() if half else v for k, v in state.items()}
    state["module.logit_scale"] = state["module.logit_scale"].reshape(1)
    (tmp_path / "words.json").write_text(json.dumps(tiny_clip.CONFIG))
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "w.pt")
    model = ModelSpec(str(tmp_path / "words.json"), str(tmp_path / "w.pt"))
    applied(tmp_path, model, "hf", layout=HF)
    found = load_file(tmp_path / "hf/model.safetensors")
    assert {value.dtype for value in found.values()} == {torch.float16 if half else torch.float32}
    assert found["logit_scale"].shape == ()
    CLIPModel.from_pretrained(tmp_path / "hf")


def test_a_siglip_is_written_for_open_clip_by_timms_name_and_back(siglip, tmp_path, named_by_timm):
    from transformers import AutoTokenizer, SiglipModel

    layer = "visual.trunk.attn_pool.kv.weight"
    result = applied(tmp_path, spec(siglip), "oc", layer=layer, layout=OPEN_CLIP)
    assert result.model == f"local-dir:{tmp_path / 'oc'}"
    applied(tmp_path, spec(siglip), "plain", layer=layer)
    model = SiglipModel.from_pretrained(tmp_path / "plain").eval()
    loaded = open_clip.create_model(result.model).eval()
    tokens = open_clip.get_tokenizer(result.model)(["a blue ring", "the red square"])
    told = AutoTokenizer.from_pretrained(siglip)(
        ["a blue ring", "the red square"], padding="max_length", max_length=10
    )
    assert tokens.tolist() == told["input_ids"]
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        answer = model(input_ids=tokens, pixel_values=pixels)
        ours = loaded.encode_image(pixels), loaded.encode_text(tokens)
    require_same(ours, (answer.image_embeds, answer.text_embeds))

    applied(tmp_path, spec(tmp_path / "oc"), "hf", layer=layer, layout=HF, revert=True)
    require_same_tensors((siglip, "model.safetensors"), (tmp_path / "hf", "model.safetensors"))
    SiglipModel.from_pretrained(tmp_path / "hf")
    told = json.loads((tmp_path / "hf/preprocessor_config.json").read_text())
    assert told["image_processor_type"] == "SiglipImageProcessor"
    assert told["size"] == {"height": 32, "width": 32} and not told["do_center_crop"]


def test_a_metaclip_is_written_for_open_clip_and_back(tmp_path):
    source = hf_metaclip.write_folder(tmp_path / "metaclip")
    result = applied(tmp_path, spec(source), "oc", layout=OPEN_CLIP)
    loaded = open_clip.create_model(result.model).eval()
    applied(tmp_path, spec(source), "plain")
    plain = resolve(spec(tmp_path / "plain"))
    tokens = open_clip.get_tokenizer(result.model)(TEXTS)
    assert tokens.tolist() == tokenizer(plain)(TEXTS).tolist()
    with torch.no_grad():
        require_same([loaded.encode_text(tokens)], [load(plain).encode_text(tokens)])
    applied(tmp_path, spec(tmp_path / "oc"), "hf", layout=HF, revert=True)
    require_same_tensors((source, "model.safetensors"), (tmp_path / "hf", "model.safetensors"))
    assert (tmp_path / "hf/tokenizer.json").is_file()


@pytest.mark.parametrize("clean", ["canonicalize", "whitespace"])
def test_a_tokenizer_that_transformers_cleans_differently_is_reported(tmp_path, listener, clean):
    """The text settings of open_clip's worldwide models."""
    (tmp_path / "words").mkdir()
    hf_siglip.write_tokenizer(tmp_path / "words")
    worldwide = open_clip.get_model_config("ViT-L-14-worldwide")["text_cfg"]
    assert worldwide["tokenizer_kwargs"] == {"clean": "canonicalize"}
    own = {"hf_tokenizer_name": str(tmp_path / "words"), "tokenizer_kwargs": {"clean": clean}}
    config = tiny_clip.CONFIG | {"text_cfg": worldwide | tiny_clip.CONFIG["text_cfg"] | own}
    model = tiny_clip.fresh_model(config)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / f"worldwide-{clean}.json").write_text(json.dumps(config))
    named = ModelSpec(str(tmp_path / f"worldwide-{clean}.json"), str(tmp_path / "w.safetensors"))
    result = applied(tmp_path, named, "hf", layout=HF)
    ids = [tokenizer(resolve(each))(["A Blue Ring."]) for each in (named, spec(tmp_path / "hf"))]
    told = [text for text in listener.heard if "cleans texts by 'whitespace'" in text]
    if clean == "whitespace":
        assert np.array_equal(*ids) and not told and result.model is not None
    else:
        assert not np.array_equal(*ids) and result.model is None
        assert len(told) == 1 and "by 'canonicalize', which gives other ids" in told[0]
    applied(tmp_path, named, "oc")
    assert len([text for text in listener.heard if "cleans texts" in text]) == len(told)


def resolved(folder, config):
    """Return a model of a configuration whose weights are not looked at."""
    folder.mkdir(exist_ok=True)
    content = {"model_cfg": config, "preprocess_cfg": tiny_clip.PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    (folder / "open_clip_model.safetensors").write_bytes(b"")
    return resolve(ModelSpec(f"local-dir:{folder}"))


@pytest.mark.parametrize(
    ("kind", "field"),
    [
        ("layer-scale", "text_cfg.ls_init_value 0.5"),
        ("average-pool", "vision_cfg.pool_type 'avg' .a CLIPModel has 'tok'."),
        ("siglip-like", "init_logit_bias True"),
        ("eva", "vision_cfg.timm_model_name 'eva02_tiny"),
        ("coca", "vision_cfg.attentional_pool True"),
        ("resnet", r"vision_cfg.layers \[1, 2, 1, 1\]"),
    ],
)
def test_models_that_transformers_cannot_express_are_refused_by_name(tmp_path, siglip, kind, field):
    model = resolved(tmp_path / "odd", CONFIGS[kind])
    with pytest.raises(InputError, match=rf"no place for .*{field}"):
        other_layout(HF, model, read_target(siglip), [], tmp_path)


def test_preprocessing_that_transformers_lacks_is_refused(tmp_path, siglip):
    model = resolved(tmp_path / "odd", tiny_clip.CONFIG)
    for name, value in (("resize_mode", "longest"), ("interpolation", "random")):
        odd = replace(model, preprocess=model.preprocess | {name: value})
        with pytest.raises(InputError, match=f"preprocess_cfg.{name} '{value}'"):
            other_layout(HF, odd, read_target(siglip), [], tmp_path)


def test_a_text_tower_of_its_own_is_the_same_tower(folder, tmp_path):
    config = tiny_clip.CONFIG | {"custom_text": True}
    module = open_clip.CustomTextCLIP(**tiny_clip.CONFIG)
    written = tiny_clip.write_folder(tmp_path / "custom", module, custom_text=True)
    assert "text.ln_final.bias" in load_file(written / "open_clip_model.safetensors")
    assert json.loads((written / "open_clip_config.json").read_text())["model_cfg"] == config
    applied(tmp_path, spec(written), "hf", layout=HF, layer="visual.proj")
    assert load(resolve(spec(tmp_path / "hf"))).ln_final.bias is not None


def test_a_siglip_that_timm_has_no_name_for_is_refused(siglip, tmp_path):
    odd = shutil.copytree(siglip, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    config["vision_config"]["hidden_act"] = config["text_config"]["hidden_act"] = "gelu"
    (odd / "config.json").write_text(json.dumps(config))
    layer = "text.text_projection.weight"
    with pytest.raises(InputError, match=r"none is of 2 blocks 36 wide .* with exact GELU"):
        applied(tmp_path, spec(odd), "oc", layer=layer, layout=OPEN_CLIP)
    assert not (tmp_path / "oc").exists()


def test_weights_that_the_other_layout_has_no_place_for_are_refused(folder, tmp_path):
    other = shutil.copytree(folder, tmp_path / "other")
    weights = load_file(other / "open_clip_model.safetensors")
    tiny_targets.save(
        weights | {"visual.register": torch.ones(2)}, other / "open_clip_model.safetensors"
    )
    with pytest.raises(InputError, match=r"holds visual\.register, which the other layout"):
        applied(tmp_path, spec(other), "hf", layout=HF)


def test_a_dry_run_covers_another_layout_and_its_place(folder, tmp_path):
    result = applied(tmp_path, spec(folder), "hf", layout=HF, dry_run=True)
    assert result.model == str(tmp_path / "hf") and not (tmp_path / "hf").exists()
    with pytest.raises(UsageError, match="transformers loads a folder"):
        applied(tmp_path, spec(folder), "hf.safetensors", layout=HF)
    with pytest.raises(UsageError, match="--link cannot be combined with --format"):
        applied(tmp_path, spec(folder), "hf", layout=HF, link=True)
    copy = shutil.copytree(folder, tmp_path / "copy")
    with pytest.raises(InputError, match="is the model itself"):
        applied(tmp_path, spec(copy), "copy", layout=HF, overwrite=True)
    pipeline = tiny_targets.pipeline(
        tmp_path / "sd",
        "StableDiffusionPipeline",
        {
            "text_encoder": (
                "CLIPTextModel",
                tiny_targets.tower(load_file(folder / "open_clip_model.safetensors"), "text"),
            )
        },
    )
    with pytest.raises(UsageError, match="is not a whole CLIP, which --format hf needs"):
        applied(tmp_path, None, "out", target=pipeline, layout=HF)


def test_a_models_own_layout_is_not_a_conversion(folder, tmp_path):
    applied(tmp_path, spec(folder), "plain")
    applied(tmp_path, spec(folder), "named", layout=OPEN_CLIP)
    weights = "open_clip_model.safetensors"
    assert (tmp_path / "plain" / weights).read_bytes() == (
        tmp_path / "named" / weights
    ).read_bytes()


def test_the_command_says_what_loads_it(folder, tmp_path):
    applied(tmp_path, spec(folder), "plain")
    words = ["apply", "facebook", "-m", str(folder), "--format", "hf", "--out"]
    done = inside(*words, str(tmp_path / "hf"), store=tmp_path / "store")
    assert done.exit_code == 0
    assert f"transformers loads it as {tmp_path / 'hf'}" in done.stderr


# A text tower such as ComfyUI's, but small.
SMALL = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 2}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """A CLIP whose text tower ComfyUI would know if it were of this size."""
    monkeypatch.setitem(other_layouts.COMFY_TOWERS, (2, 64), ("CLIP small", "quick_gelu"))
    changes = {"text_cfg": SMALL, "embed_dim": 64, "quick_gelu": True}
    return tiny_clip.write_folder(tmp_path / "small", None, **changes)


@pytest.mark.parametrize("source", ["open_clip", "transformers"])
def test_a_text_encoder_is_written_for_comfyui(small, tmp_path, source):
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    plain = applied(tmp_path, spec(small), "plain")
    if source == "transformers":
        applied(tmp_path, spec(small), "hf", layout=HF, force=True)
        small = tmp_path / "again"
        applied(tmp_path, spec(tmp_path / "hf"), "again", revert=True)
    result = applied(tmp_path, spec(small), "te.safetensors", layout=COMFY)
    assert result.model is None and result.client == "ComfyUI"
    found = load_file(tmp_path / "te.safetensors")
    edited = load_file(tmp_path / "plain/open_clip_model.safetensors")
    wanted = tiny_targets.tower(edited, "text")
    wanted["text_projection.weight"] = edited["text_projection"].T
    assert found.keys() == wanted.keys()
    assert all(torch.equal(value, found[name]) for name, value in wanted.items())
    text = resolve(spec(small)).config["text_cfg"]
    config = CLIPTextConfig(
        hidden_size=text["width"],
        intermediate_size=4 * text["width"],
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        eos_token_id=49407,
    )
    client = CLIPTextModelWithProjection(config).eval()
    assert not client.load_state_dict(found, strict=True).unexpected_keys
    model = resolve(ModelSpec(plain.model))
    tokens = torch.from_numpy(tokenizer(model)(TEXTS)).long()
    with torch.no_grad():
        require_same([client(input_ids=tokens).text_embeds], [load(model).encode_text(tokens)])


def test_an_encoder_of_a_pipeline_is_written_for_comfyui(small, tmp_path):
    applied(tmp_path, spec(small), "plain")
    state = load_file(small / "open_clip_model.safetensors")
    weights = tiny_targets.tower(state, "text")
    pipeline = tiny_targets.pipeline(
        tmp_path / "sd", "StableDiffusionPipeline", {"text_encoder": ("CLIPTextModel", weights)}
    )
    path = pipeline / "text_encoder/config.json"
    path.write_text(json.dumps({"hidden_act": "quick_gelu", "num_attention_heads": 1}))
    applied(tmp_path, None, "te.safetensors", target=pipeline, layout=COMFY)
    found = load_file(tmp_path / "te.safetensors")
    assert found.keys() == weights.keys()
    changed = {name for name, value in weights.items() if not torch.equal(value, found[name])}
    assert changed == {
        f"text_model.encoder.layers.1.self_attn.{letter}_proj.weight" for letter in "qkv"
    }


def test_two_encoders_of_a_pipeline_are_two_files_for_comfyui(small, tmp_path):
    config = json.loads((small / "open_clip_config.json").read_text())["model_cfg"]
    states = [tiny_clip.fresh_model(config, seed).state_dict() for seed in (0, 1)]
    encoders = {
        name: ("CLIPTextModel", tiny_targets.tower(state, "text"))
        for name, state in zip(("text_encoder", "text_encoder_2"), states, strict=True)
    }
    pipeline = tiny_targets.pipeline(tmp_path / "xl", "StableDiffusionXLPipeline", encoders)
    told = json.dumps({"hidden_act": "quick_gelu", "num_attention_heads": 1})
    store = Store(str(tmp_path / "store"))
    layer = "transformer.resblocks.0.mlp.c_fc.weight"
    for name, encoder, state in zip(("blue", "red"), encoders, states, strict=True):
        (pipeline / encoder / "config.json").write_text(told)
        before = state[layer].numpy()
        write_edit(store, edit(layer, 0 * before + 0.1, before, name=name))
    request = ApplyRequest(
        names=["blue", "red"], target=pipeline, out=tmp_path / "te.safetensors", layout=COMFY
    )
    with pytest.raises(UsageError, match="these edits are for text_encoder and text_encoder_2"):
        apply(store, request)
    apply(store, replace(request, names=["red"]))
    found = load_file(tmp_path / "te.safetensors")
    key = "text_model.encoder.layers.0.mlp.fc1.weight"
    torch.testing.assert_close(found[key], states[1][layer] + 0.1)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quick_gelu": False}, "MLPs have gelu, and those of CLIP small quick_gelu"),
        ({"text_cfg": SMALL | {"heads": 2}}, "it has 2 heads"),
        ({"text_cfg": SMALL | {"context_length": 16}}, "it has 16 positions"),
        ({"embed_dim": 24}, r"it projects to \(24,\) values"),
        ({"text_cfg": SMALL | {"no_causal_mask": True}}, "text_cfg.no_causal_mask"),
        ({"text_cfg": SMALL | {"layers": 3}}, "is of 3 blocks, 64 wide; it knows CLIP ViT-L"),
    ],
)
def test_a_text_tower_that_comfyui_would_run_otherwise_is_refused(small, tmp_path, changes, reason):
    base = {"text_cfg": SMALL, "embed_dim": 64, "quick_gelu": True}
    odd = tiny_clip.write_folder(tmp_path / "odd", None, **base | changes)
    with pytest.raises(InputError, match=reason):
        applied(tmp_path, spec(odd), "te.safetensors", layout=COMFY)


def test_an_edit_of_the_vision_tower_is_not_for_comfyui(small, tmp_path):
    with pytest.raises(InputError, match=r"visual\.proj is not in a text encoder"):
        applied(tmp_path, spec(small), "te.safetensors", layer="visual.proj", layout=COMFY)
