"""`augment`: changed images of the concept, by torchvision's transforms."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torchvision.transforms import v2

from slsgu_cli.records.verification import Settings, Variant
from slsgu_cli.verification.model import ModelUnderTest
from slsgu_cli.verification.registry import CheckSpec

Images = npt.NDArray[np.uint8]
Change = Callable[[Tensor], Tensor]
BICUBIC, BILINEAR = v2.InterpolationMode.BICUBIC, v2.InterpolationMode.BILINEAR
# Shares of the area that crops keep: 70 to 90% of each side.
CROP = (0.7**2, 0.9**2)
DEGREES = 20
STRENGTH, HUE = 0.4, 0.06
# The standard deviation of the blur, relative to the shorter side.
BLUR = 0.015
JPEG_QUALITY = 30


def _crop(image: Tensor) -> Tensor:
    size = list(image.shape[-2:])
    crop = v2.RandomResizedCrop(size, scale=CROP, ratio=(1, 1), interpolation=BICUBIC)
    return crop(image)  # type: ignore[no-any-return]


def _rotation(image: Tensor) -> Tensor:
    """Rotate; fill uncovered pixels with the mean colour of the corners."""
    corners = image[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    fill = corners.float().mean(dim=1).round().tolist()
    size = list(image.shape[-2:])
    # Without a margin, interpolation would mix the fill into the border.
    padded = v2.functional.pad(image, [max(size) // 2], fill=fill)
    rotated = v2.RandomRotation(DEGREES, interpolation=BILINEAR)(padded)
    return v2.functional.center_crop(rotated, size)  # type: ignore[no-any-return]


def _blur(image: Tensor) -> Tensor:
    sigma = BLUR * min(image.shape[-2:])
    kernel = 2 * int(np.ceil(3 * sigma)) + 1
    return v2.functional.gaussian_blur(image, [kernel, kernel], [sigma, sigma])  # type: ignore[no-any-return]


CHANGES: dict[str, Change] = {
    "flip": v2.functional.horizontal_flip,
    "crop": _crop,
    "colour": v2.ColorJitter(STRENGTH, STRENGTH, STRENGTH, HUE),
    "rotation": _rotation,
    "blur": _blur,
    "jpeg": v2.JPEG(JPEG_QUALITY),
}


def changed(images: Images, kind: str, *, seed: int) -> Images:
    """Return images (N, H, W, 3), each changed by the transform `kind`.

    The draw for an image depends on the seed, the kind and its index alone.
    """
    out = np.empty_like(images)
    with torch.random.fork_rng(devices=[]):
        for row, pixels in enumerate(images):
            entropy = np.random.SeedSequence((seed, list(CHANGES).index(kind), row))
            torch.manual_seed(int(entropy.generate_state(1)[0]))
            image = torch.tensor(pixels).permute(2, 0, 1)
            out[row] = CHANGES[kind](image).permute(1, 2, 0).numpy()
    return out


def augment(model: ModelUnderTest, settings: Settings) -> list[Variant]:
    """Measure forget accuracy on the concept's images after each kind of change."""
    group = model.evaluation.forget
    images = group.images.block.take(group.images.rows)
    variants = []
    for kind in CHANGES:
        features = model.image_features(changed(images, kind, seed=settings.seed))
        forget = model.forget_accuracy(group.prompts.embeddings, features)
        variants.append(Variant(kind, forget))
    return variants


SPEC = CheckSpec(
    run=augment,
    fills="variants",
    settings=("seed",),
    revision=2,
    effort="changed images ({})",
)
