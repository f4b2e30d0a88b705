import re
from xml.etree import ElementTree

import pytest
from reports import CHOSEN, HOSTILE, LAYERS, NAME, fill, fill_verification, score

from slsgu_cli.records.directions import FALLBACK
from slsgu_cli.records.method import Tower, Trials
from slsgu_cli.records.verification import Check, Verification
from slsgu_cli.report.charts import VARIABLES, front_chart, step_chart, training_chart
from slsgu_cli.store.store import Store

SCORES = [score(layer) for layer in LAYERS]
OF_VISION = [one for one in SCORES if one.tower is Tower.VISION]

pytestmark = pytest.mark.usefixtures("drawing")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(str(tmp_path_factory.mktemp("store")))
    fill(store)
    fill_verification(store)
    return store


@pytest.fixture(scope="module")
def trials(store):
    return store.read_record(f"trials/{NAME}.json", Trials)


def texts(chart):
    namespace = "{http://www.w3.org/2000/svg}"
    return [
        "".join(text.itertext()) for text in ElementTree.fromstring(chart).iter(f"{namespace}text")
    ]


def test_the_front_is_numbered_and_described_in_words():
    chart = front_chart(OF_VISION, "vision tower")
    assert {"1", "2", "3"} <= {*texts(chart)}
    assert "4" not in texts(chart)
    root = ElementTree.fromstring(chart)
    assert root.get("role") == "img"
    assert "the 36 layers of the vision tower" in root.get("aria-label")
    assert "1 visual.0.mlp.c_proj, 2 visual.6.mlp.c_fc" in root.get("aria-label")


def test_steps_have_a_line_for_each_accuracy_and_one_for_the_chosen_step(trials):
    drawn = texts(step_chart(trials, (CHOSEN, FALLBACK), chosen=1.5))
    labels = ("FA@1", "FA@5", "TA@1 brands", "TA@1 objects <b>", "chosen step 1.5")
    assert {*labels, "accuracy, %"} <= {*drawn}
    assert "chosen step 1.5" not in texts(step_chart(trials, (CHOSEN, FALLBACK)))


def test_training_draws_both_models_and_the_new_name(store):
    models = store.read_record(f"verifications/{NAME}.json", Verification).subjects
    drawn = texts(training_chart(models, Check.RELEARN, "description"))
    assert {"original", "edit", "original, a new name", "training steps"} <= {*drawn}


def test_charts_follow_the_colours_of_the_page(trials):
    for chart in (front_chart(OF_VISION, "vision tower"), step_chart(trials, (CHOSEN, FALLBACK))):
        assert not [grey for grey in VARIABLES if grey in chart]
        assert "var(--ink)" in chart
        # Black text would vanish on a dark page.
        assert "#000000" not in chart
        assert HOSTILE not in chart


def test_ids_differ_between_charts_and_every_reference_has_its_target(trials):
    charts = [front_chart(OF_VISION, "vision tower"), step_chart(trials, (CHOSEN, FALLBACK))]
    ids = [re.findall(r' id="([^"]+)"', chart) for chart in charts]
    for chart, own in zip(charts, ids, strict=True):
        used = {*re.findall(r'(?:xlink:href="#|url\(#)([^")]+)', chart)}
        assert used == {*own} and len(own) == len({*own})
    assert not {*ids[0]} & {*ids[1]}
