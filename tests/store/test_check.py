"""`check` reads everything; `--repair` and `gc` remove what may go, and nothing else."""

import json
import os
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from processes import inside, rows
from tiny_images import encoded

from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.clip.models import has_model
from slsgu_cli.engine.set_edits import direct_edit
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.method import CovarianceHeader, LayerCovariance, SumsHeader
from slsgu_cli.records.targets import DiffusionOptions, Generation
from slsgu_cli.store.atomic import partial_name, writer_lives
from slsgu_cli.store.blocks import block_writer
from slsgu_cli.store.catalog import Standing
from slsgu_cli.store.check import check, garbage, remove
from slsgu_cli.store.locks import held
from slsgu_cli.store.store import Store
from slsgu_cli.targets.output_folder import OutputFolder


def flip(store, path, place=-40):
    """Flip a bit of a file in a store, by default near its end."""
    file = Path(store.where(path))
    data = bytearray(file.read_bytes())
    data[place] ^= 4
    file.write_bytes(data)


def chunk_of(path):
    return f"{path}/images/c/0/0/0/0"


def states(checked):
    return {found.path: (str(found.state), found.removable) for found in checked.findings}


@pytest.fixture
def edited(world):
    """A world whose set has an edit."""
    write_edit(world.store, direct_edit(world.store, "blue", layer="visual.proj", step=0.5))
    return world


def test_a_whole_store_is_clean(edited):
    checked = check(edited.store, has_model=has_model)
    assert checked.findings == ()
    assert checked.artifacts >= 9
    assert checked.size >= edited.store.size("gradients")
    done = inside("check", "--json", store=edited.store.root)
    assert (done.exit_code, json.loads(done.stdout)["check"]) == (0, [])


def test_damaged_rows_and_gradients_are_recomputed_byte_for_byte(edited):
    store, pointer = edited.store, edited.pointer
    block = edited.manifest.forget.path
    gradient = f"gradients/{pointer.forget}.safetensors"
    before = {path: store.read_bytes(path) for path in (gradient, chunk_of(block))}
    for path in before:
        flip(store, path)
    damaged = {gradient: ("damaged", True), block: ("damaged", True)}
    assert states(check(store, has_model=has_model)) == damaged
    assert inside("check", store=store.root).exit_code == 3
    done = inside("check", "--repair", store=store.root)
    assert done.exit_code == 0
    ((head, *lines),) = rows(done.stdout)
    mend = {line[head.index("name")]: line[head.index("to mend it")] for line in lines}
    assert set(mend.values()) == {"slsgu build-sets blue --replay", "slsgu grad blue"}
    assert not store.exists(gradient) and not store.exists(block)
    for command in ("build-sets blue --replay", "grad blue"):
        assert inside(*command.split(), store=store.root).exit_code == 0
    assert {path: store.read_bytes(path) for path in before} == before
    assert check(store, has_model=has_model).findings == ()


def test_irreplaceable_artifacts_are_removed_only_on_request(edited, tmp_path):
    store, manifest = edited.store, edited.manifest
    gradient = f"gradients/{edited.pointer.retain}.safetensors"
    damaged = ("edits/blue.safetensors", "sets/blue.json", gradient)
    flip(store, damaged[0], -8)
    flip(store, gradient)
    gone = check(store, repair=True, has_model=lambda model, weights: False)
    assert states(gone) == dict.fromkeys((damaged[0], gradient), ("damaged", False))
    flip(store, damaged[1], 40)
    found = check(store, repair=True, has_model=has_model)
    assert {path for path, state in states(found).items() if state == ("damaged", False)} >= set(
        damaged
    )
    assert all(store.exists(path) for path in damaged)
    check(store, repair=True, irreplaceable=True, has_model=has_model)
    assert not any(store.exists(path) for path in damaged)
    assert store.exists(manifest.forget.path)


def test_rows_without_sources_stay(edited, monkeypatch):
    flip(edited.store, chunk_of(edited.manifest.retain.path))
    monkeypatch.setattr("slsgu_cli.store.check.expand", missing)
    (found,) = check(edited.store, repair=True, has_model=has_model).findings
    assert (found.removable, found.removed) == (False, False)


