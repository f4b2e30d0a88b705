"""SSD is the plain loop over mini-batches, parameters and weights."""

import numpy as np
import pytest
import torch
from baselines import loss, open_bench

from slsgu_cli.compare.baselines.ssd import constants, dampen, dampening
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.records.options import PassOptions
from slsgu_cli.store.artifacts import Artifact


def test_only_weights_important_to_the_forget_set_are_dampened():
    forget = torch.tensor([0.0, 1.0, 9.9, 10.1, 40.0, 1.0, 0.0])
    retain = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0, 0.0])
    found = dampening(forget, retain, alpha=10, constant=2.0)
    assert found.tolist() == pytest.approx([1, 1, 1, 2 / 10.1, 2 / 40, 0, 1])


def test_no_weight_is_ever_enlarged():
    found = dampening(torch.tensor([3.0]), torch.tensor([2.0]), alpha=1, constant=5)
    assert found.tolist() == [1.0]


def test_the_constants_are_the_papers():
    assert len(constants(10)) == 10
    assert constants(10)[0] == pytest.approx(0.1)
    assert constants(10)[-1] == pytest.approx(5.0)
    assert np.diff(constants(10)) == pytest.approx([4.9 / 9] * 9)


def plain_squares(world, model, role):
    """Return the mean over mini-batches of squared gradients, by one backward each."""
    rows = np.arange(getattr(world.manifest, role).rows)
    groups = [rows[start : start + 16] for start in range(0, len(rows), 16)]
    total = {name: np.zeros(p.shape) for name, p in model.named_parameters()}
    for group in groups:
        model.zero_grad()
        loss(world, model, role, group).backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] += parameter.grad.numpy().astype(float) ** 2
    return {name: value / len(groups) for name, value in total.items()}


def test_dampening_is_the_plain_loop(world):
    compute_gradients(world.store, world.name, model=None, options=PassOptions(), squares=True)
    bench = open_bench(world)
    forget, retain = (
        world.store.read_tensors(Artifact.SQUARES.path(digest))
        for digest in (world.pointer.forget, world.pointer.retain)
    )
    plain = [plain_squares(world, bench.model, role) for role in ("forget", "retain")]
    for found, expected in zip((forget, retain), plain, strict=True):
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, 1e-2, 1e-7 + 1e-3 * value.max())
    bench.restore()
    alpha = 0.5
    assert list(dampen(bench.model, forget, retain, alpha=alpha, epochs=3)) == [1, 2, 3]
    changed = 0
    for name, parameter in bench.model.named_parameters():
        f, r = forget[name].ravel(), retain[name].ravel()
        before = bench.original_weights[name].numpy().ravel()
        after = parameter.detach().numpy().ravel()
        some = np.flatnonzero(f > alpha * r)[:20]
        for i in [*some, *np.linspace(0, f.size - 1, min(f.size, 20)).astype(int)]:
            expected = before[i]
            for constant in (0.1, 2.55, 5.0):
                if f[i] > alpha * r[i]:
                    expected *= min(1.0, constant * r[i] / f[i])
            changed += expected != before[i]
            assert np.isclose(after[i], expected, rtol=1e-4, atol=1e-9), name
    assert changed > 100
