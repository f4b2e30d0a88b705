"""Checkpoints as files: which weights they hold, and where a layer of open_clip's lies in them.

Layouts differ in names, transposes, shards and variants. Neither torch nor open_clip is
imported; a checkpoint of several GB is read in pieces.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from slsgu_cli.checkpoints.layers import LETTERS, Layer, block_count, third_of
from slsgu_cli.checkpoints.tensor_file import (
    CHUNK,
    CONVERT_HINT,
    FLOATS,
    Floats,
    Raw,
    Splice,
    TensorFile,
    canonical_name,
    looks_like_safetensors,
    open_safetensors,
    rounded,
    widen,
)
from slsgu_cli.checkpoints.torch_archive import open_torch
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.method import Tower
from slsgu_cli.store.files import copy_file, write_at

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")
DIGEST_PRECISIONS = {"fp32": "F32", "fp16": "F16", "bf16": "BF16"}
ZIP_START = b"PK\x03\x04"
LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
THREADS = 8


def open_weights(path: Path) -> TensorFile:
    """Return random access to the tensors of a .safetensors file or a torch archive.

    The format is told by the content. Raises MissingError or InputError.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if start.startswith(ZIP_START):
            return open_torch(path)
        if looks_like_safetensors(start) or path.suffix == ".safetensors":
            return open_safetensors(path)
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if start.startswith(LEGACY_START):
        raise InputError(f"{path} is in torch's format of before 1.6", hint=CONVERT_HINT)
    raise InputError(
        f"{path} is neither a safetensors file nor a torch archive",
        hint=f"give a checkpoint ending in {', '.join(SUFFIXES)} that holds a state dict",
    )


def read_layer(path: Path, name: str) -> Floats:
    """Return the layer that open_clip calls `name` in the file's own precision.

    fp16 stays fp16 and fp64 stays fp64; fp32 and bf16 come as fp32.
    """
    file = open_weights(path)
    layer = Layer.parse(name)
    stored = file.resolve_name(layer.parameter)
    half = file.entry(stored).dtype == "F16"
    values: Floats = layer.rows(file.stored(stored) if half else file.read(stored))
    return values


def layer_digests(values: Floats) -> dict[str, str]:
    """Return digests of a layer's values as they are in fp32, rounded to fp16, to bf16.

    Equal digests under `fp32` and `fp16` mean that the values are all fp16 numbers.
    """
    return {precision: layer_digest(values, precision) for precision in DIGEST_PRECISIONS}


def layer_digest(values: Floats, precision: str) -> str:
    """Return the digest of values rounded to `precision`: fp32, fp16 or bf16."""
    flat = values.reshape(-1)
    whole = hashlib.sha256()
    for start in range(0, flat.size, CHUNK):
        part = flat[start : start + CHUNK].astype(np.float32, copy=False)
        wide = rounded(part, DIGEST_PRECISIONS[precision])
        whole.update(np.ascontiguousarray(wide, "<f4").data)
    return whole.hexdigest()


def file_fingerprint(path: Path, instead: Mapping[str, Floats] | None = None) -> str:
    """Return 64 hexadecimal digits that name the weights a file holds.

    Parameters of `instead` count with these values in place of their own.

    The same weights have one fingerprint in every container and after upcasting, for the
    values are hashed as fp32 under open_clip's names; what a checkpoint keeps beside its
    weights does not count.
    """
    file = open_weights(path)
    names = {canonical_name(name): name for name in file.names()}
    other = {
        canonical_name(file.resolve_name(name)): values for name, values in (instead or {}).items()
    }

    def digest(name: str) -> str:
        if name in other:
            return layer_digest(other[name], "fp32")
        return _tensor_digest(file, names[name])

    shapes = {name: file.entry(stored).shape for name, stored in names.items()}
    return combined_fingerprint(shapes, digest)


def combined_fingerprint(
    shapes: Mapping[str, tuple[int, ...]], digest: Callable[[str], str]
) -> str:
    """Return the fingerprint of weights from their shapes and `digest`, which hashes one."""
    names = sorted(shapes)
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        digests = list(pool.map(digest, names))
    whole = hashlib.sha256()
    for name, value in zip(names, digests, strict=True):
        whole.update(f"{name} {list(shapes[name])} {value}\n".encode())
    return whole.hexdigest()


def values_digest(chunks: Iterable[Raw], dtype: str) -> str:
    """Return the digest of stored elements that stand in the number format `dtype`."""
    value = hashlib.sha256()
    if dtype not in FLOATS:
        value.update(f"{dtype} ".encode())
    for chunk in chunks:
        wide = widen(chunk, dtype).astype("<f4", copy=False) if dtype in FLOATS else chunk
        value.update(np.ascontiguousarray(wide).data)
    return value.hexdigest()


