"""Commands that are interrupted, killed or run side by side: nothing half-made ever counts.

Each is met at a call of one of its functions, and not after some time.
"""

import itertools
import json
import shutil
import signal

import pytest
from processes import inside, start_held
from safetensors.numpy import load_file

from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.gradient_pass import GradientPass

END = "interrupted; completed work is saved\n"
# Rows of the forget set are added first, then those of the retain set.
ROW, FORGET = "slsgu_cli.store.blocks:BlockWriter.add", 20


def unfinished(store):
    return [path for path in store.rglob("*") if path.name.startswith((".partial", ".tmp"))]


@pytest.fixture
def build(shared_world, tmp_path):
    """What builds the set blue in a store that is not there yet."""
    sources = shared_world.sources
    return [
        "build-sets",
        "blue",
        "--store",
        tmp_path / "store",
        "--model",
        shared_world.model.name,
        "--source",
        sources["pairs"],
        "--label-column",
        "label",
        "--retain-samples",
        60,
        "--eval",
        f"first={sources['first']}",
    ]


@pytest.fixture
def store(shared_world, tmp_path):
    """A store with the set blue, without gradients."""
    shutil.copytree(shared_world.store.root, tmp_path / "store")
    for folder in ("gradients", "rankings"):
        shutil.rmtree(tmp_path / "store" / folder)
    return tmp_path / "store"


