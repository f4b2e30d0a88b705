"""Searches on targets choose by validation prompts and rows and report test ones, on stand-ins."""

import io
import re
from dataclasses import replace

import numpy as np
import pytest
import tiny_targets
from tiny_clip import COLOURS, SHAPES

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.cli.console import Console
from slsgu_cli.cli.search_on_target import require_reached, show_target_search
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.errors import NotForgottenError, UsageError
from slsgu_cli.records.comparison import PipelineCompareOptions
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.figures import Share
from slsgu_cli.records.sets import ModelSpec, Split
from slsgu_cli.records.targets import Budget, GradientOf, HeldOutBudget, TargetSearchOptions
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.targets.ask import sample_pictures
from slsgu_cli.targets.judged_prompts import REPORTED, SEARCHED, JudgedPrompts, prompts_for
from slsgu_cli.targets.models import Llava, Pipeline
from slsgu_cli.targets.search import PARTS, search_target
from slsgu_cli.targets.subjects import PipelineSubject, Questions

NAMES = (*COLOURS, *SHAPES)
# Shares of a layer's norm: the concept is gone at the first in searched prompts, and at the
# second in reported ones; other classes are gone at the third.
SEARCHED_UP_TO, REPORTED_UP_TO, OTHERS_UP_TO = 0.5, 0.6, 5.0
JUDGES = (ModelSpec("plain"), ModelSpec("strict"))
BUDGET = Budget(concept=10, others=8)
HELD_OUT = HeldOutBudget(concept=14, others=6)


def is_reported(job):
    return any(job.prompt == prompt.replace("{}", name) for prompt in REPORTED for name in NAMES)


def lasts(job, name, others=OTHERS_UP_TO):
    if name != "blue":
        return others
    return REPORTED_UP_TO if job and is_reported(job) else SEARCHED_UP_TO


@pytest.fixture(scope="module")
def module(tiny_model):
    return load(resolve(tiny_model), "cpu")


@pytest.fixture
def sd(module, world, tmp_path, monkeypatch):
    """A function that puts a Painter in the place of a pipeline's folder."""
    text = tiny_targets.tower(module.state_dict(), "text")
    folder = tiny_targets.pipeline(
        tmp_path / "sd", "StableDiffusionPipeline", {"text_encoder": ("CLIPTextModel", text)}
    )
    monkeypatch.setattr("slsgu_cli.targets.judge.Judge.load", tiny_targets.pixel_judge)

    def made(lasts=lasts):
        painter = tiny_targets.Painter(folder, module, NAMES, lasts)
        monkeypatch.setattr(Pipeline, "load", lambda *_, **__: painter)
        # A Painter looks at the weights, and reads no text.
        monkeypatch.setattr(PipelineSubject, "fixed_inputs", lambda *_: {})
        return painter

    made.options = TargetSearchOptions(
        target=folder,
        direction=Direction.GRADIENT,
        budget=BUDGET,
        test=HELD_OUT,
        top=2,
        judges=JUDGES[:1],
        overshoot=1.5,
        device="cpu",
    )
    return made


def reported_jobs(painter):
    return [job for job in painter.jobs if is_reported(job)]


def test_validation_and_test_prompts_are_disjoint_for_all_templates():
    assert {p.format("x") for p in SEARCHED}.isdisjoint(p.format("x") for p in REPORTED)
    for templates in (("an icon of {}",), REPORTED, ("The {}.", "A  simple {}", "a {}")):
        assert prompts_for(Split.TEST, templates) == REPORTED
        rest = [template for template in templates if template == "an icon of {}"]
        assert prompts_for(Split.VALIDATION, templates) == (*SEARCHED, *rest)


