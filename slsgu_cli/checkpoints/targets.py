"""Models built on CLIP: the encoders found at a path."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from slsgu_cli.checkpoints.configurations import (
    CONFIG,
    OPEN_CLIP,
    PIPELINE,
    config_of,
    kind_of,
    read_config,
)
from slsgu_cli.checkpoints.layouts import WeightSet, read_weight_set, read_weight_sets
from slsgu_cli.checkpoints.naming_schemes import NamingScheme, TowerPlace
from slsgu_cli.checkpoints.reading import (
    EVERY_TOKEN,
    PENULTIMATE,
    PENULTIMATE_AND_POOLED,
    POOLED,
    ReadFrom,
    last_state,
    penultimate,
    unpooled,
    vision_features,
    whole,
)
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records.method import PromptReader, Tower
from slsgu_cli.text import enumerated


class Family(StrEnum):
    """Kinds of models that are built on CLIP, and CLIP itself."""

    CLIP = "clip"
    SD1 = "sd1"
    SD2 = "sd2"
    SDXL = "sdxl"
    SD3 = "sd3"
    FLUX = "flux"
    LLAVA = "llava"
    PALIGEMMA = "paligemma"
    OTHER = "another pipeline"


# The kinds with a name on the command line.
KINDS = tuple(family for family in Family if family is not Family.OTHER)

# The prompt readers of a kind of pipelines, if there are several.
READERS = {
    Family.SDXL: (
        PromptReader("text_encoder", "CLIP", PENULTIMATE),
        PromptReader("text_encoder_2", "CLIP", PENULTIMATE_AND_POOLED),
    ),
    Family.SD3: (
        PromptReader("text_encoder", "CLIP", PENULTIMATE_AND_POOLED),
        PromptReader("text_encoder_2", "CLIP", PENULTIMATE_AND_POOLED),
        PromptReader("text_encoder_3", "T5", EVERY_TOKEN),
    ),
    Family.FLUX: (
        PromptReader("text_encoder", "CLIP", POOLED),
        PromptReader("text_encoder_2", "T5", EVERY_TOKEN),
    ),
}

# The classes of pipelines that read CLIP as Stable Diffusion 1 and 2 do.
_STABLE_DIFFUSION = re.compile(
    r"StableDiffusion|StableUnCLIP|LatentConsistency|AnimateDiff|TextToVideo|Marigold|^$"
)


def with_edits(readers: Sequence[PromptReader], names: Collection[str]) -> tuple[PromptReader, ...]:
    """Return prompt readers, those of these names marked as edited."""
    return tuple(replace(reader, edited=reader.name in names) for reader in readers)


def prompt_note(target: str, readers: Sequence[PromptReader]) -> str | None:
    """Describe a target's prompt readers and which of them change; None for one reader."""
    if len(readers) < 2:
        return None
    edited = [reader.name for reader in readers if reader.edited]
    unedited = [reader.name for reader in readers if not reader.edited]
    read = [f"{reader.name} ({reader.model}: {reader.reads})" for reader in readers]
    what = f"prompts of {target} are read by {enumerated(read)}"
    if not unedited:
        return f"{what}; edits go into all of them"
    verb = "reads" if len(unedited) == 1 else "read"
    return (
        f"{what}; edits go into {enumerated(edited)}, "
        f"and {enumerated(unedited)} {verb} them as before"
    )


PROJECTORS = ("multi_modal_projector.", "mm_projector.")

# Prefixes of text encoders in single files of diffusion models.
SINGLE_FILES = {
    "conditioner.embedders.": Family.SDXL,
    "cond_stage_model.model.": Family.SD2,
    "cond_stage_model.transformer.": Family.SD1,
    "text_encoders.": Family.SD3,
}

# Names of the encoders of Stable Diffusion 3 and FLUX in files, and a tensor of FLUX alone.
_IN_FILES = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_T5_IN_FILES, _OF_FLUX = "text_encoders.t5", "double_blocks."


