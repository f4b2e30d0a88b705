"""Applying edits: exact values, exact undo, the right weights only, whole or not at all."""

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import CONTAINERS, DTYPES, content, load, save, state
from edit_headers import MODEL, edit

from slsgu_cli.checkpoints.apply import apply_edits
from slsgu_cli.checkpoints.clip_weights import ClipWeights
from slsgu_cli.checkpoints.configurations import OPEN_CLIP
from slsgu_cli.checkpoints.edit_plan import require_distinct
from slsgu_cli.checkpoints.edits import Edit, write_edit
from slsgu_cli.checkpoints.layouts import open_weights
from slsgu_cli.checkpoints.model_copy import AppliedResult
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip.model_folder import why_not_loaded
from slsgu_cli.errors import InputError, MissingError, StaleError, UsageError
from slsgu_cli.records.options import ApplyOptions
from slsgu_cli.store.store import Store

LAYER = "visual.proj"
OTHER = "transformer.resblocks.0.mlp.c_fc.weight"


def delta(shape: tuple[int, ...] = (6, 5), seed: int = 5) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def checkpoint(folder: Path, container: str = "safetensors", dtype: str = "F32") -> Path:
    return save(state(DTYPES[dtype]), folder / f"m.{container}")


def edit_of(path: Path, layer: str = LAYER, **options: Any) -> Edit:
    before = ClipWeights.of_file(path).layer(layer)
    return edit(layer, delta(before.shape, options.pop("seed", 5)), before, **options)


def run(edits: list[Edit], path: Path, out: Path, **options: Any) -> AppliedResult:
    target = read_target(path.parent if (path.parent / OPEN_CLIP).exists() else path)
    return apply_edits(
        edits,
        target,
        out,
        options=ApplyOptions(**options),
        check=lambda folder: why_not_loaded(folder, None),
    )


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_applied_and_reverted_is_the_original_file(
    tmp_path: Path, container: str, dtype: str
) -> None:
    path = checkpoint(tmp_path, container, dtype)
    store = Store(str(tmp_path / "store"))
    made = edit_of(path)
    write_edit(store, made)
    out, back = tmp_path / f"out.{container}", tmp_path / f"back.{container}"
    result = run([made], path, out)
    before, after = load(path), load(out)
    wide = before[LAYER].double() + torch.from_numpy(made.delta()).double()
    assert torch.equal(after[LAYER], wide.to(DTYPES[dtype]))
    assert not torch.equal(after[LAYER], before[LAYER])
    assert all(torch.equal(after[name], before[name]) for name in before if name != LAYER)
    (file,) = result.files
    (change,) = file.changes
    assert (file.path, file.nbytes) == (str(out), out.stat().st_size)
    moved = (after[LAYER].double() - before[LAYER].double()).norm() / before[LAYER].double().norm()
    assert change.share == pytest.approx(float(moved)) and change.dtype == dtype
    run([made], out, back, revert=True)
    assert content(back) == content(path)


