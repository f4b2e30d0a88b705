"""A sweep's rows are those of single runs; what classes can share is made once."""

import json
from dataclasses import replace

import pytest
from processes import inside, rows

from slsgu_cli.clip.evaluation import SharedEvaluation
from slsgu_cli.engine import gradients
from slsgu_cli.engine import search as search_module
from slsgu_cli.engine.search import search
from slsgu_cli.errors import InputError, NotForgottenError, UsageError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.options import BuildRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.studies import Sweep, SweepRequest
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.catalog import Standing, entries
from slsgu_cli.store.store import Store
from slsgu_cli.study.series import require_swept, sweep

CLASSES = ("blue", "red", "green")


@pytest.fixture
def request_(shared_world):
    return SweepRequest(
        name="colours",
        classes=CLASSES,
        build=BuildRequest(
            test_fraction=0,
            name="",
            concept="",
            model=shared_world.model,
            sources=[shared_world.sources["pairs"]],
            retain_samples=60,
            label_column="label",
            evals={name: shared_world.sources[name] for name in ("first", "second")},
            templates=dict.fromkeys(("first", "second"), shared_world.sources["templates"]),
        ),
        gradients=PassOptions(),
        ranking=RankOptions(direction=Direction.GRADIENT),
        search=SearchOptions(steps=3),
    )


@pytest.fixture
def few(request_):
    """The same with one layer, where rows are counted and not compared."""
    return replace(request_, search=SearchOptions(steps=3, layers=("visual.proj",)))


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "swept"))


@pytest.fixture
def counted(monkeypatch):
    """Count gradients by role, base passes and searches."""
    counts = {"forget": 0, "retain": 0, "base": 0, "search": 0}

    def counting(owner, name, key):
        original = getattr(owner, name)

        def call(*arguments, **options):
            counts[arguments[2].role if key is None else key] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(owner, name, call)

    counting(gradients, "_compute", None)
    counting(SharedEvaluation, "base_pass", "base")
    counting(search_module, "_search_set", "search")
    return counts


def test_rows_are_those_of_single_runs(request_, store, several_world, tmp_path):
    result = sweep(store, request_)
    assert [row.name for row in result.sweep.rows] == list(CLASSES)
    apart = several_world.copied(tmp_path / "single")
    for row in result.sweep.rows:
        own = replace(apart, name=row.name)
        single = search(own.store, own.name, options=request_.search)
        chosen, before, after = single.chosen, single.report.before, single.report.after
        assert (row.layer, row.step) == (chosen.layer, pytest.approx(chosen.step))
        assert (row.forget, row.utility) == (after.forget, after.utility)
        assert (row.baseline_forget, row.baseline_utility) == (before.forget, before.utility)
        assert row.forgotten == single.forgotten
        assert (row.gradient, row.retain) == (own.pointer.forget, own.pointer.retain)


def test_classes_share_the_retain_gradient_and_the_base_pass(few, store, counted):
    sweep(store, few)
    assert counted == {"forget": 3, "retain": 1, "base": 1, "search": 3}
    rows = store.read_record(Artifact.SWEEP.path("colours"), Sweep).rows
    assert len({row.retain for row in rows}) == 1
    assert len({row.gradient for row in rows}) == 3


