"""Stores on S3: a real server on loopback, with and without faults."""

import os

import fsspec
import numpy as np
import pytest
from processes import inside
from s3_server import BUCKET, S3Server

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store import cache, check, remote
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock, block_writer
from slsgu_cli.store.catalog import entries
from slsgu_cli.store.store import Store

SPEC = ModelSpec("local-dir:clip")
BLOCK = "data/a.zarr"


@pytest.fixture(scope="session")
def server():
    server = S3Server()
    yield server
    server.stop()


@pytest.fixture
def s3(server, monkeypatch, tmp_path):
    """The server without faults; commands and stores of this process reach it."""
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(cache.CACHE, str(tmp_path / "cache"))
    server.faults, server.always = [], None
    yield server
    server.faults, server.always = [], None


@pytest.fixture
def url(s3, tmp_path):
    return f"s3://{BUCKET}/{tmp_path.name}"


@pytest.fixture
def store(url):
    return Store(url)


def write_block(store, rows=3, path=BLOCK):
    with block_writer(store, path, height=2, width=2, rows=rows) as writer:
        for row in range(rows):
            writer.add(np.full((2, 2, 3), row, np.uint8), key=str(row))
        writer.finish(None, {})


def test_a_written_artifact_is_read_back(store):
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}
    store.write_bytes("plots/raw", b"\x00\x01")
    store.write_record("sets/a.json", SPEC)
    store.write_tensors("edits/a.safetensors", arrays, SPEC)
    write_block(store)
    assert store.read_bytes("plots/raw") == b"\x00\x01"
    assert store.read_record("sets/a.json", ModelSpec) == SPEC
    assert store.read_header("edits/a.safetensors", ModelSpec) == SPEC
    assert store.read_tensors("edits/a.safetensors")["x"].tolist() == arrays["x"].tolist()
    assert DataBlock.at(store, BLOCK).images(0, 3)[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert store.names("data") == ["a.zarr"]
    assert store.names("nowhere") == []
    assert store.exists("")
    assert store.exists("edits/a.safetensors")
    assert not store.exists("edits/b.safetensors")
    assert store.size(BLOCK) > 0
    store.remove(BLOCK)
    assert not store.exists(BLOCK)
    with pytest.raises(MissingError, match=r"there is no s3://.*/edits/b"):
        store.read_tensors("edits/b.safetensors")


def test_writes_of_other_processes_are_seen_at_once(store, url):
    assert store.names("sets") == []
    assert not store.exists("sets/a.json")
    Store(url).write_bytes("sets/a.json", b"1")
    assert store.names("sets") == ["a.json"]
    assert store.exists("sets/a.json")


def test_commands_on_s3(s3, shared_world, url):
    sources = shared_world.sources
    build = [
        "build-sets",
        "blue",
        "--model",
        shared_world.model.name,
        "--source",
        sources["pairs"],
        "--label-column",
        "label",
        "--retain-samples",
        30,
        "--max-forget",
        10,
        "--eval",
        f"first={sources['first']}",
    ]
    for words in (build, ["grad", "blue"], ["rank", "blue", "--direction", "gradient"]):
        done = inside(*words, store=url)
        assert done.exit_code == 0, done.stderr
        assert "warning: cannot" not in done.stderr
    again = inside(*build, store=url)
    assert "retain: reusing 30 decoded rows" in again.stderr
    listed = inside("ls", store=url).stdout
    kinds = [line.split("\t")[0] for line in listed.splitlines()[1:]]
    assert (kinds.count("data"), kinds.count("gradient"), kinds.count("ranking")) == (3, 2, 1)
    assert listed.count("\tok\t") == len(kinds)
    assert not [key for key in s3.objects() if "locks/" in key or ".partial" in key]


@pytest.mark.parametrize("fault", [500, 503, "drop"])
def test_a_passing_fault_is_retried_and_reported(s3, store, url, listener, fault):
    s3.faults = [fault, fault]
    store.write_bytes("sets/a.json", b"1")
    s3.faults = [fault, fault]
    assert store.read_bytes("sets/a.json") == b"1"
    reports = [text for text in listener.heard if f"{url}: " in text]
    assert all("a request is sent up to 5 times" in text for text in reports)
    # Over a connection that was used before, aiohttp sends a request once more by itself.
    assert len(reports) == 4 or fault == "drop"


def test_an_answer_that_does_not_come_is_asked_for_again(s3, url, listener, monkeypatch):
    monkeypatch.setattr(remote, "READ", 2)
    store = Store(url)
    s3.faults = ["hang"]
    store.write_bytes("sets/a.json", b"1")
    assert any("Read timeout on endpoint URL" in text for text in listener.heard)
    # Such a request has no time limit while its answer is waited for.
    assert s3.asked_first == 0
    assert store.read_bytes("sets/a.json") == b"1"


def test_a_block_is_read_though_answers_fail(s3, store, listener):
    write_block(store)
    s3.faults = [500, "drop"]
    block = DataBlock.at(store, BLOCK)
    s3.faults = [503]
    assert block.images(0, 3)[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert any("503 Service Unavailable" in text for text in listener.heard)


def test_an_answer_that_is_cut_short_is_asked_for_again(s3, store):
    data = bytes(range(256)) * 4000
    store.write_bytes("sets/a", data)
    s3.faults = ["cut"]
    assert store.read_bytes("sets/a") == data


@pytest.mark.parametrize(
    ("fault", "reason"),
    [(503, "503 SlowDown"), (500, "500 InternalError"), ("hang", "Read timeout")],
)
def test_tries_are_bounded(s3, url, monkeypatch, fault, reason):
    monkeypatch.setattr(remote, "READ", 0.2)
    store = Store(url)
    before = len(s3.requests)
    s3.always = fault
    with pytest.raises(InputError, match=rf"cannot write s3://.*: {reason}"):
        store.write_bytes("sets/a.json", b"1")
    assert len(s3.requests) - before == 5
    s3.always = None
    assert not store.exists("sets/a.json")


def test_a_connection_that_always_breaks_is_an_error(s3, store):
    before = len(s3.requests)
    s3.always = "drop"
    with pytest.raises(InputError, match=r"cannot write s3://.*: Connection was closed"):
        store.write_bytes("sets/a.json", b"1")
    # Over a connection that was used before, aiohttp sends a request once more by itself.
    assert 5 <= len(s3.requests) - before <= 10


def test_a_server_that_never_answered_is_not_retried(s3, url, monkeypatch):
    monkeypatch.setattr(remote, "READ", 0.2)
    before = len(s3.requests)
    s3.always = "hang"
    done = inside("ls", store=url)
    assert done.exit_code == 3
    assert f"error: cannot open the store {url}: Read timeout" in done.stderr
    assert "AWS_ENDPOINT_URL" in done.stderr
    assert len(s3.requests) - before == 1


def test_a_silent_server_is_reported_within_a_quarter_of_a_minute():
    config = remote._s3_options("s3://a/b")["config_kwargs"]
    assert config["connect_timeout"] + config["read_timeout"] < 15
    assert config["retries"]["total_max_attempts"] == 1


def test_without_a_sink_messages_are_dropped(s3, url, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    done = inside("ls", store=url)
    assert done.exit_code == 3
    assert f"cannot open the store {url}: Could not connect" in done.stderr


def test_an_unreadable_store(s3, url):
    s3.faults = [403]
    done = inside("ls", store=url)
    assert done.exit_code == 3
    assert f"error: no permission to read the store {url}: AccessDenied" in done.stderr
    assert "AWS_PROFILE" in done.stderr


def test_an_unwritable_store(s3, store):
    s3.faults = [403]
    with pytest.raises(InputError, match=r"cannot write s3://.*: AccessDenied") as caught:
        store.require_writable("sets/a.json")
    assert "check its permissions" in caught.value.hint


def test_no_credentials(s3, url, monkeypatch, tmp_path):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    done = inside("ls", store=url)
    assert done.exit_code == 3
    assert f"error: there are no credentials for the store {url}" in done.stderr


def test_a_mistyped_bucket_is_reported_and_not_created(s3, shared_world):
    done = inside(
        "build-sets",
        "blue",
        "--model",
        shared_world.model.name,
        "--source",
        shared_world.sources["pairs"],
        "--retain-samples",
        30,
        store="s3://storse/a",
    )
    assert done.exit_code == 3
    assert "error: there is no bucket storse" in done.stderr
    assert [each["Name"] for each in s3.client.list_buckets()["Buckets"]] == [BUCKET]


def test_without_the_package(monkeypatch):
    def options(url):
        raise ImportError("S3 needs the package s3fs")

    monkeypatch.setattr(remote, "_s3_options", options)
    done = inside("ls", store="s3://a/b")
    assert done.exit_code == 3
    assert "try: pip install 'slsgu[s3]'" in done.stderr


def test_a_block_counts_once_it_is_complete(s3, store):
    """A process that dies while it uploads leaves all but the last file."""
    write_block(store)
    s3.client.delete_object(Bucket=BUCKET, Key=f"{store.root}/{BLOCK}/zarr.json".partition("/")[2])
    with pytest.raises(MissingError):
        DataBlock.at(store, BLOCK)
    (entry,) = entries(store)
    assert (entry.kind, entry.path) == (Artifact.UNFINISHED, BLOCK)
    (finding,) = check.check(store, repair=True).findings
    assert (finding.reason, finding.removable) == (check.UNDER_WAY, False)
    write_block(store)
    assert DataBlock.at(store, BLOCK).rows == 3


def test_the_rest_of_a_block_can_be_removed(s3, store, monkeypatch):
    store.write_bytes(f"{BLOCK}/images/c/0", b"1")
    monkeypatch.setattr(check, "ABANDONED_SECONDS", -60.0)
    (finding,) = check.check(store, repair=True).findings
    assert finding.removed
    assert not store.exists(BLOCK)


def test_the_metadata_of_a_block_is_written_last(s3, store):
    before = len(s3.requests)
    write_block(store)
    written = [path for method, path in s3.requests[before:] if method == "PUT"]
    assert written[-1].endswith(f"{BLOCK}/zarr.json")
    assert len(written) > 5


def test_the_first_of_two_blocks_stays(store):
    write_block(store)
    first = store._fs.info(store._full(f"{BLOCK}/zarr.json"))
    write_block(store, rows=2)
    assert store._fs.info(store._full(f"{BLOCK}/zarr.json")) == first
    assert DataBlock.at(store, BLOCK).rows == 3


def test_a_damaged_block_is_replaced_whole(s3, store):
    """Nothing of it is left, neither of what the new one does not have."""
    write_block(store)
    root = f"{store.root}/{BLOCK}".partition("/")[2]
    s3.client.put_object(Bucket=BUCKET, Key=f"{root}/zarr.json", Body=b"{")
    s3.client.put_object(Bucket=BUCKET, Key=f"{root}/images/c/7/0/0/0", Body=b"old")
    write_block(store, rows=2)
    assert DataBlock.at(store, BLOCK).rows == 2
    assert not [key for key in s3.objects() if key.endswith("c/7/0/0/0")]


def reads(s3, name):
    return [path for method, path in s3.requests if method == "GET" and path.endswith(name)]


def test_tensors_are_fetched_once(s3, store, tmp_path):
    path = "gradients/once.safetensors"
    store.write_tensors(path, {"x": np.zeros(3), "y": np.ones(2)}, SPEC)
    for name in ("x", "y", "x"):
        store.read_tensors(path, [name])
    assert len(reads(s3, path)) == 1
    assert len(list((tmp_path / "cache").iterdir())) == 1
    store.write_tensors(path, {"x": np.full(3, 7.0)}, SPEC)
    assert store.read_tensors(path)["x"].tolist() == [7.0] * 3
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_the_cache_keeps_what_was_read_last(store, tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE_SIZE, "3K")
    for name in "abc":
        store.write_tensors(f"edits/{name}.safetensors", {"x": np.zeros(100)}, SPEC)
        store.read_tensors(f"edits/{name}.safetensors")
        for copy in (tmp_path / "cache").iterdir():
            os.utime(copy, (copy.stat().st_atime - 100, copy.stat().st_mtime))
    sizes = [path.stat().st_size for path in (tmp_path / "cache").iterdir()]
    assert len(sizes) == 2
    assert sum(sizes) <= 3 * 1024


def test_a_copy_that_was_changed_is_fetched_again(store, tmp_path):
    store.write_tensors("edits/a.safetensors", {"x": np.zeros(100)}, SPEC)
    store.read_tensors("edits/a.safetensors")
    (copy,) = (tmp_path / "cache").iterdir()
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert store.read_tensors("edits/a.safetensors")["x"].tolist() == [0.0] * 100
    (copy,) = (tmp_path / "cache").iterdir()
    assert copy.read_bytes() != bytes(data)


def test_a_cache_that_cannot_be_written_is_skipped(store, monkeypatch):
    def refused(*_, **__):
        raise PermissionError

    store.write_tensors("edits/a.safetensors", {"x": np.zeros(3)}, SPEC)
    monkeypatch.setattr(cache.Path, "mkdir", refused)
    assert store.read_tensors("edits/a.safetensors")["x"].tolist() == [0.0] * 3


def test_other_file_systems_write_to_a_partial_name_first(tmp_path, monkeypatch):
    """On a server of files a reader would else see half of one."""
    monkeypatch.setattr(remote, "OBJECT_STORES", frozenset())
    store = Store(f"memory://{tmp_path.name}")
    seen, put = [], fsspec.filesystem("memory").put_file

    def put_file(built, target, **options):
        seen.append(target.rpartition("/")[2])
        return put(built, target, **options)

    monkeypatch.setattr(store._fs, "put_file", put_file)
    for content in (b"1", b"2"):
        store.write_bytes("sets/a.json", content)
        assert store.read_bytes("sets/a.json") == content
    assert [name.startswith(".partial-") for name in seen] == [True, True]
    assert store.unfinished("sets") == []
