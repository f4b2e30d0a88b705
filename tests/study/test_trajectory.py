"""Trajectories have the figures of plain forwards, and say where these rise."""

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from processes import inside, rows
from reference import Reference

from slsgu_cli.engine.choice import residual
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.figures import curves
from slsgu_cli.records.directions import Direction, DirectionSpec
from slsgu_cli.records.method import Criterion, Trials
from slsgu_cli.records.options import RankOptions, SearchOptions
from slsgu_cli.records.studies import Rise, TrajectoryOptions, largest_rise
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Standing, entries
from slsgu_cli.study.series import FARTHEST, trajectory, trajectory_and_plots

SOME = ("visual.proj", "transformer.resblocks.1.ln_1.weight")


def follow(world, *, points=4, until=None, **search):
    options = TrajectoryOptions(search=SearchOptions(**search), points=points, until=until)
    return trajectory(world.store, world.name, options=options)


def test_every_step_has_the_figures_of_plain_forwards(world):
    found = follow(world, layers=SOME)
    reference = Reference(world)
    assert [len(found.of(line)) for line in found.moves()] == [4, 4]
    for trial in found.trials.trials:
        figures = reference.after(trial.layer, trial.step)
        assert figures.forget == pytest.approx((trial.forget.top1, trial.forget.top5))
        assert {
            name: pytest.approx((kept.top1, kept.top5)) for name, kept in trial.utility.items()
        } == figures.utility
    assert found.trials.baseline_forget.top1 == pytest.approx(reference.figures().forget[0])


def test_the_grid_is_even_and_ends_where_the_concept_is_forgotten(world):
    for criterion in Criterion:
        found = follow(world, criterion=criterion)
        front = [(score.layer, score.direction) for score in world.ranking.scores if score.front]
        assert found.moves() == front
        for line in found.moves():
            steps = [trial.step for trial in found.of(line)]
            assert steps == pytest.approx([steps[-1] * k / 4 for k in (1, 2, 3, 4)])
            last = found.of(line)[-1]
            forget = residual(last.forget, last.gap, criterion, 0.02)
            assert last.share in (pytest.approx(0.1 * 2**k) for k in range(7))
            assert forget == 0 or last.share == pytest.approx(FARTHEST)


def test_whitened_directions_are_followed_for_each_damping(world):
    rank(world.store, "blue", options=RankOptions(direction=Direction.WHITENED))
    for damping in (0.1, 0.01):
        found = follow(world, layers=SOME[:1], points=2, damping=damping)
        assert found.moves() == [(SOME[0], DirectionSpec.of(Direction.WHITENED, damping=damping))]
    recorded = world.store.read_record(Artifact.TRAJECTORY.path("blue"), Trials).trials
    assert Counter(trial.direction.parameters["damping"] for trial in recorded) == {0.1: 2, 0.01: 2}
    found = search(world.store, "blue", options=SearchOptions(layers=SOME[:1]))
    along = {t.step: t for t in follow(world, layers=SOME[:1]).trials.trials}
    for trial in found.trials.trials:
        if trial.step in along:
            assert along[trial.step].forget == trial.forget


def test_the_end_can_be_given(world):
    found = follow(world, layers=SOME, points=3, until=0.3)
    for line in found.moves():
        assert [trial.share for trial in found.of(line)] == pytest.approx([0.1, 0.2, 0.3])


def test_steps_on_record_are_not_measured_again(world):
    first = follow(world, layers=SOME)
    assert first.measured == len(first.trials.trials)
    path = Artifact.TRAJECTORY.path("blue")
    data = world.store.read_bytes(path)
    again = follow(world, layers=SOME)
    assert again.measured == 0
    assert again.trials == first.trials
    assert world.store.read_bytes(path) == data
    # Half of a finer grid is known.
    finer = follow(world, layers=SOME[:1], points=8)
    assert (finer.measured, len(finer.trials.trials)) == (4, 8)
    assert len(world.store.read_record(path, Trials).trials) == 12


def test_steps_of_another_gradient_are_measured_again(world):
    follow(world, layers=SOME)
    world.grade(batch_size=8)
    listed = {entry.kind: entry for entry in entries(world.store)}
    assert listed[Artifact.TRAJECTORY].state is Standing.STALE
    found = follow(world, layers=SOME)
    assert found.measured == len(found.trials.trials)
    listed = {entry.kind: entry for entry in entries(world.store)}
    assert listed[Artifact.TRAJECTORY].state is Standing.OK


def test_rises():
    assert largest_rise([90, 80, 80, 0], [0, 1, 2, 3]) == Rise(0.0, 0.0)
    # Against the least so far, not the step before: 40 to 45 to 50 is a rise by 10.
    assert largest_rise([90, 40, 45, 50, 20, 28], [0, 1, 2, 3, 4, 5]) == Rise(10, 3)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12))
def test_a_rise_is_the_largest_over_all_pairs_of_steps(values):
    pairs = [b - a for i, a in enumerate(values) for b in values[i:]]
    rise = largest_rise(values, range(len(values)))
    assert rise.points == max(pairs)
    assert (rise.points == 0) == (sorted(values, reverse=True) == values)


@pytest.mark.usefixtures("drawing")
def test_figures_are_drawn(world, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "slsgu_cli.engine.plots.step_plot",
        lambda *_, move, **__: drawn.append(move) or b"1",
    )
    options = TrajectoryOptions(search=SearchOptions(layers=SOME), points=3)
    found, paths = trajectory_and_plots(world.store, "blue", options=options)
    assert drawn == found.moves()
    names = ["trajectories", *(f"trajectory-{layer}" for layer in SOME)]
    assert paths == [world.store.where(f"plots/blue-{name}.png") for name in names]
    assert world.store.read_bytes("plots/blue-trajectories.png").startswith(b"\x89PNG")
    picture = curves.trajectories_plot(found.trials, found.moves())
    assert world.store.read_bytes("plots/blue-trajectories.png") == picture


def test_the_command(world):
    root = world.store.root
    asked = ["trajectory", "blue", "--points", "2", "--layer", "visual.proj"]
    done = inside(*asked, store=root)
    assert done.exit_code == 0
    steps, rises = rows(done.stdout)
    assert steps[0] == [
        "layer",
        "direction",
        "step",
        "% of norm",
        "FA@1",
        "FA@5",
        "TA@1 first",
        "TA@1 second",
    ]
    assert [row[0] for row in steps[1:]] == ["visual.proj"] * 2
    assert rises[0][:4] == ["layer", "direction", "steps", "% of norm"]
    assert rises[0][4:6] == ["FA@1 rise", "FA@1 rise at % of norm"]
    assert rises[1][:3] == ["visual.proj", "gradient", "2"]
    found = json.loads(inside(*asked, "--json", store=root).stdout)
    assert len(found["trajectory"]["trials"]) == 2
    assert found["rises"][0]["layer"] == "visual.proj"
    assert len(found["files"]) == 3
    assert inside("trajectory", "blue", "--until", "-3", store=root).exit_code == 2
    assert inside("trajectory", "nobody", store=root).exit_code == 3
