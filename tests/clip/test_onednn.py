"""Products by oneDNN are what PyTorch computes, with their gradients."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from slsgu_cli.clip import onednn
from slsgu_cli.clip.onednn import FastProducts, linear, product

# Rows, inputs, outputs; and inputs with two leading axes.
SHAPES = [((1,), 16, 8), ((7,), 5, 3), ((300,), 192, 768), ((2, 9), 32, 96)]
ONEDNN = pytest.mark.skipif(not onednn.HAS_ONEDNN, reason="this PyTorch has no oneDNN")


@pytest.fixture
def products(monkeypatch):
    """Count products by oneDNN."""
    counted = []
    monkeypatch.setattr(onednn, "product", lambda *given: (counted.append(1), product(*given))[1])
    return counted


def drawn(rows, inputs, outputs, bias):
    generator = torch.Generator().manual_seed(3)
    shapes = [(*rows, inputs), (outputs, inputs), *([(outputs,)] if bias else [])]
    return [torch.randn(shape, generator=generator) for shape in shapes]


@ONEDNN
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_outputs_and_gradients_are_those_in_double(rows, inputs, outputs, bias, products):
    given = drawn(rows, inputs, outputs, bias)
    single = [each.clone().requires_grad_() for each in given]
    double = [each.double().requires_grad_() for each in given]
    left, plain = linear(*single), F.linear(*double)
    slope = torch.randn(plain.shape, generator=torch.Generator().manual_seed(4))
    left.backward(slope)
    plain.backward(slope.double())
    assert len(products) == 3
    pairs = [(left, plain), *((s.grad, d.grad) for s, d in zip(single, double, strict=True))]
    for one, other in pairs:
        assert one.dtype is torch.float32
        assert (one - other).norm() <= 1e-6 * other.norm()


@ONEDNN
def test_an_unneeded_gradient_is_not_computed(products):
    x, weight, bias = drawn((4,), 6, 5, bias=True)
    weight.requires_grad_()
    linear(x, weight, bias).sum().backward()
    assert len(products) == 2
    with torch.no_grad():
        linear(x, weight, bias)
    assert len(products) == 3


@ONEDNN
@pytest.mark.parametrize(
    "part",
    [
        lambda x: x[:, 2:10],
        lambda x: x[::3],
        lambda x: x.T,
        lambda x: x.T[3:9],
        lambda x: x[:1].expand(8, -1),
    ],
)
def test_parts_of_tensors_are_multiplied_as_copies_are(part):
    whole = torch.randn(24, 24, generator=torch.Generator().manual_seed(5))
    x = part(whole)
    weight = torch.randn(7, x.shape[1], generator=torch.Generator().manual_seed(6))
    assert torch.equal(product(x, weight), product(x.clone(), weight))
    assert torch.equal(product(weight, x), product(weight, x.clone()))


@pytest.mark.parametrize(
    "given",
    [
        [each.double() for each in drawn((3,), 4, 2, bias=True)],
        [each.bfloat16() for each in drawn((3,), 4, 2, bias=True)],
        [torch.zeros(0, 4), torch.ones(2, 4)],
        [torch.ones(4), torch.ones(2, 4)],
        [torch.ones(3, 4, device="meta"), torch.ones(2, 4, device="meta")],
    ],
)
def test_calls_that_onednn_cannot_take_go_to_pytorch(given, products):
    left, plain = linear(*given), F.linear(*given)
    assert (left.dtype, left.shape, products) == (plain.dtype, plain.shape, [])
    assert left.is_meta or torch.equal(left, plain)


def test_a_pass_in_16_bits_stays_in_16_bits(products):
    x, weight, bias = drawn((3,), 4, 2, bias=True)
    with torch.autocast("cpu", torch.bfloat16), FastProducts():
        assert F.linear(x, weight, bias).dtype is torch.bfloat16
    assert products == []


@ONEDNN
def test_modules_use_them_while_the_mode_is_active(products):
    module = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Linear(6, 2, bias=False))
    x = torch.randn(5, 6)
    plain = module(x)
    assert products == []
    with FastProducts():
        assert torch.allclose(module(x), plain, atol=1e-6)
    assert len(products) == 2


def test_function_modes_see_linear_layers_once():
    heard = []

    class Listening(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            heard.append(func)
            return func(*args, **kwargs or {})

    x, weight = drawn((3,), 4, 2, bias=False)
    with Listening(), FastProducts():
        F.linear(x, weight)
    assert heard == [linear]


# How much memory a process has more of, in MB, after products of many numbers of rows.
GROWTH = """
import torch
from slsgu_cli.clip.onednn import product

def held():
    status = open("/proc/self/status").read()
    return int(status.split("RssAnon:")[1].split()[0]) / 1000

weights = [torch.ones(576, 192), torch.ones(192, 192), torch.ones(768, 192), torch.ones(192, 768)]
before = held()
for rows in range(64, 364):
    for weight in weights:
        product(torch.ones(rows, weight.shape[1]), weight)
print(held() - before)
"""


@ONEDNN
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="not told of its memory")
def test_few_primitives_of_many_shapes_stay_in_memory():
    grown = subprocess.check_output([sys.executable, "-c", GROWTH])
    assert float(grown) < 250
