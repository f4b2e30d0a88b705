"""LLaVA-NeXT, LLaVA-OneVision and PaliGemma: tiny ones, untrained, edited in files and memory."""

import functools
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_vlms
import torch
from edit_headers import edit
from PIL import Image
from safetensors.torch import load_file

from slsgu_cli.checkpoints.apply import apply_edits
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.naming_schemes import tensor_places
from slsgu_cli.checkpoints.target_layers import encoder_of_target
from slsgu_cli.checkpoints.targets import Family, read_target
from slsgu_cli.errors import StaleError
from slsgu_cli.method.layers import is_candidate
from slsgu_cli.records.directions import Direction, DirectionSpec
from slsgu_cli.records.method import ParameterNorm, Tower
from slsgu_cli.records.options import ApplyOptions
from slsgu_cli.records.targets import GradientOf
from slsgu_cli.targets.answer_gradient import _loss, answer_gradient
from slsgu_cli.targets.models import Llava, Question, new_values
from slsgu_cli.targets.search import TargetPlan
from slsgu_cli.targets.subjects import LlavaSubject, moves_of

WHITENED, KFAC = map(DirectionSpec.of, (Direction.WHITENED, Direction.KFAC))

LAYERS = {
    "llava_next": "visual.transformer.resblocks.0.attn.in_proj_weight",
    "llava_onevision": "visual.trunk.blocks.1.mlp.fc1.weight",
    "paligemma": "visual.trunk.blocks.0.attn.qkv.weight",
}
NARROW = {
    "llava_next": "visual.transformer.resblocks.0.attn.out_proj.weight",
    "llava_onevision": "visual.trunk.blocks.1.mlp.fc2.weight",
    "paligemma": "visual.trunk.blocks.0.attn.proj.weight",
}
BLUE, RED = (Image.new("RGB", (32, 32), colour) for colour in ("blue", "red"))
QUESTION = "What is shown in this image ?"


@pytest.fixture(scope="module", params=tiny_vlms.KINDS)
def kind(request):
    return request.param


@pytest.fixture
def folder(kind, made_once):
    pytest.importorskip("transformers")
    return made_once(f"vlm-{kind}", lambda folder: tiny_vlms.write_vlm(folder / kind, kind))


@functools.cache
def opened(folder):
    """Return a model in memory; what tests change in it lasts for a block."""
    return Llava.load(folder, device="cpu")


def edit_of(kind):
    value = tiny_vlms.tower_of(kind)[1][LAYERS[kind]].numpy()
    return edit(LAYERS[kind], 2 * value, value)


def subject_of(llava):
    return LlavaSubject(
        llava=llava,
        encoder=llava.encoder,
        name="blue",
        searched=None,
        to_test=None,
        forget=[],
        retained=[BLUE, RED],
    )


def test_exactly_the_layers_within_reach_change_the_answers(kind, folder):
    llava, target = opened(folder), read_target(folder)
    encoder = target.encoders[0]
    assert target.family is (Family.PALIGEMMA if kind == "paligemma" else Family.LLAVA)
    inputs = llava.inputs([Question(BLUE, QUESTION)], padding_side="left")
    llava.model.zero_grad()
    llava.model(**inputs).logits.square().sum().backward()
    shapes = {
        name: tuple(value.shape)
        for name, value in tiny_vlms.tower_of(kind)[1].items()
        if is_candidate(name) and Layer.parse(name).tower is Tower.VISION
    }
    parameters = dict(llava.model.named_parameters())
    for layer in shapes:
        # Without its attention pool, a tower has no such tensors.
        keys = [place.key for place in tensor_places(layer, llava.encoder.tower_place)]
        held = [parameters[key].grad for key in keys if key in parameters]
        moved = any(each is not None and each.count_nonzero() for each in held)
        assert moved == (encoder.why_not(layer) is None), layer
    ranked, _ = encoder_of_target(str(folder), shapes, encoder=None)
    assert ranked.why_not(LAYERS[kind]) is None
    if kind == "paligemma":
        by_kind, _ = encoder_of_target(kind, shapes, encoder=None)
        assert all(by_kind.why_not(layer) == encoder.why_not(layer) for layer in shapes)


