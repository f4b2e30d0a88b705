"""Several processes that a launcher starts do what one does, and end as one."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from processes import environment, inside

from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Standing, entries

SEVERAL = Path(__file__).parents[1] / "support" / "several.py"
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def launched(count, *program, **options):
    """Start a program in several processes; its outputs are text."""
    return subprocess.Popen(
        [sys.executable, *LAUNCHER, str(count), *map(str, program)],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), **options,
    )  # fmt: skip


def run(count, commands, folder):
    """Run commands in several processes; return the exit codes and what was printed and told."""
    (folder / "commands.json").write_text(json.dumps([list(map(str, words)) for words in commands]))
    process = launched(count, SEVERAL, folder / "commands.json")
    out, told = process.communicate(timeout=300)
    assert process.returncode == 0, told
    codes = [int(line.removeprefix("exit ")) for line in out.splitlines() if "exit" in line]
    return codes, out, told


def sweep_of(world, folder):
    (folder / "classes.txt").write_text("red\ngreen\ncyan\n")
    evals = [f"--eval={name}={world.sources[name]}" for name in ("first", "second")]
    templates = [f"--templates={name}={world.sources['templates']}" for name in ("first", "second")]
    return [
        "sweep", "colours", "--classes", folder / "classes.txt", "-m", world.model.name,
        "-s", world.sources["pairs"], "--retain-samples", 60, "--report-share", 0, *evals,
        *templates, "--label-column", "label", "--steps", 2, "--direction", "gradient",
    ]  # fmt: skip


@pytest.fixture
def jobs(world, tmp_path):
    """The commands that run in several processes, and the store they begin with."""
    for digest in (world.pointer.forget, world.pointer.retain):
        world.store.remove(Artifact.GRADIENT.path(digest))
    world.store.remove(Artifact.RANKING.path("blue"))
    search = ["search", "blue", "--steps", 3, "--full", "--direction", "whitened"]
    search += ["--layer", "visual.proj", "--layer", "1.mlp.c_fc"]
    return world, [
        ["grad", "blue", "--batch-size", 3, "--squares"],
        ["rank", "blue"],
        search,
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


def test_four_processes_do_what_one_does(jobs, tmp_path):
    world, commands = jobs
    alone = world.copied(tmp_path / "alone")
    expected_codes = [inside(*words, store=alone.store.root).exit_code for words in commands]
    assert expected_codes[:2] == [0, 0]
    several = [[*words, "--store", world.store.root] for words in commands]
    codes, out, told = run(4, several, tmp_path)
    assert codes == expected_codes, told
    assert out.count("\nmean\t") == 1  # the last line of the sweep
    for kind in (Artifact.GRADIENT, Artifact.SQUARES):
        assert kind.names(world.store) == kind.names(alone.store)
        for name in kind.names(alone.store):
            path = kind.path(name)
            assert world.store.read_bytes(path) == alone.store.read_bytes(path), path
    (moments,) = Artifact.MOMENTS.names(world.store)
    found, expected = (
        s.read_tensors(Artifact.MOMENTS.path(moments)) for s in (world.store, alone.store)
    )
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, atol=1e-6 * np.abs(value).max())
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
    assert {entry.state for entry in entries(world.store)} == {Standing.OK}


SLOW = """
import os, sys, time
from pathlib import Path
from slsgu_cli.__main__ import main
from slsgu_cli.method import gradients
from slsgu_cli.method.gradient_pass import GradientPass

gradients.KEEP_SECONDS = gradients.KEEP_SHARE = 0.0
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


def test_one_process_that_dies_ends_all_and_another_number_goes_on(world, tmp_path):
    compute = ["grad", "blue", "--batch-size", 2]
    whole = world.copied(tmp_path / "whole")
    assert inside(*compute, store=whole.store.root).exit_code == 0
    (tmp_path / "slow.py").write_text(SLOW)
    process = launched(2, tmp_path / "slow.py", *compute, "--store", world.store.root)
    out, told = process.communicate(timeout=300)
    assert process.returncode != 0
    assert (out, len(ours(told))) == ("", 1), told
    assert len(Artifact.SUMS.names(world.store)) == 1, told
    # One process goes on with what two have kept.
    again = inside(*compute, store=world.store.root)
    assert "goes on after 16 of its" in again.stderr
    for digest in digests(whole):
        path = Artifact.GRADIENT.path(digest)
        assert world.store.read_bytes(path) == whole.store.read_bytes(path)


def digests(world):
    return world.pointer.forget, world.pointer.retain


def launched_here(monkeypatch, rank):
    """Let this process think that a launcher started it as one of two."""
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("command", ["eval blue", "ls", "grad"])
def test_what_does_not_run_in_several_is_refused_once(command, rank, world, monkeypatch):
    launched_here(monkeypatch, rank)
    done = inside(*command.split(), store=world.store.root)
    assert (done.exit_code, done.stdout) == (2, "")
    assert len(ours(done.stderr)) == (1 if rank == 0 else 0)
    if rank == 0 and command != "grad":
        assert f"{command.split()[0]} runs in one process, and 2 were started" in done.stderr
