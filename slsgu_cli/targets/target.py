"""From a path to the CLIP encoders inside a model that is built on CLIP.

A target is a folder in the layout of transformers or diffusers, a folder of open_clip, or
one file of weights. Only configuration files and the headers of weights are read.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records import Tower
from slsgu_cli.targets.mapping import Home, Spelling
from slsgu_cli.targets.reach import (
    Family,
    Reach,
    last_state,
    penultimate,
    vision_features,
    whole,
)
from slsgu_cli.targets.states import State, read_state, read_states

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
    states: tuple[State, ...]
    reach: tuple[Reach, ...]
    prefix: str | None = None

    def why_not(self, layer: str) -> str | None:
        """Return why a layer cannot influence the target through this encoder, if so."""
        reasons = [reach.why_not(layer) for reach in self.reach]
        return None if None in reasons else reasons[-1]

    def homes(self, state: State) -> list[Home]:
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
    states, unread = read_states(folder)
    _require_home(folder, states, unread)
    towers = sorted({home.tower for state in states for home in state.homes})
    return Target(folder, Family.CLIP, (Encoder("clip", tuple(states), whole(*towers)),), unread)


def _llava(folder: Path, config: dict[str, Any]) -> Target:
    states, unread = read_states(folder)
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


def _features(states: Sequence[State], config: dict[str, Any]) -> Reach:
    layers = config.get("vision_feature_layer", config.get("mm_vision_select_layer", -2))
    state, home = _towers(states, Tower.VISION)[0]
    return vision_features(layers if isinstance(layers, list) else [layers], state.blocks(home))


def _towers(states: Sequence[State], tower: Tower) -> list[tuple[State, Home]]:
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
        states, failed = read_states(folder / name)
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


def _text_reach(kind: str, blocks: int, *, pooled: bool) -> Reach:
    """Return what a pipeline reads of a text encoder of `blocks` blocks."""
    if pooled:
        # The pooled and projected embedding goes through all of the encoder.
        return whole(Tower.TEXT)[0]
    if "XL" in kind:
        return penultimate(blocks, norm=False)
    return last_state(blocks)


def _single_file(path: Path) -> Target:
    state = read_state([path])
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


def _file_reach(family: Family, state: State, home: Home) -> Reach:
    blocks = state.blocks(home)
    if family is Family.SD1:
        return last_state(blocks)
    if family is Family.SD2:
        return penultimate(blocks, norm=True)
    return _text_reach("XL", blocks, pooled=home.spelling is Spelling.OPEN_CLIP)


def _require_home(place: Path, states: Sequence[State], unread: dict[Path, str]) -> None:
    if not states or not all(state.homes for state in states):
        why = f": {next(iter(unread.values()))}" if unread else ""
        raise InputError(f"{place} holds no weights of a CLIP{why}")
