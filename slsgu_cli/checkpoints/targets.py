"""From a path to the CLIP encoders inside a model, and which layers it reads."""

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from slsgu_cli.checkpoints.layers import Layer, Spelling, TowerPlace, block_count, tensor_places
from slsgu_cli.checkpoints.layouts import WeightSet, read_weight_set, read_weight_sets
from slsgu_cli.errors import InputError, MissingError, UsageError, enumerated
from slsgu_cli.records.codec import parse_json
from slsgu_cli.records.method import PromptReader, Tower

_NORM = re.compile(r"ln_final|ln_post|attn_pool|(?:^|\.)norm\.|fc_norm")
_POOL = re.compile(r"attn_pool")
_PROJECTION = re.compile(r"text_projection|^text\.proj|^visual\.(?:proj|head|trunk\.head)")


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


# Those that have a name on the command line.
KINDS = tuple(family for family in Family if family is not Family.OTHER)


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

    def why_not(self, name: str) -> str | None:
        """Return why a layer cannot influence the model; None where it can."""
        layer = Layer.parse(name)
        if layer.tower is not self.tower:
            return f"the {layer.tower} tower is not part of it"
        if layer.block is not None:
            unread = self.blocks is not None and layer.block >= self.blocks
            before = f"it reads {self.reads}, which lies before block {layer.block}"
            return before if unread else None
        if not self.norm and _NORM.search(name):
            return f"it reads {self.reads}, which lies before the final norm"
        if not self.projection and _POOL.search(name):
            return f"it reads {self.reads}, which is not pooled"
        if not self.projection and _PROJECTION.search(name):
            return f"it reads {self.reads}, which is not projected"
        return None


def last_state(blocks: int | None) -> ReadFrom:
    """Return that the last hidden state of a text encoder is read."""
    reads = "the last hidden state" + (f" of {blocks} blocks" if blocks else "")
    return ReadFrom(tower=Tower.TEXT, blocks=blocks, projection=False, reads=reads)


def penultimate(blocks: int, *, norm: bool) -> ReadFrom:
    """Return that what enters the last of a text encoder's `blocks` blocks is read.

    With `norm`, the final norm is applied to it.
    """
    return ReadFrom(
        tower=Tower.TEXT, blocks=blocks - 1, norm=norm, projection=False, reads=PENULTIMATE
    )


PENULTIMATE = "the penultimate hidden state"
PENULTIMATE_AND_POOLED = f"{PENULTIMATE} and the projected pooled vector"
POOLED, EVERY_TOKEN = "the pooled vector alone", "every token"


def vision_features(layers: Iterable[int], blocks: int) -> ReadFrom:
    """Return that hidden states of a vision tower of `blocks` blocks are read.

    State 0 enters block 0, and `blocks` leaves the last; negative ones count from the end.
    """
    states = [state if state >= 0 else blocks + 1 + state for state in layers]
    names = ", ".join(str(state) for state in layers)
    reads = f"vision layer {names}"
    return ReadFrom(
        tower=Tower.VISION, blocks=max(states), norm=False, projection=False, reads=reads
    )


def unpooled() -> ReadFrom:
    """Return that a vision tower is read after its final norm, without its attention pool."""
    reads = "the last hidden state, after the final norm"
    return ReadFrom(tower=Tower.VISION, projection=False, reads=reads)


def whole(*towers: Tower) -> tuple[ReadFrom, ...]:
    """Return that all of CLIP's towers are read."""
    return tuple(ReadFrom(tower=tower) for tower in towers)


def _why_not(read_from: Sequence[ReadFrom], layer: str) -> str | None:
    """Return why a layer cannot influence anything that is read; None where it can."""
    reasons = [read.why_not(layer) for read in read_from]
    return None if None in reasons else reasons[-1]


# What reads the prompts of a kind of pipelines, where there are several.
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
# The classes of pipelines of Stable Diffusion 1 and 2, which read alike.
_STABLE_DIFFUSION = re.compile(
    r"StableDiffusion|StableUnCLIP|LatentConsistency|AnimateDiff|TextToVideo|Marigold|^$"
)


