import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import FAKE_IMG2DATASET
from processes import interruptible
from tiny_images import encoded

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import (
    CollectRequest,
    Concept,
    Distributor,
    DownloadOptions,
    ModelSpec,
)
from slsgu_cli.sets import collection
from slsgu_cli.sets import download as download_module
from slsgu_cli.sets.download import find_command, reason
from slsgu_cli.store.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture
def metadata(tmp_path):
    """30 URLs, dogs and cats in turn; two of the dogs' are dead."""
    for n in range(30):
        if n != 4:
            (tmp_path / f"{n}.jpg").write_bytes(encoded(n, kind="JPEG"))
    rows = [
        {"URL": f"file://{tmp_path}/{n}.jpg", "TEXT": f"a {('dog', 'cat')[n % 2]} {n}"}
        for n in range(30)
    ]
    rows[8]["URL"] = "http://127.0.0.1:9/8.jpg"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "meta.parquet")
    return str(tmp_path / "meta.parquet")


def ask(metadata, **download):
    options = {"command": FAKE_IMG2DATASET, "shard_rows": 4} | download
    wanted = CollectRequest(
        concepts=(Concept("dog", ("dog",)),),
        metadata=(metadata,),
        download=DownloadOptions(**options),
    )
    # With retain rows from elsewhere, only those of the concept are collected.
    return BuildRequest(
        name="dog", model=ModelSpec("unused"), retain_sources=("x",), collect=wanted
    )


def collect(store, request):
    return collection.collect(store, request, request.collect)


def test_downloads_and_failures_are_counted_by_concept(store, metadata, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    request = ask(metadata, distributor=Distributor.RAY, retries=3, timeout=7)
    record = collect(store, request).record
    dog = record.concepts["dog"]
    assert dog.rows == 15
    assert dog.refused == {"connection failed": 1, "dead link (HTTP 404)": 1}
    assert dog.shards == tuple(f"{n:05}.tar" for n in range(4))
    (options,) = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert options["disable_all_reencoding"] is True
    assert options["incremental_mode"] == "incremental"
    assert (options["distributor"], options["retries"], options["timeout"]) == ("ray", 3, 7)
    assert options["output_folder"].endswith("/parts")


def test_finished_shards_are_not_fetched_again(store, metadata, monkeypatch, tmp_path):
    monkeypatch.setenv("FAKE_LOG", str(tmp_path / "log"))
    monkeypatch.setenv("FAKE_DIES", "2")
    monkeypatch.setattr(download_module, "MOST_RUNS", 1)
    with pytest.raises(InputError, match=r"finished 2 of 4 shards .* killed by something") as told:
        collect(store, ask(metadata))
    assert "run the same command again to resume" in told.value.hint
    assert store.names("collections", ".json") == []
    monkeypatch.delenv("FAKE_DIES")
    first = next(Path(store.root).glob("collections/*/parts/00000.tar"))
    before = first.stat().st_mtime_ns
    assert collect(store, ask(metadata)).record.concepts["dog"].rows == 15
    assert first.stat().st_mtime_ns == before
    assert len((tmp_path / "log").read_text().splitlines()) == 2


def test_a_run_that_stops_early_is_started_again(store, metadata, monkeypatch):
    monkeypatch.setenv("FAKE_DIES", "2")
    assert collect(store, ask(metadata)).record.concepts["dog"].rows == 15


def test_a_run_without_progress_is_an_error(store, metadata, monkeypatch):
    monkeypatch.setenv("FAKE_DIES", "0")
    with pytest.raises(InputError, match="finished 0 of 4 shards"):
        collect(store, ask(metadata))


def test_an_interrupt_ends_the_download(store, metadata, tmp_path):
    script = textwrap.dedent(
        f"""
        from test_img2dataset import Store, ask, collect
        collect(Store({store.root!r}), ask({metadata!r}))
        """
    )
    log = tmp_path / "log"
    environment = os.environ | {
        "FAKE_HANGS": "1",
        "FAKE_LOG": str(log),
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
    }
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        env=environment,
        stderr=subprocess.PIPE,
        preexec_fn=interruptible,
    )
    # By then the download hangs.
    while not log.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert b"KeyboardInterrupt" in process.communicate(timeout=30)[1]
    folder = next(Path(store.root).glob("collections/*"))
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert not any(folder.name in line for line in running.splitlines())


def test_a_missing_command_is_an_error_with_installation_advice(monkeypatch, tmp_path):
    monkeypatch.delenv(download_module.VARIABLE, raising=False)
    assert find_command(FAKE_IMG2DATASET) == FAKE_IMG2DATASET.split()
    monkeypatch.setenv(download_module.VARIABLE, FAKE_IMG2DATASET)
    assert find_command(None) == FAKE_IMG2DATASET.split()
    with pytest.raises(MissingError, match="no command nowhere"):
        find_command("nowhere")
    monkeypatch.delenv(download_module.VARIABLE)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingError, match="not installed") as told:
        find_command(None)
    assert "pip install 'slsgu[download]'" in told.value.hint
    (tmp_path / "img2dataset").touch(mode=0o755)
    assert find_command(None) == [str(tmp_path / "img2dataset")]


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("HTTP Error 404: Not Found", "dead link (HTTP 404)"),
        ("HTTP Error 503: Service Unavailable", "dead link (HTTP 503)"),
        ("<urlopen error timed out>", "timed out"),
        ("The read operation timed out", "timed out"),
        ("<urlopen error [Errno -2] Name or service not known>", "no such host"),
        ("<urlopen error [Errno 111] Connection refused>", "connection failed"),
        ("Use of image disallowed by X-Robots-Tag directive", "disallowed by X-Robots-Tag"),
        ("unknown url type: 'x'", "not a URL"),
        ("odd", "download failed"),
        (None, "download failed"),
    ],
)
def test_failures_are_counted_under_few_reasons(message, words):
    assert reason(message) == words
