"""Whether a model's files can be loaded, and what a folder that is written holds beside weights.

What is looked at: the configuration, the names and shapes of the weights by their header, and
the tokenizer. A folder that is written has a tokenizer and a card, and in another layout than
the model had before it has all that its client reads.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import slsgu_cli
from slsgu_cli import progress
from slsgu_cli.checkpoints.apply import STANDARD_NAME
from slsgu_cli.checkpoints.configurations import CONFIG, OPEN_CLIP, PIPELINE, config_of
from slsgu_cli.checkpoints.destinations import OURS, README
from slsgu_cli.checkpoints.edits import Edit
from slsgu_cli.checkpoints.hub import FETCH_ERRORS, HUB
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.layouts import WeightSet, clip_shapes
from slsgu_cli.checkpoints.naming_schemes import NamingScheme, TowerPlace, tensor_places
from slsgu_cli.checkpoints.other_layout import OtherLayout
from slsgu_cli.checkpoints.targets import Target
from slsgu_cli.checkpoints.transformers_families import (
    CLIP,
    CLIP_TEXT,
    FAMILIES,
    GELU,
    family_of,
    transformers_config,
)
from slsgu_cli.checkpoints.transformers_inputs import PREPROCESSOR, transformers_preprocess
from slsgu_cli.clip.models import (
    TOKENIZER_CONFIG,
    ResolvedModel,
    built_shapes,
    built_tower,
    contents,
    fresh_tokenizer,
    is_read_by_open_clip,
    load,
    probe_tokens,
    resolve,
)
from slsgu_cli.errors import InputError, SlsguError, UsageError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.method import EditHeader, ModelLayout, Tower
from slsgu_cli.records.options import ApplyRequest
from slsgu_cli.records.sets import LOCAL, ModelSpec
from slsgu_cli.text import first_lines, listed

# What a tokenizer of transformers consists of, whatever its kind.
TOKENIZER_FILES = (
    TOKENIZER_CONFIG,
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "tokenizer.model",
)
# A buffer of older checkpoints, which open_clip leaves out.
POSITIONS = "position_ids"
# What open_clip adds to a checkpoint that has none.
BIAS = "logit_bias"


def hub_tokenizer(model: ResolvedModel) -> str | None:
    """Return the name of the Hugging Face tokenizer of a model; None of CLIP's own."""
    name = model.config["text_cfg"].get("hf_tokenizer_name")
    return str(name) if name else None


def tokenizer_files(model: ResolvedModel, scratch: Path) -> dict[str, Path]:
    """Return the files that a folder of a model needs for its tokenizer, by their names there.

    They are those that the model's tokenizer was loaded from, which lie in its folder if it has
    one, or, where these do not say by themselves which tokenizer they are of, saved anew in the
    empty folder `scratch`. CLIP's own tokenizer is part of open_clip and needs none. Raises
    MissingError or InputError.
    """
    name = hub_tokenizer(model)
    if name is None:
        return {}
    source = model.folder or _tokenizer_folder(name)
    if source is None or "tokenizer_class" not in config_of(source / TOKENIZER_CONFIG):
        fresh_tokenizer(model).save_pretrained(str(scratch))
        return {path.name: path for path in sorted(scratch.iterdir())}
    return _present(source, TOKENIZER_FILES)


def _present(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """Return the files of a folder that are there, of some names."""
    return {name: folder / name for name in names if (folder / name).is_file()}


def tokenizer_beside(model: ResolvedModel | None, scratch: Path) -> dict[str, Path]:
    """Return `tokenizer_files` of a model that is no folder; warn where they cannot be had."""
    if model is None or model.folder is not None:
        return {}
    try:
        return tokenizer_files(model, scratch)
    except SlsguError as error:
        progress.warn(f"the tokenizer of {model.spec} cannot be written: {error.message}")
        return {}


def _tokenizer_folder(name: str) -> Path | None:
    """Return the folder that a tokenizer is loaded from: a local one, or one of the hub."""
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(TOKENIZER_FILES)))
    except FETCH_ERRORS:
        return None


def why_not_loaded(folder: Path, original: ResolvedModel | None) -> str | None:
    """Return why it is not certain that open_clip loads a folder; None where it is.

    Its tokenizer must give the ids that `original`'s gives, of the model that it was made from.
    """
    try:
        model = resolve(ModelSpec(f"{LOCAL}{folder}"))
        if not is_read_by_open_clip(model):
            return f"it does not read {model.weights.name}, TorchScript or of a compiled model"
        return _other_weights(model) or _other_tokenizer(model, original)
    except SlsguError as error:
        return first_lines(error).replace(f"{folder}/", "")


