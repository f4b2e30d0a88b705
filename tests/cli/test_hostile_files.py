"""Commands and what others may have put into a store or a model: a clear message, exit 3 or 2."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import inside

from slsgu_cli.records.codec import encode, sealed
from slsgu_cli.store.artifacts import Artifact


def refused(*arguments, code=3):
    """Run a command that must end with an exit code; return what it says."""
    done = inside(*arguments)
    assert done.exit_code == code, done.stderr
    assert "unexpected" not in done.stderr
    return done.stderr


def rewrite(path: Path, **changes) -> None:
    """Change fields of a JSON record, and give it a digest that fits."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(sealed({**content, **changes})))


@pytest.mark.parametrize("place", ["../{}", "/{}", "data/../../{}"])
def test_a_set_record_that_names_rows_elsewhere_is_refused(world, place):
    manifest, root = world.manifest, Path(world.store.root)
    block = root.parent / "elsewhere.zarr"
    (root / manifest.forget.path).rename(block)
    forget = replace(manifest.forget, path=place.format(block.name))
    rewrite(root / Artifact.SET.path(world.name), forget=encode(forget))
    told = refused("grad", world.name, "--batch-size", 7, "--store", root)
    assert "leads out of the store" in told or "there is no" in told


def test_a_collection_record_that_names_shards_elsewhere_is_refused(world):
    from slsgu_cli.errors import InputError
    from slsgu_cli.records.sets import Collection, ConceptCounts
    from slsgu_cli.sets.build import _shards
    from slsgu_cli.sets.collection import Collected

    counts = ConceptCounts(1, {}, ("../../../a.tar",))
    record = Collection((), 0, 0, {}, {}, counts, (), "")
    with pytest.raises(InputError, match="leads out of the store"):
        _shards(world.store, Collected(record, "collections/a/parts"), counts, "forget")


class HTTPError(Exception):
    """As httpx calls what all errors of its requests are."""


class ConnectError(HTTPError):
    pass


def test_an_unreachable_server_is_an_input_error_everywhere(world, monkeypatch):
    def refuse(*_, **__):
        raise ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr("slsgu_cli.engine.plots.rank", refuse)
    told = refused("rank", world.name, "--store", world.store.root)
    assert "a server cannot be reached or refused the request: [Errno -2] Name or service" in told


def test_system_errors_are_input_errors_everywhere(world, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied", "/secret/pairs")

    monkeypatch.setattr("slsgu_cli.engine.plots.rank", refuse)
    told = refused("rank", world.name, "--store", world.store.root)
    assert "cannot use /secret/pairs: Permission denied" in told
    assert "give this user permission" in told


def test_a_name_that_is_too_long_is_reported_as_such(world):
    out = Path(world.store.root).parent / ("n" * 300)
    told = refused("report", world.name, "--out", f"{out}.html", "--store", world.store.root)
    assert "File name too long" in told
    assert "choose a shorter name" in told


def test_an_unreadable_store_or_source_is_not_taken_for_an_empty_one(world, tmp_path, monkeypatch):
    locked = tmp_path / "locked" / "a.parquet"
    stat = Path.stat

    def refuse(path, **options):
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, **options)

    monkeypatch.setattr(Path, "stat", refuse)
    source = ("--match", "blue", "-s", locked)
    told = refused("build-sets", "x", "-m", world.model.name, *source, "--store", tmp_path / "s")
    assert f"cannot open source {locked}: Permission denied" in told
    monkeypatch.setattr("os.access", lambda *_: False)
    told = refused("ls", "--store", world.store.root)
    assert "this user may not read the store" in told


def test_an_unreachable_file_system_is_reported(world, monkeypatch):
    class Unreachable(Exception):
        """What a library for a network raises, which is no OSError."""

    def refuse(*_, **__):
        raise Unreachable("no route to the hub")

    monkeypatch.setattr("fsspec.implementations.memory.MemoryFileSystem.exists", refuse)
    source = ("--match", "blue", "-s", "memory://pairs.tar")
    store = ("--store", world.store.root)
    told = refused("build-sets", "x", "-m", world.model.name, *source, *store)
    assert "cannot open source memory://pairs.tar: no route to the hub" in told


@pytest.mark.parametrize("library", ["numpy", "torch"])
def test_a_singular_matrix_suggests_a_check_of_the_store(world, monkeypatch, library):
    kinds = {"numpy": np.linalg.LinAlgError, "torch": torch.linalg.LinAlgError}

    def refuse(*_, **__):
        raise kinds[library]("the leading minor of order 3 is not positive-definite")

    monkeypatch.setattr("slsgu_cli.engine.plots.rank", refuse)
    told = refused("rank", world.name, "--store", world.store.root)
    assert "slsgu check" in told
