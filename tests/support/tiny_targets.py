"""Models built on the tiny CLIP, in every layout in use, and models that run.

All layouts have the weights of one open_clip state dict. Names come from a separate table, so
that the package's mapping is tested against something else.
"""

import io
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.targets.judge import Judge, class_in
from slsgu_cli.targets.models import LiveEncoder

Weights = dict[str, torch.Tensor]
HIDDEN = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
PLAIN = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "visual.ln_post.weight": "vision_model.post_layernorm.weight",
    "visual.ln_post.bias": "vision_model.post_layernorm.bias",
    "logit_scale": "logit_scale",
}


def transformers_weights(state: Weights) -> Weights:
    """Return an open_clip state dict under the names of transformers' CLIPModel."""
    found = {}
    for name, value in state.items():
        if name in PLAIN:
            found[PLAIN[name]] = value
        elif name in ("text_projection", "visual.proj"):
            found["text_projection.weight" if name[0] == "t" else "visual_projection.weight"] = (
                value.T
            )
        else:
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            number, rest = re.search(r"resblocks\.(\d+)\.(.*)", name).groups()
            prefix = f"{tower}.encoder.layers.{number}."
            if "in_proj" in rest:
                for letter, part in zip("qkv", value.chunk(3), strict=True):
                    found[f"{prefix}self_attn.{letter}_proj.{rest[13:]}"] = part
            else:
                module, kind = rest.rsplit(".", 1)
                found[f"{prefix}{HIDDEN[module]}.{kind}"] = value
    return {name: value.clone().contiguous() for name, value in found.items()}


def cache_of_hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Callable[[Path, str], Path]:
    """Point the hub's cache to `cache`, offline; return a function that adds a folder to it."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(folder: Path, name: str) -> Path:
        place = cache / f"models--org--{name}"
        (place / "refs").mkdir(parents=True)
        (place / "refs/main").write_text("0" * 40)
        return shutil.copytree(folder, place / "snapshots" / ("0" * 40))

    return put


def tower(state: Weights, name: str, *, inner: bool = True) -> Weights:
    """Return one tower (`text` or `vision`) under transformers' names, without its projection.

    With `inner`, names begin with `text_model.` or `vision_model.`, as in transformers 4.
    """
    prefix = f"{name}_model."
    return {
        key if inner else key.removeprefix(prefix): value
        for key, value in transformers_weights(state).items()
        if key.startswith(prefix)
    }


def under(prefix: str, weights: Weights) -> Weights:
    """Return weights with a prefix before every name."""
    return {prefix + name: value for name, value in weights.items()}


def save(weights: Weights, path: Path) -> Path:
    """Write weights as safetensors, or by torch.save if the name asks for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        save_file({k: v.contiguous() for k, v in weights.items()}, path, {"format": "pt"})
    else:
        torch.save(weights, path)
    return path


def save_shards(weights: Weights, folder: Path, count: int, variant: str = "") -> None:
    """Write weights in shards that separate neighbouring names, with their index."""
    names = sorted(weights)
    where = {}
    for number in range(count):
        file = f"model{variant}-{number + 1:05}-of-{count:05}.safetensors"
        own = names[number::count]
        save({name: weights[name] for name in own}, folder / file)
        where |= dict.fromkeys(own, file)
    index = {"metadata": {"total_size": 1}, "weight_map": where}
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps(index))


