"""From a path to the CLIP encoders inside a model, and which layers it reads."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from slsgu_cli.checkpoints.layers import Layer, block_count
from slsgu_cli.checkpoints.layouts import (
    Spelling,
    TowerPlace,
    WeightSet,
    read_weight_set,
    read_weight_sets,
    tensor_places,
)
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records.method import Tower

_NORM = re.compile(r"ln_final|ln_post|attn_pool|(?:^|\.)norm\.|fc_norm")
_PROJECTION = re.compile(r"text_projection|^text\.proj|^visual\.(?:proj|head|trunk\.head)")


class Family(StrEnum):
    """Kinds of models that are built on CLIP, and CLIP itself."""

    CLIP = "clip"
    SD1 = "sd1"
    SD2 = "sd2"
    SDXL = "sdxl"
    LLAVA = "llava"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFrom:
    """What a model reads of one tower.

    `blocks` is how many blocks run before the place that is read (None for all of them);
    `norm` and `projection` tell whether the final norm and the projection are read too.
    `reads` says it in words.
    """

    tower: Tower
    blocks: int | None = None
    norm: bool = True
    projection: bool = True
    reads: str = "the projected features"

    def why_not(self, layer: str) -> str | None:
        """Return why the layer cannot influence the model; None where it can."""
        tower, block = Layer.parse(layer).tower, Layer.parse(layer).block
        if tower is not self.tower:
            return f"the {tower} tower is not part of it"
        if block is not None:
            unread = self.blocks is not None and block >= self.blocks
            return f"it reads {self.reads}, which lies before block {block}" if unread else None
        if not self.norm and _NORM.search(layer):
            return f"it reads {self.reads}, which lies before the final norm"
        if not self.projection and _PROJECTION.search(layer):
            return f"it reads {self.reads}, which is not projected"
        return None


def last_state(blocks: int | None) -> ReadFrom:
    """Return the reach of a pipeline that reads the text encoder's last hidden state."""
    reads = "the last hidden state" + (f" of {blocks} blocks" if blocks else "")
    return ReadFrom(tower=Tower.TEXT, blocks=blocks, projection=False, reads=reads)


def penultimate(blocks: int, *, norm: bool) -> ReadFrom:
    """Return the reach of a pipeline that reads what enters the last of `blocks` blocks.

    With `norm`, the final norm is applied to it.
    """
    return ReadFrom(
        tower=Tower.TEXT,
        blocks=blocks - 1,
        norm=norm,
        projection=False,
        reads="the penultimate hidden state",
    )


def vision_features(layers: Iterable[int], blocks: int) -> ReadFrom:
    """Return the reach of a model that reads hidden states of a vision tower of `blocks` blocks.

    State 0 enters block 0, and `blocks` leaves the last; negative ones count from the end.
    """
    states = [state if state >= 0 else blocks + 1 + state for state in layers]
    names = ", ".join(str(state) for state in layers)
    return ReadFrom(
        tower=Tower.VISION,
        blocks=max(states),
        norm=False,
        projection=False,
        reads=f"vision layer {names}",
    )


def whole(*towers: Tower) -> tuple[ReadFrom, ...]:
    """Return the reach of CLIP itself: all of the towers it has."""
    return tuple(ReadFrom(tower=tower) for tower in towers)


CONFIG, PIPELINE, OPEN_CLIP = "config.json", "model_index.json", "open_clip_config.json"
PROJECTORS = ("multi_modal_projector.", "mm_projector.")

# How the names of a text encoder begin in single files of diffusion models.
SINGLE_FILES = {
    "conditioner.embedders.": Family.SDXL,
    "cond_stage_model.model.": Family.SD2,
    "cond_stage_model.transformer.": Family.SD1,
}


@dataclass(frozen=True, slots=True)
class Encoder:
    """A CLIP, or one tower of one, inside a target, and what the target reads of it.

    `states` are its weights, one for every copy that lies there (an fp16 variant beside
    the fp32 one, say). Where a file holds several encoders, `prefix` tells this one.
    """

    name: str
    states: tuple[WeightSet, ...]
    reach: tuple[ReadFrom, ...]
    prefix: str | None = None

    def why_not(self, layer: str) -> str | None:
        """Return why a layer cannot influence the target through this encoder, if so."""
        reasons = [reach.why_not(layer) for reach in self.reach]
        return None if None in reasons else reasons[-1]

    def homes(self, state: WeightSet) -> list[TowerPlace]:
        """Return the encoder's towers in one of its sets of weights."""
        return [home for home in state.homes if self.prefix in (None, home.prefix)]


