"""`eval`: figures of the original and of another model, and what both take images for."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slsgu_cli import progress
from slsgu_cli.checkpoints.edits import Edit, earlier_edits, load_edit
from slsgu_cli.clip.devices import pick_device
from slsgu_cli.clip.evaluation import Evaluation, EvaluationSet, SharedEvaluation, prepare_shared
from slsgu_cli.clip.finite import counted_by
from slsgu_cli.clip.in_place import moved
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.memory import spare
from slsgu_cli.clip.metrics import cosine_matrix
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.gradients import check_inputs
from slsgu_cli.engine.search_plan import (
    BasePass,
    evaluation_digest,
    require_alike,
    require_distinct_names,
)
from slsgu_cli.engine.trial import UNMOVED, MovedModel, fitting, model_with
from slsgu_cli.errors import StaleError
from slsgu_cli.figures.pictures import Example, Guesses, Images, before_after_plot, cosine_plot
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.method import EditHeader
from slsgu_cli.records.options import SearchOptions
from slsgu_cli.records.sets import ModelSpec, SetManifest, Split
from slsgu_cli.store.artifacts import Artifact, joint_label, plot_path, read_manifest, set_of
from slsgu_cli.store.store import Store

# As many names as the paper's Figures 3 and 8 have.
NAMES_SHOWN = 10

# Of concepts that leave no room for others, so many others all the same.
LEAST_OTHERS = 4

Matrix = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """The figures of one model.

    `forget` is the accuracy on each concept, by the name of its set; `utility` is without
    the images of any of them. `cosines` is mean image-to-name cosine, (names, names).
    """

    label: str
    forget: dict[str, Accuracy]
    utility: dict[str, Accuracy]
    cosines: Matrix


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The models that were measured on some sets, and where the cosine plot is.

    There is no plot where the store could not be written.
    """

    names: tuple[str, ...]
    models: tuple[EvaluatedModel, ...]
    plot: str | None

    def figures(self) -> dict[str, float]:
        """Return what can be asserted by name: figures of the last model, and what it lost.

        `fa1` is that of the first concept; each has its own by the name of its set. What was
        lost is in points of TA@1.
        """
        original, last = self.models[0], self.models[-1]
        figures: dict[str, float] = {}
        for name, accuracy in [("", last.forget[self.names[0]]), *last.forget.items()]:
            behind = f".{name}" if name else ""
            figures |= {f"fa1{behind}": accuracy.top1, f"fa5{behind}": accuracy.top5}
        for name, accuracy in last.utility.items():
            figures |= {f"ta1.{name}": accuracy.top1, f"ta5.{name}": accuracy.top5}
            figures[f"loss.{name}"] = original.utility[name].top1 - accuracy.top1
        return figures


def evaluate(
    store: Store, names: Sequence[str], *, model: ModelSpec | None = None, device: str = "auto"
) -> EvalResult:
    """Measure the original model, and `model` or else the edits of all sets in place at once.

    A single set without an edit has its original measured alone. Edits that others stand on
    are in place with them, and the concepts of both are measured. Raises MissingError,
    StaleError, UsageError, and InputError for sets that are not measured on the same rows.
    """
    require_distinct_names(names)
    edits: list[Edit] = []
    label = "all edits" if len(names) > 1 else f"edit {names[0]}"
    if model is None and (len(names) > 1 or store.exists(Artifact.EDIT.path(names[0]))):
        later = [load_edit(store, name) for name in names]
        earlier = earlier_edits(store, later)
        edits = [*later, *earlier]
        if earlier:
            label = f"{label} after {', '.join(edit.header.name for edit in earlier)}"
        names = list(dict.fromkeys([*names, *(set_of(e.header.name) for e in edits)]))
    manifests = [read_manifest(store, name) for name in names]
    require_alike({manifest.name: evaluation_digest(manifest) for manifest in manifests})
    device = pick_device(device)
    with torch.no_grad():
        evaluation = _run_model(store, manifests, manifests[0].model, device, original=True)
        shown = choose_shown(evaluation, manifests)
        models = [_figures(evaluation, manifests, "original")]
        if model is not None:
            evaluation = _run_model(store, manifests, model, device)
            models.append(_figures(evaluation, manifests, str(model)))
        elif edits:
            edited = model_with(evaluation, edits)
            with counted_by(label), with_edits(evaluation.model, edits):
                models.append(_figures(evaluation, manifests, label, edited))
    path = plot_path(joint_label(names) if len(names) > 1 else names[0], "cosines")
    plot = cosine_plot(
        models[0].cosines,
        models[1].cosines if len(models) > 1 else None,
        shown.names,
        forgotten=shown.names[: len(names)],
        thumbnails=shown.thumbnails,
    )
    return EvalResult(tuple(names), tuple(models), store.write_picture(path, plot))