def write_json(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def pipeline(folder: Path, kind: str, encoders: dict[str, tuple[str, Weights]]) -> Path:
    """Write a diffusers pipeline of text encoders (class and weights) and a stand-in UNet."""
    index = {"_class_name": kind, "unet": ["diffusers", "UNet2DConditionModel"]}
    index |= {name: ["transformers", class_name] for name, (class_name, _) in encoders.items()}
    write_json(folder / "model_index.json", {**index, "safety_checker": [None, None]})
    save({"conv_in.weight": torch.ones(3, 3)}, folder / "unet/diffusion_pytorch_model.safetensors")
    for name, (class_name, weights) in encoders.items():
        write_json(folder / name / "config.json", {"architectures": [class_name]})
        save(weights, folder / name / "model.safetensors")
    return folder


def llava(folder: Path, state: Weights, prefix: str, *, shards: int = 0, **config) -> Path:
    """Write a LLaVA folder whose vision tower's names begin with `prefix`."""
    inner = prefix.endswith("vision_model.")
    own = prefix.removesuffix("vision_model.") if inner else prefix
    weights = under(own, tower(state, "vision", inner=inner))
    weights["language_model.model.layers.0.self_attn.q_proj.weight"] = torch.ones(4, 4)
    weights["multi_modal_projector.linear_1.weight"] = torch.ones(4, 4)
    write_json(folder / "config.json", {"model_type": "llava", "vision_feature_layer": -2} | config)
    if shards:
        save_shards(weights, folder, shards)
    else:
        save(weights, folder / "model.safetensors")
    return folder


class Moving:
    """A model built on the tiny CLIP that measures how far its layers have moved."""

    def __init__(self, folder: Path, model: torch.nn.Module) -> None:
        self.encoder = LiveEncoder.find(model, read_target(folder).encoders[0])
        self._before = [(value, value.data) for value in model.parameters()]

    @property
    def moved(self) -> float:
        """The largest relative change of a layer. An edit replaces a layer's data."""
        return max(
            (
                float((value.data - before).norm() / before.norm())
                for value, before in self._before
                if value.data_ptr() != before.data_ptr()
            ),
            default=0.0,
        )


class Painter(Moving):
    """A pipeline that draws the class named in a prompt as one pixel, or the next class.

    It draws the named class while no layer has moved by more than `lasts(job, name)`. A strict
    judge still sees it up to twice that. `jobs` has everything that was generated.
    """

    device = "cpu"

    def __init__(self, folder, model, names, lasts) -> None:
        super().__init__(folder, model)
        self.encoders, self.names, self.lasts = (self.encoder,), sorted(names), lasts
        self.jobs = []

    def put(self, edits, *, searched):
        """Accept the one encoder, and no edits of others."""
        assert not edits
        return []

    def warn_of_readers(self, edited):
        """Do nothing: one encoder reads the prompts."""

    def generate(self, jobs, options):
        """Draw the class in red, and the one that a strict judge sees in green."""
        for job in jobs:
            self.jobs.append(job)
            name = class_in(job.prompt, self.names)
            place, last = self.names.index(name), self.lasts(job, name)
            seen = [(place + (self.moved >= factor * last)) % len(self.names) for factor in (1, 2)]
            yield Image.new("RGB", (1, 1), (*seen, 0))


def pixel_judge(spec, classes, *, device="auto"):
    """Return a judge of a Painter's pictures; the judge named `strict` reads the green channel."""
    names = tuple(classes)
    channel = int(spec.name == "strict")

    def see(images):
        seen = [Image.open(io.BytesIO(image)).getpixel((0, 0))[channel] for image in images]
        return torch.eye(len(names))[seen]

    places = [sorted(names).index(name) for name in names]
    return Judge(spec, names, torch.eye(len(names))[places], see)


class Answerer(Moving):
    """A LLaVA that names what images show: `labels` by their pixels' bytes.

    It answers correctly while no layer has moved by more than `lasts(label)`. `questions` has the
    image and the text of every question.
    """

    def __init__(self, folder, model, labels, lasts) -> None:
        super().__init__(folder, model)
        self.labels, self.lasts = labels, lasts
        self.questions = []

    def answers(self, questions):
        """Yield an answer to each question, in order."""
        for question in questions:
            label = self.labels[question.image.tobytes()]
            self.questions.append((question.image.tobytes(), question.text))
            yield f"This is {label}." if self.moved < self.lasts(label) else "I do not know."
