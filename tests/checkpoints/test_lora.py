"""Edits as LoRAs: what clients load is what apply writes, and what is read back is the edit."""

from dataclasses import replace

import hf_clip
import numpy as np
import pytest
import tiny_clip
import tiny_pipelines
import tiny_targets
import torch
from edit_headers import edit
from safetensors.torch import load_file

from slsgu_cli.checkpoints.apply import apply_edits
from slsgu_cli.checkpoints.edits import load_edit, load_edits, write_edit
from slsgu_cli.checkpoints.lora import Decomposed, modules_of
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.engine.export import export, smallest
from slsgu_cli.errors import InputError, StaleError, UsageError
from slsgu_cli.records.method import LoraLayout, Tower
from slsgu_cli.records.options import ApplyOptions, ExportRequest
from slsgu_cli.store.store import Store

BLOCK = "transformer.resblocks.{}."
LAYERS = {
    "attention": BLOCK.format(0) + "attn.in_proj_weight",
    "query": BLOCK.format(1) + "attn.in_proj_weight.q",
    "out": BLOCK.format(1) + "attn.out_proj.weight",
    "fc": BLOCK.format(2) + "mlp.c_fc.weight",
    "proj": BLOCK.format(2) + "mlp.c_proj.weight",
}
IDS = torch.tensor([[49406, 320, 1125, 539, 736, 49407, 0, 0]])


@pytest.fixture(scope="module")
def state():
    return tiny_clip.fresh_model().state_dict()


def made(state, layer, *, name="blue", rank=3, seed=0):
    """Return an edit of a layer by a random change of a rank."""
    whole, third = (layer[:-2], "qkv".index(layer[-1])) if layer[-2] == "." else (layer, None)
    values = state[whole] if third is None else state[whole].chunk(3)[third]
    before = values.numpy().copy()
    rng = np.random.default_rng(seed)
    up, down = rng.normal(size=(len(before), rank)), rng.normal(size=(rank, before.shape[1]))
    change = edit(layer, (0.05 * up @ down).astype(np.float32), before, name=name)
    return replace(change, header=replace(change.header, tower=Tower.TEXT))


def exported(tmp_path, edits, **options):
    """Write edits as a LoRA without looking for a rank."""
    store = Store(str(tmp_path / "store"))
    paths = [store.where(write_edit(store, one)) for one in edits]
    out = tmp_path / ("lora" if options.get("layout") is LoraLayout.PEFT else "l.safetensors")
    request = {"names": paths, "out": out, "rank": 100} | options
    return out, export(store, ExportRequest(**request))


def text_model(state, kind="CLIPTextModel"):
    """Return transformers' text encoder with the weights of a state dict."""
    import transformers

    whole = hf_clip.model(state)
    if kind == "CLIPModel":
        return whole
    config = hf_clip.config()
    config.text_config.projection_dim = config.projection_dim
    built = getattr(transformers, kind)(config.text_config).eval()
    own = built.state_dict()
    given = whole.state_dict()
    built.load_state_dict({name: given.get(name, given.get(f"text_model.{name}")) for name in own})
    return built


def edited(state, edits):
    """Return the state dict with edits added in fp32."""
    new = {name: value.clone() for name, value in state.items()}
    for one in edits:
        layer, delta = one.header.layer, torch.from_numpy(one.delta())
        if layer[-2] == ".":
            new[layer[:-2]].chunk(3)["qkv".index(layer[-1])].add_(delta)
        else:
            new[layer] += delta
    return new


def hidden(model):
    """Return what a text encoder makes of some tokens."""
    inner = getattr(model, "text_model", model)
    with torch.no_grad():
        return inner(input_ids=IDS).last_hidden_state


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def pipeline(state, kind="StableDiffusionPipeline"):
    """Return a diffusers pipeline around the tiny CLIP's text encoder, or two for SDXL."""
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        cross_attention_dim=24,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=4)
    parts = {"vae": vae, "unet": unet, "tokenizer": None, "scheduler": diffusers.DDIMScheduler()}
    parts["text_encoder"] = text_model(state)
    parts["scheduler"].register_to_config(steps_offset=1, clip_sample=False)
    if kind == "StableDiffusionXLPipeline":
        parts["text_encoder_2"] = text_model(state, "CLIPTextModelWithProjection")
        return diffusers.StableDiffusionXLPipeline(tokenizer_2=None, **parts)
    return diffusers.StableDiffusionPipeline(
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **parts
    )


