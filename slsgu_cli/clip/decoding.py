"""Encoded images to pixels at the input size of a model."""

import hashlib
import io
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image, UnidentifiedImageError

from slsgu_cli.clip.batches import Images
from slsgu_cli.machine import cores
from slsgu_cli.prefetch import prefetch
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.sources.reader import SkippedImage

T = TypeVar("T")
# Images a core that are decoded ahead.
DECODED_AHEAD = 4
# Errors of PIL's readers on corrupt data.
DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AttributeError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Images that are used although unusual, and counted: each is read as open_clip reads it.
ROTATED = "rotated by EXIF, taken as stored"
ANIMATED = "animated, first frame taken"
TRANSPARENT = "alpha dropped"
CMYK = "CMYK converted"
ORIENTATION = 0x0112
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, slots=True)
class Decoded:
    """A decoded image, uint8 (height, width, 3), or the reason why it cannot be used.

    `source_digest` is the digest of the encoded bytes; `oddities` are those of the file.
    """

    pixels: Images | None
    reason: str | None
    source_digest: bytes
    oddities: tuple[str, ...] = ()


def decoder(spec: InputSpec) -> Callable[[bytes], Decoded]:
    """Return a function from an encoded image to its pixels at the model's input size.

    It may be called from several threads.
    """
    to_size = _to_size(spec)

    def decode(encoded: bytes) -> Decoded:
        source = hashlib.blake2b(encoded, digest_size=16).digest()
        try:
            with Image.open(io.BytesIO(encoded)) as opened:
                if _is_too_thin(opened.size, spec):
                    return Decoded(None, "extreme shape", source)
                oddities = _oddities(opened)
                if _is_deep(opened):
                    return Decoded(None, "more than 8 bits a pixel", source)
                pixels = np.asarray(to_size(opened), dtype=np.uint8)
            return Decoded(pixels, None, source, oddities)
        except Image.DecompressionBombError:
            reason = "decompression bomb"
        except UnidentifiedImageError:
            reason = "not an image" if encoded else "empty file"
        except DECODE_ERRORS:
            reason = "broken image"
        return Decoded(None, reason, source)

    return decode


def _to_size(spec: InputSpec) -> Callable[[Any], Any]:
    """Return open_clip's transforms as one function from an opened image to the input size."""
    from open_clip.transform import MaybeToTensor, image_transform

    transform = image_transform(
        (spec.height, spec.width),
        is_train=False,
        mean=spec.mean,
        std=spec.std,
        resize_mode=spec.resize_mode,
        interpolation=spec.interpolation,
        fill_color=spec.fill_color,
    )

    def by_stages(image: Any) -> Any:
        for stage in transform.transforms:
            if isinstance(stage, MaybeToTensor):
                break
            image = stage(image)
        return image

    def cropped_between(image: Any) -> Any:
        width, height = image.size
        if image.mode != "RGB" or width <= height:
            return by_stages(image)
        wide = int(spec.width * width / height)
        left = round((wide - spec.width) / 2)
        image = image.resize((wide, height), resample)
        image = image.crop((left, 0, left + spec.width, height))
        return image.resize((spec.width, spec.height), resample)

    # PIL resizes rows, rounds, and resizes columns: crop between the two to save the second half.
    resample = RESAMPLE.get(spec.interpolation)
    shortest = spec.resize_mode == "shortest" and spec.height == spec.width
    return cropped_between if shortest and resample is not None else by_stages


def _is_too_thin(size: tuple[int, int], spec: InputSpec) -> bool:
    """Return whether resizing the short side of an image would explode its long one."""
    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if spec.resize_mode != "shortest" or limit is None or not (width and height):
        return False
    scale = max(spec.width / width, spec.height / height)
    return scale * width * scale * height > limit


def _is_deep(image: Image.Image) -> bool:
    """Return whether an image has grey values above 255, which open_clip would make white."""
    if image.mode[0] not in "IF":
        return False
    highest: Any = image.getextrema()[1]
    return bool(highest > 255)


def _oddities(image: Image.Image) -> tuple[str, ...]:
    oddities = {
        CMYK: image.mode == "CMYK",
        TRANSPARENT: image.has_transparency_data,
        ANIMATED: getattr(image, "is_animated", False),
        ROTATED: image.getexif().get(ORIENTATION, 1) not in (0, 1),
    }
    return tuple(what for what, here in oddities.items() if here)


def decode_in_order(
    encoded: Iterable[tuple[T, bytes | None]], decode: Callable[[bytes], Decoded]
) -> Iterator[tuple[T, Decoded]]:
    """Yield (tag, result) for every (tag, encoded image), in order.

    Only a few images per core are in memory at a time.
    """

    def one(item: tuple[T, bytes | None]) -> tuple[T, Decoded]:
        tag, data = item
        if data is None:
            return tag, Decoded(None, "no image", b"")
        if isinstance(data, SkippedImage):
            return tag, Decoded(None, data.reason, b"")
        return tag, decode(data)

    return prefetch(one, encoded, threads=cores(), ahead=DECODED_AHEAD)
