"""Copies appear whole or not at all, whatever goes wrong."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import load, save, state, write_patched
from edit_headers import edit
from places import special_files

from slsgu_cli.checkpoints.apply import apply_edits
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.errors import InputError
from slsgu_cli.records.options import ApplyOptions
from slsgu_cli.store import atomic, copying


def test_the_source_is_only_replaced_when_asked(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.safetensors")
    (tmp_path / "link.safetensors").symlink_to(source)
    before = source.read_bytes()
    layer = load(source)["visual.proj"].numpy()
    change = edit("visual.proj", np.ones((6, 5), np.float32), layer)
    link = tmp_path / "link.safetensors"
    for out in (source, link, tmp_path / "x" / ".." / "m.safetensors"):
        (tmp_path / "x").mkdir(exist_ok=True)
        with pytest.raises(InputError, match="the model itself"):
            apply_edits([change], read_target(source), out, options=ApplyOptions())
    assert source.read_bytes() == before
    apply_edits([change], read_target(source), link, options=ApplyOptions(overwrite=True))
    assert torch.equal(load(source)["visual.proj"], torch.from_numpy(layer + 1))
    assert link.is_symlink()


def test_a_pipe_or_a_socket_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = save(state(), tmp_path / "m.safetensors")
    layer = load(source)["visual.proj"].numpy()
    change = edit("visual.proj", np.ones((6, 5), np.float32), layer)
    folder = tmp_path / "folder"
    folder.mkdir()
    special, there = special_files(folder)
    for out in special:
        with pytest.raises(InputError, match="neither a file nor a folder"):
            apply_edits([change], read_target(source), out, options=ApplyOptions(overwrite=True))
    assert there()


def test_a_limit_of_the_system_is_reported_not_hidden(tmp_path: Path) -> None:
    source = save({"w": torch.zeros(1 << 18)}, tmp_path / "m.safetensors")
    out = tmp_path / "out" / "m.safetensors"
    code = f"""
        import resource, signal
        from pathlib import Path
        from slsgu_cli.errors import InputError
        from slsgu_cli.records.options import ApplyOptions
        from slsgu_cli.checkpoints.edit_plan import FilePlan
        from slsgu_cli.checkpoints.model_copy import CopyPlan, write_copy
        source, out = Path({str(source)!r}), Path({str(out)!r})
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
        try:
            write_copy(CopyPlan(out, {{"": source}}, {{"": FilePlan()}}), ApplyOptions())
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


def test_kill_9_leaves_the_old_target_and_the_next_write_removes_the_rest(tmp_path: Path) -> None:
    source = save(state(), tmp_path / "m.safetensors")
    target = tmp_path / "out" / "m.safetensors"
    target.parent.mkdir()
    target.write_text("old")
    code = f"""
        import signal
        from pathlib import Path
        from slsgu_cli.store import atomic, copying
        with atomic.replacing(Path({str(target)!r})) as partial:
            copying.copy_file(Path({str(source)!r}), partial)
            print("half", flush=True)
            signal.pause()
    """
    with subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "half\n"
        (partial,) = target.parent.glob(".partial-*")
        write_patched(source, target, {})
        assert partial.is_dir(), "a living writer's partial folder is not another's to clear"
        target.write_text("old")
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert target.read_text() == "old"
    write_patched(source, target, {})
    assert target.read_bytes() == source.read_bytes()
    assert [path.name for path in target.parent.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_replaces_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda one, other: False)
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with atomic.replacing(target) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
        assert [path.name for path in target.iterdir()] == ["old"]
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems step aside first")
def test_two_folders_swap_in_one_step(tmp_path: Path) -> None:
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "held").write_text(name)
    assert atomic._exchange(tmp_path / "one", tmp_path / "other")
    assert (tmp_path / "one" / "held").read_text() == "other"
    assert (tmp_path / "other" / "held").read_text() == "one"
    assert not atomic._exchange(tmp_path / "one", tmp_path / "nothing")
