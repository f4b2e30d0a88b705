"""A ChineseCLIPModel of transformers as a model: features, gradients and edits as there."""

import io
import json
import shutil
from dataclasses import replace

import hf_chinese
import pytest
import tiny_targets
import torch
from PIL import Image
from safetensors.torch import load_file
from worlds import World

from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.checkpoints.transformers_families import model_config
from slsgu_cli.clip.decoding import decoder
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.model_folder import require_weights
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.clip.other_layouts import other_layout
from slsgu_cli.clip.tokenizers import input_spec, tokenizer
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.set_edits import direct_edit
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.method import ModelLayout
from slsgu_cli.records.options import ApplyRequest, RankOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

QUERY = "text.transformer.encoder.layer.1.attention.self.query.weight"
LAYERS = (
    QUERY,
    "text.transformer.encoder.layer.0.output.dense.weight",
    "text.proj.weight",
    "visual.transformer.resblocks.1.attn.in_proj_weight.k",
)
TEXTS = ["a blue ring", "一只红环，a red square", "photo of the circle " * 9]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Chinese CLIP as transformers saves it; do not write to it."""
    return hf_chinese.write_folder(tmp_path_factory.mktemp("hf") / "chinese")


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "chinese")


@pytest.fixture(scope="module")
def built(folder, shared_world, tmp_path_factory):
    """A set built and graded on the folder, in one mini-batch; do not write to it."""
    store = Store(str(tmp_path_factory.mktemp("store") / "store"))
    world = World(store, "blue", ModelSpec(str(folder)), shared_world.sources)
    world.build()
    world.grade(batch_size=500)
    return world


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's own cache, without a connection; returns a function that puts a folder there."""
    return tiny_targets.cache_of_hub(monkeypatch, tmp_path / "hub")


def features(model, pixels, tokens):
    """Return the features of transformers' model, with the padding hidden as it is by mask."""
    mask = (tokens != 0).long()
    images = model.get_image_features(pixel_values=pixels).pooler_output
    return images, model.get_text_features(input_ids=tokens, attention_mask=mask).pooler_output


def require_same(ours, theirs, pixels, tokens):
    with torch.no_grad():
        expected = features(theirs, pixels, tokens)
        for found, other in zip(
            (ours.encode_image(pixels), ours.encode_text(tokens)), expected, strict=True
        ):
            torch.testing.assert_close(found, other, rtol=0, atol=1e-5)


def noise():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_texts_are_those_of_the_folders_own_tokenizer(folder):
    from transformers import AutoTokenizer

    model, theirs = resolve(ModelSpec(str(folder))), AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(model)(TEXTS)
    length = hf_chinese.POSITIONS
    told = theirs(TEXTS, max_length=length, padding="max_length", truncation=True)
    assert ids.tolist() == told["input_ids"]
    # Nothing is cleaned away: the comma of Chinese is no other comma.
    assert hf_chinese.WORDS.index("，") in ids[1] and theirs.unk_token_id not in ids
    assert ids[2][-1] == theirs.sep_token_id and input_spec(model).context_length == length


def test_features_are_those_of_transformers(folder):
    model = resolve(ModelSpec(str(folder)))
    require_weights(model)
    loaded, theirs = load(model), hf_chinese.model()
    weights = hf_chinese.in_transformers(loaded.state_dict())
    assert weights.keys() == theirs.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in theirs.state_dict().items())
    require_same(loaded, theirs, noise(), torch.from_numpy(tokenizer(model)(TEXTS)).long())
    assert not any((folder / name).exists() for name in ("open_clip_config.json", "tokenizer.json"))


