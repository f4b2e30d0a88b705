import dataclasses
import json
import math
import os
import subprocess
import sys
import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from places import ROOT

from slsgu_cli.errors import StaleError
from slsgu_cli.records import comparison, method, sets, studies
from slsgu_cli.records.codec import canonical_json, decode, digest, encode
from slsgu_cli.records.directions import FALLBACK
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import LayerScore, ParameterNorm, Ranking, Tower, Trial
from slsgu_cli.records.sets import ModelSpec

KINDS = sorted(
    {
        kind
        for kind in (
            *vars(method).values(),
            *(ModelSpec, sets.InputSpec, sets.DataRef, sets.SetManifest),
            *(studies.JointMove, studies.JointTrial, studies.JointSearch),
            *(studies.SweepRow, studies.Sweep),
            *(comparison.ClipComparison, comparison.ClipOutcome),
            *(comparison.PipelineComparison, comparison.PipelineOutcome),
        )
        if dataclasses.is_dataclass(kind) and isinstance(kind, type)
    },
    key=lambda kind: kind.__name__,
)
# Hypothesis cannot see the field types behind slots on its own for nested dictionaries of
# records, and NaN equals nothing: both are told here.
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))


JSON = st.recursive(st.none() | st.booleans() | st.text(), st.lists, max_leaves=3)


def any_record(kind):
    hints = typing.get_type_hints(kind)
    fields = {
        name: st.dictionaries(st.text(), JSON, max_size=2)
        if hint == dict[str, typing.Any]
        else st.from_type(hint)
        for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(kind))
    }
    return st.builds(kind, **fields)


for kind in KINDS:
    st.register_type_strategy(kind, any_record)
# Weights of no model are refused.
st.register_type_strategy(
    ModelSpec, st.builds(ModelSpec, st.text(min_size=1), st.none() | st.text())
)

ACCURACY = Accuracy(87.5, 100.0, 40)
TRIAL = Trial("l", Tower.TEXT, FALLBACK, 1.0, 0.1, ACCURACY, 0.0, None)
SCORE = LayerScore("visual.proj", Tower.VISION, (4, 2), 0.1, 0.0, 1.0, 2.0, 10.0, True)


def through_json(record):
    return json.loads(json.dumps(encode(record), allow_nan=False))


@given(st.one_of([st.from_type(kind) for kind in KINDS]))
@settings(max_examples=150, deadline=None)
def test_every_record_survives_json(record):
    assert decode(type(record), through_json(record)) == record
    assert decode(type(record), json.loads(canonical_json(record))) == record


@given(st.one_of([st.from_type(kind) for kind in KINDS]), st.data())
@settings(max_examples=100, deadline=None)
def test_a_record_that_lacks_any_field_is_stale(record, data):
    value = through_json(record)
    lost = data.draw(st.sampled_from(sorted(value)))
    del value[lost]
    with pytest.raises(StaleError, match=f"{type(record).__name__} record .* '{lost}'"):
        decode(type(record), value)


def test_types_survive_a_round_trip():
    ranking = Ranking("n", "f", "r", method.Alignment.ABS, (FALLBACK,), (SCORE,), "0.1.0")
    back = decode(Ranking, through_json(ranking))
    assert isinstance(back.scores, tuple)
    assert isinstance(back.scores[0].tower, Tower)
    assert isinstance(back.scores[0].shape, tuple)
    assert isinstance(back.alignment, method.Alignment)


def test_a_whole_number_is_taken_for_a_float_field():
    back = decode(ParameterNorm, {"shape": [2], "norm": 3})
    assert isinstance(back.norm, float)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (ModelSpec, {"name": None, "pretrained": None}),
        (ModelSpec, {"name": 3, "pretrained": None}),
        (ModelSpec, []),
        (ModelSpec, None),
        (ModelSpec, "name"),
        (ParameterNorm, {"shape": "12", "norm": 1.0}),
        (ParameterNorm, {"shape": [1.5], "norm": 1.0}),
        (ParameterNorm, {"shape": [1], "norm": "1.0"}),
        (ParameterNorm, {"shape": [1], "norm": True}),
        (Accuracy, {"top1": 1.0, "top5": 1.0, "rows": True}),
        (LayerScore, {**encode(SCORE), "front": "false"}),
        (LayerScore, {**encode(SCORE), "tower": "audio"}),
        (Trial, {**encode(TRIAL), "utility": [1]}),
    ],
)
def test_a_field_of_another_shape_is_stale_not_bent_into_place(kind, value):
    with pytest.raises(StaleError, match=f"{kind.__name__}.*") as caught:
        decode(kind, value)
    assert caught.value.hint


