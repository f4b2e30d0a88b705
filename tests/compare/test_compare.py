"""Every method on the same footing, recorded as it ends, and never run twice."""

import json
import shutil
from dataclasses import replace

import pytest
from processes import inside

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.cli.compare import comparison_plot
from slsgu_cli.compare import ours as ours_module
from slsgu_cli.compare.comparison import compare
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.compare.tables import better, mean_rows
from slsgu_cli.errors import StaleError, UsageError
from slsgu_cli.records.comparison import (
    CLIP_METHODS,
    ClipComparison,
    CompareOptions,
    Method,
)
from slsgu_cli.records.figures import Accuracy, Figures, PassTime
from slsgu_cli.records.method import Trials
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Standing, entries
from slsgu_cli.store.store import Store

OPTIONS = CompareOptions(rates=(1e-3,), epochs=2, batch_size=16, retain_rows=32)


@pytest.fixture(scope="module")
def compared_world(shared_world, tmp_path_factory):
    """A store in which every method was compared once, and what came out."""
    folder = tmp_path_factory.mktemp("compared") / "store"
    shutil.copytree(shared_world.store.root, folder)
    world = replace(shared_world, store=Store(str(folder)))
    return world, run(world)


@pytest.fixture
def own(compared_world, tmp_path):
    """The same store for one test alone."""
    world, _ = compared_world
    shutil.copytree(world.store.root, tmp_path / "store")
    return replace(world, store=Store(str(tmp_path / "store")))


def run(world, **changes):
    options = replace(OPTIONS, **changes)
    return compare(world.store, [world.name], options=options)


def rows_of(compared):
    return {outcome.method: outcome for outcome in next(iter(compared.concepts.values()))}


def test_every_method_has_its_row_in_the_papers_order(compared_world):
    _, compared = compared_world
    rows = next(iter(compared.concepts.values()))
    assert [row.method for row in rows] == list(CLIP_METHODS)
    assert compared.chosen is None
    for row in rows:
        assert set(row.utility) == {"first", "second"}
        assert (row.seconds > 0) == (row.method is not Method.ORIGINAL)


def test_passes_count_what_each_method_ran(compared_world):
    world, compared = compared_world
    rows = rows_of(compared)
    share = 32 / world.manifest.retain.rows

    def passes(method):
        return rows[method].forget_passes, pytest.approx(rows[method].retain_passes)

    assert passes(Method.ORIGINAL) == (0, 0)
    assert passes(Method.FT)[0] == 0
    assert passes(Method.GA)[1] == 0
    assert 1 <= rows[Method.GA].forget_passes <= 2
    gaft, salun = rows[Method.GAFT], rows[Method.SALUN]
    assert gaft.retain_passes == pytest.approx(gaft.forget_passes * share)
    assert salun.retain_passes == pytest.approx((salun.forget_passes - 1) * share)
    assert passes(Method.SSD) == passes(Method.OURS) == (1, 1)


def test_training_that_does_not_forget_runs_every_epoch(own):
    tuned = rows_of(run(own, methods=[Method.FT], rates=(1e-9,)))[Method.FT]
    assert tuned.forget.top1 > 0
    assert tuned.retain_passes == pytest.approx(2 * 32 / own.manifest.retain.rows)


def test_ours_is_the_sets_edit(compared_world):
    world, compared = compared_world
    edit, ours = load_edit(world.store, world.name).header, rows_of(compared)[Method.OURS]
    assert (ours.forget, ours.utility) == (edit.forget, edit.utility)
    assert ours.edit == f"{edit.layer} at {edit.step:.10g}, {edit.direction}"
    assert rows_of(compared)[Method.ORIGINAL].forget == edit.baseline_forget


def test_squares_are_stored_and_the_comparison_is_listed(compared_world):
    world, _ = compared_world
    found = {(e.kind, e.name): e for e in entries(world.store)}
    for digest in (world.pointer.forget, world.pointer.retain):
        assert world.store.exists(Artifact.SQUARES.path(digest))
        assert found[Artifact.SQUARES, digest].state is Standing.OK
    entry = found[Artifact.COMPARISON, world.name]
    assert entry.state is Standing.OK
    assert not [e for e in found.values() if e.state is not Standing.OK]


def test_a_second_call_runs_nothing(own, compared_world, monkeypatch):
    def never(*_, **__):
        raise AssertionError("a recorded row was run again")

    monkeypatch.setattr(BaselineRunner, "run", never)
    monkeypatch.setattr(BaselineRunner, "open", never)  # nor is the model loaded
    monkeypatch.setattr(ours_module, "search", never)
    assert run(own).concepts == compared_world[1].concepts


