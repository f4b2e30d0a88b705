"""Damaged, hostile and foreign checkpoint files end in a clear message."""

import os
import zipfile
from pathlib import Path

import pytest
import torch
from checkpoints import CONTAINERS, header, save, state

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
    assert open_weights(tmp_path / "training_args.bin").entries == {}
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
        (legacy, "torch 1.6 or later"),
        (module, "Refusing to unpickle other objects"),
        (pair, "no state dict"),
        (foreign_zip, "not one that torch.save wrote"),
        (compressed, "compressed"),
        (text, "neither a safetensors file nor an archive"),
    ],
)
def test_other_formats_are_refused_with_a_hint(tmp_path: Path, make, message: str) -> None:
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


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        header({"a": ENTRY}, b"1234567"),
        header({"a": ENTRY}, b"123456789"),
        header({"a": ENTRY | {"shape": [3]}}, b"12345678"),
        header({"a": ENTRY, "b": ENTRY}, b"12345678"),
        header({"a": ENTRY}, b"12345678", length=2**63),
    ],
)
def test_invalid_headers_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        open_weights(tmp_path / "m.safetensors")
