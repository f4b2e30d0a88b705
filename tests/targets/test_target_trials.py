"""The trials of a search on a target, on a stand-in that forgets as a layer grows."""

from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from slsgu_cli.records.directions import FALLBACK
from slsgu_cli.records.figures import Effect, Share
from slsgu_cli.records.method import Tower
from slsgu_cli.records.targets import Budget, GradientOf, TargetSearchOptions, TargetTrials
from slsgu_cli.store.store import Store
from slsgu_cli.targets.search import TargetSearch
from slsgu_cli.targets.subjects import TargetMove

LAYER = "transformer.resblocks.0.mlp.c_proj.weight"


class Target:
    """A target that shows less of the concept, and of the rest, the larger its layer is."""

    def __init__(self):
        self.size, self.asked = 4.0, 0
        self.encoder = SimpleNamespace(
            edited=self.edited, tower_place=SimpleNamespace(tower=Tower.TEXT)
        )

    @contextmanager
    def edited(self, values):
        before, self.size = self.size, float(values[LAYER][0])
        yield
        self.size = before

    def concept(self, _goal=None):
        return Share(max(0, 10 - int(2 * (self.size - 4))), 10)

    def others(self):
        self.asked += 1
        return Share(max(0, 20 - int(self.size - 4)), 20)


@pytest.fixture
def target():
    return Target()


@pytest.fixture
def move(target):
    return TargetMove(target, LAYER, torch.tensor([4.0, 3.0]), torch.tensor([1.0, 0.0]), 1.0)


@pytest.fixture
def make(target, move, tmp_path):
    trials = TargetTrials(
        name="blue",
        target="sd",
        target_fingerprint="",
        gradient_of=GradientOf.CLIP,
        forget="",
        forget_data="",
        retain_data="",
        evals={},
        direction=FALLBACK,
        judge=None,
        budget=Budget(),
        goal=100.0,
        importance={LAYER: 1.0},
        before=Effect(Share(10, 10), Share(20, 20)),
        trials=(),
        seconds=2.0,
        version="",
    )

    def made(**options):
        options = TargetSearchOptions(
            target=tmp_path, goal=100.0, overshoot=1.0, max_loss=100, **options
        )
        return TargetSearch(Store(str(tmp_path)), trials, [move], options)

    return made


def test_retained_accuracy_is_measured_for_the_shortest_step_that_forgets(make, move, target):
    run = make(steps=6)
    best = run.run([move], {})
    assert best.concept == Share(0, 10)
    assert [trial for trial in run.record.trials if trial.others] == [best]
    assert best.step == min(t.step for t in run.record.trials if t.concept.count == 0)
    assert target.asked == 1


def test_a_full_search_measures_retained_accuracy_for_every_trial(make, move, target):
    plain, full = make(steps=6), make(steps=6, full=True)
    chosen = [run.run([move], {}) for run in (plain, full)]
    assert chosen[0] == chosen[1]
    frontier = sorted(full.record.trials, key=lambda trial: trial.step)
    assert all(trial.others for trial in frontier)
    assert [trial.others.count for trial in frontier] == sorted(
        (trial.others.count for trial in frontier), reverse=True
    )


def test_the_time_of_a_search_includes_that_of_recorded_trials(make, move):
    run = make()
    run.bisect(move, 2)
    spent = run.record.seconds
    assert 2.0 < spent < 60.0
    run.bisect(move, 2)
    assert run.record.seconds == spent
