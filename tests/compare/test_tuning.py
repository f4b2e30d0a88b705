from dataclasses import replace

import pytest

from slsgu_cli.compare.registry import baseline
from slsgu_cli.compare.tuning import best, trade_off, tune
from slsgu_cli.records.comparison import ClipOutcome, Method
from slsgu_cli.records.figures import Accuracy

OUTCOME = ClipOutcome(
    method=Method.GA,
    setting=1e-6,
    plan=None,
    edit=None,
    epoch=1,
    forget=Accuracy(0.0, 0.0, 10),
    utility={"a": Accuracy(90.0, 95.0, 10), "b": Accuracy(70.0, 80.0, 10)},
    seconds=1.0,
    forget_passes=1.0,
    retain_passes=0.0,
    where="cpu",
)


def outcome(setting, forget, kept):
    return replace(
        OUTCOME,
        setting=setting,
        forget=Accuracy(forget, 0.0, 10),
        utility={"a": Accuracy(kept, 0.0, 10)},
    )


def test_forgetting_and_utility_weigh_the_same():
    assert trade_off(OUTCOME) == 90.0
    assert trade_off(replace(OUTCOME, forget=Accuracy(20.0, 0.0, 10))) == 80.0


def test_a_wrecked_model_is_no_best():
    wrecked, untouched, good = outcome(1e-3, 0, 2), outcome(1e-7, 97, 85), outcome(1e-5, 3, 80)
    assert best([wrecked, untouched, good]) is good


def test_of_equal_edits_the_least_harmful_is_best():
    assert best([outcome(1e-4, 0, 80), outcome(1e-5, 0, 80)]).setting == 1e-5


PEAKS = [3e-7, 1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4]


@pytest.mark.parametrize(
    ("method", "peak"),
    [*((Method.FT, peak) for peak in PEAKS), (Method.HIRM_S, 3e-6), (Method.HIRM_R, 3e-3)],
)
def test_the_peak_on_the_grid_is_found(method, peak):
    def run(rate):
        distance = max(rate / peak, peak / rate)
        return outcome(rate, 0.0, 100 / distance)

    found, tried = tune(method, run)
    assert found.setting == peak
    assert len(tried) == 5
    settings = [o.setting for o in tried]
    assert settings == sorted(settings)


def test_ssd_is_tuned_by_its_alpha():
    found, tried = tune(Method.SSD, lambda alpha: outcome(alpha, 0.0, 50 - abs(alpha - 100)))
    assert found.setting == 100.0
    assert [o.setting for o in tried] == list(baseline(Method.SSD).hyperparameter.grid)
