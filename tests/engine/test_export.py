"""`export` chooses the fewest directions that still forget, and its figures are those of `eval`."""

from dataclasses import replace

import pytest
import tiny_clip
import tiny_targets
import torch
from processes import inside
from safetensors.torch import load_file
from worlds import plain_options

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.evaluate import evaluate
from slsgu_cli.engine.export import export
from slsgu_cli.engine.search import search
from slsgu_cli.errors import StaleError
from slsgu_cli.records.options import ApplyRequest, ExportRequest
from slsgu_cli.records.sets import ModelSpec

LAYER = "transformer.resblocks.1.mlp.c_proj.weight"


@pytest.fixture
def edited(world):
    search(world.store, "blue", options=plain_options(layers=[LAYER], steps=6))
    return world


def lora(world, out, **options):
    return export(world.store, ExportRequest(names=["blue"], out=out, **options))


def test_the_figures_of_a_lora_match_those_of_a_checkpoint(edited, tmp_path):
    result = lora(edited, tmp_path / "l.safetensors")
    (one,) = result.edits
    assert (one.layer, result.figures[0].strength, result.figures[-1].strength) == (LAYER, 0, 1)
    request = {"names": [str(tmp_path / "l.safetensors")], "model": edited.model}
    for told in result.figures[1:]:
        out = tmp_path / f"{told.strength}"
        apply(edited.store, ApplyRequest(**request, out=out, scale=told.strength))
        measured = evaluate(edited.store, ["blue"], model=ModelSpec(f"local-dir:{out}"))
        assert measured.models[1].forget["blue"] == told.forget
    assert measured.models[0].forget["blue"] == result.figures[0].forget
    assert told.forget.top1 <= load_edit(edited.store, "blue").header.forget.top1


def test_the_rank_is_the_lowest_that_forgets_like_the_full_edit(edited, tmp_path):
    chosen = lora(edited, tmp_path / "l.safetensors").edits[0].rank
    for rank in range(1, chosen + 2):
        result = lora(edited, tmp_path / f"{rank}.safetensors", rank=rank)
        left = result.figures[-1].forget.top1
        whole = load_edit(edited.store, "blue").header.forget.top1
        assert (left <= whole) == (rank >= chosen)


def test_edits_of_two_encoders_are_measured_in_their_own_clip(edited, tmp_path):
    model = tiny_clip.fresh_model()
    model.load_state_dict(load_file(edited.folder / "open_clip_model.safetensors"))
    first = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.transformer.resblocks[1].mlp.c_proj.weight *= 1.01
    other = ModelSpec(f"local-dir:{tiny_clip.write_folder(tmp_path / 'other', model)}")
    second = replace(edited, name="blue-2", model=other)
    second.build(concept="blue")
    second.grade()
    search(second.store, "blue-2", options=plain_options(layers=[LAYER], steps=6))
    encoders = {
        "text_encoder": ("CLIPTextModel", tiny_targets.tower(first, "text")),
        "text_encoder_2": (
            "CLIPTextModelWithProjection",
            tiny_targets.tower(model.state_dict(), "text"),
        ),
    }
    target = tiny_targets.pipeline(tmp_path / "sdxl", "StableDiffusionXLPipeline", encoders)
    alone = [
        export(edited.store, ExportRequest(names=[name], out=tmp_path / f"{name}.safetensors"))
        for name in ("blue-2", "blue")
    ]
    request = {"names": ["blue-2", "blue"], "target": str(target)}
    both = export(edited.store, ExportRequest(**request, out=tmp_path / "l.safetensors"))
    assert both.edits == tuple(one for each in alone for one in each.edits)
    assert set(both.figures) == {one for each in alone for one in each.figures}
    strengths = [one.strength for one in both.figures]
    assert strengths == sorted(strengths) and len(strengths) == 10
    with pytest.raises(StaleError, match="the edit blue was made for another"):
        export(
            edited.store, ExportRequest(names=["blue-2", "blue"], out=tmp_path / "n.safetensors")
        )


def test_the_command_writes_a_lora_and_refuses_layers_without_a_client_name(edited, tmp_path):
    out = tmp_path / "blue.safetensors"
    done = inside("export", "blue", "--out", str(out), store=edited.store.root)
    assert done.exit_code == 0 and out.is_file()
    assert "at each strength" in done.stdout or "strength" in done.stdout
    search(edited.store, "blue", options=plain_options(layers=["visual.proj"], steps=2))
    done = inside(
        "export", "blue", "--out", str(tmp_path / "v.safetensors"), store=edited.store.root
    )
    assert done.exit_code == 3 and not (tmp_path / "v.safetensors").exists()
    assert "no client supports a LoRA of visual.proj" in done.stderr
