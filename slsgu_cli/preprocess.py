"""Decode an image exactly as open_clip's validation preprocessing would, and stop at uint8.

The stages are open_clip's own, up to the one that makes a tensor; what is left of its
preprocessing is (pixels / 255 - mean) / std, which costs nothing on the device.
"""

import io
import itertools
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from open_clip.transform import MaybeToTensor, image_transform
from PIL import Image, UnidentifiedImageError

from slsgu_cli.records import InputSpec

Pixels = npt.NDArray[np.uint8]
# What PIL's format readers raise on data that is not what it says it is.
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


class DecodeError(ValueError):
    """An image that cannot be used; `reason` is what it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decoder(spec: InputSpec) -> Callable[[bytes], Pixels]:
    """Return a function from an encoded image to uint8 pixels (height, width, 3).

    It may be called from several threads. It raises DecodeError.
    """
    stages = _pil_stages(spec)

    def decode(encoded: bytes) -> Pixels:
        if not encoded:
            raise DecodeError("empty file")
        try:
            with Image.open(io.BytesIO(encoded)) as opened:
                _check_shape(opened.size, spec)
                image: Any = opened
                for stage in stages:
                    image = stage(image)
                return np.asarray(image, dtype=np.uint8)
        except Image.DecompressionBombError as error:
            raise DecodeError("decompression bomb") from error
        except UnidentifiedImageError as error:
            raise DecodeError("not an image") from error
        except DecodeError:
            raise
        except DECODE_ERRORS as error:
            raise DecodeError("broken image") from error

    return decode


def _pil_stages(spec: InputSpec) -> list[Callable[[Any], Any]]:
    transform = image_transform(
        (spec.height, spec.width),
        is_train=False,
        mean=spec.mean,
        std=spec.std,
        resize_mode=spec.resize_mode,
        interpolation=spec.interpolation,
        fill_color=spec.fill_color,
    )
    return list(
        itertools.takewhile(
            lambda stage: not isinstance(stage, MaybeToTensor), transform.transforms
        )
    )


def _check_shape(size: tuple[int, int], spec: InputSpec) -> None:
    """Refuse an image so thin that resizing its short side blows up the long one."""
    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if spec.resize_mode != "shortest" or limit is None or not (width and height):
        return
    scale = max(spec.width / width, spec.height / height)
    if scale * width * scale * height > limit:
        raise DecodeError("extreme shape")
