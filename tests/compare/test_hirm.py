"""HiRM is a plain loop over the first block of open_clip's text tower, and of a pipeline's."""

import copy
import math

import open_clip
import pytest
import torch
from baselines import PLAN, open_bench

from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.compare.anchor import OBJECT
from slsgu_cli.compare.baselines.hirm import LENGTH, random_goals
from slsgu_cli.compare.registry import baseline
from slsgu_cli.records.comparison import Method
from slsgu_cli.store.blocks import DataBlock

RATE = 1e-3
METHODS = (Method.HIRM_S, Method.HIRM_R)


@pytest.fixture(scope="module")
def bench(shared_world):
    return open_bench(shared_world)


def states(model, ids):
    """Return the last states by open_clip's own blocks."""
    x = model.token_embedding(ids) + model.positional_embedding
    for block in model.transformer.resblocks:
        x = block(x, attn_mask=model.attn_mask)
    return model.ln_final(x)


def plain(world, method):
    """Train by a loop over rows and positions; return the model and the losses of all updates."""
    model = open_clip.create_model(world.model.name).eval()
    original = copy.deepcopy(model)
    tokenize = tokenizer(resolve(world.model))
    captions = DataBlock.open(world.store, world.manifest.forget).captions
    ids = torch.from_numpy(tokenize(captions)).long()
    others = torch.from_numpy(tokenize([text.replace("blue", OBJECT) for text in captions])).long()
    ends, other_ends = ids.argmax(dim=1).tolist(), others.argmax(dim=1).tolist()
    random = random_goals(ids.shape[1], model.ln_final.weight.shape[0], PLAN.seed)
    with torch.no_grad():
        wanted = states(original, others)
    block = model.transformer.resblocks[0]
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.ndim > 1 else 0.0} for p in block.parameters()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    batches = [range(start, min(start + 16, len(ids))) for start in range(0, len(ids), 16)]
    losses = []
    for step in range(PLAN.epochs * len(batches)):
        rows = batches[step % len(batches)]
        found, terms = states(model, ids[list(rows)]), []
        for number, row in enumerate(rows):
            for place in range(ends[row] + 1):
                at = other_ends[row] if place == ends[row] else min(place, other_ends[row])
                goal = random[place] if method is Method.HIRM_R else wanted[row, at]
                terms.append((found[number, place] - goal).square().sum())
        losses.append(torch.stack(terms).mean())
        model.zero_grad()
        losses[-1].backward()
        for group in optimizer.param_groups:
            steps = PLAN.epochs * len(batches)
            group["lr"] = RATE * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
    return model, [float(loss.detach()) for loss in losses]


@pytest.mark.parametrize("method", METHODS)
def test_it_is_the_plain_loop_over_the_first_block(method, bench, shared_world):
    bench.restore()
    spec = baseline(method)
    assert list(bench.epochs(spec, RATE)) == [1, 2]
    model, losses = plain(shared_world, method)
    assert losses[-1] < losses[0]
    original = bench.original_weights
    for name, value in bench.model.state_dict().items():
        expected, places = model.state_dict()[name], torch.ones(len(value.view(-1))).bool()
        if name.endswith("in_proj_bias"):
            # The bias of the keys influences nothing: Adam enlarges the rounding of its gradient.
            places = torch.arange(len(value)) // (len(value) // 3) != 1
        found, expected = value.view(-1)[places], expected.view(-1)[places]
        torch.testing.assert_close(found, expected, atol=2e-4, rtol=2e-3)
        of_block = name.startswith("transformer.resblocks.0.")
        assert torch.equal(value, original[name]) != of_block


def test_random_goals_are_long_and_differ_by_position():
    goals = random_goals(5, 8, 0)
    torch.testing.assert_close(goals.norm(dim=1), torch.full((5,), LENGTH))
    assert torch.equal(goals, random_goals(5, 8, 0))
    assert len({tuple(row) for row in goals.tolist()}) == 5


def test_a_model_without_open_clips_text_tower_is_skipped():
    needs = baseline(Method.HIRM_S).needs
    assert needs.fullmatch("text.transformer.resblocks.0.ln_1.weight")
    assert not needs.fullmatch("visual.transformer.resblocks.0.ln_1.weight")
    assert not needs.fullmatch("text.transformer.encoder.layer.0.output.dense.weight")
