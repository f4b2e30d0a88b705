"""A store that version 0.1.0 wrote is read, gone on with and applied as if it were ours.

`data/store-0.1.0.tar.xz` holds the store, the model and the sources it was made from, and the
digests of what `apply blue` wrote then.
"""

import hashlib
import tarfile
from dataclasses import asdict
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.cli.app import app
from slsgu_cli.records.method import GradientPointer, Ranking, Trials
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.records.studies import ClipComparison, JointSearch
from slsgu_cli.records.verification import Check, Verification
from slsgu_cli.store.catalog import entries
from slsgu_cli.store.store import Store

ARCHIVE = Path(__file__).parent / "data" / "store-0.1.0.tar.xz"
RANKED = ("--include", "*c_fc*", "--include", "*out_proj*")


@pytest.fixture
def store(vocabulary, tmp_path, monkeypatch):
    """The store, in the working directory that its relative paths are meant for.

    The draw of the rows knows a file by its name and its folder's, which was `fx`.
    """
    folder = tmp_path / "fx"
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(folder, filter="data")
    monkeypatch.chdir(folder)
    return Store(str(folder / "store"))


def run(*words):
    """Run a command to its good end; return its stdout and its stderr."""
    done = CliRunner().invoke(app, [*words, "--store", "store"])
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def content(store, *folders):
    """Return a digest of every file of some folders."""
    root = Path(store.root)
    files = (path for folder in folders for path in (root / folder).rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def joint_of(store):
    """Return the joint search of two concepts."""
    return store.read_record("joint/red+blue.json", JointSearch)


def studies_of(store):
    """Return what was recorded of the edit of blue."""
    kinds = {"verifications": Verification, "comparisons": ClipComparison, "trajectories": Trials}
    return [store.read_record(f"{folder}/blue.json", kind) for folder, kind in kinds.items()]


def test_every_artifact_is_listed_as_good(store):
    listed = entries(store)
    assert {entry.kind.value for entry in listed} == {
        "set",
        "data",
        "pointer",
        "gradient",
        "covariances",
        "ranking",
        "trials",
        "trajectory",
        "joint",
        "edit",
        "verification",
        "comparison",
    }
    assert [(entry.path, entry.reason) for entry in listed if entry.state != "ok"] == []
    stdout, _ = run("ls")
    assert [line.split("\t")[3] for line in stdout.splitlines()[1:]] == ["ok"] * len(listed)


def test_its_gradients_are_found(store):
    before = content(store, "gradients")
    pointer = store.read_record("gradients/blue.json", GradientPointer)
    stdout, stderr = run("grad", "blue")
    assert [line.split("\t")[-1] for line in stdout.splitlines()[1:]] == ["cached", "cached"]
    assert f"forget gradient {pointer.forget}: in the store already" in stderr
    again = store.read_record("gradients/blue.json", GradientPointer)
    assert asdict(again) == asdict(pointer) | {"version": again.version}
    del before[store.where("gradients/blue.json")]
    assert before.items() <= content(store, "gradients").items()


def test_it_is_ranked_the_same(store):
    before = store.read_record("rankings/blue.json", Ranking)
    run("rank", "blue", *RANKED, "--direction", "whitened")
    after = store.read_record("rankings/blue.json", Ranking)
    pairs = zip(before.scores, after.scores, strict=True)
    for old, new in ((asdict(old), asdict(new)) for old, new in pairs):
        assert new == {
            key: pytest.approx(value, rel=1e-6) if isinstance(value, float) else value
            for key, value in old.items()
        }
    apart = {"scores": (), "version": after.version}
    assert asdict(after) | apart == asdict(before) | apart


def test_a_joint_search_goes_on_from_the_trials_of_each(store, monkeypatch):
    from slsgu_cli.method.trial import Probe

    def measured(*_arguments, **_options):
        raise AssertionError("a trial on record was measured again")

    monkeypatch.setattr(Probe, "measure", measured)
    before = content(store, "covariances", "gradients")
    known = joint_of(store).trials
    words = (
        "--joint",
        "--steps",
        "4",
        "--criterion",
        "fa1",
        "--utility",
        "ta1",
        "--overshoot",
        "1",
    )
    run("search", "red", "blue", *words)
    assert content(store, "covariances", "gradients") == before
    # What it knows of several steps together is kept, though it has no slopes to go on by.
    assert [trial.moves for trial in joint_of(store).trials[: len(known)]] == [
        trial.moves for trial in known
    ]
    headers = [load_edit(store, name).header for name in ("red", "blue")]
    assert all(header.forgotten and header.joint.names == ("red", "blue") for header in headers)


def test_what_it_recorded_of_an_edit_is_used_again(store):
    before = studies_of(store)
    _, stderr = run("verify", "blue", "--checks", "paraphrase")
    assert "2 recorded findings were used again" in stderr
    run("compare", "blue", "--methods", "ft", "--epochs", "1")
    run("trajectory", "blue", "--points", "3", "--criterion", "fa1")
    after = studies_of(store)
    assert after[1:] == before[1:]
    for old, new in zip(before[0].subjects, after[0].subjects, strict=True):
        assert new.finding(Check.BASELINE) == old.finding(Check.BASELINE)
        # It no longer tries other names, which spelling does, and finds what it found.
        assert new.finding(Check.PARAPHRASE).probes == old.finding(Check.PARAPHRASE).probes


def test_its_edit_is_applied_to_the_same_bytes(store):
    lines = Path("edited.sha256").read_text().splitlines()
    run("apply", "blue", "--out", "edited")
    # That version wrote no model card.
    Path("edited/README.md").unlink()
    written = sorted(str(path) for path in Path("edited").rglob("*") if path.is_file())
    assert [
        f"{hashlib.sha256(Path(path).read_bytes()).hexdigest()}  {path}" for path in written
    ] == sorted(lines, key=lambda line: line.split()[1])


def test_its_sets_are_built_again_of_the_same_rows(store):
    def blocks(manifest):
        return {
            role: ref.fingerprint
            for role, ref in (
                {"forget": manifest.forget, "retain": manifest.retain} | manifest.evals
            ).items()
        }

    before = store.read_record("sets/blue.json", SetManifest)
    stdout, _ = run("build-sets", "blue", "--replay")
    assert "other rows" not in stdout
    after = store.read_record("sets/blue.json", SetManifest)
    assert blocks(after) == blocks(before)
    assert before.request.items() <= after.request.items()
    assert after.test_fraction == 0
