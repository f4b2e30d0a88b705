"""From metadata to images: filter its captions in one pass, download the URLs that are wanted.

Row groups are read on all cores, a batch at a time. Only the column of captions is read,
until something in the group is wanted. So memory does not grow with the metadata, only
with what is found in it.

Downloads are by img2dataset. It prints to stdout, takes over Ctrl-C and ends with code 0
whatever happened, so none of these is trusted: it runs in a session of its own with its
output in a log, and a shard is done when its statistics are there. Images are kept as they
were served.
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
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.machine import cores
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.codec import parse_json
from slsgu_cli.records.sets import CollectRequest, DownloadOptions
from slsgu_cli.sources.captions import ConceptIndex, Prefilter, matcher
from slsgu_cli.sources.opening import TEXT
from slsgu_cli.sources.parquet import open_parquet, text_batches
from slsgu_cli.sources.rows import (
    CAPTION_FIELDS,
    line_for,
    no_column,
    priority,
    tail,
    tokenizable,
    usual_column,
)
from slsgu_cli.sources.tar import ORIGIN_FILE, ORIGIN_ROW
from slsgu_cli.store.store import Store

# Rows to retain come from row groups that hold this many times as many, or from all.
POOL = 1000
EXCLUDED, NO_URL, BEYOND = "excluded", "no URL", "beyond --max-forget"

# Counts by concept and reason.
Refused = Counter[tuple[int, str]]


@dataclass(frozen=True, slots=True)
class RowGroup:
    """One row group of a file, and where its first row lies in the file."""

    path: str
    group: int
    start: int
    rows: int
    schema: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that is wanted: for these concepts, or to be retained by its place in the draw."""

    file: str
    row: int
    url: str
    caption: str
    concepts: tuple[int, ...] = ()
    place: int = 0


@dataclass(slots=True)
class Scan:
    """The rows of metadata that match or are drawn; `refused` counts matches not wanted."""

    seen: int = 0
    hits: list[Hit] = field(default_factory=list)
    retain: list[Hit] = field(default_factory=list)
    refused: Refused = field(default_factory=Counter)
    no_caption: int = 0
    examples: list[str] = field(default_factory=list)

    def add(self, other: "Scan") -> None:
        """Take in the rows of other row groups."""
        self.seen += other.seen
        self.hits += other.hits
        self.retain += other.retain
        self.refused.update(other.refused)
        self.no_caption += other.no_caption
        self.examples += other.examples[: 3 - len(self.examples)]


def scan_metadata(paths: Sequence[str], request: CollectRequest, index: ConceptIndex) -> Scan:
    """Return the rows of metadata that are about the concepts, and rows drawn to retain.

    Raises MissingError and InputError for files that cannot be read or lack a column.
    """
    threads = cores()
    files = prefetch(_groups, paths, threads=threads)
    groups = [group for groups_of_file in files for group in groups_of_file]
    patterns = [pattern for concept in index.concepts for pattern in concept.patterns]
    prefilter = Prefilter(None if request.regex else patterns)
    work = _Work(request, index, prefilter, *_pool(groups, request))
    result = Scan()
    with progress.bar("filtering captions", sum(group.rows for group in groups)) as ticker:
        for scan in prefetch(work.scan, groups, threads=threads):
            result.add(scan)
            ticker.advance(scan.seen)
    result.retain.sort(key=lambda hit: (hit.place, hit.file, hit.row))
    result.hits.sort(key=lambda hit: (hit.concepts[0], hit.file, hit.row))
    return result


@dataclass(frozen=True, slots=True)
class _Work:
    """What every row group is searched for; called from several threads."""

    request: CollectRequest
    index: ConceptIndex
    prefilter: Prefilter
    pool: frozenset[RowGroup]
    limit: int

    def scan(self, group: RowGroup) -> Scan:
        """Search one row group."""
        result, wanted = Scan(), dict[int, Hit]()
        caption, url = _columns(group, self.request)
        start = group.start
        for captions in text_batches(group.path, group.group, caption):
            wanted |= {hit.row: hit for hit in self._hits(group, captions, start, result)}
            start += len(captions)
        start, rows = group.start, sorted(wanted)
        # The column of URLs is read only where something is wanted.
        for urls in text_batches(group.path, group.group, url) if wanted else ():
            stop = start + len(urls)
            for row in rows[bisect_left(rows, start) : bisect_left(rows, stop)]:
                self._keep(wanted[row], urls[row - start].as_py(), result)
            start = stop
        return result

    def _hits(self, group: RowGroup, captions: pa.Array, start: int, result: Scan) -> Iterator[Hit]:
        """Yield the rows of a batch that are wanted, without URLs; count matches that are not."""
        result.seen += len(captions)
        result.no_caption += captions.null_count
        if not result.examples:
            result.examples += [text for text in captions[:3].to_pylist() if text]
        for place in self.prefilter.candidates(captions):
            text = tokenizable(captions[int(place)].as_py() or "")
            about = self.index.about(text)
            concepts = tuple(number for number in about if not self.index.excluded(number, text))
            result.refused.update((number, EXCLUDED) for number in about if number not in concepts)
            if concepts:
                yield Hit(group.path, start + int(place), "", text, concepts)
        if group in self.pool:
            yield from self._drawn(group, captions, start)

    def _drawn(self, group: RowGroup, captions: pa.Array, start: int) -> Iterator[Hit]:
        """Yield the rows of a batch to retain: none that a concept's patterns touch."""
        places = priorities(self.request.seed, group.path, start, len(captions))
        left_out = matcher(self.request.retain_exclude, regex=self.request.regex)
        for offset in np.flatnonzero(places <= np.uint64(self.limit)):
            text = tokenizable(captions[int(offset)].as_py() or "")
            if text and not self.index.touched(text) and not left_out(text):
                yield Hit(group.path, start + int(offset), "", text, (), int(places[offset]))

    def _keep(self, hit: Hit, url: str | None, result: Scan) -> None:
        if url and url.strip():
            (result.hits if hit.concepts else result.retain).append(replace(hit, url=url.strip()))
        else:
            result.refused.update((number, NO_URL) for number in hit.concepts)


