"""Checkpoints as files: which weights they hold, and where a layer of open_clip's lies in them.

Layouts differ in names, transposes, shards and variants. Neither torch nor open_clip is
imported; a checkpoint of several GB is read in pieces.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
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


_PREFIX = {Tower.TEXT: "text.", Tower.VISION: "visual."}


class Spelling(StrEnum):
    """Whose names and shapes a checkpoint's towers have."""

    OPEN_CLIP = "open_clip"
    TRANSFORMERS = "transformers"
    SIGLIP = "siglip of transformers"


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
    # SigLIP's have what CLIP's have not.
    (Tower.TEXT, Spelling.SIGLIP, re.compile(r"((?:.*\.|)text_model\.)head\.weight")),
    (Tower.VISION, Spelling.SIGLIP, re.compile(r"(.*\.|)embeddings\.patch_embedding\.bias")),
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

    With `within`, the layer is itself that third of the tensor's rows, or so many `thirds` from
    there on. `lead` is 1 where the layer has an axis of one before the tensor's, and -1 where
    the tensor has one before the layer's.
    """

    key: str
    part: int | None = None
    within: int | None = None
    thirds: int = 1
    transposed: bool = False
    lead: int = 0

    @property
    def is_plain(self) -> bool:
        """Whether the tensor's bytes are the layer's."""
        return self == TensorPlace(self.key) or bool(self.lead)

    def from_layer(self, layer: Any) -> Any:
        """Return what this tensor holds of a layer, array or tensor, of open_clip's shape."""
        if self.part is not None:
            layer = third_of(layer, self.part)
        if self.lead:
            return layer.reshape(_led(tuple(layer.shape), -self.lead))
        return layer.T if self.transposed else layer

    def rows(self, values: Any) -> Any:
        """Return the rows of this tensor's values that belong to the layer, as a view."""
        if self.within is None:
            return values
        rows = values.shape[0] // len(LETTERS)
        return values[self.within * rows : (self.within + self.thirds) * rows]

    def to_layer(self, values: Any) -> Any:
        """Return what `rows` does in open_clip's shape."""
        if self.lead:
            return values.reshape(_led(tuple(values.shape), self.lead))
        return self.rows(values).T if self.transposed else self.rows(values)

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of what is held, from that of this tensor."""
        if self.within is not None:
            whole = (whole[0] // len(LETTERS) * self.thirds, *whole[1:])
        return _led(whole, self.lead)[::-1] if self.transposed else _led(whole, self.lead)


def _led(shape: tuple[int, ...], axes: int) -> tuple[int, ...]:
    """Return a shape with an axis of one before it, or without the one that it has there."""
    if axes > 0:
        return (1, *shape)
    return shape[1:] if axes < 0 and shape[:1] == (1,) else shape


@dataclass(frozen=True, slots=True)
class TowerNames:
    """What transformers calls the tensors of a tower, by open_clip's names for them.

    These begin with `start`. Tensors `outside` of blocks lie inside of the tower, those `beside`
    where the tower lies itself, under the name of `inner`. In each of `blocks`, open_clip fuses
    the weights and biases of query, key and value into one tensor, `fused`; all else are
    `modules` with a weight and a bias.
    """

    start: str
    outside: Mapping[str, TensorPlace]
    beside: Mapping[str, TensorPlace]
    inner: str
    blocks: str
    fused: str
    modules: Mapping[str, str]

    def listed(self, blocks: int) -> list[str]:
        """Return open_clip's names of all tensors of a tower of so many blocks."""
        modules = (self.fused, *(f"{module}.{{}}" for module in self.modules))
        inside = [module.format(kind) for module in modules for kind in ("weight", "bias")]
        in_blocks = [f"{self.blocks}.{block}.{name}" for block in range(blocks) for name in inside]
        return [self.start + name for name in (*self.outside, *self.beside, *in_blocks)]

    def places(self, name: str, block: int | None, prefix: str) -> tuple[TensorPlace, ...]:
        """Return where a tensor lies that open_clip calls `name`, after `start`, in a block."""
        if name in self.beside:
            place, prefix = self.beside[name], prefix.removesuffix(self.inner)
            return (replace(place, key=prefix + place.key),)
        if name in self.outside:
            return (replace(self.outside[name], key=prefix + self.outside[name].key),)
        inside = name.removeprefix(f"{self.blocks}.{block}.")
        if inside == name:
            return ()
        prefix += f"encoder.layers.{block}."
        for kind in ("weight", "bias"):
            if inside == self.fused.format(kind):
                keys = (f"{prefix}self_attn.{letter}_proj.{kind}" for letter in LETTERS)
                return tuple(TensorPlace(key, part) for part, key in enumerate(keys))
        module, _, kind = inside.rpartition(".")
        theirs = self.modules.get(module)
        return (TensorPlace(f"{prefix}{theirs}.{kind}"),) if theirs else ()


def _tensors(names: Mapping[str, str]) -> dict[str, TensorPlace]:
    """Return the places of tensors that differ in name only."""
    return {name: TensorPlace(theirs) for name, theirs in names.items()}


