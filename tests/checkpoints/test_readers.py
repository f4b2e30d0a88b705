"""What reads the prompts of SDXL, Stable Diffusion 3 and FLUX, and edits of several encoders."""

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
from edit_headers import edit
from safetensors.torch import load_file
from tiny_targets import save, tower, transformers_weights, under, write_json
from worlds import Listener

from slsgu_cli.checkpoints.apply import apply_edits
from slsgu_cli.checkpoints.edits import by_origin, write_edit
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.naming_schemes import tensor_places
from slsgu_cli.checkpoints.target_layers import encoder_of_target
from slsgu_cli.checkpoints.targets import Family, prompt_note, read_target, with_edits
from slsgu_cli.cli.apply import show_applied
from slsgu_cli.engine.find_edits import Presence, find_edits
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.method.layers import is_candidate
from slsgu_cli.records.method import Tower
from slsgu_cli.records.options import ApplyOptions, StrengthOptions
from slsgu_cli.store.store import Store
from slsgu_cli.targets.models import LiveEncoder

LAYER = "transformer.resblocks.1.mlp.c_proj.weight"
READ = {
    "sdxl": "text_encoder (CLIP: the penultimate hidden state) and text_encoder_2 (CLIP: the "
    "penultimate hidden state and the projected pooled vector); edits go into text_encoder, and "
    "text_encoder_2 reads them as before",
    "sd3": "text_encoder (CLIP: the penultimate hidden state and the projected pooled vector), "
    "text_encoder_2 (CLIP: the penultimate hidden state and the projected pooled vector) and "
    "text_encoder_3 (T5: every token); edits go into text_encoder, and text_encoder_2 and "
    "text_encoder_3 read them as before",
    "flux": "text_encoder (CLIP: the pooled vector alone) and text_encoder_2 (T5: every token); "
    "edits go into text_encoder, and text_encoder_2 reads them as before",
}


@pytest.fixture(scope="module")
def states(tiny_model):
    """The weights of both CLIPs, by the name of their encoder."""
    folder = tiny_model.name.removeprefix("local-dir:")
    return {
        "text_encoder": load_file(f"{folder}/open_clip_model.safetensors"),
        "text_encoder_2": tiny_pipelines.second_clip().state_dict(),
    }


def note(target):
    """Return what is told of a target whose first encoder is edited."""
    return prompt_note(str(target.path), with_edits(target.readers, ["text_encoder"]))


def text_layers(state):
    return {
        name: tuple(value.shape)
        for name, value in state.items()
        if is_candidate(name) and Layer.parse(name).tower is Tower.TEXT
    }


@pytest.mark.parametrize("kind", tiny_pipelines.KINDS)
def test_influential_layers_are_those_with_a_gradient_in_diffusers(kind, tiny_pipeline, states):
    diffusers = pytest.importorskip("diffusers")
    target = read_target(tiny_pipeline(kind))
    assert target.family == kind
    loaded = diffusers.DiffusionPipeline.from_pretrained(target.path, local_files_only=True)
    made = loaded.encode_prompt(*["a blue circle"] * len(target.readers))
    sum(each.float().square().sum() for each in made if each is not None).backward()
    for encoder in target.encoders:
        live = LiveEncoder.find(getattr(loaded, encoder.name), encoder)
        parameters = dict(live.module.named_parameters())
        shapes = text_layers(states[encoder.name])
        kinds, _ = encoder_of_target(kind, shapes, encoder=encoder.name)
        for layer in shapes:
            # A text encoder that is not projected has no such tensor.
            places = [place.key for place in tensor_places(layer, live.tower_place)]
            held = [parameters[key].grad for key in places if key in parameters]
            moved = any(each is not None and each.count_nonzero() for each in held)
            assert moved == (encoder.why_not(layer) is None), layer
            assert kinds.why_not(layer) == encoder.why_not(layer)


@pytest.mark.parametrize("kind", tiny_pipelines.KINDS)
def test_a_note_names_all_readers_of_prompts(kind, tiny_pipeline, states):
    path = tiny_pipeline(kind)
    by_path, by_kind = (
        encoder_of_target(name, text_layers(states["text_encoder"]), encoder=None)[1]
        for name in (str(path), kind)
    )
    assert by_path == by_kind
    told = note(read_target(path))
    assert told == f"prompts of {path} are read by {READ[kind]}"