def test_an_edit_of_the_files_can_be_reverted(kind, folder, tmp_path):
    target, made = read_target(folder), edit_of(kind)
    apply_edits([made], target, tmp_path / "out", options=ApplyOptions())
    file = "model.safetensors"
    before, after = load_file(folder / file), load_file(tmp_path / "out" / file)
    changed = [key for key in before if not torch.equal(before[key], after[key])]
    parts = 3 if LAYERS[kind].endswith(("qkv.weight", "in_proj_weight")) else 1
    assert len(changed) == parts and all("layers." in key for key in changed)
    for key in changed:
        torch.testing.assert_close(after[key], 3 * before[key])
    back = ApplyOptions(revert=True)
    apply_edits([made], read_target(tmp_path / "out"), tmp_path / "back", options=back)
    assert (tmp_path / "back" / file).read_bytes() == (folder / file).read_bytes()


def test_a_model_answers_and_is_edited_in_memory(kind, folder):
    llava = opened(folder)
    questions = [Question(BLUE, QUESTION), Question(Image.new("RGB", (64, 20)), "What is this ?")]
    assert len(list(llava.answers(questions))) == 2
    subject, made = subject_of(llava), edit_of(kind)
    before = subject.read()
    (values,) = new_values((llava.encoder,), [made])
    with llava.encoder.edited(values):
        assert (subject.read() - before).norm() > 1e-3 * before.norm()
    assert torch.equal(subject.read(), before)


def test_the_gradient_of_the_target_lowers_the_odds_of_the_name(kind, folder):
    llava, layer = opened(folder), LAYERS[kind]
    pairs = [(Question(image, QUESTION), "This is a blue circle") for image in (BLUE, RED)]
    gradients = answer_gradient(llava, llava.encoder, pairs, "blue", [layer])
    live, gradient = llava.encoder, gradients[layer]
    slope = float(gradient.square().sum())
    size = 1e-2 / slope**0.5
    with torch.no_grad():
        losses = []
        for sign in (-1, 1):
            with live.edited({layer: live.value(layer) + sign * size * gradient}):
                losses.append(float(_loss(llava, pairs, "blue")) / len(pairs))
    assert (losses[1] - losses[0]) / (2 * size) == pytest.approx(slope, rel=0.05)
    (move,) = moves_of(subject_of(llava), gradients, direction=WHITENED)
    assert move.direction == WHITENED and np.isfinite(move.importance)


def test_only_layers_that_do_not_widen_move_along_both_factors(kind, folder):
    llava = opened(folder)
    wide, narrow = LAYERS[kind], NARROW[kind]
    ones = {layer: torch.ones_like(llava.encoder.value(layer)) for layer in (wide, narrow)}
    (move,) = moves_of(subject_of(llava), ones, direction=KFAC)
    assert (move.layer, move.direction) == (narrow, KFAC)
    assert move.along.shape == ones[narrow].shape and move.along.std() > 0


def test_a_further_trained_tower_moves_along_the_targets_gradient(kind, folder):
    subject, layer = subject_of(opened(folder)), LAYERS[kind]
    value = subject.encoder.value(layer)
    norm = ParameterNorm(tuple(value.shape), 1.5 * float(value.norm()))
    header = SimpleNamespace(weights={layer: norm})

    def check(gradient_of):
        plan = TargetPlan(
            SimpleNamespace(name="blue"),
            None,
            SimpleNamespace(target="vlm"),
            subject,
            gradient_of,
        )
        plan._require_same_clip(header, [layer])

    with pytest.raises(StaleError, match="is not built on the CLIP"):
        check(GradientOf.CLIP)
    check(GradientOf.TARGET)
