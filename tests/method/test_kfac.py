"""The kfac direction solves the dense system of both factors, and measures moves of features."""

import pytest
import torch

from slsgu_cli.errors import InputError
from slsgu_cli.method.directions import InputCovariance, LayerStatistics
from slsgu_cli.method.directions.kfac import Kfac
from slsgu_cli.method.fronts import layers_to_try, pareto_front

DAMPING = 0.05
OUTPUTS, INPUTS = 5, 12
SHAPES = [((OUTPUTS, INPUTS), 1), ((INPUTS, OUTPUTS), 0), ((OUTPUTS, 3, 2, 2), 1)]


def moment(size, seed):
    """Return the second moment of 40 vectors with entries of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, size, generator=generator, dtype=torch.float64)
    x = x @ torch.diag(torch.linspace(0.01, 3, size, dtype=torch.float64))
    return x.T @ x / len(x)


def gradient_of(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def damped(matrix):
    return matrix + DAMPING * matrix.trace() / len(matrix) * torch.eye(len(matrix))


def metric_of(inputs, axis, derivatives):
    layer = LayerStatistics(1.0, InputCovariance(inputs, axis, 0.0), derivatives)
    return Kfac(DAMPING).metric(layer)


@pytest.mark.parametrize(("shape", "axis"), SHAPES)
def test_the_direction_is_the_dense_solution_of_the_kronecker_product(shape, axis):
    inputs, derivatives, gradient = moment(INPUTS, 0), moment(OUTPUTS, 1), gradient_of(shape)
    rows = gradient.reshape(OUTPUTS, INPUTS) if axis else gradient.T
    dense = torch.kron(damped(derivatives), damped(inputs))
    expected = torch.linalg.solve(dense, rows.flatten()).view(OUTPUTS, INPUTS)
    expected = expected.reshape(shape) if axis else expected.T
    found = metric_of(inputs, axis, derivatives).steepest(gradient.float())
    assert found.shape == gradient.shape
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("shape", "axis"), [*SHAPES, ((INPUTS,), 0)])
def test_products_of_scaled_gradients_are_those_of_directions(shape, axis):
    inputs, derivatives = moment(INPUTS, 0), moment(OUTPUTS, 1)
    if len(shape) == 1:
        inputs, derivatives = inputs.diagonal(), moment(INPUTS, 1).diagonal()
    metric = metric_of(inputs, axis, derivatives)
    f, r = gradient_of(shape), gradient_of(shape, seed=1)
    for other in (f, r):
        product = (metric.scaled(f) * metric.scaled(other)).sum()
        torch.testing.assert_close(product, (metric.steepest(f) * other).sum())


def test_a_norm_is_divided_by_both_diagonals():
    inputs, derivatives = moment(INPUTS, 0).diagonal(), moment(INPUTS, 1).diagonal()
    gradient = gradient_of((INPUTS,))
    floors = [each + DAMPING * each.mean() for each in (inputs, derivatives)]
    found = metric_of(inputs, 0, derivatives).steepest(gradient)
    torch.testing.assert_close(found, gradient / floors[0] / floors[1])


def test_each_group_of_a_convolution_has_factors_of_its_own():
    inputs = torch.stack([moment(4, seed) for seed in range(2)])
    derivatives, gradient = moment(6, 2), gradient_of((6, 2, 2, 1))
    found = metric_of(inputs, 1, derivatives).steepest(gradient)
    floor = DAMPING * float(inputs.diagonal(dim1=1, dim2=2).mean())
    sized = damped(derivatives)
    for group in range(2):
        rows = slice(3 * group, 3 * group + 3)
        block = inputs[group] + floor * torch.eye(4)
        expected = torch.linalg.inv(sized[rows, rows]) @ gradient[rows].view(3, 4) @ block.inverse()
        torch.testing.assert_close(found[rows], expected.view(3, 2, 2, 1))


def test_no_other_change_gains_more_per_move_of_the_features():
    """A linear layer, and features that are a linear map of its outputs: the factors are exact."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, INPUTS, generator=generator, dtype=torch.float64)
    head = torch.randn(OUTPUTS, 3, generator=generator, dtype=torch.float64)
    gradient = gradient_of((OUTPUTS, INPUTS))
    metric = Kfac(1e-9).metric(
        LayerStatistics(1.0, InputCovariance(x.T @ x / len(x), 1, 0.0), head @ head.T)
    )

    def gain(change):
        return (gradient * change).sum() / (x @ change.T @ head).square().sum(1).mean().sqrt()

    # Only changes that move features count: the gradient of a loss of these features is one.
    gradient = head @ head.T @ gradient
    direction = metric.steepest(gradient)
    best = gain(direction)
    assert best == pytest.approx(float(metric.scaled(gradient).norm()), rel=1e-4)
    assert metric.weight_norm() == 1.0
    noise = (torch.randn(direction.shape, generator=generator).double() for _ in range(50))
    others = [gradient, *(direction + float(direction.std()) * each for each in noise)]
    assert all(gain(other) < best for other in others)


def test_it_needs_both_factors():
    inputs = InputCovariance(moment(INPUTS, 0), 1, 0.0)
    for layer in (LayerStatistics(1.0, inputs), LayerStatistics(1.0, None, moment(OUTPUTS, 1))):
        with pytest.raises(InputError, match="both factors"):
            Kfac().metric(layer)


def test_the_most_important_layers_are_tried_whatever_their_alignment():
    points = [(3.0, 0.9), (1.0, 0.1), (2.0, 0.5), (4.0, 1.0)]
    assert layers_to_try(points, 2) == [True, False, False, True]
    assert layers_to_try(points, 9) == [True] * 4
    assert layers_to_try(points, None) == pareto_front(points)
    assert layers_to_try([], 2) == []
