from collections import Counter

import fsspec
import pytest
from tiny_images import encoded, sample, shard, write_folder, write_parquet, write_tar

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources.grammar import parse_source
from slsgu_cli.sources.opening import fetch, open_sources, scan
from slsgu_cli.sources.reader import Columns
from slsgu_cli.sources.texts import as_text

ANY = Columns()


def rows(*texts, columns=ANY):
    return [row for _, row in scan(open_sources(texts, columns), Counter())]


@pytest.mark.parametrize(
    ("text", "path", "filters"),
    [
        ("a.parquet", "a.parquet", {}),
        ("a.parquet?kind=brand", "a.parquet", {"kind": {"brand"}}),
        ("a?k=x&k=y&z=1", "a", {"k": {"x", "y"}, "z": {"1"}}),
        ("0000?.tar", "0000?.tar", {}),
        ("0?.tar?kind=a b", "0?.tar", {"kind": {"a b"}}),
        ("a.parquet?caption=why?", "a.parquet", {"caption": {"why?"}}),
        ("a.parquet?name=c%2B%2B%26co", "a.parquet", {"name": {"c++&co"}}),
        ("s3://b/x=1/*.tar", "s3://b/x=1/*.tar", {}),
        ("a.parquet?kind=", "a.parquet", {"kind": {""}}),
    ],
)
def test_grammar(text, path, filters):
    source = parse_source(text)
    assert source.path == path
    assert {name: set(values) for name, values in source.filters.items()} == filters


def test_globs_ranges_and_several_sources_keep_their_order(tmp_path):
    for number in range(12):
        shard(tmp_path / f"{number:05d}.tar", [f"shard {number}"], first=number)
    captions = [row.caption for row in rows(f"{tmp_path}/0000[0-2].tar")]
    assert captions == ["shard 0", "shard 1", "shard 2"]
    spelled = rows(f"{tmp_path}/{{00009..00011}}.tar", f"{tmp_path}/00000.tar")
    assert [row.caption for row in spelled] == ["shard 9", "shard 10", "shard 11", "shard 0"]
    assert len(rows(f"{tmp_path}/*.tar")) == 12
    with pytest.raises(MissingError, match=r"00012\.tar"):
        rows(f"{tmp_path}/{{00011..00012}}.tar")


def test_unknown_sources_are_refused(tmp_path):
    with pytest.raises(MissingError, match="no file matches source"):
        rows(f"{tmp_path}/nothing*.tar")
    write_folder(tmp_path, {"a.jpg": encoded(1), "b.doc": "x"})
    with pytest.raises(InputError, match="not a source") as caught:
        rows(f"{tmp_path}/b.doc")
    assert "tar shards" in caught.value.hint
    with pytest.raises(InputError) as caught:
        rows(f"{tmp_path}/*.jpg")
    assert "folder" in caught.value.hint
    with pytest.raises(InputError, match="cannot open source"):
        rows("nosuchprotocol://x/*.tar")


def test_a_folder_of_shards_is_its_shards(tmp_path):
    shard(tmp_path / "00000.tar", ["one", "two"])
    write_parquet(tmp_path / "00000.parquet", [{"caption": "metadata", "url": "u"}])
    (tmp_path / "00000_stats.json").write_text("{}")
    assert [row.caption for row in rows(str(tmp_path))] == ["one", "two"]


def test_a_folder_of_parquet_files_is_its_files(tmp_path):
    write_parquet(tmp_path / "b.parquet", [sample(1, "b")])
    write_parquet(tmp_path / "a.parquet", [sample(2, "a")])
    assert [row.caption for row in rows(str(tmp_path))] == ["a", "b"]


def test_two_passes_agree_and_only_wanted_images_come(tmp_path):
    tar = shard(tmp_path / "a.tar", ["zero", "one", "two"])
    parquet = write_parquet(tmp_path / "b.parquet", [sample(i, f"p{i}") for i in range(4)])
    write_folder(tmp_path / "f", {f"{i}.png": encoded(50 + i) for i in range(3)})
    readers = open_sources([tar, parquet, str(tmp_path / "f")], ANY)
    got = list(fetch(readers, dict.fromkeys([(0, 2), (1, 0), (1, 3), (2, 1)])))
    assert got == [
        ((0, 2), encoded(2, kind="JPEG")),
        ((1, 0), encoded(0)),
        ((1, 3), encoded(3)),
        ((2, 1), encoded(51)),
    ]


def test_rows_are_fetched_by_file_and_missing_ones_are_none():
    asked = {}

    class Source:
        def __init__(self, number):
            self.number = number

        def images(self, wanted):
            asked[self.number] = wanted
            return iter(())

    wanted = {(1, 5): (512, 9), (0, 2): None, (1, 7): None}
    fetched = fetch([Source(number) for number in range(3)], wanted)
    assert dict(fetched) == dict.fromkeys(wanted)
    assert asked == {1: {5: (512, 9), 7: None}, 0: {2: None}}


def test_remote_file_systems_work_alike(tmp_path):
    fs = fsspec.filesystem("memory")
    local = {
        "s.tar": shard(tmp_path / "s.tar", ["in tar"]),
        "p.parquet": write_parquet(tmp_path / "p.parquet", [sample(1, "in parquet")]),
    }
    for name, path in local.items():
        fs.put_file(path, f"/remote-source/{name}")
    fs.pipe("/remote-source/images/cat/1.png", encoded(3))
    fs.pipe("/remote-source/images/cat/1.txt", b"in folder")
    try:
        sources = [f"memory://remote-source/{name}" for name in ("*.tar", "p.parquet", "images")]
        readers = open_sources(sources, ANY)
        found = list(scan(readers, Counter()))
        assert [row.caption for _, row in found] == ["in tar", "in parquet", "in folder"]
        assert found[-1][1].label == "cat"
        images = [data for _, data in fetch(readers, dict.fromkeys([(0, 0), (1, 0), (2, 0)]))]
        assert images == [encoded(0, kind="JPEG"), encoded(1), encoded(3)]
        assert len({str(reader.identity()) for reader in readers}) == 3
    finally:
        fs.rm("/remote-source", recursive=True)


def test_fields_as_text():
    assert as_text(" a ") == "a"
    assert as_text(b"caf\xc3\xa9") == "café"
    assert as_text(["first", "second"]) == "first"
    assert as_text(3) == "3"
    assert as_text(0) == "0"
    assert as_text("  ") is None
    assert as_text([]) is None
    assert as_text(None) is None


def test_an_error_for_a_missing_field_of_a_tar_lists_the_others(tmp_path):
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", b"x"), ("1.txt", b"t")])
    with pytest.raises(InputError, match=r"no field kind; its columns are: caption, key, label"):
        rows(f"{tar}?kind=odd")
