"""A search of several sets in one call gives the results of single searches."""

import json
from dataclasses import replace

import pytest
from processes import inside, rows

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip.evaluation import SharedEvaluation
from slsgu_cli.engine.search import search, search_each
from slsgu_cli.engine.search_plan import grouped, read_plans
from slsgu_cli.records.options import SearchOptions

NAMES = ("blue", "red", "green")


@pytest.fixture
def passes(monkeypatch):
    """Count base passes."""
    counted = []
    run = SharedEvaluation.base_pass
    monkeypatch.setattr(
        SharedEvaluation, "base_pass", lambda *a, **k: (counted.append(1), run(*a, **k))[1]
    )
    return counted


@pytest.fixture(scope="module")
def apart(several_world, tmp_path_factory):
    """The searches of each set alone, by name, and their world."""
    world = several_world.copied(tmp_path_factory.mktemp("apart") / "store")
    options = SearchOptions(steps=3)
    return world, {name: search(world.store, name, options=options) for name in NAMES}


@pytest.mark.parametrize("budget", [None, 0, 200_000])
def test_each_finds_what_it_finds_alone(budget, several_world, apart, tmp_path, passes):
    together, (alone, singles) = several_world.copied(tmp_path / "store"), apart
    options = SearchOptions(steps=3, cache_budget=budget)
    results = list(search_each(together.store, NAMES, options=options))
    assert len(passes) == 1
    assert [result.trials.name for result in results] == list(NAMES)
    for result in results:
        single = singles[result.trials.name]
        # Sums of fewer rows at a time differ in their last digits.
        assert result.chosen.expected == pytest.approx(single.chosen.expected, abs=1e-4)
        assert replace(result.chosen, expected=None) == replace(single.chosen, expected=None)
        assert result.trials.baseline_utility == single.trials.baseline_utility
        for one, other in zip(result.trials.trials, single.trials.trials, strict=True):
            assert (one.layer, one.step, one.forget) == (other.layer, other.step, other.forget)
        name = result.trials.name
        assert load_edit(together.store, name).header == load_edit(alone.store, name).header


def test_sets_on_other_rows_have_a_base_pass_of_their_own(several_world, tmp_path, passes):
    world = several_world.copied(tmp_path / "store")
    other = replace(world, name="red")
    other.build(evals={"first": world.sources["first"]}, templates={}, retain_exclude=NAMES)
    other.grade()
    groups = grouped(read_plans(world.store, NAMES, options=SearchOptions()))
    assert [[case.name for case in group] for group in groups] == [["blue", "green"], ["red"]]
    options = SearchOptions(steps=2)
    results = list(search_each(world.store, NAMES, options=options))
    assert [result.trials.name for result in results] == ["blue", "green", "red"]
    assert len(passes) == 2
    assert set(results[2].trials.baseline_utility) == {"first"}


def test_the_command(several_world, tmp_path):
    root = several_world.copied(tmp_path / "store").store.root
    done = inside("search", "blue", "red", "--steps", "5", store=root)
    assert done.exit_code == 0
    tables = rows(done.stdout)
    assert [row for table in tables for row in table if row[0] == "set"] == [
        ["set", "blue"],
        ["set", "red"],
    ]
    found = json.loads(inside("search", "blue", "red", "--steps", "5", "--json", store=root).stdout)
    assert [(each["set"], each["trials"]["name"]) for each in found["sets"]] == [
        ("blue", "blue"),
        ("red", "red"),
    ]
    assert inside("search", "blue", "blue", store=root).exit_code == 2
    left = inside(
        "search",
        "blue",
        "red",
        "--steps",
        "1",
        "--layer",
        "transformer.resblocks.1.attn.out_proj.weight",
        store=root,
    )
    assert left.exit_code == 5
    assert "no step forgets blue" in left.stderr
