import subprocess
import sys
from collections import Counter

import pytest
from tiny_images import encoded, sample, shard, write_folder, write_parquet, write_tar
from worlds import Listener

from slsgu_cli.errors import InputError
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import CollectRequest, Concept, ModelSpec, Origin
from slsgu_cli.sets import collection, shard_collection
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.reader import Columns
from slsgu_cli.sources.tar import Shard, TarSource
from slsgu_cli.store.store import Store

KINDS = ("dog", "cat", "bird")


@pytest.fixture
def tars(tmp_path):
    """Four shards of 30 rows: dogs, cats and birds in turn."""
    for number in range(4):
        captions = [f"a {KINDS[n % 3]} number {n}" for n in range(number * 30, number * 30 + 30)]
        shard(tmp_path / "tars" / f"{number:05}.tar", captions, first=number * 30)
    return f"{tmp_path}/tars"


@pytest.fixture
def alone(monkeypatch):
    """Read shards in this process: others take longer to start than all of the shards."""
    monkeypatch.setattr(shard_collection, "cores", lambda: 1)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def ask(*sources, concepts=None, **options):
    """Return a request; without `retain_samples`, one that draws no retain rows."""
    options = options if "retain_samples" in options else {"retain_sources": ("x",), **options}
    concepts = concepts or (Concept("dog", ("dog",)), Concept("cat", ("cat",)))
    collect = CollectRequest(concepts=concepts, sources=sources)
    return BuildRequest(name="x", model=ModelSpec("unused"), collect=collect, **options)


def collect(store, request):
    return collection.collect(store, request, request.collect)


def held(store, collected):
    """Return (row, image) of everything in a collection."""
    readers = open_sources([store.where(collected.folder)], Columns())
    found = []
    for reader in readers:
        rows = {row.index: row for row in reader.rows(Counter())}
        found += [(rows[index], data) for index, data in reader.images(dict.fromkeys(rows))]
    return found


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_shard_is_read_once_and_yields_what_two_passes_yield(tmp_path, mode, monkeypatch):
    members = []
    for n in range(12):
        members += [(f"{n}.jpg", encoded(n)), (f"{n}.txt", f"a {KINDS[n % 3]}".encode())]
    path = write_tar(tmp_path / ("a.tar" if mode == "w" else "a.tar.gz"), members, mode)
    reader = TarSource(path, Columns(), {})
    wanted = {row.index: row for row in reader.rows(Counter()) if row.caption == "a cat"}
    opened = []
    real = Shard.open
    monkeypatch.setattr(Shard, "open", lambda *a, **k: opened.append(1) or real(*a, **k))
    found = list(reader.select(lambda row: row.caption == "a cat", Counter()))
    assert len(opened) == 1
    assert [row for row, _ in found] == list(wanted.values())
    assert [data for _, data in found] == [encoded(n) for n in range(1, 12, 3)]


def test_samples_of_many_names_with_their_origins(store, tars):
    collected = collect(store, ask(tars))
    record = collected.record
    assert record.seen == 120
    assert {name: tried.rows for name, tried in record.concepts.items()} == {"dog": 40, "cat": 40}
    found = held(store, collected)
    assert len(found) == 80
    for row, data in found:
        number = int(row.caption.split()[-1])
        assert row.origin == Origin(f"{tars}/{number // 30:05}.tar", number % 30)
        assert data == encoded(number, kind="JPEG")


def test_retain_rows_come_from_as_few_shards_as_possible(store, tars, alone, monkeypatch):
    monkeypatch.setattr(shard_collection, "retain_candidates", lambda request: 15)
    record = collect(store, ask(tars, retain_samples=5)).record
    assert record.retain.rows == 20
    assert len(record.retain.shards) == 2


def test_a_process_that_reads_shards_does_not_load_torch():
    code = "import sys, slsgu_cli.sets.collection; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_only_files_that_were_not_done_are_read_again(store, tars, alone, monkeypatch):
    real, read = TarSource.select, []

    def breaking(reader, wants, trouble):
        read.append(reader.path)
        if len(read) == 3:
            raise KeyboardInterrupt
        return real(reader, wants, trouble)

    monkeypatch.setattr(TarSource, "select", breaking)
    with pytest.raises(KeyboardInterrupt):
        collect(store, ask(tars))
    assert store.names("collections", ".json") == []
    record = collect(store, ask(tars)).record
    assert len(read) == 5
    assert record.concepts["dog"].rows == 40
    listener = Listener()
    assert collect(store, ask(tars)).record == record
    assert "reusing the samples collected from" in listener.heard[0]


def test_a_changed_source_is_another_collection(store, tars, alone):
    first = collect(store, ask(tars))
    shard(__import__("pathlib").Path(tars) / "00000.tar", ["a dog"] * 31)
    assert collect(store, ask(tars)).folder != first.folder


def test_sources_of_other_kinds(store, alone, tmp_path):
    table = write_parquet(tmp_path / "a.parquet", [sample(n, f"a {KINDS[n]}") for n in range(3)])
    photos = write_folder(tmp_path / "photos", {"dog/1.png": encoded(7), "ant/2.png": encoded(8)})
    collected = collect(store, ask(table, photos))
    assert [(row.caption, data) for row, data in held(store, collected)] == [
        ("a dog", encoded(0)),
        ("a cat", encoded(1)),
        ("dog", encoded(7)),
    ]


def test_truncated_shards_are_counted_and_other_damage_is_an_error(store, tars, alone, tmp_path):
    path = tmp_path / "tars" / "00003.tar"
    path.write_bytes(path.read_bytes()[:20_000])
    record = collect(store, ask(tars)).record
    assert record.refused == {"truncated shard": 1}
    path.write_bytes(b"no tar at all")
    with pytest.raises(InputError, match="cannot be read as a tar shard"):
        collect(store, ask(tars))