def copy_spliced(source: Path, target: Path, splices: Iterable[Splice]) -> None:
    """Copy a file to a new place and overwrite the spliced bytes in the copy."""
    copy_file(source, target)
    write_at(target, ((splice.offset, splice.data) for splice in splices))


def weight_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder that are named like checkpoints, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


def _tensor_digest(file: TensorFile, name: str) -> str:
    return values_digest(file.chunks(name), file.entry(name).dtype)


_FUSED = re.compile(r"attn\.in_proj_(weight|bias)")
_IN_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_OUTSIDE = {
    Tower.TEXT: {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
        "ln_final.weight": "final_layer_norm.weight",
        "ln_final.bias": "final_layer_norm.bias",
    },
    Tower.VISION: {
        "class_embedding": "embeddings.class_embedding",
        "positional_embedding": "embeddings.position_embedding.weight",
        "conv1.weight": "embeddings.patch_embedding.weight",
        "ln_pre.weight": "pre_layrnorm.weight",
        "ln_pre.bias": "pre_layrnorm.bias",
        "ln_post.weight": "post_layernorm.weight",
        "ln_post.bias": "post_layernorm.bias",
    },
}
_PROJECTION = {
    Tower.TEXT: ("text_projection", "text_projection.weight", "text_model."),
    Tower.VISION: ("proj", "visual_projection.weight", "vision_model."),
}
_PREFIX = {Tower.TEXT: "text.", Tower.VISION: "visual."}


class Spelling(StrEnum):
    """Whose names and shapes a checkpoint's towers have."""

    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "transformers"


# The names that tell where a tower is, and what must not stand before it.
_ANCHORS = (
    (Tower.TEXT, Spelling.TRANSFORMERS, re.compile(r"(.*\.|)embeddings\.token_embedding\.weight")),
    (
        Tower.VISION,
        Spelling.TRANSFORMERS,
        re.compile(r"(.*\.|)embeddings\.patch_embedding\.weight"),
    ),
    (
        Tower.TEXT,
        Spelling.OPEN_CLIP,
        re.compile(r"((?!.*embeddings\.).*\.|)token_embedding\.weight"),
    ),
    (
        Tower.TEXT,
        Spelling.OPEN_CLIP,
        re.compile(r"((?!.*visual\.).*\.|)transformer\.resblocks\.\d+\..*"),
    ),
    # A text tower of another family, as open_clip holds it.
    (Tower.TEXT, Spelling.OPEN_CLIP, re.compile(r"((?!.*visual\.)(?:.*\.|)text\.).*")),
    (Tower.VISION, Spelling.OPEN_CLIP, re.compile(r"(.*\.|)visual\..*")),
)


@dataclass(frozen=True, slots=True)
class TowerPlace:
    """One CLIP tower among a checkpoint's tensors: `prefix` stands before its own names."""

    tower: Tower
    spelling: Spelling
    prefix: str


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """One tensor that holds a layer, or a third of its rows: `part` of query, key, value.

    With `within`, the layer is itself that third of the tensor's rows.
    """

    key: str
    part: int | None = None
    within: int | None = None
    transposed: bool = False

    def from_layer(self, layer: Any) -> Any:
        """Return what this tensor holds of a layer, array or tensor, of open_clip's shape."""
        if self.part is not None:
            layer = third_of(layer, self.part)
        return layer.T if self.transposed else layer

    def rows(self, values: Any) -> Any:
        """Return the rows of this tensor's values that belong to the layer, as a view."""
        return values if self.within is None else third_of(values, self.within)

    def to_layer(self, values: Any) -> Any:
        """Return what `rows` does in open_clip's shape."""
        return self.rows(values).T if self.transposed else self.rows(values)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what is held, from that of this tensor."""
        if self.within is not None:
            whole = (whole[0] // len(LETTERS), *whole[1:])
        return whole[::-1] if self.transposed else whole


def tower_places(keys: Iterable[str]) -> list[TowerPlace]:
    """Return the CLIP towers among the names of a checkpoint's tensors, sorted by prefix."""
    places = {
        TowerPlace(tower, spelling, match[1])
        for key in keys
        for tower, spelling, anchor in _ANCHORS
        if (match := anchor.fullmatch(key))
    }
    return sorted(places, key=lambda place: (place.tower, place.prefix, place.spelling))


