"""Neutral prompts: figures of the edit, and of a random change of the same weights."""

import pytest
import tiny_clip
import torch
from under_test import opened

from slsgu_cli.method.text_structure import neighbour_overlap, spread_ratio
from slsgu_cli.records.figures import TextStructure
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.records.verification import Check, Finding, Settings, VerifiedModel
from slsgu_cli.verification.checks.neutral_prompts import (
    EDIT,
    RANDOM,
    neutral_prompts,
    random_change,
)
from slsgu_cli.verification.model import SkippedCheck
from slsgu_cli.verification.results import conclusion

LAYER = "transformer.resblocks.1.mlp.c_proj.weight"


def move(module):
    """Change the first half of one layer of the text tower."""
    values = module.get_parameter(LAYER).data
    drawn = torch.randn(values.shape, generator=torch.Generator().manual_seed(3))
    drawn[len(values) // 2 :] = 0
    values += 0.5 * values.norm() / drawn.norm() * drawn


@pytest.fixture(scope="module")
def moved(shared_world):
    with torch.no_grad():
        return opened(shared_world, change=move)


@torch.no_grad()
def test_edit_and_control_are_compared_with_the_original(moved):
    found = neutral_prompts(moved, Settings(seed=4))
    original = moved.original()
    tokens = original.neutral_prompts().tokens

    def features():
        return original.module.encode_text(tokens, normalize=True)

    before, parameter = features(), original.module.get_parameter(LAYER)
    change = random_change({LAYER: parameter.data.clone()}, 4)
    for what, values in (
        (EDIT, moved.module.get_parameter(LAYER).data),
        (RANDOM, change(LAYER, moved.module.get_parameter(LAYER).data)),
    ):
        parameter.data = values
        expected = spread_ratio(before, features()), neighbour_overlap(before, features())
        assert (found[what].spread, found[what].overlap) == pytest.approx(expected, abs=0.1)
        assert found[what].overlap < 95
    assert found[EDIT] != found[RANDOM]
    # The weights under test are as before.
    assert neutral_prompts(moved, Settings(seed=4)) == found
    assert neutral_prompts(moved, Settings(seed=5))[RANDOM] != found[RANDOM]


def test_a_random_change_is_as_long_and_in_the_same_weights():
    original, generator = torch.ones(30, 20), torch.Generator().manual_seed(1)
    values = original + torch.randn(30, 20, generator=generator) * (torch.arange(20) < 5)
    change = random_change({"a": original, "b": original}, 0)
    drawn = change("a", values)
    assert (drawn - original).norm() == pytest.approx(float((values - original).norm()), rel=1e-5)
    assert ((drawn != original) == (values != original)).all()
    cosine = ((drawn - original) * (values - original)).sum() / (values - original).square().sum()
    assert abs(cosine) < 0.3
    assert change("b", original) is original
    assert change("another", values) is values


@torch.no_grad()
def test_an_unchanged_text_tower_is_not_run(shared_world, monkeypatch):
    def move_images(module):
        module.visual.proj.data *= torch.linspace(0.5, 2, len(module.visual.proj))[:, None]

    changed = opened(shared_world, change=move_images)
    monkeypatch.setattr(type(changed), "neutral_prompts", lambda _: pytest.fail("run"))
    (structure,) = neutral_prompts(changed, Settings()).values()
    assert (structure.spread, structure.overlap) == (100, 100) and structure.prompts > 3000
    assert neutral_prompts(changed.original(), Settings()) == {}


@torch.no_grad()
def test_another_architecture_has_no_control(shared_world, moved, monkeypatch):
    small = tiny_clip.CONFIG["text_cfg"] | {"layers": 1}
    monkeypatch.setattr(
        moved.evaluation, "model", tiny_clip.fresh_model(tiny_clip.CONFIG | {"text_cfg": small})
    )
    with pytest.raises(SkippedCheck, match="other parameters than the original's"):
        neutral_prompts(moved, Settings())


def conclusion_of(structure):
    finding = Finding(Check.NEUTRAL_PROMPTS, "k", {}, structure=structure)
    original, other = (
        VerifiedModel("key", "a model", ModelSpec("m"), "weights", None, findings)
        for findings in ((Finding(Check.NEUTRAL_PROMPTS, "k", {}, structure={}),), (finding,))
    )
    return conclusion("blue", original, other).text


def test_the_conclusion_has_the_figures_of_both():
    edit, control = TextStructure(3700, 71.04, 62.5), TextStructure(3700, 99.9, 80.04)
    text = conclusion_of({EDIT: edit, RANDOM: control})
    assert "3700 neutral prompts have 71.0% of their spread" in text
    assert "overlap by 62.5% (a random change of the same size: 99.9% and 80.0%)" in text
    assert "neutral prompts are unchanged" in conclusion_of({EDIT: TextStructure(3700)})
