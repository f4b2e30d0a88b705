"""What models take a few images for, before and after."""

from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

import numpy as np
import torch

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, load_edit
from slsgu_cli.clip.evaluation import Evaluation, EvaluationSet, prepare
from slsgu_cli.clip.inputs import spare
from slsgu_cli.clip.models import fingerprint, load, resolve, tokenizer
from slsgu_cli.errors import StaleError
from slsgu_cli.figures.pictures import Example, Guesses, Images, before_after_plot
from slsgu_cli.method.evaluate import Matrix, ShownClasses, choose_shown, cosines, with_edits
from slsgu_cli.method.gradients import check_inputs
from slsgu_cli.records.method import EditHeader, Tower
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.store.store import Store

FORGOTTEN_DRAWN = 3
OTHERS_DRAWN = 3
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
        small = _few_rows(whole, manifest)
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


def _few_rows(whole: Evaluation, manifest: SetManifest) -> Evaluation:
    """Keep some forget images and one image each of the commonest other classes."""
    name = manifest.forget_eval or ""
    if name not in whole.utility:
        name = next(iter(whole.utility))
    group = whole.utility[name]
    labels = group.images.labels.cpu().numpy()
    common = np.argsort(-np.bincount(labels), kind="stable")[:OTHERS_DRAWN]
    rows = np.array([np.flatnonzero(labels == index)[0] for index in common])
    forget = whole.forget.some(np.arange(min(FORGOTTEN_DRAWN, len(whole.forget.images))))
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


FORGOTTEN_SHOWN = 4
OTHERS_SHOWN = 4

# A class of an evaluation set may have thousands of images; their mean needs few.
IMAGES_A_NAME = 50


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """Example images with the names they got, and cosines of images with names.

    `before` and `after` are (names, names): rows images, columns names, the concept first.
    `images` counts the images behind each row; `thumbnails` has one of each.
    """

    examples: tuple[Example, ...]
    names: tuple[str, ...]
    images: tuple[int, ...]
    thumbnails: Images
    before: Matrix
    after: Matrix


class GuessingModels:
    """Looks at images with models that are loaded once each."""

    def __init__(self, store: Store, *, device: str) -> None:
        self.store, self.device = store, device
        self._loaded: dict[str, tuple[str, Any]] = {}

    def look(self, manifest: SetManifest, header: EditHeader) -> BeforeAfter:
        """Return what the model of an edit sees before and after it.

        Raises StaleError where the model has other weights than the edit was made for, and
        InputError or MissingError where model or rows cannot be read.
        """
        model = resolve(header.model)
        check_inputs(manifest, model)
        key = str(header.model)
        if key not in self._loaded:
            module = load(model, self.device, warn=progress.warn)
            self._loaded[key] = fingerprint(model), module
        known, module = self._loaded[key]
        if known != header.model_fingerprint:
            raise StaleError(
                f"{header.model} has other weights than the edit {header.name} was made for",
                hint=f"run `slsgu grad {quote(manifest.name)}`",
            )
        with torch.no_grad():
            whole = prepare(
                self.store, manifest, module, tokenize=tokenizer(model), device=self.device
            )
            shown = choose_shown(whole, manifest)
            few = _few(whole, shown)
            few.base_pass((header.layer,), cache_bytes=spare(self.device))
            return _looks(few, shown, load_edit(self.store, header.name))


def _few(whole: Evaluation, shown: ShownClasses) -> Evaluation:
    """Keep some images of the concept and of each of the other classes shown."""
    group = whole.utility[shown.evaluation]
    labels = group.images.labels.cpu().numpy()
    rows = [np.flatnonzero(labels == index)[:IMAGES_A_NAME] for index in shown.classes[1:]]
    forget = whole.forget.some(np.arange(min(IMAGES_A_NAME, len(whole.forget.images))))
    others = group.some(np.concatenate(rows))
    return Evaluation(whole.model, whole.vision, whole.text, forget, {shown.evaluation: others})


def _looks(few: Evaluation, shown: ShownClasses, edit: Edit) -> BeforeAfter:
    groups = (few.forget, few.utility[shown.evaluation])
    picked = [np.arange(min(FORGOTTEN_SHOWN, len(few.forget.images))), _one_of_each(groups[1])]
    before, named_before = cosines(few, shown), _named(few, groups, picked)
    with with_edits(few.model, [edit]):
        _run_on(few, groups, edit.header)
    after, named_after = cosines(few, shown), _named(few, groups, picked)
    images = [
        pair
        for group, rows in zip(groups, picked, strict=True)
        for pair in labelled_images(group.some(rows))
    ]
    labels = groups[1].images.labels
    counts = [len(few.forget.images), *(int((labels == i).sum()) for i in shown.classes[1:])]
    examples = tuple(
        Example(image, label, first, second)
        for (image, label), first, second in zip(images, named_before, named_after, strict=True)
    )
    return BeforeAfter(examples, shown.names, tuple(counts), shown.thumbnails, before, after)


def _one_of_each(group: EvaluationSet) -> np.ndarray:
    """Return the first image of each of the first classes."""
    labels = group.images.labels.cpu().numpy()
    _, first = np.unique(labels, return_index=True)
    return np.sort(first)[:OTHERS_SHOWN]


def _run_on(few: Evaluation, groups: Sequence[EvaluationSet], header: EditHeader) -> None:
    """Replace the features or class embeddings by those of the weights as they are now."""
    stage = few.tower(header.tower).stage_of(header.layer)
    if header.tower is Tower.VISION:
        for group in groups:
            group.images.features = group.images.after_edit(stage)
        return
    for prompts in {id(group.prompts): group.prompts for group in groups}.values():
        prompts.embeddings = prompts.after_edit(stage)


def _named(
    few: Evaluation, groups: Sequence[EvaluationSet], picked: Sequence[np.ndarray]
) -> list[Guesses]:
    scale = float(few.model.get_parameter("logit_scale").exp())
    named: list[Guesses] = []
    for group, rows in zip(groups, picked, strict=True):
        some = group.some(rows)
        some.images.features = group.images.features[torch.from_numpy(rows)]
        named += guesses_of(some, scale)
    return named