@pytest.mark.parametrize("layer", LAYERS)
def test_diffusers_loads_what_apply_writes(state, tmp_path, layer):
    pytest.importorskip("peft")
    one = made(state, LAYERS[layer])
    path, _ = exported(tmp_path, [one])
    wanted, original = text_model(edited(state, [one])), text_model(state)
    pipe = pipeline(state)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    close(hidden(pipe.text_encoder), hidden(wanted))
    assert not torch.allclose(hidden(pipe.text_encoder), hidden(original), atol=1e-3)
    pipe.unload_lora_weights()
    close(hidden(pipe.text_encoder), hidden(original))


def test_flux_loads_its_clip_from_what_export_writes(tiny_model, tiny_pipeline, tmp_path):
    import diffusers

    pytest.importorskip("peft")
    folder = tiny_pipeline("flux")
    weights = load_file(f"{tiny_model.name.removeprefix('local-dir:')}/open_clip_model.safetensors")
    one = made(weights, LAYERS["attention"])
    path, _ = exported(tmp_path, [one], target=str(folder))
    assert all(name.startswith("lora_te1_") for name in load_file(path))
    pipe = diffusers.FluxPipeline.from_pretrained(folder, local_files_only=True)
    original = hidden(pipe.text_encoder)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    close(hidden(pipe.text_encoder), hidden(text_model(edited(weights, [one]))))
    assert not torch.allclose(hidden(pipe.text_encoder), original, atol=1e-3)


def test_a_strength_of_diffusers_scales_the_edit(state, tmp_path):
    pytest.importorskip("peft")
    one = made(state, LAYERS["attention"])
    path, _ = exported(tmp_path, [one])
    pipe = pipeline(state)
    pipe.load_lora_weights(str(path.parent), weight_name=path.name, adapter_name="forget")
    pipe.set_adapters("forget", adapter_weights=0.25)
    quarter = text_model(edited(state, [one]))
    with torch.no_grad():
        for mine, now in zip(quarter.parameters(), text_model(state).parameters(), strict=True):
            mine.copy_(now + 0.25 * (mine - now))
    close(hidden(pipe.text_encoder), hidden(quarter))


