import json
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import FAKE_IMG2DATASET
from processes import inside
from tiny_images import encoded, shard
from worlds import Listener

from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.records.options import BuildRequest, MetadataSource
from slsgu_cli.records.sets import Concept, DownloadOptions, Origin
from slsgu_cli.sets import collection
from slsgu_cli.sets.build import build_many, build_sets, replay, require_all
from slsgu_cli.sets.requests import with_collection
from slsgu_cli.store.artifacts import Artifact, verify
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.catalog import entries
from slsgu_cli.store.store import Store

KINDS = ("dog", "cat", "bird")
DOWNLOAD = DownloadOptions(command=FAKE_IMG2DATASET, shard_rows=10)


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def metadata(tmp_path):
    rows = []
    for n in range(60):
        (tmp_path / f"{n}.jpg").write_bytes(encoded(n, kind="JPEG") if n != 9 else b"<html>")
        rows.append({"URL": f"file://{tmp_path}/{n}.jpg", "TEXT": f"a {KINDS[n % 3]} {n}"})
    rows[3]["URL"] = "http://127.0.0.1:9/3.jpg"
    rows[6]["TEXT"] = "a dog, not this one"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "meta.parquet", row_group_size=10)
    return str(tmp_path / "meta.parquet")


def ask(model, *, concepts=(), metadata=(), sources=(), **options):
    options = {"name": "dog", "concept": "dog", "retain_samples": 8} | options
    request = BuildRequest(model=model, sources=sources, **options)
    source = MetadataSource(metadata=metadata, url_column="url", download=DOWNLOAD)
    return with_collection(request, concepts, source)


def test_a_set_from_metadata(store, tiny_model, metadata, tmp_path):
    request = ask(tiny_model, metadata=(metadata,), not_match=("not this",))
    manifest = build_sets(store, request)
    forget = DataBlock.open(store, manifest.forget)
    assert sorted(int(c.split()[-1]) for c in forget.captions) == [
        n for n in range(0, 60, 3) if n not in (3, 6, 9)
    ]
    assert manifest.forget.seen == 60
    assert manifest.forget.refused == {"connection failed": 1, "excluded": 1, "not an image": 1}
    number = int(forget.captions[0].split()[-1])
    assert forget.origins[0] == Origin(metadata, number, f"file://{tmp_path}/{number}.jpg")
    retain = DataBlock.open(store, manifest.retain)
    assert retain.rows == 8
    assert not any("dog" in caption for caption in retain.captions)
    assert [e.kind for e in entries(store) if e.state != "ok"] == []
    assert all(replay(store, "dog").same.values())


def test_a_damaged_shard_is_an_error(store, tiny_model, metadata):
    request = ask(tiny_model, metadata=(metadata,))
    build_sets(store, request)
    (name,) = Artifact.COLLECTION.names(store)
    shard = Path(store.where(f"collections/{name}/parts")) / "00000.tar"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match=r"00000\.tar is damaged: it does not match its digest"):
        build_sets(store, request)
    with pytest.raises(InputError, match=r"00000\.tar is damaged"):
        verify(store, Artifact.COLLECTION, Artifact.COLLECTION.path(name))


def test_downloads_in_any_order_make_the_same_set(store, tiny_model, metadata, tmp_path):
    first = build_sets(store, ask(tiny_model, metadata=(metadata,)))
    other = Store(str(tmp_path / "other"))
    request = ask(tiny_model, metadata=(metadata,))
    # Other shards, in which everything lies elsewhere.
    small = DownloadOptions(command=FAKE_IMG2DATASET, shard_rows=7)
    collect = replace(request.collect, download=small)
    second = build_sets(other, replace(request, collect=collect))
    assert second.forget.fingerprint == first.forget.fingerprint
    assert second.retain.fingerprint == first.retain.fingerprint


