"""What a killed command had done is kept; run again, it ends with the bytes of one run through.

A command is stopped at a call of one of its functions, and no clock decides at which.
Seconds that were measured are others, of course: `took` and `seconds` of trials and rows, and
the times of `passes`; a search that went on has none.
"""

import itertools
import json
from pathlib import Path

import pytest
from processes import inside

from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.engine import resumable
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.search import search
from slsgu_cli.engine.utility import UtilityMeter
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.store.blocks import BlockWriter
from slsgu_cli.study import series
from slsgu_cli.verification.checks import prefix, relearn, ring_a_bell
from slsgu_cli.verification.training import Training
from slsgu_cli.verification.verify import _VerifyRun

TIMES = {"took", "seconds", "passes", "sha256"}
LAYERS = ["--layer", "visual.proj", "--layer", "text_projection", "--layer", "visual.conv1.weight"]
SEARCH = ["search", "blue", *LAYERS, "--steps", "4"]
COMPARE = [
    "compare",
    "blue",
    "--lr",
    "1e-3,1e-4",
    "--epochs",
    "1",
    "--retain-rows",
    "16",
    "--methods",
    "ga,ft,rome,ours",
]
VERIFY = ["verify", "blue", "--rows", "20", "--checks", "augment,neighbours,nearest,retrieval"]

PARTS = {
    "prefix": (prefix.WordSearch, "run"),
    "ring-a-bell": (ring_a_bell, "breed"),
    "relearn": (relearn, "taught"),
}


class Calls:
    """Counts the calls of a function, and stops the command at one of them."""

    def __init__(self, monkeypatch, owner, name):
        self.stop = None
        function, numbers = getattr(owner, name), itertools.count(1)

        def called(*arguments, **options):
            self.number = next(numbers)
            if self.number == self.stop:
                raise KeyboardInterrupt
            return function(*arguments, **options)

        self.number = 0
        monkeypatch.setattr(owner, name, called)

    def stop_after(self, calls):
        self.stop = self.number + calls + 1


def contents(root):
    """Return what lies in a store, records without the seconds that were measured."""
    files = {}
    for path in sorted(Path(root).rglob("*")):
        if path.is_file():
            name = str(path.relative_to(root))
            data = path.read_bytes()
            files[name] = without_times(json.loads(data)) if path.suffix == ".json" else data
    return files


def without_times(value):
    if isinstance(value, dict):
        return {key: without_times(each) for key, each in value.items() if key not in TIMES}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def differing(one, other):
    assert list(one) == list(other)
    return [name for name in one if one[name] != other[name]]


@pytest.fixture
def resumed(shared_world, tmp_path, monkeypatch):
    """`resumed(words, owner, name, calls)` runs a command through, and stopped and run again.

    The calls that it went on with after `calls` of them are returned, and all there are.
    """

    def both(words, owner, name, calls, *, searched=False):
        worlds = [shared_world.copied(tmp_path / folder) for folder in ("through", "stopped")]
        for world in worlds if searched else ():
            options = SearchOptions(layers=["visual.proj"], steps=4)
            search(world.store, "blue", options=options)
        counted = Calls(monkeypatch, owner, name)
        through, stopped = (str(world.store.root) for world in worlds)
        first = inside(*words, store=through)
        assert first.exit_code in (0, 5), first.stderr
        every = counted.number
        counted.stop_after(calls)
        assert inside(*words, store=stopped).exit_code == 130
        before = counted.number
        assert inside(*words, store=stopped).exit_code == first.exit_code
        assert differing(contents(through), contents(stopped)) == []
        return counted.number - before, every

    return both


@pytest.mark.parametrize("calls", [1, 6])
def test_a_killed_search_loses_no_trial(calls, resumed):
    went_on, every = resumed(SEARCH, Evaluator, "measure", calls)
    assert went_on == every - calls


def test_a_killed_search_loses_no_measured_utility(resumed):
    went_on, every = resumed([*SEARCH, "--full"], UtilityMeter, "measure", 3)
    assert went_on == every - 3


def test_trajectory_loses_no_step(resumed):
    words = ["trajectory", "blue", *LAYERS[:4], "--points", "3", "--until", "5"]
    went_on, every = resumed(words, UtilityMeter, "measure", 2)
    assert went_on == every - 2


def test_compare_keeps_its_rows_and_their_order(resumed):
    went_on, every = resumed(COMPARE, BaselineRunner, "run", 3, searched=True)
    assert went_on == every - 3


def test_verify_loses_no_check(resumed):
    went_on, every = resumed(VERIFY, _VerifyRun, "_run", 6, searched=True)
    assert went_on == every - 6


@pytest.mark.parametrize(("check", "calls"), [("prefix", 3), ("ring-a-bell", 1), ("relearn", 1)])
def test_verify_loses_no_part_of_a_long_check(check, calls, resumed):
    few = [
        "--rows",
        "20",
        "--attack-starts",
        "2",
        "--attack-steps",
        "1",
        "--population",
        "8",
        "--generations",
        "2",
        "--steps",
        "2",
    ]
    owner, name = PARTS[check]
    went_on, every = resumed(
        ["verify", "blue", "--checks", check, *few], owner, name, calls, searched=True
    )
    assert went_on == every - calls


@pytest.mark.parametrize(
    ("check", "calls"), [("finetune", 2), ("relearn", 1), ("relearn", 4), ("inversion", 3)]
)
def test_verify_loses_no_step_of_a_training(check, calls, resumed, monkeypatch):
    monkeypatch.setattr(resumable, "KEEP_SECONDS", 0.0)
    monkeypatch.setattr(resumable, "KEEP_SHARE", 0.0)
    few = ["--rows", "20", "--steps", "3", "--inversion-steps", "4"]
    went_on, every = resumed(
        ["verify", "blue", "--checks", check, *few], Training, "advance", calls, searched=True
    )
    assert went_on == every - calls


def test_build_sets_decodes_no_row_of_a_complete_block_again(resumed, shared_world):
    sources = shared_world.sources
    words = [
        "build-sets",
        "red",
        "--model",
        shared_world.model.name,
        "--source",
        sources["pairs"],
        "--label-column",
        "label",
        "--retain-samples",
        "30",
        "--eval",
        f"first={sources['first']}",
    ]
    went_on, every = resumed(words, BlockWriter, "add", 40)
    assert went_on < every


def test_a_sweep_resumes_at_its_class(resumed, shared_world, tmp_path):
    (tmp_path / "classes.txt").write_text("red\ngreen\n")
    sources = shared_world.sources
    words = [
        "sweep",
        "colours",
        "--classes",
        tmp_path / "classes.txt",
        "-m",
        shared_world.model.name,
        "--source",
        sources["pairs"],
        "--label-column",
        "label",
        "--retain-samples",
        "30",
        "--eval",
        f"first={sources['first']}",
        "--steps",
        "2",
        "--direction",
        "gradient",
    ]
    went_on, every = resumed(words, series, "compute_gradients", 1)
    assert (went_on, every) == (2, 2)
