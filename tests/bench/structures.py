"""Run every model structure of open_clip, shrunk, through the five commands; print a table.

    python tests/bench/structures.py            # all
    python tests/bench/structures.py EVA coca   # those whose names begin so

Structures that differ only in size share a row. The weights are random; the table compares the
gradients with open_clip's own backward, and says how towers are split, which layers can be
whitened, which have only the gradient and which no score, and whether open_clip loads the result
of `apply`. A candidate that is neither scored nor mentioned counts as silent.
"""

import json
import logging
import re
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import numpy as np
import open_clip
import timm
import tiny_clip
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from tower_models import SIDE, WIDTH, shrinking
from worlds import Listener, World

from slsgu_cli.checkpoints.layers import layers_of
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.towers import WholeTower, text_tower, vision_tower
from slsgu_cli.engine.apply import apply
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.directions import Direction, DirectionSpec
from slsgu_cli.records.method import GradientHeader, Qkv
from slsgu_cli.records.options import ApplyRequest, PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store
from slsgu_cli.text import first_lines

COLUMNS = (
    "structure",
    "gradient",
    "vision tower",
    "text tower",
    "layers",
    "whitened",
    "along the gradient",
    "no score",
    "silent",
    "search",
    "loads",
)
# Keys that describe size, training or initial weights, not structure.
SIZES = {
    "embed_dim",
    "image_size",
    "patch_size",
    "layers",
    "width",
    "head_width",
    "heads",
    "mlp_ratio",
    "context_length",
    "vocab_size",
    "timm_model_pretrained",
    "timm_drop",
    "timm_drop_path",
    "hf_tokenizer_name",
    "eos_id",
    "init_logit_bias",
    "attn_pooler_heads",
    "dim_head",
    "n_queries",
    "tokenizer_kwargs",
    "output_tokens",
}
SCALE = r"_(tiny|small|base|medium|xxlarge|xlarge|large2?|giantopt|giant|enormous|gigantic|so400m)"
TIMM = re.compile(SCALE + r"|_patch\d+|_window\d+|_\d{3}$|_\d{3}(?=_)|(?<=mci)\d")
TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 3}
WORDS, LARGEST = 64, 100.0
# Errors that a structure may end with; its row shows the error.
FAILURES = (SlsguError, AssertionError, LookupError, RuntimeError, TypeError, ValueError)
# Text towers of Hugging Face, by name.
HUGGING_FACE = {
    "roberta": ("RobertaConfig", {}),
    "xlm-roberta": ("XLMRobertaConfig", {}),
    "google/mt5": (
        "MT5Config",
        {
            "d_model": 32,
            "d_kv": 16,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 2,
            "num_decoder_layers": 1,
        },
    ),
    "facebook/nllb": (
        "M2M100Config",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 48,
            "decoder_attention_heads": 2,
            "decoder_ffn_dim": 48,
        },
    ),
}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
}


def structure_of(config):
    """Return the structure of a model_cfg, without its sizes."""
    told = {}
    for part in ("", "vision_cfg", "text_cfg", "multimodal_cfg"):
        values = config.get(part, {}) if part else config
        for name, value in sorted(values.items()):
            if name in SIZES or (isinstance(value, dict) and not name.endswith("kwargs")):
                continue
            if name == "timm_model_name":
                value = f"{TIMM.sub('', value)} {_modules_of(value)}"
            if name == "hf_model_name":
                value = _hugging_face(value)
            if value not in (None, False):
                told[f"{part}.{name}"] = value
    layers = config["vision_cfg"].get("layers")
    told["stages"] = isinstance(layers, list)
    told["decoder"] = "multimodal_cfg" in config
    return json.dumps(told, sort_keys=True)


def _modules_of(name):
    """Return a digest of the types of modules of a timm model by name, without numbers."""
    with torch.device("meta"):
        built = timm.create_model(name)
    kinds = {(re.sub(r"\d+", "", at), type(each).__name__) for at, each in built.named_modules()}
    return digest(sorted(kinds))


def _hugging_face(name):
    return next(start for start in sorted(HUGGING_FACE, reverse=True) if name.startswith(start))


