"""Ranking layers by their effect on the features that a target reads, on two linear layers."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from slsgu_cli.targets.subjects import TargetMove, by_gain

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


def test_layers_are_ranked_by_their_effect_on_the_features_of_the_target():
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
