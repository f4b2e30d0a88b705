import io
import struct
import zlib

import numpy as np
import pytest
import torch
from open_clip.transform import image_transform
from PIL import Image
from tiny_images import encoded

from slsgu_cli.clip.decoding import (
    ANIMATED,
    CMYK,
    ORIENTATION,
    ROTATED,
    TRANSPARENT,
    decoder,
)
from slsgu_cli.records.sets import InputSpec

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def spec(height=32, width=32, *, resize_mode="shortest", interpolation="bicubic", fill_color=0):
    return InputSpec(
        height, width, MEAN, STD, interpolation, resize_mode, fill_color, "tokenizer", 77
    )


IMAGES = {
    "rgb": encoded(1),
    "jpeg": encoded(2, (300, 200), kind="JPEG"),
    "rgba": encoded(3, mode="RGBA"),
    "palette": encoded(4, mode="P"),
    "grayscale": encoded(5, mode="L"),
    "gray-alpha": encoded(6, mode="LA"),
    "bilevel": encoded(7, mode="1"),
    "cmyk": encoded(8, mode="CMYK", kind="JPEG"),
    "16-bit": encoded(9, mode="I;16"),
    "wide": encoded(10, (300, 20)),
    "tall": encoded(11, (7, 211)),
    "tiny": encoded(12, (1, 1)),
    "exact": encoded(13, (32, 32)),
    "gif": encoded(14, kind="GIF"),
}
SPECS = {
    "square": spec(),
    "oblong": spec(24, 40),
    "bilinear": spec(interpolation="bilinear"),
    "squash": spec(resize_mode="squash"),
    "longest": spec(resize_mode="longest", fill_color=127),
}


def open_clips(wanted):
    return image_transform(
        (wanted.height, wanted.width),
        is_train=False,
        mean=MEAN,
        std=STD,
        resize_mode=wanted.resize_mode,
        interpolation=wanted.interpolation,
        fill_color=wanted.fill_color,
    )


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("name", SPECS)
def test_pixels_are_open_clips_to_the_bit(image, name):
    wanted = SPECS[name]
    full = open_clips(wanted)
    data = IMAGES[image]
    try:
        expected = full(Image.open(io.BytesIO(data)))
    except ValueError:  # open_clip itself cannot: a side would shrink to nothing
        assert decoder(wanted)(data).reason == "broken image"
        return
    pixels = decoder(wanted)(data).pixels
    assert pixels.dtype == np.uint8
    assert pixels.shape == (wanted.height, wanted.width, 3)
    scaled = torch.from_numpy(pixels.copy()).permute(2, 0, 1).float().div(255)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    assert torch.equal((scaled - mean) / std, expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_wide_images_of_any_size_are_open_clips_to_the_bit(interpolation):
    wanted = spec(interpolation=interpolation)
    *stages, _, _ = open_clips(wanted).transforms
    sizes = np.random.default_rng(0).integers(1, 200, (100, 2))
    for seed, (one, other) in enumerate(sizes.tolist()):
        data = encoded(seed, (max(one, other), min(one, other)), kind="JPEG")
        expected = Image.open(io.BytesIO(data))
        for stage in stages:
            expected = stage(expected)
        assert np.array_equal(decoder(wanted)(data).pixels, np.asarray(expected))


def test_every_failure_has_its_reason(monkeypatch):
    decode = decoder(spec())
    jpeg = IMAGES["jpeg"]
    cases = {
        b"": "empty file",
        b"<html>not found</html>": "not an image",
        jpeg[: len(jpeg) // 2]: "broken image",
        IMAGES["rgb"][:60]: "broken image",
    }
    for data, reason in cases.items():
        assert (decode(data).pixels, decode(data).reason) == (None, reason)
    assert len({decode(data).source_digest for data in cases}) == len(cases)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    assert decode(jpeg).reason == "decompression bomb"


def oriented(orientation):
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.open(io.BytesIO(encoded(1, (40, 20)))).save(buffer, "JPEG", exif=exif)
    return buffer.getvalue()


def animation(kind):
    buffer = io.BytesIO()
    frames = [Image.open(io.BytesIO(encoded(seed))) for seed in (1, 2)]
    frames[0].save(buffer, kind, save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "oddities"),
    [
        (IMAGES["rgb"], ()),
        (IMAGES["grayscale"], ()),
        (IMAGES["cmyk"], (CMYK,)),
        (IMAGES["rgba"], (TRANSPARENT,)),
        (IMAGES["gray-alpha"], (TRANSPARENT,)),
        (animation("GIF"), (ANIMATED,)),
        (animation("WEBP"), (ANIMATED,)),
        (animation("PNG"), (ANIMATED,)),
        (oriented(6), (ROTATED,)),
        (oriented(1), ()),
    ],
)
def test_odd_images_are_used_and_noted(data, oddities):
    assert decoder(spec())(data).oddities == oddities


def test_a_rotated_image_is_read_as_stored():
    stored = decoder(spec())(oriented(1)).pixels
    assert np.array_equal(decoder(spec())(oriented(6)).pixels, stored)


def test_grey_values_above_255_are_refused():
    grey = np.linspace(0, 65_535, 400).reshape(20, 20).astype(np.uint16)
    for values, refused in ((grey, True), (grey // 257, False)):
        buffer = io.BytesIO()
        Image.fromarray(values).save(buffer, "PNG")
        decoded = decoder(spec())(buffer.getvalue())
        if refused:
            assert decoded.reason == "more than 8 bits a pixel"
        else:
            assert decoded.pixels.min() < 20


def test_an_extremely_thin_image_is_refused():
    # 2 x 60,000 pixels would be resized to 448 x 13,440,000.
    thin = encoded(0, (2, 60_000))
    assert decoder(spec(448, 448))(thin).reason == "extreme shape"
    assert decoder(spec(8, 8))(thin).pixels.shape == (8, 8, 3)


def test_a_png_that_claims_to_be_huge_is_a_bomb():
    data = bytearray(IMAGES["rgb"])
    data[16:24] = struct.pack(">II", 60_000, 60_000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    assert decoder(spec())(bytes(data)).reason == "decompression bomb"
