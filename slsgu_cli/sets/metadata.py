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
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from slsgu_cli import progress
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.codec import parse_json
from slsgu_cli.records.sets import CollectRequest, DownloadOptions
from slsgu_cli.sources.captions import ConceptIndex, Prefilter, matcher
from slsgu_cli.sources.parquet import OVERSIZED, PAGE_ROOM, cells, open_parquet
from slsgu_cli.sources.rows import (
    CAPTION_FIELDS,
    TEXT_LIMIT,
    line_for,
    no_column,
    priority,
    tail,
    tokenizable,
)
from slsgu_cli.store.files import cores, prefetch
from slsgu_cli.store.store import Store

BATCH = 1 << 16

# Rows to retain come from row groups that hold this many times as many, or from all.
POOL = 1000
EXCLUDED, NO_URL = "excluded", "no URL"

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
    total = sum(group.rows for group in groups)
    pool, limit = _pool(groups, request)
    patterns = [pattern for concept in index.concepts for pattern in concept.patterns]
    prefilter = Prefilter(None if request.regex else patterns)
    work = _Work(request, index, prefilter, pool, limit)
    result = Scan()
    with progress.bar("filtering captions", total) as ticker:
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
    pool: frozenset[tuple[str, int]]
    limit: int

    def scan(self, group: RowGroup) -> Scan:
        """Search one row group."""
        result, wanted = Scan(), dict[int, Hit]()
        caption, url = _columns(group, self.request)
        start = group.start
        for captions in _batches(group, caption):
            self._search(group, captions, start, wanted, result)
            start += len(captions)
        start, rows = group.start, sorted(wanted)
        # The column of URLs is read only where something is wanted.
        for urls in _batches(group, url) if wanted else ():
            stop = start + len(urls)
            for row in rows[bisect_left(rows, start) : bisect_left(rows, stop)]:
                self._keep(wanted[row], urls[row - start].as_py(), result)
            start = stop
        return result

    def _search(
        self, group: RowGroup, captions: pa.Array, start: int, wanted: dict[int, Hit], result: Scan
    ) -> None:
        result.seen += len(captions)
        result.no_caption += captions.null_count
        if not result.examples:
            result.examples += [text for text in captions[:3].to_pylist() if text]
        for place in self.prefilter.candidates(captions):
            text = tokenizable(captions[int(place)].as_py() or "")
            row = start + int(place)
            about = self.index.about(text)
            concepts = tuple(number for number in about if not self.index.excluded(number, text))
            result.refused.update((number, EXCLUDED) for number in about if number not in concepts)
            if concepts:
                wanted[row] = Hit(group.path, row, "", text, concepts)
        if (group.path, group.group) in self.pool:
            self._draw(group, captions, start, wanted)

    def _draw(
        self, group: RowGroup, captions: pa.Array, start: int, wanted: dict[int, Hit]
    ) -> None:
        places = priorities(self.request.seed, group.path, start, len(captions))
        left_out = matcher(self.request.retain_exclude, regex=self.request.regex)
        for offset in np.flatnonzero(places <= np.uint64(self.limit)):
            text = tokenizable(captions[int(offset)].as_py() or "")
            row = start + int(offset)
            if text and row not in wanted and not self.index.touched(text) and not left_out(text):
                wanted[row] = Hit(group.path, row, "", text, (), int(places[offset]))

    def _keep(self, hit: Hit, url: str | None, result: Scan) -> None:
        if not url or not url.strip():
            result.refused.update((number, NO_URL) for number in hit.concepts)
            return
        whole = Hit(hit.file, hit.row, url.strip(), hit.caption, hit.concepts, hit.place)
        (result.hits if hit.concepts else result.retain).append(whole)


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


def _pool(
    groups: Sequence[RowGroup], request: CollectRequest
) -> tuple[frozenset[tuple[str, int]], int]:
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
    return frozenset((g.path, g.group) for g in chosen), min(int(share * 2**64), 2**64 - 1)


def _columns(group: RowGroup, request: CollectRequest) -> tuple[str, str]:
    lower = {name.lower(): name for name in reversed(group.schema)}
    usual = next((lower[name] for name in CAPTION_FIELDS if name in lower), None)
    caption, url = request.caption_column or usual, lower.get(request.url_column.lower())
    columns = list(group.schema)
    if caption is None or caption not in columns:
        name = f"column {caption}" if caption else "caption column"
        raise no_column(group.path, name, columns, "name it with --caption-col")
    if url is None:
        name = f"column {request.url_column}"
        raise no_column(group.path, name, columns, "name it with --url-col")
    return caption, url


# What tables of URLs come as besides parquet.
TEXT_TABLES = (".csv", ".tsv", ".txt", ".json", ".jsonl", ".ndjson")


def _groups(path: str) -> list[RowGroup]:
    if path.lower().endswith(TEXT_TABLES):
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


def _batches(group: RowGroup, column: str) -> Iterator[pa.Array]:
    """Yield a column of a row group as arrays of text."""
    with open_parquet(group.path) as file:
        for batch in file.batches(group.group, [column], BATCH):
            values = batch.column(0)
            size = BATCH
            if pa.types.is_dictionary(values.type):
                values = pa.DictionaryArray.from_arrays(
                    values.indices, _without_long(values.dictionary)
                )
                longest = pc.max(pc.binary_length(values.dictionary)).as_py() or 0
                size = max(1, PAGE_ROOM // max(1, longest))
            for start in range(0, len(values), size):
                yield _text(values.slice(start, size), f"{group.path}: column {column}")


def _without_long(values: pa.Array) -> pa.Array:
    """Return texts, with none in the place of one that is longer than it may be."""
    listed = cells(values, TEXT_LIMIT)
    if OVERSIZED not in listed:
        return values
    return pa.array([None if value is OVERSIZED else value for value in listed], values.type)


def _text(values: pa.Array, what: str) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        return values
    if pa.types.is_binary(values.type) or pa.types.is_large_binary(values.type):
        texts = [v if v is None else v.decode(errors="replace") for v in values.to_pylist()]
        return pa.array(texts, pa.string())
    if pa.types.is_null(values.type):
        return pc.cast(values, pa.string())
    raise InputError(f"{what} holds {values.type}, not text")


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
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            continue
