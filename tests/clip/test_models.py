import json
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import open_clip
import pytest
import tiny_clip
import torch
from open_clip.factory import _find_checkpoint_in_dir
from safetensors.torch import load_file, save_file

from slsgu_cli.clip import loading, tokenizers
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.model_folder import require_weights
from slsgu_cli.clip.models import PREFERRED, fingerprint, resolve
from slsgu_cli.clip.tokenizers import input_spec
from slsgu_cli.errors import InputError, MissingError, SlsguError, UsageError
from slsgu_cli.records.sets import ModelSpec

WEIGHTS = "open_clip_model.safetensors"
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)


@pytest.fixture(scope="module")
def source(tiny_model):
    return Path(tiny_model.name.removeprefix("local-dir:"))


@pytest.fixture
def folder(source, tmp_path):
    """A model folder of this test's own."""
    return shutil.copytree(source, tmp_path / "clip")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory):
    """The tiny model's architecture as a file of its own."""
    path = tmp_path_factory.mktemp("architecture") / "tiny-shapes.json"
    path.write_text(json.dumps(tiny_clip.CONFIG))
    return path


def local(folder):
    return ModelSpec(f"local-dir:{folder}")


def reconfigure(folder, change):
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def features(module):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = open_clip.SimpleTokenizer(context_length=16)(["a red circle", "blue"])
    with torch.no_grad():
        return torch.cat([module.encode_image(images), module.encode_text(tokens)])


def test_a_model_folder(source):
    found = resolve(local(source))
    assert found.config == tiny_clip.CONFIG
    assert found.weights == source / WEIGHTS
    assert found.folder == source
    assert found.preprocess["mean"] == tiny_clip.PREPROCESS["mean"]
    assert found.preprocess["fill_color"] == 0


def test_a_folder_needs_no_prefix(source):
    bare, prefixed = resolve(ModelSpec(str(source))), resolve(local(source))
    assert replace(bare, spec=prefixed.spec) == prefixed
    assert fingerprint(bare) == fingerprint(prefixed)


def test_an_architecture_file_with_weights(architecture, source):
    found = resolve(ModelSpec(str(architecture), str(source / WEIGHTS)))
    assert (found.weights, found.folder) == (source / WEIGHTS, None)
    assert found.config == tiny_clip.CONFIG
    assert found.preprocess["mean"] == OPENAI_MEAN
    assert fingerprint(found) == fingerprint(resolve(local(source)))
    torch.testing.assert_close(features(load(found)), features(load(resolve(local(source)))))


def test_an_open_clip_name_with_a_file(source):
    found = resolve(ModelSpec("ViT-B-32", str(source / WEIGHTS)))
    assert found.config["embed_dim"] == 512
    assert found.identifier == "ViT-B-32"
    assert found.weights == source / WEIGHTS


def test_an_open_clip_tag_has_its_own_preprocessing(source, monkeypatch):
    fetched = []
    monkeypatch.setattr(
        open_clip, "download_pretrained", lambda tag: fetched.append(tag) or str(source / WEIGHTS)
    )
    found = resolve(ModelSpec("ViT-SO400M-14-SigLIP", "webli"))
    assert (found.preprocess["mean"], found.preprocess["resize_mode"]) == ((0.5,) * 3, "squash")
    assert found.weights == source / WEIGHTS
    assert len(fetched) == 1


def test_a_hub_model(source, monkeypatch):
    asked = []

    def fetch(repository, filename=None):
        asked.append((repository, filename))
        return str(source / (filename or WEIGHTS))

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", fetch)
    found = resolve(ModelSpec("hf-hub:org/tiny"))
    assert asked == [("org/tiny", "open_clip_config.json"), ("org/tiny", None)]
    assert (found.identifier, found.config) == ("hf-hub:org/tiny", tiny_clip.CONFIG)
    assert found.preprocess["std"] == tiny_clip.PREPROCESS["std"]


