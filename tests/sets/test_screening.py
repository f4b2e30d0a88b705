import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slsgu_cli.clip import loading
from slsgu_cli.errors import UsageError
from slsgu_cli.records.sets import Screening
from slsgu_cli.sets.pair_filter import perceptual_hash
from slsgu_cli.store.blocks import DataBlock


def picture(seed, size=96):
    """Smooth colours, as photographs have."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def bits(a, b):
    return (perceptual_hash(np.asarray(a)) ^ perceptual_hash(np.asarray(b))).bit_count()


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 500))
def test_copies_hash_alike_and_other_pictures_do_not(seed):
    image = picture(seed)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=60)
    assert bits(image, Image.open(buffer)) <= 6
    assert bits(image, image.resize((64, 64))) <= 6
    assert bits(image, image.point(lambda value: value * 0.8)) <= 6
    assert bits(image, picture(seed + 1)) > 10


def test_each_picture_is_stored_once(world):
    plain = world.build(name="plain")
    screened = world.build(name="once", screening=Screening(near_duplicates=0))
    hashes = [
        perceptual_hash(image)
        for image in DataBlock.open(world.store, plain.forget).images(0, plain.forget.rows)
    ]
    assert screened.forget.rows == len(set(hashes))
    if len(set(hashes)) < len(hashes):
        assert screened.forget.refused["near-duplicate"] == len(hashes) - len(set(hashes))


def test_pairs_below_the_cosine_threshold_are_dropped(world):
    import open_clip
    import torch

    plain = world.build(name="plain")
    block = DataBlock.open(world.store, plain.forget)
    module, _, _ = open_clip.create_model_and_transforms(world.model.name)
    spec = plain.input
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (spec.mean, spec.std))
    images = torch.from_numpy(block.images(0, block.rows)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        image = module.eval().encode_image((images - mean) / std, normalize=True)
        text = module.encode_text(torch.from_numpy(block.tokens), normalize=True)
    cosines = (image * text).sum(-1).numpy()
    least = float(np.sort(cosines)[block.rows // 2 - 1 : block.rows // 2 + 1].mean())
    screened = world.build(name="seen", screening=Screening(min_similarity=least))
    kept = DataBlock.open(world.store, screened.forget)
    expected = {key for key, cosine in zip(block.keys, cosines, strict=True) if cosine > least}
    assert set(kept.keys) == expected
    assert screened.forget.refused["below --min-similarity"] == block.rows - len(expected)
    assert screened.forget.path != plain.forget.path


@pytest.mark.parametrize(
    "screening", [Screening(min_similarity=2.0), Screening(near_duplicates=40)]
)
def test_limits_out_of_range_are_usage_errors(world, screening):
    with pytest.raises(UsageError, match=r"--min-similarity is 2|--near-duplicates is 40"):
        world.build(screening=screening)


def test_a_plain_build_loads_no_model(world, monkeypatch):
    monkeypatch.setattr(loading, "load", None)
    assert world.build(name="plain").forget.rows