@dataclass(frozen=True, slots=True)
class Encoder:
    """A CLIP, or one of its towers, inside a target, and the outputs that the target reads.

    `copies` are its weights, one set for each copy (such as an fp16 variant next to the fp32
    one). If a file holds several encoders, `prefix` identifies this one.
    """

    name: str
    copies: tuple[WeightSet, ...]
    read_from: ReadFrom
    prefix: str | None = None

    def why_not(self, layer: str) -> str | None:
        """Return why a layer cannot influence the target through this encoder; None if it can."""
        return self.read_from.why_not(layer)

    def towers(self, weights: WeightSet) -> list[TowerPlace]:
        """Return the encoder's towers in one of its sets of weights."""
        return [place for place in weights.towers if self.prefix in (None, place.prefix)]


@dataclass(frozen=True, slots=True)
class Target:
    """A model to edit. `unread` maps weight files that cannot be read to the reason.

    `readers` are all text encoders of a pipeline, including those that are not a CLIP.
    """

    path: Path
    family: Family
    encoders: tuple[Encoder, ...]
    unread: dict[Path, str] = field(default_factory=dict)
    readers: tuple[PromptReader, ...] = ()

    def chosen(self, name: str | None) -> tuple[Encoder, ...]:
        """Return the encoder called `name`, or with None all of them. Raises UsageError."""
        chosen = tuple(encoder for encoder in self.encoders if name in (None, encoder.name))
        if not chosen:
            other = {reader.name: reader.model for reader in self.readers}.get(str(name))
            if other:
                raise UsageError(f"the {name} of {self.path} is a {other}, not a CLIP")
            known = ", ".join(encoder.name for encoder in self.encoders)
            raise UsageError(f"{self.path} has no encoder {name}; it has {known}")
        return chosen


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
    _refuse_unknown(path, config)
    if _is_llava(config) or config.get("model_type") == PALIGEMMA:
        return _llava(path, config)
    return _clip(path, config)


CLIP, SIGLIP, NAFLEX, PALIGEMMA = "clip", "siglip", "siglip2", "paligemma"
NAFLEX_HINT = (
    "open_clip has no tower for NaFlex, which takes images in their own aspect ratios; "
    "use SigLIP 2 of a fixed size, a SiglipModel such as google/siglip2-base-patch16-224"
)

# The types of towers that can be edited.
TOWERS = ("clip_vision_model", "siglip_vision_model")


