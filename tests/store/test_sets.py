import warnings
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.records.sets import DataRef
from slsgu_cli.store import blocks
from slsgu_cli.store.blocks import DataBlock, block_writer
from slsgu_cli.store.store import Store

PATH = "data/block.zarr"
SIZE = (6, 5)


def pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *SIZE, 3), dtype=np.uint8)


def write(store, images, *, rows=None, tokens=True, labels=None, names=("a", "b"), path=PATH):
    with block_writer(store, path, height=SIZE[0], width=SIZE[1], rows=rows or len(images)) as out:
        for index, image in enumerate(images):
            out.add(
                image,
                key=f"k{index}",
                caption=None if index == 1 else f"cäption\n{index}",
                label=-1 if labels is None else labels[index],
                source_digest=bytes([index % 256]) * 16,
            )
        ids = np.arange(len(images) * 4, dtype=np.int32).reshape(-1, 4) if tokens else None
        fingerprint = out.finish(ids, {"class_names": list(names), "templates": ["a {}."]})
    return DataRef(path, fingerprint, len(images), len(images), {}, ("source",))


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(blocks, "CHUNK_BYTES", 1)
    monkeypatch.setattr(blocks, "MIN_CHUNK_ROWS", 8)


@pytest.mark.parametrize("url", ["local", "memory://sets-test/store"])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 30])
def test_a_written_artifact_is_read_back(tmp_path, small_chunks, url, count):
    store = Store(str(tmp_path / "store") if url == "local" else url)
    images = pixels(count)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ref = write(store, images, rows=count + 5, labels=list(range(count)))
        block = DataBlock.open(store, ref)
        assert block.rows == count
        assert np.array_equal(block.images(0, count), images)
        assert np.array_equal(block.images(3, 6), images[3:6])
    assert block.tokens.dtype == block.labels.dtype == np.int32
    assert np.array_equal(block.tokens, np.arange(count * 4).reshape(-1, 4))
    assert block.labels.tolist() == list(range(count))
    assert block.keys == [f"k{i}" for i in range(count)]
    assert block.captions == ["" if i == 1 else f"cäption\n{i}" for i in range(count)]
    assert block.class_names == ("a", "b")
    assert block.templates == ("a {}.",)
    assert block.source_digests.shape == (count, 16)
    if url != "local":
        fsspec.filesystem("memory").rm("/sets-test", recursive=True)


def test_take_gives_any_rows_in_any_order(store, small_chunks):
    images = pixels(30)
    block = DataBlock.open(store, write(store, images))
    order = [29, 0, 7, 8, 8, 15, 3]
    assert np.array_equal(block.take(order), images[order])
    assert block.take([]).shape == (0, *SIZE, 3)
    for outside in (-1, 30):
        with pytest.raises(IndexError):
            block.take([outside])


def test_rows_without_tokens_and_labels(store):
    block = DataBlock.open(store, write(store, pixels(3), tokens=False))
    assert block.tokens.shape == (3, 0)
    assert block.labels.tolist() == [-1, -1, -1]


def test_the_fingerprint_follows_everything_that_is_measured(store):
    images = pixels(4)
    other = images.copy()
    other[2, 0, 0, 0] ^= 1
    prints = {
        write(store, images).fingerprint,
        write(store, other).fingerprint,
        write(store, images[::-1]).fingerprint,
        write(store, images, tokens=False).fingerprint,
        write(store, images, labels=[0, 0, 0, 1]).fingerprint,
        write(store, images, names=("a", "c")).fingerprint,
    }
    assert len(prints) == 6
    assert write(store, images, path="data/other.zarr").fingerprint in prints


def test_a_black_image_is_no_missing_one(store, small_chunks):
    ref = write(store, np.zeros((20, *SIZE, 3), dtype=np.uint8))
    assert not DataBlock.open(store, ref).images(0, 20).any()
    chunk = Path(store.where(PATH), "images", "c", "1", "0", "0", "0")
    chunk.unlink()
    with pytest.raises(InputError, match="damaged: images lacks 1 chunks"):
        DataBlock.open(store, ref)


@pytest.mark.parametrize(
    "harm", [lambda d: d[:-3], lambda d: b"", lambda d: d[:-9] + b"x" + d[-8:]]
)
def test_an_altered_chunk_is_damage_and_not_another_image(store, harm):
    ref = write(store, pixels(5))
    chunk = Path(store.where(PATH), "images", "c", "0", "0", "0", "0")
    chunk.write_bytes(harm(chunk.read_bytes()))
    block = DataBlock.open(store, ref)
    for read in (lambda: block.images(0, 5), lambda: block.take([1])):
        with pytest.raises(InputError, match="is damaged") as caught:
            read()
        assert "build-sets" in caught.value.hint


@pytest.mark.parametrize("name", ["zarr.json", "images/zarr.json", "labels/zarr.json"])
@pytest.mark.parametrize("content", ["{", '{"zarr_format": 3}', None])
def test_altered_metadata_is_damage(store, name, content):
    ref = write(store, pixels(5))
    path = Path(store.where(PATH), name)
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(InputError, match="is damaged"):
        DataBlock.open(store, ref)


def test_missing_and_stale_blocks(store):
    ref = write(store, pixels(5))
    with pytest.raises(MissingError, match=r"no .*other\.zarr"):
        DataBlock.open(store, replace(ref, path="data/other.zarr"))
    with pytest.raises(StaleError, match="has been rebuilt"):
        DataBlock.open(store, replace(ref, fingerprint="0" * 24))


def test_an_interrupted_write_leaves_nothing(store):
    with (
        pytest.raises(KeyboardInterrupt),
        block_writer(store, PATH, height=SIZE[0], width=SIZE[1], rows=9) as out,
    ):
        out.add(pixels(1)[0], key="k")
        raise KeyboardInterrupt
    assert store.names("data") == []
    assert store.unfinished("data") == []


def test_chunks_are_of_a_size_that_reads_fast(store):
    with block_writer(store, PATH, height=224, width=224, rows=1) as out:
        out.add(np.zeros((224, 224, 3), dtype=np.uint8), key="k")
        out.finish(None, {})
    assert DataBlock.at(store, PATH).chunk_rows == 111
