"""Downloading images with img2dataset.

It prints to stdout, handles Ctrl-C itself and always ends with exit code 0. It therefore runs
in a session of its own with its output in a log, and a shard counts as finished when its
statistics exist. Images are stored as they were served.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.machine import cores
from slsgu_cli.records.sets import DownloadOptions
from slsgu_cli.sources.tar import ORIGIN_FILE, ORIGIN_ROW
from slsgu_cli.store.store import Store

VARIABLE = "SLSGU_IMG2DATASET"
STATS = "_stats.json"
# img2dataset may stop early. It is started again as long as it makes progress.
MOST_RUNS = 3
POLL_SECONDS = 0.5
GRACE_SECONDS = 10


def download(store: Store, folder: str, *, urls: str, rows: int, options: DownloadOptions) -> None:
    """Download the images of `rows` URLs in a parquet file as tar shards into `folder`.

    Finished shards are not downloaded again. Raises MissingError if img2dataset is not
    installed, InputError if shards could not be downloaded.
    """
    wanted = -(-rows // options.shard_rows)
    command = [*find_command(options.command), *_arguments(store, urls, folder, options)]
    last_line = ""
    before, done = -1, len(finished(store, folder))
    for _ in range(MOST_RUNS):
        if not before < done < wanted:
            break
        before = done
        with progress.bar("downloading shards", wanted - done) as ticker:
            last_line = _run(store, command, folder, ticker)
        done = len(finished(store, folder))
    if done < wanted:
        output = f"; its last line of output: {last_line}" if last_line else ""
        raise InputError(
            f"img2dataset finished {done} of {wanted} shards in {store.where(folder)}{output}",
            hint="run the same command again to resume",
        )


def find_command(named: str | None) -> list[str]:
    """Return the command of img2dataset: as given, from the environment, or as installed."""
    given = named or os.environ.get(VARIABLE)
    if given:
        command = shlex.split(given)
        if not shutil.which(command[0]):
            raise MissingError(f"there is no command {command[0]}", hint="correct --img2dataset")
        return command
    neighbour = Path(sys.executable).with_name("img2dataset")
    installed = str(neighbour) if neighbour.exists() else shutil.which("img2dataset")
    if installed:
        return [installed]
    raise MissingError(
        "downloading needs img2dataset, which is not installed",
        hint="pip install 'slsgu[download]', or install img2dataset into a separate "
        f"environment and name its command with --img2dataset or {VARIABLE}",
    )


def finished(store: Store, folder: str) -> list[str]:
    """Return the tar shards of `folder` whose statistics exist, which are written last."""
    return [f"{name}.tar" for name in store.names(folder, STATS)]


def reason(message: str | None) -> str:
    """Return the reason of one failed download, from img2dataset's message."""
    text = (message or "").lower()
    known = {
        "http error": f"dead link (HTTP {''.join(filter(str.isdigit, text))[:3]})",
        "timed out": "timed out",
        "name or service|no address|name resolution": "no such host",
        "x-robots-tag": "disallowed by X-Robots-Tag",
        "certificate": "bad certificate",
        "connection|incompleteread": "connection failed",
        "unknown url type": "not a URL",
    }
    reasons = (words for marks, words in known.items() if re.search(marks, text))
    return next(reasons, "download failed")


def _arguments(store: Store, urls: str, folder: str, options: DownloadOptions) -> list[str]:
    settings: Mapping[str, Any] = {
        "url_list": urls,
        "input_format": "parquet",
        "url_col": "url",
        "caption_col": "caption",
        "save_additional_columns": ["role", ORIGIN_FILE, ORIGIN_ROW],
        "output_folder": store.where(folder),
        "output_format": "webdataset",
        # The bytes as they were served: decoding and its failures are handled here.
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
    # Its command line evaluates values as Python, so that strings need quotes.
    return [f"--{name}={value!r}" for name, value in settings.items()]


def _run(store: Store, command: list[str], folder: str, ticker: progress.Ticker) -> str:
    """Run the command and show its finished shards; return the last line of its output."""
    environment = os.environ | {"NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONUNBUFFERED": "1"}
    shown = len(finished(store, folder))
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
                done = len(finished(store, folder))
                ticker.advance(done - shown)
                shown = done
        finally:
            _end(process)
        log.seek(0)
        lines = log.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def _log(store: Store, folder: str) -> IO[bytes]:
    """Open a file for img2dataset's output, next to its shards if the store is local."""
    if not store.is_local:
        return tempfile.TemporaryFile()
    path = Path(store.where(folder)).with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w+b")


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and its children, if it has not ended by itself."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
