from collections import Counter

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_images import encoded, sample, write_parquet

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources.parquet import ParquetSource
from slsgu_cli.sources.reader import IMAGE_LIMIT, TEXT_LIMIT, TOO_LARGE, Columns


def source(path, filters=None, **columns):
    return ParquetSource(str(path), Columns(**columns), filters or {})


def rows(path, filters=None, **columns):
    return list(source(path, filters, **columns).rows(Counter()))


def test_columns_are_found_by_their_usual_names(tmp_path):
    path = write_parquet(
        tmp_path / "laion-1.parquet",
        [{"JPG": b"1", "TEXT": "a dog", "class": 3}, {"JPG": b"2", "TEXT": None, "class": None}],
    )
    one, two = rows(path)
    assert (one.key, one.caption, one.label) == ("laion-1:0", "a dog", "3")
    assert (two.key, two.caption, two.label) == ("laion-1:1", None, None)


def test_columns_can_be_named(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet", [{"image": b"no", "pic": b"yes", "alt": "text", "who": "x"}]
    )
    (row,) = rows(path, image="pic", caption="alt", label="who")
    assert (row.caption, row.label) == ("text", "x")
    assert list(source(path, image="pic").images(dict.fromkeys([0]))) == [(0, b"yes")]


def test_structs_as_hugging_face_writes_them(tmp_path):
    images = [{"bytes": encoded(1), "path": "1.png"}, None, {"bytes": None, "path": "x"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(images, kind), "text": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    found = list(source(tmp_path / "a.parquet").images(dict.fromkeys([0, 1, 2])))
    assert found == [(0, encoded(1)), (1, None), (2, None)]


def test_row_numbers_hold_over_groups_and_filters(tmp_path):
    path = write_parquet(
        tmp_path / "a.parquet",
        [sample(i, f"c{i}", kind="odd" if i % 2 else "even") for i in range(20)],
        group=3,
    )
    found = rows(path, {"kind": frozenset(["odd"])})
    assert [row.index for row in found] == list(range(1, 20, 2))
    images = dict(source(path).images(dict.fromkeys([1, 2, 19])))
    assert images == {i: encoded(i) for i in (1, 2, 19)}


def test_only_row_groups_with_wanted_rows_are_read(tmp_path, monkeypatch):
    path = write_parquet(tmp_path / "a.parquet", [sample(i, "c") for i in range(9)], group=3)
    groups = []
    real = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile,
        "iter_batches",
        lambda file, **k: groups.append((k.get("row_groups"), k["columns"])) or real(file, **k),
    )
    assert [index for index, _ in source(path).images(dict.fromkeys([4]))] == [4]
    assert groups == [([1], ["image"])]
    groups.clear()
    rows(path)
    assert groups == [([group], ["caption", "key"]) for group in range(3)]


@pytest.mark.parametrize(
    ("columns", "filters", "message"),
    [
        ({"image": "img"}, {}, "has no column img; its columns are: key, image, caption"),
        ({"caption": "alt"}, {}, "has no column alt"),
        ({"label": "who"}, {}, "has no column who"),
        ({"needs": frozenset(["label"])}, {}, "has no label column"),
        ({}, {"kind": frozenset(["x"])}, "has no column kind"),
        ({"image": "size"}, {}, "holds int64, not image bytes or paths"),
    ],
)
def test_an_error_for_a_missing_column_lists_the_others(tmp_path, columns, filters, message):
    path = write_parquet(tmp_path / "a.parquet", [sample(1, "a", size=3)])
    with pytest.raises(InputError, match=message):
        rows(path, filters, **columns)


def test_parquet_without_images_is_refused(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"url": "u", "caption": "c"}])
    with pytest.raises(InputError, match="no image column; its columns are: url, caption"):
        rows(path)
    path = write_parquet(tmp_path / "b.parquet", [{"image": b"1"}])
    with pytest.raises(InputError, match="no caption column"):
        rows(path, needs=frozenset(["caption"]))
    assert rows(path)[0].caption is None


def test_damaged_files_are_refused_at_every_stage(tmp_path):
    path = tmp_path / "a.parquet"
    write_parquet(path, [sample(i, "c" * 50) for i in range(200)], group=50)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read as parquet"):
        rows(path)
    path.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    with pytest.raises(InputError, match="cannot be read as parquet"):
        list(source(path).images(dict.fromkeys(range(200))))
    with pytest.raises(MissingError):
        rows(tmp_path / "gone.parquet")


def test_oversized_cells_are_counted(tmp_path):
    rows = [
        {"image": b"1", "caption": "x" * (TEXT_LIMIT + 1)},
        {"image": bytes(IMAGE_LIMIT + 1), "caption": "a"},
        {"image": b"2", "caption": "b"},
    ]
    file, skipped = source(write_parquet(tmp_path / "a.parquet", rows)), Counter()
    assert [row.caption for row in file.rows(skipped)] == ["a", "b"]
    assert skipped == {TOO_LARGE: 1}
    images = dict(file.images(dict.fromkeys([1, 2])))
    assert (images[1].reason, images[2]) == (TOO_LARGE, b"2")


def test_the_first_value_of_a_list_is_used(tmp_path):
    table = pa.table({"caption": [["good", "x"], ["also"], []], "image": [b"a"] * 3})
    pq.write_table(table, tmp_path / "a.parquet")
    assert [row.caption for row in rows(tmp_path / "a.parquet")] == ["good", "also", None]


def test_a_remote_file_is_read_as_a_local_one(tmp_path):
    samples = [{"image": b"%d" % n, "caption": str(n % 2)} for n in range(10)]
    path = write_parquet(tmp_path / "a.parquet", samples, group=3)
    remote = "memory://a.parquet"
    fsspec.filesystem("memory").pipe("/a.parquet", (tmp_path / "a.parquet").read_bytes())
    assert [row.caption for row in rows(remote)] == [row.caption for row in rows(path)]
    wanted = dict.fromkeys([0, 2, 3, 9])
    images = [(index, b"%d" % index) for index in wanted]
    assert list(source(remote).images(wanted)) == list(source(path).images(wanted)) == images
