"""The whole method on a model and two lists of (images, texts) finds what the engine finds."""

from functools import cache, partial

import open_clip
import pytest
import tiny_clip
import torch
import torch.nn.functional as F
from reference import Reference, labelled
from worlds import plain_options

import slsgu_cli
from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.engine.covariance import InputCovariances, OutputDerivatives
from slsgu_cli.engine.search import search
from slsgu_cli.errors import InputError, StaleError
from slsgu_cli.method import layer_statistics as layer_statistics_module
from slsgu_cli.method.directions.gradient import Gradient
from slsgu_cli.method.directions.kfac import Kfac
from slsgu_cli.method.directions.whitened import Whitened
from slsgu_cli.method.evaluation import LabelledImages, ZeroShot
from slsgu_cli.method.layer_statistics import layer_statistics
from slsgu_cli.method.layers import VISION, candidates, tower_of
from slsgu_cli.method.unlearn import unlearn
from slsgu_cli.store.blocks import DataBlock

COLOURS = list(tiny_clip.COLOURS)
FEW = ("visual.proj", "transformer.resblocks.1.mlp.c_proj.weight", "text_projection")


@cache
def data():
    """Return mini-batches of blue and of other things, and an evaluation for blue."""
    tokenize = open_clip.SimpleTokenizer(context_length=16)
    rows = [tiny_clip.row(number) for number in range(160)]
    prompts = tokenize([f"a photo of the {colour}." for colour in COLOURS]).unflatten(0, (-1, 1))

    def batches(rows):
        parts = [rows[start : start + 16] for start in range(0, len(rows), 16)]
        return [(tiny_clip.pixels(p), tokenize([r["caption"] for r in p])) for p in parts]

    def images(rows):
        labels = torch.tensor([COLOURS.index(row["colour"]) for row in rows])
        return LabelledImages(tiny_clip.pixels(rows), labels, prompts)

    blue, others = (
        [r for r in rows if (r["colour"] == "blue") is is_it] for is_it in (True, False)
    )
    return batches(blue), batches(others), ZeroShot(images(blue), [images(others)])


@pytest.fixture
def model():
    return tiny_clip.fitted_model()


def same(model, state):
    return all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    "directions", [(Gradient(),), (Whitened(),), (Kfac(),), (Gradient(), Whitened())]
)
def test_the_concept_is_forgotten_and_others_are_not(model, directions):
    forget, retain, evaluate = data()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    original = evaluate(model)
    edit = slsgu_cli.unlearn(model, forget, retain, evaluate, directions=directions, steps=6)
    assert same(model, before)
    assert (edit.original_forget, edit.original_utility) == original
    assert original[0] > 90 and edit.forget == 0 and edit.utility > original[1] / 2
    edit.apply(model)
    assert evaluate(model) == (edit.forget, edit.utility)
    changed = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
    assert changed == [edit.layer]
    torch.testing.assert_close(model.get_parameter(edit.layer), before[edit.layer] + edit.delta)
    edit.undo(model)
    assert same(model, before)


def test_an_edit_is_applied_once_and_to_its_own_model(model):
    forget, retain, evaluate = data()
    edit = unlearn(model, forget, retain, evaluate, layers=FEW, steps=1)
    with pytest.raises(StaleError, match="does not have the values that the edit expects"):
        edit.undo(model)
    edit.apply(model)
    with pytest.raises(StaleError):
        edit.apply(model)
    with pytest.raises(StaleError):
        edit.apply(tiny_clip.fresh_model(seed=1))


def test_more_directions_forget_at_no_higher_price(model):
    forget, retain, evaluate = data()
    alone = [
        unlearn(model, forget, retain, evaluate, directions=(each,), layers=FEW, steps=4)
        for each in (Gradient(), Whitened())
    ]
    edit = unlearn(
        model, forget, retain, evaluate, directions=(Gradient(), Whitened()), layers=FEW, steps=4
    )
    best = min(alone, key=lambda each: (each.forget, -each.utility))
    assert (edit.layer, edit.step) == (best.layer, best.step)


def test_without_pairs_or_layers_there_is_no_edit(model):
    forget, retain, evaluate = data()
    with pytest.raises(InputError, match="no pairs"):
        unlearn(model, [], retain, evaluate)
    with pytest.raises(InputError, match="no layer to edit"):
        unlearn(model, forget, retain, evaluate, layers=["logit_scale"])


