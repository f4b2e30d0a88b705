from dataclasses import replace

import pytest
from reports import CHOSEN, FRONT, NAME, fill

from slsgu_cli.checkpoints.edits import load_edit, write_edit
from slsgu_cli.records.directions import Direction, DirectionSpec
from slsgu_cli.records.method import Criterion, GradientPointer, Precision, Ranking, Trials
from slsgu_cli.report.commands import commands
from slsgu_cli.report.gather import gather
from slsgu_cli.store.catalog import Catalog
from slsgu_cli.store.store import Store

PATHS = {
    GradientPointer: f"gradients/{NAME}.json",
    Ranking: f"rankings/{NAME}.json",
    Trials: f"trials/{NAME}.json",
}


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "store"))
    fill(store, concept="Mickey Mouse")
    return store


def commands_in(store):
    return commands(gather(Catalog(store), NAME))


def change(store, kind, **changes):
    record = store.read_record(PATHS[kind], kind)
    store.write_record(PATHS[kind], replace(record, **changes))


def test_a_line_for_each_step_in_order(store):
    assert commands_in(store) == [
        "slsgu build-sets mouse --concept 'Mickey Mouse' --source 'a b.parquet'",
        "slsgu grad mouse",
        "slsgu rank mouse --direction gradient",
        "slsgu search mouse --criterion fa1 --steps 5",
        "slsgu apply mouse --out without-mouse",
        "slsgu eval mouse --model local-dir:without-mouse",
    ]


def test_options_other_than_the_defaults_are_shown(store):
    change(store, GradientPointer, batch_size=8, precision="bf16")
    trials = store.read_record(PATHS[Trials], Trials)
    some = tuple(trial for trial in trials.trials if trial.layer in FRONT[:2])
    change(store, Trials, trials=some, precision=Precision.TF32)
    lines = commands_in(store)
    assert lines[1] == "slsgu grad mouse --batch-size 8 --precision bf16"
    assert lines[3] == (
        f"slsgu search mouse --criterion fa1 --layer {FRONT[0]} --layer {FRONT[1]} --steps 5 "
        "--precision tf32"
    )
    assert CHOSEN not in lines[3]


def damped(damping):
    return DirectionSpec.of(Direction.WHITENED, damping=damping)


def test_the_search_has_the_direction_and_the_damping_of_the_edit(store):
    change(store, Ranking, directions=(damped(0.01),))
    trials = store.read_record(PATHS[Trials], Trials)
    change(
        store,
        Trials,
        directions=(Direction.WHITENED,),
        trials=tuple(replace(trial, direction=damped(0.1)) for trial in trials.trials),
        criterion=Criterion.MARGIN,
        margin=0.05,
    )
    edit = load_edit(store, NAME)
    write_edit(store, replace(edit, header=replace(edit.header, direction=damped(0.1))))
    lines = commands_in(store)
    assert lines[2] == "slsgu rank mouse --direction whitened"
    assert lines[3] == "slsgu search mouse --criterion margin --margin 0.05 --damping 0.1 --steps 5"


def test_stale_records_have_no_command(store):
    change(store, Ranking, forget="another")
    assert [line.split()[1] for line in commands_in(store)] == [
        "build-sets",
        "grad",
        "apply",
        "eval",
    ]