def ended_process():
    """Return the number of a process that has ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return process.pid


def missing(source):
    raise MissingError(f"no file matches source {source.path}")


def test_a_block_in_the_place_of_another_is_damaged(world):
    store, manifest = world.store, world.manifest
    first, second = (store.where(chunk_of(manifest.evals[n].path)) for n in ("first", "second"))
    shutil.copy(first, second)
    (found,) = check(store).findings
    assert found.path == manifest.evals["second"].path
    assert "fingerprint" in found.reason


def test_every_kind_is_read(edited):
    store = edited.store
    header = CovarianceHeader("model", "data", 9, {"a": LayerCovariance(0, 9.0, 1.5)}, (), "0.1.0")
    store.write_tensors("covariances/m.safetensors", {"a": np.eye(3)}, header)
    inside("show", "blue", store=store.root)
    paths = ["covariances/m.safetensors", "gradients/blue.json", "rankings/blue.json"]
    paths += [f"plots/{name}" for name in store.names("plots")]
    assert len(paths) >= 4
    for path in paths:
        flip(store, path, -20)
    found = check(store)
    assert {path for path, (state, _) in states(found).items() if state == "damaged"} >= set(paths)


def test_names_and_files_choose_what_is_read(several_world, tmp_path):
    store = Store(str(tmp_path / "store"))
    shutil.copytree(several_world.store.root, store.root)
    whole = check(store, ["blue"])
    assert whole.findings == ()
    assert 8 <= whole.artifacts < check(store).artifacts
    flip(store, "rankings/red.json", 60)
    assert check(store, ["blue"]).findings == ()
    (found,) = check(store, ["red"]).findings
    assert found.path == "rankings/red.json"
    assert check(store, ["rankings/blue.json"]).artifacts == 1
    (found,) = check(store, [store.where("rankings/red.json")]).findings
    assert found.state is Standing.DAMAGED
    copy = tmp_path / "an edit.json"
    shutil.copy(store.where("rankings/red.json"), copy)
    (found,) = check(Store(str(tmp_path / "none")), [str(copy)], repair=True).findings
    assert (found.state, found.path, copy.exists()) == (Standing.DAMAGED, str(copy), True)
    with pytest.raises(MissingError, match="no set or edit gren") as caught:
        check(store, ["gren"])
    assert "green" in caught.value.hint


def test_covariances_without_a_header_are_reported_for_each_set(world):
    world.store.write_bytes("covariances/m.safetensors", b"no header")
    (found,) = check(world.store, ["blue"]).findings
    assert (found.state, found.path) == (Standing.DAMAGED, "covariances/m.safetensors")
    assert check(world.store, ["rankings/blue.json"]).findings == ()


def test_only_partial_files_of_dead_processes_are_removed(world):
    store = world.store
    own = partial_name("a.zarr")
    dead = own.replace(f".{os.getpid()}-", f".{ended_process()}-")
    named = {
        dead: False,
        partial_name("b.zarr"): True,
        ".partial-00000000-c.zarr": None,
        ".partial-ffffffff.1-00000000-d.zarr": None,
    }
    assert {name: writer_lives(name) for name in named} == named
    old = time.time() - 7200
    for name in named:
        store.write_bytes(f"data/{name}/chunk", b"12345")
    os.utime(store.where("data/.partial-ffffffff.1-00000000-d.zarr/chunk"), (old, old))
    checked = check(store, repair=True, has_model=has_model)
    assert {found.name: found.removed for found in checked.findings} == {
        name: life is False or "ffff" in name for name, life in named.items()
    }
    assert all(found.state is Standing.UNFINISHED for found in checked.findings)
    assert len(store.unfinished("data")) == 2


def test_foreign_and_unreferenced_files_are_reported_and_stay(world):
    from safetensors.numpy import save

    store = world.store
    store.write_bytes("sets/notes.txt", b"mine")
    store.write_bytes("edits/theirs.safetensors", save({"x": np.zeros(2)}, {"format": "pt"}))
    world.build(seed=7)
    checked = check(store, repair=True, has_model=has_model)
    found = {str(found.state): found.path for found in checked.findings}
    assert {"foreign", "stale", "unreferenced"} == set(found)
    assert not any(found.removed for found in checked.findings)
    assert store.exists("sets/notes.txt") and store.exists("edits/theirs.safetensors")
    stale = [found.mend for found in checked.findings if found.path == "rankings/blue.json"]
    assert stale == ["slsgu rank blue"]


@pytest.fixture(params=["local", "memory"])
def any_store(request, tmp_path):
    store = Store(
        f"memory://{tmp_path.name}" if request.param == "memory" else str(tmp_path / "store")
    )
    yield store
    for folder in ("data", "covariances"):
        store.remove(folder)


def test_gc_lists_and_removes_unreferenced_artifacts(any_store):
    with block_writer(any_store, "data/a.zarr", height=4, width=4, rows=3) as writer:
        writer.add(np.zeros((4, 4, 3), np.uint8), key="a")
        writer.finish(None, {})
    header = CovarianceHeader("model", "data", 9, {"a": LayerCovariance(0, 9.0, 1.5)}, (), "0.1.0")
    any_store.write_tensors("covariances/m.safetensors", {"a": np.eye(3)}, header)
    found = garbage(any_store)
    assert [one.path for one in found] == ["data/a.zarr", "covariances/m.safetensors"]
    assert all(one.size > 0 and not one.removed for one in found)
    assert any_store.exists("data/a.zarr")
    # Somebody writes: what is young may be part of it.
    any_store.write_bytes(f"data/{partial_name('b.zarr')}/chunk", b"12345")
    assert garbage(any_store) == []
    any_store.remove(f"data/{any_store.unfinished('data')[0]}")
    assert all(one.removed for one in remove(any_store, garbage(any_store)))
    assert garbage(any_store) == []
    assert any_store.names("data") == any_store.names("covariances") == []


def test_gc_on_the_command_line(world):
    store = world.store
    before = inside("gc", store=store.root)
    assert (before.exit_code, before.stdout.count("\n")) == (0, 1)
    world.build(retain_samples=59)
    listed = json.loads(inside("gc", "--json", store=store.root).stdout)["unused"]
    assert {one["kind"] for one in listed} == {"data"}
    size = sum(one["size"] for one in listed)
    total = store.size("")
    done = inside("gc", "--yes", "--json", store=store.root)
    assert all(one["removed"] for one in json.loads(done.stdout)["unused"])
    assert store.size("") == total - size
    assert inside("ls", store=store.root).stdout.count("unreferenced") == 0


def test_checking_a_missing_store_is_an_error(tmp_path):
    for command in ("check", "gc"):
        done = inside(command, store=tmp_path / "mistyped")
        assert done.exit_code == 3
        assert "there is no store" in done.stderr


def test_gc_removes_nothing_while_a_record_is_unknown(world):
    world.store.write_bytes("sets/other.json", b"{")
    with pytest.raises(InputError, match=r"other\.json is damaged"):
        garbage(world.store)


def test_locks_of_dead_processes_and_old_sums_are_removed(world):
    store = world.store
    store.write_bytes("locks/gradients-dead.lock", b"process 1")
    for name in ("recent", "old"):
        header = SumsHeader(name, "cpu", 9, 3, "0.1.0")
        store.write_tensors(f"sums/{name}.safetensors", {"total": np.zeros(2)}, header)
    weeks_ago = time.time() - 14 * 86400
    os.utime(store.where("sums/old.safetensors"), (weeks_ago, weeks_ago))
    with held(store, "gradients/living", what="it"):
        checked = check(store, repair=True, has_model=has_model)
    assert {finding.name: finding.removed for finding in checked.findings} == {
        "gradients-living.lock": False,
        "gradients-dead.lock": True,
        "old": True,
        "recent": False,
    }


def test_a_replaced_picture_is_damaged(tmp_path):
    store = Store(str(tmp_path / "store"))
    output = OutputFolder.at(store, "blue", None)
    # Whole pictures both: their own checksums do not tell.
    one, other = encoded(1), encoded(2)
    output.write("original/0.png", one)
    output.finish(
        Generation(
            name="blue",
            concept="blue",
            target="sd",
            edits={},
            seeds=(0,),
            diffusion=DiffusionOptions(),
            prompts=(),
            judge=None,
            before=None,
            after=None,
            version="0",
            digests={"original/0.png": sha256(one).hexdigest()},
        )
    )
    assert inside("check", store=store.root).exit_code == 0
    store.write_bytes("generations/blue/original/0.png", other)
    done = inside("check", store=store.root)
    assert done.exit_code == 3
    assert "it does not match its digest" in done.stdout