def test_absent_options_stay_none_and_unknown_fields_are_ignored():
    value = {**encode(ModelSpec("ViT-B-32")), "from_the_future": 1}
    assert decode(ModelSpec, value) == ModelSpec("ViT-B-32", None)


@given(st.dictionaries(st.text(), st.integers(), max_size=6), st.randoms())
def test_digest_does_not_depend_on_the_order_of_keys(value, random):
    items = list(value.items())
    random.shuffle(items)
    assert digest(dict(items)) == digest(value)


def test_different_contents_have_different_digests():
    values = [{"a": 1}, {"a": 1.5}, {"a": "1"}, {"a": None}, {"b": 1}, ["a", 1], {"a": [1]}]
    assert len({digest(value) for value in values}) == len(values)
    assert len(digest({})) == 24
    assert set(digest({})) <= set("0123456789abcdef")


def test_digest_is_the_same_in_every_process():
    code = (
        "from slsgu_cli.records.codec import digest; from slsgu_cli.records.sets import DataRef;"
        "print(digest(DataRef('p', 'f', 3, 4,"
        " {'too small': 1, 'broken': 2}, ('a.tar',))), digest({'z': 1, 'é': 0.1, 'a': None}))"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "12345")
    }
    assert len(printed) == 1
    assert digest({"z": 1, "é": 0.1, "a": None}) in printed.pop()


def test_canonical_json_refuses_what_json_does_not_have():
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="JSON"):
            canonical_json({"a": value})


def test_a_model_spec_prints_itself_and_its_flags():
    assert str(ModelSpec("ViT-B-32", "laion400m_e32")) == "ViT-B-32 (laion400m_e32)"
    assert ModelSpec("ViT-B-32", "openai").flags() == "--model ViT-B-32 --pretrained openai"
    assert ModelSpec("local-dir:clip").flags() == "--model local-dir:clip"


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_records_are_frozen_and_documented(kind):
    assert kind.__dataclass_params__.frozen
    assert "__slots__" in vars(kind)
    assert not kind.__doc__.startswith(f"{kind.__name__}(")


def test_a_newer_edit_replaces_the_row_of_ours_in_a_comparison_on_a_pipeline():
    share = {"count": 1, "total": 4}
    diffusion = {"steps": 20, "guidance": None, "batch": 8}
    trained = {
        "method": "esd",
        "plan": {"iterations": 30, "rate": 1e-5, "steps": 20, "seed": 0},
        "edit": None,
        "setting": None,
        "effect": {"concept": share, "others": share},
        "distance": 0.5,
        "seconds": 2.0,
        "where": "cpu, 1 threads",
    }
    ours = {**trained, "method": "ours", "plan": None, "edit": "e"}
    written = {
        "name": "n",
        "concept": "c",
        "target": "sd",
        "target_fingerprint": "t",
        "forget": "g",
        "forget_data": "f",
        "retain_data": "r",
        "evals": {},
        "judge": "j",
        "budget": {"concept": 20, "others": 40, "seed": 0, "questions": [], "diffusion": diffusion},
        "outcomes": [trained, ours],
        "version": "0.1.0",
        "asked": "",
    }
    record = decode(comparison.PipelineComparison, written)
    assert through_json(record) == written
    first, second = record.outcomes
    assert (first.label, second.label) == ("esd 1e-05", "ours")
    assert record.row_made_by(second.made_by) is second
    newer = dataclasses.replace(second, edit="another")
    assert record.row_made_by(newer.made_by) is None
    assert record.with_row(newer).outcomes == (first, newer)


PAGES = sorted((ROOT / "docs" / "artifacts").glob("*.md"))
ARTIFACTS = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if not kind.__name__.endswith("Options")], ids=str
)
def test_the_documentation_names_every_field_of_every_record(kind):
    section = ARTIFACTS.partition(f"\n## {kind.__name__}\n")[2].partition("\n## ")[0]
    fields = [field.name for field in dataclasses.fields(kind)]
    assert [name for name in fields if f"`{name}`" not in section] == []