@dataclass(frozen=True, slots=True)
class Target:
    """A model to carry edits into. `unread` are weight files that could not be read, and why."""

    path: Path
    family: Family
    encoders: tuple[Encoder, ...]
    unread: dict[Path, str] = field(default_factory=dict)

    def chosen(self, name: str | None) -> tuple[Encoder, ...]:
        """Return the encoder called `name`, or with None all of them. Raises UsageError."""
        found = tuple(encoder for encoder in self.encoders if name in (None, encoder.name))
        if not found:
            known = ", ".join(encoder.name for encoder in self.encoders)
            raise UsageError(f"{self.path} has no encoder {name}; it has {known}")
        return found


def read_target(path: Path) -> Target:
    """Find the CLIP encoders of a model. Raises MissingError or InputError."""
    if path.is_file():
        return _single_file(path)
    if not path.is_dir():
        raise MissingError(f"there is no model {path}")
    if (path / PIPELINE).is_file():
        return _pipeline(path)
    if (path / OPEN_CLIP).is_file():
        return _clip(path)
    config = read_config(path / CONFIG)
    if "vision_feature_layer" in config or "mm_vision_tower" in config or _is_llava(config):
        return _llava(path, config)
    return _clip(path)


def read_config(path: Path) -> dict[str, Any]:
    """Return the object in a JSON configuration file. Raises MissingError or InputError."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise MissingError(
            f"{path.parent} is no model that slsgu knows: it has no {path.name}",
            hint=f"a folder with {CONFIG} (transformers), {PIPELINE} (diffusers) or {OPEN_CLIP}, "
            "or one file of weights",
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


def _is_llava(config: dict[str, Any]) -> bool:
    return str(config.get("model_type", "")).startswith("llava")


def _clip(folder: Path) -> Target:
    states, unread = read_weight_sets(folder)
    _require_home(folder, states, unread)
    towers = sorted({home.tower for state in states for home in state.homes})
    return Target(folder, Family.CLIP, (Encoder("clip", tuple(states), whole(*towers)),), unread)


def _llava(folder: Path, config: dict[str, Any]) -> Target:
    states, unread = read_weight_sets(folder)
    towers = [state for state in states if _towers([state], Tower.VISION)]
    if not towers and "mm_vision_tower" in config:
        elsewhere = config["mm_vision_tower"]
        raise InputError(
            f"{folder} does not hold its vision tower: its {CONFIG} points to {elsewhere}",
            hint=f"edit that model (--target a copy of {elsewhere}) "
            f"and let mm_vision_tower in {CONFIG} point to the result",
        )
    _require_home(folder, towers, unread)
    reach = _features(towers, config)
    return Target(folder, Family.LLAVA, (Encoder("vision_tower", tuple(towers), (reach,)),), unread)


def _features(states: Sequence[WeightSet], config: dict[str, Any]) -> ReadFrom:
    layers = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    state, home = _towers(states, Tower.VISION)[0]
    return vision_features(layers if isinstance(layers, list) else [layers], state.blocks(home))


def _towers(states: Sequence[WeightSet], tower: Tower) -> list[tuple[WeightSet, TowerPlace]]:
    return [(state, home) for state in states for home in state.homes if home.tower is tower]


def _pipeline(folder: Path) -> Target:
    index = read_config(folder / PIPELINE)
    classes = {
        name: value[1]
        for name, value in sorted(index.items())
        if isinstance(value, list) and len(value) == 2 and str(value[1]).startswith("CLIPText")
    }
    if not classes:
        raise InputError(f"the pipeline {folder} has no CLIP text encoder")
    kind = str(index.get("_class_name", ""))
    unread: dict[Path, str] = {}
    encoders, depths = [], []
    for name, class_name in classes.items():
        states, failed = read_weight_sets(folder / name)
        unread |= failed
        _require_home(folder / name, states, failed)
        state, home = _towers(states, Tower.TEXT)[0]
        depths.append(state.blocks(home))
        pooled = class_name.endswith("WithProjection")
        reach = _text_reach(kind, depths[-1], pooled=pooled)
        encoders.append(Encoder(name, tuple(states), (reach,)))
    return Target(folder, _family(kind, depths), tuple(encoders), unread)


def _family(kind: str, depths: Sequence[int]) -> Family:
    if "XL" in kind:
        return Family.SDXL
    return Family.SD2 if depths[0] > 12 else Family.SD1


def _text_reach(kind: str, blocks: int, *, pooled: bool) -> ReadFrom:
    """Return what a pipeline reads of a text encoder of `blocks` blocks."""
    if pooled:
        # The pooled and projected embedding goes through all of the encoder.
        return whole(Tower.TEXT)[0]
    if "XL" in kind:
        return penultimate(blocks, norm=False)
    return last_state(blocks)


def _single_file(path: Path) -> Target:
    state = read_weight_set([path])
    _require_home(path, [state], {})
    texts = [home for _, home in _towers([state], Tower.TEXT)]
    family = next(
        (
            family
            for start, family in SINGLE_FILES.items()
            if any(home.prefix.startswith(start) for home in texts)
        ),
        None,
    )
    if family is not None:
        names = ["text_encoder", *(f"text_encoder_{n}" for n in range(2, len(texts) + 1))]
        encoders = tuple(
            Encoder(name, (state,), (_file_reach(family, state, home),), home.prefix)
            for name, home in zip(names, texts, strict=True)
        )
        return Target(path, family, encoders)
    if any(start in key for key in state.owners for start in PROJECTORS):
        beside = path.parent / CONFIG
        config = read_config(beside) if beside.is_file() else {}
        encoder = Encoder("vision_tower", (state,), (_features([state], config),))
        return Target(path, Family.LLAVA, (encoder,))
    towers = sorted({home.tower for home in state.homes})
    return Target(path, Family.CLIP, (Encoder("clip", (state,), whole(*towers)),))


def _file_reach(family: Family, state: WeightSet, home: TowerPlace) -> ReadFrom:
    blocks = state.blocks(home)
    if family is Family.SD1:
        return last_state(blocks)
    if family is Family.SD2:
        return penultimate(blocks, norm=True)
    return _text_reach("XL", blocks, pooled=home.spelling is Spelling.OPEN_CLIP)


def _require_home(place: Path, states: Sequence[WeightSet], unread: dict[Path, str]) -> None:
    if not states or not all(state.homes for state in states):
        why = f": {next(iter(unread.values()))}" if unread else ""
        raise InputError(f"{place} holds no weights of a CLIP{why}")


Shapes = Mapping[str, tuple[int, ...]]

# SDXL's second encoder is OpenCLIP's bigG, of this width.
SECOND_WIDTH = 1280


@dataclass(frozen=True, slots=True)
class TargetLayers:
    """What a ranking is for: the target in the user's words, and what it reads of a CLIP."""

    target: str
    reach: tuple[ReadFrom, ...]

    def why_not(self, layer: str) -> str | None:
        """Return why a layer cannot influence the target; None where it can."""
        reasons = [reach.why_not(layer) for reach in self.reach]
        return None if None in reasons else reasons[-1]


