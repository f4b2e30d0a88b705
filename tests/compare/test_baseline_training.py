"""The trained baselines are plain loops of open_clip and AdamW, in the paper's order."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from baselines import PLAN, loss, open_bench

from slsgu_cli.compare.baselines.salun import mask_of, saliency_mask
from slsgu_cli.compare.epochs import weights_of
from slsgu_cli.compare.registry import baseline
from slsgu_cli.compare.training import LossTerm, cosine_rate, train
from slsgu_cli.records.comparison import Method
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock

RATE = 1e-3
PHASES = {
    Method.FT: ("retain",),
    Method.GA: ("forget",),
    Method.GAFT: ("forget", "retain"),
    Method.SALUN: ("forget", "retain"),
}


@pytest.fixture(scope="module")
def bench(shared_world):
    return open_bench(shared_world)


def trained(bench, method):
    """Return a fresh copy of the model after all epochs of a method."""
    bench.restore()
    for _ in bench.epochs(baseline(method), RATE):
        pass
    return copy.deepcopy(bench.model)


def batches(world, role, epoch):
    if role == "forget":
        rows = np.arange(world.manifest.forget.rows)
    else:
        drawn = np.random.default_rng([0, epoch]).permutation(PLAN.retain_rows)
        rows = np.concatenate([drawn, drawn])[: math.ceil(PLAN.retain_rows / 16) * 16]
    return [rows[start : start + 16] for start in range(0, len(rows), 16)]


def plain(world, original, phases, mask=None):
    """Train by a loop a reader of the paper would write."""
    model = copy.deepcopy(original)
    named = dict(model.named_parameters())
    groups = [
        {"params": [p], "weight_decay": 0.1 if p.ndim > 1 and "ln" not in n else 0.0}
        for n, p in named.items()
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-6)
    order = [
        (role, rows)
        for epoch in range(1, PLAN.epochs + 1)
        for role in phases
        for rows in batches(world, role, epoch)
    ]
    for step, (role, rows) in enumerate(order):
        optimizer.zero_grad()
        value = loss(world, model, role, rows)
        (-value if role == "forget" else value).backward()
        for name, parameter in named.items() if mask else ():
            if parameter.grad is not None:  # a forget loss does not know the scale
                parameter.grad *= mask[name]
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 + math.cos(math.pi * step / len(order))) / 2
        optimizer.step()
        model.logit_scale.data.clamp_(0, math.log(100))
    return model


def distance(first, second):
    """Return how far two models are apart; a key's bias has no gradient, only rounding."""
    total = 0.0
    for (name, a), (_, b) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        if not name.endswith("in_proj_bias"):
            total += float((a - b).detach().double().pow(2).sum())
    return math.sqrt(total)


@pytest.mark.parametrize("method", PHASES)
def test_training_is_the_plain_loop(method, bench, shared_world):
    found = trained(bench, method)
    bench.restore()
    mask = mask_of(bench) if method is Method.SALUN else None
    expected = plain(shared_world, bench.model, PHASES[method], mask)
    assert distance(found, expected) < 0.01 * distance(expected, bench.model)


def test_gaft_forgets_before_it_retains(bench, shared_world):
    """The parity above would not hold for another order, nor for two optimizers."""
    found = trained(bench, Method.GAFT)
    bench.restore()
    turned = plain(shared_world, bench.model, ("retain", "forget"))
    assert distance(found, turned) > 0.1 * distance(found, bench.model)


def test_gradient_ascent_raises_the_forget_loss(bench, shared_world):
    rows = np.arange(shared_world.manifest.forget.rows)
    bench.restore()
    before = loss(shared_world, bench.model, "forget", rows).item()
    after = loss(shared_world, trained(bench, Method.GA), "forget", rows).item()
    assert after > before + 0.1


class Unseen:
    """Images or captions that nobody may look at."""

    def __len__(self):
        return 20

    def __getitem__(self, rows):
        raise AssertionError(f"forget rows were read: {rows}")

    def __getattr__(self, name):
        raise AssertionError(f"{name} of forget rows was read")


