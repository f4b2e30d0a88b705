"""Changed images: drawn by seed, of the same shape, and with the change that is named."""

import numpy as np
import pytest
import tiny_clip

from slsgu_cli.verification.checks.augment import CHANGES, changed

KINDS = pytest.mark.parametrize("kind", list(CHANGES))


@pytest.fixture(scope="module")
def images():
    rng = np.random.default_rng(5)
    return np.stack([np.asarray(tiny_clip.picture("ring", c, rng)) for c in ("blue", "red")])


@KINDS
def test_a_change_is_fixed_by_its_seed(kind, images):
    once, again = (changed(images, kind, seed=1) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert once.shape == images.shape
    assert once.dtype == np.uint8
    assert not np.array_equal(once, images)


@KINDS
def test_an_image_is_changed_by_its_place_and_not_by_its_neighbours(kind, images):
    np.testing.assert_array_equal(
        changed(images, kind, seed=1)[0], changed(images[:1], kind, seed=1)[0]
    )


@pytest.mark.parametrize("kind", ["crop", "colour", "rotation"])
def test_another_seed_draws_another_change(kind, images):
    assert not np.array_equal(changed(images, kind, seed=1), changed(images, kind, seed=2))


def test_a_flip_is_undone_by_a_flip(images):
    np.testing.assert_array_equal(changed(images, "flip", seed=0), images[:, :, ::-1])
    twice = changed(changed(images, "flip", seed=0), "flip", seed=0)
    np.testing.assert_array_equal(twice, images)


def test_a_rotation_brings_the_corners_colour_into_view():
    plain = np.full((1, 20, 20, 3), (10, 200, 30), dtype=np.uint8)
    np.testing.assert_array_equal(changed(plain, "rotation", seed=3), plain)


def test_a_blur_lowers_contrast(images):
    assert changed(images, "blur", seed=0).std() < images.std()
