"""Verdicts at their thresholds."""

from dataclasses import replace

import pytest

from slsgu_cli.records.method import Accuracy
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.studies import (
    NEW,
    Attack,
    Check,
    Curve,
    Finding,
    Point,
    ProbeFigures,
    VerifiedModel,
)
from slsgu_cli.verification import verdicts
from slsgu_cli.verification.relearn import OWN
from slsgu_cli.verification.verdicts import Exposure, Verdict, exposure, rows, verdict


def accuracy(top1):
    return Accuracy(top1, top1, 100)


def subject(*findings):
    return VerifiedModel("key", "a model", ModelSpec("m"), "weights", None, findings)


def curve(name, values, steps=(0, 1, 2, 4, 8)):
    points = tuple(Point(s, accuracy(v)) for s, v in zip(steps, values, strict=True))
    return Curve(name, "name", points, None)


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        (100, 0, Verdict.FORGOTTEN),
        (100, 10, Verdict.FORGOTTEN),
        (100, 11, Verdict.PARTLY_BACK),
        (100, 50, Verdict.PARTLY_BACK),
        (100, 51, Verdict.BACK),
        (40, 4, Verdict.FORGOTTEN),
        (40, 21, Verdict.BACK),
        (19, 0, Verdict.NOTHING),
    ],
)
def test_a_probe_is_judged_by_its_share_of_the_originals(before, after, said):
    assert verdict(accuracy(before), accuracy(after)) is said


def test_the_worst_template_stands_out_and_the_others_are_detail():
    names = ("all templates", "template: a {}", "template: b {}", "alias: x")
    before = Finding(
        Check.PARAPHRASE, "k", {}, tuple(ProbeFigures(n, accuracy(100)) for n in names)
    )
    values = (0, 3, 30, 0)
    probes = tuple(ProbeFigures(n, accuracy(v)) for n, v in zip(names, values, strict=True))
    found = rows(subject(before), subject(replace(before, probes=probes)))
    assert [row.detail for row in found] == [False, True, False, False]
    assert found[2].verdict is Verdict.PARTLY_BACK


def relearnt(own, new):
    before = Finding(
        Check.RELEARN, "k", {"shots": "8"}, curves=(curve(OWN, [100] * 5), curve(NEW, new))
    )
    after = replace(before, curves=(curve(OWN, own),))
    return rows(subject(before), subject(after))[0]


@pytest.mark.parametrize(
    ("own", "new", "said"),
    [
        ((0, 0, 0, 0, 5), (0, 0, 0, 0, 100), Verdict.FORGOTTEN),
        ((0, 0, 0, 0, 40), (0, 0, 0, 0, 60), Verdict.PARTLY_BACK),
        ((0, 0, 0, 0, 89), (0, 0, 0, 0, 60), Verdict.BACK),
        ((0, 0, 0, 0, 89), (0, 0, 0, 0, 100), Verdict.AS_NEW),
        ((0, 95, 0, 0, 5), (0, 0, 0, 0, 100), Verdict.BACK),
        ((0, 95, 100, 100, 100), (0, 0, 0, 0, 100), Verdict.BACK),
        ((0, 0, 0, 95, 100), (0, 0, 0, 0, 100), Verdict.AS_NEW),
        ((0, 0, 0, 0, 95), (0, 0, 0, 0, 60), Verdict.BACK),
    ],
)
def test_relearning_is_held_against_learning_a_new_name(own, new, said):
    assert relearnt(own, new).verdict is said


def test_relearning_names_both_steps():
    assert relearnt((0, 0, 95, 100, 100), (0, 0, 0, 0, 60)).note == (
        "back at step 2; a new name not within these steps"
    )


def test_finetuning_is_judged_where_most_came_back():
    before = Finding(Check.FINETUNE, "k", {}, curves=(curve(OWN, [100, 100, 80, 100, 100]),))
    after = replace(before, curves=(curve(OWN, [0, 0, 60, 30, 0]),))
    row = rows(subject(before), subject(after))[0]
    assert (row.before.top1, row.after.top1) == (80, 60)
    assert row.note == "most at step 2"
    assert row.verdict is Verdict.BACK


def test_what_only_one_model_went_through_is_not_judged():
    finding = Finding(Check.AUGMENT, "k", {}, (ProbeFigures("flip", accuracy(100)),))
    assert rows(subject(finding), subject()) == []


def test_an_attack_is_judged_by_what_it_has_above_chance():
    def found(mean, deviation=1.0):
        return Attack("loss", "held out", mean, deviation, 10, 10)

    assert exposure(found(70), found(50 + verdicts.CHANCE)) is Exposure.HIDDEN
    assert exposure(found(70), found(58, deviation=9)) is Exposure.HIDDEN
    assert exposure(found(70), found(20)) is Exposure.HIDDEN
    assert exposure(found(70), found(72)) is Exposure.SAME
    assert exposure(found(70), found(60)) is Exposure.LESS
    assert exposure(found(70), found(90)) is Exposure.MORE
    assert exposure(found(30), found(57)) is Exposure.MORE