def _with_edits(
    readers: Sequence[PromptReader], names: Collection[str]
) -> tuple[PromptReader, ...]:
    return tuple(replace(reader, edited=reader.name in names) for reader in readers)


def prompt_note(target: str, readers: Sequence[PromptReader]) -> str | None:
    """Return what reads a target's prompts and what of that edits leave; None for one reader."""
    if len(readers) < 2:
        return None
    edited = [reader.name for reader in readers if reader.edited]
    left = [reader.name for reader in readers if not reader.edited]
    read = [f"{reader.name} ({reader.model}: {reader.reads})" for reader in readers]
    what = f"prompts of {target} are read by {enumerated(read)}"
    if not left:
        return f"{what}; edits go into all of them"
    verb = "reads" if len(left) == 1 else "read"
    return (
        f"{what}; edits go into {enumerated(edited)}, and {enumerated(left)} {verb} them as before"
    )


CONFIG, PIPELINE, OPEN_CLIP = "config.json", "model_index.json", "open_clip_config.json"
SHARDS = "*.index.json"
PROJECTORS = ("multi_modal_projector.", "mm_projector.")

# How the names of a text encoder begin in single files of diffusion models.
SINGLE_FILES = {
    "conditioner.embedders.": Family.SDXL,
    "cond_stage_model.model.": Family.SD2,
    "cond_stage_model.transformer.": Family.SD1,
    "text_encoders.": Family.SD3,
}
# What files call the encoders of Stable Diffusion 3 and FLUX, and what only FLUX has.
_IN_FILES = {"clip_l": "text_encoder", "clip_g": "text_encoder_2"}
_T5_IN_FILES, _OF_FLUX = "text_encoders.t5", "double_blocks."


@dataclass(frozen=True, slots=True)
class Encoder:
    """A CLIP, or one tower of one, inside a target, and what the target reads of it.

    `copies` are its weights, one for every copy that lies there (an fp16 variant beside
    the fp32 one, say). Where a file holds several encoders, `prefix` tells this one.
    """

    name: str
    copies: tuple[WeightSet, ...]
    read_from: tuple[ReadFrom, ...]
    prefix: str | None = None

    def why_not(self, layer: str) -> str | None:
        """Return why a layer cannot influence the target through this encoder, if so."""
        return _why_not(self.read_from, layer)

    def towers(self, weights: WeightSet) -> list[TowerPlace]:
        """Return the encoder's towers in one of its sets of weights."""
        return [place for place in weights.towers if self.prefix in (None, place.prefix)]


@dataclass(frozen=True, slots=True)
class Target:
    """A model to carry edits into. `unread` are weight files that could not be read, and why.

    Of a pipeline, `readers` are all of its text encoders, those that are no CLIP as well.
    """

    path: Path
    family: Family
    encoders: tuple[Encoder, ...]
    unread: dict[Path, str] = field(default_factory=dict)
    readers: tuple[PromptReader, ...] = ()

    def readers_beside(self, edited: Collection[str]) -> tuple[PromptReader, ...]:
        """Return what reads prompts, the `edited` encoders marked."""
        return _with_edits(self.readers, edited)

    def chosen(self, name: str | None) -> tuple[Encoder, ...]:
        """Return the encoder called `name`, or with None all of them. Raises UsageError."""
        chosen = tuple(encoder for encoder in self.encoders if name in (None, encoder.name))
        if not chosen:
            other = {reader.name: reader.model for reader in self.readers}.get(str(name))
            if other:
                raise UsageError(f"the {name} of {self.path} is a {other}, which is no CLIP")
            known = ", ".join(encoder.name for encoder in self.encoders)
            raise UsageError(f"{self.path} has no encoder {name}; it has {known}")
        return chosen


def read_target(path: Path) -> Target:
    """Find the CLIP encoders of a model. Raises MissingError or InputError."""
    if path.is_file():
        return _single_file(path)
    if not path.is_dir():
        raise MissingError(f"there is no model {path}")
    require_inside(path)
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
    "NaFlex takes images as patches in their own proportions, which open_clip has no tower for; "
    "SigLIP 2 of a fixed size is a SiglipModel, such as google/siglip2-base-patch16-224"
)
# The types of towers that edits go into.
TOWERS = ("clip_vision_model", "siglip_vision_model")


