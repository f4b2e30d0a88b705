"""Ranking layers by their effect on the features that a target reads, on two linear layers."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from slsgu_cli.targets.subjects import CHANGE, TargetMove, by_gain, gain_per_change

EARLY, LATE = "visual.transformer.resblocks.0.mlp.c_proj.weight", "visual.proj"


class Reader:
    """A target that reads `late @ early @ inputs`; late amplifies the moves of early."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.values = {name: torch.randn((4, 4), generator=generator) for name in (EARLY, LATE)}
        self.values[LATE] *= 5
        self.inputs = torch.randn((4, 50), generator=generator)
        self.encoder = SimpleNamespace(edited=self.edited)

    @contextmanager
    def edited(self, values):
        before = dict(self.values)
        self.values |= values
        yield
        self.values = before

    def read(self):
        return (self.values[LATE] @ self.values[EARLY] @ self.inputs).flatten()

    def moves(self, **importance):
        return [
            TargetMove(self, name, self.values[name], torch.eye(4), importance[kind])
            for kind, name in (("early", EARLY), ("late", LATE))
        ]


def test_a_promise_is_the_slope_over_the_change_for_each_step():
    asked = []

    def change(step):
        asked.append(step)
        return 0.5 * step

    assert gain_per_change(3.0, change, 0.2) == pytest.approx(6.0)
    assert asked == pytest.approx([0.2, CHANGE / 0.5])


def test_a_move_that_changes_nothing_that_is_read_promises_nothing():
    assert gain_per_change(3.0, lambda _: 0.0, 0.2) == 0.0


def test_layers_are_ranked_by_what_is_read_whatever_they_do_to_their_own_outputs():
    target = Reader()
    gradients = dict.fromkeys((EARLY, LATE), torch.eye(4))
    ranked = by_gain(target, target.moves(early=9.0, late=1.0), gradients)
    before, by_hand = target.read(), {}
    for move in ranked:
        with move.in_place(1e-3):
            by_hand[move.layer] = 4e-3 / float((target.read() - before).norm() / before.norm())
    for move in ranked:
        # Both layers stand once in a product, so the change is linear in the step.
        assert move.importance == pytest.approx(by_hand[move.layer], rel=1e-2)
    assert [move.layer for move in ranked] == [LATE, EARLY]
    assert torch.equal(target.read(), before)


def test_twice_the_slope_is_twice_the_promise():
    target = Reader()
    single, double = (
        by_gain(target, target.moves(early=1.0, late=1.0)[:1], {EARLY: factor * torch.eye(4)})
        for factor in (1, 2)
    )
    assert double[0].importance == pytest.approx(2 * single[0].importance)