@pytest.mark.parametrize(
    "error", [OSError("offline"), RuntimeError("offline"), ValueError("offline")]
)
@pytest.mark.parametrize("name", ["hf-hub:org/tiny", "ViT-B-32"])
def test_a_failed_download_is_an_error(name, error, monkeypatch):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr("open_clip.pretrained.download_pretrained_from_hf", fail)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    monkeypatch.setattr(open_clip, "download_pretrained", fail)
    spec = ModelSpec(name, None if ":" in name else "laion2b_s34b_b79k")
    with pytest.raises(MissingError, match=r"cannot fetch .*: offline") as caught:
        resolve(spec)
    assert "connection" in caught.value.hint


def test_an_unknown_name_suggests_similar_ones():
    with pytest.raises(InputError, match=r"has no model ViT-B-33; near: .*ViT-B-32"):
        resolve(ModelSpec("ViT-B-33", "openai"))
    with pytest.raises(InputError, match=r"has no model zzz$"):
        resolve(ModelSpec("zzz"))


def test_a_name_needs_weights(architecture):
    with pytest.raises(UsageError, match="ViT-B-32 needs weights") as error:
        resolve(ModelSpec("ViT-B-32"))
    assert "laion2b_s34b_b79k" in error.value.hint
    with pytest.raises(UsageError, match="tiny-shapes needs weights") as error:
        resolve(ModelSpec(str(architecture)))
    assert "a checkpoint file" in error.value.hint


def test_an_unknown_tag_lists_the_known_ones(architecture):
    with pytest.raises(MissingError, match="neither a file nor a pretrained tag") as error:
        resolve(ModelSpec("ViT-B-32", "laion3b"))
    assert "laion2b_s34b_b79k" in error.value.hint
    with pytest.raises(MissingError, match="neither a file nor a pretrained tag") as error:
        resolve(ModelSpec(str(architecture), "nowhere.pt"))
    assert error.value.hint.endswith("none")


def test_a_missing_architecture_file():
    with pytest.raises(MissingError, match=r"no architecture file nowhere/x\.json"):
        resolve(ModelSpec("nowhere/x.json", "weights.pt"))


def test_a_folder_carries_its_own_weights(source):
    with pytest.raises(UsageError, match="--pretrained openai does not go with local-dir"):
        resolve(replace(local(source), pretrained="openai"))


@pytest.mark.parametrize("content", ["", "{", "[]", "7", "{}", '{"preprocess_cfg": {}}'])
def test_a_folder_with_an_odd_configuration(content, folder):
    (folder / "open_clip_config.json").write_text(content)
    with pytest.raises(InputError, match="not a valid open_clip configuration") as error:
        resolve(local(folder))
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model_cfg": 7},
        {"model_cfg": {}},
        {"model_cfg": {"vision_cfg": 3, "text_cfg": {}}},
        {"model_cfg": {"vision_cfg": {}}},
        {"preprocess_cfg": None},
        {"preprocess_cfg": [1]},
    ],
)
def test_a_folder_with_an_odd_architecture(change, folder):
    reconfigure(folder, lambda content: content.update(change))
    with pytest.raises(InputError, match="not a valid open_clip configuration"):
        resolve(local(folder))


def test_a_folder_without_a_configuration(folder):
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(MissingError, match="not an open_clip model folder") as error:
        resolve(local(folder))
    assert "--pretrained" in error.value.hint
    with pytest.raises(MissingError, match="not an open_clip model folder"):
        resolve(local(folder / "nowhere"))
    for path in (folder, folder / WEIGHTS):
        with pytest.raises(SlsguError, match=r"open_clip_config\.json") as error:
            resolve(ModelSpec(str(path)))
        assert f"--pretrained {folder / WEIGHTS}" in error.value.hint


def test_a_folder_without_weights(folder):
    (folder / WEIGHTS).rename(folder / "weights.data")
    with pytest.raises(MissingError, match="holds no weights"):
        resolve(local(folder))


