from dataclasses import replace

import pytest

from slsgu_cli.errors import MissingError, StaleError, UsageError
from slsgu_cli.records import sets
from slsgu_cli.store import artifacts


@pytest.mark.parametrize(
    "name", ["facebook", "Elon Musk", "r2-d2", "a.b", "x@y+1", "日本", "_", "7"]
)
def test_names_that_can_be_files(name):
    assert sets.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "../x", "a/b", "a\\b", "-x", ".hidden", "a\n", "a:b", "a*", "a\0"]
)
def test_names_that_leave_the_store_are_refused(name):
    with pytest.raises(UsageError, match="cannot name a set"):
        sets.check_name(name)
    for kind in artifacts.TABLE:
        with pytest.raises(UsageError):
            kind.path(name)


def test_every_artifact_has_its_own_place():
    places = [kind.path("x") for kind in artifacts.TABLE]
    places += [artifacts.plot_path("x", "a"), artifacts.plot_path("x", "b")]
    assert len(set(places)) == len(places)


def test_the_artifact_table_matches_the_fields_of_records():
    for row in artifacts.TABLE.values():
        for name in (*row.digests, *row.options, *row.rows, *row.inputs):
            assert hasattr(row.record, name), name
        assert not row.needs or hasattr(row.record, "name")


def test_missing_artifacts_are_named_with_their_command(world):
    store, manifest, pointer = world.store, world.manifest, world.pointer
    with pytest.raises(MissingError, match="set nobody") as error:
        artifacts.read_manifest(store, "nobody")
    assert "slsgu build-sets nobody" in error.value.hint
    store.remove(artifacts.Artifact.RANKING.path("blue"))
    with pytest.raises(MissingError, match="ranking of blue") as error:
        artifacts.read_ranking(store, pointer)
    assert "slsgu rank blue" in error.value.hint
    store.remove(artifacts.Artifact.GRADIENT.path(pointer.retain))
    with pytest.raises(MissingError, match=pointer.retain) as error:
        artifacts.read_pointer(store, manifest)
    assert "slsgu grad blue" in error.value.hint
    store.remove(artifacts.Artifact.POINTER.path("blue"))
    with pytest.raises(MissingError, match="gradients of blue"):
        artifacts.read_pointer(store, manifest)


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_gradients_of_other_rows_are_stale(world, role):
    other = replace(getattr(world.manifest, role), fingerprint="other")
    with pytest.raises(StaleError, match=f"before its {role} set was rebuilt") as error:
        artifacts.read_pointer(world.store, replace(world.manifest, **{role: other}))
    assert "slsgu grad blue" in error.value.hint


@pytest.mark.parametrize("role", ["forget", "retain"])
def test_a_ranking_of_other_gradients_is_stale(world, role):
    with pytest.raises(StaleError, match="ranking of blue was made from other gradients") as error:
        artifacts.read_ranking(world.store, replace(world.pointer, **{role: "other"}))
    assert "slsgu rank blue" in error.value.hint
