"""What a model makes of a few images, before and after an edit: names and cosines.

The only part of a report that runs the model. The original model runs once over the
images shown and the prompts; the edit then runs on from its own layer, in its own tower.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from shlex import quote
from typing import Any

import numpy as np
import torch

from slsgu_cli import progress
from slsgu_cli.edits import Edit, load_edit
from slsgu_cli.errors import StaleError
from slsgu_cli.evaluation import Evaluation, EvaluationSet, prepare
from slsgu_cli.examples import guesses_of, labelled_images
from slsgu_cli.gradients import check_inputs
from slsgu_cli.measure import Matrix, Shown, choose, cosines, with_edits
from slsgu_cli.memory import spare
from slsgu_cli.models import fingerprint, load, resolve, tokenizer
from slsgu_cli.pictures import Example, Guesses, Images
from slsgu_cli.records import EditHeader, SetManifest, Tower
from slsgu_cli.store import Store

FORGOTTEN_SHOWN = 4
OTHERS_SHOWN = 4
# A class of an evaluation set may have thousands of images; their mean needs few.
IMAGES_A_NAME = 50


@dataclass(frozen=True, slots=True)
class Looks:
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


class Viewer:
    """Looks at images with models that are loaded once each."""

    def __init__(self, store: Store, *, device: str) -> None:
        self.store, self.device = store, device
        self._loaded: dict[str, tuple[str, Any]] = {}

    def look(self, manifest: SetManifest, header: EditHeader) -> Looks:
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
            shown = choose(whole, manifest)
            few = _few(whole, shown)
            few.base_pass((header.layer,), cache_bytes=spare(self.device))
            return _looks(few, shown, load_edit(self.store, header.name))


def _few(whole: Evaluation, shown: Shown) -> Evaluation:
    """Keep some images of the concept and of each of the other classes shown."""
    group = whole.utility[shown.evaluation]
    labels = group.images.labels.cpu().numpy()
    rows = [np.flatnonzero(labels == index)[:IMAGES_A_NAME] for index in shown.classes[1:]]
    forget = whole.forget.some(np.arange(min(IMAGES_A_NAME, len(whole.forget.images))))
    others = group.some(np.concatenate(rows))
    return Evaluation(whole.model, whole.vision, whole.text, forget, {shown.evaluation: others})


def _looks(few: Evaluation, shown: Shown, edit: Edit) -> Looks:
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
    return Looks(examples, shown.names, tuple(counts), shown.thumbnails, before, after)


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
