"""What parquet files of strangers may cost is bounded, and what costs more is counted."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from slsgu_cli.clip.decoding import Picture, decode_in_order
from slsgu_cli.errors import InputError
from slsgu_cli.sets import metadata
from slsgu_cli.sources import parquet
from slsgu_cli.sources.parquet import ParquetSource, compact_integers
from slsgu_cli.sources.rows import BOMB, TOO_LARGE, Columns

MIB = 1 << 20
ROWS = 10_000
# What PyArrow may hold at once, with a page of at most 8 MiB and values of at most 1 MiB.
MEMORY = 60 * MIB
DEFAULT, POOLS = pa.default_memory_pool(), []


@pytest.fixture(autouse=True)
def smaller(monkeypatch):
    """Let bounds be small, so that what goes beyond them is made in no time."""
    monkeypatch.setattr(parquet, "PAGE_ROOM", 8 * MIB)
    monkeypatch.setattr(parquet, "IMAGE_LIMIT", MIB)


@pytest.fixture
def pool():
    """What PyArrow allocates for its own use during the test, after the files are written."""
    # A pool must outlive what was allocated of it.
    POOLS.append(pa.proxy_memory_pool(DEFAULT))
    yield POOLS[-1]
    pa.set_memory_pool(DEFAULT)


def shared(*values):
    """Return a column in which the values take turns, each written once."""
    places = pa.array([row % len(values) for row in range(ROWS)], pa.int32())
    return pa.DictionaryArray.from_arrays(places, pa.array(values))


def write(path, columns, **options):
    table = pa.table(columns)
    pq.write_table(table, path, compression="zstd", store_schema=False, **options)
    return path


def read(path, pool):
    """Return the captions that are read, what is counted, and what becomes of each image."""
    pa.set_memory_pool(pool)
    source, trouble = ParquetSource(str(path), Columns(), {}), Counter()
    rows = list(source.rows(trouble))
    images = source.images(dict.fromkeys(range(0, ROWS, 1000)))
    reasons = [
        found.reason
        for _, found in decode_in_order(images, lambda data: Picture(data))
        if found.reason
    ]
    assert pool.max_memory() < MEMORY
    assert path.stat().st_size < 4 * MIB
    return Counter(row.caption for row in rows), trouble, Counter(reasons)


def test_values_that_many_rows_share_cost_what_they_are(tmp_path, pool, monkeypatch):
    captions, images = shared("x" * 4 * MIB, "good"), shared(b"x" * 4 * MIB, b"good")
    nested = pa.StructArray.from_arrays([images, shared("a")], ["bytes", "path"])
    path = write(tmp_path / "a.parquet", {"caption": captions, "image": nested})
    captions, trouble, reasons = read(path, pool)
    assert captions == {"good": ROWS // 2}
    assert trouble == {TOO_LARGE: ROWS // 2}
    assert reasons[TOO_LARGE] == 10


def test_values_that_are_written_out_are_read_a_few_at_a_time(tmp_path, pool):
    captions = pa.array(["x" * MIB] * 100 + ["good"])
    columns = {"caption": captions, "image": pa.array([b"x" * MIB] * 100 + [b"good"])}
    path = write(
        tmp_path / "a.parquet", columns, use_dictionary=False, data_page_size=1, write_batch_size=1
    )
    captions, trouble, _ = read(path, pool)
    assert captions == {"good": 1}
    assert trouble == {TOO_LARGE: 100}


@pytest.mark.parametrize("column", ["caption", "image"])
def test_a_page_that_unpacks_to_far_more_than_it_is_is_not_read(tmp_path, pool, column):
    big, small = b"x" * 64 * MIB, b"good"
    columns = {
        name: pa.array([big if name == column else small], pa.binary())
        for name in ("caption", "image")
    }
    path = write(tmp_path / "a.parquet", columns, use_dictionary=False)
    captions, trouble, reasons = read(path, pool)
    if column == "caption":
        assert (captions, trouble) == ({}, {BOMB: 1})
    else:
        assert (captions, trouble, reasons) == ({"good": 1}, {}, {BOMB: 1})


def test_of_lists_the_first_value_counts_and_long_ones_are_not_read(tmp_path, pool, monkeypatch):
    value = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["good"]))
    columns = {
        "caption": pa.ListArray.from_arrays([0, 4999, 5000, 5000], value),
        "image": pa.array([b"a"] * 3),
    }
    path = write(tmp_path / "a.parquet", columns)
    assert read(path, pool)[0] == {"good": 2, None: 1}
    monkeypatch.setattr(parquet, "LISTED", 4000)
    assert read(path, pool)[1] == {BOMB: 3}


def test_a_footer_that_claims_much_is_refused(tmp_path, monkeypatch):
    columns = {"caption": shared("a"), "image": shared(b"a")}
    path = write(tmp_path / "a.parquet", columns)
    source = ParquetSource(str(path), Columns(), {})
    monkeypatch.setattr(parquet, "ROWS", 1000)
    with pytest.raises(InputError, match="tells of 10,000 rows, more than its"):
        next(source.rows(Counter()))
    monkeypatch.setattr(parquet, "FOOTER_LIMIT", 50)
    with pytest.raises(InputError, match="has a footer of"):
        next(source.rows(Counter()))


def test_a_table_of_urls_is_bounded_too(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(parquet, "PAGE_ROOM", 8 * MIB)
    columns = {"caption": shared("x" * 4 * MIB, "y" * 60_000), "url": shared("http://a")}
    path = write(tmp_path / "a.parquet", columns)
    pa.set_memory_pool(pool)
    (group,) = metadata._groups(str(path))
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


@pytest.mark.parametrize("data", [b"\xff" * 99, b"\x15" * 99, b"\x1c" * 99, b"\x19" * 99, b"\x18"])
def test_no_header_of_a_page_is_read_without_end(data):
    with pytest.raises((pa.ArrowInvalid, IndexError)):
        compact_integers(data)
