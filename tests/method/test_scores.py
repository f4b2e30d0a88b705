import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slsgu_cli.method.fronts import pareto_front
from slsgu_cli.method.scores import alignment, importance, norm

# Few values, so that ties are frequent.
FEW = st.sampled_from([-1.0, 0.0, 0.25, 0.5, 1.0, 2.0])
ANY = st.floats(-1e6, 1e6)
POINTS = st.lists(st.tuples(FEW, FEW), max_size=25) | st.lists(st.tuples(ANY, ANY), max_size=25)


def vector(seed, size=50):
    return np.random.default_rng(seed).normal(size=size).astype(np.float32)


@given(POINTS)
def test_the_front_has_the_layers_that_nothing_dominates(points):
    def dominated(point):
        return any(other[0] > point[0] and other[1] < point[1] for other in points)

    assert pareto_front(points) == [not dominated(point) for point in points]


@given(POINTS)
def test_front_does_not_depend_on_order(points):
    backwards = pareto_front(points[::-1])[::-1]
    assert pareto_front(points) == backwards


@given(POINTS)
def test_the_most_important_and_the_least_aligned_layer_are_on_the_front(points):
    front = pareto_front(points)
    if points:
        for best in (max(p[0] for p in points), min(p[1] for p in points)):
            assert any(on and best in p for p, on in zip(points, front, strict=True))


@given(POINTS, st.sampled_from([0.125, 1.0, 8.0]))
def test_front_does_not_depend_on_scale(points, scale):
    assert pareto_front([(scale * x, y) for x, y in points]) == pareto_front(points)


def test_importance_is_the_gradients_share_of_the_weight():
    weight, gradient = vector(1), vector(2)
    expected = np.linalg.norm(gradient.astype(float)) / np.linalg.norm(weight.astype(float))
    assert importance(norm(gradient), norm(weight)) == pytest.approx(expected)
    assert importance(1.0, 0.0) == 0


def test_norm_of_any_shape_is_summed_in_double():
    values = np.full((3000, 1000), 1e-3, np.float32)
    assert norm(values) == pytest.approx(float(np.float32(1e-3)) * np.sqrt(3e6), rel=1e-12)
    assert norm(np.full(4, 3e38, np.float32)) == pytest.approx(2 * float(np.float32(3e38)))
    assert norm(np.zeros((0, 3), np.float32)) == 0


def test_norm_spans_its_chunks():
    values = np.zeros(3 * (1 << 22) + 5, np.float32)
    values[[0, 1 << 22, -1]] = 1, 2, 2
    assert norm(values) == 3


def test_alignment_is_the_cosine():
    a, b = vector(3).reshape(5, 10), vector(4).reshape(5, 10)
    a64, b64 = a.astype(float).ravel(), b.astype(float).ravel()
    cosine = a64 @ b64 / np.sqrt(a64 @ a64) / np.sqrt(b64 @ b64)
    assert alignment(a, b, signed=True) == pytest.approx(cosine, rel=1e-12)
    assert alignment(a, b, signed=False) == pytest.approx(abs(cosine), rel=1e-12)
    assert alignment(a, -b, signed=True) == pytest.approx(-cosine, rel=1e-12)
    assert alignment(a, -b, signed=False) == alignment(a, b, signed=False)
    assert alignment(a, a, signed=True) == pytest.approx(1)


@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_alignment_does_not_depend_on_lengths(one, other):
    a, b = vector(5).astype(np.float64), vector(6).astype(np.float64)
    for signed in (False, True):
        assert alignment(one * a, other * b, signed=signed) == pytest.approx(
            alignment(a, b, signed=signed), rel=1e-9
        )


def test_nothing_aligns_with_a_gradient_of_zeros():
    for signed in (False, True):
        assert alignment(vector(7), np.zeros(50, np.float32), signed=signed) == 0
