"""A CLIPModel of transformers as a model: the same weights, gradients and edits."""

import json
import shutil

import hf_clip
import pytest
import tiny_clip
import tiny_targets
import torch
from safetensors.torch import load_file

from slsgu_cli.checkpoints.clip_weights import ClipWeights
from slsgu_cli.checkpoints.transformers_families import model_config
from slsgu_cli.checkpoints.transformers_inputs import preprocess_config
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import fingerprint, model_layer, plain_config, resolve
from slsgu_cli.clip.tokenizers import input_spec
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.set_edits import direct_edit
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.options import ApplyRequest, PassOptions, RankOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact, read_manifest, read_pointer
from slsgu_cli.store.blocks import DataBlock

TEXT = "transformer.resblocks.1.attn.in_proj_weight"


@pytest.fixture(scope="module")
def state(shared_world):
    return load_file(shared_world.folder / "open_clip_model.safetensors")


@pytest.fixture(scope="module")
def folder(state, tmp_path_factory):
    """The tiny CLIP as transformers saves it; do not write to it."""
    return hf_clip.write_folder(tmp_path_factory.mktemp("hf") / "clip", state)


@pytest.fixture
def copy(folder, tmp_path):
    return shutil.copytree(folder, tmp_path / "clip")


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_it_is_the_same_model(folder, shared_world, state):
    ours, theirs = resolve(shared_world.model), resolve(ModelSpec(str(folder)))
    assert plain_config(theirs.config) == plain_config(ours.config)
    assert fingerprint(theirs) == fingerprint(ours)
    assert input_spec(theirs) == input_spec(ours)
    loaded = load(theirs).state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], state[name]) for name in state)


def test_shards_and_other_containers_are_the_same_model(tmp_path, copy, state, shared_world):
    weights = tiny_targets.transformers_weights(state)
    (copy / "model.safetensors").unlink()
    tiny_targets.save_shards(weights, copy, 3)
    spec = ModelSpec(f"local-dir:{copy}")
    assert fingerprint(resolve(spec)) == fingerprint(resolve(shared_world.model))
    for path in copy.glob("model*"):
        path.unlink()
    half = {name: value.half().float() for name, value in weights.items()}
    tiny_targets.save(half, copy / "pytorch_model.bin")
    ours = {name: value.half().float() for name, value in state.items()}
    other = tiny_clip.write_folder(tmp_path / "ours")
    tiny_targets.save(ours, other / "open_clip_model.safetensors")
    assert fingerprint(resolve(spec)) == fingerprint(resolve(ModelSpec(f"local-dir:{other}")))


def test_gradients_are_found_again_and_are_transformers_own(folder, world, state):
    store, name = world.store, world.name
    before = world.pointer
    result = compute_gradients(store, name, model=ModelSpec(str(folder)), options=PassOptions())
    assert result.computed == ()
    assert (result.pointer.forget, result.pointer.retain) == (before.forget, before.retain)
    expected = plain_gradient(hf_clip.model(state), store, read_manifest(store, name))
    stored = store.read_tensors(Artifact.GRADIENT.path(before.forget))
    tensors = {key: torch.from_numpy(value) for key, value in stored.items()}
    found = tiny_targets.transformers_weights(tensors)
    compared = [key for key in found if expected[key] is not None]
    assert len(compared) > 80
    for key in compared:
        scale = expected[key].abs().max()
        torch.testing.assert_close(
            found[key], expected[key], rtol=1e-3, atol=float(1e-4 * scale + 1e-7)
        )


def plain_gradient(model, store, manifest):
    """Return the mean gradient of the forget loss over mini-batches, by transformers alone."""
    block = DataBlock.open(store, manifest.forget)
    images = torch.from_numpy(block.images(0, block.rows))
    tokens = torch.from_numpy(block.tokens)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (manifest.input.mean, manifest.input.std))
    starts = range(0, block.rows, 16)
    for start in starts:
        rows = slice(start, start + 16)
        pixels = (images[rows].permute(0, 3, 1, 2) / 255 - mean) / std
        answer = model(input_ids=tokens[rows].long(), pixel_values=pixels)
        loss = (1 - (answer.image_embeds * answer.text_embeds).sum(-1)).mean()
        (loss / len(starts)).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def made_by_hand(world):
    options = RankOptions(direction=Direction.GRADIENT)
    return direct_edit(world.store, world.name, layer=TEXT, step=1.0, options=options)


