import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from slsgu_cli.records.codec import encode, sealed
from slsgu_cli.records.directions import FALLBACK, Direction, DirectionSpec
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import (
    Alignment,
    CovarianceHeader,
    Criterion,
    EditHeader,
    GradientHeader,
    GradientPointer,
    LayerCovariance,
    LayerScore,
    ParameterNorm,
    Precision,
    Ranking,
    Tower,
    Trial,
    Trials,
)
from slsgu_cli.records.sets import DataRef, InputSpec, ModelSpec, SetManifest
from slsgu_cli.store.artifacts import REWHITENED, Artifact, resume
from slsgu_cli.store.catalog import Standing, entries
from slsgu_cli.store.store import Store

MODEL = ModelSpec("local-dir:clip")
INPUT = InputSpec(64, 64, (0.5,), (0.5,), "bicubic", "shortest", 0, "t", 77)
BEFORE, AFTER = Accuracy(95.0, 100.0, 20), Accuracy(0.0, 10.0, 20)


def write_block(store, name, fingerprint):
    path = f"data/{name}.zarr"
    attributes = sealed({"rows": 10, "fingerprint": fingerprint, "complete": True})
    with store.writing(path) as partial:
        Path(partial, "images").mkdir(parents=True)
        Path(partial, "zarr.json").write_text(json.dumps({"attributes": attributes}))
        Path(partial, "images", "chunk").write_bytes(bytes(1000))
    return DataRef(path, fingerprint, 10, 12, {"too small": 2}, ("icons.parquet",))


def write_gradient(store, digest, data):
    weights = {"visual.proj": ParameterNorm((2, 2), 1.0)}
    header = GradientHeader(
        "cosine", "+grad", 0.7, 1, 16, 10, "fp32", "model", data, weights, "0.1.0"
    )
    store.write_tensors(f"gradients/{digest}.safetensors", {"visual.proj": np.ones((2, 2))}, header)


@pytest.fixture
def store(tmp_path):
    """A store with everything that one concept takes, all of it up to date."""
    store = Store(str(tmp_path / "store"))
    forget, retain, brands = (write_block(store, f"d{n}", f"print{n}") for n in (1, 2, 3))
    write_gradient(store, "g1", "print1")
    write_gradient(store, "g2", "print2")
    store.write_record(
        "sets/facebook.json",
        SetManifest(
            name="facebook",
            concept="facebook",
            patterns=("facebook",),
            model=MODEL,
            input=INPUT,
            forget=forget,
            retain=retain,
            evals={"brands": brands},
            forget_eval="brands",
            seed=0,
            command=("slsgu", "build-sets", "facebook"),
            version="0.1.0",
        ),
    )
    pointer = GradientPointer(
        "facebook", MODEL, "model", "g1", "g2", "print1", "print2", 16, "fp32", "0.1.0"
    )
    store.write_record("gradients/facebook.json", pointer)
    score = LayerScore("visual.proj", Tower.VISION, (2, 2), 0.1, 0.01, 1.0, 1.0, 10.0, True)
    scores = (score, replace(score, layer="text_projection", tower=Tower.TEXT, front=False))
    ranking = Ranking("facebook", "g1", "g2", Alignment.ABS, (FALLBACK,), scores, "0.1.0")
    store.write_record("rankings/facebook.json", ranking)
    trial = Trial("visual.proj", Tower.VISION, FALLBACK, 3.0, 0.25, AFTER, 0.0, {"brands": AFTER})
    store.write_record(
        "trials/facebook.json",
        Trials(
            "facebook",
            "g1",
            (Direction.GRADIENT,),
            None,
            "model",
            {"brands": "print3", "(forget)": "brands:facebook"},
            Precision.FP32,
            Criterion.FA1,
            None,
            BEFORE,
            {"brands": Accuracy(61.0, 80.0, 10)},
            (trial,),
            "0.1.0",
        ),
    )
    write_edit(store, "facebook", gradient="g1")
    store.write_bytes("plots/facebook-front-vision.png", b"png")
    return store


def write_edit(store, name, *, gradient, measured=True, retain=None):
    header = EditHeader(
        name=name,
        concept=name,
        layer="visual.proj",
        tower=Tower.VISION,
        step=3.0,
        share=0.25,
        model=MODEL,
        model_fingerprint="model",
        digests={"fp32": "a"},
        gradient=gradient,
        direction=DirectionSpec.of(Direction.WHITENED if retain else Direction.GRADIENT),
        retain_data=retain,
        criterion=Criterion.FA1 if measured else None,
        margin=None,
        forgotten=True if measured else None,
        baseline_forget=BEFORE if measured else None,
        baseline_utility={"brands": Accuracy(61.0, 80.0, 10)} if measured else None,
        forget=AFTER if measured else None,
        utility={"brands": Accuracy(60.5, 80.0, 10)} if measured else None,
        joint=None,
        version="0.1.0",
    )
    store.write_tensors(f"edits/{name}.safetensors", {"delta": np.ones((2, 2))}, header)


def change(store, path, **fields):
    value = json.loads(store.read_bytes(path))
    store.write_record(path, value | fields)