def tensor_places(name: str, tower_place: TowerPlace) -> tuple[TensorPlace, ...]:
    """Return the tensors of a tower that hold the layer open_clip calls `name`, in order.

    Empty where the layer is of the other tower, or has no counterpart in this spelling.
    """
    layer = Layer.parse(name)
    if layer.tower is not tower_place.tower:
        return ()
    name = layer.parameter.removeprefix(_PREFIX[tower_place.tower])
    if tower_place.spelling is Spelling.OPEN_CLIP:
        start = _PREFIX[Tower.VISION] if tower_place.tower is Tower.VISION else ""
        return (TensorPlace(f"{tower_place.prefix}{start}{name}", within=layer.third),)
    projection, key, inner = _PROJECTION[tower_place.tower]
    if name == projection:
        return (TensorPlace(tower_place.prefix.removesuffix(inner) + key, transposed=True),)
    if name in _OUTSIDE[tower_place.tower]:
        return (TensorPlace(tower_place.prefix + _OUTSIDE[tower_place.tower][name]),)
    inside = name.removeprefix(f"transformer.resblocks.{layer.block}.")
    if inside == name:
        return ()
    places = _in_block(f"{tower_place.prefix}encoder.layers.{layer.block}.", inside)
    if layer.third is None:
        return places
    return tuple(TensorPlace(place.key) for place in places if place.part == layer.third)


def names(tower: Tower, blocks: int) -> list[str]:
    """Return the names that open_clip's CLIP has for all tensors of a tower."""
    prefix = _PREFIX[tower] if tower is Tower.VISION else ""
    modules = ("attn.in_proj_{}", *(f"{module}.{{}}" for module in _IN_BLOCK))
    inside = [module.format(kind) for module in modules for kind in ("weight", "bias")]
    return [
        *(prefix + name for name in (*_OUTSIDE[tower], _PROJECTION[tower][0])),
        *(
            f"{prefix}transformer.resblocks.{block}.{name}"
            for block in range(blocks)
            for name in inside
        ),
    ]


# What a model_cfg says of a CLIP whose towers are plain transformers, and nothing beside.
_PLAIN = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
_PLAIN_VISION = {"image_size", "patch_size", "layers", "width"}
_PLAIN_TEXT = {"context_length", "vocab_size", "layers", "width", "heads"}
_SILENT = {"head_width", "mlp_ratio"}
_TOKENIZER = {"hf_tokenizer_name", "tokenizer_kwargs"}


def clip_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of every tensor that open_clip's CLIP has for a model_cfg, by its name.

    None for a configuration of any other kind than plain transformers: these are built.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    plain = (
        config.keys() <= _PLAIN
        and _PLAIN_VISION <= vision.keys() <= _PLAIN_VISION | _SILENT
        and _PLAIN_TEXT <= text.keys() <= _PLAIN_TEXT | _SILENT | _TOKENIZER
        and all(isinstance(vision[name], int) for name in _PLAIN_VISION)
    )
    if not plain:
        return None
    width, patch, embed = vision["width"], vision["patch_size"], config["embed_dim"]
    positions = (vision["image_size"] // patch) ** 2 + 1
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (positions, width),
        "visual.conv1.weight": (width, 3, patch, patch),
        "visual.proj": (width, embed),
        "token_embedding.weight": (text["vocab_size"], text["width"]),
        "positional_embedding": (text["context_length"], text["width"]),
        "text_projection": (text["width"], embed),
    }
    for tower, part in ((Tower.VISION, vision), (Tower.TEXT, text)):
        for name in names(tower, part["layers"]):
            if name not in shapes:
                shapes[name] = _plain_shape(name, part["width"], part.get("mlp_ratio", 4.0))
    return shapes


def _plain_shape(name: str, width: int, mlp_ratio: float) -> tuple[int, ...]:
    """Return the shape of a parameter of a block, or of a norm outside of them."""
    rows = columns = width
    if "in_proj" in name:
        rows = 3 * width
    elif "c_fc" in name:
        rows = int(width * mlp_ratio)
    elif "c_proj" in name:
        columns = int(width * mlp_ratio)
    is_matrix = name.endswith("weight") and "ln_" not in name
    return (rows, columns) if is_matrix else (rows,)


def _in_block(prefix: str, name: str) -> tuple[TensorPlace, ...]:
    if fused := _FUSED.fullmatch(name):
        keys = (f"{prefix}self_attn.{letter}_proj.{fused[1]}" for letter in LETTERS)
        return tuple(TensorPlace(key, part) for part, key in enumerate(keys))
    module, _, kind = name.rpartition(".")
    theirs = _IN_BLOCK.get(module)
    return (TensorPlace(f"{prefix}{theirs}.{kind}"),) if theirs else ()


