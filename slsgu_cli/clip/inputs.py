"""What a model takes: image bytes at its input size, rows on the device, in the memory there is.

Within that, what enters stages of towers is kept. Prompts are packed by what they begin with alike.
"""

import ctypes
import hashlib
import io
import struct
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from slsgu_cli.clip import processes
from slsgu_cli.clip.blocks import Stretch, mlp_half, stretched_attention
from slsgu_cli.clip.towers import EMBED, OpenClipText, SplitTower
from slsgu_cli.records.sets import InputSpec
from slsgu_cli.sources.rows import Unread
from slsgu_cli.store.files import cores, free_memory, prefetch

T = TypeVar("T")
Images = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.integer]
Pixels = Callable[[Images | Tensor], Tensor]

# Images and texts that run together. Of more images on a CPU, what is in between is so large that
# the system hands it out anew for every product, page by page.
IMAGES_PER_FORWARD = {"cpu": 16, "cuda": 1024, "mps": 256}
TEXTS_PER_FORWARD = {"cpu": 32, "cuda": 512, "mps": 128}

# Fewer prompts than this do not begin apart from others.
LEAST_ALIKE = 8

# Positions whose MLP runs at a time on a CPU: what is in between stays in its cache.
IN_CACHE = 2048

# Bytes of memory that are taken for free where the system does not tell.
ASSUMED_FREE = 8 << 30

# Images a core that are decoded ahead.
DECODED_AHEAD = 4


def spare(device: str) -> int:
    """Return the bytes that activations may take: most of a GPU, a quarter of free memory."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0] * 0.7)
    free = free_memory()
    return processes.local_share((ASSUMED_FREE if free is None else free) // 4)


@dataclass(slots=True)
class CacheBudget:
    """Bytes of activations that may still be kept."""

    left: int

    def take(self, size: int) -> bool:
        """Reserve `size` bytes if they are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


class Activations:
    """What enters one stage, of as many of `rows` rows as there is room for.

    Those whose keys are least are kept. `places` tells where a row lies in `values`, -1 for
    a row that is not kept.
    """

    def __init__(self, rows: int, room: int, like: Tensor) -> None:
        self.values = like.new_empty(room, *like.shape[1:])
        self.places = torch.full((rows,), -1, device=like.device)
        self._rows = torch.full((room,), -1, device=like.device)
        self._keys = torch.full((room,), float("inf"), device=like.device)

    def offer(self, rows: Tensor, x: Tensor, keys: Tensor) -> None:
        """Keep what enters for `rows`, in place of other rows whose keys are greater."""
        if len(self.values) == len(self.places):
            self.values[rows] = x
            self.places[rows] = rows
            return
        chosen = torch.zeros(len(self._keys) + len(x), dtype=torch.bool, device=x.device)
        chosen[torch.cat([self._keys, keys]).topk(len(self._keys), largest=False).indices] = True
        old, new = torch.split(chosen, [len(self._keys), len(x)])
        freed, entering = (~old).nonzero().squeeze(1), new.nonzero().squeeze(1)
        left = self._rows[freed]
        self.places[left[left >= 0]] = -1
        self.values[freed] = x[entering]
        self.places[rows[entering]] = freed
        self._rows[freed], self._keys[freed] = rows[entering], keys[entering]


def room(
    entering: Mapping[int, Tensor],
    rows: int,
    budget: CacheBudget,
    resumed: Mapping[int, int],
    share: float = 1.0,
    least: float = 0.0,
) -> dict[int, Activations]:
    """Make room at stages for as many of `rows` rows as fit into a share of what is left.

    `entering` is what enters each stage, for some rows, and `resumed` says how many edits resume
    there. Stages that save the most for their bytes come first, each for all rows: a row that is
    kept nowhere runs from the start, one that is kept a few stages before an edit only from there.
    Each must save `least` of the stages that edits run before theirs.
    """
    kept: dict[int, Activations] = {}
    left, waiting = int(budget.left * share), {stage: x[0].nbytes for stage, x in entering.items()}
    from_start = sum(count * (stage - EMBED) for stage, count in resumed.items())
    while waiting:
        saved = {stage: _saved(stage, kept, resumed) for stage in waiting}
        stage = max(waiting, key=lambda each: (saved[each] / waiting[each], each))
        size = waiting.pop(stage)
        count = min(rows, left // size)
        if count and saved[stage] >= least * from_start and budget.take(count * size):
            left -= count * size
            kept[stage] = Activations(rows, count, entering[stage])
    return kept


def _saved(stage: int, kept: Iterable[int], resumed: Mapping[int, int]) -> int:
    """Return how many stages of a row edits run less where what enters `stage` is kept, too."""
    return sum(
        count * max(0, stage - max((each for each in kept if each <= at), default=EMBED))
        for at, count in resumed.items()
        if at >= stage
    )


def return_memory() -> None:
    """Return memory to the system that is freed and that glibc and pyarrow keep."""
    if "pyarrow" in sys.modules:
        sys.modules["pyarrow"].default_memory_pool().release_unused()
    with suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


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

# What is kept though it is odd, and counted: each is read as open_clip reads it.
ROTATED = "rotated by EXIF, taken as stored"
ANIMATED = "animated, first frame taken"
TRANSPARENT = "alpha dropped"
CMYK = "CMYK converted"
ORIENTATION = 0x0112
RESAMPLE = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True, slots=True)
class Picture:
    """A decoded image, uint8 (height, width, 3), and what was odd about its file."""

    pixels: Images
    oddities: tuple[str, ...] = ()