def _run_model(
    store: Store,
    manifests: Sequence[SetManifest],
    spec: ModelSpec,
    device: str,
    *,
    original: bool = False,
) -> SharedEvaluation:
    """Load a model and run it over what all sets measure on."""
    model = resolve(spec)
    for manifest in manifests:
        check_inputs(manifest, model)
    base_pass = BasePass(
        store=store,
        manifests=tuple(manifests),
        module=load(model, device, warn=progress.warn),
        model=model,
        weights=fingerprint(model) if original else None,
        split=Split.TEST,
        options=SearchOptions(device=device),
    )
    return base_pass.run()


@contextmanager
def with_edits(model: nn.Module, edits: Sequence[Edit]) -> Iterator[None]:
    """Put edits into a model for the length of a block; those of one layer are summed.

    Raises StaleError where a layer is not the one that an edit was made for.
    """
    fitting(model, edits)
    moves = ((e.header.layer, torch.from_numpy(e.delta()), e.factor) for e in edits)
    with moved(model, moves):
        yield


@dataclass(frozen=True, slots=True)
class ShownClasses:
    """The classes whose images and names are compared: each concept, and others of one set.

    `classes` has the class of each group of images and `names` what it is called, the
    concepts' first. Features are those of the base pass before the choice.
    """

    concepts: tuple[EvaluationSet, ...]
    others: EvaluationSet
    classes: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def other_classes(self) -> tuple[int, ...]:
        """The classes beside the concepts, that of the most images first."""
        return self.classes[len(self.concepts) :]

    @property
    def thumbnails(self) -> Images:
        """One image of each class."""
        one = self.first(1)
        return np.concatenate([_pixels(group) for group in (*one.concepts, one.others)])

    def first(self, images: int) -> "ShownClasses":
        """Keep the first images of each class, a class after another."""
        labels = self.others.images.labels.cpu().numpy()
        rows = [np.flatnonzero(labels == index)[:images] for index in self.other_classes]
        concepts = tuple(_first(concept, images) for concept in self.concepts)
        return replace(self, concepts=concepts, others=self.others.some(np.concatenate(rows)))

    def cosines(self, model: MovedModel = UNMOVED) -> Matrix:
        """Return the mean cosine of each class's images with each name, (names, names)."""
        features, owners, texts = [], [], []
        for place, concept in enumerate(self.concepts):
            features.append(model.features(concept.images))
            owners.append(torch.full((len(concept.images),), place))
            texts.append(model.classes(concept.prompts)[[self.classes[place]]])
        places = {index: at for at, index in enumerate(self.other_classes, len(self.concepts))}
        labels = self.others.images.labels.tolist()
        features.append(model.features(self.others.images))
        owners.append(torch.tensor([places[label] for label in labels], dtype=torch.long))
        texts.append(model.classes(self.others.prompts)[list(self.other_classes)])
        images = torch.cat(features)
        labels_of_rows = torch.cat(owners).to(images.device)
        return cosine_matrix(images, labels_of_rows, torch.cat(texts)).cpu().numpy()


def choose_shown(evaluation: SharedEvaluation, manifests: Sequence[SetManifest]) -> ShownClasses:
    """Choose the concepts, and beside them the classes of one set with the most images.

    The set is the first that measures the forget accuracy of a concept, if there is one.
    """
    concepts = [evaluation.forget[manifest.name] for manifest in manifests]
    utility = evaluation.utility(manifests)
    measuring = [manifest.forget_eval for manifest in manifests if manifest.forget_eval in utility]
    group = utility[next(iter(measuring), None) or next(iter(utility))]
    labels = group.images.labels.cpu().numpy()
    counts = np.bincount(labels, minlength=len(group.names))
    room = max(NAMES_SHOWN - len(concepts), LEAST_OTHERS)
    common = [int(i) for i in np.argsort(-counts, kind="stable")[:room] if counts[i]]
    forgotten = [int(concept.images.labels[0]) for concept in concepts]
    names = [concept.names[i] for concept, i in zip(concepts, forgotten, strict=True)]
    return ShownClasses(
        concepts=tuple(concepts),
        others=group.some(np.flatnonzero(np.isin(labels, common))),
        classes=(*forgotten, *common),
        names=(*names, *(group.names[index] for index in common)),
    )