def test_fine_tuning_never_sees_a_forget_row(bench):
    unseen = LossTerm(Unseen(), Unseen(), bench.term("forget").loss, -1, shuffled=False)
    terms = {"forget": unseen, "retain": bench.term("retain")}
    bench.restore()
    before = weights_of(bench.model)
    lessons = [terms[role] for role in baseline(Method.FT).losses]
    assert list(train(bench.model, lessons, rate=RATE, plan=PLAN, mask=None)) == [1, 2]
    assert any(not torch.equal(p, before[name]) for name, p in bench.model.named_parameters())
    lessons = [terms[role] for role in baseline(Method.GA).losses]
    with pytest.raises(AssertionError, match="forget rows"):
        list(train(bench.model, lessons, rate=RATE, plan=PLAN, mask=None))


def test_the_mask_is_the_top_half_of_the_forget_gradient(shared_world):
    gradient = shared_world.store.read_tensors(Artifact.GRADIENT.path(shared_world.pointer.forget))
    mask = saliency_mask(gradient)
    sizes = np.concatenate([np.abs(gradient[name]).ravel() for name in sorted(gradient)])
    kept = np.concatenate([mask[name].numpy().ravel() for name in sorted(gradient)])
    assert kept.sum() == sizes.size // 2
    assert sizes[kept].min() >= sizes[~kept].max()
    assert {name: tuple(value.shape) for name, value in mask.items()} == {
        name: value.shape for name, value in gradient.items()
    }


def test_ties_at_the_threshold_still_leave_half():
    gradient = {"b": np.array([[0.0, -3.0]]), "a": np.zeros(3), "c": np.array([2.0])}
    mask = saliency_mask(gradient)
    assert mask["b"].tolist() == [[False, True]]
    assert mask["c"].tolist() == [True]
    assert mask["a"].tolist() == [True, False, False]


def test_salun_moves_other_weights_by_weight_decay_only(bench):
    mask, found = mask_of(bench), trained(bench, Method.SALUN)
    grads = {name: p.grad for name, p in bench.model.named_parameters()}
    assert all(not g[~mask[name]].any() for name, g in grads.items() if g is not None)
    assert sum(g is not None and bool(g.any()) for g in grads.values()) > 20
    steps = PLAN.epochs * (math.ceil(bench.times.manifest.forget.rows / 16) + 3)
    decay = math.prod(1 - 0.1 * cosine_rate(RATE, step, steps) for step in range(steps))
    for name, p in found.named_parameters():
        factor = decay if p.ndim > 1 and "ln" not in name else 1.0
        spared = ~mask[name]
        expected = bench.original_weights[name][spared] * factor
        torch.testing.assert_close(p.data[spared], expected, rtol=1e-4, atol=1e-7)


def test_every_retain_row_comes_once_an_epoch_in_another_order(bench):
    retain = bench.term("retain")
    first, second = (np.concatenate(retain.order(PLAN, epoch)) for epoch in (1, 2))
    assert sorted(set(first)) == list(range(40))
    assert len(first) == 48
    assert first.tolist() != second.tolist()
    assert [len(rows) for rows in retain.order(replace(PLAN, batch_size=64), 1)] == [40]
    other = replace(PLAN, seed=1)
    assert first.tolist() != np.concatenate(retain.order(other, 1)).tolist()
    forget = [rows.tolist() for rows in bench.term("forget").order(PLAN, 2)]
    assert [row for rows in forget for row in rows] == list(range(bench.times.manifest.forget.rows))


def test_fewer_retain_rows_are_the_first_ones(bench, shared_world):
    block = DataBlock.open(shared_world.store, shared_world.manifest.retain)
    pairs = replace(bench, plan=replace(PLAN, retain_rows=10)).term("retain")
    assert len(pairs.images) == 10
    assert (pairs.tokens == block.tokens[:10]).all()
