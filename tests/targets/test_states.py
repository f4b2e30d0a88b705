"""The states that pipelines read of their text encoders: read, differentiated, judged, fixed."""

import pytest
import tiny_pipelines
import torch
import torch.nn.functional as F

from slsgu_cli.method.directions import InputCovariance, LayerStatistics
from slsgu_cli.method.directions.gradient import Gradient
from slsgu_cli.method.directions.whitened import Whitened
from slsgu_cli.records.directions import Direction, DirectionSpec
from slsgu_cli.targets.models import ImageJob, Pipeline
from slsgu_cli.targets.states import StatesJudge, TextStates
from slsgu_cli.targets.subjects import PipelineSubject, moves_of

LAYER = "transformer.resblocks.1.mlp.c_proj.weight"
FIRST = "transformer.resblocks.0.mlp.c_proj.weight"
PROMPTS = ["a blue circle", "a blue bar on the left"]
OTHERS = ("red", "green", "grey", "pink")


@pytest.fixture(scope="module")
def opened(tiny_pipeline):
    loaded = {}

    def get(kind):
        if kind not in loaded:
            loaded[kind] = Pipeline.load(tiny_pipeline(kind), device="cpu")
        return loaded[kind]

    return get


def states_of(pipe):
    return [TextStates(pipe, live) for live in pipe.encoders]


def test_states_are_what_the_pipeline_reads(opened):
    read = {kind: [s.of(PROMPTS) for s in states_of(opened(kind))] for kind in tiny_pipelines.KINDS}
    with torch.no_grad():
        made = {
            "sdxl": opened("sdxl").pipeline.encode_prompt(
                PROMPTS, device="cpu", do_classifier_free_guidance=False
            ),
            "sd3": opened("sd3").pipeline.encode_prompt(
                PROMPTS, None, None, device="cpu", do_classifier_free_guidance=False
            ),
            "flux": opened("flux").pipeline.encode_prompt(PROMPTS, None, device="cpu"),
        }
    (first,), (second, pooled) = read["sdxl"]
    assert torch.allclose(torch.cat([first, second], dim=-1), made["sdxl"][0], atol=1e-5)
    assert torch.allclose(pooled[:, 0], made["sdxl"][2], atol=1e-5)

    (first, first_pooled), (second, second_pooled) = read["sd3"]
    both = torch.cat([first, second], dim=-1)
    found = made["sd3"][0][:, : both.shape[1], : both.shape[2]]
    assert torch.allclose(both, found, atol=1e-5)
    pooled = torch.cat([first_pooled, second_pooled], dim=-1)[:, 0]
    assert torch.allclose(pooled, made["sd3"][2], atol=1e-5)

    ((pooled,),) = read["flux"]
    assert torch.allclose(pooled[:, 0], made["flux"][1], atol=1e-5)