def _figures(
    evaluation: SharedEvaluation,
    manifests: Sequence[SetManifest],
    label: str,
    model: MovedModel = UNMOVED,
) -> EvaluatedModel:
    """Return the figures of the model of the last base pass, or of one with edits in place."""
    return EvaluatedModel(
        label=label,
        forget=model.accuracies(evaluation.forget),
        utility=model.accuracies(evaluation.utility(manifests)),
        cosines=choose_shown(evaluation, manifests).cosines(model),
    )


GUESSES = 5

# Images of the concept, and as many of other classes, one of each: in the figure, on the page.
EXAMPLES_DRAWN, EXAMPLES_SHOWN = 3, 4

# A class of an evaluation set may have thousands of images; their mean needs few.
IMAGES_A_NAME = 50


def draw_examples(
    store: Store, manifest: SetManifest, *, before: ModelSpec, after: ModelSpec, device: str
) -> bytes:
    """Draw images of the concept and of other classes with each model's most probable names.

    Both models are loaded from where they lie, so what is drawn is what was written.
    """
    guesses: list[list[Guesses]] = []
    for spec in (before, after):
        model = resolve(spec)
        module = load(model, device)
        opened = prepare_shared(store, [manifest], module, tokenize=tokenizer(model), device=device)
        examples = _examples(choose_shown(opened, [manifest]), EXAMPLES_DRAWN)
        with torch.no_grad(), progress.silent(), counted_by(str(spec)):
            _run_on(opened, examples)
            guesses.append(_guesses_of_each(opened, examples, UNMOVED))
    return before_after_plot(_labelled(examples, *guesses), concept=manifest.concept)


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
    """Models, loaded once each, and what they take images for before and after an edit."""

    def __init__(self, store: Store, *, device: str) -> None:
        self.store, self.device = store, device
        self._loaded: dict[ModelSpec, tuple[str, nn.Module]] = {}

    def before_after(self, manifest: SetManifest, header: EditHeader) -> BeforeAfter:
        """Return what the model of an edit guesses before and after it.

        Raises StaleError where the model has other weights than the edit was made for, and
        InputError or MissingError where model or rows cannot be read.
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
        edited = model_with(opened, edits)
        with torch.no_grad(), counted_by(f"{header.model} with edit {header.name}"):
            _run_on(
                opened,
                (*shown.concepts, shown.others),
                *(each.header.layer for each in edits),
                cache_bytes=spare(self.device),
            )
            examples = _examples(shown, EXAMPLES_SHOWN)
            before = shown.cosines(UNMOVED), _guesses_of_each(opened, examples, UNMOVED)
            with with_edits(module, edits):
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


def guesses_of(group: EvaluationSet, scale: float, model: MovedModel = UNMOVED) -> list[Guesses]:
    """Return the most probable names of each image, the most probable first."""
    logits = scale * model.features(group.images) @ model.classes(group.prompts).T
    top = logits.softmax(dim=-1).topk(min(GUESSES, len(group.names)))
    return [
        tuple((group.names[i], float(p)) for i, p in zip(indices, values, strict=True))
        for indices, values in zip(top.indices.tolist(), top.values.tolist(), strict=True)
    ]


def _first(group: EvaluationSet, images: int) -> EvaluationSet:
    return group.some(np.arange(min(images, len(group.images))))


def _pixels(group: EvaluationSet) -> Images:
    return group.images.block.take(group.images.rows)


def _run_on(
    opened: SharedEvaluation, groups: Sequence[EvaluationSet], *layers: str, cache_bytes: int = 0
) -> None:
    """Run the model over a concept's and others' images, keeping what `layers` resume from."""
    concept, others = groups
    few = Evaluation(opened.model, opened.vision, opened.text, concept, {"others": others})
    few.base_pass(layers, cache_bytes=cache_bytes)


def _examples(shown: ShownClasses, count: int) -> list[EvaluationSet]:
    """Return so many images of the concept, and the first of each of so many other classes."""
    (concept,) = shown.concepts
    return [_first(concept, count), _first(shown.first(1).others, count)]


def _guesses_of_each(
    opened: SharedEvaluation, examples: Sequence[EvaluationSet], model: MovedModel
) -> list[Guesses]:
    scale = float(opened.model.get_parameter("logit_scale").exp())
    return [guess for group in examples for guess in guesses_of(group, scale, model)]


def _labelled(
    examples: Sequence[EvaluationSet], before: Sequence[Guesses], after: Sequence[Guesses]
) -> list[Example]:
    """Return the images, uint8 (H, W, 3), with their true names and what each model says."""
    images, names = [], []
    for group in examples:
        images += list(_pixels(group))
        names += [group.names[label] for label in group.images.labels.tolist()]
    return [Example(*each) for each in zip(images, names, before, after, strict=True)]