def _modules(names: Mapping[str, str]) -> dict[str, TensorPlace]:
    """Return the places of modules' weights and biases that differ in name only."""
    kinds = ("weight", "bias")
    return _tensors(
        {f"{name}.{kind}": f"{theirs}.{kind}" for name, theirs in names.items() for kind in kinds}
    )


_OPEN_CLIPS_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_TIMMS_BLOCK = {
    "attn.proj": "self_attn.out_proj",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_TEXT_OUTSIDE = _tensors(
    {
        "token_embedding.weight": "embeddings.token_embedding.weight",
        "positional_embedding": "embeddings.position_embedding.weight",
    }
) | _modules({"ln_final": "final_layer_norm"})
_POOL = "head.attention.in_proj_"
_NAMES = {
    (Spelling.TRANSFORMERS, Tower.TEXT): TowerNames(
        start="",
        outside=_TEXT_OUTSIDE,
        beside={"text_projection": TensorPlace("text_projection.weight", transposed=True)},
        inner="text_model.",
        blocks="transformer.resblocks",
        fused="attn.in_proj_{}",
        modules=_OPEN_CLIPS_BLOCK,
    ),
    (Spelling.TRANSFORMERS, Tower.VISION): TowerNames(
        start="visual.",
        outside=_tensors(
            {
                "class_embedding": "embeddings.class_embedding",
                "positional_embedding": "embeddings.position_embedding.weight",
                "conv1.weight": "embeddings.patch_embedding.weight",
            }
        )
        | _modules({"ln_pre": "pre_layrnorm", "ln_post": "post_layernorm"}),
        beside={"proj": TensorPlace("visual_projection.weight", transposed=True)},
        inner="vision_model.",
        blocks="transformer.resblocks",
        fused="attn.in_proj_{}",
        modules=_OPEN_CLIPS_BLOCK,
    ),
    (Spelling.SIGLIP, Tower.TEXT): TowerNames(
        start="text.",
        outside=_TEXT_OUTSIDE | _modules({"text_projection": "head"}),
        beside={},
        inner="text_model.",
        blocks="transformer.resblocks",
        fused="attn.in_proj_{}",
        modules=_OPEN_CLIPS_BLOCK,
    ),
    (Spelling.SIGLIP, Tower.VISION): TowerNames(
        start="visual.",
        outside=_modules(
            {
                "trunk.patch_embed.proj": "embeddings.patch_embedding",
                "trunk.norm": "post_layernorm",
                "trunk.attn_pool.proj": "head.attention.out_proj",
                "trunk.attn_pool.norm": "head.layernorm",
                "trunk.attn_pool.mlp.fc1": "head.mlp.fc1",
                "trunk.attn_pool.mlp.fc2": "head.mlp.fc2",
            }
        )
        | {
            "trunk.attn_pool.latent": TensorPlace("head.probe"),
            "trunk.pos_embed": TensorPlace("embeddings.position_embedding.weight", lead=1),
            "trunk.attn_pool.q.weight": TensorPlace(f"{_POOL}weight", within=0),
            "trunk.attn_pool.q.bias": TensorPlace(f"{_POOL}bias", within=0),
            "trunk.attn_pool.kv.weight": TensorPlace(f"{_POOL}weight", within=1, thirds=2),
            "trunk.attn_pool.kv.bias": TensorPlace(f"{_POOL}bias", within=1, thirds=2),
        },
        beside={},
        inner="vision_model.",
        blocks="trunk.blocks",
        fused="attn.qkv.{}",
        modules=_TIMMS_BLOCK,
    ),
}
_SCALES = {
    Spelling.TRANSFORMERS: {"logit_scale": TensorPlace("logit_scale")},
    Spelling.SIGLIP: {name: TensorPlace(name, lead=-1) for name in ("logit_scale", "logit_bias")},
}


def tower_places(keys: Iterable[str]) -> list[TowerPlace]:
    """Return the CLIP towers among the names of a checkpoint's tensors, sorted by prefix."""
    places = {
        TowerPlace(tower, spelling, match[1])
        for key in keys
        for tower, spelling, anchor in _ANCHORS
        if (match := anchor.fullmatch(key))
    }
    # A SigLIP has what tells a CLIP as well.
    places -= {
        replace(place, spelling=Spelling.TRANSFORMERS)
        for place in places
        if place.spelling is Spelling.SIGLIP
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
    spelt = _NAMES[tower_place.spelling, tower_place.tower]
    places = spelt.places(name, layer.block, tower_place.prefix)
    if layer.third is None:
        return places
    return tuple(TensorPlace(place.key) for place in places if place.part == layer.third)


def names(tower: Tower, blocks: int, spelling: Spelling = Spelling.TRANSFORMERS) -> list[str]:
    """Return open_clip's names for all tensors of a tower that transformers spells so."""
    return _NAMES[spelling, tower].listed(blocks)


def whole_model(weights: "WeightSet") -> dict[str, tuple[TensorPlace, ...]]:
    """Return where each tensor of a model of transformers lies, by the name of open_clip."""
    found: dict[str, tuple[TensorPlace, ...]] = {}
    for spelling in sorted({place.spelling for place in weights.towers}):
        found |= {name: (place,) for name, place in _SCALES[spelling].items()}
    for place in weights.towers:
        for name in names(place.tower, weights.blocks(place), place.spelling):
            found[name] = tensor_places(name, place)
    return found


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
