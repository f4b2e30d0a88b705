"""Changed images: what a photographer, a web site or a user does to a picture, drawn by seed."""

import io
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from slsgu_cli.verification.bench import Bench
from slsgu_cli.verification.records import Probe, Settings

Images = npt.NDArray[np.uint8]
Change = Callable[[Image.Image, np.random.Generator], Image.Image]
CROP = (0.7, 0.9)
DEGREES = 20.0
STRENGTH = 0.4
HUE = 16
BLUR = 0.015
JPEG_QUALITY = 30


def changed(images: Images, kind: str, *, seed: int) -> Images:
    """Return images (N, H, W, 3) each changed in the way called `kind`.

    What is drawn for an image depends on the seed, the kind and its place alone.
    """
    change, number = CHANGES[kind], list(CHANGES).index(kind)
    out = np.empty_like(images)
    for row, pixels in enumerate(images):
        generator = np.random.default_rng((seed, number, row))
        out[row] = np.asarray(change(Image.fromarray(pixels), generator))
    return out


def augment(bench: Bench, settings: Settings) -> list[Probe]:
    """Measure forget accuracy on the concept's images after each kind of change."""
    group = bench.evaluation.forget
    images = group.images.block.take(group.images.rows)
    probes = []
    for kind in CHANGES:
        features = bench.image_features(changed(images, kind, seed=settings.seed))
        found = bench.forget_accuracy(group.prompts.embeddings, features)
        probes.append(Probe(kind, found))
    return probes


def _flip(image: Image.Image, _generator: np.random.Generator) -> Image.Image:
    return ImageOps.mirror(image)


def _crop(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Cut out 70 to 90% of each side, somewhere, and scale it up."""
    share = generator.uniform(*CROP)
    width, height = (max(1, round(share * side)) for side in image.size)
    left = int(generator.integers(0, image.width - width + 1))
    top = int(generator.integers(0, image.height - height + 1))
    part = image.crop((left, top, left + width, top + height))
    return part.resize(image.size, Image.Resampling.BICUBIC)


def _colour(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Change brightness, contrast and saturation by up to 40%, and the hue a little."""
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(generator.uniform(1 - STRENGTH, 1 + STRENGTH))
    hue, *rest = image.convert("HSV").split()
    turn = int(generator.integers(-HUE, HUE + 1))
    turned = Image.fromarray((np.asarray(hue).astype(int) + turn).astype(np.uint8))
    return Image.merge("HSV", (turned, *rest)).convert("RGB")


def _rotation(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """Turn by up to 20 degrees; what comes into view has the mean colour of the corners."""
    pixels = np.asarray(image)
    corners = pixels[[0, 0, -1, -1], [0, -1, 0, -1]].mean(axis=0)
    fill = tuple(int(round(value)) for value in corners)
    angle = generator.uniform(-DEGREES, DEGREES)
    return image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=fill)


def _blur(image: Image.Image, _generator: np.random.Generator) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(BLUR * min(image.size)))


def _jpeg(image: Image.Image, _generator: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=JPEG_QUALITY)
    return Image.open(buffer).convert("RGB")


CHANGES: dict[str, Change] = {
    "flip": _flip,
    "crop": _crop,
    "colour": _colour,
    "rotation": _rotation,
    "blur": _blur,
    "jpeg": _jpeg,
}
