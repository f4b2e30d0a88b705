"""Damaged and oversized members of a shard are counted, and whole samples are read."""

import gzip
import json
import lzma
import tarfile
import zlib
from collections import Counter

import pytest
from tiny_images import encoded

from slsgu_cli.sources.reader import TOO_LARGE, Columns
from slsgu_cli.sources.tar import TRUNCATED, TarSource

BLOCK = tarfile.BLOCKSIZE
GOOD = [("good.jpg", encoded(1)), ("good.txt", b"good")]
MIB = 1 << 20


def member(name, size=0, kind=tarfile.REGTYPE):
    """Return the header of a member."""
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data):
    return data + bytes(-len(data) % BLOCK)


def archive(members):
    """Return the blocks of members, without the end mark."""
    return b"".join(member(name, len(data)) + padded(data) for name, data in members)


def pax(fields):
    """Return a header that changes the next one."""
    texts = [f" {key}={value}\n" for key, value in fields.items()]
    lines = "".join(f"{len(text) + 2:02}{text}" for text in texts).encode()
    return member("pax", len(lines), tarfile.XHDTYPE) + padded(lines)


def gzip_beginning(data):
    """Return the beginning of a gzip file, up to the end of `data`."""
    packer = zlib.compressobj(wbits=31)
    return packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)


END = bytes(2 * BLOCK)
ONE_GOOD = archive(GOOD)
LONG_CAPTION = ONE_GOOD + member("bad.txt", MIB) + bytes(MIB) + END
SPARSE = {"GNU.sparse.major": 1, "GNU.sparse.minor": 0, "GNU.sparse.realsize": 4 << 30}

# By name: the suffix of a shard, its bytes, the captions it gives and the counts.
SHARDS = {
    "sparse caption of 4 GB": (
        "tar",
        pax(SPARSE) + member("bad.txt", BLOCK) + padded(b"1\n0\n1\n") + ONE_GOOD + END,
        ["good"],
        {TOO_LARGE: 1},
    ),
    "long caption in gzip": ("tgz", gzip.compress(LONG_CAPTION), ["good"], {TOO_LARGE: 1}),
    "long caption in xz": ("tar.xz", lzma.compress(LONG_CAPTION), ["good"], {TOO_LARGE: 1}),
    "image of 65 MiB": (
        "tar",
        member("bad.jpg", 65 * MIB) + bytes(65 * MIB) + ONE_GOOD + END,
        ["good"],
        {TOO_LARGE: 1},
    ),
    "deep JSON": (
        "tar",
        archive([("a.json", b'{"caption": ' + b"[" * 100_000), ("a.jpg", b"a"), *GOOD]) + END,
        [None, "good"],
        {},
    ),
    "JSON of 2 MB": (
        "tar",
        archive([("a.json", b"[" + b"{}," * (MIB // 2) + b"0]"), *GOOD]) + END,
        ["good"],
        {TOO_LARGE: 1},
    ),
    "JSON with a long caption": (
        "tar",
        archive([("a.json", json.dumps({"caption": "x" * 70_000}).encode()), *GOOD]) + END,
        ["good"],
        {TOO_LARGE: 1},
    ),
    # `tarfile` unpacks 10 KiB at a time, and nothing of a block that is damaged.
    "damaged gzip": (
        "tgz",
        gzip_beginning(ONE_GOOD * 3) + b"\xff" * BLOCK,
        [],
        {TRUNCATED: 1},
    ),
}


@pytest.mark.parametrize("name", SHARDS)
def test_whole_samples_are_read_and_others_counted(tmp_path, name):
    suffix, data, captions, counts = SHARDS[name]
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(data)
    source, skipped = TarSource(str(path), Columns(), {}), Counter()
    rows = list(source.rows(skipped))
    assert [row.caption for row in rows] == captions
    assert skipped == counts
    selected = source.select(lambda row: True, Counter())
    assert [row.caption for row, _ in selected] == captions
    assert len(dict(source.images({row.index: None for row in rows} or {10**6: None}))) == len(rows)
