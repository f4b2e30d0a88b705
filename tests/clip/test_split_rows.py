import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip import loading, models, tokenizers, zeroshot
from slsgu_cli.clip.evaluation import ENOUGH_TO_CHOOSE, in_test_split, prepare
from slsgu_cli.clip.towers import OpenClipVision
from slsgu_cli.engine import search as searches
from slsgu_cli.engine.evaluator import Evaluator
from slsgu_cli.engine.search import search
from slsgu_cli.errors import UsageError
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import Split
from slsgu_cli.store.blocks import DataBlock, JoinedRows

LAYERS = ["visual.proj", "transformer.resblocks.1.attn.out_proj.weight"]


def opened(world, split):
    resolved = models.resolve(world.model)
    return prepare(
        world.store,
        world.manifest,
        loading.load(resolved),
        tokenize=tokenizers.tokenizer(resolved),
        device="cpu",
        split=split,
    )


def keys(group):
    block, rows = group.images.block, group.images.rows
    parts = block.parts if isinstance(block, JoinedRows) else [(block, rows)]
    return {block.keys[row] for block, rows in parts for row in rows}


@given(
    st.lists(st.integers(-1, 6), min_size=1, max_size=80),
    st.floats(0.05, 0.9),
    st.integers(0, 9),
)
def test_each_class_is_split_by_the_fraction(labels, share, seed):
    labels = np.array(labels)
    reported = in_test_split(labels, share, seed)
    for label in np.unique(labels):
        rows = int((labels == label).sum())
        count = int(reported[labels == label].sum())
        assert abs(count - share * rows) < 1 or count in (1, rows - 1)
        assert rows == 1 or 0 < count < rows
    assert (reported == in_test_split(labels, share, seed)).all()
    assert not in_test_split(labels, 0.0, seed).any()


def test_validation_and_test_rows_are_disjoint_and_complete(world):
    world.build(test_fraction=0.5)
    choose, report = (opened(world, split) for split in Split)
    for one, other in (
        (choose.forget, report.forget),
        *((choose.utility[name], report.utility[name]) for name in choose.utility),
    ):
        assert not keys(one) & keys(other)
        assert (one.is_test, other.is_test) == (False, True)
    whole = DataBlock.open(world.store, world.manifest.evals["first"])
    (block, dealt), _ = choose.forget.images.block.parts
    assert block.where == whole.where
    seen = {whole.keys[row] for row in dealt} | keys(report.forget)
    seen |= keys(choose.utility["first"]) | keys(report.utility["first"])
    assert seen == set(whole.keys)


def test_few_images_to_choose_by_are_joined_by_some_of_the_forget_set(world):
    world.build(test_fraction=0.5)
    images = opened(world, Split.VALIDATION).forget.images
    (block, dealt), (own, drawn) = images.block.parts
    forget = DataBlock.open(world.store, world.manifest.forget)
    assert own.where == forget.where
    assert len(set(drawn.tolist())) == len(drawn)
    assert len(images) == min(ENOUGH_TO_CHOOSE, len(dealt) + forget.rows)
    whole = np.concatenate([block.take(dealt), own.take(drawn)])
    for rows in (images.rows, images.rows[::-1], images.rows[[0, -1, 0]], images.rows[:0]):
        np.testing.assert_array_equal(images.block.take(rows), whole[rows])
    with pytest.raises(IndexError):
        images.block.take([len(images)])
    assert not isinstance(opened(world, Split.TEST).forget.images.block, JoinedRows)


def test_a_test_source_leaves_all_other_rows_for_validation(world):
    world.build(tests={"first": world.sources["first"]}, test_fraction=0.0)
    choose, report = (opened(world, split) for split in Split)
    assert len(choose.utility["first"].images) == len(report.utility["first"].images) == 56
    assert (choose.forget.is_test, report.forget.is_test) == (False, True)
    assert not report.utility["second"].is_test
    assert "test first" in world.manifest.blocks()


def test_a_concept_that_cannot_be_split_is_marked(world):
    world.build(evals={"second": world.sources["second"]}, templates={}, test_fraction=0.5)
    choose, report = (opened(world, split) for split in Split)
    assert keys(choose.forget) == keys(report.forget)
    assert not report.forget.is_test
    assert report.utility["second"].is_test


