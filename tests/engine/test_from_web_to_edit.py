"""From metadata to an edit over HTTP, with the real img2dataset and a web that misbehaves."""

import io
import json
import tarfile
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from places import DEMO

from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.errors import MissingError
from slsgu_cli.records.options import (
    BuildRequest,
    MetadataSource,
    PassOptions,
    RankOptions,
    SearchOptions,
)
from slsgu_cli.records.sets import DownloadOptions
from slsgu_cli.sets.build import build_sets
from slsgu_cli.sets.download import find_command
from slsgu_cli.sets.requests import with_collection
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

ROWS, FORGET, RETAIN = 200, 20, 32
LAYER = "visual.proj"


def fate(number):
    """Return what the server does with an image: three of twenty are dead."""
    fates = ("missing", "hang up", "html", "slow", "moved", "moved", "mislabelled")
    return fates[number % 20] if number % 20 < len(fates) else "served"


DEAD = ("missing", "hang up", "html")


class Web(BaseHTTPRequestHandler):
    images: tuple[bytes, ...] = ()

    def do_GET(self):
        kind, _, number = self.path.strip("/").partition("/")
        number = int(number)
        what = fate(number) if kind == "icon" else "served"
        if what == "hang up":
            self.close_connection = True
            return
        if what == "slow":
            time.sleep(0.2)
        if what == "moved":
            self._answer(302, "text/plain", b"", Location=f"/moved/{number}")
        elif what == "missing":
            self._answer(404, "text/html", b"<html>gone</html>")
        elif what == "html":
            self._answer(200, "text/html", b"<html>log in to see this image</html>")
        else:
            label = "text/html" if what == "mislabelled" else "image/png"
            self._answer(200, label, self.images[number])

    def _answer(self, code, kind, body, **headers):
        self.send_response(code)
        for name, value in {"Content-Type": kind, "Content-Length": len(body), **headers}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def command():
    try:
        return " ".join(find_command(None))
    except MissingError as error:
        pytest.skip(f"{error.message}: {error.hint}")


@pytest.fixture(scope="module")
def icons():
    """Facebook's icons and others, in turn."""
    rows = pq.read_table(DEMO / "train.parquet").to_pylist()
    about = [row for row in rows if "facebook" in row["caption"].lower()][:FORGET]
    others = [row for row in rows if "facebook" not in row["caption"].lower()]
    mixed = others[: ROWS - FORGET]
    for place, row in enumerate(about):
        mixed.insert(place * 9, row)
    return mixed


@pytest.fixture(scope="module")
def web(icons):
    handler = type("Icons", (Web,), {"images": tuple(row["image"] for row in icons)})
    # All downloads knock at once: a queue of the usual five would turn some away.
    kind = type("Server", (ThreadingHTTPServer,), {"request_queue_size": 512})
    server = kind(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def write_local(folder, urls, icons):
    """Write the images that the server gives as a tar, as from a disk."""
    folder.mkdir()
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for place, row in enumerate(pq.read_table(urls).to_pylist()):
            number = row["origin_row"]
            if fate(number) in DEAD:
                continue
            fields = {name: row[name] for name in ("caption", "role", "origin_file", "origin_row")}
            for suffix, data in (
                ("png", icons[number]["image"]),
                ("json", json.dumps(fields).encode()),
            ):
                member = tarfile.TarInfo(f"{place:06}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return str(folder / "00000.tar")


def edit_of(store, name):
    compute_gradients(store, name, model=None, options=PassOptions())
    rank(store, name, options=RankOptions())
    search(store, name, options=SearchOptions(layers=(LAYER,), steps=3))
    return store.read_bytes(Artifact.EDIT.path(name))


@pytest.mark.slow
def test_the_edit_is_that_of_the_same_images_on_disk(command, icons, web, demo_model, tmp_path):
    metadata = tmp_path / "meta.parquet"
    rows = [{"URL": f"{web}/icon/{n}", "TEXT": row["caption"]} for n, row in enumerate(icons)]
    pq.write_table(pa.Table.from_pylist(rows), metadata, row_group_size=32)
    common = {
        "name": "facebook",
        "concept": "facebook",
        "model": demo_model,
        "retain_samples": RETAIN,
        "evals": {"brands": f"{DEMO / 'heldout.parquet'}?concept=facebook&concept=github"},
        "label_column": "concept",
    }
    request = with_collection(
        BuildRequest(sources=(), **common),
        (),
        MetadataSource(
            metadata=(str(metadata),),
            download=DownloadOptions(
                command=command, processes=1, retries=0, timeout=60, shard_rows=100
            ),
        ),
    )
    store = Store(str(tmp_path / "web"))
    manifest = build_sets(store, request)
    about = [n for n, row in enumerate(icons) if "facebook" in row["caption"].lower()]
    fates = Counter(fate(n) for n in about)
    had = {(icons[n]["image"], icons[n]["caption"]) for n in about if fate(n) not in DEAD}
    assert manifest.forget.rows == len(had) > FORGET // 2
    refused = manifest.forget.refused
    assert refused.get("dead link (HTTP 404)", 0) == fates["missing"]
    assert refused.get("not an image", 0) == fates["html"]
    assert refused.get("connection failed", 0) == fates["hang up"]

    (urls,) = Path(store.root).glob("collections/*/urls.parquet")
    local = write_local(tmp_path / "local", urls, icons)
    disk = Store(str(tmp_path / "disk"))
    same = build_sets(
        disk,
        BuildRequest(
            sources=(f"{local}?role=forget",), retain_sources=(f"{local}?role=retain",), **common
        ),
    )
    assert manifest.forget.fingerprint == same.forget.fingerprint
    assert manifest.retain.fingerprint == same.retain.fingerprint
    assert edit_of(store, "facebook") == edit_of(disk, "facebook")
