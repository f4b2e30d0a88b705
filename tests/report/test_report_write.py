"""The command: what it writes, where, and what it says."""

import json

import pytest
from places import special_files
from processes import slsgu
from reports import HOSTILE, NAME, fill
from reports import guesses as guessed
from worlds import Listener

from slsgu_cli.errors import InputError, MissingError, StaleError, UsageError
from slsgu_cli.method.evaluate import GuessingModels
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


def test_it_is_replaced_only_when_asked_and_comes_out_the_same(store, out):
    write(store, out, examples=False)
    first = out.read_bytes()
    with pytest.raises(InputError, match="exists already") as told:
        write(store, out, examples=False)
    assert "--overwrite" in told.value.hint
    write(store, out, examples=False, overwrite=True)
    assert out.read_bytes() == first
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_a_folder_is_no_place_and_a_name_counts_once(store, tmp_path):
    with pytest.raises(InputError, match="is a folder"):
        write(store, tmp_path, examples=False)
    with pytest.raises(UsageError, match="twice"):
        write(store, tmp_path / "r.html", names=(NAME, NAME), examples=False)
    with pytest.raises(MissingError, match="has no set other"):
        write(store, tmp_path / "r.html", names=(NAME, "other"), examples=False)
    assert not (tmp_path / "r.html").exists()


def test_a_pipe_a_socket_and_what_a_link_leads_to_stay(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    special, there = special_files(tmp_path)
    for place in special:
        with pytest.raises(InputError, match="neither a file nor a folder"):
            write(store, place, examples=False, overwrite=True)
    assert there()


def test_the_model_is_run_only_for_what_has_an_edit(store, out, monkeypatch):
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
    assert any("running local-dir:clip over a few images" in line for line in listener.heard)
    write(store, out, names=(NAME,), examples=False, overwrite=True)
    assert asked == [NAME]


def test_a_model_that_is_another_now_is_told_on_the_page_and_to_the_user(store, out, monkeypatch):
    def look(self, manifest, header):
        raise StaleError("it has other weights", hint="run `slsgu grad mouse`")

    monkeypatch.setattr(GuessingModels, "before_after", look)
    listener = Listener()
    written = write(store, out)
    assert "mouse: no images are shown: it has other weights" in listener.heard
    states = {section.title: section.state for section in written.sections[NAME]}
    assert states["Single images"] == "missing"
    assert states["Result"] == "shown"
    assert "it has other weights." in out.read_text()


def test_the_command_says_what_is_on_the_page_and_what_would_add_the_rest(store, out):
    store.remove(f"trials/{NAME}.json")
    arguments = ("report", NAME, "--out", out, "--store", store.root, "--no-examples")
    done = slsgu(*arguments)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert rows[0] == ["name", "section", "state", "run"]
    assert [NAME, "Search for the step", "missing", f"slsgu search {NAME}"] in rows
    assert [NAME, "Result", "shown", "-"] in rows
    assert f"wrote {out}" in done.stderr
    assert HOSTILE not in out.read_text()

    done = slsgu(*arguments, "--json", "--overwrite")
    assert json.loads(done.stdout)["files"] == [str(out)]
    again = slsgu(*arguments)
    assert again.returncode == 3
    assert "--overwrite" in again.stderr