def require_weights(model: ResolvedModel) -> None:
    """Raise InputError or MissingError unless a model's weights can be loaded.

    Their header tells so of most. Where it differs from what the configuration builds, as
    weights do that open_clip converts, they are loaded.
    """
    if _other_weights(model) is not None:
        load(model)


def _other_weights(model: ResolvedModel) -> str | None:
    """Return how the header of a model's weights differs from what its configuration builds."""
    wanted = clip_shapes(model.config) or built_shapes(model)
    held, _ = contents(model)
    if "positional_embedding" in held and "positional_embedding" not in wanted:
        # A text tower of its own is loaded from the names of one without as well.
        wanted = {name.removeprefix("text."): shape for name, shape in wanted.items()}
    missing = sorted(wanted.keys() - held.keys() - {BIAS})
    more = sorted(name for name in held.keys() - wanted.keys() if POSITIONS not in name)
    other = sorted(name for name in wanted.keys() & held.keys() if wanted[name] != held[name])
    for names, what in (
        (missing, "its weights lack"),
        (more, "its configuration has no place for"),
        (other, "its configuration has another shape for"),
    ):
        if names:
            return f"{what} {listed(names, 1)}"
    return None


def _other_tokenizer(model: ResolvedModel, original: ResolvedModel | None) -> str | None:
    """Return in what the tokenizer of a folder is not that of the model it was made from."""
    name = hub_tokenizer(model)
    if (
        original is not None
        and model.scheme is NamingScheme.TRANSFORMERS
        and hub_tokenizer(original)
    ):
        here, there = _cleaning(model), _cleaning(original)
        if here != there:
            return (
                f"its tokenizer cleans texts by {here!r}, and that of {original.spec} by "
                f"{there!r}, which gives other ids: clean them so before"
            )
    by_name = original is not None and "siglip" in original.identifier.lower()
    if name is None and not by_name:
        return None
    ids = probe_tokens(model)
    copied = original is not None and original.folder and original.scheme is model.scheme
    if original is not None and not copied and ids != probe_tokens(original):
        return f"its tokenizer gives other ids than that of {original.spec}"
    return None


def _cleaning(model: ResolvedModel) -> str:
    """Return how a Hugging Face tokenizer cleans texts, in open_clip's words."""
    return str(model.config["text_cfg"].get("tokenizer_kwargs", {}).get("clean", "whitespace"))