@pytest.mark.parametrize(
    "names",
    [
        PREFERRED,
        PREFERRED[::-1][:4],
        ("pytorch_model.bin", "aaa.safetensors"),
        ("b.bin", "a.pth", "z.safetensors", "c.safetensors"),
        ("b.bin", "a.pth"),
        ("model.pth", "pytorch_model.pth"),
    ],
)
def test_the_weight_file_is_the_one_that_open_clip_chooses(names, folder):
    (folder / WEIGHTS).unlink()
    for name in names:
        (folder / name).touch()
    assert str(resolve(local(folder)).weights) == _find_checkpoint_in_dir(folder)


def test_loading_gives_a_model_to_take_gradients_of(source):
    module = load(resolve(local(source)))
    assert not module.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    expected = load_file(source / WEIGHTS)
    assert all(torch.equal(p.detach(), expected[n]) for n, p in module.named_parameters())


def test_half_precision_weights_are_widened(folder):
    weights = load_file(folder / WEIGHTS)
    save_file({name: value.half() for name, value in weights.items()}, folder / WEIGHTS)
    module = load(resolve(local(folder)))
    assert torch.equal(module.visual.proj.detach(), weights["visual.proj"].half().float())


def write_script(folder, state):
    """Write weights as TorchScript has them, with a module for each part of a name."""
    root = torch.nn.Module()
    for name, value in state.items():
        *parts, last = name.split(".")
        place = root
        for part in parts:
            if part not in dict(place.named_children()):
                place.add_module(part, torch.nn.Module())
            place = place.get_submodule(part)
        place.register_parameter(last, torch.nn.Parameter(value))
    root.register_buffer("vocab_size", torch.tensor(7))
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(root).save(str(folder / "weights.pt"))


def write_compiled(folder, state):
    """Write weights with the names of a compiled model in several processes."""
    named = {f"module._orig_mod.{name}": value for name, value in state.items()}
    torch.save({"state_dict": named}, folder / "weights.pt")


@pytest.mark.parametrize("write", [write_script, write_compiled])
def test_files_that_open_clip_cannot_read_are_the_same_model(write, architecture, folder):
    write(folder, load_file(folder / WEIGHTS))
    found = resolve(ModelSpec(str(architecture), str(folder / "weights.pt")))
    warned = []
    module = load(found, warn=warned.append)
    assert torch.equal(features(module), features(load(resolve(local(folder)))))
    assert fingerprint(found) == fingerprint(resolve(local(folder)))
    assert [("-quickgelu" in line) for line in warned] == [True] * (write is write_script)
    state = load_file(folder / WEIGHTS)
    write(folder, state | {"visual.proj": state["visual.proj"][:, :3]})
    with pytest.raises(InputError, match=r"cannot load .* do not match the architecture") as error:
        load(found)
    assert "belong to this architecture" in error.value.hint


def damage_cut(folder):
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def damage_noise(folder):
    (folder / WEIGHTS).write_bytes(b"no weights at all" * 99)


def damage_lacking(folder):
    weights = load_file(folder / WEIGHTS)
    del weights["visual.proj"]
    save_file(weights, folder / WEIGHTS)


def damage_shape(folder):
    reconfigure(folder, lambda content: content["model_cfg"].update(embed_dim=12))


@pytest.mark.parametrize("damage", [damage_cut, damage_noise, damage_lacking, damage_shape])
def test_unsuitable_weights_are_reported_in_one_line(damage, folder):
    damage(folder)
    with pytest.raises(InputError, match=f"cannot load local-dir:{folder} from") as error:
        load(resolve(local(folder)))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 700
    assert "complete" in error.value.hint


def test_removed_weights_are_an_error(folder):
    found = resolve(local(folder))
    found.weights.unlink()
    with pytest.raises((InputError, MissingError)):
        fingerprint(found)
    with pytest.raises(InputError):
        load(found)