def not_ok(store):
    return {
        entry.path: (entry.state, entry.reason)
        for entry in entries(store)
        if entry.state is not Standing.OK
    }


def unreferenced(store):
    return [entry for entry in entries(store) if entry.state is Standing.UNREFERENCED]


def by_path(store):
    return {entry.path: entry for entry in entries(store)}


def test_an_empty_store_lists_nothing(tmp_path):
    assert entries(Store(str(tmp_path / "none"))) == []
    assert entries(Store(f"memory://{tmp_path.name}")) == []


def test_everything_is_listed_once_in_order_with_its_size(store):
    found = entries(store)
    assert [(entry.kind, entry.name) for entry in found] == [
        ("set", "facebook"),
        ("data", "d1"),
        ("data", "d2"),
        ("data", "d3"),
        ("pointer", "facebook"),
        ("gradient", "g1"),
        ("gradient", "g2"),
        ("ranking", "facebook"),
        ("trials", "facebook"),
        ("edit", "facebook"),
        ("plot", "facebook-front-vision"),
    ]
    assert not_ok(store) == {}
    for entry in found:
        path = Path(store.where(entry.path))
        files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
        assert entry.size == sum(file.stat().st_size for file in files) > 0


def test_entries_list_their_inputs(store):
    made = {entry.path: entry.made_from for entry in entries(store)}
    assert made["sets/facebook.json"] == {"model": "local-dir:clip", "concept": "facebook"}
    assert made["data/d3.zarr"] == {"rows": "10", "for": "facebook (brands)"}
    assert made["rankings/facebook.json"] == {"alignment": "abs", "directions": "gradient"}
    assert made["edits/facebook.safetensors"] == {
        "model": "local-dir:clip",
        "concept": "facebook",
        "layer": "visual.proj",
        "direction": "gradient",
        "step": "3",
    }
    summary = by_path(store)["gradients/g1.safetensors"].summary()
    assert summary == "loss cosine, rows 10, batch size 16, precision fp32"


@pytest.mark.parametrize(
    ("path", "fields", "stale"),
    [
        (
            "gradients/facebook.json",
            {"forget_data": "older"},
            ["gradients/facebook.json", "rankings/facebook.json", "trials/facebook.json"],
        ),
        ("rankings/facebook.json", {"retain": "older"}, ["rankings/facebook.json"]),
        ("trials/facebook.json", {"forget": "older"}, ["trials/facebook.json"]),
        ("trials/facebook.json", {"model_fingerprint": "older"}, ["trials/facebook.json"]),
        ("trials/facebook.json", {"evals": {"brands": "older"}}, ["trials/facebook.json"]),
        ("trials/facebook.json", {"evals": {}}, ["trials/facebook.json"]),
        (
            "trials/facebook.json",
            {"evals": {"brands": "print3", "(forget)": "others:facebook"}},
            ["trials/facebook.json"],
        ),
    ],
)
def test_an_artifact_with_other_inputs_is_stale(store, path, fields, stale):
    change(store, path, **fields)
    assert {p: state for p, (state, _) in not_ok(store).items()} == dict.fromkeys(stale, "stale")


def test_a_rebuilt_block_makes_its_set_stale(store):
    write_block(store, "d2", "print2b")
    state, reason = not_ok(store)["sets/facebook.json"]
    assert state is Standing.STALE
    assert "retain rows have been rebuilt" in reason


def test_a_new_forget_gradient_makes_its_dependents_stale(store):
    write_gradient(store, "g9", "print1")
    change(store, "gradients/facebook.json", forget="g9")
    assert not_ok(store) == {
        "gradients/g1.safetensors": (Standing.UNREFERENCED, "no set uses it"),
        "rankings/facebook.json": (Standing.STALE, "the gradients have been recomputed since"),
        "trials/facebook.json": (Standing.STALE, "the forget gradient has been recomputed since"),
        "edits/facebook.safetensors": (
            Standing.STALE,
            "the forget gradient has been recomputed since",
        ),
    }


def test_a_later_run_reuses_rows_with_the_same_inputs(store, listener):
    on_file = store.read_record("trials/facebook.json", Trials)
    fresh = replace(on_file, trials=(), criterion=Criterion.FA5, version="later")
    again = resume(store, Artifact.TRIALS, "facebook", fresh)
    assert again == replace(fresh, trials=on_file.trials)
    assert resume(store, Artifact.TRIALS, "other", fresh) is fresh
    assert listener.heard == []
    other = replace(fresh, forget="g9", precision=Precision.TF32)
    assert resume(store, Artifact.TRIALS, "facebook", other) is other
    store.write_bytes("trials/facebook.json", b"{")
    assert resume(store, Artifact.TRIALS, "facebook", fresh) is fresh
    differing, damaged = listener.heard
    unusable = "recorded trials cannot be used and are made again: "
    assert differing == f"{unusable}their inputs differ (forget, precision)"
    assert damaged.startswith(unusable)
    assert "is not JSON" in damaged