@pytest.fixture
def interrupt(monkeypatch):
    """`interrupt(owner, name, call)` is Ctrl-C at a call of a method, in this process."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def at(owner, name, call):
        method, calls = getattr(owner, name), itertools.count(1)

        def interrupted(*arguments, **options):
            if next(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return method(*arguments, **options)

        monkeypatch.setattr(owner, name, interrupted)

    yield at
    signal.signal(signal.SIGINT, before)


def assert_interrupted(code, out, told, expected=130):
    assert (code, out) == (expected, "")
    assert told.endswith(END)
    assert "Traceback" not in told


def test_interrupted_build(build, tmp_path):
    store = tmp_path / "store"
    process = start_held(*build, at=ROW, call=FORGET + 30)
    assert unfinished(store)
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=120)
    assert_interrupted(process.returncode, out, told)
    assert not unfinished(store)
    assert len(list(store.glob("data/*.zarr"))) == 1
    assert not (store / "sets").exists()
    assert inside("grad", "blue", store=store).exit_code == 3
    again = inside(*build)
    assert again.exit_code == 0
    assert f"forget: reusing {FORGET} decoded rows" in again.stderr
    assert "retain: " not in again.stderr


@pytest.mark.parametrize(("sign", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_ended_by_a_scheduler(store, sign, code):
    before = sorted(store.rglob("*"))
    within = "slsgu_cli.engine.gradient_pass:GradientPass._group"
    process = start_held("grad", "blue", "--store", store, at=within)
    process.send_signal(sign)
    out, told = process.communicate(timeout=120)
    assert_interrupted(process.returncode, out, told, expected=code)
    assert not unfinished(store)
    assert [path for path in before if not path.exists()] == []


def test_an_ignored_signal_stays_ignored(store):
    # As `nohup` starts a command.
    within = "slsgu_cli.engine.gradient_pass:GradientPass._group"
    process = start_held("grad", "blue", "--store", store, at=within, ignore=signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    out, told = process.communicate(timeout=120)
    assert process.returncode == 0, told
    assert out


def test_interrupted_gradient_pass(store, interrupt):
    # The forget set makes two mini-batches.
    interrupt(GradientPass, "_group", 3)
    first = inside("grad", "blue", store=store)
    assert_interrupted(first.exit_code, first.stdout, first.stderr)
    assert not unfinished(store)
    assert not list((store / "locks").iterdir())
    (kept,) = (store / "gradients").iterdir()
    assert inside("rank", "blue", store=store).exit_code == 3
    again = inside("grad", "blue", store=store)
    assert again.exit_code == 0
    assert f"forget gradient {kept.stem}: in the store already" in again.stderr
    assert inside("rank", "blue", "--direction", "gradient", store=store).exit_code == 0


def test_an_interrupted_search_resumes(store, interrupt):
    for words in (["grad", "blue"], ["rank", "blue", "--direction", "gradient"]):
        assert inside(*words, store=store).exit_code == 0
    trials = store / "trials" / "blue.json"
    words = ["search", "blue", "--layer", "visual.proj", "--layer", "text_projection"]
    words += ["--layer", "visual.conv1.weight", "--steps", 4]
    interrupt(Evaluator, "measure", 8)
    first = inside(*words, store=store)
    assert_interrupted(first.exit_code, first.stdout, first.stderr)
    assert not unfinished(store)
    assert not (store / "edits").exists()
    recorded = json.loads(trials.read_text())["trials"]
    assert len(recorded) == 7
    assert {trial["layer"] for trial in recorded} == {"visual.proj", "text_projection"}
    again = inside(*words, store=store)
    assert again.exit_code == 0
    assert f"{len(recorded)} recorded trials were reused" in again.stderr
    whole = json.loads(trials.read_text())["trials"]
    assert {trial["layer"] for trial in whole} == {*words[3:8:2]}


def kill(process):
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def test_killed_gradient_pass(store):
    within = "slsgu_cli.engine.gradient_pass:GradientPass._group"
    whole = inside("grad", "blue", store=store)
    assert whole.exit_code == 0
    before = {path: path.read_bytes() for path in (store / "gradients").glob("*.safetensors")}
    shutil.rmtree(store / "gradients")
    words = ["grad", "blue", "--store", store]
    kill(start_held(*words, at=within, call=6, env={"KEEP_ALWAYS": "1"}))
    assert len(list((store / "gradients").iterdir())) == 1
    assert inside("rank", "blue", store=store).exit_code == 3
    assert len(list((store / "locks").iterdir())) == 1
    again = inside("grad", "blue", store=store)
    assert again.exit_code == 0
    assert "waiting" not in again.stderr
    assert "the retain gradient resumes after 3 of its 4 mini-batches" in again.stderr
    assert not list((store / "locks").iterdir())
    assert {path: path.read_bytes() for path in before} == before
    assert inside("rank", "blue", "--direction", "gradient", store=store).exit_code == 0


def test_killed_apply_leaves_no_checkpoint(world, tmp_path):
    words = ["apply", "blue", "--store", world.store.root, "--layer", "visual.conv1"]
    words += ["--step", "0.001", "--out", tmp_path / "out"]
    process = start_held(*words, at="slsgu_cli.checkpoints.safetensors_file:write_at")
    (half,) = tmp_path.glob(".partial*/out/*.safetensors")
    kill(process)
    assert half.exists()
    assert not (tmp_path / "out").exists()
    again = inside(*words)
    assert again.exit_code == 0, again.stderr
    before, after = (load_file(f / half.name) for f in (world.folder, tmp_path / "out"))
    assert before.keys() == after.keys()
    moved = [name for name in before if (before[name] != after[name]).any()]
    assert moved == ["visual.conv1.weight"]


def test_two_gradient_passes_side_by_side(store):
    """Both begin before either has written anything."""
    words = ["grad", "blue", "--store", store, "--no-wait"]
    both = [start_held(*words, at="slsgu_cli.engine.gradients:_compute") for _ in range(2)]
    for process in both:
        process.stdin.close()
    for process in both:
        assert process.wait(120) == 0, process.stderr.read()
    assert not unfinished(store)
    listed = json.loads(inside("ls", "--json", store=store).stdout)["store"]
    assert [e["kind"] for e in listed].count("gradient") == 2
    assert {e["state"] for e in listed} == {"ok"}
    assert inside("rank", "blue", store=store).exit_code == 0


def test_a_killed_build_leaves_listed_leftovers_and_no_set(build, tmp_path):
    store = tmp_path / "store"
    kill(start_held(*build, at=ROW, call=FORGET // 2))
    listed = json.loads(inside("ls", "--json", store=store).stdout)["store"]
    assert {(entry["kind"], entry["state"]) for entry in listed} == {("unfinished", "unfinished")}
    assert inside(*build).exit_code == 0
