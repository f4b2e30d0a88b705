import re
from dataclasses import replace
from itertools import pairwise
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reports import CHOSEN, FRONT, HOSTILE, LAYERS, fill, score

from slsgu_cli.figures.html import (
    HEIGHT,
    WIDTH,
    front_chart,
    legend,
    line_chart,
    linear,
    logarithmic,
    step_series,
)
from slsgu_cli.records.directions import FALLBACK
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import Tower, Trials
from slsgu_cli.store.store import Store

SCORES = [score(layer) for layer in LAYERS]


@pytest.fixture(scope="module")
def trials(tmp_path_factory):
    store = Store(str(tmp_path_factory.mktemp("store")))
    fill(store)
    return store.read_record("trials/mouse.json", Trials)


def circles(svg):
    root = ElementTree.fromstring(svg)
    return [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]


@given(st.lists(st.just(0.0) | st.floats(1e-30, 1e6), min_size=1, max_size=20))
def test_scales_keep_order_and_stay_inside(values):
    for scale in (
        logarithmic(values, start=50, end=450),
        linear(min(values), max(values), start=50, end=450),
    ):
        places = [scale.place(value) for value in sorted(values)]
        assert places == sorted(places)
        assert all(49.9 <= place <= 450.1 for place in places)
        assert 1 <= len(scale.ticks) <= 13
        assert all(49.9 <= scale.place(value) <= 450.1 for value, _ in scale.ticks)


def test_every_layer_of_the_tower_is_a_point_that_tells_its_name():
    svg = front_chart(SCORES, Tower.VISION)
    root = ElementTree.fromstring(svg)
    titles = [title.text for title in root.iter("title")]
    assert len(titles) == 36 == len(circles(svg))
    assert any(title.startswith("visual.0.mlp.c_proj: importance") for title in titles)
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in circles(svg))
    numbers = [text.text for text in root.iter("text") if text.get("class") == "number"]
    assert sorted(numbers) == ["1", "2", "3"]
    # Who sees no picture is told the front in words.
    assert root.get("role") == "img"
    assert "1 visual.0.mlp.c_proj, 2 visual.6.mlp.c_fc" in root.get("aria-label")


def test_signed_and_zero_alignments_have_a_place():
    signed = [replace(score, alignment=-score.alignment) for score in SCORES]
    zero = [replace(SCORES[0], alignment=0.0), *SCORES[1:]]
    for scores in (signed, zero):
        assert all(0 <= x <= WIDTH for x, _ in circles(front_chart(scores, Tower.VISION)))


def test_steps_are_drawn_from_the_original_model_on(trials):
    series = step_series(trials, (CHOSEN, FALLBACK))
    labels = ["FA@1", "FA@5", "TA@1 brands", "TA@1 objects <b>"]
    assert [one.label for one in series] == labels
    fa = series[0]
    assert fa.points[0] == (0.0, trials.baseline_forget.top1)
    assert [share for share, _ in fa.points] == sorted(share for share, _ in fa.points)
    svg = line_chart(series, "step", chosen=15.0, description="told")
    assert len(circles(svg)) == sum(len(one.points) for one in series)
    ElementTree.fromstring(svg)
    assert "TA@1 objects &lt;b&gt;" in legend(series)


def test_a_search_that_only_doubled_is_drawn_on_a_logarithmic_axis(trials):
    (first, *_) = [trial for trial in trials.trials if trial.layer == FRONT[0]]
    doubled = [
        replace(first, share=0.1 * 2**n, step=2.0**n, forget=Accuracy(90.0 - n, 100.0, 33))
        for n in range(10)
    ]
    series = step_series(replace(trials, trials=tuple(doubled)), (FRONT[0], FALLBACK))
    places = sorted({x for x, _ in circles(line_chart(series, "step", description=""))})
    gaps = [b - a for a, b in pairwise(places[1:])]
    assert max(gaps) < 1.05 * min(gaps)


def test_charts_hold_colours_of_the_page_alone(trials):
    for svg in (
        front_chart(SCORES, Tower.TEXT),
        line_chart(step_series(trials, (CHOSEN, FALLBACK)), "step", description=""),
    ):
        assert not re.search(r"#[0-9a-f]{3,6}|rgb|style=", svg)
        assert HOSTILE not in svg
