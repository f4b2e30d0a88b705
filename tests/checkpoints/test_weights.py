"""Checkpoint files: parity with torch and safetensors, exact patches, fingerprints."""

import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import CONTAINERS, DTYPES, differing, header, load, save, state, write_patched

from slsgu_cli.checkpoints.clip_weights import ClipWeights
from slsgu_cli.checkpoints.layouts import open_weights
from slsgu_cli.checkpoints.number_formats import layer_digests, widen
from slsgu_cli.errors import InputError


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_reading_is_exact(tmp_path: Path, container: str, dtype: str) -> None:
    weights = state(DTYPES[dtype])
    file = open_weights(save(weights, tmp_path / f"m.{container}"))
    assert sorted(file.entries) == sorted(weights)
    for name, tensor in weights.items():
        entry = file.entries[name]
        assert entry.shape == tuple(tensor.shape)
        if name == "position_ids":
            assert entry.dtype == "I64"
            np.testing.assert_array_equal(file.stored(name), tensor.numpy())
            continue
        wide = torch.float64 if dtype == "F64" else torch.float32
        got = widen(file.stored(name), dtype)
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
    write_patched(source, target, {name: values})

    after = load(target)
    for other, tensor in weights.items():
        if other == name:
            expected = torch.from_numpy(values.copy()).to(DTYPES[dtype])
            assert torch.equal(after[name], expected) and after[name].dtype == tensor.dtype
        else:
            assert torch.equal(after[other], tensor)
    if container == "safetensors":
        start, end = open_weights(source).spans[name]
        assert all(start <= at < end for at in differing(source, target))
    write_patched(target, tmp_path / f"back.{container}", {name: open_weights(source).stored(name)})
    back = load(tmp_path / f"back.{container}")
    assert all(torch.equal(back[other], tensor) for other, tensor in weights.items())
    if container == "safetensors":
        assert differing(source, tmp_path / f"back.{container}") == []