def test_many_names_share_one_collection_and_its_retain_rows(store, tiny_model, tmp_path):
    for number in range(3):
        captions = [f"a {KINDS[n % 3]} {n}" for n in range(number * 20, number * 20 + 20)]
        shard(tmp_path / "tars" / f"{number:05}.tar", captions, first=number * 20)
    concepts = [Concept(name, (name,)) for name in ("dog", "cat", "unicorn")]
    request = ask(tiny_model, concepts=concepts, sources=(f"{tmp_path}/tars",))
    listener = Listener()
    built, failed = build_many(store, request, concepts)
    assert [m.name for m in built] == ["dog", "cat"]
    assert failed == ["unicorn"]
    assert any("unicorn: the forget set is empty" in told for told in listener.heard)
    with pytest.raises(InputError, match="no set was built for 1 of the names: unicorn"):
        require_all(failed)
    assert built[0].retain.path == built[1].retain.path
    assert [m.forget.rows for m in built] == [20, 20]
    assert len(store.names("collections", ".json")) == 1
    retained = DataBlock.open(store, built[0].retain).captions
    assert all("bird" in caption for caption in retained)


def test_a_limit_of_forget_rows_limits_the_download(store, tiny_model, metadata, monkeypatch):
    monkeypatch.setattr(collection, "sample_size", lambda wanted: 2 * wanted)
    request = ask(tiny_model, metadata=(metadata,), max_forget=5)
    manifest = build_sets(store, request)
    (urls,) = Path(store.root).glob("collections/*/urls.parquet")
    roles = [row["role"] for row in pq.read_table(urls).to_pylist()]
    assert roles.count("forget") == 10
    assert manifest.forget.rows == 5
    monkeypatch.undo()
    other = Store(f"{store.root}-2")
    whole = build_sets(other, request)
    assert whole.forget.fingerprint == manifest.forget.fingerprint
    assert whole.forget.refused["beyond --max-forget"] > 10


def test_retain_rows_can_have_a_source_of_their_own(store, tiny_model, metadata, tmp_path):
    shard(tmp_path / "retain.tar", [f"a house {n}" for n in range(12)])
    request = ask(tiny_model, metadata=(metadata,), retain_sources=(f"{tmp_path}/retain.tar",))
    manifest = build_sets(store, request)
    assert manifest.retain.seen == 12


def test_no_match_and_no_download_are_different_errors(store, tiny_model, metadata):
    none = ask(tiny_model, metadata=(metadata,), match=("unicorn",))
    with pytest.raises(InputError, match="nothing matches 'unicorn' among 60 captions"):
        build_sets(store, none)
    dead = ask(tiny_model, metadata=(metadata,), match=("dog 3",))
    with pytest.raises(InputError, match="none of the 1 images of dog could be collected: 1 conn"):
        build_sets(store, dead)
    assert store.names("sets") == []


def test_contradictions_are_usage_errors(tiny_model):
    with pytest.raises(UsageError, match="cannot be combined"):
        ask(tiny_model, metadata=("a",), sources=("b",))
    with pytest.raises(UsageError, match="--names cannot be combined with --match"):
        ask(tiny_model, concepts=[Concept("x", ("x",))], sources=("b",), match=("y",))


def test_from_the_command_line(store, tiny_model, metadata, tmp_path):
    (tmp_path / "names").write_text("dog\t!not this\ncat\nunicorn\n")
    told = inside(
        "build-sets",
        "--names",
        tmp_path / "names",
        "--model",
        tiny_model.name,
        "--metadata",
        metadata,
        "--caption-col",
        "TEXT",
        "--retain-samples",
        8,
        "--img2dataset",
        FAKE_IMG2DATASET,
        "--json",
        store=store.root,
    )
    assert told.exit_code == 3, told.stderr
    assert "no set was built for 1 of the names: unicorn" in told.stderr
    sets = json.loads(told.stdout)["sets"]
    assert [(m["name"], m["forget"]["rows"]) for m in sets] == [("dog", 17), ("cat", 20)]
    both = inside("build-sets", "x", "--names", tmp_path / "names", store=store.root)
    assert both.exit_code == 2
