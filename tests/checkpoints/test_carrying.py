"""Edits carried into every layout: the right values, nothing else, and back to the bit."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_clip
import tiny_targets
import torch
from checkpoints import content
from edit_headers import edit
from processes import inside
from safetensors.torch import load_file
from tiny_targets import llava, pipeline, save, tower, under
from worlds import Listener

from slsgu_cli.checkpoints.apply import apply_edits
from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.engine.find_edits import Presence, find_edits
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.records.options import ApplyOptions, StrengthOptions
from slsgu_cli.store.store import Store

TEXT = "transformer.resblocks.1.{}"
VISION = "visual.transformer.resblocks.1.{}"
LAYERS = ("attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_proj.weight", "ln_2.weight")


@pytest.fixture(scope="module")
def other():
    """Another text tower: wider, one block more."""
    text = {"context_length": 16, "vocab_size": 64, "width": 32, "heads": 2, "layers": 4}
    config = tiny_clip.CONFIG | {"text_cfg": text}
    return tiny_clip.fresh_model(config, seed=1).state_dict()


def changed_to(layer, number):
    """Return a layer of another block."""
    return layer.replace(".1.", f".{number}.")


def sd1_file(state, _other):
    return under("cond_stage_model.transformer.", tower(state, "text"))


def sd2_file(state, _other):
    own = {name: value for name, value in state.items() if not name.startswith("visual.")}
    return under("cond_stage_model.model.", own)


def sdxl_file(state, other):
    second = {name: value for name, value in other.items() if not name.startswith("visual.")}
    first = under("conditioner.embedders.0.transformer.", tower(state, "text"))
    return first | under("conditioner.embedders.1.model.", second)


def sdxl(folder, state, other):
    second = tiny_targets.transformers_weights(other)
    second = {n: v for n, v in second.items() if n.startswith("text_")}
    return pipeline(
        folder,
        "StableDiffusionXLPipeline",
        {
            "text_encoder": ("CLIPTextModel", tower(state, "text")),
            "text_encoder_2": ("CLIPTextModelWithProjection", second),
        },
    )


def sd1(folder, state, _other, inner=True):
    encoder = ("CLIPTextModel", tower(state, "text", inner=inner))
    return pipeline(folder, "StableDiffusionPipeline", {"text_encoder": encoder})


def variants(folder, state, _other):
    """An fp16 variant and a .bin beside the file, as repositories have them."""
    sd1(folder, state, _other)
    half = {name: value.half() for name, value in tower(state, "text").items()}
    save(half, folder / "text_encoder/model.fp16.safetensors")
    save(tower(state, "text"), folder / "text_encoder/pytorch_model.bin")
    return folder


def clip(folder, state, _other, *, shards=0, dtype=torch.float32):
    weights = {n: v.to(dtype) for n, v in tiny_targets.transformers_weights(state).items()}
    weights["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    tiny_targets.write_json(folder / "config.json", {"model_type": "clip"})
    if shards:
        tiny_targets.save_shards(weights, folder, shards)
    else:
        save(weights, folder / "model.safetensors")
    return folder


def vision(folder, state, _other):
    tiny_targets.write_json(folder / "config.json", {"model_type": "clip_vision_model"})
    save(tower(state, "vision", inner=False), folder / "model.safetensors")
    return folder


LAYOUTS = {
    "clip": (clip, TEXT),
    "clip bf16": (lambda f, s, o: clip(f, s, o, dtype=torch.bfloat16), VISION),
    "clip in shards": (lambda f, s, o: clip(f, s, o, shards=3), VISION),
    "vision tower of transformers 5": (vision, VISION),
    "sd": (sd1, TEXT),
    "sd of transformers 5": (lambda f, s, o: sd1(f, s, o, inner=False), TEXT),
    "sd with variants": (variants, TEXT),
    "sdxl": (sdxl, TEXT),
    "sd1 file": (lambda f, s, o: save(sd1_file(s, o), f / "sd.safetensors"), TEXT),
    "sd1 ckpt": (lambda f, s, o: _ckpt(f, sd1_file(s, o)), TEXT),
    "sd2 file": (lambda f, s, o: save(sd2_file(s, o), f / "sd.safetensors"), TEXT),
    "sdxl file": (lambda f, s, o: save(sdxl_file(s, o), f / "sd.safetensors"), TEXT),
    "llava": (lambda f, s, _: llava(f, s, "vision_tower.vision_model."), VISION),
    "llava of transformers 5": (lambda f, s, _: llava(f, s, "vision_tower."), VISION),
    "llava in shards": (lambda f, s, _: llava(f, s, "model.vision_tower.", shards=2), VISION),
}


def _ckpt(folder, weights):
    path = folder / "sd.ckpt"
    folder.mkdir()
    torch.save({"state_dict": weights, "global_step": 1}, path)
    return path


def edit_of(state, layer, *, name="facebook", seed=0, factor=0.05):
    before = Layer.parse(layer).rows(state[Layer.parse(layer).parameter].numpy())
    rng = np.random.default_rng(seed)
    delta = (factor * rng.standard_normal(before.shape)).astype(np.float32)
    return edit(layer, delta, before, name=name)


def run(edits, path, out, **options):
    return apply_edits(edits, read_target(path), out, options=ApplyOptions(**options))


def files(path):
    """Return the bytes of every file below a path, by relative name."""
    if path.is_file():
        return {"": path.read_bytes()}
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


def contents(path):
    """Return the content of every file below a path, by relative name."""
    if path.is_file():
        return {"": content(path)}
    return {str(p.relative_to(path)): content(p) for p in path.rglob("*") if p.is_file()}


def tensors(path):
    """Return every tensor below a path by file and name."""
    found = {}
    for file in [path] if path.is_file() else sorted(path.rglob("*")):
        if file.suffix == ".safetensors":
            loaded = load_file(file)
        elif file.suffix in (".bin", ".ckpt"):
            loaded = torch.load(file)
            loaded = loaded.get("state_dict", loaded)
        else:
            continue
        where = "" if file == path else str(file.relative_to(path))
        found |= {(where, name): value for name, value in loaded.items()}
    return found


def parts(value, delta, layer):
    """Return what a layer becomes, whole and in the pieces that transformers keeps."""
    wide = value.double() + torch.from_numpy(delta).double()
    # numpy rounds fp64 to fp16 once, torch by way of fp32.
    half = value.dtype == torch.float16
    new = torch.from_numpy(wide.numpy().astype(np.float16)) if half else wide.to(value.dtype)
    return [new, *(new.chunk(3) if "in_proj" in layer else [])]


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layer_changes_and_nothing_else(tmp_path, state, other, layout, layer):
    make, names = LAYOUTS[layout]
    path = make(tmp_path / "original", state, other)
    original = files(path)
    layer = names.format(layer)
    made = edit_of(state, layer)
    if "bf16" in layout:
        half = {name: value.bfloat16().float() for name, value in state.items()}
        made = edit_of(half, layer)
    out = tmp_path / ("out" + path.suffix)
    listener = Listener()
    result = run([made], path, out)
    # Of what is told, there is only what reads the prompts beside.
    assert len(listener.heard) == ("sdxl" in layout)
    before, after = tensors(path), tensors(out)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    for key in changed:
        expected = parts(state[layer].to(before[key].dtype), made.delta(), layer)
        assert any(torch.equal(after[key], part) for part in expected), key
    copies = 3 if layout == "sd with variants" else 1
    fused = "in_proj" in layer and layout not in ("sd2 file",)
    assert len(changed) == copies * (3 if fused else 1)
    edited = {name for name, _ in changed}
    assert {Path(f.path).relative_to(out).as_posix() for f in result.files} == {
        name or "." for name in edited
    }
    now = files(out)
    assert {n: b for n, b in now.items() if n not in edited} == {
        n: b for n, b in original.items() if n not in edited
    }
    assert files(path) == original
    back = tmp_path / ("back" + path.suffix)
    run([made], out, back, revert=True)
    assert contents(back) == contents(path)


def open_clip_file(folder, state, _other):
    folder.mkdir()
    torch.save(state, folder / "clip.pt")
    return folder / "clip.pt"


def found(store, model, *edits, **options):
    """Return what is said of edits in a model, without saying it twice."""
    names = [edit.header.name for edit in edits]
    rows = find_edits(store, names, model, StrengthOptions(**options))
    return {(row.name, row.presence) for row in rows}


@pytest.mark.parametrize("layout", [*LAYOUTS, "open_clip's"])
def test_an_edit_is_found_where_it_is_and_not_elsewhere(tmp_path, state, other, layout):
    make, names = {**LAYOUTS, "open_clip's": (open_clip_file, TEXT)}[layout]
    path = make(tmp_path / "original", state, other)
    layer = names.format("attn.in_proj_weight")
    half = {name: value.bfloat16().float() for name, value in state.items()}
    made = edit_of(half if "bf16" in layout else state, layer)
    store = Store(str(tmp_path / "store"))
    write_edit(store, made)
    out, back, changed = (tmp_path / (name + path.suffix) for name in ("out", "back", "changed"))
    run([made], path, out)
    run([made], out, back, revert=True)
    run([made], path, changed, scale=0.5)
    assert found(store, path, made) == {("facebook", Presence.ABSENT)}
    assert found(store, out, made) == {("facebook", Presence.IN)}
    assert found(store, back, made) == {("facebook", Presence.ABSENT)}
    assert found(store, changed, made) == {("facebook", Presence.OTHER)}
    assert found(store, changed, made, scale=0.5) == {("facebook", Presence.IN)}
    rows = find_edits(store, ["facebook"], changed, StrengthOptions())
    assert [row.share for row in rows] == pytest.approx([0.5] * len(rows), abs=0.01)


def test_check_reports_each_of_several_edits_of_a_layer(tmp_path, state, other):
    path, store = clip(tmp_path / "clip", state, other), Store(str(tmp_path / "store"))
    layer = TEXT.format("mlp.c_proj.weight")
    made = [edit_of(state, layer, name=name, seed=n) for n, name in enumerate("ab")]
    for each in made:
        write_edit(store, each)
    run(made, path, tmp_path / "both")
    run(made[1:], path, tmp_path / "second")
    assert found(store, tmp_path / "both", *made) == {("a", Presence.IN), ("b", Presence.IN)}
    assert found(store, tmp_path / "both", made[0]) == {("a", Presence.OTHER)}
    told = {("a", Presence.ABSENT), ("b", Presence.IN)}
    assert found(store, tmp_path / "second", *made) == told


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_an_edit_is_found_after_the_model_was_saved_in_another_precision(tmp_path, state, stored):
    store = Store(str(tmp_path / "store"))
    made = edit_of(state, TEXT.format("mlp.c_proj.weight"))
    write_edit(store, made)
    paths = [tmp_path / name for name in ("a.safetensors", "b.safetensors")]
    save(state, paths[0])
    run([made], *paths)
    for path, presence in zip(paths, (Presence.ABSENT, Presence.IN), strict=True):
        saved = tmp_path / f"saved-{path.name}"
        save({name: value.to(stored) for name, value in load_file(path).items()}, saved)
        assert found(store, saved, made) == {("facebook", presence)}


def test_the_exit_code_of_check_says_whether_a_model_contains_an_edit(tmp_path, state, other):
    path, store = clip(tmp_path / "clip", state, other), Store(str(tmp_path / "store"))
    made = edit_of(state, TEXT.format("mlp.c_proj.weight"))
    write_edit(store, made)
    for name, scale in (("whole", 1.0), ("half", 0.5)):
        run([made], path, tmp_path / name, scale=scale)

    def code(*words):
        return inside("check", *words, "--edit", "facebook", store=store.root).exit_code

    assert [code(tmp_path / name) for name in ("whole", "clip", "half")] == [0, 5, 3]
    assert code(f"local-dir:{tmp_path / 'whole'}") == 0
    assert code(tmp_path / "half", "--scale", "0.5") == 0
    assert code(tmp_path / "none") == 3
    assert code(tmp_path / "whole", tmp_path / "half") == code("--repair") == 2
    done = inside("check", path, "--edit", "facebook", "--json", store=store.root)
    (row,) = json.loads(done.stdout)["edits"]
    assert (row["name"], row["presence"]) == ("facebook", "absent")
    assert inside("check", "--scale", "0.5", store=store.root).exit_code == 2


@pytest.mark.parametrize(
    "layout", ["clip", "clip in shards", "sd with variants", "sd2 file", "llava"]
)
def test_an_edit_of_a_qkv_slice_changes_its_tensor_or_its_rows_only(tmp_path, state, other, layout):
    make, names = LAYOUTS[layout]
    path = make(tmp_path / "original", state, other)
    keys = [
        edit_of(state, names.format("attn.in_proj_weight.k")),
        edit_of(state, names.format("attn.in_proj_weight.v"), seed=1),
    ]
    out, back = (tmp_path / (name + path.suffix) for name in ("out", "back"))
    run(keys[:1], path, out)
    before, after = tensors(path), tensors(out)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    assert len(changed) == (3 if layout == "sd with variants" else 1)
    for key in changed:
        was, now = before[key], after[key]
        if key[1].endswith("attn.in_proj_weight"):
            others = torch.tensor([0, 2])
            assert torch.equal(*(whole.unflatten(0, (3, -1))[others] for whole in (was, now)))
            was, now = (whole.chunk(3)[1] for whole in (was, now))
        else:
            assert key[1].endswith("layers.1.self_attn.k_proj.weight")
        assert torch.equal(now, parts(was, keys[0].delta(), "")[0])
    own = {name for name, _ in changed}
    rest = [{n: b for n, b in files(place).items() if n not in own} for place in (path, out)]
    assert rest[0] == rest[1]
    run(keys[:1], out, back, revert=True)
    assert files(back) == files(path)
    run(keys, path, out, overwrite=True)
    run(keys, out, back, revert=True, overwrite=True)
    assert files(back) == files(path)


@pytest.mark.parametrize("layer", ["visual.proj", "text_projection", "visual.conv1.weight"])
def test_projections_are_written_transposed(tmp_path, state, other, layer):
    path = clip(tmp_path / "original", state, other)
    made = edit_of(state, layer)
    run([made], path, tmp_path / "out")
    ours = dict(state) | {layer: state[layer] + torch.from_numpy(made.delta())}
    expected = tiny_targets.transformers_weights(ours)
    after = load_file(tmp_path / "out/model.safetensors")
    assert all(torch.equal(after[name], expected[name]) for name in expected)
    run([made], tmp_path / "out", tmp_path / "back", revert=True)
    assert files(tmp_path / "back") == files(path)


def test_each_edit_of_sdxl_finds_its_encoder(tmp_path, state, other):
    path = sdxl(tmp_path / "original", state, other)
    both = [edit_of(state, TEXT.format(LAYERS[0])), edit_of(other, TEXT.format(LAYERS[1]))]
    result = run(both, path, tmp_path / "out")
    assert [Path(file.path).parent.name for file in result.files] == [
        "text_encoder",
        "text_encoder_2",
    ]
    run(both, tmp_path / "out", tmp_path / "back", revert=True)
    assert files(tmp_path / "back") == files(path)
    with pytest.raises(StaleError, match="of shape"):
        run(both[:1], path, tmp_path / "no", encoder="text_encoder_2")
    with pytest.raises(UsageError, match="no encoder clip; it has text_encoder, text_encoder_2"):
        run(both[:1], path, tmp_path / "no", encoder="clip")


def test_one_of_two_encoders_with_the_same_weights_must_be_named(tmp_path, state):
    path = sdxl(tmp_path / "original", state, state)
    made = edit_of(state, TEXT.format(LAYERS[0]))
    with pytest.raises(UsageError, match="several encoders"):
        run([made], path, tmp_path / "no")
    result = run([made], path, tmp_path / "out", encoder="text_encoder_2")
    assert [Path(file.path).parent.name for file in result.files] == ["text_encoder_2"]


# -- which layers


@pytest.mark.parametrize(
    ("make", "layer", "why"),
    [
        (sd1, "visual.proj", "the vision tower is not part of it"),
        (sd1, "text_projection", "which is not projected"),
        (sdxl, changed_to(TEXT.format("mlp.c_fc.weight"), 2), "penultimate"),
        (LAYOUTS["sd2 file"][0], changed_to(TEXT.format("ln_1.weight"), 2), "penultimate"),
        (LAYOUTS["llava"][0], changed_to(VISION.format("ln_1.weight"), 2), "layer -2"),
        (LAYOUTS["llava"][0], "visual.ln_post.weight", "before the final norm"),
    ],
)
def test_layers_without_influence_are_refused_with_the_reason(
    tmp_path, state, other, make, layer, why
):
    path = make(tmp_path / "original", state, other)
    with pytest.raises(InputError, match=f"cannot influence .*{why}") as caught:
        run([edit_of(state, layer)], path, tmp_path / "out")
    assert "rank facebook --target" in str(caught.value.hint)


def test_force_writes_a_layer_without_influence(tmp_path, state, other):
    path = llava(tmp_path / "original", state, "vision_tower.vision_model.")
    run([edit_of(state, "visual.ln_post.weight")], path, tmp_path / "out", force=True)
    with pytest.raises(InputError, match=r"visual\.proj cannot influence .*not projected"):
        run([edit_of(state, "visual.proj")], path, tmp_path / "no", force=True)


# -- what lies beside


def test_unedited_files_can_be_hard_links_and_edited_ones_never(tmp_path, state, other):
    path = sd1(tmp_path / "sd", state, other)
    made = edit_of(state, TEXT.format(LAYERS[0]))
    run([made], path, tmp_path / "copied")
    run([made], path, tmp_path / "linked", link=True)
    assert files(tmp_path / "copied") == files(tmp_path / "linked")
    unet, encoder = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
    same = os.path.samefile
    assert same(path / unet, tmp_path / "linked" / unet)
    assert not same(path / unet, tmp_path / "copied" / unet)
    assert not same(path / encoder, tmp_path / "linked" / encoder)


def test_weights_that_cannot_be_edited_stop_it(tmp_path, state, other):
    path = sd1(tmp_path / "sd", state, other)
    legacy = path / "text_encoder/pytorch_model.bin"
    torch.save(tower(state, "text"), legacy, _use_new_zipfile_serialization=False)
    made = edit_of(state, TEXT.format(LAYERS[0]))
    with pytest.raises(InputError, match="cannot be edited"):
        run([made], path, tmp_path / "out")
    run([made], path, tmp_path / "out", force=True)
    assert (tmp_path / "out/text_encoder/pytorch_model.bin").read_bytes() == legacy.read_bytes()


def test_apply_warns_of_other_files_with_the_layer(tmp_path, state, other):
    path = sd1(tmp_path / "sd", state, other)
    save(sd1_file(state, other), path / "v1-5.safetensors")
    (path / "text_encoder/flax_model.msgpack").write_bytes(b"weights")
    listener = Listener()
    run([edit_of(state, TEXT.format(LAYERS[0]))], path, tmp_path / "out")
    told = [line for line in listener.heard if "copied without the edit" in line]
    assert ["v1-5.safetensors" in told[0], "flax_model.msgpack" in told[1]] == [True, True]


def test_a_lost_shard_is_noticed(tmp_path, state, other):
    path = clip(tmp_path / "clip", state, other, shards=3)
    where = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    (path / where["vision_model.encoder.layers.1.self_attn.k_proj.weight"]).unlink()
    with pytest.raises(InputError, match=r"holds no weights of a CLIP: only 2 of its 3 shards"):
        read_target(path)
    save(tiny_targets.transformers_weights(state), path / "model.safetensors")
    with pytest.raises(InputError, match="is next to the weights and cannot be edited: only 2"):
        run([edit_of(state, VISION.format(LAYERS[0]))], path, tmp_path / "out")


# -- trained models


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("sd", "transformer.resblocks.0.mlp.c_proj.weight"),
        ("sd", "transformer.resblocks.7.attn.in_proj_weight"),
        ("llava", "visual.transformer.resblocks.6.attn.in_proj_weight"),
    ],
)
def test_edits_apply_to_trained_models_and_revert(tmp_path, trained_models, name, layer):
    own = load_file(trained_models / "clip/open_clip_model.safetensors")
    made = edit_of(own, layer)
    path = trained_models / name
    run([made], path, tmp_path / "out")
    if name == "sd":
        from transformers import CLIPTextModel

        loaded = CLIPTextModel.from_pretrained(tmp_path / "out/text_encoder")
    else:
        from transformers import LlavaForConditionalGeneration

        loaded = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    whole, *thirds = parts(own[layer], made.delta(), layer)
    pieces = thirds or [whole]
    values = [value.half() for value in loaded.state_dict().values()]
    for piece in pieces:
        assert sum(v.shape == piece.shape and torch.equal(v, piece) for v in values) == 1
    run([made], tmp_path / "out", tmp_path / "back", revert=True)
    assert files(tmp_path / "back") == files(path)