def test_fingerprints_depend_on_values_and_architecture(folder):
    original = fingerprint(resolve(local(folder)))
    weights = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    assert fingerprint(resolve(local(folder))) == original
    reconfigure(folder, lambda content: content["model_cfg"].update(quick_gelu=True))
    quick = fingerprint(resolve(local(folder)))
    weights["logit_scale"] += 1
    torch.save(weights, folder / "open_clip_pytorch_model.bin")
    assert len({original, quick, fingerprint(resolve(local(folder)))}) == 3


@pytest.fixture
def no_building(source, monkeypatch):
    """Let models that would be downloaded and built be the tiny one."""
    module = load(resolve(local(source)))
    monkeypatch.setattr(open_clip, "download_pretrained", lambda tag: str(source / WEIGHTS))
    monkeypatch.setattr(open_clip, "create_model", lambda *_, **__: module)


@pytest.mark.parametrize(
    ("name", "tag", "trained", "advice"),
    [
        ("ViT-B-32", "laion400m_e32", "QuickGELU", "-quickgelu"),
        ("ViT-B-32", "openai", "QuickGELU", "-quickgelu"),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", "GELU", "plain"),
    ],
)
def test_weights_of_another_activation_are_a_warning(name, tag, trained, advice, no_building):
    warned = []
    load(resolve(ModelSpec(name, tag)), warn=warned.append)
    assert len(warned) == 1
    assert f"{name} ({tag}) was trained with {trained} but" in warned[0]
    assert advice in warned[0]


@pytest.mark.parametrize(
    ("name", "tag"), [("ViT-B-32-quickgelu", "laion400m_e32"), ("ViT-B-32", "laion2b_s34b_b79k")]
)
def test_weights_of_the_right_activation_are_no_warning(name, tag, no_building):
    warned = []
    load(resolve(ModelSpec(name, tag)), warn=warned.append)
    assert warned == []


def test_a_folders_activation_is_its_own(folder):
    reconfigure(folder, lambda content: content["model_cfg"].update(quick_gelu=True))
    warned = []
    module = load(resolve(local(folder)), warn=warned.append)
    assert isinstance(module.visual.transformer.resblocks[0].mlp.gelu, open_clip.model.QuickGELU)
    assert warned == []


def test_inputs_are_the_models(source, demo_model):
    spec = input_spec(resolve(local(source)))
    assert (spec.height, spec.width, spec.context_length) == (32, 32, 16)
    assert spec.mean == tuple(tiny_clip.PREPROCESS["mean"])
    assert (spec.interpolation, spec.resize_mode) == ("bicubic", "shortest")
    other = input_spec(resolve(demo_model))
    assert (other.height, other.context_length) == (64, 32)
    assert other.tokenizer != spec.tokenizer


def test_images_may_be_oblong(folder):
    def widen(content):
        content["model_cfg"]["vision_cfg"]["image_size"] = [16, 48]

    reconfigure(folder, widen)
    spec = input_spec(resolve(local(folder)))
    assert (spec.height, spec.width) == (16, 48)


def test_texts_become_the_models_tokens(source):
    tokens = tokenizers.tokenizer(resolve(local(source)))(["a red circle", ""])
    assert tokens.dtype == np.int32
    expected = open_clip.SimpleTokenizer(context_length=16)(["a red circle", ""])
    assert np.array_equal(tokens, expected.numpy())


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    for name in ("cuda", "cuda:0", "mps", "tpu"):
        with pytest.raises(UsageError, match=f"device {name} is not available") as error:
            pick_device(name)
        assert "(cpu)" in error.value.hint
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto") == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pick_device("auto") == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == "cuda:1"
    for name in ("cuda:2", "cuda:x", "cuda:-1"):
        with pytest.raises(UsageError, match=f"device {name} is not available"):
            pick_device(name)


class Unsafe:
    """What PyTorch loads only if code may run."""

    def __reduce__(self):
        return print, ("loaded",)