def test_for_one_edit_the_sum_is_what_fp32_addition_gives(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    made = edit_of(path)
    run([made], path, tmp_path / "out.safetensors")
    expected = load(path)[LAYER] + torch.from_numpy(made.delta())
    assert torch.equal(load(tmp_path / "out.safetensors")[LAYER], expected)


def test_edits_of_one_layer_sum_in_any_order_and_revert_together(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, dtype="BF16")
    edits = [edit_of(path, name=f"c{i}", seed=i).scaled(0.3 + i) for i in range(3)]
    edits.append(edit_of(path, OTHER, name="text"))
    run(edits, path, tmp_path / "a.safetensors")
    result = run(edits[::-1], path, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert [change.edits for change in result.files[0].changes] == [("text",), ("c0", "c1", "c2")]
    total = load(path)[LAYER].double()
    for one in edits[:3]:
        total = total + one.factor * torch.from_numpy(one.delta()).double()
    np.testing.assert_allclose(
        load(tmp_path / "a.safetensors")[LAYER].double(), total, rtol=2**-8, atol=0
    )
    with pytest.raises(StaleError, match="not what these edits made of it"):
        run(edits[:2], tmp_path / "a.safetensors", tmp_path / "no.safetensors", revert=True)
    run(edits, tmp_path / "a.safetensors", tmp_path / "back.safetensors", revert=True)
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()


def test_edits_of_two_layers_apply_one_after_the_other(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    one, two = edit_of(path, name="one"), edit_of(path, OTHER, name="two")
    run([one], path, tmp_path / "1.safetensors")
    run([two], tmp_path / "1.safetensors", tmp_path / "12.safetensors")
    run([two, one], path, tmp_path / "21.safetensors")
    assert (tmp_path / "12.safetensors").read_bytes() == (tmp_path / "21.safetensors").read_bytes()


def test_a_scaled_edit_reverts_only_at_its_scale(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    made = edit_of(path)
    out = tmp_path / "out.safetensors"
    run([made.scaled(0.5)], path, out)
    with pytest.raises(StaleError, match="not what these edits made"):
        run([made], out, tmp_path / "back.safetensors", revert=True)
    run([made.restepped(made.header.step / 2)], out, tmp_path / "back.safetensors", revert=True)
    assert (tmp_path / "back.safetensors").read_bytes() == path.read_bytes()


# -- which weights


@pytest.mark.parametrize("made_at", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_the_same_weights_are_recognised_in_another_precision_and_container(
    tmp_path: Path, made_at: str, container: str
) -> None:
    exact = state(DTYPES[made_at])
    original = save(exact, tmp_path / "original.safetensors")
    made = edit_of(original)
    for dtype, kind in DTYPES.items():
        copy = {n: t.to(kind) if t.is_floating_point() else t for n, t in exact.items()}
        path = save(copy, tmp_path / f"{dtype}.{container}")
        out, back = tmp_path / f"{dtype}-out.{container}", tmp_path / f"{dtype}-back.{container}"
        run([made], path, out)
        run([made], out, back, revert=True)
        assert content(back) == content(path)


def test_an_edit_made_on_a_rounded_copy_applies_to_the_original(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    half = {n: t.half() if t.is_floating_point() else t for n, t in state().items()}
    made = edit_of(save(half, tmp_path / "half.pt"))
    run([made], path, tmp_path / "out.safetensors")
    expected = load(path)[LAYER] + torch.from_numpy(made.delta())
    assert torch.equal(load(tmp_path / "out.safetensors")[LAYER], expected)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_other_weights_are_refused_unless_forced(tmp_path: Path, dtype: str) -> None:
    made = edit_of(checkpoint(tmp_path))
    other = state(DTYPES[dtype])
    # The smallest change this precision can hold.
    bits = other[LAYER].view(torch.int32 if dtype == "F32" else torch.int16)
    bits[0, 0] += 1
    path = save(other, tmp_path / "other.safetensors")
    out = tmp_path / "out.safetensors"
    with pytest.raises(StaleError, match=f"{LAYER} in .*facebook was made for") as caught:
        run([made], path, out)
    assert "--force" in str(caught.value.hint) and str(MODEL) in caught.value.message
    assert not out.exists()
    run([made], path, out, force=True)
    expected = other[LAYER].double() + torch.from_numpy(made.delta()).double()
    assert torch.equal(load(out)[LAYER], expected.to(DTYPES[dtype]))


def test_an_edit_is_not_applied_twice(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    made = edit_of(path)
    run([made], path, tmp_path / "out.safetensors")
    with pytest.raises(StaleError, match="already holds the edit facebook") as caught:
        run([made], tmp_path / "out.safetensors", tmp_path / "twice.safetensors")
    assert "--revert" in str(caught.value.hint)
    with pytest.raises(StaleError, match="not edited"):
        run([made], path, tmp_path / "no.safetensors", revert=True)
    with pytest.raises(UsageError, match="named twice"):
        require_distinct([made, made])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.safetensors", "out.safetensors"]


def test_missing_layers_and_layers_of_another_shape_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    before = ClipWeights.of_file(path).layer(LAYER)
    with pytest.raises(InputError, match=r"no layer visual\.projj"):
        run([edit("visual.projj", delta(), before)], path, tmp_path / "o.safetensors")
    with pytest.raises(StaleError, match=r"of shape \[5, 6\].*has \[6, 5\]"):
        made = edit(LAYER, delta((5, 6)), before.T.copy())
        run([made], path, tmp_path / "o.safetensors", force=True)
    with pytest.raises(InputError, match="not floating point"):
        ids = np.zeros((1, 9), np.float32)
        run([edit("position_ids", ids, ids)], path, tmp_path / "o.safetensors", force=True)
    with pytest.raises(MissingError):
        run([edit_of(path)], tmp_path / "nothing.safetensors", tmp_path / "o.safetensors")
    assert not (tmp_path / "o.safetensors").exists()


def test_values_that_fp16_cannot_hold_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, dtype="F16")
    with pytest.raises(InputError, match="cannot") as caught:
        run([edit_of(path).scaled(1e7)], path, tmp_path / "o.safetensors")
    assert "--scale" in str(caught.value.hint)
    assert not (tmp_path / "o.safetensors").exists()


# -- folders


def clip_config() -> dict[str, Any]:
    return {
        "embed_dim": 16,
        "vision_cfg": {
            "image_size": 32,
            "layers": 2,
            "width": 32,
            "patch_size": 16,
            "head_width": 16,
        },
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 2},
    }


def tiny_model(seed: int = 0) -> torch.nn.Module:
    from open_clip.model import CLIP

    torch.manual_seed(seed)
    return CLIP(**clip_config()).eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A local-dir as open_clip writes it for the hub: both containers, a tokenizer."""
    made = tmp_path / "clip"
    (made / "tokenizer").mkdir(parents=True)
    (made / OPEN_CLIP).write_text(json.dumps({"model_cfg": clip_config(), "preprocess_cfg": {}}))
    (made / "tokenizer" / "vocab.txt").write_text("a b c")
    weights = tiny_model().state_dict()
    save(weights, made / "open_clip_model.safetensors")
    save({n: t.half() for n, t in weights.items()}, made / "open_clip_pytorch_model.bin")
    torch.save({"lr": 0.1}, made / "training_args.bin")
    return made


def main_weights(folder: Path) -> Path:
    return folder / "open_clip_model.safetensors"


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_folder_is_copied_with_every_weight_file_edited(folder: Path, tmp_path: Path) -> None:
    import open_clip

    original = tree(folder)
    made = edit_of(main_weights(folder))
    out = tmp_path / "out"
    result = run([made], main_weights(folder), out)
    assert result.model == f"local-dir:{out}"
    assert tree(folder) == original
    names = ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    assert [Path(file.path).name for file in result.files] == names
    edited = tree(out)
    assert edited.keys() == original.keys()
    assert sorted(name for name in edited if edited[name] != original[name]) == names

    expected = tiny_model()
    with torch.no_grad():
        expected.visual.proj += torch.from_numpy(made.delta())
    loaded = open_clip.create_model(f"local-dir:{out}").state_dict()
    assert loaded.keys() == expected.state_dict().keys()
    assert all(torch.equal(loaded[n], t) for n, t in expected.state_dict().items())
    main_weights(out).unlink()
    stale = open_clip.create_model(f"local-dir:{out}").state_dict()[LAYER]
    half = tiny_model().visual.proj.half().double() + torch.from_numpy(made.delta()).double()
    assert torch.equal(stale, half.half().float())


def test_a_file_next_to_the_weights_must_match_too(folder: Path, tmp_path: Path) -> None:
    made = edit_of(main_weights(folder))
    save(tiny_model(seed=1).state_dict(), folder / "open_clip_pytorch_model.bin")
    with pytest.raises(StaleError, match=r"open_clip_pytorch_model\.bin"):
        run([made], main_weights(folder), tmp_path / "out")
    save({"visual.proj": torch.ones(2)}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(StaleError, match="shape"):
        run([made], main_weights(folder), tmp_path / "out", force=True)
    assert not (tmp_path / "out").exists()


def test_weights_of_another_naming_are_copied_with_a_warning(
    folder: Path, tmp_path: Path, listener: Any
) -> None:
    made = edit_of(main_weights(folder))
    save({"vision_model.post_layernorm.weight": torch.ones(2)}, folder / "model.safetensors")
    result = run([made], main_weights(folder), tmp_path / "out")
    assert any("without the edit" in line for line in listener.heard)
    assert len(result.files) == 2


def test_towers_of_other_families_are_edited_too(tmp_path: Path, listener: Any) -> None:
    layers = {
        "visual.trunk.blocks.0.attn.qkv.weight": torch.randn(6, 2),
        "text.transformer.encoder.layer.0.output.dense.weight": torch.randn(4, 4),
        "text.proj.weight": torch.randn(4, 3),
    }
    folder = tmp_path / "siglip"
    folder.mkdir()
    (folder / OPEN_CLIP).write_text("{}")
    path = save(layers, folder / "open_clip_model.safetensors")
    save({f"module.{n}": t for n, t in layers.items()}, folder / "epoch_1.pt")
    edits = [edit_of(path, layer, name=layer) for layer in [*layers, f"{next(iter(layers))}.k"]]
    run([edits[3], *edits[1:3]], path, tmp_path / "out")
    after = load(tmp_path / "out" / path.name)
    changed = {name: after[name] - layers[name] for name in layers}
    for name, one in zip(list(layers)[1:], edits[1:3], strict=True):
        np.testing.assert_allclose(changed[name], one.delta(), rtol=1e-5, atol=1e-6)
    thirds = changed["visual.trunk.blocks.0.attn.qkv.weight"].chunk(3)
    assert [bool(third.count_nonzero()) for third in thirds] == [False, True, False]
    training = load(tmp_path / "out" / "epoch_1.pt")
    assert all(torch.equal(training[f"module.{name}"], value) for name, value in after.items())
    (told,) = listener.heard
    assert "open_clip may not load" in told  # Its configuration is a stand-in.


def test_apply_warns_of_a_file_without_one_of_two_layers(
    folder: Path, tmp_path: Path, listener: Any
) -> None:
    path = folder / "open_clip_pytorch_model.bin"
    save({name: t for name, t in load(path).items() if name != LAYER}, path)
    edits = [edit_of(main_weights(folder)), edit_of(main_weights(folder), OTHER, name="text")]
    result = run(edits, main_weights(folder), tmp_path / "out")
    changes = [[change.layer for change in file.changes] for file in result.files]
    assert changes == [[OTHER, LAYER], [OTHER]]
    assert f"{path} has no {LAYER} and was copied without the edit" in listener.heard[0]


def test_links_become_files(folder: Path, tmp_path: Path) -> None:
    blob = tmp_path / "blob"
    main_weights(folder).rename(blob)
    main_weights(folder).symlink_to(blob)
    run([edit_of(main_weights(folder))], main_weights(folder), tmp_path / "out")
    assert not main_weights(tmp_path / "out").is_symlink()


def test_a_dry_run_checks_and_writes_nothing(folder: Path, tmp_path: Path) -> None:
    made = edit_of(main_weights(folder))
    dry = run([made], main_weights(folder), tmp_path / "out", dry_run=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip"]
    wet = run([made], main_weights(folder), tmp_path / "out")
    assert (dry.files, dry.model) == (wet.files, wet.model) and dry.dry_run and not wet.dry_run
    with pytest.raises(StaleError):
        run([made], main_weights(tmp_path / "out"), tmp_path / "x", dry_run=True)


def test_a_single_file_becomes_a_folder_that_open_clip_loads(tmp_path: Path) -> None:
    import open_clip

    for container, name in (
        ("safetensors", "open_clip_model.safetensors"),
        ("pt", "open_clip_pytorch_model.bin"),
    ):
        path = save(tiny_model().state_dict(), tmp_path / f"epoch_1.{container}")
        made = edit_of(path)
        out = tmp_path / f"out-{container}"
        config = {"model_cfg": clip_config(), "preprocess_cfg": {"mean": (0, 0, 0)}}
        target = read_target(path)
        result = apply_edits(
            [made],
            target,
            out,
            options=ApplyOptions(),
            config=config,
            check=lambda folder: why_not_loaded(folder, None),
        )
        assert sorted(entry.name for entry in out.iterdir()) == sorted([name, OPEN_CLIP])
        loaded = open_clip.create_model(str(result.model))
        expected = tiny_model().visual.proj + torch.from_numpy(made.delta())
        assert torch.equal(loaded.visual.proj, expected)


def test_a_single_file_keeps_its_format(tmp_path: Path) -> None:
    path = checkpoint(tmp_path)
    made = edit_of(path)
    with pytest.raises(UsageError, match="another format") as caught:
        run([made], path, tmp_path / "out.pt")
    assert "out.safetensors" in str(caught.value.hint)
    assert run([made], path, tmp_path / "plain").files[0].path.endswith("plain/m.safetensors")
    assert run([made], path, tmp_path / "v1.5").files[0].path.endswith("v1.5/m.safetensors")


# -- what stands at the destination


def test_overwrite_replaces_the_destination(folder: Path, tmp_path: Path) -> None:
    made, out = edit_of(main_weights(folder)), tmp_path / "out"
    run([made], main_weights(folder), out)
    first = tree(out)
    with pytest.raises(InputError, match="exists already"):
        run([made.scaled(2)], main_weights(folder), out)
    assert tree(out) == first
    run([made.scaled(2)], main_weights(folder), out, overwrite=True)
    assert tree(out) != first and tree(out).keys() == first.keys()
    (out / "results.json").write_text("{}")
    with pytest.raises(InputError, match=r"would be lost: results\.json"):
        run([made], main_weights(folder), out, overwrite=True)
    assert (out / "results.json").exists()


def test_a_model_is_edited_and_reverted_in_place(folder: Path) -> None:
    original = tree(folder)
    made = edit_of(main_weights(folder))
    with pytest.raises(InputError, match="the model itself"):
        run([made], main_weights(folder), folder)
    run([made], main_weights(folder), folder, overwrite=True)
    assert tree(folder) != original
    run([made], main_weights(folder), folder, overwrite=True, revert=True)
    assert tree(folder) == original


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("where", ["clip/edited", ".", "clip/tokenizer", "a.safetensors", "note"])
def test_apply_refuses_destinations_inside_or_around_the_model(
    folder: Path, tmp_path: Path, where: str, overwrite: bool
) -> None:
    (tmp_path / "note").write_text("keep me")
    original = tree(tmp_path)
    with pytest.raises((InputError, UsageError)):
        run(
            [edit_of(main_weights(folder))],
            main_weights(folder),
            tmp_path / where,
            overwrite=overwrite,
        )
    assert tree(tmp_path) == original


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_all_files_unchanged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, there: bool
) -> None:
    made, out = edit_of(main_weights(folder)), tmp_path / "out"
    if there:
        run([made], main_weights(folder), out)
    original = tree(tmp_path)
    from slsgu_cli.store import copying

    copy: Callable[[Path, Path], None] = copying.copy_file
    copied: list[Path] = []

    def fail_at_the_third(source: Path, target: Path) -> None:
        if len(copied) == 3:
            target.write_bytes(b"half")
            raise error
        copied.append(source)
        copy(source, target)

    monkeypatch.setattr("slsgu_cli.checkpoints.model_copy.copy_file", fail_at_the_third)
    monkeypatch.setattr("slsgu_cli.checkpoints.safetensors_file.copy_file", fail_at_the_third)
    with pytest.raises((InputError, KeyboardInterrupt)):
        run([made.scaled(2)], main_weights(folder), out, overwrite=there)
    assert tree(tmp_path) == original
    assert sorted(p.name for p in tmp_path.iterdir()) == (["clip", "out"] if there else ["clip"])


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_applying_a_stored_edit_imports_neither_torch_nor_open_clip(
    tmp_path: Path, dtype: str
) -> None:
    path = checkpoint(tmp_path, "safetensors", dtype)
    store = Store(str(tmp_path / "store"))
    write_edit(store, edit_of(path))
    code = f"""
        import sys
        from pathlib import Path
        from slsgu_cli.checkpoints.apply import apply_edits
        from slsgu_cli.records.options import ApplyOptions
        from slsgu_cli.checkpoints.edits import load_edit
        from slsgu_cli.checkpoints.targets import read_target
        from slsgu_cli.store.store import Store
        target = read_target(Path({str(path)!r}))
        edit = load_edit(Store({store.root!r}), "facebook")
        out = Path({str(tmp_path / "out.safetensors")!r})
        print(apply_edits([edit], target, out, options=ApplyOptions()).files[0].nbytes)
        print(sorted({{"torch", "open_clip", "zarr", "pyarrow"}} & set(sys.modules)))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[:2] == [str(path.stat().st_size), "[]"]
    assert (
        ClipWeights.of_file(tmp_path / "out.safetensors").fingerprint()
        != ClipWeights.of_file(path).fingerprint()
    )
    assert open_weights(tmp_path / "out.safetensors").entries[LAYER].dtype == dtype
