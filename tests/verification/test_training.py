"""Training on the side: the model's own loss, seeded rows, and weights that come back."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from slsgu_cli.method.losses import contrastive, sigmoid
from slsgu_cli.verification.checks.relearn import new_name
from slsgu_cli.verification.model import altered
from slsgu_cli.verification.training import contrastive_of, cycled, schedule

SCALE, BIAS = torch.tensor(12.0), torch.tensor(-3.0)


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(2)
    return [F.normalize(torch.randn(6, 9, generator=generator), dim=-1) for _ in range(2)]


def test_without_alike_pairs_it_is_the_retain_loss(features):
    for loss, bias in ((contrastive(SCALE), None), (sigmoid(SCALE, BIAS), BIAS)):
        own = contrastive_of(*features, alike=0, scale=SCALE, bias=bias)
        torch.testing.assert_close(own, loss(*features))
        one = contrastive_of(*features, alike=1, scale=SCALE, bias=bias)
        torch.testing.assert_close(one, own)


def test_alike_pairs_are_no_negatives_of_each_other(features):
    images, texts = features
    shown = torch.cat([images[:1].expand(3, -1), images[3:]])
    named = torch.cat([texts[:1].expand(3, -1), texts[3:]])
    together = contrastive_of(shown, named, alike=3, scale=SCALE)
    apart = contrastive_of(shown, named, alike=0, scale=SCALE)
    torch.testing.assert_close(together, apart)
    # Only what draws each image to one of several equal texts differs, and it cannot be met.
    images, texts = (f.clone().requires_grad_() for f in features)
    contrastive_of(images, texts, alike=3, scale=SCALE).backward()
    with torch.no_grad():
        moved = F.normalize(images - 0.01 * images.grad, dim=-1)
        before, after = (contrastive_of(v, texts, alike=3, scale=SCALE) for v in (images, moved))
    assert after < before


def test_rows_are_cycled_each_once_before_any_again():
    rows = cycled(10, 4, seed=3)
    drawn = np.concatenate([next(rows) for _ in range(5)])
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    again = cycled(10, 4, seed=3)
    np.testing.assert_array_equal(drawn[:4], next(again))
    few = cycled(2, 5, seed=0)
    assert len(next(few)) == 5


@pytest.mark.parametrize("steps", [1, 2, 5, 16, 100])
def test_the_first_and_the_last_step_are_measured(steps):
    found = schedule(steps)
    assert (found[0], found[-1]) == (0, steps)
    assert found == sorted(set(found))


def test_early_steps_are_measured_closer():
    assert schedule(16) == [0, 1, 2, 3, 4, 6, 8, 12, 16]


def test_weights_come_back_after_training_and_after_errors():
    model = torch.nn.Linear(3, 2)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    pointer = model.weight.data_ptr()
    with pytest.raises(KeyboardInterrupt), altered(model, lambda _, values: values.clone()):
        model.weight.data.add_(1)
        assert not torch.equal(model.weight, before["weight"])
        raise KeyboardInterrupt
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert model.weight.data_ptr() == pointer


def test_a_new_name_is_a_word_of_the_names_length():
    name = new_name("facebook", seed=0)
    assert name == new_name("facebook", seed=0) != new_name("facebook", seed=1)
    assert len(name) == 8
    assert name.isalpha()
    assert 4 <= len(new_name("x", seed=0)) <= len(new_name("x" * 40, seed=0)) <= 12