def shrunk(config, folder):
    """Return a model_cfg of the same structure and tiny sizes; its files go to `folder`."""
    config = json.loads(json.dumps(config)) | {"embed_dim": WIDTH}
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision:
        vision["image_size"] = SIDE
    elif isinstance(vision["layers"], list):
        vision |= {"layers": [1, 1, 2, 1], "width": 16, "image_size": SIDE}
    else:
        vision |= {
            "layers": 3,
            "width": WIDTH,
            "head_width": 24,
            "patch_size": 16,
            "image_size": SIDE,
        }
    if "attn_pooler_heads" in vision:
        vision["attn_pooler_heads"] = 2
    if "hf_model_name" in text:
        text["hf_model_name"] = str(_write_text_tower(text["hf_model_name"], folder / "text"))
    else:
        text |= TEXT | ({"width": WIDTH} if text.get("proj_type") == "none" else {})
    if "hf_tokenizer_name" in text:
        text["hf_tokenizer_name"] = str(_write_tokenizer(folder / "tokenizer"))
        text |= {"vocab_size": WORDS} | ({"eos_id": 1} if "eos_id" in text else {})
    if "multimodal_cfg" in config:
        sizes = {"width": 32, "heads": 2, "layers": 2, "context_length": 15}
        config["multimodal_cfg"] |= sizes | {"attn_pooler_heads": 2}
    return config