class DecodeError(ValueError):
    """An image that cannot be used; `reason` is what it is counted under."""

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
    """Return open_clip's stages as one function from an opened image to one of the input size."""
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

    # PIL resizes rows, rounds, and resizes columns: what will be cropped needs no second half.
    resample = RESAMPLE.get(spec.interpolation)
    shortest = spec.resize_mode == "shortest" and spec.height == spec.width
    return cropped_between if shortest and resample is not None else by_stages


def _check_shape(size: tuple[int, int], spec: InputSpec) -> None:
    """Refuse an image so thin that resizing its short side blows up the long one."""
    width, height = size
    limit = Image.MAX_IMAGE_PIXELS
    if spec.resize_mode != "shortest" or limit is None or not (width and height):
        return
    scale = max(spec.width / width, spec.height / height)
    if scale * width * scale * height > limit:
        raise DecodeError("extreme shape")


def _check_depth(image: Image.Image) -> None:
    """Refuse grey values above 255: open_clip would turn all of them to white."""
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
    """One image, or the reason why there is none.

    `source_digest` names the encoded bytes; `oddities` says what was odd about an image that
    can be used.
    """

    pixels: Images | None
    reason: str | None
    source_digest: bytes
    oddities: tuple[str, ...] = ()

    def without_pixels(self) -> "Decoded":
        """Return the same without the image, to remember it by."""
        return replace(self, pixels=None)


def decode_in_order(
    encoded: Iterable[tuple[T, bytes | None]], decode: Callable[[bytes], Picture]
) -> Iterator[tuple[T, Decoded]]:
    """Yield (tag, result) for every (tag, encoded image), in order.

    At most a few images per core are in memory.
    """

    def one(item: tuple[T, bytes | None]) -> tuple[T, Decoded]:
        return item[0], _decode_one(item[1], decode)

    return prefetch(one, encoded, threads=cores(), ahead=DECODED_AHEAD)


def _decode_one(data: bytes | None, decode: Callable[[bytes], Picture]) -> Decoded:
    if data is None:
        return Decoded(None, "no image", b"")
    if isinstance(data, Unread):
        return Decoded(None, data.reason, b"")
    source = hashlib.blake2b(data, digest_size=16).digest()
    try:
        picture = decode(data)
    except DecodeError as error:
        return Decoded(None, error.reason, source)
    return Decoded(picture.pixels, None, source, picture.oddities)


def staged(images: Images, device: str) -> Tensor:
    """Return images on the host as `device` takes them without anyone waiting.

    It copies them once for a CUDA device: to be called where they are read ahead.
    """
    raw = torch.from_numpy(images)
    if not device.startswith("cuda"):
        return raw
    # Threads begin on the first card, of which every process would take some.
    with torch.cuda.device(device):
        return raw.pin_memory()


def pixel_normalizer(spec: InputSpec, device: str) -> Pixels:
    """Return uint8 (N, H, W, 3) to normalised fp32 (N, 3, H, W) on `device`.

    The arithmetic is that of torchvision's ToTensor and Normalize, in the same order. On a CPU
    channels lie apart, as there: where they lie last, PyTorch 2.14 ends the process in the
    backward of convolutions such as FastViT's.
    """
    layout = torch.contiguous_format if device == "cpu" else torch.preserve_format
    mean = torch.tensor(spec.mean, device=device).view(1, -1, 1, 1)
    std = torch.tensor(spec.std, device=device).view(1, -1, 1, 1)

    def normalize(images: Images | Tensor) -> Tensor:
        raw = images if isinstance(images, Tensor) else staged(images, device)
        raw = raw.to(device, non_blocking=True)
        pixels = raw.permute(0, 3, 1, 2).to(torch.float32, memory_format=layout)
        return pixels.div(255).sub(mean).div(std)

    return normalize


