"""The judge: a CLIP that classifies generated images."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.clip.activations import CacheBudget
from slsgu_cli.clip.batches import pixel_normalizer, spans, to_tokens
from slsgu_cli.clip.decoding import decoder
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.finite import counted_by, naming_layers, require_finite
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import input_spec, tokenizer
from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.clip.zeroshot import PromptSide
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.sources.prompts import find_class
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store


def called(concept: str, classes: Sequence[str]) -> str:
    """Return the class name for a concept; the concept itself if no class has its name."""
    place = find_class(classes, concept)
    return concept if place is None else classes[place]


BATCH = 64

# Class names, and the prompt templates that stand for each.
Classes = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Judge:
    """A CLIP and its class names; `embeddings` are (names, width).

    `see` maps encoded images to unit features (images, width).
    """

    spec: ModelSpec
    names: tuple[str, ...]
    embeddings: Tensor
    see: Callable[[Sequence[bytes]], Tensor]

    @classmethod
    def load(cls, spec: ModelSpec, classes: Classes, *, device: str = "auto") -> "Judge":
        """Load a CLIP to classify images into `classes`. Raises what `models.resolve` raises."""
        device = pick_device(device)
        resolved = resolve(spec)
        module, inputs = load(resolved, device), input_spec(resolved)
        names = tuple(classes)
        prompts = [text.replace("{}", name) for name in names for text in classes[name]]
        owners = np.repeat(np.arange(len(names)), [len(classes[name]) for name in names])
        tokens = to_tokens(tokenizer(resolved)(prompts), device)
        side = PromptSide(text_tower(module), tokens, to_tokens(owners, device), len(names))
        decode, normalize = decoder(inputs), pixel_normalizer(inputs, device)
        vision = vision_tower(module)

        def see(images: Sequence[bytes]) -> Tensor:
            pixels = normalize(np.stack([np.asarray(decode(image).pixels) for image in images]))
            return vision.features(pixels, pixels)

        with torch.no_grad(), counted_by(f"the judge {spec}"), naming_layers(module):
            side.base_pass((), CacheBudget(0))
        return cls(spec, names, side.embeddings, see)

    def features(self, images: Sequence[bytes]) -> Tensor:
        """Return unit features of encoded images, (images, width)."""
        with torch.no_grad():
            parts = [self.see(images[start:stop]) for start, stop in spans(len(images), BATCH)]
        with counted_by(f"the judge {self.spec}"):
            return require_finite(torch.cat(parts), "image features")

    def verdicts(self, images: Sequence[bytes]) -> list[str]:
        """Return for each encoded image the name with the highest cosine."""
        if not images:
            return []
        places = (self.features(images) @ self.embeddings.T).argmax(dim=-1).tolist()
        return [self.names[place] for place in places]


def measured_classes(store: Store, manifest: SetManifest) -> Classes:
    """Return the classes of a set's evaluation sets, and the concept, each with its templates.

    A name in several sets keeps the templates of the first.
    """
    templates: dict[str, tuple[str, ...]] = {}
    for _, ref in sorted(manifest.evals.items()):
        block = DataBlock.open(store, ref)
        for name in block.class_names:
            templates.setdefault(name, block.templates)
    for name in manifest.names:
        if find_class(tuple(templates), name) is None:
            templates[name] = next(iter(templates.values()), ("{}",))
    return templates


def class_in(text: str, names: Sequence[str]) -> str | None:
    """Return the longest class name that a text contains as whole words, or None."""
    plain = f" {words_of(text)} "
    fitting = [name for name in names if (words := words_of(name)) and f" {words} " in plain]
    return max(fitting, key=len, default=None)


def words_of(name: str) -> str:
    """Return the words of a name in lower case, without punctuation."""
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


# The judge of this name is the CLIP that the edit was made for.
MODEL_OF_SET = "set"


def judge_specs(store: Store, name: str, judges: Sequence[ModelSpec]) -> tuple[ModelSpec, ...]:
    """Return the judges, with the model of the set in place of `set`."""
    if not any(judge.name == MODEL_OF_SET for judge in judges):
        return tuple(judges)
    known = store.exists(Artifact.SET.path(name))
    model = read_manifest(store, name).model if known else load_edit(store, name).header.model
    return tuple(dict.fromkeys(model if judge.name == MODEL_OF_SET else judge for judge in judges))