def applied(world, model, out):
    request = ApplyRequest(
        names=[world.name],
        out=out,
        model=model,
        layer=TEXT,
        step=1.0,
        direction=Direction.GRADIENT,
    )
    return apply(world.store, request)


def test_edits_go_both_ways(folder, world, tmp_path):
    from transformers import CLIPModel

    spec = ModelSpec(str(folder))
    edit = made_by_hand(world)
    assert edit.header.layout == "open_clip"
    applied(world, spec, tmp_path / "hf")
    compute_gradients(world.store, world.name, model=spec, options=PassOptions())
    there = made_by_hand(world)
    assert there.header.layout == "transformers"
    assert (there.delta() == edit.delta()).all() and there.header.digests == edit.header.digests
    applied(world, world.model, tmp_path / "oc")
    ours, theirs = ModelSpec(f"local-dir:{tmp_path / 'oc'}"), ModelSpec(str(tmp_path / "hf"))
    assert fingerprint(resolve(ours)) == fingerprint(resolve(theirs))
    assert fingerprint(resolve(ours)) != fingerprint(resolve(world.model))
    assert (model_layer(resolve(spec), TEXT) == there.before()).all()
    theirs_loaded, ours_loaded = CLIPModel.from_pretrained(tmp_path / "hf"), load(resolve(ours))
    texts = torch.from_numpy(DataBlock.open(world.store, world.manifest.forget).tokens).long()
    with torch.no_grad():
        features = theirs_loaded.get_text_features(input_ids=texts)
        features = getattr(features, "pooler_output", features)
        torch.testing.assert_close(features, ours_loaded.encode_text(texts), rtol=0, atol=1e-4)


def test_a_folder_in_both_layouts_is_edited_in_both(folder, world, tmp_path):
    both = shutil.copytree(world.folder, tmp_path / "both")
    for path in folder.iterdir():
        shutil.copyfile(path, both / path.name)
    result = applied(world, ModelSpec(f"local-dir:{both}"), tmp_path / "out")
    assert result.model == f"local-dir:{tmp_path / 'out'}"
    ours = load_file(tmp_path / "out/open_clip_model.safetensors")
    theirs = load_file(tmp_path / "out/model.safetensors")
    expected = tiny_targets.transformers_weights(ours)
    assert all(torch.equal(theirs[name], expected[name]) for name in expected)
    assert not torch.equal(ours[TEXT], load_file(both / "open_clip_model.safetensors")[TEXT])


@pytest.mark.parametrize(
    ("part", "field", "value"),
    [
        ("text_config", "layer_norm_eps", 1e-6),
        ("vision_config", "hidden_act", "relu"),
        ("vision_config", "hidden_act", "quick_gelu"),
        ("text_config", "vocab_size", 99),
        ("text_config", "eos_token_id", 7),
    ],
)
def test_models_that_open_clip_cannot_express_are_refused(copy, part, field, value):
    rewrite(copy / "config.json", lambda content: content[part].update({field: value}))
    with pytest.raises(InputError, match=f"has {field} .*{value}"):
        resolve(ModelSpec(str(copy)))


def test_missing_keys_of_an_old_configuration_have_its_defaults(tmp_path):
    old = {
        "model_type": "clip",
        "text_config": {"eos_token_id": 2},
        "vision_config": {},
        "text_config_dict": {"hidden_size": 768},
        "vision_config_dict": None,
    }
    tiny_targets.write_json(tmp_path / "config.json", old)
    config = model_config(tmp_path)
    assert config["quick_gelu"] and config["embed_dim"] == 512
    assert config["text_cfg"]["width"] == 768 and config["vision_cfg"]["patch_size"] == 32


