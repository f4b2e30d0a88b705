"""The first epoch that forgets is reported, else the first of those that forget most."""

from types import SimpleNamespace

import pytest
import torch
from baselines import open_bench
from reference import Reference

from slsgu_cli.compare import epochs as epochs_module
from slsgu_cli.records.comparison import Method
from slsgu_cli.records.figures import Accuracy, Figures


def run(accuracies, monkeypatch):
    # The weight is the number of epochs that ran.
    counter = SimpleNamespace(model=torch.nn.Linear(1, 1))

    def epochs():
        for epoch in range(1, len(accuracies) + 1):
            counter.model.weight.data.fill_(epoch)
            yield epoch

    def forget(evaluation):
        return Accuracy(accuracies[int(evaluation.model.weight) - 1], 50.0, 10)

    def figures(evaluation):
        utility = {"set": Accuracy(evaluation.model.weight.item(), 0.0, 10)}
        return Figures(forget(evaluation), utility)

    monkeypatch.setattr(epochs_module, "forget_accuracy", forget)
    monkeypatch.setattr(epochs_module, "figures_of", figures)
    return epochs_module.follow(epochs(), counter, label="test", total=len(accuracies))


@pytest.mark.parametrize(
    ("accuracies", "reported", "ran"),
    [
        ([90.0, 40.0, 0.0, 0.0, 10.0], 3, 3),
        ([0.0, 50.0], 1, 1),
        ([90.0, 40.0, 60.0, 40.0], 2, 4),
        ([90.0, 90.0], 1, 2),
        ([50.0, 40.0, 30.0], 3, 3),
    ],
)
def test_the_reported_epoch_forgets_at_the_highest_utility(accuracies, reported, ran, monkeypatch):
    found = run(accuracies, monkeypatch)
    assert (found.epoch, found.epochs) == (reported, ran)
    assert found.figures.forget.top1 == accuracies[reported - 1]
    assert found.figures.utility["set"].top1 == reported  # measured with that epoch's weights


def test_the_figures_are_of_the_remaining_model(shared_world):
    bench = open_bench(shared_world)
    outcome = bench.run(Method.GA, 3e-3)
    expected = Reference(shared_world, model=bench.model).figures()
    assert expected.forget == pytest.approx((outcome.forget.top1, outcome.forget.top5))
    assert set(outcome.utility) == set(expected.utility)
    for name, figures in outcome.utility.items():
        assert expected.utility[name] == pytest.approx((figures.top1, figures.top5))
    assert outcome.forget.top1 < bench.original().forget.top1