def test_a_report_uses_no_prompt_or_seed_of_the_search():
    judge = tiny_targets.pixel_judge(JUDGES[0], dict.fromkeys(NAMES, ("{}",)))
    templates = ("{}", "an icon of {}")
    searched = JudgedPrompts([judge], ["blue"], judge.names, Budget(), templates, Split.VALIDATION)
    usual = [
        TargetSearchOptions(target="sd").test_budget,
        PipelineCompareOptions(target="sd").budget,
    ]
    for reports in (
        replace(searched, budget=replace(budget, concept=1200), split=Split.TEST)
        for budget in usual
    ):
        for attribute in ("prompt", "seed"):
            both = (
                {getattr(prompt, attribute) for prompt in (*part.of_concept, *part.of_others)}
                for part in (searched, reports)
            )
            assert set.isdisjoint(*both)
        assert {prompt.label for prompt in reports.of_concept} == {"blue"}
        assert "blue" not in {prompt.label for prompt in reports.of_others}


def test_figures_are_measured_on_test_images(sd, world):
    painter = sd()
    result = search_target(world.store, "blue", options=sd.options)
    figures = load_edit(world.store, "blue@sd").header.target
    assert figures == result.figures and figures.is_test
    assert result.forgotten and result.chosen.concept.percent <= 10
    jobs = reported_jobs(painter)
    assert len(jobs) == 2 * (HELD_OUT.concept + HELD_OUT.others)
    searched = [job for job in painter.jobs if not is_reported(job)]
    assert {job.seed for job in jobs}.isdisjoint(job.seed for job in searched)
    assert figures.before.concept == Share(14, 14) and figures.after.concept == Share(0, 14)
    assert figures.before.others == figures.after.others == Share(6, 6)
    # Without an overshoot, validation images are forgotten, and test images are not.
    short = search_target(world.store, "blue", options=replace(sd.options, overshoot=1.0))
    assert short.forgotten and short.chosen.concept.count == 0
    assert short.figures.after.concept == Share(14, 14)


def test_a_step_overshoots_the_shortest_that_reaches_the_goal(sd, world):
    sd()
    result = search_target(world.store, "blue", options=sd.options)
    tried = [t for t in result.trials.trials if t.layer == result.chosen.layer]
    enough = min(trial.step for trial in tried if trial.concept.count == 0)
    assert result.chosen.step == pytest.approx(1.5 * enough)
    short = max(trial.share for trial in tried if trial.concept.count)
    shortest = result.chosen.share / 1.5
    assert short < SEARCHED_UP_TO <= shortest <= short / 0.9


@pytest.mark.parametrize("others", [0.7, 0.6])
def test_the_overshoot_is_reduced_if_others_would_lose_too_much(sd, world, others):
    sd(lambda job, name: lasts(job, name, others))
    options = replace(sd.options, top=1)
    result = search_target(world.store, "blue", options=options)
    enough = min((t for t in result.trials.trials if t.concept.count == 0), key=lambda t: t.step)
    parts = [part for part in PARTS if enough.share * (1 + 0.5 * part) < others]
    assert result.chosen.step == pytest.approx(enough.step * (1 + 0.5 * parts[0]))
    assert parts[0] < 1 and result.chosen.others.count == 8
    whole = search_target(world.store, "blue", options=replace(options, max_loss=100))
    assert whole.chosen.step == pytest.approx(1.5 * enough.step)


def test_others_come_first_if_every_step_to_the_goal_costs_them_too_much(sd, world):
    sd(lambda job, name: lasts(job, name, 0.5))
    options = replace(sd.options, top=1)
    result = search_target(world.store, "blue", options=options)
    borne = [t for t in result.trials.trials if t.others and t.others.count == 8]
    assert result.chosen == max(borne, key=lambda trial: trial.step)
    assert 0.4 < result.chosen.share < 0.5
    with pytest.raises(NotForgottenError, match="costing other classes at most 5 points"):
        require_reached(result)
    whole = search_target(world.store, "blue", options=replace(options, max_loss=100))
    assert whole.forgotten and whole.chosen.others.count == 0


