"""RAZOR's gradients, scores, choice of layers and steps are those of plain computations."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from baselines import PLAN, loss, open_bench

from slsgu_cli.compare.baselines import razor as module
from slsgu_cli.compare.baselines.razor import (
    LARGEST,
    SMALLEST,
    best_step,
    move,
    razor,
    scores,
    selected,
)
from slsgu_cli.compare.epochs import figures_of
from slsgu_cli.compare.tuning import balance
from slsgu_cli.method.layers import candidates
from slsgu_cli.store.blocks import DataBlock


@pytest.fixture
def bench(shared_world):
    bench = open_bench(shared_world, replace(PLAN, epochs=3))
    bench.restore()
    return bench


def batches(world, bench, role):
    rows = bench.term(role).order(bench.plan, 1)
    assert sum(map(len, rows)) >= min(getattr(world.manifest, role).rows, PLAN.retain_rows)
    return rows


def plain(world, bench, model, role):
    """Return the mean gradient over mini-batches, by one backward each."""
    groups = batches(world, bench, role)
    model.zero_grad()
    for rows in groups:
        (loss(world, model, role, rows) / len(groups)).backward()
    return {
        name: model.get_parameter(name).grad.clone()
        for name in candidates(name for name, _ in model.named_parameters())
    }


def cosines(world, model, rows):
    spec, block = world.manifest.input, DataBlock.open(world.store, world.manifest.retain)
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (spec.mean, spec.std))
    images = torch.from_numpy(block.images(0, block.rows)[rows]).permute(0, 3, 1, 2) / 255
    v = model.encode_image((images - mean) / std, normalize=True)
    return v @ model.encode_text(torch.from_numpy(block.tokens[rows]).long(), normalize=True).T


def drift(world, bench, model, original):
    groups = batches(world, bench, "retain")
    model.zero_grad()
    for rows in groups:
        apart = cosines(world, model, rows) - cosines(world, original, rows).detach()
        (apart.square().mean() / len(groups)).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_the_layers_with_the_best_plain_scores_are_moved_along_the_plain_gradients(
    bench, shared_world, monkeypatch
):
    model = copy.deepcopy(bench.model)
    original, moved, chosen, steps = copy.deepcopy(model), [], set(), (0.05, 0.02)
    monkeypatch.setattr(
        module, "best_step", lambda _, along: moved.append(along) or steps[len(moved) - 1]
    )
    rounds = razor(bench, 0.5)
    for number, step in enumerate(steps):
        assert next(rounds) == number + 1
        forget, retain = (plain(shared_world, bench, model, role) for role in ("forget", "retain"))
        plain_scores = {
            name: float(
                forget[name].norm()
                / model.get_parameter(name).detach().norm()
                * (1 - F.cosine_similarity(forget[name].flatten(), retain[name].flatten(), dim=0))
            )
            for name in forget
        }
        if number:
            best = max(plain_scores.keys() - chosen, key=plain_scores.get)
            chosen.add(best)
        else:
            largest = max(plain_scores.values())
            chosen = {name for name, score in plain_scores.items() if score >= largest / 2}
            assert 1 < len(chosen) < len(plain_scores)
        assert moved[-1].keys() == chosen
        of_drift = drift(shared_world, bench, model, original)
        for name, along in moved[-1].items():
            expected = forget[name] - retain[name] - of_drift.get(name, 0)
            size = float(expected.abs().max())
            torch.testing.assert_close(along, expected, rtol=1e-3, atol=2e-3 * size)
            weight = model.get_parameter(name).data
            weight += step * weight.norm() * along / along.norm()
        for name, value in bench.model.state_dict().items():
            torch.testing.assert_close(value, model.state_dict()[name])


def test_scores_prefer_gradients_away_from_the_retain_gradient():
    weights = torch.nn.ParameterDict({name: torch.ones(4) for name in "abc"})
    forget = {name: torch.tensor([2.0, 0, 0, 0]) for name in "abc"}
    retain = {
        "a": torch.tensor([1.0, 0, 0, 0]),
        "b": torch.tensor([0.0, 1, 0, 0]),
        "c": torch.tensor([-1.0, 0, 0, 0]),
    }
    assert scores(weights, forget, retain) == {"a": 0.0, "b": 1.0, "c": 2.0}


def test_layers_are_added_one_at_a_time_until_none_is_left():
    found = {"a": 1.0, "b": 0.6, "c": 0.2}
    assert selected(found, 0.5, set()) == {"a", "b"}
    assert selected(found, 0.5, {"a", "b"}) == {"c"}
    assert selected(found, 0.5, {"a", "b", "c"}) == set()


def test_the_step_has_the_best_trade_off_of_those_tried(bench, shared_world):
    along, before = plain(shared_world, bench, bench.model, "forget"), bench.original_weights
    step = best_step(bench, along)
    assert all(torch.equal(value, before[n]) for n, value in bench.model.state_dict().items())

    def trade_off(size):
        bench.restore()
        move(bench.model, along, size)
        return balance(figures_of(bench.validation))

    first = 2 ** ((SMALLEST + LARGEST) / 2)
    assert trade_off(step) >= trade_off(first)
    assert trade_off(step) > trade_off(0.0)


def test_a_step_is_relative_to_the_norm_of_each_layer():
    weights = torch.nn.ParameterDict({"a": torch.full((4,), 2.0), "b": torch.ones(4)})
    before = {name: value.detach().clone() for name, value in weights.items()}
    along = {"a": torch.tensor([3.0, 0, 0, 0]), "b": torch.zeros(4)}
    move(weights, along, 0.25)
    assert (weights["a"] - before["a"]).tolist() == [0.25 * 4, 0, 0, 0]
    assert torch.equal(weights["b"], before["b"])
