"""Methods that edit a pipeline's text encoders or cross-attention, on a tiny SDXL."""

from types import SimpleNamespace

import pytest
import torch

from slsgu_cli.compare.pipeline_data import PipelineData, aligned
from slsgu_cli.compare.registry import on_pipeline
from slsgu_cli.records.comparison import PIPELINE_METHODS, Method, PipelinePlan

TEMPLATES = ("a {}", "{} b")
CLOSED = [m for m in PIPELINE_METHODS if (spec := on_pipeline(m)) and spec.hyperparameter]
HIRM = (Method.HIRM_S, Method.HIRM_R)


@pytest.fixture(scope="module")
def pipe(tiny_pipeline):
    from slsgu_cli.targets.models import Pipeline

    return Pipeline.load(tiny_pipeline("sdxl"), device="cpu")


@pytest.fixture
def data(pipe):
    """The data of methods; the pipeline's weights are restored after the test."""
    modules = [pipe.pipeline.unet, *(live.module for live in pipe.encoders)]
    before = [{n: v.clone() for n, v in each.state_dict().items()} for each in modules]
    judged = SimpleNamespace(
        names=("star", "sun"), templates=TEMPLATES, budget=SimpleNamespace(seed=0)
    )
    captions = [f"a {letter}{other}" for letter in "cdefgh" for other in "klmnop"]
    retain = SimpleNamespace(rows=len(captions), captions=captions)
    yield PipelineData(pipe, judged, None, retain, anchor="moon")
    for module, weights in zip(modules, before, strict=True):
        module.load_state_dict(weights)


def weights(data):
    """Return a copy of all weights by name."""
    parts = {"unet": data.pipe.pipeline.unet}
    parts |= {live.encoder.name: live.module for live in data.pipe.encoders}
    return {
        f"{part}.{name}": value.clone()
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def changed(data, before):
    now = weights(data)
    return {name for name, value in before.items() if not torch.equal(value, now[name])}


def test_prompts_end_names_at_their_last_token(data):
    prompts, ends = data.of_concept()
    assert prompts == ["a star", "star b", "a sun", "sun b"]
    # One token a letter, after the start.
    assert ends == [5, 4, 4, 3]
    prompts, ends = data.of_anchor()
    assert prompts == ["a moon", "moon b"] * 2
    assert ends == [5, 4] * 2
    keys, anchors = data.keys()
    states = data.states(["a star", "a moon", "moon b"])
    assert torch.equal(keys[0], states[0, 5:])
    assert torch.equal(anchors[0], states[1, 5:])
    # The name of the third prompt is shorter than the anchor: the last state is repeated.
    assert len(anchors[3]) == len(keys[3]) == len(anchors[0]) + 2
    assert torch.equal(anchors[3][-2:], states[2, [-1, -1]])


def test_aligned_states_repeat_the_last():
    own, other = [torch.zeros(3, 1)], [torch.tensor([[1.0], [2.0]])]
    assert aligned(own, other)[0].tolist() == [[1.0], [2.0], [2.0]]
    assert aligned(other, own)[0].tolist() == [[0.0], [0.0]]


@pytest.mark.parametrize("method", CLOSED)
def test_closed_forms_change_their_layers_and_nothing_else(method, data):
    before, spec = weights(data), on_pipeline(method)
    spec.edit(data, spec.hyperparameter.default)
    layers = {
        Method.UCE: ("attn2.to_k.weight", "attn2.to_v.weight"),
        Method.SPEED: ("attn2.to_v.weight",),
        Method.OCE: ("attn2.to_v.weight",),
        Method.DIFFQUICKFIX: ("layers.0.self_attn.out_proj.weight",),
    }[method]
    expected = {name for name in before if name.endswith(layers)}
    assert changed(data, before) == expected
    assert all(name.startswith("unet.") != spec.text for name in expected)


def test_uce_guides_keys_to_the_anchor_and_preserves_the_others(data):
    unet = data.pipe.pipeline.unet
    name = next(name for name in unet.state_dict() if name.endswith("attn2.to_v.weight"))
    (keys, anchors), retained = map(torch.cat, data.keys()), data.retained_keys()
    before = unet.get_parameter(name).detach().double().clone()
    on_pipeline(Method.UCE).edit(data, 1e-4)
    after = unet.get_parameter(name).detach().double()
    apart = [((w @ keys.T) - (before @ anchors.T)).norm() for w in (before, after)]
    assert apart[1] < 0.2 * apart[0]
    on_pipeline(Method.UCE).edit(data, 1e9)
    assert (unet.get_parameter(name) - after).norm() < 1e-3 * after.norm()
    assert len(retained) == 3 * 36


def test_diff_quickfix_is_ridge_regression(data):
    from slsgu_cli.compare.baselines.diffquickfix import LAYER
    from slsgu_cli.targets.states import TextStates

    ridge, (prompts, ends), (others, other_ends) = 0.1, data.of_concept(), data.of_anchor()
    live = data.pipe.encoders[1]
    before, seen = live.value(LAYER).double().clone(), []
    module = live.module.get_submodule(live.places(LAYER)[0].key.removesuffix(".weight"))
    hook = module.register_forward_hook(lambda _, args, outputs: seen.append(args[0]))
    states = TextStates(data.pipe, live)
    for texts in (prompts, others):
        states.read(states.ids(texts))
    hook.remove()
    keys, goals = [], []
    for row, (end, other_end) in enumerate(zip(ends, other_ends, strict=True)):
        for place in range(end, seen[0].shape[1]):
            keys.append(seen[0][row, place])
            goals.append(seen[1][row, min(other_end + place - end, seen[1].shape[1] - 1)])
    keys, goals = (torch.stack(each).detach().double() for each in (keys, goals))
    rows = torch.cat([keys, ridge**0.5 * torch.eye(keys.shape[1], dtype=torch.double)])
    wanted = torch.cat([(goals - keys) @ before.T, torch.zeros_like(before.T)])
    solved = torch.linalg.lstsq(rows, wanted).solution.T
    on_pipeline(Method.DIFFQUICKFIX).edit(data, ridge)
    change = live.value(LAYER).double() - before
    assert change.norm() > 0.01
    torch.testing.assert_close(change, solved, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", HIRM)
def test_hirm_trains_the_first_block_of_each_encoder_towards_its_goal(method, data):
    from slsgu_cli.compare.baselines.hirm import misdirection, random_goals
    from slsgu_cli.targets.states import TextStates

    prompts, others, before = data.of_concept()[0], data.of_anchor()[0], weights(data)
    encoders = [TextStates(data.pipe, live) for live in data.pipe.encoders]
    goals = [states.of(others) for states in encoders]
    if method is Method.HIRM_R:
        goals = [
            [random_goals(each.shape[1], each.shape[2], 5).expand_as(each) for each in outputs]
            for outputs in goals
        ]

    def losses():
        read = [states.of(prompts) for states in encoders]
        pairs = [zip(*each, strict=True) for each in zip(read, goals, strict=True)]
        return [float(sum(misdirection(*pair) for pair in each)) for each in pairs]

    first = losses()
    plan = PipelinePlan(iterations=5, rate=1e-3, seed=5)
    on_pipeline(method).edit(data, plan)
    assert all(now < then for now, then in zip(losses(), first, strict=True))
    names = {name for name in before if ".layers.0." in name and not name.startswith("unet.")}
    assert changed(data, before) == names
    assert all(p.requires_grad for live in data.pipe.encoders for p in live.module.parameters())
