"""The whitened direction solves what it says, and its scores predict what a step does."""

import pytest
import tiny_clip
import torch
import torch.nn.functional as F

from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.engine.covariance import InputCovariances
from slsgu_cli.method import scores
from slsgu_cli.method.directions.whitened import RetainMetric, mean_square_output

DAMPING = 0.05


def random_layer(shape, inputs, axis, seed=0):
    """Return a gradient, the inputs of a layer of that shape, and their covariance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, inputs, generator=generator, dtype=torch.float64)
    x = x @ torch.diag(torch.linspace(0.01, 3, inputs, dtype=torch.float64))
    return torch.randn(*shape, generator=generator, dtype=torch.float64), x, x.T @ x / len(x)


@pytest.mark.parametrize(
    ("shape", "inputs", "axis"), [((5, 12), 12, 1), ((12, 5), 12, 0), ((5, 3, 2, 2), 12, 1)]
)
def test_the_direction_is_the_dense_solution(shape, inputs, axis):
    gradient, _, covariance = random_layer(shape, inputs, axis)
    damped = covariance + DAMPING * covariance.trace() / inputs * torch.eye(inputs)
    inverse = torch.linalg.inv(damped)
    rows = gradient.reshape(shape[0], -1)
    expected = rows @ inverse if axis == 1 else inverse @ rows
    found = RetainMetric(covariance, axis, DAMPING).steepest(gradient.float())
    assert found.shape == gradient.shape
    torch.testing.assert_close(found, expected.reshape(shape), rtol=1e-5, atol=1e-6)


def test_a_norm_has_a_diagonal():
    gradient, _, covariance = random_layer((12,), 12, 0)
    diagonal = covariance.diagonal()
    found = RetainMetric(diagonal, 0, DAMPING).steepest(gradient)
    torch.testing.assert_close(found, gradient / (diagonal + DAMPING * diagonal.mean()))
    weight = torch.linspace(-1, 1, 12, dtype=torch.float64)
    assert mean_square_output(weight, diagonal, 0) == pytest.approx(
        float((weight.square() * diagonal).sum())
    )


@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 12), 1), ((12, 5), 0), ((5, 3, 2, 2), 1), ((12,), 0)]
)
def test_products_of_half_whitened_gradients_are_those_of_directions(shape, axis):
    f, _, covariance = random_layer(shape, 12, axis)
    r = random_layer(shape, 12, axis, seed=1)[0]
    metric = RetainMetric(covariance if len(shape) > 1 else covariance.diagonal(), axis, DAMPING)
    half, half_retain = metric.scaled(f), metric.scaled(r)
    for a, b, direction in ((half, half, f), (half, half_retain, r)):
        expected = (metric.steepest(f) * direction).sum()
        torch.testing.assert_close((a * b).sum(), expected)


@pytest.mark.parametrize(("shape", "axis"), [((5, 12), 1), ((12, 5), 0)])
def test_no_other_change_gains_more_per_disturbance(shape, axis):
    gradient, x, covariance = random_layer(shape, 12, axis)
    metric = RetainMetric(covariance, axis, DAMPING)

    def gain(change):
        outputs = x @ (change.T if axis == 1 else change)
        disturbance = outputs.square().sum(1).mean() + metric.floor * change.square().sum()
        return (gradient * change).sum() / disturbance.sqrt()

    direction = metric.steepest(gradient)
    best = gain(direction)
    assert best == pytest.approx(float(metric.scaled(gradient).norm()))
    generator = torch.Generator().manual_seed(3)
    others = [gradient, *(direction + torch.randn(shape, generator=generator) for _ in range(50))]
    assert all(gain(other) < best for other in others)


def test_a_convolution_in_groups_has_a_metric_for_each():
    blocks = [random_layer((3, 2, 2, 1), 4, 1, seed=group) for group in range(2)]
    gradient = torch.cat([block[0] for block in blocks])
    covariance = torch.stack([block[2] for block in blocks])
    dense = torch.block_diag(*covariance)
    floor = DAMPING * dense.trace() / 8
    found = RetainMetric(covariance, 1, DAMPING).steepest(gradient)
    for group, (own, _, block) in enumerate(blocks):
        expected = own.reshape(3, 4) @ torch.linalg.inv(block + floor * torch.eye(4))
        torch.testing.assert_close(found[3 * group : 3 * group + 3], expected.view(3, 2, 2, 1))
    half = RetainMetric(covariance, 1, DAMPING).scaled(gradient)
    torch.testing.assert_close(half.square().sum(), (found * gradient).sum())
    plain = sum(
        float((own.view(3, 4) @ block @ own.view(3, 4).T).trace()) for own, _, block in blocks
    )
    assert mean_square_output(gradient, covariance, 1) == pytest.approx(plain)


CHANNELS = [
    torch.nn.Conv2d(4, 6, 3, padding=1),
    torch.nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2),
    torch.nn.Conv2d(4, 4, 3, dilation=2, groups=4),
    torch.nn.BatchNorm2d(4),
]


@pytest.mark.parametrize("layer", CHANNELS, ids=str)
def test_no_other_change_of_channels_gains_more_per_disturbance(layer):
    layer = layer.double().eval()
    generator = torch.Generator().manual_seed(0)
    retained, forgotten = (
        torch.randn(5, 4, 8, 8, generator=generator, dtype=torch.float64)
        * torch.linspace(*scales, 4, dtype=torch.float64).view(4, 1, 1)
        for scales in ((0.1, 3), (1, 1))
    )
    (gradient,) = torch.autograd.grad(layer(forgotten).relu().square().sum(), layer.weight)
    inputs = InputCovariances(layer, ["weight"])
    with torch.no_grad(), inputs:
        before = layer(retained)
    covariance = inputs.covariances["weight"]
    metric = RetainMetric(covariance.mean(), covariance.axis, 0.01)
    weight = layer.weight.detach().clone()

    @torch.no_grad()
    def gain(change):
        """Return what a change gains for how far it moves the outputs on retained inputs."""
        layer.weight.data = weight + change
        disturbance = (layer(retained) - before).square().sum(1).mean()
        layer.weight.data = weight
        return (gradient * change).sum() / (
            disturbance + metric.floor * change.square().sum()
        ).sqrt()

    direction = metric.steepest(gradient)
    best = gain(direction)
    assert best == pytest.approx(float(metric.scaled(gradient).norm()))
    size = direction.norm() / direction.numel() ** 0.5
    noise = (torch.randn(weight.shape, generator=generator) * size for _ in range(50))
    others = [gradient, *(direction + each for each in noise)]
    assert all(gain(other) < best for other in others)


class World:
    """A tiny CLIP in fp64 with pairs to forget and pairs to retain."""

    def __init__(self):
        self.model = tiny_clip.fresh_model().double()
        generator = torch.Generator().manual_seed(0)
        self.pixels = torch.randn(12, 3, 32, 32, generator=generator, dtype=torch.float64)
        self.ids = torch.randint(1, 900, (12, 16), generator=generator)
        self.ids[:, 9] = 49407
        self.towers = vision_tower(self.model), text_tower(self.model)

    def features(self, rows):
        vision, text = self.towers
        v = F.normalize(
            vision.head(
                vision.advance(self.pixels[rows], self.pixels[rows], -1, vision.depth),
                self.pixels[rows],
            ),
            dim=-1,
        )
        ids = text.trim(self.ids[rows])
        return v, F.normalize(text.head(text.advance(ids, ids, -1, text.depth), ids), dim=-1)

    def forget(self):
        v, t = self.features(slice(0, 6))
        return (1 - (v * t).sum(-1)).mean()

    def retain(self):
        v, t = self.features(slice(6, 12))
        logits = 20 * v @ t.T
        truth = torch.arange(6)
        return (F.cross_entropy(logits, truth) + F.cross_entropy(logits.T, truth)) / 2

    def slope(self, loss, layer, direction, size=1e-4):
        """Return a loss's change along a direction by central differences."""
        parameter = self.model.get_parameter(layer)
        original = parameter.data.clone()
        size /= direction.norm()
        values = []
        for sign in (1, -1):
            parameter.data = original + sign * size * direction
            values.append(loss().item())
        parameter.data = original
        return (values[0] - values[1]) / (2 * size.item())


