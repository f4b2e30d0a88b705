import json
import multiprocessing
import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from places import ROOT, special_files

from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.records.codec import sealed
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.store import Store, require

SPEC = ModelSpec("local-dir:clip")


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "store"))


@pytest.fixture(params=["local", "memory"])
def any_store(request, tmp_path):
    if request.param == "local":
        yield Store(str(tmp_path / "store"))
        return
    store = Store(f"memory://{tmp_path.name}")
    yield store
    store.remove("edits")


def hidden(folder):
    return [path.name for path in Path(folder).rglob(".*")]


def run(code, *arguments, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        **options,
    )


def test_round_trip_of_bytes_records_and_tensors(any_store):
    arrays = {"x": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(3, np.int64)}
    any_store.write_bytes("edits/raw", b"\x00\x01")
    any_store.write_record("edits/a.json", SPEC)
    any_store.write_tensors("edits/a.safetensors", arrays, SPEC)
    assert any_store.read_bytes("edits/raw") == b"\x00\x01"
    assert any_store.read_record("edits/a.json", ModelSpec) == SPEC
    assert any_store.read_header("edits/a.safetensors", ModelSpec) == SPEC
    read = any_store.read_tensors("edits/a.safetensors")
    assert {name: array.tolist() for name, array in read.items()} == {
        "x": [[0, 1, 2], [3, 4, 5]],
        "n": 3,
    }
    assert list(any_store.read_tensors("edits/a.safetensors", ["n"])) == ["n"]
    assert any_store.read_tensors("edits/a.safetensors", []) == {}
    assert any_store.names("edits", ".json") == ["a"]
    assert any_store.names("edits") == ["a.json", "a.safetensors", "raw"]
    assert any_store.unfinished("edits") == []
    assert any_store.names("nowhere") == []


def test_the_next_read_sees_a_rewrite(any_store):
    for number in (1.0, 2.0):
        any_store.write_tensors("edits/a.safetensors", {"x": np.array([number])}, SPEC)
        assert any_store.read_tensors("edits/a.safetensors")["x"].tolist() == [number]


@pytest.mark.parametrize(
    "view",
    [lambda x: x.T, lambda x: x[:, ::2], lambda x: x[::-1], np.asfortranarray],
    ids=["transposed", "strided", "reversed", "fortran"],
)
def test_views_keep_their_values(any_store, view):
    array = view(np.arange(12, dtype=np.float32).reshape(3, 4))
    any_store.write_tensors("edits/a.safetensors", {"x": array}, SPEC)
    np.testing.assert_array_equal(any_store.read_tensors("edits/a.safetensors")["x"], array)


def test_an_exception_while_writing_keeps_the_old_artifact(any_store):
    any_store.write_bytes("edits/a", b"old")
    with pytest.raises(KeyError), any_store.writing("edits/a") as partial:
        Path(partial).write_bytes(b"half")
        raise KeyError
    assert any_store.read_bytes("edits/a") == b"old"
    assert any_store.names("edits") == ["a"]
    assert any_store.unfinished("edits") == []


def test_an_interrupt_while_writing_a_folder_leaves_nothing(store):
    with pytest.raises(KeyboardInterrupt), store.writing("data/a.zarr") as partial:
        Path(partial).mkdir()
        (Path(partial) / "chunk").write_bytes(b"half")
        raise KeyboardInterrupt
    assert list(Path(store.where("data")).iterdir()) == []