def _write_text_tower(name, folder):
    import transformers

    kind, sizes = HUGGING_FACE[_hugging_face(name)]
    ids = {"vocab_size": WORDS, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    getattr(transformers, kind)(**ids, **(sizes or BERT)).save_pretrained(folder)
    return folder


def _write_tokenizer(folder):
    """Write a tokenizer of the captions' words, which ends texts with 1."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["a", "picture", "photo", "drawing", "of", "the", *tiny_clip.COLOURS, *tiny_clip.SHAPES]
    known = {word: number for number, word in enumerate(["[PAD]", "[EOS]", "[UNK]", *words])}
    made = Tokenizer(models.WordLevel(known, "[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [("[EOS]", 1)]
    made.post_processor = processors.TemplateProcessing(single="$A [EOS]", special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        eos_token="[EOS]",
        sep_token="[EOS]",
        unk_token="[UNK]",
    )
    fast.save_pretrained(folder)
    return folder


def write_model(config, folder):
    """Write random weights of a configuration; return the model."""
    from safetensors.torch import save_file

    # Use a new name: tokenizers are cached by the names of their models.
    path, weights = folder / f"shrunk-{folder.name}.json", folder / "weights.safetensors"
    path.write_text(json.dumps(config))
    open_clip.add_model_config(path)
    torch.manual_seed(0)
    built = open_clip.create_model(path.stem, pretrained_text=False).eval()
    for name, parameter in built.named_parameters():
        # Fresh norms, biases and scales have zeros and ones, which would hide errors.
        if parameter.ndim < 2 and not name.startswith("logit"):
            parameter.data += 0.1 * torch.randn_like(parameter)
        if not parameter.isfinite().all() or parameter.abs().max() > LARGEST:
            # Buffers that open_clip leaves uninitialised.
            parameter.data.normal_(std=0.02)
    save_file({k: v.contiguous() for k, v in built.state_dict().items()}, weights)
    return ModelSpec(str(path), str(weights))


def gradient_error(world):
    """Return the relative difference between the stored gradients and open_clip's own backward.

    It is the larger of both losses' |stored - plain| / |plain|, over all parameters.
    """
    module: Any = load(resolve(world.model))
    spec = world.manifest.input
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (spec.mean, spec.std))
    errors = []
    for which in ("forget", "retain"):
        block = DataBlock.open(world.store, getattr(world.manifest, which))
        # In some convolutions, the backward of channels-last tensors crashes the process.
        images = torch.from_numpy(block.images(0, block.rows)).permute(0, 3, 1, 2).contiguous()
        tokens = torch.from_numpy(block.tokens).long()
        module.zero_grad()
        image = module.encode_image((images / 255 - mean) / std, normalize=True)
        text = module.encode_text(tokens, normalize=True)
        if which == "forget":
            loss = (1 - (image * text).sum(-1)).mean()
        elif getattr(module, "logit_bias", None) is not None:
            loss = SigLipLoss()(image, text, module.logit_scale.exp(), module.logit_bias)
        else:
            loss = ClipLoss()(image, text, module.logit_scale.exp())
        loss.backward()
        found = world.store.read_tensors(Artifact.GRADIENT.path(getattr(world.pointer, which)))
        off = size = 0.0
        for name, parameter in module.named_parameters():
            plain = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            stored = found.get(name, np.zeros(parameter.shape, np.float32))
            off += float((torch.from_numpy(stored) - plain).double().square().sum())
            size += float(plain.double().square().sum())
        errors.append((off / size) ** 0.5)
    return max(errors)


def split_of(tower):
    """Return a description of a tower's split."""
    if isinstance(tower, WholeTower):
        return "whole"
    what = "half blocks" if tower.halves else "blocks"
    return f"{what} ({tower.depth} stages)"


def measured(config, sources, folder):
    """Return the cells of a structure's row after its name."""
    listener = Listener()
    model = write_model(shrunk(config, folder), folder)
    world = World(Store(str(folder / "store")), "blue", model, sources)
    world.build()
    compute_gradients(world.store, "blue", model=None, options=PassOptions(batch_size=500))
    error = gradient_error(world)
    module = load(resolve(model))
    towers = [split_of(vision_tower(module)), split_of(text_tower(module))]
    listener.heard.clear()
    ranking = rank(world.store, "blue", options=RankOptions())
    header = world.store.read_header(Artifact.GRADIENT.path(world.pointer.forget), GradientHeader)
    candidates = set(layers_of(header.weights, Qkv.FUSED))
    by_direction = {
        direction: {score.layer for score in scores}
        for direction, scores in ranking.by_direction().items()
    }
    whitened = by_direction.get(DirectionSpec.of(Direction.WHITENED), set())
    scored = whitened.union(*by_direction.values())
    messages = "\n".join(listener.heard)
    left = candidates - scored
    silent = {name for name in left if name not in messages}
    along = sorted(scored - whitened)
    why = [
        text.rpartition(": ")[0] for text in listener.heard if re.match(r"\d+ layers are ", text)
    ]
    counts = [len(candidates), len(whitened), _named(along), _named(sorted(left)), len(silent)]
    counts[3] += "".join(f"; {reason}" for reason in why)
    return [f"{error:.0e}", *towers, *counts, *searched_and_written(world, folder)]


def _named(layers):
    """Return the number of layers, and the names of the first ones without numbers."""
    kinds = sorted({re.sub(r"\.\d+", "", layer).removesuffix(".weight") for layer in layers})
    named = ", ".join(f"`{kind}`" for kind in kinds[:3]) + (", ..." if len(kinds) > 3 else "")
    return f"{len(layers)}: {named}" if layers else "0"


def searched_and_written(world, folder):
    """Return the result of a short search, and whether open_clip loads the written folder."""
    options = SearchOptions(steps=4)
    try:
        result = search(world.store, "blue", options=options)
        outcome = "forgets" if result.forgotten else "does not reach 0"
        words = {}
    except SlsguError as error:
        outcome, words = first_lines(error)[:80], {}
        best = next(score.layer for score in world.ranking.scores if score.front)
        words = {"layer": best, "step": 1.0}
    request = ApplyRequest(names=["blue"], out=folder / "out", **words)
    applied = apply(world.store, request)
    written = open_clip.create_model(f"local-dir:{folder / 'out'}", pretrained_text=False)
    before, after = load(resolve(world.model)).state_dict(), written.state_dict()
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    (change,) = applied.files[0].changes
    loads = moved == [change.layer] and applied.model is not None
    return [outcome, "yes" if loads else f"moved {moved[:3]}, said {applied.model}"]


def sources_in(folder):
    """Write the pairs and images for all structures; return their paths."""
    labelled = tiny_clip.write_labelled(
        folder / "labelled.parquet", {"colour": range(1000, 1040), "shape": range(2000, 2020)}
    )
    templates = folder / "templates.txt"
    templates.write_text("a photo of the {}.\n{}\n")
    return {
        "pairs": tiny_clip.write_pairs(folder / "pairs.parquet", range(160)),
        "first": f"{labelled}?kind=colour",
        "second": f"{labelled}?kind=shape",
        "templates": str(templates),
    }


def main(starts):
    """Print a row for each structure whose name begins with one of `starts`."""
    timm.create_model = shrinking(timm.create_model)
    warnings.simplefilter("ignore")
    logging.disable()
    names = {}
    for name in open_clip.list_models():
        names.setdefault(structure_of(open_clip.get_model_config(name)), []).append(name)
    configs = {tuple(each): open_clip.get_model_config(each[0]) for each in names.values()}
    torch.set_num_threads(1)
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    for alike, config in configs.items():
        if starts and not any(name.startswith(start) for name in alike for start in starts):
            continue
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            try:
                cells = measured(config, sources_in(folder), folder)
            except FAILURES as error:
                cells = [f"{type(error).__name__}: {first_lines(error)}"[:200]]
        row = [", ".join(alike), *map(str, cells)]
        print(f"| {' | '.join(row)} |", flush=True)
        print(f"{alike[0]}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    total = sum(map(len, configs))
    print(f"{len(configs)} structures of {total} configurations", file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
