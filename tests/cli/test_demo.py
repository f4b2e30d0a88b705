"""The demo from end to end, for a brand, on some of the embedded icons.

Then it runs again on the same store, and its printed commands run one by one. `make demo` runs it
on all icons, and so does CI.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from documents import validated
from icons import write_few
from matplotlib.figure import Figure
from processes import inside, rows
from safetensors.numpy import load_file

from slsgu_cli.cli import demo
from slsgu_cli.cli.demo import DATA

pytestmark = pytest.mark.slow
WEIGHTS = "open_clip_model.safetensors"
PNG = b"\x89PNG\r\n\x1a\n"


def figures(shown):
    return {row["figure"]: row for row in shown["accuracy"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_few(tmp_path_factory.mktemp("few icons"), "facebook")


@pytest.fixture(scope="module")
def at_folder(folder):
    """Run the demo on few icons, from their folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(demo, "DATA", folder)
        patch.setattr(demo, "RETAIN_SAMPLES", 64)
        yield


@pytest.fixture(scope="module")
def facebook(folder, at_folder, undrawn):
    """Return the output of `slsgu demo --json`, and the store."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", undrawn)
        done = inside("demo", "--json", store="a store")
    assert done.exit_code == 0, done.stderr
    stages = [line[:3] for line in done.stderr.splitlines() if line[1:2] == "/"]
    assert stages == ["1/5", "2/5", "3/5", "4/5", "5/5"]
    return validated(done.stdout), folder / "a store"


def test_facebook_is_forgotten_and_others_are_not(facebook):
    found = figures(facebook[0])
    assert found["FA@1"]["original"] > 90
    assert found["FA@1"]["edited"] == 0
    assert found["FA@5"]["original"] > 50
    assert found["FA@5"]["edited"] == 0
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


def test_written_pictures_are_png_files(facebook):
    shown, store = facebook
    for path in (*shown["pictures"], *shown["plots"]):
        assert Path(path).read_bytes().startswith(PNG)
    assert len(list((store / "plots").glob("*.png"))) > len(shown["plots"])


def test_the_commands_are_listed_one_by_one(facebook):
    lines = facebook[0]["commands"]
    assert [line.split()[:2] for line in lines[1:]] == [
        ["slsgu", command] for command in ("build-sets", "grad", "rank", "search", "apply", "eval")
    ]


def accuracies(shown):
    """Return original and edited accuracy, and the change, by the figure's name."""
    _, _, table = shown.rpartition("figure\toriginal\tedited\tchange\n")
    lines = (line.split("\t") for line in table.partition("\n\n")[0].splitlines())
    return {name: [float(value) for value in values] for name, *values in lines}


@pytest.fixture(scope="module")
def again(facebook, at_folder):
    """Return the output of `slsgu demo` for people, on a store that has all of it."""
    done = inside("demo", "facebook", "--criterion", "fa5", store="a store")
    assert done.exit_code == 0, done.stderr
    assert "recorded trials were reused" in done.stderr
    return done.stdout


def test_words_have_the_figures_of_json(facebook, again):
    expected = figures(facebook[0])
    found = accuracies(again)
    assert [*found] == [*expected]
    for name, row in expected.items():
        wanted = [row[column] for column in ("original", "edited", "change")]
        assert found[name] == pytest.approx(wanted)


def test_the_printed_commands_do_the_same(again, folder, at_folder):
    ran = [inside(*words, env=env) for words, env in typed(again.rpartition(":\n\n")[2], folder)]
    assert [done.exit_code for done in ran] == [0] * 6
    notes = "".join(done.stderr for done in ran)
    assert "forget gradient" in notes
    assert "in the store already" in notes
    assert "recorded trials were reused" in notes
    first, second = (
        folder / "a store" / "checkpoints" / f"clip-without-facebook{end}" for end in ("", "-again")
    )
    assert (second / WEIGHTS).read_bytes() == (first / WEIGHTS).read_bytes()
    (_, *measured), _ = rows(ran[-1].stdout)
    expected = accuracies(again)
    assert [row[0] for row in measured] == list(expected)
    for figure, original, edited, _ in measured:
        assert float(original) == pytest.approx(expected[figure][0])
        # The checkpoint is fp16, what the search measured is not.
        assert float(edited) == pytest.approx(expected[figure][1], abs=0.7)


def typed(lines, folder):
    """Return what a shell makes of some lines: the words after `slsgu`, and its environment."""
    program = folder / "bin" / "slsgu"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable} -S\nimport json, os, sys\n"
        'print(json.dumps([sys.argv[1:], {"SLSGU_STORE": os.environ["SLSGU_STORE"]}]))\n'
    )
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["sh", "-e", "-c", lines],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_an_unknown_concept_is_reported_with_near_ones(tmp_path):
    done = inside("demo", "castel", store=tmp_path / "store")
    assert (done.exit_code, done.stdout) == (2, "")
    assert "castle" in done.stderr
    assert not (tmp_path / "store").exists()