def unsafe_script(path):
    torch.jit.trace(torch.nn.Linear(1000, 1000), torch.ones(1, 1000)).save(str(path))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "save",
    [
        lambda path: torch.save({"w": torch.ones(10**6), "more": Unsafe()}, path),
        lambda path: torch.save(
            {"w": torch.ones(10**6)}, path, _use_new_zipfile_serialization=False
        ),
        lambda path: torch.save(
            [Unsafe(), torch.ones(10**6)], path, _use_new_zipfile_serialization=False
        ),
        unsafe_script,
    ],
)
def test_files_that_could_run_code_are_refused(folder, save, capsys):
    (folder / WEIGHTS).unlink()
    save(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(InputError, match="cannot load") as error:
        load(resolve(local(folder)))
    assert "weights_only" not in error.value.message + str(error.value.hint)
    assert capsys.readouterr().out == ""


WRONG = [
    ("model_cfg", "embed_dim", None),
    ("model_cfg", "embed_dim", "24"),
    ("vision_cfg", "image_size", 0),
    ("vision_cfg", "image_size", [32, 32, 32]),
    ("vision_cfg", "layers", -1),
    ("vision_cfg", "width", 1.5),
    ("text_cfg", "heads", 1.5),
    ("text_cfg", "width", [24]),
    ("text_cfg", "tokenizer_kwargs", {"a": 1}),
    ("preprocess_cfg", "mean", 0.5),
    ("preprocess_cfg", "fill_color", "red"),
]


@pytest.mark.parametrize(("part", "field", "value"), WRONG)
def test_an_impossible_configuration_is_refused(folder, part, field, value):
    def change(content):
        config = content["model_cfg"]
        place = {"model_cfg": config, "preprocess_cfg": content["preprocess_cfg"], **config}
        place[part][field] = value

    reconfigure(folder, change)
    with pytest.raises(InputError, match=r"cannot be|parameters|cannot load") as error:
        input_spec(resolve(local(folder)))
        load(resolve(local(folder)))
    assert str(folder) in error.value.message


@pytest.mark.parametrize("text", ["[]", "5", "{}", '{"model_cfg": 5}', "[" * 10**5, "\ud800"])
def test_an_invalid_configuration_is_refused(folder, text):
    (folder / "open_clip_config.json").write_text(text, errors="surrogatepass")
    with pytest.raises(InputError, match="not a valid open_clip configuration"):
        resolve(local(folder))


@pytest.mark.parametrize("text", ["5", "nothing", "[" * 10**5])
def test_an_invalid_architecture_file_is_refused(tmp_path, source, text):
    (tmp_path / "odd.json").write_text(text)
    with pytest.raises(InputError, match=r"odd\.json is not an open_clip architecture"):
        resolve(ModelSpec(str(tmp_path / "odd.json"), str(source / WEIGHTS)))


def test_weights_are_checked_for_a_tower_that_runs_while_it_is_built(folder):
    from timm.layers import HybridEmbed
    from timm.models import register_model
    from timm.models.vision_transformer import VisionTransformer

    def vit_test_hybrid(pretrained=False, **kwargs):
        stem = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 8, 8), torch.nn.BatchNorm2d(8))
        embed = partial(HybridEmbed, backbone=stem, proj=False)
        sizes = {
            "img_size": 32,
            "patch_size": 1,
            "embed_dim": 8,
            "depth": 1,
            "num_heads": 1,
            "num_classes": 0,
        }
        return VisionTransformer(embed_layer=embed, **sizes)

    vit_test_hybrid.__module__ = "timm.models.vision_transformer"
    register_model(vit_test_hybrid)
    vision = {"timm_model_name": "vit_test_hybrid", "timm_proj": None, "image_size": 32}
    reconfigure(folder, lambda content: content["model_cfg"].update(vision_cfg=vision))
    built = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file({k: v.contiguous() for k, v in built.state_dict().items()}, folder / WEIGHTS)
    found = resolve(local(folder))
    shapes = {name: tuple(value.shape) for name, value in built.state_dict().items()}
    assert loading.shapes_of(loading.without_weights(found)) == shapes
    require_weights(found)
