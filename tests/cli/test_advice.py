"""What is near to what is meant is refused with what to do: other models, tables, addresses."""

import json
import shutil

import pytest
from places import DEMO
from tiny_images import write_folder

from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import CollectRequest, Concept, ModelSpec
from slsgu_cli.sets.collection import collect
from slsgu_cli.sources.grammar import expand, parse_source
from slsgu_cli.store.store import Store

NAFLEX = {"architectures": ["Siglip2Model"], "model_type": "siglip2"}
ALIGN = {"architectures": ["AlignModel"], "model_type": "align"}
GEMMA = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "model_type": "gemma3",
    "vision_config": {"model_type": "siglip_vision_model"},
}
PIXTRAL = {
    "architectures": ["LlavaForConditionalGeneration"],
    "model_type": "llava",
    "vision_config": {"model_type": "pixtral"},
}
QWEN = {"architectures": ["Qwen2VLForConditionalGeneration"], "model_type": "qwen2_vl"}


def folder(at, config):
    return write_folder(at / "other", {"config.json": json.dumps(config)})


@pytest.mark.parametrize("prefix", ["", "local-dir:"])
@pytest.mark.parametrize(
    ("config", "kind", "hint"),
    [
        (NAFLEX, "Siglip2Model", "a SiglipModel such as google/siglip2-base-patch16-224"),
        (ALIGN, "AlignModel", "CLIPModel, MetaClip2Model, SiglipModel, ChineseCLIPModel)"),
    ],
)
def test_other_models_of_transformers_are_named(tmp_path, prefix, config, kind, hint):
    with pytest.raises(MissingError, match=rf"no open_clip_config\.json, and .* {kind}") as caught:
        resolve(ModelSpec(prefix + folder(tmp_path, config)))
    assert hint in caught.value.hint


def test_a_folder_without_a_model_is_not_taken_for_weights(tmp_path):
    with pytest.raises(MissingError, match=r"it has no open_clip_config\.json") as caught:
        resolve(ModelSpec(str(tmp_path)))
    assert f"--pretrained {tmp_path}" not in caught.value.hint


def test_an_address_of_the_hub_is_spelt_as_open_clip_does():
    with pytest.raises(InputError) as caught:
        resolve(ModelSpec("hf://openai/clip"))
    assert caught.value.hint == "--model hf-hub:openai/clip"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NAFLEX, r"is a Siglip2Model \(siglip2\), SigLIP 2 as NaFlex"),
        (GEMMA, r"is a Gemma3.* \(gemma3\), and slsgu does not know how it uses a CLIP"),
        (PIXTRAL, r"is a Llava.* \(llava\), whose vision tower is a pixtral"),
        (QWEN, r"is a Qwen2VL.* \(qwen2_vl\), and slsgu does not know how it uses a CLIP"),
        (ALIGN, r"holds no weights of a CLIP: it is a AlignModel \(align\)"),
    ],
)
def test_targets_with_towers_of_no_known_kind_are_refused(tmp_path, config, message):
    with pytest.raises(InputError, match=message):
        read_target(tmp_path / folder(tmp_path, config))


def test_a_missing_tokenizer_is_distinguished_from_missing_weights(tmp_path):
    shutil.copytree(DEMO / "clip", tmp_path / "clip")
    path = tmp_path / "clip/open_clip_config.json"
    config = json.loads(path.read_text())
    config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "owner/tokens"
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot load the tokenizer of local-dir:") as caught:
        tokenizer(resolve(ModelSpec(f"local-dir:{tmp_path}/clip")))
    assert "put the files of owner/tokens next to the weights" in caught.value.hint


@pytest.mark.parametrize("name", ["urls.csv", "urls.jsonl"])
def test_metadata_as_text_is_converted(tmp_path, name):
    path = f"{write_folder(tmp_path, {name: 'URL,TEXT'})}/{name}"
    wanted = CollectRequest(concepts=(Concept("dog", ("dog",), ()),), metadata=(path,))
    request = BuildRequest(name="dog", model=ModelSpec("unused"), collect=wanted)
    with pytest.raises(InputError, match="--metadata takes parquet") as caught:
        collect(Store(str(tmp_path / "store")), request, wanted)
    assert f"read_{'json' if 'json' in name else 'csv'}('{path}')" in caught.value.hint


def test_a_dataset_of_the_hub_has_its_own_address(monkeypatch):
    def unknown(path):
        raise ValueError(f"{path}: Invalid repo id")

    monkeypatch.setattr("fsspec.core.url_to_fs", unknown)
    with pytest.raises(InputError, match="Invalid repo id") as caught:
        expand(parse_source("hf://owner/name/*.parquet"))
    assert "hf://datasets/OWNER/NAME" in caught.value.hint
