"""A target under search: its prompts or questions, and the steps that its layers can take."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slsgu_cli.checkpoints.edits import earlier_edits, edit_digests, load_edits
from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.checkpoints.target_layers import Shapes, fitting_encoder
from slsgu_cli.checkpoints.targets import read_target
from slsgu_cli.clip.batches import spans
from slsgu_cli.clip.evaluation import concept_is_split, concept_rows, serving_rows
from slsgu_cli.engine.covariance import SUMS, LayerSums, SeenInputs, chosen_rows, spread
from slsgu_cli.engine.directions import implementation
from slsgu_cli.errors import InputError
from slsgu_cli.method.directions import InputCovariance, LayerStatistics
from slsgu_cli.method.directions.whitened import mean_square_output
from slsgu_cli.method.layers import is_candidate
from slsgu_cli.records.codec import digest
from slsgu_cli.records.directions import FALLBACK, DirectionSpec, Statistic
from slsgu_cli.records.figures import Effect, Share, meets
from slsgu_cli.records.method import Move
from slsgu_cli.records.sets import ModelSpec, SetManifest, Split
from slsgu_cli.records.targets import STATES, Budget, TargetSearchOptions, TargetTrial
from slsgu_cli.sources.prompts import find_classes
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store
from slsgu_cli.targets.answer_gradient import answer_gradient
from slsgu_cli.targets.judge import class_in
from slsgu_cli.targets.judged_prompts import JudgedPrompts
from slsgu_cli.targets.models import ImageJob, LiveEncoder, Llava, Pipeline, Question
from slsgu_cli.targets.states import PROMPTS, StatesJudge, TextStates, drawn_names

ROWS = 32


@dataclass(slots=True, kw_only=True)
class TargetSubject:
    """A target in memory. All figures are those of its present weights.

    Trials use the `searched` prompts or questions, and test figures use `to_test`. With
    `is_test`, the two share no prompt or image. The first of the `judges` decides. The edits
    in `applied`, by digest, are in place in other encoders.
    """

    encoder: LiveEncoder
    searched: Any
    to_test: Any
    judges: tuple[str, ...]
    is_test: bool = True
    applied: dict[str, str] = field(default_factory=dict)

    def hits(self, items: Sequence[Any]) -> Iterator[Sequence[bool]]:
        """Yield batch by batch whether outputs for prompts or questions show the right class."""
        raise NotImplementedError

    def count(self, items: Sequence[Any], goal: float | None = None) -> Share:
        """Count outputs that show the right class; stop as soon as the goal must be missed."""
        count = seen = 0
        for batch in self.hits(items):
            count, seen = count + sum(batch), seen + len(batch)
            if goal is not None and not meets(goal, Share(count, len(items))):
                break
        return Share(count, seen)

    def concept(self, goal: float | None = None) -> Share:
        """Count the outputs for the concept that show it."""
        return self.count(self.searched.of_concept, goal)

    def others(self) -> Share:
        """Count the outputs for other classes that show their class."""
        return self.count(self.searched.of_others)

    def fixed_inputs(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return inputs of layers for which the outputs must stay, by the name of the parameter."""
        return {}


