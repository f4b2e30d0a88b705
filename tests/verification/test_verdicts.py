"""Verdicts at their thresholds."""

from dataclasses import replace

import pytest

from slsgu_cli.records.figures import Accuracy, difference
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import (
    NEUTRAL,
    NEW,
    OWN,
    Attempt,
    Check,
    ClassifierScore,
    Curve,
    Finding,
    KnownClass,
    MembershipScore,
    Point,
    Retrieval,
    Retrieved,
    Shift,
    Variant,
    VerifiedModel,
)
from slsgu_cli.verification.checks.membership import Exposure, exposure
from slsgu_cli.verification.checks.nearest import losses, most_harmed, nearest_names
from slsgu_cli.verification.checks.probe import CONCEPT, LINEAR, OTHERS
from slsgu_cli.verification.checks.retrieval import BY_NAME, NEW_INDEX, OLD_INDEX
from slsgu_cli.verification.results import conclusion, verdict_rows
from slsgu_cli.verification.verdicts import CHANCE, Verdict, verdict


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
def test_a_variant_is_judged_relative_to_the_original(before, after, said):
    assert verdict(accuracy(before), accuracy(after)) is said


def test_the_worst_template_stands_out_and_the_others_are_detail():
    names = ("all templates", "template: a {}", "template: b {}", "alias: x")
    before = Finding(Check.PARAPHRASE, "k", {}, tuple(Variant(n, accuracy(100)) for n in names))
    values = (0, 3, 30, 0)
    variants = tuple(Variant(n, accuracy(v)) for n, v in zip(names, values, strict=True))
    found = verdict_rows(subject(before), subject(replace(before, variants=variants)))
    assert [row.detail for row in found] == [False, True, False, False]
    assert found[2].verdict is Verdict.PARTLY_BACK


def attempts(own, neutral):
    """Return a finding of an attack of two starts, the better one of these figures."""
    made = ((OWN, 0.5, own), (OWN, 0.9, 100), (NEUTRAL, 0.5, neutral), (NEUTRAL, 0.9, 100))
    return Finding(
        Check.PREFIX,
        "k",
        {"attack_tokens": "5"},
        attempts=tuple(Attempt(name, "words", loss, accuracy(top1)) for name, loss, top1 in made),
    )


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((100, 20), (5, 0), Verdict.FORGOTTEN),
        ((15, 0), (90, 0), Verdict.NOTHING),
        ((100, 90), (95, 90), Verdict.AS_CONTROL),
        ((100, 20), (70, 75), Verdict.AS_CONTROL),
        ((100, 20), (60, 40), Verdict.PARTLY_BACK),
        ((100, 20), (90, 20), Verdict.BACK),
        # Where the original's name adds nothing, all that it adds here is more.
        ((90, 95), (90, 10), Verdict.BACK),
    ],
)
def test_an_attack_is_judged_by_what_the_name_adds_to_it(before, after, said):
    (row,) = verdict_rows(subject(attempts(*before)), subject(attempts(*after)))
    assert row.verdict is said
    assert row.variant == "5 words before it"
    assert (row.before.top1, row.after.top1) == (before[0], after[0])
    assert (row.original_control.top1, row.control.top1) == (before[1], after[1])
    assert row.brings_back is (said in (Verdict.PARTLY_BACK, Verdict.BACK))
    original = difference(row.before, row.original_control)
    assert row.note == f"the name adds {row.added}; to the original's {original}"


def test_a_skipped_attack_has_no_line():
    skipped = Finding(Check.PREFIX, "k", {}, skipped="its text tower is run as a whole")
    assert verdict_rows(subject(attempts(100, 0)), subject(skipped)) == []


def typos(**values):
    figures = (Variant(name, accuracy(value)) for name, value in values.items())
    return Finding(Check.TYPOS, "k", {}, tuple(figures))


def test_typos_are_judged_by_those_that_the_original_reads():
    before, after = typos(a=100, b=50, c=0), typos(a=0, b=30, c=40)
    mean, *each = verdict_rows(subject(before), subject(after))
    assert (mean.variant, mean.before.top1, mean.after.top1) == ("2 of 3, mean", 75, 15)
    assert [row.detail for row in each] == [True, False, True]
    unread = verdict_rows(subject(typos(a=0, b=10)), subject(typos(a=0, b=3)))
    assert [row.variant for row in unread] == ["2 of 2, mean", "a", "b"]
    assert {row.verdict for row in unread} == {Verdict.NOTHING}


def relearning(own, new):
    before = Finding(
        Check.RELEARN, "k", {"shots": "8"}, curves=(curve(OWN, [100] * 5), curve(NEW, new))
    )
    return before, replace(before, curves=(curve(OWN, own),))


