"""Memory for parquet files stays bounded; rows that cost more are counted and skipped."""

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slsgu_cli.clip.decoding import Picture, decode_in_order
from slsgu_cli.errors import InputError
from slsgu_cli.sets import scan
from slsgu_cli.sources import arrow_columns, parquet
from slsgu_cli.sources.parquet import BOMB, ParquetSource
from slsgu_cli.sources.reader import TOO_LARGE, Columns

MIB = 1 << 20
ROWS = 10_000
# The most memory of PyArrow, for batches of at most 8 MiB and values of at most 1 MiB.
MEMORY = 60 * MIB
DEFAULT, POOLS = pa.default_memory_pool(), []


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """Make limits small, so that files beyond them are written quickly."""
    monkeypatch.setattr(parquet, "UNPACKED_LIMIT", 8 * MIB)
    monkeypatch.setattr(arrow_columns, "IMAGE_LIMIT", MIB)


@pytest.fixture
def pool():
    """The memory that PyArrow allocates in the test, after the files are written."""
    # A pool must outlive its allocations.
    POOLS.append(pa.proxy_memory_pool(DEFAULT))
    yield POOLS[-1]
    pa.set_memory_pool(DEFAULT)


def shared(*values):
    """Return a column that cycles through the values, each of which is written once."""
    places = pa.array([row % len(values) for row in range(ROWS)], pa.int32())
    return pa.DictionaryArray.from_arrays(places, pa.array(values))


def write(path, columns, **options):
    table = pa.table(columns)
    pq.write_table(table, path, compression="zstd", store_schema=False, **options)
    return path


def read(path, pool):
    """Return the captions, the counts of skipped rows, and the reasons for skipped images."""
    pa.set_memory_pool(pool)
    source, skipped = ParquetSource(str(path), Columns(), {}), Counter()
    rows = list(source.rows(skipped))
    images = source.images(dict.fromkeys(range(0, ROWS, 1000)))
    reasons = [
        image.reason
        for _, image in decode_in_order(images, lambda data: Picture(data))
        if image.reason
    ]
    assert pool.max_memory() < MEMORY
    return Counter(row.caption for row in rows), skipped, Counter(reasons)


def test_values_that_many_rows_share_are_read_once(tmp_path, pool):
    captions, images = shared("x" * 4 * MIB, "good"), shared(b"x" * 4 * MIB, b"good")
    nested = pa.StructArray.from_arrays([images, shared("a")], ["bytes", "path"])
    path = write(tmp_path / "a.parquet", {"caption": captions, "image": nested})
    captions, skipped, reasons = read(path, pool)
    assert captions == {"good": ROWS // 2}
    assert skipped == {TOO_LARGE: ROWS // 2}
    assert reasons[TOO_LARGE] == 10


def test_large_values_are_read_a_few_at_a_time(tmp_path, pool):
    noise = np.random.default_rng(0)
    captions = [noise.bytes(MIB // 2).hex() for _ in range(100)]
    columns = {
        "caption": pa.array([*captions, "good"]),
        "image": pa.array([noise.bytes(MIB) for _ in range(100)] + [b"good"]),
    }
    path = write(
        tmp_path / "a.parquet", columns, use_dictionary=False, data_page_size=1, write_batch_size=1
    )
    captions, skipped, _ = read(path, pool)
    assert captions == {"good": 1}
    assert skipped == {TOO_LARGE: 100}


@pytest.mark.parametrize("column", ["caption", "image"])
def test_a_row_group_that_unpacks_to_far_more_than_its_size_is_skipped(tmp_path, pool, column):
    big, small = b"x" * 64 * MIB, b"good"
    columns = {
        name: pa.array([big if name == column else small], pa.binary())
        for name in ("caption", "image")
    }
    path = write(tmp_path / "a.parquet", columns, use_dictionary=False)
    captions, skipped, reasons = read(path, pool)
    if column == "caption":
        assert (captions, skipped) == ({}, {BOMB: 1})
    else:
        assert (captions, skipped, reasons) == ({"good": 1}, {}, {BOMB: 1})


def test_the_first_value_of_a_list_is_used(tmp_path, pool):
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["good"]))
    columns = {
        "caption": pa.ListArray.from_arrays([0, 4999, 5000, 5000], value),
        "image": pa.array([b"a"] * 3),
    }
    path = write(tmp_path / "a.parquet", columns)
    assert read(path, pool)[0] == {"good": 2, None: 1}


def test_metadata_is_read_within_the_same_limits(tmp_path, pool):
    columns = {"caption": shared("x" * 4 * MIB, "y" * 60_000), "url": shared("http://a")}
    path = write(tmp_path / "a.parquet", columns)
    pa.set_memory_pool(pool)
    (group,) = scan._groups(str(path))
    rows = nulls = 0
    for captions in parquet.text_batches(group.path, group.group, "caption"):
        rows, nulls = rows + len(captions), nulls + captions.null_count
    assert (rows, nulls) == (ROWS, ROWS // 2)
    assert pool.max_memory() < MEMORY


def test_a_remote_file_is_read_as_a_local_one(tmp_path):
    import fsspec

    table = {"caption": shared("a", "b"), "image": shared(b"1", b"2")}
    path = write(tmp_path / "a.parquet", table, row_group_size=3000)
    fsspec.filesystem("memory").pipe("/a.parquet", path.read_bytes())
    local, remote = (
        ParquetSource(str(where), Columns(), {}) for where in (path, "memory://a.parquet")
    )
    wanted = dict.fromkeys([0, 2999, 3000, 9999])
    assert [(row.index, row.caption) for row in remote.rows(Counter())] == [
        (row.index, row.caption) for row in local.rows(Counter())
    ]
    assert (
        list(remote.images(wanted))
        == list(local.images(wanted))
        == [
            (0, b"1"),
            (2999, b"2"),
            (3000, b"1"),
            (9999, b"2"),
        ]
    )


def test_metadata_that_unpacks_to_far_more_than_its_size_is_refused(tmp_path):
    captions = pa.array(["x" * 64 * MIB])
    path = write(tmp_path / "a.parquet", {"caption": captions}, use_dictionary=False)
    with pytest.raises(InputError, match=r"column caption of .* unpacks to more than 32 times"):
        next(parquet.text_batches(str(path), 0, "caption"))
