"""Pipelines of several text encoders in memory: tiny ones, untrained, with edits in place."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import tiny_targets
import torch
from edit_headers import edit
from processes import inside

from slsgu_cli.checkpoints.edits import edit_digests, load_edit, write_edit
from slsgu_cli.checkpoints.target_layers import fitting_encoder
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.export import export
from slsgu_cli.errors import InputError, MissingError, StaleError, UsageError
from slsgu_cli.records.directions import Direction, DirectionSpec
from slsgu_cli.records.options import ApplyRequest, ExportRequest
from slsgu_cli.records.targets import Budget, DiffusionOptions, HeldOutBudget, TargetSearchOptions
from slsgu_cli.targets.models import ImageJob, Pipeline, new_values
from slsgu_cli.targets.search import TargetPlan, search_target
from slsgu_cli.targets.subjects import PipelineSubject, moves_of

WITH_STATISTICS = [DirectionSpec.of(Direction.WHITENED), DirectionSpec.of(Direction.KFAC)]

LAYER = "transformer.resblocks.1.mlp.c_proj.weight"
READ_TWICE = "edits go into text_encoder and text_encoder_2, and text_encoder_3 reads them"


@functools.cache
def opened(path):
    """Return a pipeline in memory; what tests change in it lasts for a block."""
    loaded = Pipeline.load(path, device="cpu")
    # FLUX makes pictures of 128 latents in a row unless it is told otherwise.
    loaded.pipeline.default_sample_size = 8
    return loaded


def edits_of(pipe):
    made = []
    for live in pipe.encoders:
        value = live.value(LAYER).numpy().copy()
        made.append(edit(LAYER, 2 * value, value, name=live.encoder.name))
    return made


@pytest.mark.parametrize("kind", tiny_pipelines.KINDS)
def test_edits_of_each_encoder_change_pictures(kind, tiny_pipeline):
    pipe = opened(tiny_pipeline(kind))
    job, diffusion = [ImageJob("a blue circle", 1)], DiffusionOptions(steps=1)

    def picture(values=()):
        with pipe.edited(values):
            return np.asarray(next(iter(pipe.generate(job, diffusion)))).astype(int)

    plain, edits = picture(), edits_of(pipe)
    for each in edits:
        values = new_values(pipe.encoders, [each])
        assert pipe.edited_names(values) == [each.header.name]
        assert np.abs(picture(values) - plain).max() > 0
    assert np.array_equal(picture(), plain)
    both = new_values(pipe.encoders, edits)
    assert pipe.edited_names(both) == [each.header.name for each in edits]


def test_a_pipeline_that_generates_no_images_is_refused():
    loaded = Pipeline(lambda *_, **__: SimpleNamespace(frames=[]), (), "cpu", target=None)
    with pytest.raises(InputError, match="generates no images"):
        list(loaded.generate([ImageJob("a blue circle", 1)], DiffusionOptions(steps=1)))


@pytest.mark.parametrize("direction", WITH_STATISTICS, ids=str)
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_the_clip_of_sd3_and_flux_moves_along_its_direction(kind, direction, tiny_pipeline):
    pipe = opened(tiny_pipeline(kind))
    shapes = {LAYER: tuple(pipe.encoders[0].value(LAYER).shape)}
    encoder = fitting_encoder(read_target(tiny_pipeline(kind)), shapes, None)
    assert encoder.name == "text_encoder"
    subject = PipelineSubject(
        encoder=pipe.encoders[0],
        searched=None,
        to_test=None,
        judges=(),
        pipe=pipe,
        captions=["a blue circle", "a red bar"],
    )
    gradient = {LAYER: torch.ones(shapes[LAYER])}
    (move,) = moves_of(subject, gradient, direction=direction)
    assert move.direction == direction and not torch.allclose(move.along, gradient[LAYER])


@pytest.fixture
def both(tiny_pipeline, world):
    """The tiny SDXL's folder, and an edit of each of its encoders in the world's store."""
    folder = tiny_pipeline("sdxl")
    edits = edits_of(opened(folder))
    for each in edits:
        write_edit(world.store, each)
    return folder, edits


def target_options(folder, *applied, **options):
    few = Budget(concept=3, others=3, diffusion=DiffusionOptions(steps=1))
    return TargetSearchOptions(
        target=folder,
        applied=applied,
        layers=[LAYER],
        steps=2,
        direction=Direction.GRADIENT,
        budget=few,
        test=HeldOutBudget(concept=3, others=3),
        device="cpu",
        **options,
    )


def test_a_search_of_one_encoder_has_the_edit_of_the_other_in_place(
    both, world, tmp_path, listener
):
    folder, (_, second) = both
    options = target_options(folder, "text_encoder_2", goal=0.0)
    found = search_target(world.store, "blue", options=options)
    known = edit_digests([load_edit(world.store, "text_encoder_2")])
    assert found.trials.applied == found.figures.applied == known
    # The same pictures, by a pipeline that has both edits in memory, and one that has neither.
    plan = TargetPlan.load(world.store, "blue", target_options(folder))
    pipe, edit = plan.subject.pipe, load_edit(world.store, found.edit)
    for edits, expected in (
        ((second,), found.figures.before),
        ((second, edit), found.figures.after),
    ):
        with torch.no_grad(), pipe.edited(new_values(pipe.encoders, edits)):
            assert plan.subject.report()[str(world.model)] == expected
    again = search_target(world.store, "blue", options=options)
    assert again.reused == len(again.trials.trials) == len(found.trials.trials)
    assert search_target(world.store, "blue", options=target_options(folder, goal=0.0)).reused == 0
    assert any("their inputs differ (applied)" in text for text in listener.heard)


def test_images_are_generated_with_the_edits_in_place(both, world):
    folder, (_, second) = both
    plan = TargetPlan.load(world.store, "blue", target_options(folder, "text_encoder_2"))
    pipe, plain = plan.subject.pipe, opened(folder)

    def picture(pipe):
        jobs = [ImageJob("a blue circle", 1)]
        return np.asarray(next(iter(pipe.generate(jobs, DiffusionOptions(steps=1)))))

    with plain.edited(new_values(plain.encoders, [second])):
        expected = picture(plain)
    assert np.array_equal(picture(pipe), expected)
    assert not np.array_equal(picture(plain), expected)
    assert torch.equal(pipe.encoders[0].value(LAYER), plain.encoders[0].value(LAYER))


def test_apply_warns_if_the_edit_of_the_other_encoder_is_missing(both, world, tmp_path, listener):
    folder, _ = both
    few = (
        "--images",
        "3",
        "--others",
        "3",
        "--test-images",
        "3",
        "--test-others",
        "3",
        "--denoise",
        "1",
        "--steps",
        "2",
        "--layer",
        LAYER,
        "--goal",
        "0",
    )
    done = inside(
        "search",
        "blue",
        "--target",
        folder,
        "--with",
        "text_encoder_2",
        *few,
        store=world.store.root,
    )
    assert done.exit_code == 0, done.stderr
    assert "all figures, also of the original, are with text_encoder_2 applied" in done.stderr
    assert "edits go into all of them" in done.stderr
    words = "searched with text_encoder_2 in place in another text encoder"
    request = {"target": folder, "overwrite": True, "out": tmp_path / "out"}
    apply(world.store, ApplyRequest(names=["blue@sdxl", "text_encoder_2"], **request))
    lora = tmp_path / "both.safetensors"
    names = ["blue@sdxl", "text_encoder_2"]
    export(world.store, ExportRequest(names=names, out=lora, target=str(folder), rank=2))
    apply(world.store, ApplyRequest(names=[str(lora)], **request))
    assert not any(words in text for text in listener.heard)
    apply(world.store, ApplyRequest(names=["blue@sdxl"], **request))
    assert any(words in text for text in listener.heard)


def test_unfit_edits_of_other_encoders_are_refused(both, world, tmp_path, state):
    folder, _ = both
    with pytest.raises(
        UsageError, match="one of these edits text_encoder, the encoder that is searched"
    ):
        TargetPlan.load(world.store, "blue", target_options(folder, "text_encoder"))
    with pytest.raises(MissingError, match="has no edit red"):
        TargetPlan.load(world.store, "blue", target_options(folder, "red"))
    strange = edit(LAYER, np.ones((24, 96), np.float32), np.ones((24, 96), np.float32), name="s")
    write_edit(world.store, strange)
    with pytest.raises(StaleError, match="is not the layer that the edit s was made for"):
        TargetPlan.load(world.store, "blue", target_options(folder, "s"))
    llava = tiny_targets.llava(tmp_path / "llava", state, "vision_tower.")
    with pytest.raises(UsageError, match="has one CLIP"):
        TargetPlan.load(world.store, "blue", target_options(llava, "text_encoder_2"))


def test_generate_takes_edits_of_both_encoders(tiny_pipeline, world, tmp_path, monkeypatch):
    path = tiny_pipeline("sd3")
    pipe = opened(path)
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pipe)
    for each in edits_of(pipe):
        write_edit(world.store, each)
    words = ("--prompt", "a blue circle", "--seeds", "3", "--denoise", "1", "--json")
    made = inside(
        "generate",
        "text_encoder",
        "text_encoder_2",
        "--target",
        path,
        *words,
        store=world.store.root,
    )
    assert made.exit_code == 0, made.stderr
    assert READ_TWICE in made.stderr
    generation = json.loads(made.stdout)["generation"]
    assert [row["name"] for row in generation["edits"]] == ["text_encoder", "text_encoder_2"]
