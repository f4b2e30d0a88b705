"""Filters of image-caption pairs by the model itself and by near-duplicates.

`min_similarity` is LAION's filter: the cosine of a pair's own image and caption.
Near-duplicates have similar perceptual hashes: 64 bits, one for each of the lowest frequencies
of the grey image, set if it is above their median. Copies in other sizes, qualities and
encodings differ in few bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slsgu_cli import progress
from slsgu_cli.clip import devices, loading, models, tokenizers
from slsgu_cli.errors import UsageError
from slsgu_cli.records.sets import InputSpec, Screening
from slsgu_cli.store.blocks import Pixels

if TYPE_CHECKING:
    from torch import nn

# Images to filter at a time.
BATCH = 64
GRID, LOW = 32, 8
Cosines = Callable[[Pixels, Sequence[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class PairFilter:
    """The filters of one build; `recipe` is everything that they depend on."""

    options: Screening
    cosines: Cosines | None
    recipe: list[Any]


@dataclass(slots=True)
class FilteredSet:
    """Filter the rows of one set in their order, a window at a time."""

    filter: PairFilter
    _dissimilar: set[int] = field(default_factory=set)
    _hashes: list[int] = field(default_factory=list)

    def compare(self, captions: Mapping[int, str], image: Callable[[int], Pixels]) -> None:
        """Compare the images of the next window, by number, with their captions."""
        self._dissimilar.clear()
        if self.filter.cosines is None:
            return
        least = self.filter.options.min_similarity or 0.0
        numbers = sorted(captions)
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            pixels = np.stack([image(number) for number in batch])
            cosines = self.filter.cosines(pixels, [captions[number] for number in batch])
            self._dissimilar.update(np.asarray(batch)[cosines < least].tolist())

    def refusal(self, number: int, pixels: Pixels) -> str | None:
        """Return the reason to drop an image; None accepts it, and drops later duplicates."""
        if number in self._dissimilar:
            return "below --min-similarity"
        limit = self.filter.options.near_duplicates
        if limit is None:
            return None
        image_hash = perceptual_hash(pixels)
        accepted = np.asarray(self._hashes, dtype=np.uint64) ^ np.uint64(image_hash)
        differing = np.unpackbits(accepted.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
        if differing.size and differing.min() <= limit:
            return "near-duplicate"
        self._hashes.append(image_hash)
        return None


def pair_filter(
    options: Screening, model: models.ResolvedModel, spec: InputSpec
) -> PairFilter | None:
    """Return the filters in `options`, None without any. Raises UsageError."""
    least, bits = options.min_similarity, options.near_duplicates
    if least is not None and not -1 <= least <= 1:
        raise UsageError(f"--min-similarity is {least}; a cosine lies between -1 and 1")
    if bits is not None and not 0 <= bits <= 32:
        raise UsageError(f"--near-duplicates is {bits}; give 0 to 32 of a hash's 64 bits")
    if least is None and bits is None:
        return None
    weights = None if least is None else models.fingerprint(model)
    cosines = None if least is None else _cosines(model, spec, options.device)
    return PairFilter(options, cosines, [least, weights, bits])


def perceptual_hash(pixels: Pixels) -> int:
    """Return 64 bits, one for each low frequency of the grey image: is it above the median?"""
    grey = Image.fromarray(pixels).convert("L").resize((GRID, GRID), Image.Resampling.BOX)
    cosine = _cosine_basis()
    low = (cosine @ np.asarray(grey, dtype=np.float64) @ cosine.T).ravel()
    # The mean brightness does not count.
    low[0] = np.median(low[1:])
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _cosine_basis() -> npt.NDArray[np.float64]:
    """Return the LOW slowest waves of the discrete cosine transform, (LOW, GRID)."""
    places = (np.arange(GRID) + 0.5) * np.pi / GRID
    return np.cos(np.arange(LOW)[:, None] * places)


def _cosines(model: models.ResolvedModel, spec: InputSpec, device: str) -> Cosines:
    """Return a function of images and captions that loads the model on its first call."""

    @cache
    def parts() -> tuple["nn.Module", str, Any]:
        from slsgu_cli.clip.batches import pixel_normalizer

        where = devices.pick_device(device)
        module = loading.load(model, where, warn=progress.warn)
        return module, where, pixel_normalizer(spec, where)

    def cosines(pixels: Pixels, captions: Sequence[str]) -> npt.NDArray[np.float32]:
        import torch

        from slsgu_cli.clip.batches import to_tokens

        module, where, normalize = parts()
        encode: Any = module
        with torch.no_grad():
            images = encode.encode_image(normalize(pixels), normalize=True)
            tokens = to_tokens(tokenizers.tokenizer(model)(captions), where)
            texts = encode.encode_text(tokens, normalize=True)
            values: npt.NDArray[np.float32] = (images * texts).sum(-1).float().cpu().numpy()
        return values

    return cosines
