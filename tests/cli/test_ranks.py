"""Several processes that a launcher starts do what one does, and end as one."""

import json
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from forked import KEEP_ALWAYS, ROWS_AT_ONCE, Forked
from processes import environment, inside

from slsgu_cli import processes
from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.engine import covariance
from slsgu_cli.errors import UsageError
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Standing, entries

LAUNCHER = ("-m", "torch.distributed.run", "--nproc-per-node=1", "--nnodes=2")


def launched(*program):
    """Let two of PyTorch's launchers, as on two machines, start a program in a process each.

    Return what was printed and told, and the two exit codes.
    """
    meeting = ("--rdzv-backend=c10d", "--rdzv-id=slsgu", f"--rdzv-endpoint=127.0.0.1:{free_port()}")
    launchers = [
        subprocess.Popen(
            [sys.executable, *LAUNCHER, *meeting, *map(str, program)],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        for _ in range(2)
    ]
    outputs = [launcher.communicate(timeout=300) for launcher in launchers]
    out, told = map("".join, zip(*outputs, strict=True))
    return out, told, [launcher.returncode for launcher in launchers]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(count, words, *, env=None, killed=None):
    """Run a command in processes with the variables of a launcher; return how they ended.

    That is a code, what was printed and what was told of each. Half of them hash strings
    otherwise than the others do. The last one is killed at a call of a function, if `killed`
    has its name and the number of the call.
    """
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} | (env or {})
    group |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    ranks = []
    for rank in range(count):
        held = dict(zip(("at", "call"), killed, strict=True)) if killed and rank else {}
        variables_of = environment(variables(group, RANK=rank, LOCAL_RANK=rank))
        ranks.append(Forked(words, variables_of, server=rank % 2, **held))
    if killed:
        ranks[-1].kill()
    outputs = [process.communicate(timeout=300) for process in ranks]
    return [(process.returncode, *each) for process, each in zip(ranks, outputs, strict=True)]


def variables(*some, **more):
    return {name: str(value) for each in (*some, more) for name, value in each.items()}


def sweep_of(world, folder):
    (folder / "classes.txt").write_text("red\ngreen\n")
    evals = [f"--eval={name}={world.sources[name]}" for name in ("first", "second")]
    templates = [f"--templates={name}={world.sources['templates']}" for name in ("first", "second")]
    return [
        "sweep",
        "colours",
        "--classes",
        folder / "classes.txt",
        "-m",
        world.model.name,
        "-s",
        world.sources["pairs"],
        "--retain-samples",
        60,
        "--test-fraction",
        0,
        *evals,
        *templates,
        "--label-column",
        "label",
        "--steps",
        2,
        "--direction",
        "gradient",
    ]


@pytest.fixture
def jobs(world, tmp_path):
    """The commands that run in several processes, and the store they begin with."""
    for digest in (world.pointer.forget, world.pointer.retain):
        world.store.remove(Artifact.GRADIENT.path(digest))
    world.store.remove(Artifact.RANKING.path("blue"))
    search = ["search", "blue", "--steps", 3, "--full", "--direction", "whitened"]
    search += ["--layer", "visual.proj", "--layer", "1.mlp.c_fc"]
    # Activations of some images only are cached: ranks run different parts of the towers.
    uncached = ["search", "blue", "--steps", 2, "--full", "--direction", "whitened"]
    uncached += ["--layer", "text_projection", "--layer", "conv1"]
    uncached += ["--layer", "visual.transformer.resblocks.0.mlp.c_fc"]
    uncached += ["--cache-budget", "150K"]
    return world, [
        ["grad", "blue", "--batch-size", 7],
        ["grad", "blue", "--batch-size", 3, "--squares"],
        ["rank", "blue", "--direction", "kfac"],
        ["rank", "blue"],
        search,
        uncached,
        sweep_of(world, tmp_path),
    ]