def test_an_edit_is_measured_on_test_rows(world, monkeypatch):
    world.build(test_fraction=0.5)
    chosen_by = keys(opened(world, Split.VALIDATION).forget)
    looked_at = set()
    measure = Evaluator.measure

    def watched(probe, step):
        looked_at.update(keys(probe.evaluation.forget))
        return measure(probe, step)

    monkeypatch.setattr(Evaluator, "measure", watched)
    options = SearchOptions(layers=LAYERS, steps=4)
    result = search(world.store, world.name, options=options)
    assert looked_at == chosen_by
    report = opened(world, Split.TEST)
    report.base_pass((), cache_bytes=0)
    assert result.report.before.forget == report.forget.base_accuracy()
    edit = load_edit(world.store, world.name)
    assert (edit.header.layer, edit.header.step) == (result.chosen.layer, result.chosen.step)
    with torch.no_grad():
        report.model.get_parameter(edit.header.layer).add_(torch.from_numpy(edit.delta()))
    report.base_pass((), cache_bytes=0)
    after = result.report.after
    assert after.forget == report.forget.base_accuracy()
    assert after.utility == {n: g.base_accuracy() for n, g in report.utility.items()}
    assert (edit.header.forget, edit.header.utility) == (after.forget, after.utility)
    assert after.forget.is_test


@pytest.mark.parametrize(("budget", "times"), [(None, 1), (0, 2)])
def test_an_edited_vision_layer_is_reported_from_where_it_begins(budget, times, world, monkeypatch):
    """Images to report on run from their pixels for the original alone, if there is memory."""
    monkeypatch.setattr(zeroshot, "LEAST_ROWS", 1)
    world.build(test_fraction=0.5)
    embedded, embed, report = [], OpenClipVision.embed, searches.report_evaluation

    def counted(tower, x):
        embedded.append(len(x))
        return embed(tower, x)

    def reported(*given):
        embedded.clear()
        return report(*given)

    monkeypatch.setattr(OpenClipVision, "embed", counted)
    monkeypatch.setattr(searches, "report_evaluation", reported)
    layer = "visual.transformer.resblocks.1.mlp.c_proj.weight"
    options = SearchOptions(layers=[layer], steps=4, cache_budget=budget)
    result = search(world.store, world.name, options=options)
    rows = [group.rows for group in result.report.after.utility.values()]
    assert sum(embedded) == times * (sum(rows) + result.report.after.forget.rows)


def test_the_step_goes_beyond_the_shortest_by_the_overshoot(world):
    world.build(test_fraction=0.5)
    short, long = (
        search(
            world.store, world.name, options=SearchOptions(layers=LAYERS[:1], steps=6, overshoot=r)
        )
        for r in (1.0, 1.5)
    )
    assert short.forgotten
    forgetting = [t.step for t in short.trials.trials if t.forget.top5 == 0]
    assert long.chosen.step == pytest.approx(1.5 * min(forgetting))
    assert long.chosen.forget.top5 == 0


def test_a_class_may_lose_no_more_than_its_bound_where_a_step_avoids_it(world):
    world.build(test_fraction=0.5)

    def chosen(bound):
        options = SearchOptions(layers=LAYERS, steps=6, max_class_loss=bound, full=True)
        return search(world.store, world.name, options=options)

    free = chosen(100.0)
    lengthened = [
        trial
        for trial in free.trials.trials
        if trial.forget.top5 == 0 and trial.utility is not None
    ]
    losses = sorted({trial.worst.lost for trial in lengthened})
    least = chosen(losses[0])
    assert least.chosen.worst.lost <= free.chosen.worst.lost


def test_the_papers_choice_contradicts_other_choices():
    paper = SearchOptions(paper=True)
    assert (paper.criterion, paper.overshoot, paper.direction) == ("fa1", 1.0, "gradient")
    with pytest.raises(UsageError, match="--overshoot"):
        SearchOptions(paper=True, overshoot=2.0)
