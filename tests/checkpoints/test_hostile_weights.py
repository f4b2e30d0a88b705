"""Damaged, hostile and foreign checkpoint files end in a clear message."""

import os
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CONTAINERS, header, save, state, write_patched
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slsgu_cli.checkpoints.layouts import open_weights
from slsgu_cli.errors import InputError, MissingError


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.marker}",))


def test_a_malicious_pickle_does_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    torch.save({"state_dict": {"w": torch.ones(3)}, "x": Payload(marker)}, tmp_path / "m.pt")
    with pytest.raises(InputError, match="Refusing to unpickle other objects") as caught:
        open_weights(tmp_path / "m.pt")
    assert "weights_only" not in caught.value.message
    assert not marker.exists()
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert marker.exists(), "the payload itself must work, or this test shows nothing"


def test_a_file_without_tensors_has_no_names_and_is_not_unpickled(tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    torch.save({"lr": 0.1, "x": Payload(marker)}, tmp_path / "training_args.bin")
    assert open_weights(tmp_path / "training_args.bin").names() == []
    assert not marker.exists()


def legacy(path: Path) -> None:
    torch.save(state(), path, _use_new_zipfile_serialization=False)


def module(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


def pair(path: Path) -> None:
    torch.save([torch.ones(2), torch.ones(3)], path)


def foreign_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("notes.txt", "hello")


def compressed(path: Path) -> None:
    torch.save(state(), path.with_suffix(".tmp"))
    with (
        zipfile.ZipFile(path.with_suffix(".tmp")) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info.filename))


def text(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (legacy, "before 1.6"),
        (module, "Refusing to unpickle other objects"),
        (pair, "no state dict"),
        (foreign_zip, "not one that torch.save wrote"),
        (compressed, "compressed"),
        (text, "neither a safetensors file nor a torch archive"),
    ],
)
def test_other_formats_are_named_with_a_way_out(tmp_path: Path, make, message: str) -> None:
    make(tmp_path / "m.pt")
    with pytest.raises(InputError, match=message) as caught:
        open_weights(tmp_path / "m.pt")
    assert str(tmp_path / "m.pt") in caught.value.message


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="there is no"):
        open_weights(tmp_path / "m.pt")
    with pytest.raises(InputError, match="cannot read"):
        open_weights(tmp_path)


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_truncation_is_an_input_error(tmp_path: Path, container: str) -> None:
    whole = save(state(), tmp_path / f"m.{container}").read_bytes()
    cut = tmp_path / f"cut.{container}"
    for length in sorted({*range(0, 400), *range(400, len(whole), 97), len(whole) - 1}):
        cut.write_bytes(whole[:length])
        with pytest.raises(InputError):
            open_weights(cut)


@pytest.mark.parametrize("container", CONTAINERS)
def test_flipped_bytes_never_cause_anything_but_an_input_error(
    tmp_path: Path, container: str
) -> None:
    whole = save(state(), tmp_path / f"m.{container}").read_bytes()
    path = tmp_path / f"bad.{container}"

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(
            st.tuples(st.integers(0, len(whole) - 1), st.integers(0, 255)), min_size=1, max_size=4
        )
    )
    def check(changes: list[tuple[int, int]]) -> None:
        data = bytearray(whole)
        for place, value in changes:
            data[place] = value
        path.write_bytes(data)
        try:
            file = open_weights(path)
            for name in file.names():
                file.stored(name)
            file.prepared({"visual.proj": np.ones((6, 5), np.float32)})
        except InputError:
            pass

    check()


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        header({"a": ENTRY}, b"1234567"),
        header({"a": ENTRY}, b"123456789"),
        header({"a": ENTRY | {"shape": [3]}}, b"12345678"),
        header({"a": ENTRY | {"shape": [-2]}}, b"12345678"),
        header({"a": ENTRY | {"shape": [True, 2]}}, b"12345678"),
        header({"a": ENTRY | {"shape": "2"}}, b"12345678"),
        header({"a": ENTRY | {"data_offsets": [8, 0]}}, b"12345678"),
        header({"a": ENTRY | {"data_offsets": [0]}}, b"12345678"),
        header({"a": ENTRY | {"data_offsets": [4, 12]}}, b"123456789012"),
        header({"a": ENTRY, "b": ENTRY}, b"12345678"),
        header({"a": {"dtype": "F32"}}, b"12345678"),
        header({"a": [1]}, b"12345678"),
        header({"a": ENTRY}, b"12345678", length=2**63),
        header({"a": ENTRY}, b"12345678", length=10),
        struct.pack("<Q", 9) + b"[1, 2, 3]",
        struct.pack("<Q", 4) + b"{\xff\xfe}",
        struct.pack("<Q", 60000) + b'{"a":' * 12000,
    ],
)
def test_headers_that_cannot_be_right(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        open_weights(tmp_path / "m.safetensors")


def test_a_wrong_checksum_is_met_before_anything_is_written(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.pt")
    data = bytearray(source.read_bytes())
    data[data.index(state()["visual.proj"].numpy().tobytes())] ^= 1
    source.write_bytes(data)
    with pytest.raises(InputError, match="checksum"):
        write_patched(source, tmp_path / "out.pt", {"visual.proj": np.ones((6, 5), np.float32)})
    assert not (tmp_path / "out.pt").exists()


def test_patches_that_do_not_fit(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.safetensors")
    out = tmp_path / "out.safetensors"
    for patches in (
        {"visual.proj": np.ones((5, 6), np.float32)},
        {"nothing": np.ones(1, np.float32)},
        {"position_ids": np.ones((1, 9), np.float32)},
    ):
        with pytest.raises(InputError):
            write_patched(source, out, patches)
    assert not out.exists()


def test_a_directory_that_promises_more_than_the_file_holds(tmp_path: Path) -> None:
    path = save({"w": torch.ones(4)}, tmp_path / "m.pt")
    with zipfile.ZipFile(path) as archive:
        position = archive.start_dir
        for info in archive.infolist():
            if info.filename.endswith("data/0"):
                break
            position += 46 + len(info.filename) + len(info.extra) + len(info.comment)
    data = bytearray(path.read_bytes())
    data[position + 20 : position + 28] = struct.pack("<2I", 1 << 20, 1 << 20)
    path.write_bytes(data)
    with pytest.raises(InputError):
        open_weights(path).read("w")


def repickled(path: Path, old: bytes, new: bytes) -> None:
    """Replace bytes in the pickle of an archive, with checksums that are right."""
    with zipfile.ZipFile(path) as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            if name.endswith("data.pkl"):
                assert data.count(old) == 1
                data = data.replace(old, new)
            archive.writestr(name, data)


@pytest.mark.parametrize(
    "shape",
    [
        b"K\x63\x85",  # 99 values where the storage has 5
        b"J\xfb\xff\xff\xff\x85",  # -5 values
    ],
)
def test_a_shape_that_its_storage_cannot_hold_is_refused(tmp_path: Path, shape: bytes) -> None:
    path = tmp_path / "m.pt"
    torch.save({"w": torch.ones(5)}, path)
    repickled(path, b"K\x05\x85", b"K\x05\x85")
    np.testing.assert_array_equal(open_weights(path).read("w"), np.ones(5))
    repickled(path, b"K\x05\x85", shape)
    with pytest.raises(InputError):
        open_weights(path).read("w")


def test_bytes_behind_the_last_tensor_are_refused(tmp_path: Path) -> None:
    path = save(state(), tmp_path / "m.safetensors")
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(InputError):
        open_weights(path)