def kind_of(config: Mapping[str, Any]) -> str:
    """Return what transformers calls the model of a configuration: its class and its type."""
    classes = config.get("architectures")
    named = classes[0] if isinstance(classes, list) and classes else "model"
    return f"{named} ({config.get('model_type', 'of no type')})"


def _refuse_unknown(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise InputError for SigLIP 2 as NaFlex, and for towers that are read in unknown ways."""
    kind, named = str(config.get("model_type")), kind_of(config)
    if kind == NAFLEX:
        raise InputError(f"{folder} is a {named}, SigLIP 2 as NaFlex", hint=NAFLEX_HINT)
    vision = config.get("vision_config")
    tower = str(vision.get("model_type", "")) if isinstance(vision, dict) else ""
    if _is_llava(config) or kind == PALIGEMMA:
        if tower and tower not in TOWERS:
            raise InputError(
                f"{folder} is a {named}, whose vision tower is a {tower}",
                hint="edits go into towers of CLIP's and SigLIP's of a fixed size",
            )
        return
    speaks = named.partition(" ")[0].endswith(("ForConditionalGeneration", "ForCausalLM"))
    if speaks or (tower in TOWERS and kind not in (CLIP, SIGLIP)):
        raise InputError(
            f"{folder} is a {named}, and slsgu does not know what it reads of a CLIP or SigLIP, "
            "if it has one",
            hint="LLaVA, LLaVA-NeXT, LLaVA-OneVision and PaliGemma are known",
        )


def read_config(path: Path) -> dict[str, Any]:
    """Return the object in a JSON configuration file. Raises MissingError or InputError."""
    try:
        content = parse_json(path.read_bytes())
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


def config_of(path: Path) -> dict[str, Any]:
    """Return what `read_config` does, and an empty object where there is no such file."""
    return read_config(path) if path.is_file() else {}


def require_inside(folder: Path) -> None:
    """Refuse a model whose indices of shards name files outside of its folder. Raises InputError.

    Other libraries would read what they name, and a copy would lead there too.
    """
    for path in sorted([*folder.glob(SHARDS), *folder.glob(f"*/{SHARDS}")]):
        shards = read_config(path).get("weight_map", {})
        for shard in sorted(map(str, shards.values())) if isinstance(shards, dict) else ():
            _require_name(path, shard)


def _require_name(path: Path, name: str) -> None:
    """Refuse a file that names another one outside of its folder."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise InputError(
            f"{path} names {name!r}, which lies outside of the model",
            hint="get the model from a source that you trust",
        )


def _is_llava(config: Mapping[str, Any]) -> bool:
    named = "vision_feature_layer" in config or "mm_vision_tower" in config
    return named or str(config.get("model_type", "")).startswith("llava")


def _clip(folder: Path, config: Mapping[str, Any] | None = None) -> Target:
    weight_sets, unread = read_weight_sets(folder)
    _require_towers(folder, weight_sets, unread, config)
    towers = sorted({place.tower for weights in weight_sets for place in weights.towers})
    encoder = Encoder("clip", tuple(weight_sets), whole(*towers))
    return Target(folder, Family.CLIP, (encoder,), unread)


def _llava(folder: Path, config: dict[str, Any]) -> Target:
    weight_sets, unread = read_weight_sets(folder)
    towers = [weights for weights in weight_sets if _towers([weights], Tower.VISION)]
    if not towers and "mm_vision_tower" in config:
        elsewhere = config["mm_vision_tower"]
        raise InputError(
            f"{folder} does not hold its vision tower: its {CONFIG} points to {elsewhere}",
            hint=f"edit that model (--target a copy of {elsewhere}) "
            f"and let mm_vision_tower in {CONFIG} point to the result",
        )
    _require_towers(folder, towers, unread, config)
    if config.get("model_type") == PALIGEMMA:
        read, family = unpooled(), Family.PALIGEMMA
    else:
        read, family = _features(towers, config), Family.LLAVA
    encoder = Encoder("vision_tower", tuple(towers), (read,))
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
        _require_name(folder / PIPELINE, name)
    unread: dict[Path, str] = {}
    sets: dict[str, list[WeightSet]] = {}
    depths: dict[str, int] = {}
    for name in classes:
        sets[name], failed = read_weight_sets(folder / name)
        unread |= failed
        _require_towers(folder / name, sets[name], failed)
        weights, place = _towers(sets[name], Tower.TEXT)[0]
        depths[name] = weights.blocks(place)
    family = _family(kind, depths[classes[0]])
    encoders, readers = [], []
    for name, model in models.items():
        if name not in classes:
            readers.append(PromptReader(name, _short(model), EVERY_TOKEN))
            continue
        text = _text_read(family, depths[name], pooled=model.endswith("WithProjection"))
        reads = f"at most {text.reads}" if family is Family.OTHER else text.reads
        readers.append(PromptReader(name, _short(model), reads))
        encoders.append(Encoder(name, tuple(sets[name]), (text,)))
    return Target(folder, family, tuple(encoders), unread, tuple(readers))