WEIGHTS = "model.safetensors"
# What a folder keeps of the model that it was made from, whatever its layout.
KEPT = (README, "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
# The text encoders that ComfyUI knows by their blocks and width, and what it runs them with.
COMFY_TOWERS = {
    (12, 768): ("CLIP ViT-L", "quick_gelu"),
    (24, 1024): ("OpenCLIP ViT-H", "gelu"),
    (32, 1280): ("OpenCLIP ViT-bigG", "gelu"),
}
COMFY_HEAD_WIDTH = 64
PROJECTION = "text_projection"
START, END = "<|startoftext|>", "<|endoftext|>"


def other_layout(
    wanted: ModelLayout | None,
    model: ResolvedModel | None,
    target: Target,
    edits: Sequence[Edit],
    scratch: Path,
) -> OtherLayout | None:
    """Return what a target is written with in the `wanted` layout; None where it has that one.

    `model` is the target as a whole CLIP. Files that are not there yet are made in `scratch`.
    Raises UsageError or InputError where that layout cannot hold it.
    """
    if wanted is None:
        return None
    if wanted is ModelLayout.COMFY:
        return _for_comfy(model, target, edits)
    if model is None:
        raise UsageError(
            f"{target.path} is no whole CLIP, and --format {wanted} is for those",
            hint="leave --format out: it is written in the layout that it has",
        )
    if (wanted is ModelLayout.HF) is (model.scheme is NamingScheme.TRANSFORMERS):
        return None
    layout = _for_transformers if wanted is ModelLayout.HF else _for_open_clip
    made = layout(model, scratch)
    kept = _present(model.folder, KEPT) if model.folder else {}
    return replace(made, weights=model.weights, files={**made.files, **kept})


def _for_transformers(model: ResolvedModel, scratch: Path) -> OtherLayout:
    """Return what transformers loads an open_clip model from."""
    config = model.config
    if config["vision_cfg"].get("timm_pool") == "map":
        trunk = built_tower(model).trunk
        rest = {k: v for k, v in config["vision_cfg"].items() if k != "timm_model_name"}
        config = config | {"vision_cfg": rest | (trunk_sizes(trunk) or config["vision_cfg"])}
    family = FAMILIES[family_of(config)]
    made, lacks = transformers_config(config)
    processor, other = transformers_preprocess(config, model.preprocess)
    if lacks or other:
        reasons = [f"{field} {value}" for field, value in lacks.items()]
        reasons += [other] if other else []
        reasons[3:] = [f"{len(reasons) - 3} more"] if len(reasons) > 3 else []
        raise InputError(
            f"{model.spec} cannot be written for transformers, where its {family.name} has no "
            f"place for {'; '.join(reasons)}",
            hint="without --format, it is written as open_clip loads it",
        )
    texts = {CONFIG: _json(made), PREPROCESSOR: _json(processor)}
    if hub_tokenizer(model) is None:
        texts |= clip_tokenizer(config["text_cfg"].get("context_length", 77))
    prefixes = {Tower.TEXT: "text_model.", Tower.VISION: "vision_model."}
    towers = tuple(TowerPlace(tower, family.names, prefixes[tower]) for tower in Tower)
    files = tokenizer_files(model, scratch)
    return OtherLayout("transformers", WEIGHTS, family.names, towers, files=files, texts=texts)


def clip_tokenizer(context_length: int) -> dict[str, str]:
    """Return CLIP's own tokenizer, which is part of open_clip, as files that transformers reads."""
    import open_clip

    tokenizer = open_clip.SimpleTokenizer()
    words = list(tokenizer.encoder)[: -len((START, END))]
    tokens = {word: number for number, word in enumerate([*words, START, END])}
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": context_length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
        "do_lower_case": True,
    }
    return {
        "vocab.json": json.dumps(tokens, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(merges) + "\n",
        TOKENIZER_CONFIG: _json(config),
    }


def _for_open_clip(model: ResolvedModel, scratch: Path) -> OtherLayout:
    """Return what open_clip loads a model of transformers from."""
    config, family = model.config, FAMILIES[family_of(model.config)]
    text, is_siglip = config["text_cfg"], family.names is NamingScheme.SIGLIP
    if family.names is NamingScheme.BERT:
        raise InputError(
            f"{model.spec} cannot be written for open_clip, which builds a BERT by the name of a "
            "repository alone, and reads none that lies in a model's folder",
            hint="without --format, it is written as transformers loads it",
        )
    files = {}
    if "tokenizer_kwargs" in text and model.folder is not None:
        # By this name it is known that there is one; in a folder, it is that of the folder.
        named = _hub_id(model.spec, model.folder) or model.folder.resolve().name
        config = config | {"text_cfg": text | {"hf_tokenizer_name": named}}
        files = _present(model.folder, TOKENIZER_FILES)
    if is_siglip:
        config = config | {"vision_cfg": _named_by_timm(model)}
    content = _json({"model_cfg": config, "preprocess_cfg": model.preprocess})
    prefixes = {Tower.TEXT: "text." if is_siglip else "", Tower.VISION: ""}
    towers = tuple(TowerPlace(tower, NamingScheme.OPEN_CLIP, prefixes[tower]) for tower in Tower)
    return OtherLayout(
        "open_clip",
        STANDARD_NAME["safetensors"],
        family.names,
        towers,
        files=files,
        texts={OPEN_CLIP: content},
    )


def _named_by_timm(model: ResolvedModel) -> dict[str, Any]:
    """Return the vision_cfg of a SigLIP by the name that timm has for a tower of its sizes.

    open_clip builds such towers by timm's names alone. Raises InputError where none has them.
    """
    import timm
    import torch

    vision = model.config["vision_cfg"]
    wanted = _compared(vision)
    like = f"*_patch{vision['patch_size']}_siglip_{vision['image_size']}"
    for name in timm.list_models(like):
        with torch.device("meta"):
            trunk = timm.create_model(name, num_classes=0, global_pool="map")
        sizes = trunk_sizes(trunk)
        if sizes is not None and _compared(sizes) == wanted:
            return {
                "image_size": vision["image_size"],
                "timm_model_name": name,
                "timm_model_pretrained": False,
                "timm_pool": "map",
                "timm_proj": "none",
            }
    act = "tanh's approximation of GELU" if wanted["act_kwargs"] != GELU["gelu"] else "exact GELU"
    raise InputError(
        f"{model.spec} cannot be written for open_clip, which builds SigLIP's vision tower by "
        f"timm's names: none is of {wanted['layers']} blocks {wanted['width']} wide for images "
        f"of {wanted['image_size']} in patches of {wanted['patch_size']} with {act}",
        hint="without --format, it is written as transformers loads it",
    )


_ACTS = {"GELU": GELU["gelu"], "GELUTanh": GELU["gelu_pytorch_tanh"]}


def trunk_sizes(trunk: Any) -> dict[str, Any] | None:
    """Return what a model_cfg says of a plain ViT of timm's; None of another tower."""
    if type(trunk).__name__ != "VisionTransformer":
        return None
    block, patches = trunk.blocks[0], trunk.patch_embed
    act = _ACTS.get(type(block.mlp.act).__name__)
    if act is None or len({*patches.img_size}) > 1 or len({*patches.patch_size}) > 1:
        return None
    return {
        "image_size": patches.img_size[0],
        "patch_size": patches.patch_size[0],
        "layers": len(trunk.blocks),
        "width": trunk.embed_dim,
        "head_width": trunk.embed_dim // block.attn.num_heads,
        "mlp_ratio": block.mlp.fc1.out_features / trunk.embed_dim,
        "act_kwargs": act,
    }


def _compared(vision: Mapping[str, Any]) -> dict[str, Any]:
    names = ("image_size", "patch_size", "layers", "width", "head_width", "act_kwargs")
    inside = round(vision["width"] * vision["mlp_ratio"])
    return {name: vision[name] for name in names} | {"inside": inside}


def _for_comfy(model: ResolvedModel | None, target: Target, edits: Sequence[Edit]) -> OtherLayout:
    """Return how ComfyUI has a text encoder. Raises InputError for one that it does not know."""
    layers = [edit.header.layer for edit in edits]
    if others := [layer for layer in layers if Layer.parse(layer).tower is not Tower.TEXT]:
        raise InputError(f"{others[0]} is no part of a text encoder, which is what ComfyUI loads")
    encoders = [one for one in target.encoders if any(w.towers for w in one.copies)]
    copies = [weights for encoder in encoders for weights in encoder.copies]
    if model is not None:
        copies = [weights for weights in copies if model.weights in weights.files]
    why_not = [why for weights in copies if (why := _why_not_comfy(weights, model)) is not None]
    if len(why_not) == len(copies):
        known = ", ".join(
            f"{name} ({blocks} blocks, {width} wide, {act})"
            for (blocks, width), (name, act) in COMFY_TOWERS.items()
        )
        raise InputError(f"ComfyUI has no place for {target.path}: {why_not[0]}; it knows {known}")
    towers = (TowerPlace(Tower.TEXT, NamingScheme.TRANSFORMERS, "text_model."),)
    return OtherLayout(
        "ComfyUI",
        "",
        NamingScheme.TRANSFORMERS,
        towers,
        optional=(PROJECTION,),
        weights=None if model is None else model.weights,
    )


def _why_not_comfy(weights: WeightSet, model: ResolvedModel | None) -> str | None:
    """Return why ComfyUI would not run a text encoder as it is; None where it would."""
    tower = weights.tower(Tower.TEXT)
    if tower.scheme is NamingScheme.SIGLIP:
        return "it is a SigLIP"
    if tower.scheme is NamingScheme.BERT:
        return "its text tower is a BERT"

    def shape(name: str) -> tuple[int, ...]:
        places = tensor_places(name, tower)
        return weights.shape(places) if weights.holds(places) else ()

    sizes = weights.blocks(tower), *shape("token_embedding.weight")[1:]
    if sizes not in COMFY_TOWERS:
        return f"its text tower is of {' blocks, '.join(map(str, sizes))} wide"
    name, act = COMFY_TOWERS[sizes]
    vocabulary, width = shape("token_embedding.weight")
    positions, projection = shape("positional_embedding")[0], shape(PROJECTION)
    activation, heads, other = _text_of(weights, model)
    reasons = {
        f"its MLPs have {activation}, and those of {name} {act}": activation != act,
        f"it has {heads} heads": heads != width // COMFY_HEAD_WIDTH,
        f"it has {vocabulary} tokens": vocabulary != CLIP_TEXT["vocab_size"],
        f"it has {positions} positions": positions != CLIP_TEXT["max_position_embeddings"],
        f"it projects to {projection[-1:]} values": projection not in ((), (width, width)),
        f"its text tower has {', '.join(other)}": bool(other),
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _text_of(weights: WeightSet, model: ResolvedModel | None) -> tuple[str, int, list[str]]:
    """Return a text tower's activation and heads, and what else it has that CLIP's has not."""
    if model is None:
        beside = weights.path.parent / CONFIG
        config: dict[str, Any] = {**CLIP_TEXT, **config_of(beside)}
        return str(config["hidden_act"]), int(config["num_attention_heads"]), []
    config = model.config | {"vision_cfg": {}, "init_logit_bias": None}
    made, lacks = transformers_config(config)
    other = [f"{field} {value}" for field, value in lacks.items() if field.startswith("text_cfg")]
    if family_of(config) != CLIP:
        other += ["another end of text"]
    text = made.get("text_config", CLIP_TEXT)
    return text["hidden_act"], text["num_attention_heads"], other


def _json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=2) + "\n"


# Where the base model's card begins in one of ours.
THEIRS = "<!-- slsgu: the card of the base model -->\n"
EDITS = ("edit", "forgets", "layer", "moved by", "strength", "digest", "of the model")
FIGURES = ("edit", "figure", "base", "edited", "of")
WHOLE = "whole"
ROW = re.compile(r"^\| `.* \|$", re.MULTILINE)
BASE = re.compile(r"^# (`[^`\n]*`) without ", re.MULTILINE)
BASE_ID = re.compile(r"^base_model: (\S+)$", re.MULTILINE)
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
LICENSE = re.compile(r"^license: *([\w.-]+) *$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the card of an edited model says; `earlier` edits were in it before.

    `base` is what the base model is called, `hub_id` what the hub calls it. `strength` tells
    whether the edits are in it as they were searched for, or scaled or cut; with `revert` they
    are taken out. `library` is what loads it.
    """

    edits: Sequence[EditHeader]
    earlier: Sequence[EditHeader]
    base: str
    hub_id: str | None
    strength: str = WHOLE
    revert: bool = False
    library: str | None = None

    @classmethod
    def of(
        cls,
        edits: Sequence[Edit],
        earlier: Sequence[Edit],
        *,
        base: ResolvedModel | Path,
        options: ApplyRequest,
        library: str | None = None,
    ) -> "ModelCard":
        """Return the card of edits in a model, or in a target at a path, applied by `options`.

        Where the base model is known by its path alone, its last part is told.
        """
        spec = base.spec if isinstance(base, ResolvedModel) else None
        place = (base.folder or base.weights) if isinstance(base, ResolvedModel) else base
        known = _hub_id(spec, place)
        name = place.resolve().name
        if spec is not None and spec.pretrained:
            name = f"{Path(spec.name).stem} ({Path(spec.pretrained).name})"
        strength = [] if options.scale == 1 else [f"scale {options.scale:g}"]
        strength += [] if options.rank is None else [f"rank {options.rank}"]
        strength += [] if options.step is None else [f"step {options.step:g}"]
        now, before = ([edit.header for edit in each] for each in (edits, earlier))
        how = " ".join(strength) or WHOLE
        return cls(now, before, known or name, known, how, options.revert, library)

    def over(self, present: str | None) -> str | None:
        """Return the card where one is `present`: the base model's, or ours of what it was.

        What ours says of other edits stays, and the base model's card stands behind. Without
        any edit left, it stands alone.
        """
        theirs = base_card(present)
        ours = "" if present is None or present == theirs else present.partition(THEIRS)[0]
        every = [*self.edits] if self.revert else [*self.edits, *self.earlier]
        names = {_code(edit.name) for edit in every}
        there = [row for row in ROW.findall(ours) if row.split(" | ")[0][2:] not in names]
        edits = [row for row in there if row.count(" | ") == len(EDITS) - 1]
        figures = [row for row in there if row.count(" | ") == len(FIGURES) - 1]
        if not self.revert:
            edits += [_row(self._edit(edit)) for edit in every]
            figures += [_row(cells) for edit in every for cells in _figures(edit)]
        if not edits:
            return theirs
        base, known = BASE.search(ours), BASE_ID.search(ours)
        return _rendered(
            _code(self.base) if base is None else base[1],
            (None if base is not None else self.hub_id) if known is None else known[1],
            sorted(edits, key=_first),
            sorted(figures, key=_first),
            theirs,
            self.library,
        )

    def _edit(self, edit: EditHeader) -> tuple[str, ...]:
        strength = self.strength if edit in self.edits else WHOLE
        share = f"{100 * edit.share:.3g}%"
        name, concept, layer = _code(edit.name), _code(edit.concept), _code(edit.layer)
        return name, concept, layer, share, strength, digest(edit), edit.model_fingerprint


def _first(row: str) -> str:
    return row.split(" | ")[0]


def _figures(edit: EditHeader) -> list[tuple[str, ...]]:
    """Return what an edit forgets and keeps, as it was measured when it was made."""
    before = edit.baseline_utility or {}
    kept = [("TA", n, before.get(n), now) for n, now in (edit.utility or {}).items()]
    rows: list[tuple[str, ...]] = []
    for kind, name, was, now in (("FA", "", edit.baseline_forget, edit.forget), *kept):
        if was is None or now is None:
            continue
        seen = "nothing was chosen by" if now.unseen else "it was chosen by"
        of = f"{now.rows} images that {seen}"
        for k, one, other in ((1, was.top1, now.top1), (5, was.top5, now.top5)):
            figure = f"{kind}@{k} {name}".strip()
            rows.append((_code(edit.name), figure, f"{one:.2f}%", f"{other:.2f}%", of))
    return rows


def _rendered(
    base: str,
    known: str | None,
    edits: Sequence[str],
    figures: Sequence[str],
    theirs: str | None,
    library: str | None,
) -> str:
    """Return the card of rows of edits and of figures; `theirs` is the base model's."""
    licensed = LICENSE.search(theirs.partition("\n---")[0]) if theirs else None
    front = ["---", "tags:", "- clip", "- machine-unlearning"]
    front += [f"library_name: {library}"] if library else []
    front += [f"base_model: {known}"] if known else []
    front += [f"license: {licensed[1]}"] if licensed else []
    concepts = ", ".join(dict.fromkeys(row.split(" | ")[1] for row in edits))
    licence = "" if licensed else " Its licence is that of the base model, not known here."
    parts = [
        "\n".join([*front, "---"]),
        OURS,
        f"# {base} without {concepts}",
        f"This is {base} with the edits below, made by slsgu {slsgu_cli.__version__} "
        f"([SLUG](https://arxiv.org/abs/2407.11867)).{licence}",
        "## Figures",
        _table(FIGURES, figures) if figures else "Nothing was measured.",
        "FA is the accuracy on the concept, TA that on everything else, of the base model with "
        "each edit as it was made.",
        "## Edits",
        _table(EDITS, edits),
        "`slsgu check . --edit NAME` tells whether an edit is in these weights, and "
        "`slsgu apply --revert` takes it out.",
    ]
    text = "\n\n".join(parts) + "\n"
    return text if theirs is None else f"{text}\n{THEIRS}{theirs}"


def base_card(present: str | None) -> str | None:
    """Return the base model's card of one that is present: what stands behind ours, if it is."""
    if present is None or OURS not in present:
        return present
    _, found, theirs = present.partition(THEIRS)
    return theirs if found else None


def _hub_id(spec: ModelSpec | None, place: Path) -> str | None:
    """Return what the Hugging Face hub calls a model, as far as its name or its files tell."""
    if spec is not None and spec.name.startswith(HUB):
        return spec.name.removeprefix(HUB)
    if spec is not None and spec.pretrained:
        return None if Path(spec.pretrained).is_file() else _of_tag(spec.name, spec.pretrained)
    if match := SNAPSHOT.search(str(place)):
        return f"{match[1]}/{match[2]}"
    for config in (place / PIPELINE, place / CONFIG):
        name = str(config_of(config).get("_name_or_path", ""))
        if HUB_ID.fullmatch(name) and not Path(name).exists():
            return name
    return None


def _of_tag(name: str, tag: str) -> str | None:
    """Return the repository that open_clip fetches a pretrained tag from."""
    import open_clip

    place = (open_clip.get_pretrained_cfg(name, tag) or {}).get("hf_hub") or ""
    return "/".join(place.split("/")[:2]) or None


def _code(text: str) -> str:
    """Return words of strangers as Markdown's code, which is not marked up."""
    return f"`{' '.join(text.replace('`', ' ').replace('|', ' ').split())}`"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _table(columns: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join([_row(columns), _row(["---"] * len(columns)), *rows])