def relearnt(own, new):
    before, after = relearning(own, new)
    (row,) = verdict_rows(subject(before), subject(after))
    return row


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
def test_relearning_is_compared_with_learning_a_new_name(own, new, said):
    assert relearnt(own, new).verdict is said


def test_relearning_names_both_steps():
    assert relearnt((0, 0, 95, 100, 100), (0, 0, 0, 0, 60)).note == (
        "back at step 2; a new name not within these steps"
    )


def test_finetuning_is_judged_where_most_came_back():
    before = Finding(Check.FINETUNE, "k", {}, curves=(curve(OWN, [100, 100, 80, 100, 100]),))
    after = replace(before, curves=(curve(OWN, [0, 0, 60, 30, 0]),))
    row = verdict_rows(subject(before), subject(after))[0]
    assert (row.before.top1, row.after.top1) == (80, 60)
    assert row.note == "most at step 2"
    assert row.verdict is Verdict.BACK


def test_an_attack_is_judged_by_what_it_has_above_chance():
    def found(mean, deviation=1.0):
        return MembershipScore("loss", "held out", mean, deviation, 10, 10)

    assert exposure(found(70), found(50 + CHANCE)) is Exposure.HIDDEN
    assert exposure(found(70), found(58, deviation=9)) is Exposure.HIDDEN
    assert exposure(found(70), found(20)) is Exposure.HIDDEN
    assert exposure(found(70), found(72)) is Exposure.SAME
    assert exposure(found(70), found(60)) is Exposure.LESS
    assert exposure(found(70), found(90)) is Exposure.MORE
    assert exposure(found(30), found(57)) is Exposure.MORE


def probed(check, **values):
    """Return findings of the original and of the other model, FA@1 by probe."""
    names = {name.replace("_", " "): pair for name, pair in values.items()}
    return tuple(
        Finding(check, "k", {}, tuple(Variant(n, accuracy(p[i])) for n, p in names.items()))
        for i in range(2)
    )


def concluded(*pairs, edit=None):
    sides = [subject(*(pair[place] for pair in pairs)) for place in range(2)]
    return conclusion("facebook", sides[0], replace(sides[1], edit=edit))


def test_a_concept_that_does_not_come_back_has_a_bound():
    found = concluded(probed(Check.BASELINE, as_it_is=(97, 0)), probed(Check.AUGMENT, flip=(90, 0)))
    assert found.strongest is None
    assert found.text == (
        "None of 1 attempt brings facebook back: 0 of 100 images (95% upper bound: 3.0%)."
    )


def test_test_images_are_named():
    before, after = probed(Check.BASELINE, as_it_is=(97, 0))
    measured = replace(accuracy(0), rows=16, is_test=True)
    after = replace(after, variants=(Variant("as it is", measured),))
    assert concluded((before, after)).text == (
        "The model names facebook for 0 of 16 test images (95% upper bound: 17.1%)."
    )


def test_the_strongest_is_the_furthest_beyond_its_control():
    augment = probed(Check.AUGMENT, flip=(90, 30), blur=(10, 90))
    assert concluded(augment).strongest.variant == "flip"
    # Half of what relearning brings back, a made-up name learns as well.
    found = concluded(augment, relearning((0, 0, 60, 90, 90), (0, 0, 40, 60, 62)))
    assert found.strongest.variant == "flip"
    assert found.text.startswith(
        "Strongest of 2 attempts to bring facebook back: changed images (flip). 30% of its "
        "images get its name (original: 90%)."
    )
    found = concluded(augment, relearning((0, 5, 60, 90, 90), (0, 0, 0, 50, 90)))
    assert (found.strongest.variant, found.strongest.gain) == ("2 steps, 8 shots", 60)
    assert (
        "training on its images (2 steps, 8 shots). 60% of its images get its name, against 0% "
        "for a made-up name (original: "
    ) in found.text


def test_an_attack_counts_only_beyond_its_control():
    # The line is of the last step, at which most is back, not of one at which nothing is.
    found = concluded(
        probed(Check.AUGMENT, flip=(90, 1)), relearning((0, 0, 0, 50, 62), (0, 0, 20, 58, 60))
    )
    assert found.strongest is None
    assert found.text == (
        "None of 2 attempts brings facebook back beyond chance. Strongest: training on its images "
        "(8 steps, 8 shots), 62%, against 60% for a made-up name. The name adds +2.0 points (95% "
        "interval -12.1 to +16.0), which may be chance."
    )


