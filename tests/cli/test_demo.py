"""The demo from end to end, and the package away from its checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from places import ROOT
from processes import slsgu
from safetensors.numpy import load_file

from slsgu_cli.cli.demo import DATA

pytestmark = pytest.mark.slow
WEIGHTS = "open_clip_model.safetensors"
PNG = b"\x89PNG\r\n\x1a\n"


def figures(shown):
    return {row["figure"]: row for row in shown["accuracy"]}


@pytest.fixture(scope="module")
def facebook(tmp_path_factory):
    """What `slsgu demo --json` told, and the store it left."""
    store = tmp_path_factory.mktemp("demo") / "slsgu store"
    done = slsgu("demo", "--json", cwd=store.parent, env={"SLSGU_STORE": store.name}, timeout=900)
    assert done.returncode == 0, done.stderr
    assert [line[:3] for line in done.stderr.splitlines() if line[1:2] == "/"] == [
        "1/5", "2/5", "3/5", "4/5", "5/5"
    ]  # fmt: skip
    return json.loads(done.stdout), store


def test_facebook_is_forgotten_and_the_rest_kept(facebook):
    found = figures(facebook[0])
    assert found["FA@1"]["original"] > 90
    assert found["FA@1"]["edited"] == 0
    for name in ("brands", "objects"):
        assert found[f"TA@1 {name}"]["change"] >= -1.0


def test_one_tensor_differs_and_open_clip_loads_the_checkpoint(facebook):
    import open_clip
    import torch

    shown, store = facebook
    folder = store / "checkpoints" / "clip-without-facebook"
    before, after = load_file(DATA / "clip" / WEIGHTS), load_file(folder / WEIGHTS)
    assert before.keys() == after.keys()
    assert {name: value.dtype for name, value in before.items()} == {
        name: value.dtype for name, value in after.items()
    }
    differing = [name for name in before if before[name].tobytes() != after[name].tobytes()]
    assert differing == [shown["chosen"]["layer"]]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    moved = model.state_dict()[differing[0]]
    assert torch.equal(moved.cpu(), torch.from_numpy(after[differing[0]]).to(moved.dtype))


def test_the_pictures_are_pictures(facebook):
    shown, store = facebook
    for path in (*shown["pictures"], *shown["plots"]):
        assert Path(path).read_bytes().startswith(PNG)
    assert len(list((store / "plots").glob("*.png"))) > len(shown["plots"])


def test_the_printed_commands_do_the_same(facebook):
    shown, store = facebook
    lines = shown["commands"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["slsgu", command] for command in ("build-sets", "grad", "rank", "search", "apply", "eval")
    ]
    again = store / "checkpoints" / "clip-without-facebook-again"
    shutil.rmtree(again, ignore_errors=True)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", "\n".join(lines)],
        cwd=store.parent, env={**os.environ, "PATH": path}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "forget gradient" in done.stderr
    assert "in the store already" in done.stderr
    assert "recorded trials were used again" in done.stderr
    first = store / "checkpoints" / "clip-without-facebook"
    assert (again / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    measured = [line.split("\t") for line in done.stdout.rpartition("figure\t")[2].splitlines()[1:]]
    for figure, original, edited, _ in measured:
        assert float(original) == pytest.approx(figures(shown)[figure]["original"])
        # The checkpoint is fp16, what the search measured is not.
        assert float(edited) == pytest.approx(figures(shown)[figure]["edited"], abs=0.5)


def test_castle_leaves_the_first_five(tmp_path):
    done = slsgu("demo", "castle", "--steer", "fa5", "--store", tmp_path / "store", timeout=900)
    assert done.returncode == 0, done.stderr
    _, _, table = done.stdout.rpartition("figure\toriginal\tedited\tchange\n")
    found = dict(line.split("\t", 1) for line in table.partition("\n\n")[0].splitlines())
    assert float(found["FA@5"].split("\t")[0]) > 50
    assert float(found["FA@5"].split("\t")[1]) == 0
    for name in ("brands", "objects"):
        assert float(found[f"TA@1 {name}"].split("\t")[2]) >= -2.5
    assert "slsgu search castle --steer fa5" in done.stdout


def test_an_unknown_concept_is_told_with_near_ones(tmp_path):
    done = slsgu("demo", "castel", "--store", tmp_path / "store")
    assert (done.returncode, done.stdout) == (2, "")
    assert "castle" in done.stderr
    assert not (tmp_path / "store").exists()


def test_the_package_works_away_from_its_checkout(tmp_path):
    pytest.importorskip("setuptools", minversion="77", reason="builds a wheel")
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    unwanted = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "slsgu_cli", source / "slsgu_cli", ignore=unwanted)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    alone = ["--no-deps", "--no-index"]
    build = [*pip, "wheel", str(source), *alone, "--no-build-isolation", "-w", str(tmp_path)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    wanted = [path for path in (source / "slsgu_cli").rglob("*") if path.is_file()]
    assert {str(path.relative_to(source)) for path in wanted} <= held
    assert {name.split("/")[0] for name in held} == {"slsgu_cli", f"{wheel.stem[:11]}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in held)

    site = tmp_path / "site"
    install = [*pip, "install", str(wheel), *alone, "--target", str(site)]
    subprocess.run(install, check=True, capture_output=True)
    shutil.rmtree(source)
    places = {"env": {"PYTHONPATH": str(site)}, "cwd": tmp_path}
    where = [sys.executable, "-c", "import slsgu_cli; print(slsgu_cli.__file__)"]
    found = subprocess.run(
        where, cwd=tmp_path, env={**os.environ, **places["env"]}, capture_output=True, text=True
    )
    assert found.stdout.startswith(str(site))
    assert slsgu("--version", **places).stdout.startswith("slsgu ")
    assert slsgu("ls", **places).stdout.startswith("kind\t")
    demo = f"{site}/slsgu_cli/demo"
    built = slsgu(
        "build-sets", "castle", "--model", f"local-dir:{demo}/clip", "--retain-samples", "20",
        "--source", f"{demo}/train.parquet", "--eval", f"all={demo}/heldout.parquet?concept=castle",
        "--templates", f"all={demo}/templates.txt", **places,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