def assert_alike(found, expected, path="", *, digits=1e-6):
    """Compare figures that were written as JSON, floats to some digits."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), path
        for key in expected.keys() - {"took", "sha256"}:
            assert_alike(found[key], expected[key], f"{path}.{key}", digits=digits)
    elif isinstance(expected, list):
        assert len(found) == len(expected), path
        for index, (mine, other) in enumerate(zip(found, expected, strict=True)):
            assert_alike(mine, other, f"{path}[{index}]", digits=digits)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=digits, abs=digits), path
    else:
        assert found == expected, path


def assert_near(store, other, path):
    """Compare the tensors of two files, of which the order of sums changes the last digits."""
    found, expected = store.read_tensors(path), other.read_tensors(path)
    for name, value in expected.items():
        bound = 1e-6 * np.abs(value).max()
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=bound, err_msg=name)


def test_several_processes_do_what_one_does(jobs, tmp_path):
    world, commands = jobs
    alone = world.copied(tmp_path / "alone")
    expected_codes = [inside(*words, store=alone.store.root).exit_code for words in commands]
    assert expected_codes[:4] == [0, 0, 0, 0]
    for words, code in zip(commands, expected_codes, strict=True):
        # Four for one pass alone, which splits mini-batches.
        count = 4 if "--squares" in words else 2
        first, *others = run(count, [*words, "--store", world.store.root])
        assert first[0] == code, first
        assert first[1]
        # The first alone prints and tells, and says that nothing was forgotten.
        assert others == [(0, "", "")] * (count - 1)
    for kind in (Artifact.GRADIENT, Artifact.SQUARES):
        assert kind.names(world.store) == kind.names(alone.store)
        for name in kind.names(alone.store):
            assert_near(world.store, alone.store, kind.path(name))
    statistics = Artifact.COVARIANCE.names(world.store)
    assert len(statistics) == 2
    for name in statistics:
        assert_near(world.store, alone.store, Artifact.COVARIANCE.path(name))
    for kind, name in (
        (Artifact.RANKING, "blue"),
        (Artifact.TRIALS, "blue"),
        (Artifact.TRIALS, "red"),
        (Artifact.SWEEP, "colours"),
    ):
        records = [
            json.loads(store.read_bytes(kind.path(name))) for store in (world.store, alone.store)
        ]
        assert_alike(*records, f"{kind} {name}", digits=1e-5)
    edits = [load_edit(store, "blue") for store in (world.store, alone.store)]
    assert len({(edit.header.layer, edit.header.step) for edit in edits}) == 1
    assert_near(world.store, alone.store, Artifact.EDIT.path("blue"))
    others = [entry.state for entry in entries(world.store) if entry.state is not Standing.OK]
    assert others == 2 * [Standing.UNREFERENCED]  # the gradients of the other --batch-size


# The tower that a process runs over a part of the retain rows.
RUN_PART = "slsgu_cli.clip.towers:SplitTower.features"
SMALL_PARTS = {KEEP_ALWAYS: 1, ROWS_AT_ONCE: 16}


@pytest.mark.parametrize("ranks", [1, 2])
def test_covariances_of_processes_that_died_resume(ranks, world, tmp_path, monkeypatch):
    """Two processes have run 4 of 4 parts of the texts and 2 of 4 of the images."""
    monkeypatch.setitem(covariance.ROWS_PER_FORWARD, "cpu", 16)
    whole = world.copied(tmp_path / "whole")
    rank = ["rank", "blue", "--direction", "whitened"]
    assert inside(*rank, store=whole.store.root).exit_code == 0
    in_store = ["--store", world.store.root]
    first, second = run(2, [*rank, *in_store], env=SMALL_PARTS, killed=(RUN_PART, 4))
    assert (first[0], second) == (1, (-9, "", "")), first
    assert len(ours(first[2])) == 1
    assert len(Artifact.SUMS.names(world.store)) == 1
    again, *others = run(ranks, [*rank, *in_store], env=SMALL_PARTS)
    assert again[0] == 0, again
    assert "the covariances resume after 6 of their 8 parts" in again[2]
    assert all(other == (0, "", "") for other in others)
    assert Artifact.SUMS.names(world.store) == []
    (name,) = Artifact.COVARIANCE.names(whole.store)
    assert_near(world.store, whole.store, Artifact.COVARIANCE.path(name))
    rankings = [
        json.loads(store.read_bytes(Artifact.RANKING.path("blue")))
        for store in (world.store, whole.store)
    ]
    assert_alike(*rankings, digits=1e-6)


SLOW = """
import os, sys, time
from pathlib import Path
from slsgu_cli.__main__ import main
from slsgu_cli.engine import resumable
from slsgu_cli.engine.gradient_pass import GradientPass

resumable.KEEP_SECONDS = resumable.KEEP_SHARE = 0.0
group, calls = GradientPass._group, []

def counted(self, images, ids):
    calls.append(1)
    # In the retain pass, when its first turns are kept.
    if os.environ["RANK"] == "1" and len(calls) == 13:
        while not list(Path(sys.argv[-1], "sums").glob("*.safetensors")):
            time.sleep(0.05)
        os.kill(os.getpid(), 9)
    return group(self, images, ids)

GradientPass._group = counted
main()
"""


def ours(told):
    """Return the lines that are ours, not the launcher's."""
    return [line for line in told.splitlines() if line.startswith(("error:", "warning:"))]


def test_a_dying_process_ends_all_and_another_number_resumes(world, tmp_path):
    compute = ["grad", "blue", "--batch-size", 2]
    whole = world.copied(tmp_path / "whole")
    assert inside(*compute, store=whole.store.root).exit_code == 0
    (tmp_path / "slow.py").write_text(SLOW)
    out, told, codes = launched(tmp_path / "slow.py", *compute, "--store", world.store.root)
    assert all(codes), told
    # The launcher may end the other one before it meets that the first is gone.
    ends = [line for line in told.splitlines() if line.startswith(("error:", "interrupted;"))]
    assert (out, len(ends)) == ("", 1), told
    assert len(Artifact.SUMS.names(world.store)) == 1, told
    # One process goes on with what two have kept.
    again = inside(*compute, store=world.store.root)
    assert "resumes after 16 of its" in again.stderr
    for digest in digests(whole):
        assert_near(world.store, whole.store, Artifact.GRADIENT.path(digest))


def digests(world):
    return world.pointer.forget, world.pointer.retain


def test_each_process_uses_the_gpu_of_its_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(name) for name in ("auto", "cuda:1")] == ["cuda", "cuda:1"]
    monkeypatch.setattr(processes, "_group", processes._Group(rank=3, size=4))
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert [pick_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda:1", "cuda:1", "cpu"]
    with pytest.raises(UsageError, match="cuda:0 is one card for all processes"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 processes on this machine, which has 2 cards"):
        pick_device("auto")


def launched_here(monkeypatch, rank):
    """Let this process think that a launcher started it as one of two."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("command", ["eval blue", "ls", "grad"])
def test_commands_for_one_process_are_refused_once_in_several(command, rank, world, monkeypatch):
    launched_here(monkeypatch, rank)
    done = inside(*command.split(), store=world.store.root)
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(ours(done.stderr)) == (1 if rank == 0 else 0)
    if rank == 0 and command != "grad":
        assert f"{command.split()[0]} runs in one process, and 2 were started" in done.stderr