def assembled(places: Sequence[TensorPlace], tensors: Mapping[str, Raw]) -> Raw:
    """Return a layer in open_clip's shape from the tensors that hold it, by their names."""
    parts = [place.to_layer(tensors[place.key]) for place in places]
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def placed(
    places: Sequence[TensorPlace], layer: Raw, tensors: Callable[[str], Raw]
) -> dict[str, Raw]:
    """Return a layer's tensors with its values in them, by name: the inverse of `assembled`.

    `tensors` tells the values as they are, of a tensor that holds more than the layer.
    """
    new = {}
    for place in places:
        if place.within is None:
            new[place.key] = place.from_layer(layer)
        else:
            new[place.key] = tensors(place.key).copy()
            place.rows(new[place.key])[...] = place.from_layer(layer)
    return new


# A shard's number in a file name, with or without a variant before or behind it.
_SHARD = re.compile(r"-\d{5}-of-(\d{5})")


@dataclass(frozen=True, slots=True)
class WeightSet:
    """One whole set of weights: a file, or the shards it was cut into.

    `owners` tells which file holds a tensor, `towers` where CLIP's towers are.
    """

    files: dict[Path, TensorFile]
    owners: dict[str, Path]
    towers: list[TowerPlace]

    @property
    def path(self) -> Path:
        """Return the file, or the first of the shards, to name this set by."""
        return next(iter(self.files))

    def holds(self, places: Sequence[TensorPlace]) -> bool:
        """Return whether every one of some tensors is there. Raises InputError for a part."""
        missing = [place.key for place in places if place.key not in self.owners]
        if missing and len(missing) < len(places):
            raise InputError(
                f"{self.path.parent} holds a part of a layer only: {', '.join(missing)} is missing",
                hint="fetch or copy the model again, all of its shards",
            )
        return bool(places) and not missing

    def shape(self, places: Sequence[TensorPlace]) -> tuple[int, ...]:
        """Return a layer's shape as open_clip has it."""
        entries = [self.files[self.owners[place.key]].entry(place.key) for place in places]
        shapes = [place.shape(entry.shape) for place, entry in zip(places, entries, strict=True)]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if shapes[0] else ()

    def layer(self, places: Sequence[TensorPlace]) -> tuple[Raw, str]:
        """Return a layer's stored values in open_clip's shape, and their number format."""
        files = {place.key: self.files[self.owners[place.key]] for place in places}
        formats = {file.entry(key).dtype for key, file in files.items()}
        if len(formats) > 1:
            raise InputError(
                f"{', '.join(files)} are of different number formats in {self.path}",
                hint="save the model again in one precision",
            )
        return assembled(places, {key: f.stored(key) for key, f in files.items()}), formats.pop()

    def blocks(self, tower_place: TowerPlace) -> int:
        """Return how many blocks a tower has."""
        return block_count(key for key in self.owners if key.startswith(tower_place.prefix))


def read_weight_set(paths: Iterable[Path]) -> WeightSet:
    """Read where the tensors of one set of weights lie. Raises MissingError or InputError."""
    files = {path: open_weights(path) for path in paths}
    owners: dict[str, Path] = {}
    for path, file in files.items():
        for key in file.names():
            if key in owners:
                raise InputError(
                    f"{key} lies in {owners[key]} and in {path.name} as well",
                    hint="remove the shard that is left over from an earlier save",
                )
            owners[key] = path
    return WeightSet(files, owners, tower_places(owners))


def read_weight_sets(folder: Path) -> tuple[list[WeightSet], dict[Path, str]]:
    """Return each set of weights directly in a folder, and the files that cannot be read.

    Sets without a CLIP tower (an adapter, say) are left out.
    """
    groups: dict[tuple[str, ...], list[Path]] = {}
    for path in weight_files(folder):
        groups.setdefault(tuple(_SHARD.split(path.name)), []).append(path)
    weight_sets: list[WeightSet] = []
    unread: dict[Path, str] = {}
    for name, paths in groups.items():
        try:
            if len(name) > 1 and len(paths) != int(name[1]):
                raise InputError(f"only {len(paths)} of its {int(name[1])} shards are there")
            weights = read_weight_set(paths)
        except InputError as error:
            unread |= dict.fromkeys(paths, error.message)
            continue
        if weights.towers:
            weight_sets.append(weights)
    return weight_sets, unread