def _text_models(index: Mapping[str, Any]) -> dict[str, str]:
    """Return the classes of a pipeline's text encoders by their names, sorted."""
    parts = {
        name: str(value[1])
        for name, value in sorted(index.items())
        if isinstance(value, list) and len(value) == 2 and value[1] is not None
    }
    return {
        name: model
        for name, model in parts.items()
        if name.startswith("text_encoder") or model.startswith("CLIPText")
    }


def _short(model: str) -> str:
    """Return how people call a text encoder of transformers."""
    return next((known for known in ("CLIP", "T5") if model.startswith(known)), model)


def _family(kind: str, blocks: int) -> Family:
    """Return what pipelines of a class are, the first of whose CLIPs has so many blocks."""
    if kind.startswith("StableDiffusion3"):
        return Family.SD3
    if kind.startswith("Flux"):
        return Family.FLUX
    if "DiffusionXL" in kind or "SDXL" in kind:
        return Family.SDXL
    if not _STABLE_DIFFUSION.search(kind):
        return Family.OTHER
    return Family.SD2 if blocks > 12 else Family.SD1


def _text_read(family: Family, blocks: int, *, pooled: bool) -> ReadFrom:
    """Return what a pipeline reads of a text encoder; a `pooled` one projects its last state."""
    match family:
        case Family.FLUX:
            return replace(last_state(blocks), reads=POOLED)
        case Family.SDXL if not pooled:
            return penultimate(blocks, norm=False)
        case Family.SDXL | Family.SD3:
            return ReadFrom(tower=Tower.TEXT, reads=PENULTIMATE_AND_POOLED)
    return whole(Tower.TEXT)[0] if pooled else last_state(blocks)


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
        encoders = tuple(
            Encoder(name, (weights,), (_file_read(family, weights, place),), place.prefix)
            for name, place in _named(texts)
        )
        held = {encoder.name for encoder in encoders}
        t5 = any(key.startswith(_T5_IN_FILES) for key in weights.owners)
        readers = tuple(
            reader
            for reader in READERS.get(family, ())
            if reader.name in held or (t5 and reader.model == "T5")
        )
        return Target(path, family, encoders, readers=readers)
    if any(start in key for key in weights.owners for start in PROJECTORS):
        beside = path.parent / CONFIG
        encoder = Encoder("vision_tower", (weights,), (_features([weights], config_of(beside)),))
        return Target(path, Family.LLAVA, (encoder,))
    towers = sorted({place.tower for place in weights.towers})
    return Target(path, Family.CLIP, (Encoder("clip", (weights,), whole(*towers)),))


def _named(texts: Sequence[TowerPlace]) -> list[tuple[str, TowerPlace]]:
    """Return the text encoders of a file in the order and by the names that pipelines have."""
    numbered = ["text_encoder", *(f"text_encoder_{n}" for n in range(2, len(texts) + 1))]
    names = [
        next((name for start, name in _IN_FILES.items() if f".{start}." in place.prefix), other)
        for place, other in zip(texts, numbered, strict=True)
    ]
    return sorted(zip(names, texts, strict=True), key=lambda pair: pair[0])