def test_an_interrupted_sweep_resumes(few, store, counted, monkeypatch):
    whole = sweep(Store(store.root + "-whole"), few).sweep
    counted.update(dict.fromkeys(counted, 0))
    run = search_module._search_set

    def interrupted(store, plan, *arguments):
        if plan.name == "red":
            raise KeyboardInterrupt
        return run(store, plan, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(search_module, "_search_set", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sweep(store, few)
    assert [row.name for row in store.read_record(Artifact.SWEEP.path("colours"), Sweep).rows] == [
        "blue"
    ]
    result = sweep(store, few)
    assert (result.sweep, result.reused) == (whole, 1)
    assert counted == {"forget": 3, "retain": 1, "base": 2, "search": 3}
    again = sweep(store, few)
    assert (again.sweep, again.reused) == (whole, 3)
    assert counted["search"] == 3


def test_a_sweep_with_other_options_is_repeated(few, store, counted):
    two = replace(few, classes=CLASSES[:2])
    sweep(store, two)
    assert counted["search"] == 2
    for changed in (
        replace(two, search=replace(two.search, steps=2)),
        replace(two, ranking=RankOptions(direction=Direction.WHITENED)),
        replace(two, build=replace(two.build, retain_samples=50)),
        replace(two, classes=("red", "blue")),
    ):
        assert sweep(store, changed).reused == 0
    # A class whose gradients are others by now is made again, and no other.
    assert sweep(store, changed).reused == 2
    gradients.compute_gradients(store, "red", model=None, options=PassOptions(batch_size=8))
    listed = {entry.kind: entry for entry in entries(store)}
    assert listed[Artifact.SWEEP].state is Standing.STALE
    assert sweep(store, changed).reused == 1
    listed = {entry.kind: entry for entry in entries(store)}
    assert listed[Artifact.SWEEP].state is Standing.OK


def test_a_source_can_hold_the_class(request_):
    build = replace(request_.build, sources=["icons.parquet?concept={}"])
    own = replace(request_, build=build, classes=("t shirt", "a&b")).of("a&b")
    assert own.sources == ["icons.parquet?concept=a%26b"]
    assert own.retain_exclude == ["t shirt", "a&b"]
    assert (own.name, own.concept) == ("a&b", "a&b")


def test_folds_have_retain_sets_without_their_own_classes(few, store, counted):
    """Each row is that of a sweep over the classes of its fold alone."""
    folded = replace(few, folds=2)
    result = sweep(store, folded).sweep
    folds = {folded.fold(name) for name in CLASSES}
    assert sorted(len(fold) for fold in folds) == [1, 2]
    assert sorted(name for fold in folds for name in fold) == sorted(CLASSES)
    assert counted == {"forget": 3, "retain": 2, "base": 1, "search": 3}
    for place, fold in enumerate(sorted(folds)):
        apart = sweep(Store(f"{store.root}-{place}"), replace(few, classes=fold)).sweep
        assert [row for row in result.rows if row.name in fold] == list(apart.rows)
    assert sweep(store, folded).reused == 3
    assert sweep(store, replace(folded, folds=3)).reused == 0
    with pytest.raises(UsageError, match="exceeds the number of classes, 3"):
        sweep(store, replace(folded, folds=4))


def test_classes_that_cannot_be_swept_are_reported(request_, store):
    with pytest.raises(UsageError, match="no class"):
        sweep(store, replace(request_, classes=()))
    with pytest.raises(UsageError, match="cannot name a set"):
        sweep(store, replace(request_, classes=("a/b",)))
    for changes in ({"evals": {}, "templates": {}}, {"sources": ["x?label={}"]}):
        with pytest.raises(UsageError):
            build = replace(request_.build, **changes)
            sweep(store, replace(request_, build=build))
    with pytest.raises(InputError, match="nothing matches 'mauve'"):
        sweep(store, replace(request_, classes=("mauve",)))


def test_the_command(shared_world, request_, store, tmp_path):
    listed = tmp_path / "classes.txt"
    listed.write_text("blue\nred\n")
    source, templates = shared_world.sources["pairs"], shared_world.sources["templates"]
    asked = [
        "sweep",
        "colours",
        "--classes",
        listed,
        "-m",
        shared_world.model.name,
        "-s",
        source,
        "--retain-samples",
        60,
        "--label-column",
        "label",
        "--steps",
        5,
        "--eval",
        f"first={shared_world.sources['first']}",
        "--templates",
        f"first={templates}",
    ]
    done = inside(*asked, store=store.root)
    assert done.exit_code == 0
    (table,) = rows(done.stdout)
    assert table[0] == [
        "class",
        "layer",
        "direction",
        "step",
        "% of norm",
        "FA@1 before",
        "FA@1 after",
        "FA@5 before",
        "FA@5 after",
        "TA@1 first before",
        "TA@1 first after",
        "TA@5 first before",
        "TA@5 first after",
    ]
    assert [row[0] for row in table[1:]] == ["blue", "red", "mean"]
    values = [[float(cell) for cell in row[5:]] for row in table[1:]]
    assert values[2] == pytest.approx([(a + b) / 2 for a, b in zip(*values[:2], strict=True)])
    found = json.loads(inside(*asked, "--json", store=store.root).stdout)
    assert [row["name"] for row in found["sweep"]["rows"]] == ["blue", "red"]
    assert inside(*asked[:4], "-s", source, store=store.root).exit_code == 2


def test_a_recognised_class_ends_with_exit_code_5(request_, store):
    result = sweep(store, replace(request_, classes=CLASSES[:1]))
    require_swept(result)
    left = replace(result.sweep.rows[0], forgotten=False)
    with pytest.raises(NotForgottenError, match="no step forgets blue") as error:
        require_swept(replace(result, sweep=replace(result.sweep, rows=(left,))))
    assert error.value.exit_code == 5