def test_preprocessing_is_read_in_its_spellings(tmp_path):
    assert preprocess_config(tmp_path) == {}
    told = {
        "image_mean": [0.5] * 3,
        "resample": 2,
        "size": {"height": 32, "width": 32},
        "do_center_crop": False,
    }
    tiny_targets.write_json(tmp_path / "processor_config.json", {"image_processor": told})
    expected = {"mean": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
    assert preprocess_config(tmp_path) == expected
    tiny_targets.write_json(tmp_path / "preprocessor_config.json", {"size": 32})
    assert preprocess_config(tmp_path) == {"interpolation": "bicubic", "resize_mode": "shortest"}
    sides = {"size": {"height": 32, "width": 32}, "do_center_crop": True}
    tiny_targets.write_json(tmp_path / "preprocessor_config.json", sides)
    assert preprocess_config(tmp_path) == {"interpolation": "bicubic", "resize_mode": "squash"}
    tiny_targets.write_json(tmp_path / "preprocessor_config.json", {"resample": 0})
    with pytest.raises(InputError, match="resample 0"):
        preprocess_config(tmp_path)


def test_another_tokenizer_is_refused(copy):
    from open_clip import SimpleTokenizer

    words = dict(SimpleTokenizer().encoder)
    tiny_targets.write_json(copy / "vocab.json", words)
    input_spec(resolve(ModelSpec(str(copy))))
    words["cat</w>"], words["dog</w>"] = words["dog</w>"], words["cat</w>"]
    tiny_targets.write_json(copy / "vocab.json", words)
    with pytest.raises(InputError, match="its own vocabulary"):
        input_spec(resolve(ModelSpec(str(copy))))


def test_weights_that_are_not_a_whole_clip_are_refused(copy, state):
    (copy / "model.safetensors").unlink()
    with pytest.raises(MissingError, match="no weights of a whole CLIP"):
        ClipWeights.of_folder(copy)
    weights = tiny_targets.transformers_weights(state)
    del weights["visual_projection.weight"]
    tiny_targets.save(weights, copy / "model.safetensors")
    with pytest.raises(InputError, match=r"holds no visual_projection\.weight"):
        ClipWeights.of_folder(copy)


def test_pointer_names_the_folder(folder, world):
    compute_gradients(world.store, world.name, model=ModelSpec(str(folder)), options=PassOptions())
    pointer = read_pointer(world.store, read_manifest(world.store, world.name))
    assert pointer.model == ModelSpec(str(folder))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub's own cache, without a connection; returns a function that puts a folder there."""
    return tiny_targets.cache_of_hub(monkeypatch, tmp_path / "hub")


@pytest.mark.parametrize("container", ["model.safetensors", "pytorch_model.bin"])
def test_a_hub_model_of_transformers_is_the_folders(hub, copy, state, world, tmp_path, container):
    if container.endswith(".bin"):
        (copy / "model.safetensors").unlink()
        tiny_targets.save(tiny_targets.transformers_weights(state), copy / container)
    place = hub(copy, "tiny")
    spec = ModelSpec("hf-hub:org/tiny")
    found = resolve(spec)
    assert (found.spec, found.folder, found.weights) == (spec, place, place / container)
    assert fingerprint(found) == fingerprint(resolve(world.model))
    assert input_spec(found) == input_spec(resolve(world.model))
    assert all(torch.equal(value, state[name]) for name, value in load(found).state_dict().items())
    compute_gradients(world.store, world.name, model=spec, options=PassOptions())
    result = applied(world, spec, tmp_path / "out")
    assert [file.path for file in result.files] == [str(tmp_path / "out" / container)]
    applied(world, ModelSpec(str(copy)), tmp_path / "local")
    assert "base_model: org/tiny" in (tmp_path / "out" / "README.md").read_text()
    for path in (path for path in (tmp_path / "local").iterdir() if path.suffix != ".md"):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes(), path.name


def test_other_repositories_of_the_hub_are_recognised(hub, copy):
    with pytest.raises(MissingError, match="cannot fetch hf-hub:org/none from the hub") as caught:
        resolve(ModelSpec("hf-hub:org/none"))
    assert "connection" in caught.value.hint
    (copy / "model.safetensors").unlink()
    hub(copy, "empty")
    with pytest.raises(InputError, match=r"org/empty has no weights that slsgu reads"):
        resolve(ModelSpec("hf-hub:org/empty"))
    rewrite(copy / "config.json", lambda content: content.update(model_type="bert"))
    hub(copy, "bert")
    with pytest.raises(InputError, match=r"org/bert is not a CLIP .* open_clip_config\.json"):
        resolve(ModelSpec("hf-hub:org/bert"))
