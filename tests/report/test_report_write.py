"""The command: what it writes, where, and what it says."""

import json

import pytest
from places import special_files
from processes import slsgu
from reports import HOSTILE, NAME, fill
from reports import guesses as guessed
from worlds import Listener

from slsgu_cli.engine.examples import GuessingModels
from slsgu_cli.errors import InputError, MissingError, StaleError
from slsgu_cli.records.options import ReportRequest
from slsgu_cli.report.page import write_report
from slsgu_cli.store.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(str(tmp_path / "store"))
    fill(store)
    return store


@pytest.fixture
def out(tmp_path):
    return tmp_path / "pages" / "report.html"


def write(store, out, names=(NAME,), **options):
    request = ReportRequest(names=names, out=out, **options)
    return write_report(store, request)


def test_a_page_is_replaced_with_overwrite_only_and_is_the_same_each_time(store, out):
    write(store, out, examples=False)
    first = out.read_bytes()
    with pytest.raises(InputError, match="exists already") as error:
        write(store, out, examples=False)
    assert "--overwrite" in error.value.hint
    write(store, out, examples=False, overwrite=True)
    assert out.read_bytes() == first
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_folder_and_an_unknown_set_are_refused(store, tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        write(store, tmp_path, examples=False)
    with pytest.raises(MissingError, match="has no set other"):
        write(store, tmp_path / "r.html", names=(NAME, "other"), examples=False)
    assert not (tmp_path / "r.html").exists()


def test_special_files_are_not_replaced(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    special, there = special_files(tmp_path)
    for place in special:
        with pytest.raises(InputError, match="neither a file nor a folder"):
            write(store, place, examples=False, overwrite=True)
    assert there()


def test_the_model_runs_only_for_sets_with_an_edit(store, out, monkeypatch):
    asked = []

    def look(self, manifest, header):
        asked.append(header.name)
        return guessed()

    monkeypatch.setattr(GuessingModels, "before_after", look)
    listener = Listener()
    fill(store, concept="castle", name="castle")
    store.remove("edits/castle.safetensors")
    write(store, out, names=(NAME, "castle"))
    assert asked == [NAME]
    assert any("running local-dir:clip on a few images" in line for line in listener.heard)
    write(store, out, names=(NAME,), examples=False, overwrite=True)
    assert asked == [NAME]


def test_a_changed_model_is_reported_on_the_page_and_to_the_user(store, out, monkeypatch):
    def look(self, manifest, header):
        raise StaleError("it has other weights", hint="run `slsgu grad mouse`")

    monkeypatch.setattr(GuessingModels, "before_after", look)
    listener = Listener()
    written = write(store, out)
    assert "mouse: no images are shown: it has other weights" in listener.heard
    states = {section.title: section.state for section in written[NAME]}
    assert states["Example images"] == "missing"
    assert states["Result"] == "shown"
    assert "it has other weights." in out.read_text()


def test_the_command_lists_sections_and_the_commands_that_add_missing_ones(store, out):
    store.remove(f"trials/{NAME}.json")
    arguments = ("report", NAME, "--out", out, "--store", store.root, "--no-examples")
    done = slsgu(*arguments)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows[0] == ["name", "section", "state", "run"]
    assert [NAME, "Step search", "missing", f"slsgu search {NAME}"] in rows
    assert [NAME, "Result", "shown", "-"] in rows
    assert f"wrote {out}" in done.stderr
    assert HOSTILE not in out.read_text()

    done = slsgu(*arguments, "--json", "--overwrite")
    assert json.loads(done.stdout)["files"] == [str(out)]
    again = slsgu(*arguments)
    assert again.returncode == 3
    assert "--overwrite" in again.stderr