@pytest.mark.parametrize("anchor", [None, "a shape", ""])
@pytest.mark.parametrize("kind", ["sdxl", "flux"])
def test_the_loss_is_of_every_state(kind, anchor, opened):
    """Against a plain loop over prompts, outputs and positions."""
    states = states_of(opened(kind))[0]
    found = states.forget_gradient(PROMPTS, ["blue"], OTHERS, anchor, [FIRST])[FIRST]
    losses = []
    for prompt in PROMPTS:
        with torch.no_grad():
            own = states.read(states.ids([prompt]))
            if anchor is None:
                others = [states.read(states.ids([prompt.replace("blue", o)])) for o in OTHERS]
                wanted = [
                    each - torch.stack([other[place] for other in others]).mean(dim=0)
                    for place, each in enumerate(own)
                ]
            else:
                text = prompt.replace("blue", anchor) if anchor else ""
                wanted = states.read(states.ids([text]))
        with torch.enable_grad():
            for now, other in zip(states.read(states.ids([prompt])), wanted, strict=True):
                for position in range(now.shape[1]):
                    unit = (
                        F.normalize(now[0, position], dim=0),
                        F.normalize(other[0, position], dim=0),
                    )
                    cosine = unit[0] @ unit[1]
                    losses.append((1 - cosine) if anchor is None else cosine)
    expected = states.encoder.gradients(torch.stack(losses).mean(), [FIRST])[FIRST]
    assert expected.norm() > 0
    assert torch.allclose(found, expected, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("direction", [*Direction.BOTH.each, Direction.KFAC])
@pytest.mark.parametrize("kind", tiny_pipelines.KINDS)
def test_the_empty_prompt_stays_exactly_as_it_is(kind, direction, opened):
    pipe = opened(kind)
    live = pipe.encoders[0]
    subject = PipelineSubject(
        encoder=live,
        searched=None,
        to_test=None,
        judges=(),
        pipe=pipe,
        captions=["a red circle", "a green bar", "a pink ring on the right"],
    )
    # The last block of SDXL and SD3 is behind what they read.
    layer = LAYER if live.encoder.why_not(LAYER) is None else FIRST
    gradients = {layer: torch.randn(tuple(live.value(layer).shape))}
    (move,) = moves_of(subject, gradients, direction=DirectionSpec.of(direction))
    step = move.first * 10
    before = [subject.states.of(texts) for texts in ([""], PROMPTS)]
    with move.in_place(step):
        after = [subject.states.of(texts) for texts in ([""], PROMPTS)]
    for empty, now in zip(before[0], after[0], strict=True):
        assert torch.allclose(empty, now, atol=1e-5)
    assert max((a - b).abs().max() for a, b in zip(before[1], after[1], strict=True)) > 1e-3


def test_a_norm_cannot_spare_the_empty_prompt(opened):
    pipe = opened("sdxl")
    live = pipe.encoders[0]
    subject = PipelineSubject(
        encoder=live,
        searched=None,
        to_test=None,
        judges=(),
        pipe=pipe,
        captions=["a red circle", "a green bar"],
    )
    name = "transformer.resblocks.0.ln_1.weight"
    gradients = {name: torch.ones(tuple(live.value(name).shape))}
    assert moves_of(subject, gradients, direction=DirectionSpec.of(Direction.WHITENED)) == []


@pytest.mark.parametrize("axis", [0, 1])
def test_the_direction_with_fixed_inputs_is_the_constrained_optimum(axis):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 8, generator=generator, dtype=torch.double)
    fixed = torch.randn(3, 8, generator=generator, dtype=torch.double)
    fixed = torch.cat([fixed, fixed[:1] * 2])  # rows may depend on each other
    gradient = torch.randn(5, 8, generator=generator, dtype=torch.double)
    gradient = gradient if axis == 1 else gradient.T
    inputs = InputCovariance(x.T @ x / len(x), axis, 1.0)
    layer = LayerStatistics(1.0, inputs, fixed=fixed)
    metric = Whitened().metric(layer)
    along = metric.steepest(gradient)
    rows = along if axis == 1 else along.T
    assert (rows @ fixed.T).abs().max() < 1e-9
    # Lagrange: D = (G - M X^T) P^-1 with the multipliers M that make D X = 0.
    inverse, columns = metric.damped().inverse(), fixed[:3].T
    plain = gradient if axis == 1 else gradient.T
    multipliers = plain @ inverse @ columns @ (columns.T @ inverse @ columns).inverse()
    assert torch.allclose(rows, (plain - multipliers @ columns.T) @ inverse, atol=1e-9)
    # The scaled gradient has the length of the direction in the metric.
    assert float((along * gradient).sum()) == pytest.approx(
        float(metric.scaled(gradient).square().sum())
    )
    flat = Gradient().metric(layer).steepest(gradient)
    assert ((flat if axis == 1 else flat.T) @ fixed.T).abs().max() < 1e-9


def test_a_judge_of_states_recognises_names_until_they_move(opened):
    pipe = opened("sdxl")
    live = pipe.encoders[0]
    judge = StatesJudge(TextStates(pipe, live), OTHERS)
    jobs = [ImageJob(f"a {name} circle", 0, name) for name in ("blue", *OTHERS)]
    judge.look(jobs)
    assert judge.recognises(jobs) == [True] * len(jobs)
    # A first block that reads nothing of the prompt has no names in its states.
    values = {"token_embedding.weight": torch.zeros_like(live.value("token_embedding.weight"))}
    with live.edited(values):
        assert sum(judge.recognises(jobs)) <= 1
    assert judge.recognises(jobs) == [True] * len(jobs)