def test_two_encoders_are_edited_by_one_command_and_back(tiny_pipeline, states, tmp_path):
    path = tiny_pipeline("sdxl")
    edits, store = both_edits(states), Store(str(tmp_path / "store"))
    listener = Listener()
    result = apply_edits(edits, read_target(path), tmp_path / "out", options=ApplyOptions())
    assert [(reader.name, reader.edited) for reader in result.readers] == [
        ("text_encoder", True),
        ("text_encoder_2", True),
    ]
    assert listener.heard[-1].endswith("edits go into all of them")
    # On a terminal, their files of one name are told apart.
    tables = []
    show_applied(SimpleNamespace(table=lambda *table, **_: tables.append(table)), result)
    ((_, (file, *_), rows),) = tables
    files = [f"{name}/model.safetensors" for name in states]
    assert [file.shown(row[0]) for row in rows] == files
    for name, state in states.items():
        written, before = (
            load_file(folder / name / "model.safetensors") for folder in (tmp_path / "out", path)
        )
        theirs = transformers_weights({LAYER: state[LAYER] + 0.5})
        ((key, expected),) = theirs.items()
        key = next(known for known in before if known.endswith(key.removeprefix("text_model.")))
        torch.testing.assert_close(written[key], expected)
        assert all(torch.equal(written[k], v) for k, v in before.items() if k != key)
    for each in edits:
        write_edit(store, each)
    found = find_edits(store, ["one", "two"], tmp_path / "out", StrengthOptions())
    assert [each.presence for each in found] == [Presence.IN] * 2
    back = ApplyOptions(revert=True)
    apply_edits(edits, read_target(tmp_path / "out"), tmp_path / "back", options=back)
    for name in states:
        file = f"{name}/model.safetensors"
        assert (tmp_path / "back" / file).read_bytes() == (path / file).read_bytes()


def both_edits(states):
    return [
        edit(LAYER, np.full(state[LAYER].shape, 0.5, np.float32), state[LAYER].numpy(), name=name)
        for name, state in zip(("one", "two"), states.values(), strict=True)
    ]


def test_edits_are_grouped_by_the_weights_they_were_made_for(states, tmp_path, tiny_pipeline):
    first, second = both_edits(states)
    values = states["text_encoder"][LAYER].numpy()
    half = edit(LAYER, np.ones_like(values), values.astype(np.float16).astype(np.float32))
    apart = [[each.header.name for each in group] for group in by_origin([second, half, first])]
    assert apart == [["two"], ["facebook", "one"]]
    foreign = edit(LAYER, first.delta(), values + 1, name="foreign")
    with pytest.raises(StaleError, match="is not the layer that the edit foreign was made for"):
        apply_edits(
            [first, foreign],
            read_target(tiny_pipeline("sdxl")),
            tmp_path / "no",
            options=ApplyOptions(),
        )
    # By force, both move the layer of the encoder that has its shape.
    force = ApplyOptions(force=True)
    result = apply_edits(
        [first, foreign, second],
        read_target(tiny_pipeline("sdxl")),
        tmp_path / "out",
        options=force,
    )
    assert [file.changes[0].edits for file in result.files] == [("foreign", "one"), ("two",)]


def test_single_files_of_comfyui_are_read(states, tmp_path):
    first, second = (tower(state, "text") for state in states.values())
    t5 = {"text_encoders.t5xxl.transformer.shared.weight": torch.ones(2, 2)}
    weights = under("text_encoders.clip_l.transformer.", first) | t5
    double = {"model.diffusion_model.double_blocks.0.img_attn.proj.weight": torch.ones(2, 2)}
    flux = read_target(save(weights | double, tmp_path / "flux.safetensors"))
    assert flux.family is Family.FLUX
    assert note(flux).endswith(READ["flux"])
    weights |= under("text_encoders.clip_g.transformer.", second)
    sd3 = read_target(save(weights, tmp_path / "sd3.safetensors"))
    assert (sd3.family, [each.name for each in sd3.encoders]) == (
        Family.SD3,
        ["text_encoder", "text_encoder_2"],
    )
    assert sd3.encoders[1].prefix.startswith("text_encoders.clip_g.")
    assert note(sd3).endswith(READ["sd3"])


def test_pipelines_without_a_clip_and_unknown_encoders_are_refused(tmp_path, tiny_pipeline, states):
    parts = {"text_encoder": ["transformers", "Mistral3ForConditionalGeneration"]}
    write_json(tmp_path / "model_index.json", {"_class_name": "Flux2Pipeline"} | parts)
    told = "it is a Flux2Pipeline, whose prompts are read by Mistral3ForConditionalGeneration"
    with pytest.raises(InputError, match=told):
        read_target(tmp_path)
    flux = read_target(tiny_pipeline("flux"))
    with pytest.raises(UsageError, match=r"the text_encoder_2 of .* is a T5, not a CLIP"):
        flux.chosen("text_encoder_2")
    with pytest.raises(UsageError, match="flux has no CLIP called text_encoder_2"):
        encoder_of_target("flux", text_layers(states["text_encoder"]), encoder="text_encoder_2")
    other = shutil.copytree(tiny_pipeline("flux"), tmp_path / "other")
    index = (other / "model_index.json").read_text()
    (other / "model_index.json").write_text(index.replace("FluxPipeline", "VisualClozePipeline"))
    assert read_target(other).family is Family.OTHER
    told = "CLIP: at most the last hidden state of 3 blocks"
    assert told in note(read_target(other))