def layers_read_by(target: str, shapes: Shapes, *, encoder: str | None) -> TargetLayers:
    """Return what `target`, a path or a kind, reads of the CLIP whose layers have `shapes`.

    Raises MissingError, InputError, and UsageError where an encoder must be named.
    """
    if target in list(Family) and not Path(target).exists():
        return TargetLayers(target, _of_kind(Family(target), shapes, encoder))
    model = read_target(Path(target))
    fitting = [one for one in model.chosen(encoder) if _fits(one, shapes)]
    if not fitting:
        raise InputError(
            f"the CLIP inside {target} is another than the one the gradients are of",
            hint="compute them on the CLIP that the target was built on",
        )
    if len(fitting) > 1:
        raise UsageError(
            f"{target} has several encoders of this shape",
            hint=f"--encoder {' or '.join(one.name for one in fitting)}",
        )
    return TargetLayers(target, fitting[0].reach)


def _of_kind(family: Family, shapes: Shapes, encoder: str | None) -> tuple[ReadFrom, ...]:
    match family:
        case Family.SD1:
            return (last_state(None),)
        case Family.SD2:
            return (penultimate(_depth(shapes, Tower.TEXT), norm=True),)
        case Family.SDXL:
            width = shapes.get("ln_final.weight", shapes.get("text.ln_final.weight", (0,)))[0]
            if encoder == "text_encoder_2" or (encoder is None and width == SECOND_WIDTH):
                return whole(Tower.TEXT)
            return (penultimate(_depth(shapes, Tower.TEXT), norm=False),)
        case Family.LLAVA:
            return (vision_features([-2], _depth(shapes, Tower.VISION)),)
    return whole(*Tower)


def _depth(shapes: Shapes, tower: Tower) -> int:
    return block_count(name for name in shapes if Layer.parse(name).tower is tower)


def _fits(encoder: Encoder, shapes: Shapes) -> bool:
    """Return whether every layer of `shapes` that lies in an encoder has the same shape there."""
    state = encoder.states[0]
    found = [
        state.shape(places) == shape
        for home in encoder.homes(state)
        for layer, shape in shapes.items()
        if state.holds(places := tensor_places(layer, home))
    ]
    return bool(found) and all(found)
