"""The edit artifact: what is written is read back, under its name or as a file."""

from pathlib import Path

import numpy as np
import pytest
from edit_headers import edit, header

from slsgu_cli.checkpoints.edits import load_edit, make_edit, read_edit, write_edit
from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.records.codec import encode
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

BEFORE = np.random.default_rng(0).standard_normal((6, 5)).astype(np.float32)
DELTA = np.random.default_rng(1).standard_normal((6, 5)).astype(np.float32)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path / "store"))


@pytest.mark.parametrize("kind", ["f2", "f4", "f8"])
def test_an_edit_is_read_back_to_the_bit(store: Store, kind: str) -> None:
    before = BEFORE.astype(kind)
    made = edit("visual.proj", DELTA, before)
    path = write_edit(store, made)
    assert path == Artifact.EDIT.path("facebook") and store.names("edits") == [
        "facebook.safetensors"
    ]
    read = read_edit(store, path)
    assert encode(read.header) == encode(made.header) and read.factor == 1
    assert read.delta().dtype == np.float32 and read.before().dtype == np.dtype(kind)
    np.testing.assert_array_equal(read.delta(), DELTA)
    np.testing.assert_array_equal(read.before(), before)


def test_an_edit_is_found_by_name_and_as_a_file(store: Store, tmp_path: Path, monkeypatch) -> None:
    write_edit(store, edit("visual.proj", DELTA, BEFORE))
    elsewhere = tmp_path / "mail" / "shared.safetensors"
    elsewhere.parent.mkdir()
    elsewhere.write_bytes((tmp_path / "store" / "edits" / "facebook.safetensors").read_bytes())
    monkeypatch.chdir(elsewhere.parent)
    for name in ("facebook", str(elsewhere), "shared.safetensors", "./shared.safetensors"):
        np.testing.assert_array_equal(load_edit(store, name).delta(), DELTA)


def test_a_missing_edit_and_a_file_of_another_kind_are_refused(
    store: Store, tmp_path: Path
) -> None:
    write_edit(store, edit("visual.proj", DELTA, BEFORE))
    with pytest.raises(MissingError, match="has no edit nike; it has facebook") as caught:
        load_edit(store, "nike")
    assert "slsgu search nike" in str(caught.value.hint)
    with pytest.raises(MissingError, match="no edit file"):
        load_edit(store, "no/where.safetensors")
    whole = (tmp_path / "store" / "edits" / "facebook.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-7])
    with pytest.raises(InputError, match="damaged"):
        load_edit(store, str(tmp_path / "cut.safetensors"))
    store.write_tensors("other.safetensors", {"delta": DELTA}, {"loss": "cosine"})
    with pytest.raises(StaleError):
        load_edit(store, store.where("other.safetensors"))


def test_scaling_and_stepping_compose() -> None:
    made = edit("visual.proj", DELTA, BEFORE, step=4.0)
    assert made.scaled(0.5).scaled(-2).factor == -1
    assert made.restepped(1.0).factor == 0.25
    assert made.scaled(7).restepped(2.0).scaled(3).factor == 1.5
    for factor in (0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="cannot be scaled"):
            made.scaled(factor)
    with pytest.raises(InputError, match="step 0"):
        edit("visual.proj", DELTA, BEFORE, step=0.0).restepped(1.0)


def test_values_that_are_not_finite_are_refused() -> None:
    bad = DELTA.copy()
    bad[2, 3] = np.nan
    with pytest.raises(InputError, match="not finite"):
        make_edit(header("visual.proj", BEFORE), delta=bad, before=BEFORE)


def test_an_edit_of_a_rank_keeps_its_largest_directions():
    rng = np.random.default_rng(0)
    delta = rng.normal(size=(6, 3, 2)).astype(np.float32)
    whole = edit("visual.conv1.weight", delta, np.zeros_like(delta))
    values = np.linalg.svd(delta.reshape(6, 6), compute_uv=False)
    for rank in (1, 2, 6, 9):
        kept = whole.of_rank(rank)
        assert kept.delta().shape == delta.shape
        assert np.linalg.matrix_rank(kept.delta().reshape(6, 6), tol=1e-4) == min(rank, 6)
        left = np.linalg.norm(delta - kept.delta())
        assert left == pytest.approx(np.linalg.norm(values[rank:]), abs=1e-5)
        np.testing.assert_array_equal(kept.before(), whole.before())
    assert kept.header is whole.header


def test_a_norms_edit_has_one_direction():
    norm = edit("visual.ln_post.weight", np.ones(4, np.float32), np.zeros(4, np.float32))
    np.testing.assert_array_equal(norm.of_rank(1).delta(), norm.delta())
