"""What a written folder holds, and when it is said that open_clip loads it."""

import dataclasses
import json

import edit_headers
import numpy as np
import open_clip
import pytest
import tiny_clip
import tiny_targets
from edit_headers import edit
from processes import inside
from transformers import PreTrainedTokenizerFast

from slsgu_cli.checkpoints.clip_weights import ClipWeights
from slsgu_cli.checkpoints.edits import load_edit, write_edit
from slsgu_cli.checkpoints.layouts import clip_shapes
from slsgu_cli.checkpoints.model_card import base_card, edited_card, hub_id
from slsgu_cli.clip import tokenizers
from slsgu_cli.clip.model_folder import tokenizer_files
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import PROBE
from slsgu_cli.engine.apply import apply
from slsgu_cli.records.codec import digest
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.options import ApplyRequest
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.store import Store

LAYER = "visual.proj"
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
OPEN_CLIP = ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]


@pytest.fixture
def demo_clip(tmp_path):
    """A folder of the tiny CLIP."""
    return tiny_clip.write_folder(tmp_path / "tiny")


def write_tokenizer(folder):
    """Write a tokenizer of whole words as transformers saves it."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", *sorted({word for text in PROBE for word in text.split()})]
    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]")
    fast.save_pretrained(folder)
    return folder


def ids(model):
    return open_clip.get_tokenizer(str(model))(list(PROBE)).tolist()


def write_architecture(folder, tokenizer=None, **changes):
    """Write an architecture and a file of weights, apart; return the model they name."""
    folder.mkdir(exist_ok=True)
    tokenizers._tokenizer.cache_clear()
    config = json.loads(json.dumps(tiny_clip.CONFIG | changes))
    if tokenizer is not None:
        config["text_cfg"]["hf_tokenizer_name"] = str(tokenizer)
    (folder / "words.json").write_text(json.dumps(config))
    weights = tiny_targets.save(tiny_clip.fresh_model().state_dict(), folder / "w.safetensors")
    return ModelSpec(str(folder / "words.json"), str(weights))


def applied(tmp_path, model, weights, **options):
    store = Store(str(tmp_path / "store"))
    before = ClipWeights.of_file(weights).layer(LAYER)
    write_edit(store, edit(LAYER, 0 * before + 0.1, before))
    request = {"names": ["facebook"], "model": model, "out": tmp_path / "out"} | options
    return apply(store, ApplyRequest(**request))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("changes", [{}, {"mlp_ratio": 2.5}])
def test_shapes_of_a_plain_configuration_are_those_that_open_clip_builds(changes):
    towers = {name: tiny_clip.CONFIG[name] | changes for name in ("vision_cfg", "text_cfg")}
    config = tiny_clip.CONFIG | towers
    built = tiny_clip.fresh_model(config).state_dict()
    assert clip_shapes(config) == {name: tuple(value.shape) for name, value in built.items()}


@pytest.mark.parametrize(
    "changes",
    [{"custom_text": True}, {"init_logit_bias": -10}, {"vision_cfg": {"timm_model_name": "x"}}],
)
def test_shapes_of_other_configurations_are_left_to_open_clip(changes):
    assert clip_shapes(tiny_clip.CONFIG | changes) is None


@pytest.mark.parametrize("told", ["with its class", "without its class"])
def test_a_model_named_by_its_architecture_is_written_with_its_tokenizer(tmp_path, told):
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    if told == "without its class":
        # As the oldest repositories of the hub have it: their config.json says which it is.
        said = json.loads((tokenizer / "tokenizer_config.json").read_text())
        del said["tokenizer_class"]
        (tokenizer / "tokenizer_config.json").write_text(json.dumps(said))
        (tokenizer / "config.json").write_text('{"model_type": "bert"}')
    model = write_architecture(tmp_path / "model", tokenizer)
    result = applied(tmp_path, model, tmp_path / "model/w.safetensors")
    assert result.model == f"local-dir:{tmp_path / 'out'}"
    assert names(tmp_path / "out") == sorted([*OPEN_CLIP, *TOKENIZER])
    assert ids(result.model) == ids(resolve(model).identifier)
    assert ids(result.model) != ids("ViT-B-32")
    open_clip.create_model(result.model)
    again = applied(tmp_path, model, tmp_path / "model/w.safetensors", overwrite=True)
    assert again.model == result.model


def test_a_model_of_the_hub_is_written_with_the_tokenizer_of_its_snapshot(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place = tmp_path / "cache" / "models--org--words"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    snapshot = write_tokenizer(place / "snapshots" / ("0" * 40))
    spec = write_architecture(tmp_path / "model", "org/words")
    files = tokenizer_files(resolve(spec), tmp_path / "scratch")
    assert files == {name: snapshot / name for name in TOKENIZER}


def test_clips_own_tokenizer_needs_no_files(tmp_path):
    model = write_architecture(tmp_path / "model")
    result = applied(tmp_path, model, tmp_path / "model/w.safetensors")
    assert names(tmp_path / "out") == OPEN_CLIP
    assert result.model == f"local-dir:{tmp_path / 'out'}"


def test_a_folder_without_its_tokenizer_is_not_said_to_load(tmp_path, listener):
    model = write_architecture(tmp_path / "model", tmp_path / "no-tokenizer")
    result = applied(tmp_path, model, tmp_path / "model/w.safetensors")
    assert result.model is None
    assert names(tmp_path / "out") == OPEN_CLIP
    assert any("no-tokenizer" in text and "cannot be written" in text for text in listener.heard)
    assert any("open_clip may not load" in text for text in listener.heard)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"embed_dim": 20}, "another shape for text_projection and 1 more"),
        ({"text_cfg": tiny_clip.CONFIG["text_cfg"] | {"layers": 2}}, "has no place for transfor"),
        ({"vision_cfg": tiny_clip.CONFIG["vision_cfg"] | {"layers": 4}}, "its weights lack visual"),
        ({"custom_text": True, "init_logit_bias": -10.0, "embed_dim": 20}, "another shape for"),
    ],
)
def test_a_configuration_of_another_model_is_reported_without_promises(
    tmp_path, changes, reason, listener
):
    model = write_architecture(tmp_path / "model", **changes)
    result = applied(tmp_path, model, tmp_path / "model/w.safetensors")
    assert result.model is None
    assert any(reason in text for text in listener.heard)


def test_weights_without_the_names_of_a_text_tower_of_its_own_are_known_to_load(tmp_path):
    model = write_architecture(tmp_path / "model", custom_text=True, init_logit_bias=-10.0)
    result = applied(tmp_path, model, tmp_path / "model/w.safetensors")
    assert result.model == f"local-dir:{tmp_path / 'out'}"
    open_clip.create_model(result.model)


def test_the_loading_line_is_printed_only_if_loading_was_checked(tmp_path):
    good = write_architecture(tmp_path / "good")
    bad = write_architecture(tmp_path / "bad", embed_dim=20)
    for model, loads in ((good, True), (bad, False)):
        out = tmp_path / f"out-{loads}"
        applied(tmp_path, model, tmp_path / "good/w.safetensors", out=tmp_path / f"api-{loads}")
        words = ["apply", "facebook", "-m", model.name, "-p", model.pretrained, "--out", str(out)]
        done = inside(*words, store=tmp_path / "store")
        assert (f"open_clip loads it as local-dir:{out}" in done.stderr) is loads
        assert done.exit_code == 0


def card(folder):
    return (folder / "README.md").read_text()


def test_a_written_folder_has_a_card_that_says_what_is_in_it(tmp_path):
    model = write_architecture(tmp_path / "model")
    applied(tmp_path, model, tmp_path / "model/w.safetensors")
    text = card(tmp_path / "out")
    (header,) = [load_edit(Store(str(tmp_path / "store")), "facebook").header]
    front = text.split("---\n")[1]
    assert "tags:\n- clip\n- machine-unlearning\n" in front
    assert "# `words (w.safetensors)` without `facebook`" in text
    assert "Nothing was measured." in text and "base_model" not in text and "license" not in text
    assert digest(header) in text and header.model_fingerprint in text
    assert str(tmp_path) not in text


def test_a_card_has_figures_of_test_rows(tmp_path):
    before, after = Accuracy(98.0, 100.0, 50, True), Accuracy(2.0, 4.0, 50, True)
    layer = np.ones((2, 2), np.float32)
    header = dataclasses.replace(
        edit_headers.header(LAYER, layer, name="face|book"),
        baseline_forget=before,
        forget=after,
        baseline_utility={"brands": before},
        utility={"brands": after},
    )

    def written(present, name, **options):
        request = ApplyRequest(names=[name], out=tmp_path, **options)
        edits = [dataclasses.replace(header, name=name, concept=name)]
        spec = ModelSpec("hf-hub:org/clip")
        return edited_card(present, edits, [], spec=spec, place=tmp_path, options=request)

    text = written(None, "face|book", scale=0.5)
    assert "base_model: org/clip" in text
    row = "| `face book` | TA@1 brands | 98.00% | 2.00% | 50 test images |"
    assert row in text
    assert "| scale 0.5 |" in text
    both = written(text, "other")
    assert both == written(written(None, "other"), "face|book", scale=0.5)
    assert "# `org/clip` without `face book`, `other`" in both and row in both
    assert written(both, "other", revert=True) == text
    assert written(None, "other", revert=True) is None


def test_the_card_of_the_base_model_stays_and_comes_back_to_the_byte(tmp_path, demo_clip):
    theirs = "---\nlicense: mit\n---\n# Théirs\n\nlicense: gpl\n"
    (demo_clip / "README.md").write_text(theirs)
    base = ModelSpec(f"local-dir:{demo_clip}")
    weights = demo_clip / "open_clip_model.safetensors"
    applied(tmp_path, base, weights)
    once = card(tmp_path / "out")
    assert once.endswith(theirs) and "\nlicense: mit\n" in once.partition("\n---")[0]
    edited = ModelSpec(f"local-dir:{tmp_path / 'out'}")
    request = {"names": ["facebook"], "model": edited, "out": tmp_path / "back", "revert": True}
    apply(Store(str(tmp_path / "store")), ApplyRequest(**request))
    assert card(tmp_path / "back") == theirs
    assert base_card(None) is None and base_card(once) == theirs


def test_a_card_that_is_not_utf8_survives_a_dry_run_and_a_copy(tmp_path, demo_clip):
    theirs = b"# Th\xe9irs\n"
    (demo_clip / "README.md").write_bytes(theirs)
    base = ModelSpec(f"local-dir:{demo_clip}")
    applied(tmp_path, base, demo_clip / "open_clip_model.safetensors")
    assert (tmp_path / "out/README.md").read_bytes().endswith(theirs)
    request = ApplyRequest(names=["facebook"], model=base, out=tmp_path / "rehearsed", dry_run=True)
    assert apply(Store(str(tmp_path / "store")), request).model is not None
    assert not (tmp_path / "rehearsed").exists()


def test_a_card_knows_its_base_by_name_tag_or_configuration(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_name_or_path": "org/diffusion"}')
    assert hub_id(ModelSpec("hf-hub:org/clip"), tmp_path) == "org/clip"
    assert hub_id(None, tmp_path) == "org/diffusion"
    assert hub_id(None, tmp_path / "models--org--clip/snapshots/0") == "org/clip"
    tag = ModelSpec("ViT-B-32", "laion2b_s34b_b79k")
    assert hub_id(tag, tmp_path) == "laion/CLIP-ViT-B-32-laion2B-s34B-b79K"
    assert hub_id(ModelSpec("local-dir:x"), tmp_path / "x") is None
