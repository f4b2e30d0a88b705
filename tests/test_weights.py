"""Checkpoint files: parity with torch and safetensors, exact patches, damaged input."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from slsgu_cli import copying
from slsgu_cli.errors import InputError, MissingError, SlsguError
from slsgu_cli.weights import fingerprint, layer_digests, open_weights, patched_copy, read_layer

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
CONTAINERS = ("safetensors", "pt")


def state(dtype: torch.dtype = torch.float32, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def make(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return OrderedDict(
        {
            "positional_embedding": make(7, 4),
            "visual.proj": make(6, 5),
            "transformer.resblocks.0.mlp.c_fc.weight": make(8, 4),
            "logit_scale": make(),
            "empty": make(0, 3),
            "position_ids": torch.arange(9)[None],
        }
    )


def save(weights: dict[str, torch.Tensor], path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(weights, path, {"format": "pt"})
    else:
        torch.save(weights, path)
    return path


def load(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path)


def differing(one: Path, other: Path) -> list[int]:
    a, b = (np.frombuffer(path.read_bytes(), np.uint8) for path in (one, other))
    assert a.size == b.size
    return np.flatnonzero(a != b).tolist()


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_reading_is_exact(tmp_path: Path, container: str, dtype: str) -> None:
    weights = state(DTYPES[dtype])
    file = open_weights(save(weights, tmp_path / f"m.{container}"))
    assert sorted(file.names()) == sorted(weights)
    for name, tensor in weights.items():
        entry = file.entry(name)
        assert entry.shape == tuple(tensor.shape)
        if name == "position_ids":
            assert entry.dtype == "I64"
            np.testing.assert_array_equal(file.stored(name), tensor.numpy())
            with pytest.raises(InputError, match="not floating point"):
                file.read(name)
            continue
        wide = torch.float64 if dtype == "F64" else torch.float32
        got = file.read(name)
        assert entry.dtype == dtype and got.shape == tuple(tensor.shape)
        assert torch.equal(torch.from_numpy(got.copy()), tensor.to(wide))


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("name", ["visual.proj", "logit_scale"])
def test_a_patch_changes_that_tensor_and_nothing_else(
    tmp_path: Path, container: str, dtype: str, name: str
) -> None:
    weights = state(DTYPES[dtype])
    source = save(weights, tmp_path / f"m.{container}")
    target = tmp_path / f"out.{container}"
    values = np.random.default_rng(3).standard_normal(weights[name].shape).astype(np.float32)
    values = np.asarray(values)
    patched_copy(source, target, {name: values})

    after = load(target)
    for other, tensor in weights.items():
        if other == name:
            expected = torch.from_numpy(values.copy()).to(DTYPES[dtype])
            assert torch.equal(after[name], expected) and after[name].dtype == tensor.dtype
        else:
            assert torch.equal(after[other], tensor)
    entry = open_weights(source).entry(name)
    outside = [i for i in differing(source, target) if not 0 <= i - entry.offset < entry.nbytes]
    if container == "safetensors":
        assert outside == []
    else:
        # The record's CRC-32, behind its data and in the central directory.
        assert len(outside) <= 8
        with zipfile.ZipFile(target) as archive:
            assert archive.testzip() is None
    patched_copy(target, tmp_path / f"back.{container}", {name: open_weights(source).stored(name)})
    assert differing(source, tmp_path / f"back.{container}") == []


def test_the_copy_equals_cp_where_nothing_is_patched(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.pt")
    source.chmod(0o444)
    patched_copy(source, tmp_path / "deep" / "er" / "out.pt", {})
    out = tmp_path / "deep" / "er" / "out.pt"
    assert out.read_bytes() == source.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o644 & out.stat().st_mode | 0o444
    assert [path.name for path in out.parent.iterdir()] == ["out.pt"]


def test_parameters_prefixes_and_training_checkpoints(tmp_path: Path) -> None:
    weights = {
        f"module.{name}": torch.nn.Parameter(tensor)
        for name, tensor in state().items()
        if tensor.is_floating_point()
    }
    optimizer = {"state": {0: {"exp_avg": torch.zeros(6, 5)}}, "param_groups": [{"params": [0]}]}
    torch.save(
        {"epoch": 3, "name": "run", "state_dict": weights, "optimizer": optimizer},
        tmp_path / "epoch_3.pt",
    )
    file = open_weights(tmp_path / "epoch_3.pt")
    assert file.resolve_name("visual.proj") == "module.visual.proj"
    patched_copy(
        tmp_path / "epoch_3.pt",
        tmp_path / "out.pt",
        {"module.visual.proj": np.ones((6, 5), np.float32)},
    )
    after = torch.load(tmp_path / "out.pt", weights_only=True)
    assert after["epoch"] == 3
    assert torch.equal(after["state_dict"]["module.visual.proj"], torch.ones(6, 5))
    assert torch.equal(after["optimizer"]["state"][0]["exp_avg"], torch.zeros(6, 5))


def test_a_text_tower_of_its_own_resolves_to_the_older_names(tmp_path: Path) -> None:
    file = open_weights(save(state(), tmp_path / "m.safetensors"))
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    assert file.resolve_name(f"text.{name}") == name
    with pytest.raises(InputError, match=r"no layer visual\.prok; near names: visual\.proj"):
        file.resolve_name("visual.prok")


@pytest.mark.parametrize("which", ["transposed", "slice"])
def test_views_are_read_and_patched_in_place(tmp_path: Path, which: str) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    view = base.t() if which == "transposed" else base[1:3, ::2]
    torch.save({"view": view, "other": torch.ones(2)}, tmp_path / "m.pt")
    file = open_weights(tmp_path / "m.pt")
    np.testing.assert_array_equal(file.read("view"), view.numpy())
    values = -np.arange(view.numel(), dtype=np.float32).reshape(view.shape)
    patched_copy(tmp_path / "m.pt", tmp_path / "out.pt", {"view": values})
    after = torch.load(tmp_path / "out.pt")["view"]
    np.testing.assert_array_equal(after.numpy(), values)
    expected = base.clone()
    (expected.t() if which == "transposed" else expected[1:3, ::2]).copy_(torch.from_numpy(values))
    whole = torch.as_strided(after, (4, 6), (6, 1), 0)
    assert torch.equal(whole, expected)


def test_tensors_in_one_storage_can_change_apart_but_not_where_they_overlap(tmp_path: Path) -> None:
    flat = torch.arange(20.0)
    torch.save(
        {"a": flat[:10], "b": flat[10:], "tied": flat[10:], "wide": torch.ones(1).expand(4)},
        tmp_path / "m.pt",
    )
    patched_copy(tmp_path / "m.pt", tmp_path / "out.pt", {"a": np.zeros(10, np.float32)})
    after = torch.load(tmp_path / "out.pt")
    assert torch.equal(after["a"], torch.zeros(10)) and torch.equal(after["b"], flat[10:])
    with pytest.raises(InputError, match="shares its bytes with tied"):
        patched_copy(tmp_path / "m.pt", tmp_path / "no.pt", {"b": np.zeros(10, np.float32)})
    with pytest.raises(InputError, match="repeats its own elements"):
        patched_copy(tmp_path / "m.pt", tmp_path / "no.pt", {"wide": np.zeros(4, np.float32)})
    held = torch.ones(3)
    torch.save({"state_dict": {"a": held}, "ema": {"shadow": held[:2]}}, tmp_path / "n.pt")
    with pytest.raises(InputError, match="outside the state dict"):
        patched_copy(tmp_path / "n.pt", tmp_path / "no.pt", {"a": np.zeros(3, np.float32)})
    assert not (tmp_path / "no.pt").exists()


def test_archives_without_checksums_stay_without(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        source = save(state(), tmp_path / "m.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    patched_copy(source, tmp_path / "out.pt", {"visual.proj": np.ones((6, 5), np.float32)})
    entry = open_weights(source).entry("visual.proj")
    changed = differing(source, tmp_path / "out.pt")
    assert changed and all(0 <= i - entry.offset < entry.nbytes for i in changed)
    assert torch.equal(torch.load(tmp_path / "out.pt")["visual.proj"], torch.ones(6, 5))


def test_archives_of_other_zip_writers(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.pt")
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(tmp_path / "z.pt", "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info.filename))
    path = tmp_path / "z.pt"
    patched_copy(path, tmp_path / "out.pt", {"visual.proj": np.ones((6, 5), np.float32)})
    with zipfile.ZipFile(tmp_path / "out.pt") as archive:
        assert archive.testzip() is None
    assert torch.equal(torch.load(tmp_path / "out.pt")["visual.proj"], torch.ones(6, 5))


# -- which weights they are


def test_the_fingerprint_ignores_container_precision_of_storage_and_order(tmp_path: Path) -> None:
    half = {name: t.half() if t.is_floating_point() else t for name, t in state().items()}
    full = {name: t.float() if t.is_floating_point() else t for name, t in half.items()}
    files = [
        save(half, tmp_path / "a.safetensors"),
        save(full, tmp_path / "b.safetensors"),
        save(half, tmp_path / "c.pt"),
        save(dict(reversed(full.items())), tmp_path / "d.pt"),
    ]
    training = {"epoch": 1, "state_dict": {f"module.{n}": t for n, t in full.items()}}
    torch.save(training, tmp_path / "e.pt")
    prints = {fingerprint(path) for path in [*files, tmp_path / "e.pt"]}
    assert len(prints) == 1 and len(prints.pop()) == 64


def test_the_fingerprint_tells_values_names_shapes_and_signs_of_zero_apart(tmp_path: Path) -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    variants = [
        base,
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": -torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3)},
    ]
    prints = {
        fingerprint(save(variant, tmp_path / f"{i}.safetensors"))
        for i, variant in enumerate(variants)
    }
    assert len(prints) == len(variants)


def test_layer_digests_meet_where_precision_does() -> None:
    values = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
    full, half = layer_digests(values), layer_digests(values.astype(np.float16))
    assert full["fp16"] == half["fp16"] == half["fp32"] != full["fp32"]
    assert len(set(full.values())) == 3
    assert layer_digests(values.astype(np.float64)) == full


def test_read_layer_keeps_the_files_precision(tmp_path: Path) -> None:
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "f4"}
    for dtype, kind in kinds.items():
        path = save(state(DTYPES[dtype]), tmp_path / f"{dtype}.safetensors")
        assert read_layer(path, "visual.proj").dtype == np.dtype(kind)


# -- damaged and hostile input


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.marker}",))


def test_a_malicious_pickle_does_nothing(tmp_path: Path) -> None:
    marker = tmp_path / "owned"
    torch.save({"state_dict": {"w": torch.ones(3)}, "x": Payload(marker)}, tmp_path / "m.pt")
    file = open_weights(tmp_path / "m.pt")
    np.testing.assert_array_equal(file.read("w"), np.ones(3))
    assert not marker.exists()
    torch.load(tmp_path / "m.pt", weights_only=False)
    assert marker.exists(), "the payload itself must work, or this test shows nothing"


def test_objects_of_other_libraries_are_passed_over(tmp_path: Path) -> None:
    import argparse
    from collections import defaultdict

    torch.save(
        {
            "args": argparse.Namespace(lr=0.1, shape=torch.Size([1]), device=torch.device("cpu")),
            "history": defaultdict(list, {"loss": [np.float64(1.0), np.arange(3)]}),
            "seen": {1, 2},
            "state_dict": {"w": torch.ones(3), "version": 4},
        },
        tmp_path / "m.pt",
    )
    assert open_weights(tmp_path / "m.pt").names() == ["w"]


def legacy(path: Path) -> None:
    torch.save(state(), path, _use_new_zipfile_serialization=False)


def script(path: Path) -> None:
    torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def module(path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), path)


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
        (script, "TorchScript"),
        (module, "no state dict"),
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
            file.splices({"visual.proj": np.ones((6, 5), np.float32)})
        except InputError:
            pass

    check()


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 400))
def test_a_corrupt_pickle_is_an_input_error(noise: bytes, place: int) -> None:
    from slsgu_cli.torch_pickle import read_pickle

    buffer = io.BytesIO()
    torch.save(state(), buffer)
    with zipfile.ZipFile(buffer) as archive:
        data = archive.read("archive/data.pkl")
    with suppress(InputError):
        read_pickle(Path("m.pt"), data[:place] + noise + data[place + len(noise) :])


def header(entries: dict, body: bytes = b"", length: int | None = None) -> bytes:
    content = json.dumps(entries).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + body


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


def test_a_pickle_that_reaches_beyond_its_storage(tmp_path: Path) -> None:
    save({"w": torch.ones(4)}, tmp_path / "m.pt")
    with (
        zipfile.ZipFile(tmp_path / "m.pt") as old,
        zipfile.ZipFile(tmp_path / "bad.pt", "w") as new,
    ):
        for info in old.infolist():
            data = old.read(info.filename)
            new.writestr(info.filename, data[:-4] if info.filename.endswith("/0") else data)
    with pytest.raises(InputError, match="w reaches beyond its bytes"):
        open_weights(tmp_path / "bad.pt")


def test_a_wrong_checksum_is_met_before_anything_is_written(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.pt")
    entry = open_weights(source).entry("visual.proj")
    data = bytearray(source.read_bytes())
    data[entry.offset] ^= 1
    source.write_bytes(data)
    with pytest.raises(InputError, match="checksum"):
        patched_copy(source, tmp_path / "out.pt", {"visual.proj": np.ones((6, 5), np.float32)})
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
            patched_copy(source, out, patches)
    assert not out.exists()


# -- whole or not at all


def test_the_source_is_only_replaced_when_asked(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.safetensors")
    (tmp_path / "link.safetensors").symlink_to(source)
    before = source.read_bytes()
    patch = {"visual.proj": np.ones((6, 5), np.float32)}
    for target in (source, tmp_path / "link.safetensors", tmp_path / "x" / ".." / "m.safetensors"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="the checkpoint itself"):
            patched_copy(source, target, patch)
    assert source.read_bytes() == before
    patched_copy(source, tmp_path / "link.safetensors", patch, in_place=True)
    assert torch.equal(load(source)["visual.proj"], torch.ones(6, 5))
    assert (tmp_path / "link.safetensors").is_symlink()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("stage", ["copy_file", "write_at"])
def test_a_failure_leaves_the_old_target_and_no_partials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, stage: str
) -> None:
    source = save(state(), tmp_path / "m.safetensors")
    target = tmp_path / "out" / "m.safetensors"
    target.parent.mkdir()
    target.write_text("old")

    def fail(path: Path, other: object) -> None:
        if stage == "copy_file":
            Path(str(other)).write_bytes(b"half")
        raise error

    monkeypatch.setattr(f"slsgu_cli.weights.{stage}", fail)
    with pytest.raises((InputError, KeyboardInterrupt)) as caught:
        patched_copy(source, target, {"visual.proj": np.ones((6, 5), np.float32)})
    if isinstance(caught.value, SlsguError):
        assert "No space left" in caught.value.message and caught.value.hint
    assert target.read_text() == "old"
    assert [path.name for path in target.parent.iterdir()] == ["m.safetensors"]


def test_a_limit_of_the_system_is_reported_not_hidden(tmp_path: Path) -> None:
    source = save({"w": torch.zeros(1 << 18)}, tmp_path / "m.safetensors")
    out = tmp_path / "out" / "m.safetensors"
    code = f"""
        import resource, signal
        from pathlib import Path
        from slsgu_cli.errors import InputError
        from slsgu_cli.weights import patched_copy
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            patched_copy(Path({str(source)!r}), Path({str(out)!r}), {{}})
        except InputError as error:
            print(error.message)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert "File too large" in done.stdout
    assert list((tmp_path / "out").iterdir()) == []


