"""A picture of what a model takes images for, before and after it forgot a concept."""

from typing import Any

import numpy as np
import torch

from slsgu_cli import progress
from slsgu_cli.evaluation import Evaluation, EvaluationSet, prepare
from slsgu_cli.models import load, resolve, tokenizer
from slsgu_cli.pictures import Example, Guesses, before_after_plot
from slsgu_cli.records import ModelSpec, SetManifest
from slsgu_cli.store import Store

FORGOTTEN_SHOWN = 3
OTHERS_SHOWN = 3
GUESSES = 5


def draw_examples(
    store: Store, manifest: SetManifest, *, before: ModelSpec, after: ModelSpec, device: str
) -> bytes:
    """Draw images of the concept and of other classes with each model's most probable names.

    Both models are loaded from where they lie, so what is drawn is what was written.
    """
    examples: list[tuple[np.ndarray, str]] = []
    guesses: list[list[Guesses]] = []
    for spec in (before, after):
        model = resolve(spec)
        module: Any = load(model, device)
        whole = prepare(store, manifest, module, tokenize=tokenizer(model), device=device)
        small = _few(whole, manifest)
        with torch.no_grad():
            with progress.silent():
                small.base_pass((), cache_bytes=0)
            scale = float(module.logit_scale.exp())
            groups = [small.forget, *small.utility.values()]
            guesses.append([guess for group in groups for guess in guesses_of(group, scale)])
        examples = [pair for group in groups for pair in labelled_images(group)]
    rows = [
        Example(image, label, first, second)
        for (image, label), first, second in zip(examples, *guesses, strict=True)
    ]
    return before_after_plot(rows, concept=manifest.concept)


def _few(whole: Evaluation, manifest: SetManifest) -> Evaluation:
    """Keep some forget images and one image each of the commonest other classes."""
    name = manifest.forget_eval or ""
    if name not in whole.utility:
        name = next(iter(whole.utility))
    group = whole.utility[name]
    labels = group.images.labels.cpu().numpy()
    common = np.argsort(-np.bincount(labels), kind="stable")[:OTHERS_SHOWN]
    rows = np.array([np.flatnonzero(labels == index)[0] for index in common])
    forget = whole.forget.some(np.arange(min(FORGOTTEN_SHOWN, len(whole.forget.images))))
    return Evaluation(whole.model, whole.vision, whole.text, forget, {name: group.some(rows)})


def guesses_of(group: EvaluationSet, scale: float) -> list[Guesses]:
    """Return the most probable names of each image, the most probable first."""
    logits = scale * group.images.features @ group.prompts.embeddings.T
    top = logits.softmax(dim=-1).topk(min(GUESSES, len(group.names)))
    return [
        tuple((group.names[i], float(p)) for i, p in zip(indices, values, strict=True))
        for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def labelled_images(group: EvaluationSet) -> list[tuple[np.ndarray, str]]:
    """Return each image, uint8 (H, W, 3), with the name of its class."""
    images = group.images.block.take(group.images.rows)
    return [
        (image, group.names[label])
        for image, label in zip(images, group.images.labels.tolist(), strict=True)
    ]
