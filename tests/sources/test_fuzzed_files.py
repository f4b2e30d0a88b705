"""Whatever is in a file, a parser of ours ends in a value or an error of ours, and soon."""

import io
import json
import tarfile
from collections import Counter
from contextlib import suppress

import numpy as np
import pyarrow as pa
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from slsgu_cli.checkpoints.layouts import open_weights
from slsgu_cli.errors import NotFiniteError, SlsguError
from slsgu_cli.records.codec import SEAL, decode, encode, parse_json, require_seal, sealed
from slsgu_cli.records.method import EditHeader, GradientPointer, Ranking
from slsgu_cli.records.sets import (
    Collection,
    DataRef,
    InputSpec,
    ModelSpec,
    SetManifest,
    read_names,
)
from slsgu_cli.sources.opening import open_sources
from slsgu_cli.sources.prompts import parse_classes, parse_names, parse_templates
from slsgu_cli.sources.reader import Columns
from slsgu_cli.sources.tar import TarSource

fuzzed = settings(
    max_examples=80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)

# Other bytes at some places, and where the file is cut.
changes = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=12)), max_size=4
)
cuts = st.floats(0, 1)


def damaged(whole: bytes, edits: list[tuple[float, bytes]], cut: float) -> bytes:
    data = bytearray(whole)
    for place, new in edits:
        start = int(place * len(data))
        data[start : start + len(new)] = new
    return bytes(data[: max(1, int(cut * len(data)))] if cut < 0.9 else data)


def shard() -> bytes:
    """Return a tar with a header of every kind."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for number, name in enumerate(["a.jpg", "a.json", "é" * 60 + "b.txt", "c.cls"]):
            member = tarfile.TarInfo(name)
            data = json.dumps({"caption": "a", "label": [number]}).encode()
            member.size, member.mtime = len(data), 1.5
            member.pax_headers = {"comment": "x" * 20}
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


SHARD = shard()


def arrow() -> bytes:
    """Return an Arrow stream of images as structs, captions, and labels that have names."""
    said = {"info": {"features": {"label": {"names": ["a", "b"], "_type": "ClassLabel"}}}}
    images = [{"bytes": b"x" * 50, "path": None}] * 9
    columns = {"image": images, "text": [f"caption {n}" for n in range(9)], "label": [0, 1, 2] * 3}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps(said)})
    file = io.BytesIO()
    with pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    return file.getvalue()


COCO = {
    "images": [{"id": 1, "file_name": "a.png"}],
    "annotations": [{"id": n, "image_id": 1, "caption": "x"} for n in range(4)],
}
TABLES = {
    "t.arrow": arrow(),
    "t.csv": b"path,caption\n" + b'a.png,"one"\n' * 9,
    "t.json": json.dumps(COCO).encode(),
    "t.jsonl": b'{"image": "a.png", "text": "x"}\n' * 9,
    "t.txt": b"a.png 3\n" * 9,
}


@fuzzed
@given(changes, cuts, st.sampled_from(sorted(TABLES)))
def test_tables(tmp_path_factory, edits, cut, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(damaged(TABLES[name], edits, cut))
    path.with_name("a.png").write_bytes(b"1")
    (source,) = open_sources([str(path)], Columns())
    with suppress(SlsguError):
        source.identity()
        rows = list(source.rows(Counter()))
        assert len(list(source.images({row.index: None for row in rows} or {0: None}))) <= 9


@fuzzed
@given(changes, cuts, st.sampled_from(["a.tar", "a.tgz"]))
def test_shards(tmp_path_factory, edits, cut, name):
    path = tmp_path_factory.getbasetemp() / name
    path.write_bytes(damaged(SHARD, edits, cut))
    source = TarSource(str(path), Columns(), {})
    with suppress(SlsguError):
        rows = list(source.rows(Counter()))
        list(source.select(lambda row: True, Counter()))
        list(source.images({row.index: row.extent for row in rows} or {0: None}))


def archive() -> tuple[bytes, bytes]:
    file = io.BytesIO()
    torch.save({"state_dict": {"a.b": torch.ones(3, 2), "c": torch.ones(2).half()}, "n": 1}, file)
    return file.getvalue()


ARCHIVE = archive()
TENSORS = save({"a": np.ones((3, 2), np.float32), "b": np.ones(2, np.float16)}, {"k": "v"})


@fuzzed
@given(changes, cuts, st.sampled_from([ARCHIVE, TENSORS]))
def test_checkpoints(tmp_path_factory, edits, cut, whole):
    path = tmp_path_factory.getbasetemp() / "m.bin"
    path.write_bytes(damaged(whole, edits, cut))
    with suppress(SlsguError):
        file = open_weights(path)
        for name in file.entries:
            file.stored(name)
            sum(chunk.size for chunk in file.chunks(name))


SPEC = ModelSpec("local-dir:m")
REF = DataRef("data/a.zarr", "f", 3, 4, {"why": 1}, ("a",))
INPUT = InputSpec(2, 2, (0.5,), (0.5,), "bicubic", "shortest", 0, "t", 7)
RECORDS = [
    SetManifest("n", "c", ("p",), SPEC, INPUT, REF, REF, {"e": REF}, "e", 0, ("x",), "0", {}),
    GradientPointer("n", SPEC, "m", "f", "r", "fd", "rd", 2, "fp32", "0"),
]
KINDS = [SetManifest, GradientPointer, Ranking, EditHeader, Collection]
leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)


def parsed(data: bytes) -> None:
    """Do with a JSON record what a store does."""
    with suppress(SlsguError, ValueError):
        value = parse_json(data)
        require_seal(value)
        for kind in KINDS:
            with suppress(SlsguError):
                encode(decode(kind, value))


@fuzzed
@given(changes, cuts, st.sampled_from(RECORDS))
def test_records_of_other_bytes(edits, cut, record):
    parsed(damaged(json.dumps(sealed(encode(record))).encode(), edits, cut))


@fuzzed
@given(st.sampled_from(RECORDS), st.data())
def test_records_of_other_values(record, data):
    content = encode(record)
    for key in data.draw(st.lists(st.sampled_from(sorted(content)), max_size=3)):
        content[key] = data.draw(values)
    try:
        whole = sealed(content)
    except NotFiniteError:
        # JSON text of NaN and infinities, which Python reads but slsgu does not write.
        whole = {**content, SEAL: "0" * 64}
    parsed(json.dumps(whole).encode())


@fuzzed
@given(st.sampled_from(["[", '{"a":', "[[1],"]), st.integers(1, 3000))
def test_records_nested_deeply(opening, levels):
    parsed((opening * levels).encode())
    parsed(("[" * levels + "]" * levels).encode())


@fuzzed
@given(st.text(alphabet=st.sampled_from("ab\t{}!#\n\r\x00\u2028\u202eé\ud800 "), max_size=40))
def test_lists_of_names_classes_and_templates(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "names.txt"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for parse in (parse_classes, parse_templates, parse_names):
        with suppress(SlsguError):
            parse(text, "f")
    with suppress(SlsguError):
        read_names(str(path))
