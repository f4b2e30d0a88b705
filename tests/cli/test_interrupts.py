"""Commands that are interrupted, killed or run side by side: nothing half-made ever counts."""

import json
import os
import shutil
import signal
import time

import pytest
from processes import inside, start
from safetensors.numpy import load_file, safe_open, save_file

from slsgu_cli.cli.demo import DATA

pytestmark = pytest.mark.slow


def build(store, rows=64):
    heldout = f"{DATA / 'heldout.parquet'}?concept=github&concept=facebook"
    return [
        "build-sets", "facebook", "--store", store, "--model", f"local-dir:{DATA / 'clip'}",
        "--source", DATA / "train.parquet", "--retain-samples", rows, "--max-forget", 16,
        "--eval", f"brands={heldout}",
    ]  # fmt: skip


def wait_for(condition, process):
    """Wait until `condition()` holds; fail if the process ends before."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def interrupted(process):
    """Interrupt a command as Ctrl-C does; return what it said."""
    process.send_signal(signal.SIGINT)
    out, told = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out == ""
    assert told.endswith("interrupted; what was complete is kept\n")
    assert "Traceback" not in told


def unfinished(store):
    return [path for path in store.rglob("*") if path.name.startswith((".partial", ".tmp"))]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A store with a set whose retain gradient takes some seconds."""
    store = tmp_path_factory.mktemp("built") / "store"
    assert inside(*build(store)).exit_code == 0
    return store


@pytest.fixture
def store(built, tmp_path):
    shutil.copytree(built, tmp_path / "store")
    return tmp_path / "store"


def test_interrupted_build(tmp_path):
    store = tmp_path / "store"
    process = start(*build(store, 1200))
    wait_for(lambda: list(store.glob("data/[0-9a-f]*.zarr")), process)
    interrupted(process)
    assert not unfinished(store)
    assert len(list(store.glob("data/*.zarr"))) < 3, "all of forget, retain and evaluation set"
    assert not (store / "sets").exists()
    assert inside("grad", "facebook", store=store).exit_code == 3
    again = inside(*build(store, 1200))
    assert again.exit_code == 0
    assert "forget: 16 rows were decoded before and are used again" in again.stderr


def test_interrupted_gradient_pass(store):
    process = start("grad", "facebook", "--store", store)
    wait_for(lambda: list(store.glob("gradients/[0-9a-f]*.safetensors")), process)
    interrupted(process)
    assert not unfinished(store)
    (kept,) = (store / "gradients").iterdir()
    assert inside("rank", "facebook", store=store).exit_code == 3
    again = inside("grad", "facebook", store=store)
    assert again.exit_code == 0
    assert f"forget gradient {kept.stem}: in the store already" in again.stderr
    assert inside("rank", "facebook", "--direction", "gradient", store=store).exit_code == 0


def test_interrupted_search_goes_on_where_it_was(store):
    for words in (["grad", "facebook"], ["rank", "facebook", "--direction", "gradient"]):
        assert inside(*words, store=store).exit_code == 0
    trials = store / "trials" / "facebook.json"
    words = ["search", "facebook", "--layer", "visual.proj", "--layer", "text_projection"]
    words += ["--layer", "visual.conv1", "--steps", 4]
    process = start(*words, "--store", store)
    wait_for(trials.exists, process)
    interrupted(process)
    assert not unfinished(store)
    assert not (store / "edits").exists()
    recorded = len(json.loads(trials.read_text())["trials"])
    again = inside(*words, store=store)
    assert again.exit_code == 0
    assert f"{recorded} recorded trials were used again" in again.stderr
    assert len(json.loads(trials.read_text())["trials"]) > recorded


def test_killed_gradient_pass(store):
    process = start("grad", "facebook", "--store", store)
    wait_for(lambda: list(store.glob("gradients/[0-9a-f]*.safetensors")), process)
    process.kill()
    process.communicate()
    assert inside("rank", "facebook", store=store).exit_code == 3
    assert inside("grad", "facebook", store=store).exit_code == 0
    assert inside("rank", "facebook", "--direction", "gradient", store=store).exit_code == 0


def test_killed_apply_leaves_no_checkpoint(shared_world, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(shared_world.store.root, store)
    large = tmp_path / "large"
    shutil.copytree(shared_world.folder, large)
    weights = large / "open_clip_model.safetensors"
    tensors = load_file(weights)
    # What makes the copy last; no edit is for it.
    tensors["padding"] = tensors["visual.conv1.weight"].repeat(9000)
    save_file(tensors, weights, {"format": "pt"})
    words = ["apply", "blue", "--store", store, "--model", f"local-dir:{large}"]
    words += ["--layer", "visual.conv1", "--step", "0.001", "--out", tmp_path / "out"]
    process = start(*words)
    wait_for(lambda: list(tmp_path.glob(".partial*/out/*.safetensors")), process)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    again = inside(*words)
    assert again.exit_code == 0, again.stderr
    with safe_open(tmp_path / "out" / weights.name, "np") as file:
        assert set(file.keys()) == set(tensors)
        moved = file.get_tensor("visual.conv1.weight")
        assert (moved != tensors["visual.conv1.weight"]).any()


def test_two_gradient_passes_side_by_side(shared_world, tmp_path):
    store = tmp_path / "store"
    shutil.copytree(shared_world.store.root, store)
    shutil.rmtree(store / "gradients")
    shutil.rmtree(store / "rankings")
    both = [start("grad", "blue", "--store", store) for _ in range(2)]
    for process in both:
        _, told = process.communicate(timeout=120)
        assert process.returncode == 0, told
    assert not unfinished(store)
    listed = json.loads(inside("ls", "--json", store=store).stdout)["store"]
    assert [e["kind"] for e in listed].count("gradient") == 2
    assert {e["state"] for e in listed} == {"ok"}
    assert inside("rank", "blue", store=store).exit_code == 0


def test_a_terminated_build_leaves_what_ls_lists_and_no_set(tmp_path):
    store = tmp_path / "store"
    process = start(*build(store, 1200))
    wait_for(lambda: list(store.glob("data/.partial*")), process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    listed = json.loads(inside("ls", "--json", store=store).stdout)["store"]
    assert "set" not in {entry["kind"] for entry in listed}
    assert {e["state"] for e in listed if e["kind"] == "unfinished"} <= {"unreferenced"}
    assert inside(*build(store, 1200)).exit_code == 0
