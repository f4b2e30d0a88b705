"""Example images, and a model's guesses before and after an edit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import earlier_edits, load_edit
from slsgu_cli.clip.evaluation import Evaluation, EvaluationSet, SharedEvaluation, prepare_shared
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.edited_model import UNEDITED, EditedModel, edited_model, edited_values
from slsgu_cli.engine.gradients import check_inputs
from slsgu_cli.engine.shown_classes import (
    Matrix,
    ShownClasses,
    choose_shown,
    first_images,
    pixels_of,
)
from slsgu_cli.errors import StaleError
from slsgu_cli.figures.pictures import Example, Guesses, Images, before_after_plot
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.store import Store

GUESSES = 5


# Images of the concept, and as many of other classes, in the figure and on the report page.
EXAMPLES_DRAWN, EXAMPLES_SHOWN = 3, 4


# A mean over a class needs few of its images.
IMAGES_A_NAME = 50


def draw_examples(
    store: Store, manifest: SetManifest, *, before: ModelSpec, after: ModelSpec, device: str
) -> bytes:
    """Draw images of the concept and of other classes with each model's most probable names.

    Both models are loaded from their files, so the figure shows the written model.
    """
    guesses: list[list[Guesses]] = []
    for spec in (before, after):
        model = resolve(spec)
        module = load(model, device)
        opened = prepare_shared(store, [manifest], module, tokenize=tokenizer(model), device=device)
        examples = _examples(choose_shown(opened, [manifest]), EXAMPLES_DRAWN)
        with torch.no_grad(), progress.silent(), counted_by(str(spec)):
            _run_on(opened, examples)
            guesses.append(_guesses_of_each(opened, examples, UNEDITED))
    return before_after_plot(_labelled(examples, *guesses), concept=manifest.concept)


@dataclass(frozen=True, slots=True)
class BeforeAfter:
    """Example images with guesses, and cosines of images with names.

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
    """Models, each loaded once, and their guesses before and after an edit."""

    def __init__(self, store: Store, *, device: str) -> None:
        self.store, self.device = store, device
        self._loaded: dict[ModelSpec, tuple[str, nn.Module]] = {}

    def before_after(self, manifest: SetManifest, header: EditHeader) -> BeforeAfter:
        """Return the guesses of an edit's model before and after the edit.

        Raises StaleError if the edit was made for other weights, and InputError or MissingError
        if the model or the images cannot be read.
        """
        model = resolve(header.model)
        check_inputs(manifest, model)
        if header.model not in self._loaded:
            module = load(model, self.device, warn=progress.warn)
            self._loaded[header.model] = fingerprint(model), module
        weights, module = self._loaded[header.model]
        if weights != header.model_fingerprint:
            raise StaleError(
                f"{header.model} has other weights than the edit {header.name} was made for",
                hint=f"run `{Artifact.POINTER.command(manifest.name)}`",
            )
        opened = prepare_shared(
            self.store, [manifest], module, tokenize=tokenizer(model), device=self.device
        )
        shown = choose_shown(opened, [manifest]).first(IMAGES_A_NAME)
        edit = load_edit(self.store, header.name)
        edits = [edit, *earlier_edits(self.store, [edit])]
        with torch.no_grad(), counted_by(f"{header.model} with edit {header.name}"):
            _run_on(opened, (*shown.concepts, shown.others))
            examples = _examples(shown, EXAMPLES_SHOWN)
            before = shown.cosines(UNEDITED), _guesses_of_each(opened, examples, UNEDITED)
            with edited_model(opened, edited_values(module, edits)) as edited:
                after = shown.cosines(edited), _guesses_of_each(opened, examples, edited)
        labels = shown.others.images.labels
        return BeforeAfter(
            examples=tuple(_labelled(examples, before[1], after[1])),
            names=shown.names,
            images=(
                *(len(concept.images) for concept in shown.concepts),
                *(int((labels == index).sum()) for index in shown.other_classes),
            ),
            thumbnails=shown.thumbnails,
            before=before[0],
            after=after[0],
        )


def guesses_of(group: EvaluationSet, scale: float, model: EditedModel = UNEDITED) -> list[Guesses]:
    """Return the most probable names of each image, the most probable first."""
    logits = scale * model.features(group.images) @ model.classes(group.prompts).T
    top = logits.softmax(dim=-1).topk(min(GUESSES, len(group.names)))
    return [
        tuple((group.names[i], float(p)) for i, p in zip(indices, values, strict=True))
        for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _run_on(opened: SharedEvaluation, groups: Sequence[EvaluationSet]) -> None:
    """Run the base pass over images of a concept and of other classes."""
    concept, others = groups
    few = Evaluation(opened.model, opened.vision, opened.text, concept, {"others": others})
    few.base_pass((), cache_bytes=0)


def _examples(shown: ShownClasses, count: int) -> list[EvaluationSet]:
    """Return `count` images of the concept, and one image of each of `count` other classes."""
    (concept,) = shown.concepts
    return [first_images(concept, count), first_images(shown.first(1).others, count)]


def _guesses_of_each(
    opened: SharedEvaluation, examples: Sequence[EvaluationSet], model: EditedModel
) -> list[Guesses]:
    scale = float(opened.model.get_parameter("logit_scale").exp())
    return [guess for group in examples for guess in guesses_of(group, scale, model)]


def _labelled(
    examples: Sequence[EvaluationSet], before: Sequence[Guesses], after: Sequence[Guesses]
) -> list[Example]:
    """Return the images, uint8 (H, W, 3), with their true names and each model's guesses."""
    images, names = [], []
    for group in examples:
        images += list(pixels_of(group))
        names += [group.names[label] for label in group.images.labels.tolist()]
    return [Example(*each) for each in zip(images, names, before, after, strict=True)]