def priorities(seed: int, path: str, start: int, count: int) -> npt.NDArray[np.uint64]:
    """Return each row's place in a seeded order: 64 bits from seed, file and row (SplitMix64)."""
    base = priority(seed, tail(path))
    state = np.arange(start + 1, start + 1 + count, dtype=np.uint64)
    state = state * np.uint64(0x9E3779B97F4A7C15) + np.uint64(base)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(state ^ (state >> np.uint64(31)))


def retain_wanted(request: CollectRequest) -> int:
    """Return how many rows to draw, so that enough are left where every other one is dead."""
    return line_for(request.retain_samples) if request.retain_samples else 0


def _pool(groups: Sequence[RowGroup], request: CollectRequest) -> tuple[frozenset[RowGroup], int]:
    """Return the row groups to draw from, and the last place in the order that is drawn."""
    wanted = retain_wanted(request)
    if not wanted:
        return frozenset(), 0
    order = sorted(groups, key=lambda g: priority(request.seed, f"{g.path}\0{g.group}"))
    chosen, rows = list[RowGroup](), 0
    for group in order:
        if rows >= POOL * wanted:
            break
        chosen.append(group)
        rows += group.rows
    # Twice as many as wanted, for those about a concept or without a caption.
    share = min(1.0, 2 * (wanted + 100) / max(rows, 1))
    return frozenset(chosen), min(int(share * 2**64), 2**64 - 1)


def _columns(group: RowGroup, request: CollectRequest) -> tuple[str, str]:
    columns = group.schema
    caption = request.caption_column or usual_column(columns, CAPTION_FIELDS)
    url = usual_column(columns, [request.url_column.lower()])
    if caption is None or caption not in columns:
        name = f"column {caption}" if caption else "caption column"
        raise no_column(group.path, name, columns, "name it with --caption-col")
    if url is None:
        name = f"column {request.url_column}"
        raise no_column(group.path, name, columns, "name it with --url-col")
    return caption, url


def _groups(path: str) -> list[RowGroup]:
    if path.lower().endswith(TEXT):
        read = "json.read_json" if "json" in path.lower() else "csv.read_csv"
        raise InputError(
            f"{path} is a table of text: --metadata takes parquet",
            hint='write it as parquet: python -c "from pyarrow import csv, json, parquet; '
            f"parquet.write_table({read}('{path}'), 'metadata.parquet')\"; "
            "images that are here already are named with --source",
        )
    with open_parquet(path) as file:
        schema, groups, start = tuple(file.schema.names), list[RowGroup](), 0
        for group, rows in enumerate(file.rows):
            groups.append(RowGroup(path, group, start, rows, schema))
            start += rows
        return groups


VARIABLE = "SLSGU_IMG2DATASET"
STATS = "_stats.json"
TRIES = 3
POLL_SECONDS = 0.5
GRACE_SECONDS = 10


def download(store: Store, folder: str, *, urls: str, rows: int, options: DownloadOptions) -> None:
    """Fetch the images of `rows` URLs in a parquet file as tar shards into `folder`.

    Shards that are done are not fetched again. Raises MissingError where img2dataset is
    not to be found, InputError where shards could not be fetched.
    """
    wanted = -(-rows // options.shard_rows)
    command = [*find_command(options.command), *_arguments(store, urls, folder, options)]
    before, done = -1, len(finished(store, folder))
    for _ in range(TRIES):
        if not before < done < wanted:
            break
        before = done
        with progress.bar("downloading", rows) as ticker:
            last_line = _run(store, command, folder, ticker)
        done = len(finished(store, folder))
    if done >= wanted:
        return
    last_words = f"; it said: {last_line}" if last_line else ""
    raise InputError(
        f"img2dataset finished {done} of {wanted} shards in {store.where(folder)}{last_words}",
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


def _log(store: Store, folder: str) -> IO[bytes]:
    """Open the file that img2dataset's output goes to, beside its shards where it can be."""
    if not store.is_local:
        return tempfile.TemporaryFile()
    path = Path(store.where(folder)).with_suffix(".log")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("w+b")


def _advance(store: Store, folder: str, counted: Counter[str], ticker: progress.Ticker) -> None:
    for name in store.names(folder, STATS):
        if name not in counted:
            try:
                count = int(parse_json(store.read_bytes(f"{folder}/{name}{STATS}"))["count"])
            except (ValueError, KeyError, TypeError):  # it is being written
                continue
            counted[name] = count
            ticker.advance(count)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process and all that it started, if it has not ended by itself."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_SECONDS)