def test_the_copy_equals_cp_where_nothing_is_patched(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.pt")
    source.chmod(0o444)
    write_patched(source, tmp_path / "deep" / "er" / "out.pt", {})
    out = tmp_path / "deep" / "er" / "out.pt"
    assert out.read_bytes() == source.read_bytes()
    assert out.stat().st_mode & 0o777 == 0o644 & out.stat().st_mode | 0o444
    assert [path.name for path in out.parent.iterdir()] == ["out.pt"]


def test_training_checkpoints_with_prefixes_are_read_and_patched(tmp_path: Path) -> None:
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
    read = ClipWeights.of_file(tmp_path / "epoch_3.pt").read("visual.proj")
    np.testing.assert_array_equal(read, state()["visual.proj"].numpy())
    write_patched(
        tmp_path / "epoch_3.pt",
        tmp_path / "out.pt",
        {"module.visual.proj": np.ones((6, 5), np.float32)},
    )
    after = torch.load(tmp_path / "out.pt", weights_only=True)
    assert after["epoch"] == 3
    assert torch.equal(after["state_dict"]["module.visual.proj"], torch.ones(6, 5))
    assert torch.equal(after["optimizer"]["state"][0]["exp_avg"], torch.zeros(6, 5))


def test_names_of_a_separate_text_tower_resolve_to_older_names(tmp_path: Path) -> None:
    weights = ClipWeights.of_file(save(state(), tmp_path / "m.safetensors"))
    name = "transformer.resblocks.0.mlp.c_fc.weight"
    np.testing.assert_array_equal(weights.read(f"text.{name}"), state()[name].numpy())
    with pytest.raises(InputError, match=r"no layer visual\.prok"):
        weights.read("visual.prok")


@pytest.mark.parametrize("which", ["transposed", "slice"])
def test_views_are_read_and_patched(tmp_path: Path, which: str) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    view = base.t() if which == "transposed" else base[1:3, ::2]
    torch.save({"view": view, "other": torch.ones(2)}, tmp_path / "m.pt")
    file = open_weights(tmp_path / "m.pt")
    np.testing.assert_array_equal(file.stored("view"), view.numpy())
    values = -np.arange(view.numel(), dtype=np.float32).reshape(view.shape)
    write_patched(tmp_path / "m.pt", tmp_path / "out.pt", {"view": values})
    after = torch.load(tmp_path / "out.pt")["view"]
    np.testing.assert_array_equal(after.numpy(), values)


def test_a_tensor_that_shares_its_storage_changes_alone(tmp_path: Path) -> None:
    flat = torch.arange(20.0)
    weights = {"a": flat[:], "tied": flat, "wide": torch.ones(1).expand(4)}
    torch.save({"state_dict": weights, "ema": {"shadow": flat[:2]}}, tmp_path / "m.pt")
    new = {"a": np.ones(20, np.float32), "wide": np.arange(4, dtype=np.float32)}
    write_patched(tmp_path / "m.pt", tmp_path / "out.pt", new)
    after = torch.load(tmp_path / "out.pt")
    assert torch.equal(after["state_dict"]["a"], torch.ones(20))
    assert torch.equal(after["state_dict"]["wide"], torch.arange(4.0))
    assert torch.equal(after["state_dict"]["tied"], flat)
    assert torch.equal(after["ema"]["shadow"], flat[:2])


class Part(torch.nn.Module):
    """A module with a setting beside its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = torch.nn.Linear(3, 2)
        self.register_buffer("vocab_size", torch.tensor(7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.proj(x)


def test_torchscript_is_read_and_patched(tmp_path: Path) -> None:
    module = Part()
    with warnings.catch_warnings(action="ignore"):
        torch.jit.script(module).save(str(tmp_path / "m.pt"))
    source = open_weights(tmp_path / "m.pt")
    assert sorted(source.entries) == ["proj.bias", "proj.weight"]
    weight = module.proj.weight.detach().numpy()
    np.testing.assert_array_equal(source.stored("proj.weight"), weight)
    torch.save({"proj.weight": module.proj.weight, "proj.bias": module.proj.bias}, tmp_path / "s")
    assert (
        ClipWeights.of_file(tmp_path / "m.pt").fingerprint()
        == ClipWeights.of_file(tmp_path / "s").fingerprint()
    )
    write_patched(tmp_path / "m.pt", tmp_path / "new.pt", {"proj.weight": weight + 1})
    with warnings.catch_warnings(action="ignore"):
        changed = torch.jit.load(str(tmp_path / "new.pt"))
    np.testing.assert_array_equal(changed.proj.weight.detach().numpy(), weight + 1)
    assert torch.equal(changed.proj.bias, module.proj.bias)


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
    prints = {ClipWeights.of_file(path).fingerprint() for path in [*files, tmp_path / "e.pt"]}
    assert len(prints) == 1 and len(prints.pop()) == 64


def test_fingerprints_differ_by_values_names_shapes_and_signs_of_zero(tmp_path: Path) -> None:
    base = {"a": torch.zeros(2, 3), "b": torch.ones(1)}
    variants = [
        base,
        {"a": torch.zeros(3, 2), "b": torch.ones(1)},
        {"c": torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": -torch.zeros(2, 3), "b": torch.ones(1)},
        {"a": torch.zeros(2, 3)},
    ]
    prints = {
        ClipWeights.of_file(save(variant, tmp_path / f"{i}.safetensors")).fingerprint()
        for i, variant in enumerate(variants)
    }
    assert len(prints) == len(variants)


def test_digests_of_a_rounded_layer_equal_those_of_the_original() -> None:
    values = np.random.default_rng(0).standard_normal((300, 7)).astype(np.float32)
    full, half = layer_digests(values), layer_digests(values.astype(np.float16))
    assert full["fp16"] == half["fp16"] == half["fp32"] != full["fp32"]
    assert len(set(full.values())) == 3
    assert layer_digests(values.astype(np.float64)) == full


def test_a_layer_is_read_in_the_precision_of_its_file(tmp_path: Path) -> None:
    kinds = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "f4"}
    for dtype, kind in kinds.items():
        path = save(state(DTYPES[dtype]), tmp_path / f"{dtype}.safetensors")
        assert ClipWeights.of_file(path).layer("visual.proj").dtype == np.dtype(kind)


def test_safetensors_need_neither_torch_nor_open_clip(tmp_path: Path) -> None:
    for dtype in ("F16", "BF16"):
        save(state(DTYPES[dtype]), tmp_path / f"{dtype}.safetensors")
    code = f"""
        import sys
        from pathlib import Path
        import numpy as np
        from slsgu_cli.records.options import ApplyOptions
        from slsgu_cli.checkpoints.edit_plan import FilePlan
        from slsgu_cli.checkpoints.model_copy import CopyPlan, write_copy
        from slsgu_cli.checkpoints.clip_weights import ClipWeights
        from slsgu_cli.checkpoints.layouts import open_weights
        for path in sorted(Path({str(tmp_path)!r}).iterdir()):
            ClipWeights.of_file(path).fingerprint()
            kind = open_weights(path).stored("visual.proj").dtype
            plan = FilePlan({{"visual.proj": np.ones((6, 5), kind)}})
            out = path.parent / "out" / path.name
            write_copy(CopyPlan(out, {{"": path}}, {{"": plan}}), ApplyOptions())
        print(sorted({{"torch", "open_clip"}} & set(sys.modules)))
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
        from slsgu_cli.records.options import ApplyOptions
        from slsgu_cli.checkpoints.edit_plan import FilePlan
        from slsgu_cli.checkpoints.model_copy import CopyPlan, write_copy
        from slsgu_cli.checkpoints.clip_weights import ClipWeights
        path = Path({str(path)!r})
        plan = FilePlan({{"layer": np.ones((1024, 1024), "f4")}})
        out = path.with_name("o.safetensors")
        write_copy(CopyPlan(out, {{"": path}}, {{"": plan}}), ApplyOptions())
        ClipWeights.of_file(path).fingerprint()
        # Not getrusage: its peak includes that of the process that forked this one.
        print(int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) // 1024)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 150
