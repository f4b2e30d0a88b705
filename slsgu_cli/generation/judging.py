"""A zero-shot CLIP that says what images show. It is never the edited one."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slsgu_cli.activations import CacheBudget
from slsgu_cli.batches import pixel_normalizer, spans, to_tokens
from slsgu_cli.models import input_spec, load, pick_device, resolve, tokenizer
from slsgu_cli.preprocess import decoder
from slsgu_cli.prompts import find_class
from slsgu_cli.records import ModelSpec, SetManifest
from slsgu_cli.sets import DataBlock
from slsgu_cli.store import Store
from slsgu_cli.towers import text_tower, vision_tower
from slsgu_cli.zeroshot import PromptSide

BATCH = 64
# Class names, and the prompt templates that stand for each.
Classes = Mapping[str, Sequence[str]]


@dataclass(frozen=True, slots=True)
class Judge:
    """A CLIP and the names it tells images apart by; `embeddings` are (names, width).

    `see` turns encoded images into unit features (images, width).
    """

    spec: ModelSpec
    names: tuple[str, ...]
    embeddings: Tensor
    see: Callable[[Sequence[bytes]], Tensor]

    @classmethod
    def load(cls, spec: ModelSpec, classes: Classes, *, device: str = "auto") -> "Judge":
        """Load a CLIP to tell `classes` apart. Raises what `models.resolve` raises."""
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
            pixels = normalize(np.stack([decode(image).pixels for image in images]))
            return vision.features(pixels, pixels)

        with torch.no_grad():
            side.base_pass((), CacheBudget(0))
        return cls(spec, names, side.embeddings, see)

    def features(self, images: Sequence[bytes]) -> Tensor:
        """Return unit features of encoded images, (images, width)."""
        with torch.no_grad():
            parts = [self.see(images[start:stop]) for start, stop in spans(len(images), BATCH)]
        return torch.cat(parts)

    def verdicts(self, images: Sequence[bytes]) -> list[str]:
        """Return for each encoded image the name of highest cosine."""
        if not images:
            return []
        places = (self.features(images) @ self.embeddings.T).argmax(dim=-1).tolist()
        return [self.names[place] for place in places]


def measured_classes(store: Store, manifest: SetManifest) -> Classes:
    """Return the classes of a set's evaluation sets, each with its templates, and the concept.

    A name that several sets have keeps the templates of the first.
    """
    found: dict[str, tuple[str, ...]] = {}
    for _, ref in sorted(manifest.evals.items()):
        block = DataBlock.open(store, ref)
        for name in block.class_names:
            found.setdefault(name, block.templates)
    if find_class(tuple(found), manifest.concept) is None:
        found[manifest.concept] = next(iter(found.values()), ("{}",))
    return found


def class_in(text: str, names: Sequence[str]) -> str | None:
    """Return the longest class name that stands in a text as whole words; None if none does."""
    plain = f" {_words(text)} "
    fitting = [name for name in names if (words := _words(name)) and f" {words} " in plain]
    return max(fitting, key=len, default=None)


def _words(name: str) -> str:
    return " ".join(re.findall(r"[^\W_]+", name.casefold()))


def png_bytes(image: Image.Image) -> bytes:
    """Return an image as PNG, the same bytes for the same pixels."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()