def spans(rows: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of consecutive runs of `size` rows; the last may be shorter."""
    return [(start, min(start + size, rows)) for start in range(0, rows, size)]


def even_spans(rows: int, size: int) -> list[tuple[int, int]]:
    """Return (start, stop) of the fewest consecutive runs of at most `size` rows, alike in size."""
    parts = -(-rows // size)
    return list(pairwise(rows * part // parts for part in range(parts + 1))) if parts else []


def by_length(tower: SplitTower, tokens: Tensor, size: int) -> list[Tensor]:
    """Return row indices in groups of about `size`, rows of similar length together."""
    if tokens.shape[0] <= size:
        return [torch.arange(tokens.shape[0])]
    order = torch.argsort(tower.lengths(tokens), stable=True)
    return list(torch.split(order, size))


def text_features(tower: SplitTower, tokens: Tensor, device: str) -> Tensor:
    """Return unit text features of `tokens` (N, L), each group at its own length.

    `tokens` are on the host, where lengths are known without waiting for the device.
    """
    groups = by_length(tower, tokens, TEXTS_PER_FORWARD[torch.device(device).type])
    parts = []
    for rows in groups:
        short = tower.trim(tokens[rows]).to(device, non_blocking=True)
        parts.append(tower.features(short, short))
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts)[torch.argsort(torch.cat(groups)).to(device)]


def by_beginning(tokens: Tensor, size: int) -> list[Tensor]:
    """Return row indices in groups of at most `size`, in the order of their tokens (N, L)."""
    order = np.lexsort(tokens.cpu().numpy().T[::-1])
    return list(torch.split(torch.from_numpy(order).to(tokens.device), size))


def packed(tower: SplitTower, tokens: Tensor) -> "PackedText | None":
    """Return a tower over the prompts `tokens` (N, L) alone; None where it cannot be packed.

    That takes a causal mask, and half blocks.
    """
    plain = type(tower) is OpenClipText and tower.shortens and tower.halves and not tower.sharded
    return PackedText(tower, tokens) if plain and len(tokens) else None  # type: ignore[arg-type]


class PackedText(SplitTower):
    """A causal text tower over some prompts, which runs once what they begin with alike.

    States are (positions, width): of a beginning those of all its tokens, then of each prompt
    those behind it. Under a causal mask a position depends on nothing that follows, so the
    features are those of `tower`. `inputs` are the prompts that it was made for.
    """

    halves = True

    def __init__(self, tower: OpenClipText, tokens: Tensor) -> None:
        self.tower, self.blocks, self.depth = tower, tower.blocks, tower.depth
        self._stretches: list[Stretch] = []
        words, lengths = tokens.cpu().numpy(), tower.lengths(tokens).cpu().numpy()
        # Of each position of the states: a prompt that it is of, and its place in that.
        rows, places, ends = [], [], []
        at = 0
        for group, shared in _beginnings(words, lengths):
            beginning = range(at, at + shared)
            if shared:
                self._stretches.append(Stretch(at, 1, shared, None))
                rows.append(np.repeat(group[:1], shared))
                places.append(np.arange(shared))
                at += shared
            for length in np.unique(lengths[group]):
                alike, rest = group[lengths[group] == length], int(length) - shared
                self._stretches.append(Stretch(at, len(alike), rest, beginning))
                rows.append(np.repeat(alike, rest))
                places.append(np.tile(np.arange(shared, length), len(alike)))
                ends.append(alike)
                at += len(alike) * rest
        device = tokens.device
        self.rows, self.places = (
            torch.from_numpy(np.concatenate(each)).to(device) for each in (rows, places)
        )
        self._order = torch.from_numpy(np.argsort(np.concatenate(ends))).to(device)

    def stage_of(self, parameter: str) -> int:
        """Return the first stage that `parameter` acts in."""
        return self.tower.stage_of(parameter)

    def embed(self, inputs: Tensor) -> Tensor:
        """Return token plus position embeddings of all positions."""
        owner = self.tower.owner
        words: Tensor = owner.token_embedding(inputs[self.rows, self.places])
        places: Tensor = owner.positional_embedding[self.places]
        return words + places

    def stage(self, index: int, x: Tensor, inputs: Tensor) -> Tensor:
        """Run half a block; from the last attention on, for the end of each prompt alone."""
        block = self.blocks[index // 2]
        if index % 2:
            size = IN_CACHE if x.device.type == "cpu" else max(len(x), 1)
            return torch.cat([mlp_half(block, part) for part in torch.split(x, size)])
        return stretched_attention(block, x, self._stretches, ends=index == self.depth - 2)

    def head(self, x: Tensor, inputs: Tensor) -> Tensor:
        """Normalise and project, in the order of the prompts."""
        return self.tower.head(x[self._order], inputs)


def _beginnings(words: Ints, lengths: Ints) -> list[tuple[Ints, int]]:
    """Return groups of prompts, and how many tokens all of each group begin with.

    At least one token of a prompt is behind its group's beginning.
    """
    groups: list[tuple[Ints, int]] = []
    waiting: list[tuple[Ints, int]] = [(np.arange(len(words)), 0)]
    while waiting:
        rows, shared = waiting.pop()
        most = int(lengths[rows].min()) - 1
        while shared < most and (words[rows, shared] == words[rows[0], shared]).all():
            shared += 1
        nexts, counts = np.unique(words[rows, shared], return_counts=True)
        apart = nexts[counts >= LEAST_ALIKE] if len(nexts) > 1 and shared < most else nexts[:0]
        waiting += [(rows[words[rows, shared] == each], shared) for each in apart]
        if len(rest := rows[~np.isin(words[rows, shared], apart)]):
            groups.append((rest, shared))
    return groups


def to_tokens(tokens: npt.NDArray[np.integer], device: str) -> Tensor:
    """Return token ids as an int64 tensor on `device`."""
    return torch.as_tensor(np.asarray(tokens), dtype=torch.long, device=device)