def test_a_search_stops_at_a_layer_without_a_loss_of_others(sd, world):
    sd()
    first = search_target(world.store, "blue", options=sd.options)
    assert {trial.layer for trial in first.trials.trials} == {first.chosen.layer}
    assert first.chosen.layer == next(iter(first.trials.importance))
    # A full search measures another layer, and chooses the same.
    full = search_target(world.store, "blue", options=replace(sd.options, full=True))
    assert len({trial.layer for trial in full.trials.trials}) == 2
    assert full.chosen == first.chosen


def test_trials_that_miss_the_goal_end_early_without_changing_the_choice(sd, world):
    painter = sd()
    first = search_target(world.store, "blue", options=sd.options)
    missed = [t.concept for t in first.trials.trials if t.concept.count]
    assert missed and all(concept == Share(8, 8) for concept in missed)
    before = len(painter.jobs)
    full = search_target(world.store, "blue", options=replace(sd.options, full=True))
    assert all(trial.concept.total == 10 for trial in full.trials.trials)
    assert (full.chosen, full.figures) == (first.chosen, first.figures)
    assert len(painter.jobs) > before
    # For a goal that they might reach, they are measured whole as well.
    lower = replace(sd.options, goal=0.0, top=1, steps=2)
    world.store.remove(Artifact.TARGET_TRIALS.path("blue@sd"))
    search_target(world.store, "blue", options=sd.options)
    again = search_target(world.store, "blue", options=lower)
    assert all(trial.concept.total == 10 for trial in again.trials.trials if trial.others)


def test_a_second_judge_adds_figures_and_does_not_change_the_search(sd, world):
    sd()
    alone = search_target(world.store, "blue", options=sd.options)
    both = search_target(world.store, "blue", options=replace(sd.options, judges=JUDGES))
    assert (both.chosen, both.reused) == (alone.chosen, len(alone.trials.trials))
    (strict,) = both.figures.further
    assert (both.figures.judge, strict.judge) == ("plain", "strict")
    assert both.figures.after == alone.figures.after
    assert strict.after.concept == Share(14, 14) != both.figures.after.concept
    strictly = search_target(world.store, "blue", options=replace(sd.options, judges=JUDGES[::-1]))
    assert strictly.figures.after.concept.count == 0 < strictly.chosen.step - both.chosen.step


def test_a_repeated_search_generates_only_images_of_new_reports(sd, world):
    first = search_target(world.store, "blue", options=(sd(), sd.options)[1])
    painter = sd()
    assert replace(search_target(world.store, "blue", options=sd.options), reused=0) == first
    assert painter.jobs == []
    more = replace(sd.options, test=HeldOutBudget(concept=21, others=1))
    result = search_target(world.store, "blue", options=more)
    assert result.figures.after.concept == Share(0, 21)
    assert len(painter.jobs) == len(reported_jobs(painter)) == 2 * 22
    assert result.trials.seconds == first.trials.seconds


@pytest.fixture
def llava(module, world, tmp_path, monkeypatch):
    """A function that puts an Answerer in the place of a LLaVA's folder."""
    folder = tiny_targets.llava(tmp_path / "llava", module.state_dict(), "vision_tower.")
    monkeypatch.setattr("slsgu_cli.targets.search.by_gain", lambda _, moves, gradients: moves)

    def made():
        labels = {}
        for ref in world.manifest.evals.values():
            block = DataBlock.open(world.store, ref)
            images = block.take(np.arange(block.rows))
            labels |= {
                image.tobytes(): block.class_names[label]
                for image, label in zip(images, block.labels, strict=True)
            }
        forget = DataBlock.open(world.store, world.manifest.forget)
        labels |= {image.tobytes(): "blue" for image in forget.take(np.arange(forget.rows))}
        answerer = tiny_targets.Answerer(folder, module, labels, lambda name: lasts(None, name))
        monkeypatch.setattr(Llava, "load", lambda *_, **__: answerer)
        return answerer

    made.options = TargetSearchOptions(
        target=folder,
        direction=Direction.GRADIENT,
        gradient_of=GradientOf.CLIP,
        top=1,
        budget=replace(BUDGET, concept=6),
        test=HELD_OUT,
        overshoot=1.5,
        device="cpu",
    )
    return made


