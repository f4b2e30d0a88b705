"""Which of the matching pairs are kept: those the model itself sees, and each image once.

`min_similarity` is the filter that LAION was made with: the cosine of a pair's own image
and caption. Near-duplicates are told by a perceptual hash: 64 bits that say which of the
lowest frequencies of the grey image are above their median, so that other sizes, qualities
and encodings of one picture differ in few bits.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from slsgu_cli import progress
from slsgu_cli.clip import models
from slsgu_cli.errors import UsageError
from slsgu_cli.records.sets import InputSpec, Screening
from slsgu_cli.store.blocks import Pixels

if TYPE_CHECKING:
    from torch import nn


BATCH = 64
GRID, LOW = 32, 8
Cosines = Callable[[Pixels, Sequence[str]], npt.NDArray[np.float32]]


@dataclass(frozen=True, slots=True)
class Screen:
    """The tests of one build; `recipe` says what they depend on."""

    options: Screening
    cosines: Cosines | None
    recipe: list[Any]

    def start(self) -> "ScreenedSet":
        """Return the tests for one set, which has no rows yet."""
        return ScreenedSet(self)


@dataclass(slots=True)
class ScreenedSet:
    """Screens the rows of one set in their order, some at a time."""

    screen: Screen
    _reasons: dict[int, str] = field(default_factory=dict)
    _hashes: dict[int, int] = field(default_factory=dict)
    _kept: list[int] = field(default_factory=list)

    def judge(self, captions: Mapping[int, str], image: Callable[[int], Pixels]) -> None:
        """Test the next images, by number, with their captions; `refusal` tells what came of it."""
        self._reasons, self._hashes = {}, {}
        numbers = sorted(captions)
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            pixels = np.stack([image(number) for number in batch])
            if self.screen.options.near_duplicates is not None:
                self._hashes |= {n: perceptual_hash(p) for n, p in zip(batch, pixels, strict=True)}
            if self.screen.cosines:
                cosines = self.screen.cosines(pixels, [captions[number] for number in batch])
                least = self.screen.options.min_similarity or 0.0
                for number, cosine in zip(batch, cosines, strict=True):
                    if cosine < least:
                        self._reasons[number] = "below --min-similarity"

    def refusal(self, number: int) -> str | None:
        """Return why the image is not kept; if there is nothing, it counts as kept."""
        reason = self._reasons.get(number)
        limit = self.screen.options.near_duplicates
        if reason or limit is None:
            return reason
        image_hash = self._hashes[number]
        kept = np.asarray(self._kept, dtype=np.uint64) ^ np.uint64(image_hash)
        differing = np.unpackbits(kept.view(np.uint8).reshape(-1, 8), axis=1).sum(axis=1)
        if differing.size and differing.min() <= limit:
            return "near-duplicate"
        self._kept.append(image_hash)
        return None


def screen_for(options: Screening, model: models.ResolvedModel, spec: InputSpec) -> Screen | None:
    """Return the tests that `options` ask for, None for none. Raises UsageError."""
    least, bits = options.min_similarity, options.near_duplicates
    if least is not None and not -1 <= least <= 1:
        raise UsageError(f"--min-similarity is {least}; a cosine lies between -1 and 1")
    if bits is not None and not 0 <= bits <= 32:
        raise UsageError(f"--near-duplicates is {bits}; give 0 to 32 of a hash's 64 bits")
    if least is None and bits is None:
        return None
    weights = None if least is None else models.fingerprint(model)
    cosines = None if least is None else _cosines(model, spec, options.device)
    return Screen(options, cosines, [least, weights, bits])


def perceptual_hash(pixels: Pixels) -> int:
    """Return 64 bits that say which low frequencies of the grey image are above their median."""
    grey = Image.fromarray(pixels).convert("L").resize((GRID, GRID), Image.Resampling.BOX)
    cosine = _cosine_basis()
    low = (cosine @ np.asarray(grey, dtype=np.float64) @ cosine.T).ravel()
    # The mean brightness says nothing of the picture.
    low[0] = np.median(low[1:])
    bits = low > np.median(low[1:])
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


@cache
def _cosine_basis() -> npt.NDArray[np.float64]:
    """Return the LOW slowest waves of the discrete cosine transform, (LOW, GRID)."""
    places = (np.arange(GRID) + 0.5) * np.pi / GRID
    return np.cos(np.arange(LOW)[:, None] * places)


def _cosines(model: models.ResolvedModel, spec: InputSpec, device: str) -> Cosines:
    """Return a function of images and captions that loads the model when first called."""

    @cache
    def parts() -> tuple["nn.Module", str, Any]:
        from slsgu_cli.clip.inputs import pixel_normalizer

        where = models.pick_device(device)
        module = models.load(model, where, warn=progress.warn)
        return module, where, pixel_normalizer(spec, where)

    def cosines(pixels: Pixels, captions: Sequence[str]) -> npt.NDArray[np.float32]:
        import torch

        from slsgu_cli.clip.inputs import to_tokens

        module, where, normalize = parts()
        encode: Any = module
        with torch.no_grad():
            images = encode.encode_image(normalize(pixels), normalize=True)
            tokens = to_tokens(models.tokenizer(model)(captions), where)
            texts = encode.encode_text(tokens, normalize=True)
            values: npt.NDArray[np.float32] = (images * texts).sum(-1).float().cpu().numpy()
        return values

    return cosines