def test_it_finds_the_layer_and_the_step_of_a_search_as_in_the_paper(world):
    """The same rows in the same mini-batches, one by plain loops and one by the engine."""
    reference = Reference(world)

    def batches(ref):
        block = DataBlock.open(world.store, ref)
        pixels = labelled(reference, block, ["x"], first, [0]).images
        tokens = torch.from_numpy(block.tokens).long()
        size = world.pointer.batch_size
        return list(zip(pixels.split(size), tokens.split(size), strict=True))

    def evaluate(model):
        figures = Reference(world, model).figures()
        return figures.forget[0], figures.mean()

    first = reference.blocks["first"]
    edit = unlearn(
        reference.model,
        batches(world.manifest.forget),
        batches(world.manifest.retain),
        evaluate,
        steps=4,
    )
    found = search(world.store, world.name, options=plain_options(paper=True, steps=4))
    assert found.chosen.layer == edit.layer
    assert found.chosen.step == pytest.approx(edit.step, rel=1e-4)
    assert found.chosen.forget.top1 == pytest.approx(edit.forget)
    assert {trial.layer for trial in found.trials.trials} == {
        score.layer for score in world.ranking.scores if score.front
    }


def test_statistics_are_those_of_the_engine(model):
    """But for the queries of a text's first token, which have one key and no influence."""
    _, retain, _ = data()
    names = candidates(name for name, _ in model.named_parameters())
    plain = layer_statistics(model, names, retain)
    inputs, derivatives = InputCovariances(model, names), OutputDerivatives(model, names)
    vision, text = vision_tower(model), text_tower(model)
    for number, (images, texts) in enumerate(retain):
        short = text.trim(texts)
        for sums in (inputs, derivatives):
            for tower, x, valid in ((vision, images, None), (text, short, text.counted(short))):
                sums.valid = valid
                sums.add(partial(tower.features, x, x), rows=len(x), part=number)
    assert set(plain) == set(inputs.covariances) == set(names)
    in_part = {name for name in names if name.endswith("resblocks.1.attn.in_proj_weight")}
    with_factor = {name for name, layer in plain.items() if layer.derivatives is not None}
    assert set(derivatives.covariances) == with_factor - in_part
    for name, layer in plain.items():
        expected, off = inputs.covariances[name], 1e-6
        if name in {f"transformer.resblocks.{block}.attn.in_proj_weight" for block in (0, 1)}:
            off = 0.1
        assert relative(layer.inputs.matrix, expected.mean()) < off, name
        assert layer.inputs.axis == expected.axis
    for name, expected in derivatives.covariances.items():
        assert relative(plain[name].derivatives, expected.mean()) < 1e-4, name


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize(
    "layer",
    [
        "visual.transformer.resblocks.0.mlp.c_proj.weight",
        "visual.transformer.resblocks.1.ln_2.weight",
        "transformer.resblocks.0.mlp.c_proj.weight",
        "transformer.resblocks.1.ln_1.weight",
    ],
)
def test_derivatives_are_those_of_the_features(model, layer, monkeypatch):
    """Projected on each axis in turn, against a Jacobian of the features by autograd."""
    _, retain, _ = data()
    images, texts = (each[:5] for each in retain[0])
    width = model.encode_text(texts).shape[1]
    monkeypatch.setattr(
        layer_statistics_module,
        "projection",
        lambda features, seed: torch.eye(width)[seed].expand_as(features),
    )
    found = layer_statistics(model, [layer], [(images, texts)] * width)[layer].derivatives * width
    applied = model.get_submodule(layer.removesuffix(".weight"))
    shapes = []
    applied.register_forward_hook(lambda _, __, outputs: shapes.append(outputs.shape))
    is_vision = tower_of(layer) == VISION
    encode = partial(model.encode_image, images) if is_vision else partial(model.encode_text, texts)
    encode()

    def features(shift):
        hook = applied.register_forward_hook(lambda _, __, outputs: outputs + shift)
        try:
            return F.normalize(encode(), dim=-1)
        finally:
            hook.remove()

    jacobian = torch.autograd.functional.jacobian(features, torch.zeros(shapes[0])).double()
    own = torch.stack([jacobian[row, :, row] for row in range(5)]).flatten(0, -2)
    expected = own.T @ own / 5
    if found.ndim == 1:
        expected = expected.diagonal()
    assert relative(found, expected) < 1e-4