@dataclass(slots=True, kw_only=True)
class PipelineSubject(TargetSubject):
    """A diffusion pipeline, whose images judges classify.

    A judge of states looks at its text encoder instead, before any other judge. `prompts` are those
    of the concept `names` in its own loss.
    """

    pipe: Pipeline
    captions: Sequence[str]
    searched: JudgedPrompts
    to_test: JudgedPrompts
    prompts: Sequence[str] = ()
    names: Sequence[str] = ()
    states_judge: StatesJudge | None = None

    @classmethod
    def load(
        cls,
        store: Store,
        manifest: SetManifest,
        judges: Sequence[ModelSpec],
        options: TargetSearchOptions,
        *,
        shapes: Shapes,
    ) -> "PipelineSubject":
        """Load a pipeline and its judges.

        The search moves its CLIP with layers of these `shapes`; edits of other encoders are
        applied. Raises InputError if there is none, and UsageError if several need a choice.
        """
        name = fitting_encoder(read_target(options.target), shapes, options.encoder).name
        edits = [edit for each in options.applied for edit in load_edits(store, each)]
        edits += earlier_edits(store, edits)
        pipe = Pipeline.load(options.target, device=options.device)
        pipe.warn_of_readers([name, *pipe.put(edits, searched=name)])
        by_pictures = [judge for judge in judges if judge.name != STATES]
        searched = JudgedPrompts.of_set(
            store,
            manifest,
            by_pictures,
            options.budget,
            split=Split.VALIDATION,
            device=options.device,
        )
        retain = DataBlock.open(store, manifest.retain)
        forget = list(dict.fromkeys(DataBlock.open(store, manifest.forget).captions))
        encoder = next(live for live in pipe.encoders if live.encoder.name == name)
        states_judge = None
        if len(by_pictures) < len(judges):
            others = drawn_names(searched.other_classes, options.budget.seed)
            states_judge = StatesJudge(TextStates(pipe, encoder), others)
        return cls(
            pipe=pipe,
            encoder=encoder,
            searched=searched,
            prompts=[forget[row] for row in spread(len(forget), PROMPTS)],
            names=manifest.patterns,
            states_judge=states_judge,
            to_test=replace(searched, budget=options.test_budget, split=Split.TEST),
            captions=[retain.captions[row] for row in chosen_rows(retain.rows)],
            judges=tuple(map(str, judges)),
            applied=edit_digests(edits),
        )

    @property
    def states(self) -> TextStates:
        """The states of the text encoder under search."""
        return TextStates(self.pipe, self.encoder)

    def hits(self, items: Sequence[ImageJob]) -> Iterator[list[bool]]:
        """Yield batch by batch whether the first judge recognises the class of each image.

        A judge of states recognises it in the prompts, without images.
        """
        if self.judges[0] != STATES or self.states_judge is None:
            yield from self.searched.hits(self.pipe, items)
            return
        for start, stop in spans(len(items), ROWS):
            yield self.states_judge.recognises(items[start:stop])

    def report(self) -> dict[str, Effect]:
        """Return the effect on test prompts and seeds, by each judge."""
        jobs, effects = (self.to_test.of_concept, self.to_test.of_others), {}
        if self.states_judge is not None:
            hits = [self.states_judge.recognises(some) for some in jobs]
            effects[STATES] = Effect(*(Share(sum(each), len(each)) for each in hits))
        if self.to_test.judges:
            pictures = [list(self.to_test.generated(self.pipe, some)) for some in jobs]
            effects |= self.to_test.effects(*pictures)
        return effects

    def remember(self) -> None:
        """Let the judge of states remember those of the original model."""
        if self.states_judge is not None:
            for prompts in (self.searched, self.to_test):
                self.states_judge.look([*prompts.of_concept, *prompts.of_others])

    def forget_gradient(self, layers: Sequence[str], anchor: str | None) -> dict[str, Tensor]:
        """Return the gradient of the loss of all states that the pipeline reads."""
        others = drawn_names(self.searched.other_classes, self.searched.budget.seed)
        return self.states.forget_gradient(self.prompts, self.names, others, anchor, layers)

    def fixed_inputs(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Return the inputs of layers for the empty prompt, (positions, inputs) each.

        Classifier-free guidance subtracts what the pipeline makes of it.
        """
        seen = SeenInputs(self.encoder.module, keys)
        seen.add(partial(self._states, self.states.ids([""])), rows=1, part=0)
        return {key: torch.cat(parts) for key, parts in seen.inputs.items()}

    def add_retained(self, sums: LayerSums) -> None:
        """Add the text encoder's calls for the retain set's captions, padded as the pipeline pads.

        Its features are what the pipeline reads of them.
        """
        for start, stop in spans(len(self.captions), ROWS // sums.memory):
            ids = self.states.ids(self.captions[start:stop])
            sums.add(partial(self._states, ids), rows=stop - start, part=start)

    def _states(self, ids: Tensor) -> Tensor:
        """Return all that the pipeline reads of token ids, (texts, entries)."""
        return torch.cat([each.flatten(1) for each in self.states.read(ids)], dim=1)


@dataclass(slots=True)
class Questions:
    """Questions about images of a concept and of other classes; `images` has their keys."""

    of_concept: list[Question] = field(default_factory=list)
    of_others: list[Question] = field(default_factory=list)
    images: list[list[str]] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """A digest of all images and questions."""
        questions = [[each.label, each.text] for each in (*self.of_concept, *self.of_others)]
        return digest([self.images, questions])

    @classmethod
    def about(
        cls, store: Store, manifest: SetManifest, split: Split, budget: Budget
    ) -> "Questions":
        """Return questions about evaluation images of a split, drawn by the budget's seed.

        If the validation split has too few images of the concept, images of the forget set are
        added. If the concept is not split, both splits have the same images of it.
        """
        questions, texts = cls(), budget.questions
        draw = np.random.default_rng(budget.seed).permutation
        for name in sorted(manifest.evals):
            block, rows, _ = serving_rows(store, manifest, name, split)
            labels = block.labels[rows]
            concept = find_classes(block.class_names, manifest.names)
            others = draw(rows[(labels >= 0) & ~np.isin(labels, concept)])
            others = others[: -(-budget.others // len(manifest.evals))]
            named = [block.class_names[label] for label in block.labels[others]]
            questions.of_others += questions.add(block, others, named, texts)
        named = [manifest.concept] * budget.concept
        shown = concept_rows(store, manifest, split)
        if shown is not None:
            block, rows, _ = shown
            rows = draw(rows)[: budget.concept]
            questions.of_concept += questions.add(block, rows, named, texts)
            named = named[len(rows) :]
        if split is Split.VALIDATION and named and concept_is_split(store, manifest):
            forget = DataBlock.open(store, manifest.forget)
            rows = draw(forget.rows)[: len(named)]
            questions.of_concept += questions.add(forget, rows, named, texts)
        return questions

    def add(
        self, block: DataBlock, rows: Any, labels: Sequence[str], texts: Sequence[str]
    ) -> list[Question]:
        """Add the images of rows, and return each question about each of them."""
        self.images.append([block.keys[row] for row in rows])
        labelled = zip(_images(block, rows), labels, strict=False)
        return [Question(image, text, label) for image, label in labelled for text in texts]


# The judge of answers: whether an answer contains the name.
ANSWERS = "its answers"


@dataclass(slots=True, kw_only=True)
class LlavaSubject(TargetSubject):
    """A vision-language model, whose answers name the class of an image or do not."""

    llava: Llava
    name: str
    forget: Sequence[Question]
    retained: Sequence[Image.Image]
    searched: Questions
    to_test: Questions
    judges: tuple[str, ...] = (ANSWERS,)

    @classmethod
    def load(
        cls, store: Store, manifest: SetManifest, options: TargetSearchOptions
    ) -> "LlavaSubject":
        """Load a LLaVA and the set's images. Raises InputError without images of the concept."""
        if manifest.forget_eval is None:
            raise InputError(
                f"no evaluation set shows {manifest.concept!r}",
                hint="build the set with --eval NAME=SOURCE that has labelled images of it",
            )
        llava = Llava.load(options.target, device=options.device)
        forget = DataBlock.open(store, manifest.forget)
        retain = DataBlock.open(store, manifest.retain)
        text = options.budget.questions[0]
        return cls(
            llava=llava,
            encoder=llava.encoder,
            name=manifest.concept,
            searched=Questions.about(store, manifest, Split.VALIDATION, options.budget),
            to_test=Questions.about(store, manifest, Split.TEST, options.test_budget),
            forget=[Question(image, text) for image in _images(forget, chosen_rows(forget.rows))],
            retained=_images(retain, chosen_rows(retain.rows)),
            is_test=concept_is_split(store, manifest),
        )

    def hits(self, items: Sequence[Question]) -> Iterator[list[bool]]:
        """Yield for each answer whether it names the class of its image."""
        for question, answer in zip(items, self.llava.answers(items), strict=True):
            yield [class_in(answer, [question.label]) is not None]

    def report(self) -> dict[str, Effect]:
        """Return the effect on test images."""
        concept, others = (self.count(q) for q in (self.to_test.of_concept, self.to_test.of_others))
        return {ANSWERS: Effect(concept, others)}

    def add_retained(self, sums: LayerSums) -> None:
        """Add the vision tower's calls for the retain set's images.

        Its features are those that the language model reads.
        """
        for start, stop in spans(len(self.retained), ROWS // sums.memory):
            read = partial(self._joined_features, self.retained[start:stop])
            sums.add(read, rows=stop - start, part=start)

    def read(self) -> Tensor:
        """Return the projected features of a few of the retain set's images, flattened."""
        with torch.no_grad():
            few = [self.retained[row] for row in spread(len(self.retained), ROWS)]
            return self._joined_features(few).float().flatten()

    def forget_gradient(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradient of the negative log-odds of the concept's name in the answers.

        The answers are the model's own, about images of the forget set.
        """
        with torch.no_grad():
            answers = list(self.llava.answers(self.forget))
        pairs = [
            (question, answer)
            for question, answer in zip(self.forget, answers, strict=True)
            if class_in(answer, [self.name])
        ]
        if not pairs:
            raise InputError(
                f"no answer of the target names {self.name!r}, so there is nothing to forget"
            )
        return answer_gradient(self.llava, self.encoder, pairs, self.name, layers)

    def _joined_features(self, images: Sequence[Image.Image]) -> Tensor:
        """Return the inputs of the language model for images, (positions of all, width)."""
        return torch.cat(self._features(images))

    def _features(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return the inputs of the language model for each image."""
        model = self.llava.model
        made = self.llava.processor.image_processor(list(images), return_tensors="pt")
        # Models that cut an image into tiles need its size.
        sizes = {"image_sizes": made["image_sizes"]} if "image_sizes" in made else {}
        features = model.get_image_features(
            pixel_values=made["pixel_values"].to(model.device, model.dtype),
            return_dict=True,
            **sizes,
        )
        return list(features.pooler_output)


Subject = PipelineSubject | LlavaSubject


def _images(block: DataBlock, rows: Any) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in block.take(rows)]


@dataclass(frozen=True, slots=True)
class TargetMove:
    """A layer of a target, its original values, its direction, and its importance.

    With a `goal`, a trial stops as soon as it must miss the goal.
    """

    subject: Subject
    layer: str
    weight: Tensor
    along: Tensor
    importance: float
    direction: DirectionSpec = FALLBACK
    goal: float | None = None

    @property
    def move(self) -> Move:
        """The layer and the direction that it moves in."""
        return self.layer, self.direction

    @property
    def first(self) -> float:
        """The step that moves the layer by 10% of its norm."""
        return 0.1 / self.share(1.0)

    def share(self, step: float) -> float:
        """Return the step's length over the layer's norm."""
        return step * float(self.along.norm() / self.weight.norm())

    def in_place(self, step: float) -> AbstractContextManager[None]:
        """Apply a step within a block."""
        values = torch.add(self.weight, self.along, alpha=step)
        return self.subject.encoder.edited({self.layer: values})

    def measure(self, step: float) -> TargetTrial:
        """Count how often the target still shows the concept after a step."""
        with self.in_place(step):
            concept = self.subject.concept(self.goal)
        tower = self.subject.encoder.tower_place.tower
        return TargetTrial(self.layer, tower, step, self.share(step), concept, None)

    def others(self, step: float) -> Share:
        """Count how often the target still shows other classes after a step."""
        with self.in_place(step):
            return self.subject.others()

    def report(self, step: float) -> dict[str, Effect]:
        """Return the effect of a step in the test split, by each judge."""
        with self.in_place(step):
            return self.subject.report()


def moves_of(
    subject: Subject,
    gradients: Mapping[str, Tensor],
    *,
    direction: DirectionSpec,
) -> list[TargetMove]:
    """Return a move for each layer that has a gradient and reaches the target, best first.

    Statistics are those of the target on its retained inputs, all positions included. If the
    direction falls back, layers without them come last and follow their gradient.
    """
    live = subject.encoder
    reached = [
        layer
        for layer, gradient in gradients.items()
        if is_candidate(layer)
        and Layer.parse(layer).tower is live.tower_place.tower
        and live.encoder.why_not(layer) is None
        and gradient.count_nonzero()
    ]
    keys = sorted({place.key for layer in reached for place in live.places(layer)})
    sums = {kind: SUMS[kind](live.module, keys) for kind in direction.needs}
    for each in sums.values():
        subject.add_retained(each)
    fixed = subject.fixed_inputs(keys)
    moves = []
    for layer in reached:
        weight, gradient = live.value(layer).float(), gradients[layer].to(live.value(layer).device)
        known = _statistics(live, layer, weight, sums, fixed)
        spec = direction
        if not all(getattr(known, name) is not None for name in direction.needs):
            if not direction.entry.falls_back or (fixed and known.fixed is None):
                continue
            spec = FALLBACK
        chosen = implementation(spec)
        metric = chosen.metric(known)
        along = chosen.along(gradient, metric).float()
        if not along.any():
            continue
        size = metric.weight_norm()
        gain = float(metric.scaled(gradient).norm())
        moves.append(TargetMove(subject, layer, weight, along, gain / size if size else 0.0, spec))
    return sorted(moves, key=lambda move: (move.direction != direction, *_by_importance(move)))


def _statistics(
    live: LiveEncoder,
    layer: str,
    weight: Tensor,
    sums: Mapping[Statistic, LayerSums],
    fixed: Mapping[str, Tensor],
) -> LayerStatistics:
    """Return what is known of a layer, in open_clip's shape."""
    places = live.places(layer)
    # Query, key and value have the same inputs, and so the same covariance.
    totals = {kind: each.covariances.get(places[0].key) for kind, each in sums.items()}
    inputs = derivatives = None
    if (covariance := totals.get(Statistic.INPUTS)) is not None:
        axis = 1 - covariance.axis if places[0].transposed else covariance.axis
        mean = covariance.mean()
        inputs = InputCovariance(mean, axis, mean_square_output(weight, mean, axis))
    if (total := totals.get(Statistic.DERIVATIVES)) is not None and len(places) == 1:
        derivatives = total.mean()
    return LayerStatistics(float(weight.norm()), inputs, derivatives, fixed.get(places[0].key))


def _by_importance(move: TargetMove) -> tuple[float, str]:
    return -move.importance, move.layer


# The relative change of the features at which a move is measured: above fp16 noise, but small.
CHANGE = 0.03


def by_gain(
    subject: LlavaSubject, moves: Sequence[TargetMove], gradients: Mapping[str, Tensor]
) -> list[TargetMove]:
    """Return moves with their expected gain as importance, best first.

    The gain is the slope of the loss per change of the features that the language model reads;
    0 for a move that changes none.
    """
    before = subject.read()

    def change(move: TargetMove, step: float) -> float:
        with move.in_place(step):
            return float((subject.read() - before).norm() / before.norm())

    ranked = []
    for move in moves:
        gradient = gradients[move.layer].to(move.along.device)
        slope = float((gradient.double() * move.along.double()).sum())
        gain = 0.0
        if first_change := change(move, move.first):
            # A step that changes the features by about CHANGE.
            step = move.first * CHANGE / first_change
            gain = slope * step / change(move, step)
        ranked.append(replace(move, importance=gain))
    return sorted(ranked, key=_by_importance)
