"""`eval` on neutral prompts: the figures of open_clip's own features, and none computed twice."""

from dataclasses import replace

import open_clip
import pytest
import torch
from processes import inside, rows
from worlds import plain_options

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip.zeroshot import PromptSide
from slsgu_cli.engine import evaluate as evaluating
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.evaluate import evaluate
from slsgu_cli.engine.search import search
from slsgu_cli.engine.text_structure import prompts_without
from slsgu_cli.method.text_structure import neighbour_overlap, spread_ratio
from slsgu_cli.records.figures import TextStructure
from slsgu_cli.records.options import ApplyRequest
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.sources import neutral

TEXT, VISION = "transformer.resblocks.1.ln_1.weight", "visual.proj"


@pytest.fixture(params=[TEXT, VISION])
def edited(request, world):
    """The world with an edit of either tower, and the layer."""
    search(world.store, "blue", options=plain_options(steps=4, layers=[request.param]))
    return world, request.param


def copy_of(world, out):
    return ModelSpec(apply(world.store, ApplyRequest(names=["blue"], out=out)).model)


def features(name, prompts):
    model = open_clip.create_model(name).eval()
    tokens = open_clip.get_tokenizer(name)(prompts)
    with torch.no_grad():
        return model, tokens, model.encode_text(tokens, normalize=True)


def test_figures_are_those_of_plain_features(edited, tmp_path):
    world, layer = edited
    prompts = list(prompts_without([world.manifest]))
    model, tokens, before = features(world.model.name, prompts)
    parameter = model.get_parameter(layer)
    parameter.data += torch.from_numpy(load_edit(world.store, "blue").delta())
    with torch.no_grad():
        after = model.encode_text(tokens, normalize=True)
    expected = spread_ratio(before, after), neighbour_overlap(before, after)
    for other in (None, copy_of(world, tmp_path / "out")):
        result = evaluate(world.store, ["blue"], model=other, device="cpu")
        first, last = (each.structure for each in result.models)
        assert first == TextStructure(len(prompts), 100.0, 100.0)
        assert last.prompts == len(prompts) > 3000
        assert (last.spread, last.overlap) == pytest.approx(expected, abs=0.1)
        figures = result.figures()
        assert (figures["spread"], figures["overlap"]) == (last.spread, last.overlap)
    assert (expected == (100, 100)) is (layer == VISION)


def test_prompts_run_once_through_each_changed_text_tower(edited, tmp_path, monkeypatch):
    world, layer = edited
    copy, counts = copy_of(world, tmp_path / "out"), []
    for name in ("base_pass", "after_edit"):
        run = getattr(PromptSide, name)

        def counted(side, *arguments, run=run):
            counts[-1] += len(side.tokens) > 3000
            return run(side, *arguments)

        monkeypatch.setattr(PromptSide, name, counted)
    for other in (None, copy):
        counts.append(0)
        structure = evaluate(world.store, ["blue"], model=other, device="cpu").models[1].structure
        assert (structure == TextStructure(structure.prompts)) is (layer == VISION)
    assert counts == ([2, 2] if layer == TEXT else [0, 0])


def test_prompts_about_a_concept_are_left_out(world):
    manifest = world.manifest
    every = neutral.neutral_prompts()
    assert prompts_without([manifest]) == every
    apple = replace(manifest, patterns=("apple",))
    pears = replace(manifest, patterns=("pears?",), request={"regex": True, "match": ["pears?"]})
    left = prompts_without([apple, pears])
    assert left == tuple(p for p in every if "apple" not in p.split() and "pear" not in p)
    assert 20 < len(every) - len(left) < 50
    assert prompts_without([replace(pears, patterns=(".",))]) == ()


def test_without_prompts_there_are_no_figures(edited, monkeypatch):
    world, _ = edited
    monkeypatch.setattr(evaluating, "prompts_without", lambda _: ("a dog",))
    result = evaluate(world.store, ["blue"], device="cpu")
    assert [each.structure for each in result.models] == [None, None]
    assert not {"spread", "overlap"} & set(result.figures())


def test_figures_are_asserted(edited):
    world, layer = edited
    words = ["--assert", "overlap>=100", "--assert", "spread>1"]
    done = inside("eval", "blue", *words, store=world.store.root)
    assert done.exit_code == (0 if layer == VISION else 5), done.stderr
    _, neutral_table, asserted = rows(done.stdout)
    assert neutral_table[0] == ["model", "prompts", "spread", "overlap"]
    assert float(asserted[1][1]) == float(neutral_table[1][3])
    assert asserted[2][2] == "holds"


def test_the_original_alone_has_nothing_to_compare_with(world):
    done = inside("eval", "blue", "--assert", "overlap>=90", store=world.store.root)
    assert done.exit_code == 2 and "overlap>=90 is about an unknown figure" in done.stderr