def keys(questions):
    return {key for keys in questions.images for key in keys}


def test_questions_of_a_search_and_of_a_report_are_about_different_rows(world):
    world.build(test_fraction=0.5)
    budget = Budget(concept=30, others=20, questions=("What?", "Which?"))
    choose, report = (Questions.about(world.store, world.manifest, p, budget) for p in Split)
    assert keys(choose).isdisjoint(keys(report))
    colours = DataBlock.open(world.store, world.manifest.evals["first"])
    shown = int((colours.labels == colours.class_names.index("blue")).sum())
    assert len(report.of_concept) == 2 * (shown // 2) < 2 * 30
    # Images of the forget set complete the validation images, not the test images.
    forget = set(DataBlock.open(world.store, world.manifest.forget).keys)
    assert set(choose.images[-1]) <= forget and keys(report).isdisjoint(forget)
    assert len(choose.of_concept) == 2 * (shown - shown // 2 + len(choose.images[-1]))
    for questions in (choose, report):
        assert {question.label for question in questions.of_concept} == {"blue"}
        assert len(questions.of_others) == 2 * 20
        assert "blue" not in {question.label for question in questions.of_others}


@pytest.mark.parametrize("share", [0.5, 0.0])
def test_figures_of_a_llava_are_measured_on_test_rows(llava, world, share):
    world.build(test_fraction=share)
    answerer = llava()
    result = search_target(world.store, "blue", options=llava.options)
    report = Questions.about(world.store, world.manifest, Split.TEST, llava.options.test_budget)
    asked = [*report.of_concept, *report.of_others]
    assert answerer.questions[-len(asked) :] == [(q.image.tobytes(), q.text) for q in asked]
    searched = {image for image, _ in answerer.questions[: -2 * len(asked)]}
    assert searched.isdisjoint(q.image.tobytes() for q in asked) is (share > 0)
    assert result.figures.is_test is (share > 0)
    assert result.figures.after.concept == Share(0, len(report.of_concept))
    assert result.figures.before.concept == Share(len(report.of_concept), len(report.of_concept))
    with pytest.raises(UsageError, match="answers in words"):
        search_target(world.store, "blue", options=replace(llava.options, judges=JUDGES[:1]))


def test_sample_pictures_are_test_rows(world):
    world.build(test_fraction=0.5)
    shown = [picture.name for picture in sample_pictures(world.store, "blue", 50)]
    budget = Budget(concept=500, others=500)
    choose = Questions.about(world.store, world.manifest, Split.VALIDATION, budget)
    assert shown and keys(choose).isdisjoint(shown)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def shown(store, result, verbosity):
    console = Console(verbosity=verbosity, _stdout=Terminal())
    show_target_search(console, store, result)
    return console._stdout.getvalue()


def test_printed_figures_are_of_the_test_split_and_with_v_of_both(sd, world):
    sd()
    options = replace(sd.options, judges=JUDGES)
    result = search_target(world.store, "blue", options=options)
    brief, all_of_it = (shown(world.store, result, verbosity) for verbosity in (0, 1))
    words = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", all_of_it).split())
    assert "importance" not in brief
    assert "on the validation split" in words
    figures, same = (
        [line.split() for line in text.splitlines() if line.startswith(("UA  ", "IRA  "))]
        for text in (brief, all_of_it)
    )
    assert "importance" in all_of_it and figures == same
    assert [(line[1], line[3], line[5]) for line in figures] == [
        ("plain", "100.0%", "14"),
        ("plain", "100.0%", "6"),
        ("strict", "0.0%", "14"),
        ("strict", "100.0%", "6"),
    ]
    assert figures[0][6:] == ["76.8", "to", "100.0%"]