def _refuse_unknown(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for NaFlex, and for models that use towers in unknown ways."""
    kind, named = str(config.get("model_type")), kind_of(config)
    if kind == NAFLEX:
        raise InputError(f"{folder} is a {named}, SigLIP 2 as NaFlex", hint=NAFLEX_HINT)
    vision = config.get("vision_config")
    tower = str(vision.get("model_type", "")) if isinstance(vision, dict) else ""
    if _is_llava(config) or kind == PALIGEMMA:
        if tower and tower not in TOWERS:
            raise InputError(
                f"{folder} is a {named}, whose vision tower is a {tower}",
                hint="only towers of CLIP and of fixed-size SigLIP can be edited",
            )
        return
    is_generative = named.partition(" ")[0].endswith(("ForConditionalGeneration", "ForCausalLM"))
    if is_generative or (tower in TOWERS and kind not in (CLIP, SIGLIP)):
        raise InputError(
            f"{folder} is a {named}, and slsgu does not know how it uses a CLIP or SigLIP",
            hint="LLaVA, LLaVA-NeXT, LLaVA-OneVision and PaliGemma are supported",
        )


def _is_llava(config: Mapping[str, Any]) -> bool:
    named = "vision_feature_layer" in config or "mm_vision_tower" in config
    return named or str(config.get("model_type", "")).startswith("llava")


def _clip(folder: Path, config: Mapping[str, Any] | None = None) -> Target:
    weight_sets, unread = read_weight_sets(folder)
    _require_towers(folder, weight_sets, unread, config)
    towers = {place.tower for weights in weight_sets for place in weights.towers}
    encoder = Encoder("clip", tuple(weight_sets), whole(towers))
    return Target(folder, Family.CLIP, (encoder,), unread)


def _llava(folder: Path, config: dict[str, Any]) -> Target:
    weight_sets, unread = read_weight_sets(folder)
    towers = [weights for weights in weight_sets if _towers([weights], Tower.VISION)]
    if not towers and "mm_vision_tower" in config:
        elsewhere = config["mm_vision_tower"]
        raise InputError(
            f"{folder} does not contain its vision tower: its {CONFIG} points to {elsewhere}",
            hint=f"edit that model (--target a copy of {elsewhere}) "
            f"and let mm_vision_tower in {CONFIG} point to the result",
        )
    _require_towers(folder, towers, unread, config)
    if config.get("model_type") == PALIGEMMA:
        read, family = unpooled(), Family.PALIGEMMA
    else:
        read, family = _features(towers, config), Family.LLAVA
    encoder = Encoder("vision_tower", tuple(towers), read)
    return Target(folder, family, (encoder,), unread)


def _features(weight_sets: Sequence[WeightSet], config: dict[str, Any]) -> ReadFrom:
    weights, place = _towers(weight_sets, Tower.VISION)[0]
    usual = -1 if config.get("model_type") == "llava_onevision" else -2
    layers = config.get("vision_feature_layer", config.get("mm_vision_select_layer", usual))
    layers = layers if isinstance(layers, list) else [layers]
    if not layers or not all(type(layer) is int for layer in layers):
        raise InputError(
            f"the configuration of {weights.path.parent} is not valid: its vision layer "
            f"cannot be {layers!r:.80}",
            hint="get the model again, or correct its configuration",
        )
    return vision_features(layers, weights.blocks(place))


def _towers(weight_sets: Sequence[WeightSet], tower: Tower) -> list[tuple[WeightSet, TowerPlace]]:
    return [
        (weights, place)
        for weights in weight_sets
        for place in weights.towers
        if place.tower is tower
    ]


def _pipeline(folder: Path) -> Target:
    index = read_config(folder / PIPELINE)
    kind, models = str(index.get("_class_name", "")), _text_models(index)
    classes = [name for name, model in models.items() if model.startswith("CLIPText")]
    if not classes:
        reads = ", ".join(models.values()) or "nothing of CLIP's"
        raise InputError(
            f"the pipeline {folder} has no CLIP text encoder: it is a "
            f"{kind or 'pipeline of no class'}, whose prompts are read by {reads}"
        )
    for name in index:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(
                f"{folder / PIPELINE} names {name!r}, which is outside the model's folder",
                hint="get the model from a source that you trust",
            )
    family = None
    unread: dict[Path, str] = {}
    encoders, readers = [], []
    for name, model in models.items():
        if name not in classes:
            readers.append(PromptReader(name, _short(model), EVERY_TOKEN))
            continue
        weight_sets, failed = read_weight_sets(folder / name)
        unread |= failed
        _require_towers(folder / name, weight_sets, failed)
        weights, place = _towers(weight_sets, Tower.TEXT)[0]
        blocks = weights.blocks(place)
        family = family or _family(kind, blocks)
        # A folder of Stable Diffusion 2 lacks the last block, which the pipeline does not read.
        as_read = Family.SD1 if family is Family.SD2 else family
        text = text_reading(as_read, blocks, projected=model.endswith("WithProjection"))
        reads = f"at most {text.reads}" if family is Family.OTHER else text.reads
        readers.append(PromptReader(name, _short(model), reads))
        encoders.append(Encoder(name, tuple(weight_sets), text))
    return Target(folder, family or Family.OTHER, tuple(encoders), unread, tuple(readers))


def _text_models(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the classes of a pipeline's text encoders by their names, sorted."""
    return {
        name: str(value[1])
        for name, value in sorted(index.items())
        if isinstance(value, list)
        and len(value) == 2
        and value[1] is not None
        and (name.startswith("text_encoder") or str(value[1]).startswith("CLIPText"))
    }


def _short(model: str) -> str:
    """Return the usual name of a text encoder of transformers."""
    return next((known for known in ("CLIP", "T5") if model.startswith(known)), model)


def _family(kind: str, blocks: int) -> Family:
    """Return the family of a pipeline class whose first CLIP has this many blocks."""
    if kind.startswith("StableDiffusion3"):
        return Family.SD3
    if kind.startswith("Flux"):
        return Family.FLUX
    if "DiffusionXL" in kind or "SDXL" in kind:
        return Family.SDXL
    if not _STABLE_DIFFUSION.search(kind):
        return Family.OTHER
    return Family.SD2 if blocks > 12 else Family.SD1


def text_reading(family: Family, blocks: int, *, projected: bool) -> ReadFrom:
    """Return the output of a text encoder, `projected` or not, that a pipeline reads."""
    match family:
        case Family.FLUX:
            return replace(last_state(blocks), reads=POOLED)
        case Family.SD2:
            return penultimate(blocks, norm=True)
        case Family.SDXL if not projected:
            return penultimate(blocks, norm=False)
        case Family.SDXL | Family.SD3:
            return ReadFrom(tower=Tower.TEXT, reads=PENULTIMATE_AND_POOLED)
    return ReadFrom(tower=Tower.TEXT) if projected else last_state(blocks)


def _single_file(path: Path) -> Target:
    weights = read_weight_set([path])
    _require_towers(path, [weights], {})
    texts = [place for _, place in _towers([weights], Tower.TEXT)]
    prefixes = [place.prefix for place in texts]
    starts = [start for start in SINGLE_FILES if any(p.startswith(start) for p in prefixes)]
    family = SINGLE_FILES[starts[0]] if starts else None
    if family is Family.SD3 and any(_OF_FLUX in key for key in weights.owners):
        family = Family.FLUX
    if family is not None:
        encoders = []
        for name, place in _named(texts):
            is_projected = place.scheme is NamingScheme.OPEN_CLIP
            text = text_reading(family, weights.blocks(place), projected=is_projected)
            encoders.append(Encoder(name, (weights,), text, place.prefix))
        held = {encoder.name for encoder in encoders}
        t5 = any(key.startswith(_T5_IN_FILES) for key in weights.owners)
        readers = tuple(
            reader
            for reader in READERS.get(family, ())
            if reader.name in held or (t5 and reader.model == "T5")
        )
        return Target(path, family, tuple(encoders), readers=readers)
    if any(start in key for key in weights.owners for start in PROJECTORS):
        read = _features([weights], config_of(path.parent / CONFIG))
        encoder = Encoder("vision_tower", (weights,), read)
        return Target(path, Family.LLAVA, (encoder,))
    towers = {place.tower for place in weights.towers}
    return Target(path, Family.CLIP, (Encoder("clip", (weights,), whole(towers)),))


def _named(texts: Sequence[TowerPlace]) -> list[tuple[str, TowerPlace]]:
    """Return the text encoders of a file with their names in pipelines, in that order."""
    numbered = ["text_encoder", *(f"text_encoder_{n}" for n in range(2, len(texts) + 1))]
    names = [
        next((name for start, name in _IN_FILES.items() if f".{start}." in place.prefix), other)
        for place, other in zip(texts, numbered, strict=True)
    ]
    return sorted(zip(names, texts, strict=True), key=lambda pair: pair[0])


def _require_towers(
    place: Path,
    weight_sets: Sequence[WeightSet],
    unread: dict[Path, str],
    config: Mapping[str, Any] | None = None,
) -> None:
    if not weight_sets or not all(weights.towers for weights in weight_sets):
        what = f": it is a {kind_of(config)}" if config and "architectures" in config else ""
        why = f": {next(iter(unread.values()))}" if unread else ""
        raise InputError(f"{place} holds no weights of a CLIP{what}{why}")