def test_an_interrupted_run_resumes(own, compared_world, monkeypatch):
    path = Artifact.COMPARISON.path(own.name)
    record = own.store.read_record(path, ClipComparison)
    kept = tuple(o for o in record.outcomes if o.method is not Method.GA)
    own.store.write_record(path, replace(record, outcomes=kept))
    ran = []
    original = BaselineRunner.run
    monkeypatch.setattr(
        BaselineRunner, "run", lambda self, *rest: ran.append(rest) or original(self, *rest)
    )
    found = rows_of(run(own))[Method.GA]
    assert ran == [(Method.GA, 1e-3)]
    assert replace(found, seconds=0.0) == replace(
        rows_of(compared_world[1])[Method.GA], seconds=0.0
    )


def test_another_plan_is_another_row(own):
    first = own.store.read_record(Artifact.COMPARISON.path(own.name), ClipComparison)
    run(own, methods=[Method.GA], epochs=1)
    second = own.store.read_record(Artifact.COMPARISON.path(own.name), ClipComparison)
    assert len(second.outcomes) == len(first.outcomes) + 1
    (other,) = (row for row in second.outcomes if row not in first.outcomes)
    assert other.plan.epochs == 1
    assert list(second.outcomes) == sorted(second.outcomes, key=lambda row: row.order)


def test_a_search_whose_time_is_on_record_is_not_run_again(own, monkeypatch):
    path = Artifact.COMPARISON.path(own.name)
    record = own.store.read_record(path, ClipComparison)
    took = own.store.read_record(Artifact.TRIALS.path(own.name), Trials).took
    own.store.remove(path)
    monkeypatch.setattr(ours_module, "search", None)
    found = rows_of(run(own, methods=[Method.OURS]))[Method.OURS]
    again = own.store.read_record(path, ClipComparison)
    assert found.seconds == took.seconds + sum(time.seconds for time in again.passes.values())
    assert set(again.passes) == {own.pointer.forget, own.pointer.retain}
    assert set(again.passes) < set(record.passes)


def test_a_search_that_was_timed_elsewhere_is_timed_here_and_changes_nothing(own):
    own.store.remove(Artifact.COMPARISON.path(own.name))
    path, edit = Artifact.TRIALS.path(own.name), f"edits/{own.name}.safetensors"
    trials = own.store.read_record(path, Trials)
    own.store.write_record(path, replace(trials, took=PassTime(1e6, "another machine")))
    before = own.store.read_bytes(edit)
    assert 0 < rows_of(run(own, methods=[Method.OURS]))[Method.OURS].seconds < 1e6
    assert own.store.read_bytes(edit) == before


def test_epochs_and_settings_are_chosen_on_validation_rows(own):
    own.build(test_fraction=0.5)
    own.store.remove(f"edits/{own.name}.safetensors")
    methods = [Method.GA, Method.SSD, Method.ROME, Method.LEACE_VISION, Method.OURS]
    rows = rows_of(run(own, methods=[Method.ORIGINAL, *methods]))
    for outcome in (rows[method] for method in methods):
        by = outcome.chosen_by
        assert outcome.forget.is_test
        assert not by.forget.is_test
        assert {
            (figure.is_test, by.utility[name].is_test) for name, figure in outcome.utility.items()
        } == {(True, False)}
    assert rows[Method.GA].utility["second"].rows == rows[Method.OURS].utility["second"].rows
    original = rows[Method.ORIGINAL]
    assert original.forget.is_test
    assert original.forget.rows == rows[Method.ROME].forget.rows


def test_a_set_without_gradients_gets_them(world, listener):
    world.store.remove(f"gradients/{world.name}.json")
    digests = world.store.names("gradients", ".safetensors")
    for digest in digests:
        world.store.remove(f"gradients/{digest}.safetensors")
    found = rows_of(run(world, methods=[Method.OURS]))
    assert list(found) == [Method.OURS]
    assert world.store.names("gradients", ".safetensors") == digests
    assert any("no gradients yet" in text for text in listener.heard)


def test_an_edit_of_other_evaluation_rows_is_refused(own):
    own.build(evals={"first": own.sources["first"]}, templates={})
    with pytest.raises(StaleError, match="not among the trials") as error:
        run(own)
    assert error.value.hint == "run `slsgu search blue`"


def test_a_comparison_of_rebuilt_evaluation_rows_is_stale(own):
    own.build(
        evals={
            "first": f"{own.sources['first']}&label=blue&label=red",
            "second": own.sources["second"],
        }
    )
    entry = next(e for e in entries(own.store) if e.kind is Artifact.COMPARISON)
    assert entry.state is Standing.STALE