@pytest.mark.parametrize("encoder", ["text_encoder", "text_encoder_2"])
def test_sdxl_has_a_name_for_each_of_its_encoders(state, tmp_path, encoder):
    pytest.importorskip("peft")
    # Ranks that differ, beside each other in a module and between modules.
    edits = [
        made(state, LAYERS["attention"]),
        made(state, LAYERS["proj"], name="red", rank=2, seed=1),
        made(state, LAYERS["proj"], name="green", rank=6, seed=2),
    ]
    path, _ = exported(tmp_path, edits, target="sdxl", encoder=encoder)
    prefix = {"text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}[encoder]
    assert all(name.startswith(prefix) for name in load_file(path))
    pipe = pipeline(state, "StableDiffusionXLPipeline")
    other = ({"text_encoder", "text_encoder_2"} - {encoder}).pop()
    untouched = hidden(getattr(pipe, other))
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    close(hidden(getattr(pipe, encoder)), hidden(text_model(edited(state, edits))))
    assert torch.equal(hidden(getattr(pipe, other)), untouched)


def of_both(tiny_model):
    """Return the weights of the tiny SDXL's two CLIPs, and edits of each: ranks differ."""
    first = load_file(f"{tiny_model.name.removeprefix('local-dir:')}/open_clip_model.safetensors")
    second = tiny_pipelines.second_clip().state_dict()
    of_first = [made(first, LAYERS["attention"]), made(first, LAYERS["out"], name="red", rank=1)]
    of_second = [made(second, LAYERS["proj"], name="blue-2", rank=5, seed=1)]
    return (first, of_first), (second, of_second)


def test_one_file_holds_edits_of_both_encoders_of_sdxl(tiny_model, tiny_pipeline, tmp_path):
    import diffusers

    pytest.importorskip("peft")
    folder = tiny_pipeline("sdxl")
    of_first, of_second = (edits for _, edits in of_both(tiny_model))
    edits = [of_second[0], *of_first]
    path, result = exported(tmp_path, edits, target=str(folder))
    assert [one.rank for one in result.edits] == [5, 3, 1]
    starts = {name.partition("_text_model")[0] for name in load_file(path)}
    assert starts == {"lora_te1", "lora_te2"}
    # What apply makes of the edits, and of the file itself.
    read = load_edits(Store(str(tmp_path)), str(path))
    for names, out in ((edits, "applied"), (read, "by-lora")):
        apply_edits(names, read_target(folder), tmp_path / out, options=ApplyOptions())
    kind = diffusers.StableDiffusionXLPipeline
    pipe, applied, by_lora = (
        kind.from_pretrained(each, local_files_only=True)
        for each in (folder, tmp_path / "applied", tmp_path / "by-lora")
    )
    encoders = ("text_encoder", "text_encoder_2")
    originals = [hidden(getattr(pipe, name)) for name in encoders]
    pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    for name, original in zip(encoders, originals, strict=True):
        close(hidden(getattr(pipe, name)), hidden(getattr(applied, name)))
        close(hidden(getattr(by_lora, name)), hidden(getattr(applied, name)))
        assert not torch.allclose(hidden(getattr(pipe, name)), original, atol=1e-3)
    pooled = [each.text_encoder_2(IDS).text_embeds for each in (pipe, applied)]
    close(*pooled)


def test_some_clients_support_only_one_encoder(tiny_model, tiny_pipeline, tmp_path):
    folder = str(tiny_pipeline("sdxl"))
    of_first, of_second = (edits for _, edits in of_both(tiny_model))
    with pytest.raises(UsageError, match="PEFT's layout has one text encoder, but these edits"):
        exported(tmp_path, of_first + of_second, target=folder, layout=LoraLayout.PEFT)
    with pytest.raises(StaleError, match="no text encoder has the"):
        exported(tmp_path, of_first + of_second, target=folder, encoder="text_encoder")
    with pytest.raises(UsageError, match="flux has no CLIP text_encoder_2"):
        exported(tmp_path, of_first, target="flux", encoder="text_encoder_2")


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection", "CLIPModel"])
def test_peft_merges_what_apply_writes(state, tmp_path, kind, recwarn):
    peft = pytest.importorskip("peft")
    edits = [
        made(state, LAYERS["attention"]),
        made(state, LAYERS["proj"], name="red", rank=2, seed=1),
        made(state, LAYERS["proj"], name="green", rank=1, seed=2),
    ]
    folder, _ = exported(tmp_path, edits, layout=LoraLayout.PEFT)
    loaded = peft.PeftModel.from_pretrained(text_model(state, kind), str(folder))
    assert not [w for w in recwarn if "adapter keys" in str(w.message)]
    merged = loaded.merge_and_unload()
    origin = hf_clip.write_folder(tmp_path / "clip", state)
    read = load_edits(Store(str(tmp_path)), str(folder / "adapter_model.safetensors"))
    apply_edits(read, read_target(origin), tmp_path / "out", options=ApplyOptions())
    wanted = load_file(tmp_path / "out" / "model.safetensors")
    for name, value in merged.state_dict().items():
        by_name = wanted.get(name, wanted.get(f"text_model.{name}"))
        torch.testing.assert_close(value, by_name, rtol=0, atol=1e-6)
    close(hidden(merged), hidden(text_model(edited(state, edits))))


@pytest.mark.parametrize("layout", LoraLayout)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_lora_is_read_back_as_its_edits(state, tmp_path, layer, layout):
    edits = [made(state, LAYERS[layer]), made(state, LAYERS[layer], name="red", rank=2, seed=1)]
    out, result = exported(tmp_path, edits, layout=layout)
    assert [one.rank for one in result.edits] == [3, 2] and not result.figures
    path = out / "adapter_model.safetensors" if out.is_dir() else out
    read = load_edits(Store(str(tmp_path)), str(path))
    for one, original in zip(read, edits, strict=True):
        assert replace(one.header, rank=None) == original.header and one.is_lora
        np.testing.assert_allclose(one.delta(), original.delta(), atol=1e-6)
    with pytest.raises(UsageError, match="holds several edits: blue, red"):
        load_edit(Store(str(tmp_path)), str(path))
    with pytest.raises(InputError, match="does not hold the original values"):
        read[0].before()


def test_a_lora_of_another_clip_is_refused(state, tmp_path):
    path, _ = exported(tmp_path, [made(state, LAYERS["proj"])])
    other = hf_clip.write_folder(tmp_path / "other", tiny_clip.fresh_model(seed=1).state_dict())
    read = load_edits(Store(str(tmp_path)), str(path))
    with pytest.raises(StaleError, match="is not the layer that the edit blue was made for"):
        apply_edits(read, read_target(other), tmp_path / "out", options=ApplyOptions())


def test_the_smallest_rank_leaves_out_the_least_directions(state):
    one = made(state, LAYERS["proj"], rank=7)
    parts = Decomposed(one.header, one.delta())
    assert parts.full_rank == 7
    np.testing.assert_allclose(parts.delta(7), one.delta(), atol=1e-6)
    np.testing.assert_allclose(parts.delta(2), one.of_rank(2).delta(), atol=1e-6)


@pytest.mark.parametrize("full", [1, 7, 16])
def test_the_smallest_rank_that_suffices_is_found(full):
    for least in range(1, full + 1):
        asked = []

        def suffices(rank, least=least, asked=asked):
            asked.append(rank)
            return rank >= least

        assert smallest(suffices, full) == least
        assert full not in asked


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        ("visual.transformer.resblocks.0.mlp.c_fc.weight", "is in the vision tower"),
        ("transformer.resblocks.0.ln_1.weight", "is not a linear module"),
        ("text_projection", "is not a linear module"),
        ("text.transformer.encoder.layer.0.output.dense.weight", "is not a linear module"),
    ],
)
def test_a_layer_that_no_client_supports_is_refused(state, layer, reason):
    values = state.get(layer, torch.ones(2, 2)).numpy()
    with pytest.raises(InputError, match=reason):
        modules_of(edit(layer, values, values).header)


