"""What a shard made to hurt may cost: memory and time stay bounded, and whole samples are read."""

import bz2
import json
import lzma
import struct
import subprocess
import sys
import tarfile
import textwrap
import zlib

from places import ROOT

from slsgu_cli.sources.rows import BOMB, TOO_LARGE
from slsgu_cli.sources.tar import DEEP, SPARSE, TRUNCATED

BLOCK = tarfile.BLOCKSIZE
GOOD = [("good.jpg", b"image"), ("good.txt", b"good")]
MIB = 1 << 20
# Beyond what the process has when it begins; a usual shard takes less than 2 MiB.
MEMORY, SECONDS = 80 * MIB, 30


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


def signed(header, place, value):
    """Return a header with other bytes at a place, and a checksum that is right."""
    header = header[:place] + value + header[place + len(value) :]
    blank = header[:148] + b" " * 8 + header[156:]
    return blank[:148] + b"%06o\0 " % sum(blank) + blank[156:]


def gzipped(start, zeros, end=b""):
    """Return a gzip file of some bytes, so many MiB of zeros, and more bytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)

    def part(data):
        return packer.compress(data) + packer.flush(zlib.Z_FULL_FLUSH)

    # What follows a full flush refers to nothing before it, and can stand there many times.
    parts = [part(start), part(bytes(MIB)) * zeros, part(end), packer.flush()]
    return b"\x1f\x8b\x08" + bytes(7) + b"".join(parts) + struct.pack("<2I", 0, 0)


def sparse(name, form):
    """Return a member of a few bytes that would be read as 4 GB, sparse in one of four ways."""
    if form == "old":
        header = signed(member(name, BLOCK, tarfile.GNUTYPE_SPARSE), 386, b"%011o\0" % 0)
        header = signed(header, 398, b"%011o\0" % 1)
        return signed(header, 483, b"%011o\0" % (4 << 30)) + bytes(BLOCK)
    fields = {
        "0.0": {"GNU.sparse.size": 4 << 30, "GNU.sparse.numblocks": 1},
        "0.1": {"GNU.sparse.size": 4 << 30, "GNU.sparse.map": "0,1"},
        "1.0": {"GNU.sparse.major": 1, "GNU.sparse.minor": 0, "GNU.sparse.realsize": 4 << 30},
    }[form]
    return pax(fields) + member(name, BLOCK) + padded(b"1\n0\n1\n")


def pax(fields, kind=tarfile.XHDTYPE):
    """Return a header that goes before another one."""
    texts = [f" {key}={value}\n" for key, value in fields.items()]
    lines = "".join(f"{len(text) + 2:02}{text}" for text in texts).encode()
    return member("pax", len(lines), kind) + padded(lines)


def deep(levels):
    return b'{"caption": ' + b"[" * levels + b"]" * levels + b"}"


END = bytes(2 * BLOCK)
LONG = tarfile.GNUTYPE_LONGNAME
ONE_GOOD = archive(GOOD)

# The name of a shard, its bytes, the captions it gives and what is counted.
HOSTILE = {
    **{
        f"sparse caption, {form}": (
            "tar",
            sparse("bad.txt", form) + ONE_GOOD + END,
            ["good"],
            {SPARSE: 1},
        )
        for form in ("old", "0.0", "0.1", "1.0")
    },
    "sparse image": ("tar", sparse("bad.jpg", "1.0") + ONE_GOOD + END, ["good"], {SPARSE: 1}),
    "sparse in a stream": (
        "tgz",
        gzipped(sparse("bad.jpg", "old") + ONE_GOOD, 0, END),
        ["good"],
        {SPARSE: 1},
    ),
    "caption of 6 GB": (
        "tgz",
        gzipped(ONE_GOOD + member("bad.txt", 6 << 30), 6 << 10),
        ["good"],
        {BOMB: 1},
    ),
    "image of 70 MB": (
        "tar",
        member("bad.jpg", 70 * MIB) + bytes(70 * MIB) + ONE_GOOD + END,
        ["good"],
        {TOO_LARGE: 1},
    ),
    "name of 6 GB": (
        "tgz",
        gzipped(ONE_GOOD + member("bad", 6 << 30, LONG), 6 << 10),
        [],
        {TRUNCATED: 1},
    ),
    "pax header of 6 GB": (
        "tgz",
        gzipped(ONE_GOOD + member("bad", 6 << 30, tarfile.XHDTYPE), 6 << 10),
        [],
        {TRUNCATED: 1},
    ),
    "sparse map of 6 GB": (
        "tgz",
        gzipped(ONE_GOOD + signed(member("bad.txt", 0, b"S"), 482, b"\1"), 0, b"\1" * MIB),
        [],
        {TRUNCATED: 1},
    ),
    "samples without end": (
        "tgz",
        gzipped(ONE_GOOD + END[:BLOCK], 0, ONE_GOOD * 20_000 + END),
        ["good"],
        {},
    ),
    "bz2": (
        "tar.bz2",
        bz2.compress(ONE_GOOD + member("bad.txt", 20 * MIB) + bytes(20 * MIB) + END),
        ["good"],
        {TOO_LARGE: 1},
    ),
    "xz": (
        "tar.xz",
        lzma.compress(ONE_GOOD + member("bad.txt", 20 * MIB) + bytes(20 * MIB) + END, preset=0),
        ["good"],
        {TOO_LARGE: 1},
    ),
    "deep JSON": (
        "tar",
        archive([("a.json", deep(100_000)), ("a.jpg", b"a"), *GOOD, ("b.json", deep(200_000))])
        + END,
        ["good"],
        {DEEP: 2},
    ),
    "JSON of 2 MB": (
        "tar",
        archive([("a.json", b"[" + b"{}," * (MIB // 2) + b"0]"), *GOOD]) + END,
        ["good"],
        {TOO_LARGE: 1},
    ),
    "JSON whose caption is long": (
        "tar",
        archive([("a.json", json.dumps({"caption": "x" * 70_000}).encode()), *GOOD]) + END,
        ["good"],
        {TOO_LARGE: 1},
    ),
    "headers before headers": (
        "tar",
        ONE_GOOD + pax({"comment": 1}) * 3000 + ONE_GOOD + END,
        [],
        {TRUNCATED: 1},
    ),
    "headers for all": (
        "tar",
        ONE_GOOD
        + b"".join(pax({f"k{i}": 1}, tarfile.XGLTYPE) + ONE_GOOD for i in range(1100))
        + END,
        ["good"] * 1024,
        {TRUNCATED: 1},
    ),
    "a size below zero": (
        "tar",
        ONE_GOOD + signed(member("bad.txt"), 124, b"\xff" * 10 + b"\xfa\x00"),
        [],
        {TRUNCATED: 1},
    ),
    "an octal size below zero": (
        "tar",
        ONE_GOOD + signed(member("bad.txt"), 124, b"-0000004000\0"),
        [],
        {TRUNCATED: 1},
    ),
    "a size below zero in a header before": (
        "tar",
        ONE_GOOD + pax({"size": -2048}) + member("bad.txt"),
        [],
        {TRUNCATED: 1},
    ),
    "a size beyond all": (
        "tar",
        ONE_GOOD + signed(member("bad.txt"), 124, b"\x80" + b"\xff" * 11),
        [],
        {TRUNCATED: 1},
    ),
    "a header that is no figure": (
        "tar",
        ONE_GOOD + pax({"GNU.sparse.size": "x"}) + ONE_GOOD,
        [],
        {TRUNCATED: 1},
    ),
    "a long name": (
        "tar",
        archive([("d/" * 4000 + "a.txt", b"a"), *GOOD]) + END,
        ["good"],
        {TOO_LARGE: 1},
    ),
    "a sample of many members": (
        "tar",
        archive([*((f"a.{i}", b"") for i in range(3000)), ("a.jpg", b"a"), *GOOD]) + END,
        ["good"],
        {TOO_LARGE: 1},
    ),
}

READ = """
    import json, resource, sys, time
    from collections import Counter
    from slsgu_cli.sources.rows import Columns
    from slsgu_cli.sources import tar

    # It takes seconds to unpack as much as may be.
    tar.ROOM //= 8
    memory, seconds, *paths = sys.argv[1:]
    pages = int(open("/proc/self/statm").read().split()[0])
    limit = pages * resource.getpagesize() + int(memory)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds)))
    results = []
    for path in paths:
        source, trouble = tar.TarSource(path, Columns(), {}), Counter()
        rows = list(source.rows(trouble))
        selected = [row.caption for row, _ in source.select(lambda row: True, Counter())]
        images = dict(source.images({row.index: None for row in rows} or {10**6: None}))
        results.append([[row.caption for row in rows], selected, len(images), trouble])
    print(json.dumps(results))
"""


def test_memory_and_time_are_bounded_and_whole_samples_are_read(tmp_path):
    paths = []
    for number, (suffix, data, _, _) in enumerate(HOSTILE.values()):
        path = tmp_path / f"{number}.{suffix}"
        path.write_bytes(data)
        paths.append(str(path))
    code = textwrap.dedent(READ)
    done = subprocess.run(
        [sys.executable, "-c", code, str(MEMORY), str(SECONDS), *paths],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, (*_, captions, counted)), result in zip(
        HOSTILE.items(), json.loads(done.stdout), strict=True
    ):
        assert result == [captions, captions, len(captions), counted], name
