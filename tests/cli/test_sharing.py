"""Stores that several processes write, and stores that cannot be written."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import Forked
from processes import environment, inside, start_held


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
        30,
        "--max-forget",
        10,
        "--eval",
        f"first={sources['first']}",
    ]


def inodes(folder):
    return {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def test_the_first_of_two_builds_stays_and_the_second_is_dropped(build, tmp_path):
    """One waits with a whole block at hand while the other one builds all of the set."""
    build = [*build, "--no-wait"]
    slow = start_held(*build, at="slsgu_cli.store.store:move_if_absent")
    quick = inside(*build)
    assert quick.exit_code == 0, quick.stderr
    data = tmp_path / "store" / "data"
    before = {path: node for path, node in inodes(data).items() if ".partial" not in str(path)}
    slow.communicate(timeout=120)
    assert slow.returncode == 0
    assert inodes(data) == before


def test_the_first_of_two_gradients_stays(world, tmp_path):
    store = tmp_path / "store"
    gradients = store / "gradients"
    for file in gradients.iterdir():
        file.unlink()
    words = ["grad", "blue", "--store", store, "--no-wait"]
    slow = start_held(*words, at="slsgu_cli.store.store:move_if_absent")
    assert inside(*words).exit_code == 0
    before = {path: node for path, node in inodes(gradients).items() if path.suffix != ".json"}
    slow.communicate(timeout=120)
    assert slow.returncode == 0
    after = {path: node for path, node in inodes(gradients).items() if path.suffix != ".json"}
    assert after == {path: node for path, node in before.items() if ".partial" not in path.name}


@pytest.fixture
def refusing(monkeypatch):
    """`refusing(number)` lets every write to a store fail with an error of the system.

    What can only be read lets nothing be renamed or removed either, be it there or not.
    """

    def refuse(number):
        def refused(self, *_, **__):
            raise OSError(number, os.strerror(number), str(self))

        for name in ("write_bytes", *(("replace", "unlink") if number == errno.EROFS else ())):
            monkeypatch.setattr(Path, name, refused)

    return refuse


@pytest.mark.parametrize(("command", "begins"), [("eval", "figure\t"), ("show", "fact\t")])
def test_results_are_printed_where_the_plot_cannot_be_written(world, refusing, command, begins):
    refusing(errno.EROFS)
    done = inside(command, "blue", store=world.store.root)
    assert done.exit_code == 0, done.stderr
    assert "warning: cannot write" in done.stderr
    assert "Read-only file system; the picture is not saved" in done.stderr
    assert "wrote" not in done.stderr
    assert done.stdout.startswith(begins)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "it is read-only: choose another store"),
        (errno.EACCES, "check its permissions, or choose another store"),
        (errno.ENOSPC, "free some space, or choose another store"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
    ],
)
def test_an_unwritable_store_is_reported_before_the_work(
    world, refusing, monkeypatch, number, remedy
):
    def work(*_, **__):
        pytest.fail("the work began")

    monkeypatch.setattr("slsgu_cli.engine.ranking._scores", work)
    monkeypatch.setattr("slsgu_cli.engine.stored_covariances._compute", work)
    monkeypatch.setattr("slsgu_cli.engine.search.share_evaluation", work)
    refusing(number)
    for command in ("rank", "search"):
        done = inside(command, "blue", store=world.store.root)
        assert done.exit_code == 3
        assert f"cannot write {world.store.root}" in done.stderr
        assert f"try: {remedy}" in done.stderr


def test_a_store_in_memory_warns_that_nothing_is_saved():
    done = inside("ls", store="memory://nothing-kept")
    assert done.exit_code == 0
    assert "warning: memory://nothing-kept is discarded when this command ends" in done.stderr


def grad(store, *words):
    return ["grad", "blue", "--store", store, *words]


@pytest.fixture
def ungraded(world):
    """A store with the set blue and no gradients."""
    store = Path(world.store.root)
    for file in (store / "gradients").iterdir():
        file.unlink()
    return store


COMPUTE = "slsgu_cli.engine.gradients:_compute"


def waits_for(process, text):
    """Read what a process tells until it says `text`; return that line."""
    for line in process.stderr:
        if text in line:
            return line
    raise AssertionError((text, process.wait(), process.stdout.read()))


def test_a_gradient_in_progress_elsewhere_is_awaited(ungraded):
    first = start_held(*grad(ungraded), at=COMPUTE)
    second = Forked(grad(ungraded), environment())
    said = waits_for(second, "waiting for it")
    assert f"process {first.pid} (since 20" in said
    assert "(--no-wait computes it anyway)" in said
    first.communicate(timeout=120)
    told = second.communicate(timeout=120)[1]
    assert (first.returncode, second.returncode) == (0, 0)
    assert "another process computed it" in told
    assert not list((ungraded / "locks").iterdir())
    assert inside("rank", "blue", "--direction", "gradient", store=ungraded).exit_code == 0


def test_no_wait_computes_what_another_process_is_computing(ungraded):
    first = start_held(*grad(ungraded), at=COMPUTE)
    done = inside(*grad(ungraded, "--no-wait"))
    assert done.exit_code == 0, done.stderr
    assert "waiting" not in done.stderr
    assert len(list((ungraded / "gradients").glob("*.safetensors"))) == 2
    first.communicate(timeout=120)
    assert first.returncode == 0


def test_covariances_and_blocks_have_locks_too(world, build, monkeypatch):
    locked = []

    @contextmanager
    def held(store, path, *, what):
        locked.append((path.partition("/")[0], what))
        yield

    for place in ("engine.stored_covariances", "sets.pairs", "sets.evaluation_sets"):
        monkeypatch.setattr(f"slsgu_cli.{place}.held", held)
    assert inside("rank", "blue", store=world.store.root).exit_code == 0
    assert inside(*build).exit_code == 0
    assert locked == [
        ("covariances", "covariances of the retain set of blue"),
        ("data", "forget rows"),
        ("data", "retain rows"),
        ("data", "evaluation set first"),
    ]
