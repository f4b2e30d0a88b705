"""Checkpoints as files: their weights, whole or in shards, and their layers.

open_clip is not imported; a checkpoint of several GB is read in pieces.
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from slsgu_cli.checkpoints.layers import block_count
from slsgu_cli.checkpoints.naming_schemes import (
    NamingScheme,
    TensorPlace,
    TowerPlace,
    names,
    tower_places,
)
from slsgu_cli.checkpoints.number_formats import Raw
from slsgu_cli.checkpoints.safetensors_file import open_safetensors
from slsgu_cli.checkpoints.tensor_file import TensorEntry, TensorFile
from slsgu_cli.checkpoints.torch_file import ZIP_START, TorchFile
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.method import Tower
from slsgu_cli.store.tensor_format import LENGTH

SUFFIXES = (".safetensors", ".bin", ".pth", ".pt")


def open_weights(path: Path) -> TensorFile:
    """Return random access to the tensors of a .safetensors file or a torch archive.

    The content decides the format. Raises MissingError or InputError.
    """
    try:
        with path.open("rb") as file:
            start = file.read(16)
        if start.startswith(ZIP_START):
            return TorchFile(path)
        if start[LENGTH : LENGTH + 1] == b"{" or path.suffix == ".safetensors":
            return open_safetensors(path)
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    raise InputError(
        f"{path} is neither a safetensors file nor an archive of torch 1.6 or later",
        hint=f"give a checkpoint ending in {', '.join(SUFFIXES)} that holds a state dict",
    )


def weight_files(folder: Path) -> list[Path]:
    """Return the files directly in a folder that have a checkpoint's suffix, sorted."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file())


# All fields of a model_cfg for a CLIP whose towers are plain transformers.
_PLAIN = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg"}
_PLAIN_VISION = {"image_size", "patch_size", "layers", "width"}
_PLAIN_TEXT = {"context_length", "vocab_size", "layers", "width", "heads"}
_SILENT = {"head_width", "mlp_ratio"}
_TOKENIZER = {"hf_tokenizer_name", "tokenizer_kwargs"}


def clip_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]] | None:
    """Return the shape of every tensor that open_clip's CLIP has for a model_cfg, by its name.

    None for all but plain transformers: other models have to be built.
    """
    vision, text = config["vision_cfg"], config["text_cfg"]
    if not (
        config.keys() <= _PLAIN
        and _PLAIN_VISION <= vision.keys() <= _PLAIN_VISION | _SILENT
        and _PLAIN_TEXT <= text.keys() <= _PLAIN_TEXT | _SILENT | _TOKENIZER
        and all(isinstance(vision[name], int) for name in _PLAIN_VISION)
    ):
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
            shape = _plain_shape(name, part["width"], part.get("mlp_ratio", 4.0))
            shapes.setdefault(name, shape)
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
    return (rows, columns) if name.endswith("weight") and "ln_" not in name else (rows,)


def assembled(places: Sequence[TensorPlace], tensors: Callable[[str], Raw]) -> Raw:
    """Return a layer in open_clip's shape; `tensors` returns the values of each tensor."""
    return joined([place.to_layer(tensors(place.key)) for place in places])


def joined(parts: Sequence[Raw]) -> Raw:
    """Return parts of a layer as one array."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def hollow(shape: tuple[int, ...]) -> Raw:
    """Return an array that has a shape, but takes no memory."""
    return np.broadcast_to(np.uint8(0), shape)


def placed(
    places: Sequence[TensorPlace], layer: Raw, tensors: Callable[[str], Raw]
) -> dict[str, Raw]:
    """Return a layer's tensors with its values in them, by name: the inverse of `assembled`.

    `tensors` returns the current values of a tensor that holds more than the layer.
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

    `owners` maps a tensor to its file, and `towers` are the places of CLIP's towers.
    """

    files: dict[Path, TensorFile]
    owners: dict[str, Path]
    towers: list[TowerPlace]

    @property
    def path(self) -> Path:
        """Return the file, or the first of the shards, as the name of this set."""
        return next(iter(self.files))

    def entry(self, key: str) -> TensorEntry:
        """Return the entry of a tensor in its file."""
        return self.files[self.owners[key]].entries[key]

    def stored(self, key: str) -> Raw:
        """Return a tensor's elements as they are stored, in its shape."""
        return self.files[self.owners[key]].stored(key)

    def holds(self, places: Sequence[TensorPlace]) -> bool:
        """Return whether all tensors exist. Raises InputError if only some do."""
        missing = [place.key for place in places if place.key not in self.owners]
        if missing and len(missing) < len(places):
            raise InputError(
                f"{self.path.parent} holds only a part of a layer: {', '.join(missing)} is missing",
                hint="fetch or copy the model again, all of its shards",
            )
        return bool(places) and not missing

    def shape(self, places: Sequence[TensorPlace]) -> tuple[int, ...]:
        """Return a layer's shape as open_clip has it."""
        return assembled(places, lambda key: hollow(self.entry(key).shape)).shape

    def number_format(self, places: Iterable[TensorPlace]) -> str:
        """Return the number format of tensors. Raises InputError if they have several."""
        formats = {place.key: self.entry(place.key).dtype for place in places}
        if len({*formats.values()}) > 1:
            raise InputError(
                f"{', '.join(formats)} are of different number formats in {self.path}",
                hint="save the model again in one precision",
            )
        return next(iter(formats.values()))

    def layer(self, places: Sequence[TensorPlace]) -> tuple[Raw, str]:
        """Return a layer's stored values in open_clip's shape, and their number format."""
        dtype = self.number_format(places)
        return assembled(places, self.stored), dtype

    def blocks(self, tower_place: TowerPlace) -> int:
        """Return how many blocks a tower has."""
        keys = (key for key in self.owners if key.startswith(tower_place.prefix))
        if tower_place.scheme is NamingScheme.OPEN_CLIP:
            # Its text tower may be the rest of a model without the vision tower.
            visual = f"{tower_place.prefix}visual."
            is_vision = tower_place.tower is Tower.VISION
            keys = (key for key in keys if key.startswith(visual) is is_vision)
        return block_count(keys)

    def tower(self, tower: Tower) -> TowerPlace:
        """Return the place of a tower. Raises InputError unless there is exactly one."""
        places = [place for place in self.towers if place.tower is tower]
        if len(places) != 1:
            raise InputError(f"{self.path} holds {len(places)} {tower} towers, not one")
        return places[0]


def read_weight_set(paths: Iterable[Path]) -> WeightSet:
    """Open the files of one set of weights. Raises MissingError or InputError."""
    files = {path: open_weights(path) for path in paths}
    owners = {key: path for path, file in files.items() for key in file.entries}
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
            weight_sets.append(read_weight_set(paths))
        except InputError as error:
            unread |= dict.fromkeys(paths, error.message)
    return [weights for weights in weight_sets if weights.towers], unread
