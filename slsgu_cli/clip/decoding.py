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
class Picture:
    """A decoded image, uint8 (height, width, 3), and the oddities of its file."""

    pixels: Images
    oddities: tuple[str, ...] = ()


class DecodeError(ValueError):
    """An image that cannot be used; `reason` is the category it is counted in."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decoder(spec: InputSpec) -> Callable[[bytes], Picture]:
    """Return a function from an encoded image to its pixels at the model's input size.

    It may be called from several threads. It raises DecodeError.
    """
    to_size = _to_size(spec)

    def decode(encoded: bytes) -> Picture:
        if not encoded:
            raise DecodeError("empty file")
        try:
            with Image.open(io.BytesIO(encoded)) as opened:
                _check_shape(opened.size, spec)
                oddities = _oddities(opened)
                _check_depth(opened)
                return Picture(np.asarray(to_size(opened), dtype=np.uint8), oddities)
        except Image.DecompressionBombError as error:
            raise DecodeError("decompression bomb") from error
        except UnidentifiedImageError as error:
            raise DecodeError("not an image") from error
        except DecodeError:
            raise
        except DECODE_ERRORS as error:
            raise DecodeError("broken image") from error

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


def _check_shape(size: tuple[int, int], spec: InputSpec) -> None:
    """Raise DecodeError for an image so thin that resizing its short side explodes the long one."""
    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if spec.resize_mode != "shortest" or limit is None or not (width and height):
        return
    scale = max(spec.width / width, spec.height / height)
    if scale * width * scale * height > limit:
        raise DecodeError("extreme shape")


def _check_depth(image: Image.Image) -> None:
    """Raise DecodeError for grey values above 255, which open_clip would turn to white."""
    if image.mode[0] not in "IF":
        return
    highest: Any = image.getextrema()[1]
    if highest > 255:
        raise DecodeError("more than 8 bits a pixel")


def _oddities(image: Image.Image) -> tuple[str, ...]:
    oddities = {
        CMYK: image.mode == "CMYK",
        TRANSPARENT: image.has_transparency_data,
        ANIMATED: getattr(image, "is_animated", False),
        ROTATED: image.getexif().get(ORIENTATION, 1) not in (0, 1),
    }
    return tuple(what for what, here in oddities.items() if here)


@dataclass(frozen=True, slots=True)
class Decoded:
    """One image, or the reason why it cannot be used.

    `source_digest` is the digest of the encoded bytes; `oddities` are those of the file.
    """

    pixels: Images | None
    reason: str | None
    source_digest: bytes
    oddities: tuple[str, ...] = ()


def decode_in_order(
    encoded: Iterable[tuple[T, bytes | None]], decode: Callable[[bytes], Picture]
) -> Iterator[tuple[T, Decoded]]:
    """Yield (tag, result) for every (tag, encoded image), in order.

    Only a few images per core are in memory at a time.
    """

    def one(item: tuple[T, bytes | None]) -> tuple[T, Decoded]:
        return item[0], _decode_one(item[1], decode)

    return prefetch(one, encoded, threads=cores(), ahead=DECODED_AHEAD)


def _decode_one(data: bytes | None, decode: Callable[[bytes], Picture]) -> Decoded:
    if data is None:
        return Decoded(None, "no image", b"")
    if isinstance(data, SkippedImage):
        return Decoded(None, data.reason, b"")
    source = hashlib.blake2b(data, digest_size=16).digest()
    try:
        picture = decode(data)
    except DecodeError as error:
        return Decoded(None, error.reason, source)
    return Decoded(picture.pixels, None, source, picture.oddities)