@pytest.mark.parametrize(
    "text",
    [
        {"hidden_act": "gelu_new"},
        {"layer_norm_eps": 1e-2},
        {"type_vocab_size": 3, "max_position_embeddings": 60},
    ],
)
def test_the_bert_follows_its_configuration(tmp_path, text):
    model = resolve(ModelSpec(str(hf_chinese.write_folder(tmp_path / "other", **text))))
    tokens = torch.from_numpy(tokenizer(model)(TEXTS)).long()
    assert tokens.shape[1] == min(52, text.get("max_position_embeddings", hf_chinese.POSITIONS))
    require_same(load(model), hf_chinese.model(**text), noise(), tokens)
    plain = hf_chinese.write_folder(tmp_path / "plain")
    assert fingerprint(model) != fingerprint(resolve(ModelSpec(str(plain))))


def test_the_authors_layout_on_the_hub_is_the_same_model(copy, folder, hub):
    weights = load_file(copy / "model.safetensors")
    places = torch.arange(hf_chinese.POSITIONS)[None]
    (copy / "model.safetensors").unlink()
    # Older versions of transformers wrote buffers as well.
    torch.save(weights | {"text_model.embeddings.position_ids": places}, copy / "pytorch_model.bin")
    place, spec = hub(copy, "chinese"), ModelSpec("hf-hub:org/chinese")
    found, same = resolve(spec), resolve(ModelSpec(str(folder)))
    require_weights(found)
    assert (found.folder, found.weights.name) == (place, "pytorch_model.bin")
    assert (fingerprint(found), input_spec(found)) == (fingerprint(same), input_spec(same))


def test_images_are_resized_as_the_folders_processor_does(folder):
    from transformers import ChineseCLIPImageProcessorPil

    picture = Image.new("RGB", (64, 40), "white")
    picture.paste("red", (4, 8, 30, 30))
    png = io.BytesIO()
    picture.save(png, "PNG")
    told = json.loads((folder / "preprocessor_config.json").read_text())
    theirs = ChineseCLIPImageProcessorPil(**told)(picture, return_tensors="pt")["pixel_values"][0]
    spec = input_spec(resolve(ModelSpec(str(folder))))
    assert spec.resize_mode == "squash"
    ours = torch.from_numpy(decoder(spec)(png.getvalue()).pixels.copy()).permute(2, 0, 1) / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    torch.testing.assert_close((ours - mean) / std, theirs, rtol=0, atol=1e-5)


def inputs(world, ref):
    """Return the pixels and tokens of a block of the set."""
    block, spec = DataBlock.open(world.store, ref), world.manifest.input
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    images = torch.from_numpy(block.images(0, block.rows)).permute(0, 3, 1, 2) / 255
    return (images - mean) / std, torch.from_numpy(block.tokens).long()


def test_gradients_are_those_of_transformers(built):
    theirs = hf_chinese.model()
    image, text = features(theirs, *inputs(built, built.manifest.forget))
    (1 - torch.cosine_similarity(image, text)).mean().backward()
    stored = built.store.read_tensors(Artifact.GRADIENT.path(built.pointer.forget))
    found = hf_chinese.in_transformers({n: torch.from_numpy(v) for n, v in stored.items()})
    compared = [name for name in found if "logit_scale" not in name]
    assert len(compared) > 60
    for name in compared:
        plain = theirs.get_parameter(name).grad
        least = float(1e-4 * plain.abs().max() + 1e-7)
        torch.testing.assert_close(found[name], plain, rtol=0, atol=least)