def test_the_pipeline_determines_the_encoder_of_a_lora(state, tmp_path):
    one = made(state, LAYERS["proj"])
    first = tiny_clip.fresh_model(seed=1).state_dict()
    encoders = {
        "text_encoder": ("CLIPTextModel", tiny_targets.tower(first, "text")),
        "text_encoder_2": ("CLIPTextModelWithProjection", tiny_targets.tower(state, "text")),
    }
    folder = tiny_targets.pipeline(tmp_path / "sdxl", "StableDiffusionXLPipeline", encoders)
    path, _ = exported(tmp_path, [one], target=str(folder))
    assert all(name.startswith("lora_te2_") for name in load_file(path))
    with pytest.raises(StaleError, match="no text encoder has the"):
        exported(tmp_path, [one], target=str(folder), encoder="text_encoder", overwrite=True)
    with pytest.raises(UsageError, match="llava, whose text encoders have no names in a LoRA"):
        exported(tmp_path, [one], target="llava", overwrite=True)
    sd2 = tiny_targets.pipeline(
        tmp_path / "xl",
        "StableDiffusionXLPipeline",
        {"text_encoder": ("CLIPTextModel", tiny_targets.tower(state, "text"))},
    )
    with pytest.raises(InputError, match="cannot influence text_encoder"):
        exported(tmp_path, [one], target=str(sd2), overwrite=True)


def test_export_does_not_overwrite_files(state, tmp_path):
    one = made(state, LAYERS["proj"])
    path, _ = exported(tmp_path, [one])
    with pytest.raises(InputError, match="exists already"):
        exported(tmp_path, [one])
    assert exported(tmp_path, [one], overwrite=True)[0] == path
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=r"would be lost: mine\.txt"):
        exported(tmp_path, [one], layout=LoraLayout.PEFT, overwrite=True)
    with pytest.raises(UsageError, match=r"a LoRA is a \.safetensors file"):
        exported(tmp_path, [one], out=tmp_path / "name")
    with pytest.raises(UsageError, match="has no set blue"):
        exported(tmp_path, [one], rank=None, overwrite=True)
