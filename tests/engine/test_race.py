"""Steps that are raced are left no more often than they may be, and the choice is the exact one."""

import numpy as np
import pytest
from raced import made_up

from slsgu_cli.engine.choice import utility_of
from slsgu_cli.engine.race import Race, RowDraw
from slsgu_cli.engine.utility import TOLERANCE, UtilityMeter
from slsgu_cli.records.method import Measurement, Tower, UtilityMetric
from slsgu_cli.records.options import NO_BOUND

ROWS = 300
SEEDS = 250
RISK = 0.1


def usual_figures(rng, rows=ROWS):
    """Return what the original model keeps of each row: most for certain, some hardly."""
    return np.clip(1.3 - rng.exponential(0.5, rows), 0.0, 1.0)


def hits(rng, usual):
    return (rng.random(len(usual)) < usual).astype(float)


# Figures as an adversary would have them, who knows by which chances rows are drawn.
FIGURES = {
    "as usual": lambda rng, usual: usual.copy(),
    "hits": hits,
    "the certain ones missed": lambda rng, usual: np.where(usual > np.quantile(usual, 0.9), 0, 1.0),
    "the uncertain ones missed": lambda rng, usual: (usual > np.quantile(usual, 0.3)).astype(float),
    "uncertain ones gained, certain ones lost": lambda rng, usual: 1 - usual,
    "one row missed": lambda rng, usual: np.eye(len(usual))[rng.integers(len(usual))] * -1 + 1,
    "all alike": lambda rng, usual: np.full(len(usual), 0.7),
}


def drawn(weights, *known, seed):
    waits = np.random.default_rng(seed).exponential(size=len(weights))
    return RowDraw.of(weights, np.stack(known), waits)


def run(race, figures, risk, rows=25):
    """Look at rows until a race is lost, or at all of them; return whether it was."""
    while race.looked < len(figures) and not race.lost(risk):
        race.look(figures[race.draw.order[race.looked :][:rows]])
    return race.lost(risk)


@pytest.mark.parametrize("rival", [None, *FIGURES])
@pytest.mark.parametrize("kind", FIGURES)
def test_a_good_step_is_stopped_no_more_often_than_the_risk(kind, rival):
    rng = np.random.default_rng(5)
    usual = usual_figures(rng)
    weights = rng.choice([1.0, 3.0], ROWS)
    weights /= weights.sum()
    known = [usual, FIGURES[rival](rng, usual)] if rival else [usual]
    lost = 0
    for seed in range(SEEDS):
        figures = FIGURES[kind](rng, usual)
        mean = float(weights @ figures)
        # Its mean is the very mark: the hardest case.
        lost += run(Race(drawn(weights, *known, seed=seed), mean, mean - 0.01), figures, RISK)
    assert lost <= RISK * SEEDS + 4 * (RISK * (1 - RISK) * SEEDS) ** 0.5


def test_a_much_worse_step_is_stopped_after_few_rows():
    rng = np.random.default_rng(6)
    usual, weights = usual_figures(rng, 2000), np.full(2000, 1 / 2000)
    figures, mark = usual * 0.8, float(weights @ usual) - 0.005
    for seed in range(20):
        race = Race(drawn(weights, usual, seed=seed), mark, mark)
        assert run(race, figures, 0.001)
        assert race.looked <= 400
        seen = race.draw.order[: race.looked]
        assert race.missed == pytest.approx((weights * (1 - figures))[seen].sum())


def test_a_step_that_misses_its_rivals_rows_and_more_is_stopped_sooner():
    rng = np.random.default_rng(8)
    usual, weights = np.full(ROWS * 4, 0.9), np.full(ROWS * 4, 1 / ROWS / 4)
    rival = (rng.random(ROWS * 4) < 0.6).astype(float)
    figures = np.where(rng.random(ROWS * 4) < 0.05, 0.0, rival)
    mark = float(weights @ rival)
    for seed in range(20):
        alone = Race(drawn(weights, usual, seed=seed), mark, mark)
        beside = Race(drawn(weights, usual, rival, seed=seed), mark, mark)
        run(alone, figures, 0.001)
        assert run(beside, figures, 0.0005)
        assert beside.looked < 0.8 * alone.looked


def test_a_higher_score_to_beat_stops_a_step_no_later():
    """So that a mark which depends on other races is as good as one that does not."""
    rng = np.random.default_rng(7)
    usual, weights = usual_figures(rng), np.full(ROWS, 1 / ROWS)
    for seed in range(20):
        figures, draw = hits(rng, usual), drawn(weights, usual, seed=seed)
        least = float(weights @ figures) - 0.02
        looked = []
        for mark in np.linspace(least, least + 0.2, 9):
            race = Race(draw, mark, least)
            run(race, figures, 0.01, rows=1)
            looked.append(race.looked)
        assert looked == sorted(looked, reverse=True)
        assert looked[0] > looked[-1]