def test_a_failing_rename_is_an_input_error_and_leaves_nothing(store, monkeypatch):
    store.write_bytes("edits/a", b"old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(InputError, match=r"cannot write .*edits/a: No space") as caught:
            store.write_bytes("edits/a", b"new")
    assert "--store" in caught.value.hint
    assert store.read_bytes("edits/a") == b"old"
    assert hidden(store.root) == []


def test_a_write_that_made_nothing_is_an_error(store):
    with pytest.raises(InputError, match="cannot write"), store.writing("edits/a"):
        pass
    assert not store.exists("edits/a")


def test_a_full_disk_is_an_input_error_for_tensors_and_bytes(store):
    store.write_bytes("edits/a.json", b"old")
    code = """
        import numpy as np, resource, signal, sys
        from slsgu_cli.errors import InputError
        from slsgu_cli.store.store import Store
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
        store = Store(sys.argv[1])
        for write in (
            lambda: store.write_bytes("edits/a.json", b"0" * 9000),
            lambda: store.write_tensors("edits/b.safetensors", {"x": np.zeros(9000)}, {}),
        ):
            try:
                write()
            except InputError as error:
                print(error)
    """
    done = run(code, store.root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("cannot write") == 2
    assert store.read_bytes("edits/a.json") == b"old"
    assert store.names("edits") == ["a.json"]
    assert hidden(store.root) == []


@pytest.mark.parametrize("kind", ["folder", "tensors"])
def test_kill_in_the_middle_of_a_write_leaves_nothing_that_looks_complete(store, kind):
    code = """
        import numpy as np, os, signal, sys
        from slsgu_cli.store.store import Store
        store = Store(sys.argv[1])
        if sys.argv[2] == "folder":
            with store.writing("data/a.zarr") as partial:
                os.mkdir(partial)
                open(partial + "/chunk", "wb").write(b"half")
                os.kill(os.getpid(), signal.SIGKILL)
        import safetensors.numpy
        def killed(arrays, path, metadata):
            open(path, "wb").write(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        safetensors.numpy.save_file = killed
        store.write_tensors("data/a.zarr", {"x": np.zeros(3)}, {})
    """
    done = run(code, store.root, kind)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not store.exists("data/a.zarr")
    assert store.names("data") == []
    assert len(store.unfinished("data")) == 1
    store.write_bytes("data/a.zarr", b"whole")
    assert store.read_bytes("data/a.zarr") == b"whole"


def _write_again_and_again(root, letter, folder):
    store = Store(root)
    for _ in range(60):
        if folder:
            with store.writing("data/a.zarr") as partial:
                Path(partial).mkdir()
                for number in range(3):
                    (Path(partial) / str(number)).write_text(letter * 1000)
        else:
            store.write_bytes("data/a.json", letter.encode() * 100_000)


@pytest.mark.parametrize("folder", [False, True], ids=["file", "folder"])
def test_two_processes_writing_one_name_leave_one_whole_artifact(store, folder):
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write_again_and_again, args=(store.root, letter, folder))
        for letter in "ab"
    ]
    for writer in writers:
        writer.start()
    seen = set()
    while not folder and any(writer.is_alive() for writer in writers):
        if store.exists("data/a.json"):
            seen.add(store.read_bytes("data/a.json"))
    for writer in writers:
        writer.join(60)
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert seen <= {b"a" * 100_000, b"b" * 100_000}
    assert store.unfinished("data") == []
    if folder:
        files = list(Path(store.where("data/a.zarr")).iterdir())
        assert sorted(file.name for file in files) == ["0", "1", "2"]
        assert len({file.read_text() for file in files}) == 1


def test_a_folder_that_appears_between_look_and_move_is_replaced_not_nested(store, monkeypatch):
    replace = Path.replace
    rivals = iter([b"rival"])

    def late(self, target):
        for rival in rivals:
            Path(target).mkdir()
            (Path(target) / "chunk").write_bytes(rival)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", late)
    with store.writing("data/a.zarr") as partial:
        Path(partial).mkdir()
        (Path(partial) / "chunk").write_bytes(b"ours")
    files = {path.name: path.read_bytes() for path in Path(store.where("data/a.zarr")).iterdir()}
    assert files == {"chunk": b"ours"}
    assert hidden(store.root) == []


def test_tensor_files_are_reproducible_to_the_byte_across_processes(store):
    code = """
        import numpy as np, sys
        from slsgu_cli.store.store import Store
        header = {"b": 1, "a": [1.5, None], "weights": {"y": 1, "x": 2}}
        arrays = {name: np.arange(4.0) for name in ("visual.proj", "a", "b")}
        Store(sys.argv[1]).write_tensors(f"edits/{sys.argv[2]}.safetensors", arrays, header)
    """
    for seed in ("0", "1", "7"):
        done = run(code, store.root, seed, env={**os.environ, "PYTHONHASHSEED": seed})
        assert done.returncode == 0, done.stderr
    contents = {store.read_bytes(f"edits/{seed}.safetensors") for seed in ("0", "1", "7")}
    assert len(contents) == 1