@pytest.mark.parametrize(
    "layer",
    [
        "visual.proj",
        "visual.conv1.weight",
        "visual.transformer.resblocks.1.ln_2.weight",
        "transformer.resblocks.1.mlp.c_proj.weight",
        "transformer.resblocks.0.attn.out_proj.weight",
    ],
)
def test_importance_and_alignment_are_slopes_over_disturbance(layer):
    world = World()
    weight = world.model.get_parameter(layer)
    f, r = (torch.autograd.grad(loss(), weight)[0] for loss in (world.forget, world.retain))
    inputs = InputCovariances(world.model, [layer])
    with torch.no_grad(), inputs:
        world.features(slice(6, 12))
    covariance = inputs.covariances[layer]
    metric = RetainMetric(covariance.mean(), covariance.axis, DAMPING)
    along, along_retain = metric.steepest(f), metric.steepest(r)

    def size(change):
        """Return the disturbance of the retained outputs, with the damping's share."""
        square = mean_square_output(change, covariance.mean(), covariance.axis)
        return (square + metric.floor * change.square().sum().item()) ** 0.5

    with torch.no_grad():
        gain = world.slope(world.forget, layer, along) / size(along)
        harm = world.slope(world.retain, layer, along) / size(along)
        most = world.slope(world.retain, layer, along_retain) / size(along_retain)
    output = mean_square_output(weight.detach(), covariance.mean(), covariance.axis)
    sized = RetainMetric(
        covariance.mean(), covariance.axis, DAMPING, output, weight.detach().norm().item()
    )
    norm = sized.weight_norm()
    assert norm == pytest.approx(size(weight.detach()))
    assert float(metric.scaled(f).norm()) / norm == pytest.approx(gain / norm, rel=1e-4)
    half, half_retain = (metric.scaled(each).numpy() for each in (f, r))
    assert scores.norm(half) == pytest.approx(gain, rel=1e-4)
    assert scores.alignment(half, half_retain, signed=True) == pytest.approx(
        harm / most, rel=1e-3, abs=1e-5
    )