def request_for(world, layer, out, **changes):
    return ApplyRequest(
        names=[world.name],
        out=out,
        model=world.model,
        layer=layer,
        step=1.0,
        direction=Direction.GRADIENT,
        **changes,
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_edits_go_into_the_folder_and_out_again(built, folder, tmp_path, layer):
    from transformers import ChineseCLIPModel

    world = built.copied(tmp_path / "store")
    options = RankOptions(direction=Direction.GRADIENT)
    edit = direct_edit(world.store, world.name, layer=layer, step=1.0, options=options)
    request = request_for(world, layer, tmp_path / "out")
    apply(world.store, request)
    changed, parameter = load(resolve(world.model)), layer.removesuffix(".k")
    rows = changed.get_parameter(parameter).data
    rows = rows if parameter == layer else rows.chunk(3)[1]
    rows += torch.from_numpy(edit.delta())
    written = ChineseCLIPModel.from_pretrained(tmp_path / "out").eval()
    require_same(changed, written, *inputs(world, world.manifest.forget))
    before, after = (load_file(at / "model.safetensors") for at in (folder, tmp_path / "out"))
    assert all(torch.equal(value, after[name]) for name, value in written.state_dict().items())
    assert [name for name in before if not torch.equal(before[name], after[name])] == [
        name
        for name, value in hf_chinese.in_transformers(changed.state_dict()).items()
        if not torch.equal(value, before[name])
    ]
    back = replace(request, model=None, target=tmp_path / "out", out=tmp_path / "back", revert=True)
    apply(world.store, back)
    files = [at / "model.safetensors" for at in (tmp_path / "back", folder)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_layers_are_ranked_for_such_a_folder_and_edits_go_into_it(built, copy, tmp_path):
    world = built.copied(tmp_path / "store")
    options = RankOptions(direction=Direction.GRADIENT, target=str(copy))
    ranked = {score.layer for score in rank(world.store, world.name, options=options).scores}
    assert QUERY in ranked and not any("embeddings" in layer for layer in ranked)
    aimed = replace(request_for(world, QUERY, tmp_path / "aimed"), model=None, target=copy)
    apply(world.store, aimed)
    apply(world.store, request_for(world, QUERY, tmp_path / "out"))
    files = [at / "model.safetensors" for at in (tmp_path / "aimed", tmp_path / "out")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("vision_config", "layer_norm_eps", 1e-6),
        ("vision_config", "hidden_act", "gelu_new"),
        ("vision_config", "num_channels", 4),
        ("text_config", "layer_norm_eps", 0),
        ("text_config", "hidden_act", "mish"),
        ("text_config", "max_position_embeddings", "long"),
        ("text_config", "pad_token_id", None),
        ("text_config", "position_embedding_type", "relative_key"),
    ],
)
def test_models_that_open_clip_cannot_express_are_refused(copy, part, field, value):
    path = copy / "config.json"
    content = json.loads(path.read_text())
    content[part][field] = value
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=f"has {field} .*{value}.*open_clip's ChineseCLIP"):
        resolve(ModelSpec(str(copy)))


def test_a_tokenizer_that_pads_otherwise_is_refused(copy):
    path = copy / "config.json"
    path.write_text(path.read_text().replace('"pad_token_id": 0', '"pad_token_id": 7'))
    with pytest.raises(InputError, match=r"pads texts with 0, .* has pad_token_id 7"):
        tokenizer(resolve(ModelSpec(str(copy))))


def test_a_folder_without_its_tokenizer_says_so(copy):
    (copy / "vocab.txt").unlink()
    with pytest.raises(MissingError, match=r"has no tokenizer_config\.json"):
        tokenizer(resolve(ModelSpec(str(copy))))


def test_missing_keys_of_a_configuration_mean_the_base_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "chinese_clip"}')
    config = model_config(tmp_path)
    assert (config["embed_dim"], config["quick_gelu"]) == (512, True)
    text = config["text_cfg"]
    assert (text["context_length"], text["hf_config"]["max_position_embeddings"]) == (52, 512)


@pytest.mark.parametrize(
    ("layout", "why"),
    [
        (ModelLayout.OPEN_CLIP, "open_clip, which builds a BERT from the name of a repository"),
        (ModelLayout.COMFY, "no place for .*: its text tower is a BERT"),
    ],
)
def test_other_layouts_that_cannot_hold_it_are_refused(built, folder, tmp_path, layout, why):
    with pytest.raises(InputError, match=why):
        other_layout(layout, resolve(built.model), read_target(folder), [], tmp_path)