def test_records_and_tensors_follow_the_umask(store):
    old = os.umask(0o027)
    try:
        store.write_bytes("edits/a.json", b"{}")
        store.write_tensors("edits/a.safetensors", {"x": np.zeros(1)}, SPEC)
    finally:
        os.umask(old)
    modes = {
        stat.S_IMODE(Path(store.where(f"edits/{name}")).stat().st_mode)
        for name in store.names("edits")
    }
    assert modes == {0o640}


def test_every_truncation_of_a_tensor_file_is_an_input_error(any_store):
    any_store.write_tensors("edits/a.safetensors", {"x": np.arange(4.0)}, SPEC)
    whole = any_store.read_bytes("edits/a.safetensors")
    for length in (*range(0, 24), len(whole) // 2, len(whole) - 1):
        any_store.write_bytes("edits/a.safetensors", whole[:length])
        with pytest.raises(InputError, match=r"a\.safetensors is damaged") as caught:
            any_store.read_header("edits/a.safetensors", ModelSpec)
        assert "slsgu check" in caught.value.hint
        with pytest.raises(InputError, match="is damaged"):
            any_store.read_tensors("edits/a.safetensors")


def test_bytes_behind_the_last_tensor_are_damage(any_store):
    any_store.write_tensors("edits/a.safetensors", {"x": np.arange(4.0)}, SPEC)
    whole = any_store.read_bytes("edits/a.safetensors")
    any_store.write_bytes("edits/a.safetensors", whole + b"more")
    with pytest.raises(InputError, match=r"a\.safetensors is damaged"):
        any_store.read_header("edits/a.safetensors", ModelSpec)


def test_a_tensor_file_without_our_header_is_foreign(store):
    from safetensors.numpy import save

    store.write_bytes("edits/a.safetensors", save({"x": np.zeros(2)}, {"format": "pt"}))
    with pytest.raises(InputError, match="not written by slsgu"):
        store.read_header("edits/a.safetensors", ModelSpec)
    store.write_bytes("edits/a.safetensors", save({"x": np.zeros(2)}, {"slsgu": "{broken"}))
    with pytest.raises(InputError, match="is damaged"):
        store.read_header("edits/a.safetensors", ModelSpec)


def test_a_record_of_another_version_is_stale_and_says_where(store):
    store.write_bytes("sets/a.json", json.dumps(sealed({"name": "clip"})).encode())
    with pytest.raises(StaleError, match=r"sets/a\.json.*pretrained"):
        store.read_record("sets/a.json", ModelSpec)
    store.write_tensors("edits/a.safetensors", {"x": np.zeros(1)}, {"name": 3, "pretrained": None})
    with pytest.raises(StaleError, match=r"edits/a\.safetensors.*3 is not a str"):
        store.read_header("edits/a.safetensors", ModelSpec)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"nonsense"])
def test_invalid_json_is_an_input_error(store, content):
    store.write_bytes("sets/a.json", content)
    with pytest.raises(InputError, match=r"a\.json is not JSON"):
        store.read_record("sets/a.json", ModelSpec)


def test_a_missing_file_raises_a_missing_error(any_store):
    for read in (
        lambda: any_store.read_bytes("edits/a"),
        lambda: any_store.read_record("edits/a", ModelSpec),
        lambda: any_store.read_header("edits/a", ModelSpec),
        lambda: any_store.read_tensors("edits/a"),
    ):
        with pytest.raises(MissingError, match=r"there is no .*edits/a"):
            read()


def test_a_folder_where_a_file_should_be_is_an_input_error(store):
    Path(store.where("edits/a")).mkdir(parents=True)
    for read in (
        lambda: store.read_bytes("edits/a"),
        lambda: store.read_record("edits/a", ModelSpec),
        lambda: store.read_header("edits/a", ModelSpec),
        lambda: store.read_tensors("edits/a"),
        lambda: store.write_bytes("edits/a", b""),
    ):
        with pytest.raises(InputError, match=r"cannot (read|write) .*edits/a"):
            read()


