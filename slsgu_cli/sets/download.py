"""Run img2dataset in a process of its own, and read what it leaves behind.

It prints to stdout, takes over Ctrl-C and ends with code 0 whatever happened, so none of
these is trusted: it runs in a session of its own with its output in a log, and a shard is
done when its statistics are there. Images are kept as they were served.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from slsgu_cli import progress
from slsgu_cli.clip.inputs import cores
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.sets import DownloadOptions
from slsgu_cli.store.store import Store

VARIABLE = "SLSGU_IMG2DATASET"
STATS = "_stats.json"
TRIES = 3
POLL_SECONDS = 0.5
GRACE_SECONDS = 10


@dataclass(frozen=True, slots=True)
class UrlList:
    """A parquet file of `rows` URLs and captions, with columns to hand on to every sample."""

    path: str
    rows: int
    columns: tuple[str, ...]


def download(store: Store, urls: UrlList, folder: str, *, options: DownloadOptions) -> list[str]:
    """Fetch the images of a URL list as tar shards into `folder`; return the shards' names.

    Shards that are done are not fetched again. Raises MissingError where img2dataset is
    not to be found, InputError where shards could not be fetched.
    """
    wanted = -(-urls.rows // options.shard_rows)
    command = [*find_command(options.command), *_arguments(store, urls, folder, options)]
    for _ in range(TRIES):
        done = finished(store, folder)
        if len(done) >= wanted:
            return done
        with progress.bar("downloading", urls.rows) as ticker:
            tail = _run(store, command, folder, ticker)
        if len(finished(store, folder)) == len(done):
            break
    done = finished(store, folder)
    if len(done) >= wanted:
        return done
    last_words = f"; it said: {tail}" if tail else ""
    raise InputError(
        f"img2dataset finished {len(done)} of {wanted} shards in {store.where(folder)}{last_words}",
        hint="run the same command again: it goes on where it stopped",
    )


def find_command(named: str | None) -> list[str]:
    """Return how to call img2dataset: as named, by environment, or as it is installed."""
    spelled = named or os.environ.get(VARIABLE)
    if spelled:
        command = shlex.split(spelled)
        if not shutil.which(command[0]):
            raise MissingError(f"there is no command {command[0]}", hint="correct --img2dataset")
        return command
    beside = Path(sys.executable).with_name("img2dataset")
    installed = str(beside) if beside.exists() else shutil.which("img2dataset")
    if installed:
        return [installed]
    if find_spec("img2dataset"):
        return [sys.executable, "-m", "img2dataset.main"]
    raise MissingError(
        "downloading needs img2dataset, which is not installed",
        hint="pip install 'slsgu[download]', or install img2dataset into an environment of its "
        f"own and name its command with --img2dataset or {VARIABLE}",
    )


def finished(store: Store, folder: str) -> list[str]:
    """Return the tar shards of `folder` whose statistics are there."""
    return [f"{name}.tar" for name in store.names(folder, STATS)]


def reason(message: str | None) -> str:
    """Return what one failure is counted under."""
    text = (message or "").lower()
    known = {
        "http error": f"dead link (HTTP {''.join(filter(str.isdigit, text))[:3]})",
        "timed out": "timed out",
        "name or service": "no such host",
        "no address": "no such host",
        "name resolution": "no such host",
        "x-robots-tag": "disallowed by X-Robots-Tag",
        "certificate": "bad certificate",
        "connection": "connection failed",
        "incompleteread": "connection failed",
        "unknown url type": "not a URL",
    }
    return next((words for mark, words in known.items() if mark in text), "download failed")


def _arguments(store: Store, urls: UrlList, folder: str, options: DownloadOptions) -> list[str]:
    settings: Mapping[str, Any] = {
        "url_list": urls.path,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": list(urls.columns),
        "output_folder": store.where(folder),
        "output_format": "webdataset",
        # The bytes as they were served: what is odd or broken has its fate here, not there.
        "disable_all_reencoding": True,
        "extract_exif": False,
        "compute_hash": "sha256",
        "number_sample_per_shard": options.shard_rows,
        "processes_count": options.processes or cores(),
        "thread_count": options.threads,
        "timeout": options.timeout,
        "retries": options.retries,
        "distributor": str(options.distributor),
        "incremental_mode": "incremental",
        "enable_wandb": False,
    }
    # Its command line reads values as Python does: a quoted text stays a text.
    return [f"--{name}={value!r}" for name, value in settings.items()]


def _run(store: Store, command: list[str], folder: str, ticker: progress.Ticker) -> str:
    """Run the command to its end while its shards are counted; return its last line."""
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONUNBUFFERED": "1"}
    counted: Counter[str] = Counter()
    with _log(store, folder) as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                _advance(store, folder, counted, ticker)
        finally:
            _end(process)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


@contextmanager
def _log(store: Store, folder: str) -> Iterator[IO[bytes]]:
    """Yield the file that img2dataset's output goes to, beside its shards where it can be."""
    if not store.is_local:
        with tempfile.TemporaryFile() as file:
            yield file
        return
    path = Path(store.where(folder)).with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w+b") as file:
        yield file


def _advance(store: Store, folder: str, counted: Counter[str], ticker: progress.Ticker) -> None:
    for name in store.names(folder, STATS):
        if name not in counted:
            try:
                count = json.loads(store.read_bytes(f"{folder}/{name}{STATS}"))["count"]
            except ValueError:  # it is being written
                continue
            counted[name] = count
            ticker.advance(count)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all that it started, if it has not ended by itself."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
