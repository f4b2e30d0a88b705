import json
import os
import tarfile
from collections import Counter
from pathlib import Path

import pytest
from tiny_images import encoded, shard, write_tar

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources.reader import Columns
from slsgu_cli.sources.tar import ShardHeader, TarSource, _regular_file


def source(path, filters=None, **columns):
    return TarSource(str(path), Columns(**columns), filters or {})


def rows(path, filters=None, **columns):
    return list(source(path, filters, **columns).rows(Counter()))


def test_captions_and_labels_are_found_in_their_fields(tmp_path):
    path = write_tar(
        tmp_path / "a.tar",
        [
            ("a/1.jpg", b"1"),
            ("a/1.txt", b" from txt\n"),
            ("a/1.json", b'{"caption": "from json", "alt": "from alt", "who": "x"}'),
            ("2.json", b'{"caption": "json only", "label": 7}'),
            ("2.PNG", b"2"),
            ("3.cls", b"5"),
            ("3.webp", b"3"),
            ("3.json", b"not json"),
            ("4.seg.png", b"no image suffix"),
            ("4.txt", b"no image"),
            ("README", b"skipped"),
        ],
    )
    one, two, three, four = rows(path)
    assert (one.key, one.caption, one.label) == ("a/1", "from txt", None)
    assert (two.caption, two.label, two.has_image) == ("json only", "7", True)
    assert (three.caption, three.label) == (None, "5")
    assert (four.caption, four.has_image) == ("no image", False)
    named = rows(path, caption="alt", label="who")
    assert (named[0].caption, named[0].label) == ("from alt", "x")
    assert named[1].caption == "json only"


def test_filters_look_into_the_json(tmp_path):
    path = shard(tmp_path / "a.tar", ["a", "b", "c"])
    assert [(r.index, r.caption) for r in rows(path, {"kind": frozenset(["odd"])})] == [(1, "b")]


def test_the_first_pass_reads_no_image(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", ["a", "b"])
    read = []
    extract = tarfile.TarFile.extractfile
    monkeypatch.setattr(
        tarfile.TarFile, "extractfile", lambda tar, m: read.append(m.name) or extract(tar, m)
    )
    rows(path)
    assert len(read) == 4
    assert not any(name.endswith("jpg") for name in read)
    read.clear()
    assert [index for index, _ in source(path).images({1: None})] == [1]
    assert read == ["000000001.jpg"]


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tgz"])
def test_compressed_shards(tmp_path, name):
    members = [("1.jpg", encoded(1)), ("1.txt", b"one")]
    path = write_tar(tmp_path / name, members, "w:gz")
    assert [row.caption for row in rows(path)] == ["one"]
    assert list(source(path).images({0: None})) == [(0, encoded(1))]


@pytest.mark.parametrize("suffix", ["tar", "tar.gz"])
def test_a_truncated_shard_is_read_up_to_its_end(tmp_path, suffix):
    whole = tmp_path / "whole.tar"
    members = []
    for number in range(6):
        members += [(f"{number}.png", encoded(number, (64, 64))), (f"{number}.txt", b"text")]
    write_tar(whole, members, "w" if suffix == "tar" else "w:gz")
    data = whole.read_bytes()
    cut = tmp_path / f"cut.{suffix}"
    cut.write_bytes(data[: len(data) * 6 // 10])
    trouble = Counter()
    found = list(source(cut).rows(trouble))
    assert 0 < len(found) < 6
    assert trouble == {"truncated shard": 1}
    for wanted in ({row.index: row.extent for row in found}, {row.index: None for row in found}):
        images = dict(source(cut).images(wanted))
        assert images == {row.index: encoded(row.index, (64, 64)) for row in found}


def test_images_are_read_where_the_first_pass_saw_them(tmp_path, monkeypatch):
    path = shard(tmp_path / "a.tar", ["a", "b", "c"])
    extents = {row.index: row.extent for row in rows(path)}
    by_member = dict(source(path).images(dict.fromkeys(extents)))
    monkeypatch.setattr("slsgu_cli.sources.tar.Shard.open", lambda **_: pytest.fail("parsed"))
    assert dict(source(path).images(extents)) == by_member
    assert [index for index, _ in source(path).images({2: extents[2], 0: extents[0]})] == [0, 2]
    os.truncate(path, extents[1][0] + 1)
    assert [index for index, _ in source(path).images(extents)] == [0]


def test_a_shard_that_streams_has_no_extents(tmp_path):
    path = write_tar(tmp_path / "a.tgz", [("1.jpg", encoded(1)), ("1.txt", b"one")], "w:gz")
    assert [row.extent for row in rows(path)] == [None]


@pytest.mark.parametrize("cut", range(0, 3 * 1024, 512))
@pytest.mark.parametrize("extra", [0, 100])
def test_a_cut_anywhere_is_noticed(tmp_path, cut, extra):
    path = tmp_path / "a.tar"
    write_tar(path, [(f"{i}.{e}", b"x" * 300) for i in range(3) for e in ("jpg", "txt")])
    data = path.read_bytes()
    trouble = Counter()
    assert len(list(source(path).rows(trouble))) == 3
    assert not trouble
    path.write_bytes(data[: 3 * 1024 + cut + extra])
    assert 1 <= len(list(source(path).rows(trouble))) <= 3
    assert trouble == {"truncated shard": 1}


def test_an_empty_shard_is_counted_and_another_format_refused(tmp_path):
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"")
    trouble = Counter()
    assert list(source(empty).rows(trouble)) == []
    assert trouble == {"truncated shard": 1}
    other = tmp_path / "other.tar"
    other.write_bytes(b"<html>" * 1000)
    with pytest.raises(InputError, match=r"other\.tar cannot be read as a tar shard"):
        rows(other)
    with pytest.raises(MissingError):
        rows(tmp_path / "gone.tar")


def test_memory_does_not_grow_with_the_shard(tmp_path):
    import tracemalloc

    def peak(count):
        path = write_tar(
            tmp_path / f"{count}.tar",
            [
                member
                for number in range(count)
                for member in ((f"{number}.jpg", b"x" * 2000), (f"{number}.txt", b"caption"))
            ],
        )
        tracemalloc.start()
        for _ in source(path).rows(Counter()):
            pass
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    peak(10)
    assert peak(3000) < peak(300) + 200_000


def test_identity_changes_with_the_file(tmp_path):
    path = shard(tmp_path / "a.tar", ["a"])
    before = json.dumps(source(path).identity())
    shard(tmp_path / "a.tar", ["a", "b", "c", "d", "e", "f", "g", "h", "i", "j"])
    assert json.dumps(source(path).identity()) != before


def read_header(kind, buffer):
    """Return what a header of that class says, or the error that it raises."""
    try:
        member = kind.frombuf(buffer, "utf-8", "surrogateescape")
    except tarfile.HeaderError as error:
        return type(error)
    return member.name, member.size, member.type


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("name", ["1.jpg", "ü/é.txt", "x" * 96 + ".jpg", "y" * 40 + "/" + "x" * 80])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, b"\0", b"S"])
@pytest.mark.parametrize("size", [0, 65_536, 8**11 - 1, 8**11 + 5])
def test_headers_are_read_as_the_module_reads_them(form, name, kind, size):
    member = tarfile.TarInfo(name)
    if form == tarfile.USTAR_FORMAT:
        # The format has no greater sizes.
        size = min(size, 8**11 - 1)
    member.type, member.size, member.mtime = kind, size, 1_700_000_000.5
    written = member.tobuf(form)
    for start in range(0, len(written), tarfile.BLOCKSIZE):
        header = written[start : start + tarfile.BLOCKSIZE]
        assert read_header(ShardHeader, header) == read_header(tarfile.TarInfo, header)
    if kind == tarfile.REGTYPE and len(name) < 50 and size < 8**11:
        assert _regular_file(header)[1] == size