def test_an_edit_alone_in_a_store_is_not_stale(tmp_path):
    store = Store(str(tmp_path))
    write_edit(store, "shared", gradient="elsewhere")
    (entry,) = entries(store)
    assert (entry.kind, entry.state) == (Artifact.EDIT, Standing.OK)


def test_unused_artifacts_are_unreferenced(store):
    write_block(store, "d9", "print9")
    write_gradient(store, "g9", "print9")
    left = Path(store.where("data"), ".partial-00000000-killed.zarr")
    left.mkdir()
    (left / "chunk").write_bytes(b"12345")
    assert sorted(entry.path for entry in unreferenced(store)) == [
        "data/d9.zarr",
        "gradients/g9.safetensors",
    ]
    (unfinished,) = (e for e in entries(store) if e.state is Standing.UNFINISHED)
    assert (unfinished.kind, unfinished.size) == (Artifact.UNFINISHED, 5)


def test_nothing_is_unreferenced_while_a_record_cannot_be_read(store):
    write_block(store, "d9", "print9")
    write_gradient(store, "g9", "print9")
    assert len(unreferenced(store)) == 2
    store.write_bytes("sets/other.json", b"{")
    store.write_bytes("gradients/other.json", b"{}")
    assert unreferenced(store) == []


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"name": 1}', b"\xff" * 40])
def test_a_damaged_artifact_of_any_kind_is_listed_with_the_reason(store, content):
    paths = [entry.path for entry in entries(store)]
    for path in paths:
        if path.endswith(".zarr"):
            Path(store.where(path), "zarr.json").write_bytes(content)
        elif not path.endswith(".png"):
            store.write_bytes(path, content)
    found = by_path(store)
    assert list(found) == paths
    for path, entry in found.items():
        if not path.endswith(".png"):
            assert entry.state is Standing.DAMAGED
            assert Path(path).name in entry.reason


def test_a_written_block_is_listed(tmp_path):
    from slsgu_cli.store.blocks import block_writer

    store = Store(str(tmp_path))
    with block_writer(store, "data/d1.zarr", height=4, width=4, rows=3) as writer:
        for key in "ab":
            writer.add(np.zeros((4, 4, 3), np.uint8), key=key)
        writer.finish(None, {})
    (entry,) = entries(store)
    assert (entry.state, entry.made_from) == (Standing.UNREFERENCED, {"rows": "2"})
    assert entry.size > 0


def test_missing_parts_are_reported(store):
    store.remove("data/d1.zarr")
    store.remove("gradients/g2.safetensors")
    found = not_ok(store)
    assert found["sets/facebook.json"][0] is Standing.DAMAGED
    assert "forget rows cannot be read" in found["sets/facebook.json"][1]
    assert found["gradients/facebook.json"] == (
        Standing.DAMAGED,
        "its retain gradient g2 is missing or damaged",
    )
    assert found["rankings/facebook.json"][0] is Standing.STALE
    store.remove("sets/facebook.json")
    store.remove("gradients/facebook.json")
    assert "are not in the store" in not_ok(store)["rankings/facebook.json"][1]


def test_foreign_files_are_not_listed(store):
    before = entries(store)
    for path in ("sets/notes.txt", "gradients/.DS_Store", "elsewhere/x.json", "README.md"):
        store.write_bytes(path, b"?")
    assert entries(store) == before


def test_entries_are_json(store):
    text = json.dumps(encode(entries(store)), allow_nan=False)
    assert json.loads(text)[0]["made_from"]["concept"] == "facebook"


def test_listing_imports_nothing_heavy(store):
    code = (
        "import sys\n"
        "from slsgu_cli.store.catalog import entries\n"
        "from slsgu_cli.store.store import Store\n"
        "print(len(entries(Store(sys.argv[1]))))\n"
        "heavy = {'torch', 'open_clip', 'zarr', 'pyarrow', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(', '.join(heavy) or None)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, store.root], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "11\n", "")


def test_covariances_of_other_rows_are_unreferenced(store):
    layers = {"visual.proj": LayerCovariance(0, 9.0, 1.5)}
    for name, data in (("m1", "print2"), ("m2", "older")):
        header = CovarianceHeader("model", data, 9, layers, (), "0.1.0")
        store.write_tensors(f"covariances/{name}.safetensors", {"visual.proj": np.eye(2)}, header)
    entry = by_path(store)["covariances/m1.safetensors"]
    assert (entry.kind, entry.state) == (Artifact.COVARIANCE, Standing.OK)
    assert entry.made_from == {"rows": "9"}
    assert set(not_ok(store)) == {"covariances/m2.safetensors"}


def test_edits_whitened_by_other_retain_rows_are_stale(store):
    write_edit(store, "facebook", gradient="g1", retain="print2")
    assert not not_ok(store)
    write_edit(store, "facebook", gradient="g1", retain="older")
    change(store, "trials/facebook.json", directions=["whitened"], retain_data="older")
    found = not_ok(store)
    assert set(found) == {"edits/facebook.safetensors", "trials/facebook.json"}
    assert {reason for _, reason in found.values()} == {REWHITENED}