def test_rows_are_drawn_once_and_by_their_chances():
    usual = np.array([0.0] * 50 + [1.0] * 50)
    weights = np.full(100, 0.01)
    orders = [drawn(weights, usual, seed=seed).order for seed in range(200)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    first = np.mean([order[0] < 50 for order in orders])
    assert first == pytest.approx(1.05 / 1.1, abs=0.05)
    assert (drawn(weights, usual, seed=3).order == orders[3]).all()


def test_without_risk_no_step_is_stopped_early():
    weights, zeros = np.full(50, 0.02), np.zeros(50)
    race = Race(drawn(weights, zeros, seed=0), 0.9, 0.9)
    assert not run(race, zeros, 0.0)
    assert race.missed == pytest.approx(1.0)


# Over 200 orders of the rows a race looks at 0.76 of what a proof does, by hits alone at 0.90.
@pytest.mark.parametrize(
    ("utility", "most"), [(UtilityMetric.EXPECTED, 0.8), (UtilityMetric.TA1, 0.95)]
)
def test_raced_searches_choose_what_exact_ones_do(utility, most):
    looked, ways = np.zeros(2), set()
    for seed in range(25):
        world = made_up(seed)
        raced, search = world.searched(seed=seed, utility=utility)
        looked[0] += world.looked
        exact, proven = world.searched(exact=True, utility=utility)
        looked[1] += world.looked
        assert utility_of(raced, utility) >= utility_of(exact, utility) - TOLERANCE
        ways |= {trial.measurement for trial in search.trials.values()}
        for way in (search, proven):
            for trial in way.trials.values():
                assert (trial.measurement is Measurement.COMPLETE) == (trial.utility is not None)
        assert Measurement.EARLY_STOPPED not in {
            trial.measurement for trial in proven.trials.values()
        }
    assert ways == set(Measurement)
    assert looked[0] < most * looked[1]


@pytest.fixture
def bars(monkeypatch):
    """What each step must keep, in the order in which steps are measured."""
    noted, measure = [], UtilityMeter.measure

    def measured(self, evaluator, trial, *, bar=None):
        if bar:
            noted.append(bar)
        return measure(self, evaluator, trial, bar=bar)

    monkeypatch.setattr(UtilityMeter, "measure", measured)
    return noted


def rivals(bars):
    return [bar.rival and bar.rival[0].index for bar in bars]


def test_a_rival_is_replaced_only_by_clearly_higher_utility(bars):
    world = made_up(1)
    world.steps = [
        {name: margins - shift for name, margins in world.original.items()}
        for shift in (0.3, 0.2999, 0.1, 0.2)
    ]
    world.searched(max_class_loss=NO_BOUND)
    first, slightly_more, more, _ = world.keeps()
    assert first < slightly_more < first + TOLERANCE < more
    assert rivals(bars) == [None, 0, 0, 2]
    assert [bar.beat for bar in bars[1:]] == pytest.approx([first, first, more])
    assert [bar.risk for bar in bars] == [0.0025] * 4


def test_rivals_are_the_same_in_every_order_of_rows(bars):
    """So each race has one, and the whole of its share of the risk."""
    found = set()
    for seed in range(30):
        bars.clear()
        made_up(4).searched(seed=seed)
        found.add(tuple(rivals(bars)))
    assert len(found) == 1
    assert len(set(*found)) > 2


def test_rows_without_another_concept_change_few_evaluated_rows():
    world = made_up(2)
    # A text step that loses nothing sets the mark, and looks at no image anew.
    world.steps = [world.original, *world.steps]
    world.towers = [Tower.TEXT] + 8 * [Tower.VISION]
    fewer = world.without({"set 0": np.arange(0, 300, 20), "set 1": np.arange(5, 20)})
    world.searched()
    fewer.searched()
    assert 0 < len(fewer.seen) < 0.8 * 1170
    assert len(fewer.seen - world.seen) < 0.05 * len(fewer.seen)


def test_a_raced_search_measures_exact_figures():
    world = made_up(3)
    _, raced = world.searched()
    _, full = world.searched(full=True)
    for key, trial in raced.trials.items():
        if trial.utility is not None:
            assert trial == full.trials[key]
    assert all(trial.utility for trial in full.trials.values())


@pytest.mark.parametrize("count", [1, 3, 6])
def test_a_resumed_search_ends_like_an_uninterrupted_one(count):
    world = made_up(3)
    chosen, through = world.searched()
    every = list(through.trials.values())
    assert {trial.measurement for trial in every} >= {
        Measurement.COMPLETE,
        Measurement.EARLY_STOPPED,
    }
    again, search = world.searched(trials=every[:count])
    assert again == chosen
    assert list(search.trials.values()) == every


def test_stopped_steps_could_not_have_been_chosen():
    spared = set()
    for seed in range(40):
        world = made_up(seed)
        _, every = world.searched(full=True)
        losses = sorted(trial.worst.lost for trial in every.trials.values())
        for bound in (losses[0], losses[len(losses) // 2], losses[-1]):
            choice, _ = world.searched(full=True, max_class_loss=bound)
            proven, _ = world.searched(exact=True, max_class_loss=bound)
            assert proven == choice
            spared.add(choice.worst.lost <= bound)
    assert spared == {True, False}


def test_a_step_that_spares_every_class_sets_the_full_bar():
    world = made_up(1)
    _, every = world.searched(full=True)
    worst = max(trial.worst.lost for trial in every.trials.values())
    world.searched(exact=True, max_class_loss=worst)
    looked = world.looked
    world.searched(exact=True, max_class_loss=0.0)
    assert looked < world.looked