def test_a_damaged_header_is_refused_as_the_module_refuses_it():
    header = tarfile.TarInfo("1.jpg").tobuf()
    for place in range(tarfile.BLOCKSIZE):
        damaged = bytearray(header)
        damaged[place] ^= 0x15
        wrong = bytes(damaged)
        assert read_header(ShardHeader, wrong) == read_header(tarfile.TarInfo, wrong)
    assert read_header(ShardHeader, header[:300]) == tarfile.TruncatedHeaderError


def test_tars_within_a_tar_are_folders_of_a_class(tmp_path):
    def tar_bytes(*members):
        return Path(write_tar(tmp_path / "inner", members)).read_bytes()

    broken = tar_bytes(("x.png", b"x"), ("y.png", b"y" * 2000))[:2000]
    members = [
        ("first.png", b"1"),
        ("n01.tar", tar_bytes(("a.png", b"a"), ("b.png", b"b"), ("b.cls", b"own"))),
        ("broken.tar", broken),
        ("n02.tar", tar_bytes(("c.png", b"c"))),
        ("last.png", b"2"),
    ]
    for name, mode in (("t.tar", "w"), ("t.tar.gz", "w:gz")):
        source = TarSource(write_tar(tmp_path / name, members, mode), Columns(), {})
        trouble = Counter()
        rows = list(source.rows(trouble))
        assert [(row.index, row.key, row.label) for row in rows] == [
            (0, "first", None),
            (1, "a", "n01"),
            (2, "b", "own"),
            (3, "x", "broken"),
            (5, "c", "n02"),
            (6, "last", None),
        ]
        assert trouble == {"truncated shard": 1}
        images = dict(source.images({row.index: row.extent for row in rows}))
        assert images == {0: b"1", 1: b"a", 2: b"b", 3: b"x", 5: b"c", 6: b"2"}
        filtered = TarSource(source.path, Columns(), {"label": frozenset(["n02"])})
        assert [row.key for row in filtered.rows(Counter())] == ["c"]
