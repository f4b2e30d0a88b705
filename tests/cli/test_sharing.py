"""Stores that several processes write, and stores that cannot be written."""

import errno
import os

import pytest
from fsspec.implementations.local import LocalFileSystem
from processes import inside, start_held


@pytest.fixture
def build(shared_world, tmp_path):
    """What builds the set blue in a store that is not there yet."""
    sources = shared_world.sources
    return [
        "build-sets", "blue", "--store", tmp_path / "store", "--model", shared_world.model.name,
        "--source", sources["pairs"], "--label-column", "label", "--retain-samples", 30,
        "--max-forget", 10, "--eval", f"first={sources['first']}",
    ]  # fmt: skip


def inodes(folder):
    return {path: path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def test_the_first_of_two_builds_stays_and_the_second_is_dropped(build, tmp_path):
    """One waits with a whole block at hand while the other one builds all of the set."""
    slow = start_held(*build, at="slsgu_cli.store.store:Store._place")
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
    words = ["grad", "blue", "--store", store]
    slow = start_held(*words, at="slsgu_cli.store.store:Store._place")
    assert inside(*words).exit_code == 0
    before = {path: node for path, node in inodes(gradients).items() if path.suffix != ".json"}
    slow.communicate(timeout=120)
    assert slow.returncode == 0
    after = {path: node for path, node in inodes(gradients).items() if path.suffix != ".json"}
    assert after == {path: node for path, node in before.items() if ".partial" not in path.name}


@pytest.fixture
def refusing(monkeypatch):
    """`refusing(number)` lets every write to a store fail with an error of the system."""

    def refuse(number):
        opened = LocalFileSystem._open

        def open_(self, path, mode="rb", **options):
            if "r" not in mode:
                raise OSError(number, os.strerror(number), path)
            return opened(self, path, mode, **options)

        monkeypatch.setattr(LocalFileSystem, "_open", open_)

    return refuse


@pytest.mark.parametrize(("command", "begins"), [("eval", "figure\t"), ("show", "fact\t")])
def test_results_are_printed_where_the_plot_cannot_be_written(
    shared_world, refusing, command, begins
):
    refusing(errno.EROFS)
    done = inside(command, "blue", store=shared_world.store.root)
    assert done.exit_code == 0, done.stderr
    assert "warning: cannot write" in done.stderr
    assert "Read-only file system; what it shows is not kept" in done.stderr
    assert "wrote" not in done.stderr
    assert done.stdout.startswith(begins)


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "it can only be read: choose another store"),
        (errno.EACCES, "see who may write there, or choose another store"),
        (errno.ENOSPC, "free some space, or choose another store"),
        (errno.ENAMETOOLONG, "choose a shorter name"),
    ],
)
def test_a_store_that_cannot_be_written_is_told_before_the_work(
    world, refusing, monkeypatch, number, remedy
):
    def work(*_, **__):
        pytest.fail("the work began")

    monkeypatch.setattr("slsgu_cli.method.ranking._score", work)
    monkeypatch.setattr("slsgu_cli.method.directions._compute", work)
    monkeypatch.setattr("slsgu_cli.method.search.share_evaluation", work)
    refusing(number)
    for command in ("rank", "search"):
        done = inside(command, "blue", store=world.store.root)
        assert done.exit_code == 3
        assert f"cannot write {world.store.root}" in done.stderr
        assert f"try: {remedy}" in done.stderr


def test_a_store_in_memory_says_that_it_keeps_nothing():
    done = inside("ls", store="memory://nothing-kept")
    assert done.exit_code == 0
    assert "warning: memory://nothing-kept keeps nothing when this command has ended" in done.stderr
