"""A flipped bit of an artifact is reported as damage, or the content that is read is the same."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
from google_crc32c import value as crc32c
from processes import inside

from slsgu_cli.errors import InputError, SlsguError
from slsgu_cli.records import codec
from slsgu_cli.records.codec import SEAL, encode, require_seal, sealed
from slsgu_cli.records.directions import Direction, DirectionSpec
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import (
    Alignment,
    CovarianceHeader,
    LayerCovariance,
    LayerScore,
    Ranking,
    Tower,
)
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.store import cache, tensor_format
from slsgu_cli.store.blocks import DataBlock, block_writer
from slsgu_cli.store.store import Store

HEADER = CovarianceHeader("model", "data", 9, {"a": LayerCovariance(0, 9.0, 1.25)}, (), "0.1.0")
WHITENED = DirectionSpec.of(Direction.WHITENED, damping=0.1)
RECORD = "rankings/a.json"
TENSORS = "covariances/a.safetensors"
BLOCK = "data/a.zarr"


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


def ranking():
    score = LayerScore(
        "visual.proj", Tower.VISION, (2, 3), 0.125, 0.25, 1.5, 2.5, 3.5, True, WHITENED
    )
    directions = DirectionSpec.of(Direction.GRADIENT), WHITENED
    return Ranking("a", "f", "r", Alignment.ABS, directions, (score,), "0.1.0", "céline")


def write_block(store):
    with block_writer(store, BLOCK, height=4, width=4, rows=70) as writer:
        for number in range(70):
            image = np.full((4, 4, 3), number, np.uint8)
            writer.add(image, key=str(number), caption=f"number {number}", label=number % 2)
        tokens = np.arange(70 * 5, dtype=np.int32).reshape(70, 5)
        writer.finish(tokens, {"class_names": ["blue", "réd"], "templates": ["a {}"]})


def read_block(store):
    block = DataBlock.at(store, BLOCK)
    arrays = (block.images(0, block.rows), block.tokens, block.labels, block.source_digests)
    lists = (block.keys, block.captions, block.origins, block.class_names, block.templates)
    return [array.tolist() for array in arrays], lists, block.attributes["fingerprint"]


def flips(size, most):
    """Return about so many bits of a file, by its byte and the bit there, at equal distances."""
    return [(bit // 8, bit % 8) for bit in range(0, size * 8, max(1, size * 8 // most) | 1)]


def passed(store, path, read, most):
    """Return the flips of a file after which `read` gave anything but damage, or what it was."""
    file, whole = Path(store.where(path)), Path(store.where(path)).read_bytes()
    right, silent, detected = read(store), [], 0
    for place, bit in flips(len(whole), most):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << bit
        file.write_bytes(flipped)
        try:
            if read(store) != right:
                silent.append((place, bit))
        except SlsguError as error:
            assert error.exit_code in (3, 4), error
            detected += 1
    file.write_bytes(whole)
    assert detected
    return silent


def test_every_flipped_bit_of_a_record_is_detected(store):
    store.write_record(RECORD, ranking())
    assert passed(store, RECORD, lambda store: store.read_record(RECORD, Ranking), 700) == []


def test_every_flipped_bit_of_tensors_is_detected(store):
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(3)}
    store.write_tensors(TENSORS, arrays, HEADER)

    def read(store):
        header, read = store.read_header(TENSORS, CovarianceHeader), store.read_tensors(TENSORS)
        return header, {name: (a.dtype, a.tolist()) for name, a in read.items()}

    assert passed(store, TENSORS, read, 700) == []


def test_flipped_bits_of_a_block_are_detected(store):
    write_block(store)
    root = Path(store.where(BLOCK))
    paths = sorted(path for path in root.rglob("*") if path.is_file())
    assert len(paths) == 1 + 7 * 2
    for path in paths:
        most = 16 if path.name == "zarr.json" else 6
        assert passed(store, f"{BLOCK}/{path.relative_to(root)}", read_block, most) == [], path


def test_changed_class_names_are_damage(store):
    write_block(store)
    path = Path(store.where(BLOCK), "zarr.json")
    path.write_text(path.read_text().replace("blue", "bluf"))
    with pytest.raises(InputError, match=r"a\.zarr is damaged: .*digest"):
        DataBlock.at(store, BLOCK)


def test_a_shortened_array_is_damage(store):
    write_block(store)
    path = Path(store.where(BLOCK), "labels", "zarr.json")
    path.write_text(path.read_text().replace("70", "66", 1))
    with pytest.raises(InputError, match=r"a\.zarr is damaged: the layout"):
        DataBlock.at(store, BLOCK)


def test_only_requested_tensors_are_compared(store):
    arrays = {"a": np.zeros(4, np.float32), "b": np.ones(4, np.float32)}
    store.write_tensors(TENSORS, arrays, HEADER)
    file = Path(store.where(TENSORS))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert store.read_tensors(TENSORS, ["a"])["a"].tolist() == [0] * 4
    with pytest.raises(InputError, match=r"/a\.safetensors is damaged: b does not match"):
        store.read_tensors(TENSORS, ["b"])


def test_a_damaged_copy_of_a_remote_file_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv(cache.CACHE, str(tmp_path / "cache"))
    remote = Store(f"memory://{tmp_path.name}")
    remote.write_tensors(TENSORS, {"a": np.arange(4.0)}, HEADER)
    for _ in range(2):
        assert remote.read_tensors(TENSORS)["a"].tolist() == [0, 1, 2, 3]
        (copy,) = (tmp_path / "cache").iterdir()
        data = bytearray(copy.read_bytes())
        data[-1] ^= 1
        copy.write_bytes(data)
    # Whether the file itself is whole does not depend on a copy.
    remote.verify(TENSORS)
    remote.write_bytes(TENSORS, bytes(data))
    for read in (remote.verify, remote.read_tensors):
        with pytest.raises(InputError, match="a does not match its digest"):
            read(TENSORS)


@pytest.mark.parametrize("command", [["ls"], ["check"], ["rank", "blue"]])
def test_a_store_of_another_format_is_refused_with_one_line(world, command, monkeypatch):
    record = world.store.read_record("sets/blue.json", SetManifest)
    monkeypatch.setattr(codec, "FORMAT", 0)
    world.store.write_record("sets/blue.json", record)
    monkeypatch.undo()
    done = inside(*command, store=world.store.root)
    assert done.exit_code == 4
    refusals = [line for line in done.stderr.splitlines() if "format 0" in line]
    assert refusals == [
        "error: another version of slsgu wrote this store, in format 0; this version reads format 1"
    ]


def moved(data, one, other, size):
    """Return bytes of which two stretches have changed places."""
    changed = bytearray(data)
    changed[one : one + size], changed[other : other + size] = (
        data[other : other + size],
        data[one : one + size],
    )
    return changed


def test_a_content_digest_detects_accidents(monkeypatch):
    part, rng = 1 << 12, np.random.default_rng(0)
    monkeypatch.setattr(tensor_format, "CHECKED", part)
    # Two parts, and bytes that fill none.
    data = rng.integers(0, 256, 2 * part + 77, dtype=np.uint8).tobytes()
    changed = [data[:-1], data + b"\0", data[1:] + data[:1], moved(data, 0, part, part)]
    changed += [moved(data, 0, place, 8) for place in (8, part - 8, part + 8)]
    for place in (0, part - 1, part, len(data) - 1):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[place] ^= 1 << bit
            changed.append(flipped)
    for length in (2, 8, 512, part):
        start = int(rng.integers(0, len(data) - length))
        changed.append(data[:start] + bytes(length) + data[start + length :])
    known = {tensor_format.content_digest("x", memoryview(content)) for content in [data, *changed]}
    assert len(known) == 1 + len(changed)
    assert tensor_format.content_digest("y", memoryview(data)) not in known
    assert tensor_format.content_digest("x", memoryview(bytes(data))) in known


def test_a_content_digest_is_as_documented():
    data = np.arange(2 << 20, dtype="<f4")
    parts = [data[: 1 << 20].tobytes(), data[1 << 20 :].tobytes()]
    checksums = b"".join(crc32c(part).to_bytes(4, "little") for part in parts)
    expected = sha256(b"<f4 [2097152] " + checksums).hexdigest()
    said = tensor_format.content_digest("<f4 [2097152] ", memoryview(data.view(np.uint8)))
    assert said == f"crc32c:{expected}"


def test_a_seal_holds_for_any_order_and_spacing(store):
    content = {"b": [1.5, None], "a": "é", "figures": encode(Accuracy(1.0, 2.0, 3))}
    again = json.loads(json.dumps(sealed(content), sort_keys=True, indent=3))
    require_seal(again)
    with pytest.raises(ValueError, match="no digest"):
        require_seal(content)
    assert sealed(again)[SEAL] == sealed(content)[SEAL]
    with pytest.raises(ValueError, match="digest"):
        require_seal({**again, "a": "e"})


def test_a_record_changed_by_hand_is_damaged(store):
    store.write_record(RECORD, ranking())
    text = store.read_bytes(RECORD).decode()
    store.write_bytes(RECORD, text.replace("0.125", "0.126").encode())
    with pytest.raises(InputError, match=r"rankings/a\.json is damaged: .*digest"):
        store.read_record(RECORD, Ranking)
    store.write_record(RECORD, replace(ranking(), name="b"))
    assert store.read_record(RECORD, Ranking).name == "b"