def test_a_figure_that_is_not_finite_is_refused_before_anything_is_written(store):
    for write in (
        lambda record: store.write_record("edits/a.json", record),
        lambda record: store.write_tensors("edits/a.safetensors", {}, record),
    ):
        with pytest.raises(InputError, match="not finite"):
            write(Accuracy(float("nan"), 0.0, 1))
    assert not store.exists("edits")


def test_reading_a_header_reads_no_tensor(store, monkeypatch):
    store.write_tensors("edits/a.safetensors", {"x": np.zeros(100_000)}, SPEC)
    fetched = []
    cat_file = store._fs.cat_file
    monkeypatch.setattr(
        store._fs, "cat_file", lambda *a, **k: fetched.append(cat_file(*a, **k)) or fetched[-1]
    )
    assert store.read_header("edits/a.safetensors", ModelSpec) == SPEC
    assert sum(map(len, fetched)) < 1000


def test_remove_and_size(any_store):
    any_store.write_bytes("edits/a", b"12345")
    any_store.write_bytes("edits/b/c", b"123")
    assert any_store.size("edits/a") == 5
    assert any_store.size("edits") == 8
    any_store.remove("edits/b")
    any_store.remove("edits/never-there")
    assert any_store.names("edits") == ["a"]
    assert any_store.unfinished("edits") == []


def test_where_returns_a_full_path_or_url(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Store("./mine").where("sets/a.json") == f"{tmp_path}/mine/sets/a.json"
    assert Store("memory://mine").where("sets/a.json").startswith("memory://")


def test_an_odd_folder_name_is_taken_literally(tmp_path):
    store = Store(str(tmp_path / "a*b [1] é"))
    store.write_record("sets/n.json", SPEC)
    assert (tmp_path / "a*b [1] é" / "sets" / "n.json").is_file()
    assert store.names("sets", ".json") == ["n"]


def test_an_unknown_protocol_is_an_input_error():
    with pytest.raises(InputError, match="nosuch"):
        Store("nosuch://bucket/path")


def test_a_file_is_no_store(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file, not a folder"):
        Store(str(tmp_path / "file"))


def test_a_pipe_or_a_socket_is_no_store_and_is_not_replaced_in_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    special, there = special_files(tmp_path)
    for place in special:
        with pytest.raises(InputError, match="is a file, not a folder"):
            Store(str(place))
        with pytest.raises(InputError, match="neither a file nor a folder"):
            Store(str(tmp_path)).write_bytes(place.name, b"")
        with pytest.raises(InputError, match="neither a file nor a folder"):
            Store(str(tmp_path)).remove(place.name)
    assert there()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize("path", ["../a", "data/../../a", "..", "data/..", "a::file:///b", "a\0b"])
def test_a_path_that_leads_out_of_the_store_is_refused(any_store, path):
    for use in (any_store.where, any_store.exists, any_store.read_bytes, any_store.remove):
        with pytest.raises(InputError, match="leads out of the store"):
            use(path)
    assert any_store.where("data/..a/a..").endswith("/data/..a/a..")


def test_require_names_the_command_that_makes_it(store):
    with pytest.raises(MissingError, match="gradient of facebook") as caught:
        require(store, "gradients/facebook.json", what="gradient of facebook", run="slsgu grad")
    assert store.root in caught.value.message
    assert caught.value.hint == "run `slsgu grad`, or name the store with --store or SLSGU_STORE"
    store.write_bytes("gradients/other.json", b"{}")
    with pytest.raises(MissingError, match="gradient of facebook") as caught:
        require(store, "gradients/facebook.json", what="gradient of facebook", run="slsgu grad")
    assert caught.value.hint == "run `slsgu grad`"
    store.write_bytes("gradients/facebook.json", b"{}")
    require(store, "gradients/facebook.json", what="gradient", run="slsgu grad")


def test_a_full_disk_is_reported_for_every_writer(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(InputError, match="No space left") as caught:
        Store(str(tmp_path)).write_tensors("edits/a.safetensors", {}, ModelSpec("m"))
    assert caught.value.hint.startswith("free some space")
