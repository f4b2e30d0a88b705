"""Pipelines of several text encoders in memory: tiny ones, untrained, with edits in place."""

import functools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_pipelines
import torch
from edit_headers import edit
from processes import inside

from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.checkpoints.targets import fitting_encoder, read_target
from slsgu_cli.downstream.models import ImageJob, Pipeline, new_values
from slsgu_cli.downstream.subjects import PaintedSubject, moves_of
from slsgu_cli.errors import InputError
from slsgu_cli.records.method import Direction
from slsgu_cli.records.targets import PaintOptions

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
    job, paint = [ImageJob("a blue circle", 1)], PaintOptions(steps=1)

    def picture(values=()):
        with pipe.edited(values):
            return np.asarray(next(iter(pipe.paint(job, paint)))).astype(int)

    plain, edits = picture(), edits_of(pipe)
    for each in edits:
        values = new_values(pipe.encoders, [each])
        assert pipe.edited_names(values) == [each.header.name]
        assert np.abs(picture(values) - plain).max() > 0
    assert np.array_equal(picture(), plain)
    both = new_values(pipe.encoders, edits)
    assert pipe.edited_names(both) == [each.header.name for each in edits]


def test_a_pipeline_that_makes_no_pictures_is_told_of():
    loaded = Pipeline(lambda *_, **__: SimpleNamespace(frames=[]), (), "cpu", target=None)
    with pytest.raises(InputError, match="makes no pictures"):
        list(loaded.paint([ImageJob("a blue circle", 1)], PaintOptions(steps=1)))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_their_clip_is_searched_along_what_it_is_applied_to(kind, tiny_pipeline):
    pipe = opened(tiny_pipeline(kind))
    shapes = {LAYER: tuple(pipe.encoders[0].value(LAYER).shape)}
    encoder = fitting_encoder(read_target(tiny_pipeline(kind)), shapes, None)
    assert encoder.name == "text_encoder"
    subject = PaintedSubject(
        encoder=pipe.encoders[0], searched=None, to_report=None, judges=(), pipe=pipe,
        captions=["a blue circle", "a red bar"],
    )  # fmt: skip
    gradient = {LAYER: torch.ones(shapes[LAYER])}
    (move,) = moves_of(subject, gradient, direction=Direction.WHITENED, ridge=0.01)
    assert move.ridge == 0.01 and not torch.allclose(move.direction, gradient[LAYER])


def test_generate_takes_edits_of_both_encoders(tiny_pipeline, world, tmp_path, monkeypatch):
    path = tiny_pipeline("sd3")
    pipe = opened(path)
    monkeypatch.setattr(Pipeline, "load", lambda *_, **__: pipe)
    for each in edits_of(pipe):
        write_edit(world.store, each)
    words = ("--prompt", "a blue circle", "--seeds", "3", "--denoise", "1", "--json")
    made = inside("generate", "text_encoder", "text_encoder_2", "--target", path, *words,
                  store=world.store.root)  # fmt: skip
    assert made.exit_code == 0, made.stderr
    assert READ_TWICE in made.stderr
    generation = json.loads(made.stdout)["generation"]
    assert [row["name"] for row in generation["edits"]] == ["text_encoder", "text_encoder_2"]