def test_settings_are_tuned_on_the_first_concept_and_used_for_the_others(own, monkeypatch):
    replace(own, name="red").build()
    ran = []
    outcome = rows_of(run(own))[Method.FT]

    def fake(self, method, setting):
        ran.append((self.times.manifest.name, method, setting))
        distance = abs(setting - 1e-5) * 1e6
        chosen_by, reported = (
            {name: Accuracy(kept, 0, 1) for name in outcome.utility}
            for kept in (90 - distance, distance)
        )
        return replace(
            outcome,
            method=method,
            setting=setting,
            plan=self.plan,
            utility=reported,
            chosen_by=Figures(outcome.forget, chosen_by),
        )

    monkeypatch.setattr(BaselineRunner, "run", fake)
    options = replace(OPTIONS, methods=[Method.FT], rates=None)
    found = compare(own.store, ["blue", "red"], options=options)
    assert found.chosen == {Method.FT: 1e-5}
    assert len([r for r in ran if r[0] == "blue"]) == 5
    assert [r for r in ran if r[0] == "red"] == [("red", Method.FT, 1e-5)]
    rows = mean_rows(found.concepts, found.chosen)
    assert [(row.setting, row.chosen) for row in rows] == [(1e-5, True)]


def test_means_are_over_concepts(compared_world):
    outcomes = compared_world[1].concepts["blue"]
    other = tuple(
        replace(o, forget=Accuracy(o.forget.top1 + 10, o.forget.top5, 5), seconds=o.seconds + 2)
        for o in outcomes
    )
    for row, own in zip(mean_rows({"a": outcomes, "b": other}, None), outcomes, strict=True):
        assert row.forget.top1 == pytest.approx(own.forget.top1 + 5)
        assert row.seconds == pytest.approx(own.seconds + 1)
        assert row.utility["first"].top1 == pytest.approx(own.utility["first"].top1)
    foreign = tuple(replace(o, utility={"third": o.forget}) for o in outcomes)
    with pytest.raises(UsageError, match="no evaluation set in common"):
        mean_rows({"a": outcomes, "b": foreign}, None)


def test_a_baseline_that_beats_ours_is_reported(compared_world):
    rows = mean_rows(compared_world[1].concepts, None)
    ours = next(row for row in rows if row.method is Method.OURS)
    worse = replace(ours, method=Method.FT, forget=Accuracy(ours.forget.top1 + 1, 0, 1))
    more = {name: Accuracy(f.top1 + 1, f.top5, f.rows) for name, f in ours.utility.items()}
    beats = replace(ours, method=Method.GA, utility=more)
    equal = replace(ours, method=Method.SSD)
    assert better([ours, worse, beats, equal]) == [beats]


@pytest.mark.usefixtures("drawing")
def test_the_plot_distinguishes_settings(compared_world):
    rows = mean_rows(compared_world[1].concepts, None)
    first = comparison_plot(rows, title="blue")
    assert first.startswith(b"\x89PNG")
    assert first == comparison_plot(rows, title="blue")
    assert first != comparison_plot(rows[:-1], title="blue")


def test_unrequested_methods_are_not_run(own):
    found = run(own, methods=[Method.ORIGINAL, Method.SSD])
    assert [row.method for row in found.concepts["blue"]] == [Method.ORIGINAL, Method.SSD]


def test_the_command(own):
    words = ["compare", "blue", "--lr", "1e-3", "--epochs", "2", "--batch-size", "16"]
    words += ["--retain-rows", "32"]
    done = inside(*words, store=own.store.root)
    assert done.exit_code == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert lines[0][:7] == ["method", "setting", "lr", "value", "layer", "epoch", "FA@1"]
    assert [line[0] for line in lines[1:]] == [str(method) for method in CLIP_METHODS]
    assert "plots/blue-comparison.png" in done.stderr
    again = inside(*words, "--json", "--methods", "ga,ours", store=own.store.root)
    document = json.loads(again.stdout)
    assert [row["method"] for row in document["comparison"]] == ["original", "ga", "ours"]
    assert document["comparison"][1]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--lr", "0.1,fast"], "--lr fast is not a learning rate"),
        (["--lr", "auto,1e-6"], "--lr auto is not a learning rate"),
        (["--lr", "-1"], "--lr -1 is not a learning rate"),
        (["--methods", "ga,magic"], "--methods magic is not one of"),
        (["--methods", "ga", "--layer", "c_proj"], "--layer is for rome"),
    ],
)
def test_contradictory_options_are_reported(words, told, tmp_path):
    done = inside("compare", "blue", *words, store=tmp_path)
    assert done.exit_code == 2
    assert told in done.stderr