def test_a_word_search_is_mentioned_after_a_stronger_attempt():
    attacked = attempts(90, 70), attempts(78, 65)
    words = (
        "A word search with access to the weights finds it too: 5 words before it, 78%, against "
        "65% for another word in its place; the name adds +13.0 points (95% interval -0.2 to "
        "+25.7)."
    )
    assert words in concluded(attacked, probed(Check.AUGMENT, flip=(90, 30))).text
    found = concluded(attacked)
    assert found.strongest is None
    assert "searching words (5 words before it), 78%, against 65%" in found.text
    assert "The name adds +13.0 points (95% interval -0.2 to +25.7), which may be" in found.text
    assert "A word search" not in found.text
    assert "A word search" not in concluded((attempts(90, 0), attempts(90, 0))).text


def test_a_single_image_does_not_bring_a_concept_back():
    found = concluded(probed(Check.AUGMENT, flip=(90, 1)))
    assert found.strongest is None
    assert "beyond chance. Strongest: changed images (flip), 1 of 100 images (1.0%;" in found.text


def looks(was, now):
    return tuple(
        Finding(
            Check.PROBE,
            "k",
            {},
            classifiers=(
                ClassifierScore(LINEAR, CONCEPT, 90, 99.0, recall, 30, 900),
                ClassifierScore(LINEAR, OTHERS, 12, 95.0, 94.0, 60, 900),
            ),
        )
        for recall in (was, now)
    )


@pytest.mark.parametrize(
    ("was", "now", "said"),
    [
        (98, 97, "still finds 97% of its images (original: 98%; other classes: 94%)"),
        (98, 97, "the look remains in the image tower"),
        (98, 40, "part of the look remains"),
        (98, 5, "little of the look remains"),
        (10, 10, "says nothing"),
    ],
)
def test_the_image_tower_is_compared_with_the_probe_before_the_edit(was, now, said):
    assert said in concluded(looks(was, now)).text


def index(identical, far, precision):
    def found(old, moved):
        queries = tuple(
            Retrieved(BY_NAME, index, value, 0.0, 0.0, 0.0, 3, 100)
            for index, value in ((NEW_INDEX, old), (OLD_INDEX, precision))
        )
        return Finding(Check.RETRIEVAL, "k", {}, retrieval=Retrieval(queries, moved))

    still = (Shift("its images", 20, 20, 0, 0.0, 0.0), Shift("other images", 80, 80, 0, 0.0, 0.0))
    now = (
        Shift("its images", 20, identical, 20 if far else 0, 0.1, 0.2),
        Shift("other images", 80, 4 * identical, far, 0.1, 0.2),
    )
    return found(90.0, still), found(1.0, now)


def test_an_edit_says_whether_an_index_stays_valid():
    assert "an image index stays valid" in concluded(index(20, 0, 1.0)).text
    stale = concluded(index(0, 10, 90.0)).text
    assert "30% of image features moved by more than 0.01 (100% of its own)" in stale
    assert "still answers to its name (mean average precision 90%, before 90%)" in stale
    assert concluded(index(0, 10, 2.0)).text.endswith("rebuild an index made before the edit.")


def classes(**known):
    """Return findings of classes: rows, TA@1 before and after, cosine."""
    return tuple(
        Finding(
            Check.NEAREST,
            "k",
            {},
            classes={
                "brands": tuple(
                    KnownClass(name, rows, ta[place], cosine)
                    for name, (rows, ta, cosine) in known.items()
                )
            },
        )
        for place in range(2)
    )


def test_the_class_that_lost_most_is_named_if_it_has_enough_images():
    pair = classes(
        tumblr=(18, (94, 67), 0.5),
        figma=(4, (100, 0), 0.4),
        npm=(10, (70, 80), 0.3),
        ubuntu=(30, (93, 33), 0.1),
    )
    known = losses(subject(pair[0]), subject(pair[1]))
    assert [row.name for row in most_harmed(known)] == ["ubuntu", "tumblr"]
    assert [row.name for row in nearest_names(known)["brands"]] == [
        "tumblr",
        "figma",
        "npm",
        "ubuntu",
    ]
    assert concluded(pair).text.endswith(
        "Of the classes with at least 5 images, ubuntu lost most: TA@1 on its 30 images fell from "
        "93% to 33%."
    )
    unharmed = classes(npm=(10, (70, 80), 0.3))
    assert "No class with at least 5 images lost accuracy" in concluded(unharmed).text


def test_only_variants_of_the_same_check_on_both_models_are_compared():
    before, after = probed(Check.AUGMENT, flip=(90, 30))
    assert verdict_rows(subject(before), subject()) == []
    other = replace(after, settings={"seed": "1"})
    assert verdict_rows(subject(before), subject(other)) == []
    fewer = replace(before, variants=())
    assert verdict_rows(subject(fewer), subject(after)) == []