def _file_read(family: Family, weights: WeightSet, place: TowerPlace) -> ReadFrom:
    blocks = weights.blocks(place)
    if family is Family.SD1:
        return last_state(blocks)
    if family is Family.SD2:
        return penultimate(blocks, norm=True)
    return _text_read(family, blocks, pooled=place.spelling is Spelling.OPEN_CLIP)


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


Shapes = Mapping[str, tuple[int, ...]]

# The second encoder of SDXL and of Stable Diffusion 3 is OpenCLIP's bigG, of this width.
SECOND_WIDTH = 1280


@dataclass(frozen=True, slots=True)
class TargetLayers:
    """What a ranking is for: the target in the user's words, and what it reads of a CLIP.

    `readers` are what reads its prompts, and which of them an edit of a layer would change.
    """

    target: str
    read_from: tuple[ReadFrom, ...]
    readers: tuple[PromptReader, ...] = ()

    def why_not(self, layer: str) -> str | None:
        """Return why a layer cannot influence the target; None where it can."""
        return _why_not(self.read_from, layer)


def layers_read_by(target: str, shapes: Shapes, *, encoder: str | None) -> TargetLayers:
    """Return what `target`, a path or a kind, reads of the CLIP whose layers have `shapes`.

    Raises MissingError, InputError, and UsageError where an encoder must be named.
    """
    if target in KINDS and not Path(target).exists():
        family = Family(target)
        name = encoder or _encoder_of_kind(family, shapes)
        read = _with_edits(READERS.get(family, ()), [name])
        return TargetLayers(target, _of_kind(family, shapes, name), read)
    model = read_target(Path(target))
    one = fitting_encoder(model, shapes, encoder)
    return TargetLayers(target, one.read_from, _with_edits(model.readers, [one.name]))


def fitting_encoder(model: Target, shapes: Shapes, encoder: str | None) -> Encoder:
    """Return the encoder of a model whose layers have these `shapes`, or that which is named.

    Raises InputError where none has them, and UsageError where one must be named.
    """
    fitting = [one for one in model.chosen(encoder) if _fits(one, shapes)]
    if not fitting:
        raise InputError(
            f"the CLIP inside {model.path} is another than the one the gradients are of",
            hint="compute them on the CLIP that the target was built on",
        )
    if len(fitting) > 1:
        raise UsageError(
            f"{model.path} has several encoders of this shape",
            hint=f"--encoder {' or '.join(one.name for one in fitting)}",
        )
    return fitting[0]


def _encoder_of_kind(family: Family, shapes: Shapes) -> str:
    """Return which encoder of a kind of pipelines a CLIP of these `shapes` is, by its width."""
    width = shapes.get("ln_final.weight", shapes.get("text.ln_final.weight", (0,)))[0]
    second = width == SECOND_WIDTH and family in (Family.SDXL, Family.SD3)
    return "text_encoder_2" if second else "text_encoder"


def _of_kind(family: Family, shapes: Shapes, encoder: str) -> tuple[ReadFrom, ...]:
    match family:
        case Family.SD1:
            return (last_state(None),)
        case Family.SD2:
            return (penultimate(_depth(shapes, Tower.TEXT), norm=True),)
        case Family.SDXL | Family.SD3 | Family.FLUX:
            clips = [one.name for one in READERS[family] if one.model == "CLIP"]
            if encoder not in clips:
                raise UsageError(
                    f"{family} has no CLIP called {encoder}; it has {', '.join(clips)}"
                )
            pooled = encoder == "text_encoder_2"
            return (_text_read(family, _depth(shapes, Tower.TEXT), pooled=pooled),)
        case Family.LLAVA:
            return (vision_features([-2], _depth(shapes, Tower.VISION)),)
        case Family.PALIGEMMA:
            return (unpooled(),)
    return whole(*Tower)


def _depth(shapes: Shapes, tower: Tower) -> int:
    return block_count(name for name in shapes if Layer.parse(name).tower is tower)


def _fits(encoder: Encoder, shapes: Shapes) -> bool:
    """Return whether every layer of `shapes` that lies in an encoder has the same shape there."""
    weights = encoder.copies[0]
    same = [
        weights.shape(places) == shape
        for place in encoder.towers(weights)
        for layer, shape in shapes.items()
        if weights.holds(places := tensor_places(layer, place))
    ]
    return bool(same) and all(same)