def test_the_copy_falls_back_where_the_kernel_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "m"
    source.write_bytes(os.urandom(300_001))
    calls = []

    def once(old: int, new: int, count: int) -> int:
        calls.append(count)
        if len(calls) > 1:
            raise OSError(18, "Invalid cross-device link")
        return os.write(new, os.read(old, 1000))

    monkeypatch.setattr(os, "copy_file_range", once)
    copying.copy_file(source, tmp_path / "out")
    assert len(calls) == 2
    assert (tmp_path / "out").read_bytes() == source.read_bytes()


def test_kill_9_leaves_the_old_target_and_the_next_write_clears_up(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.safetensors")
    target = tmp_path / "out" / "m.safetensors"
    target.parent.mkdir()
    target.write_text("old")
    code = f"""
        import time
        from pathlib import Path
        from slsgu_cli import copying
        with copying.replacing(Path({str(target)!r})) as partial:
            copying.copy_file(Path({str(source)!r}), partial)
            print("half", flush=True)
            time.sleep(60)
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        (partial,) = target.parent.glob(".partial-*")
        ancient = time.time() - 3600
        os.utime(partial, (ancient, ancient))
        patched_copy(source, target, {})
        assert partial.is_dir(), "a living writer's partial folder is not another's to clear"
        target.write_text("old")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert target.read_text() == "old"
    patched_copy(source, target, {})
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_takes_anothers_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(copying, "_exchange", lambda one, other: False)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with copying.replacing(target) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
        assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# -- cost


def test_weights_need_neither_torch_nor_open_clip(tmp_path: Path) -> None:
    for dtype, container in (("F16", "safetensors"), ("BF16", "safetensors"), ("BF16", "pt")):
        save(state(DTYPES[dtype]), tmp_path / f"{dtype}.{container}")
    code = f"""
        import sys
        from pathlib import Path
        import numpy as np
        from slsgu_cli.weights import fingerprint, patched_copy
        patch = {{"visual.proj": np.ones((6, 5), "f4")}}
        for path in sorted(Path({str(tmp_path)!r}).iterdir()):
            fingerprint(path)
            patched_copy(path, path.parent / "out" / path.name, patch)
        print(sorted({{"torch", "open_clip", "safetensors"}} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_memory_stays_flat_on_a_large_checkpoint(tmp_path: Path) -> None:
    size = 4 << 20
    names = [f"w{i}" for i in range(160)] + ["layer"]
    offsets = {
        name: {"dtype": "F32", "shape": [1024, 1024], "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    data = header(offsets)
    path = tmp_path / "large.safetensors"
    with path.open("wb") as file:
        file.write(data)
        file.truncate(len(data) + size * len(names))
    code = f"""
        import re
        from pathlib import Path
        import numpy as np
        from slsgu_cli.weights import fingerprint, patched_copy
        path = Path({str(path)!r})
        patch = {{"layer": np.ones((1024, 1024), "f4")}}
        patched_copy(path, path.with_name("out.safetensors"), patch)
        fingerprint(path)
        # Not getrusage: its peak includes that of the process that forked this one.
        print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150
