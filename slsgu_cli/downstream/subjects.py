"""A target as its search sees it: what it is asked, how it is judged, its own gradient."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from slsgu_cli.clip.inputs import spans
from slsgu_cli.downstream.judge import JudgedPrompt, JudgedPrompts, class_in
from slsgu_cli.downstream.models import LiveEncoder, Llava, Pipeline, Question, joined
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.method.moments import chosen_rows, spread
from slsgu_cli.records.method import Share
from slsgu_cli.records.sets import ModelSpec, SetManifest
from slsgu_cli.records.targets import Budget
from slsgu_cli.sources.classes import find_class
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

QUESTIONS_AT_ONCE = 16

# Tokens that a name is looked for in.
LONGEST = 12


def answer_gradient(
    llava: Llava,
    encoder: LiveEncoder,
    pairs: Sequence[tuple[Question, str]],
    name: str,
    layers: Sequence[str],
) -> dict[str, Tensor]:
    """Return the gradient of L, the mean over `pairs`, for each layer in open_clip's shape.

    `pairs` are questions with the answers that name the concept; all of one question text.
    """
    parameters = {layer: encoder.parameters(layer) for layer in layers}
    flat = [parameter for group in parameters.values() for parameter in group]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in flat]
    for start, stop in spans(len(pairs), QUESTIONS_AT_ONCE):
        with torch.enable_grad():
            loss = _loss(llava, pairs[start:stop], name)
            gradients = torch.autograd.grad(loss, flat, allow_unused=True)
        for total, gradient in zip(sums, gradients, strict=True):
            if gradient is not None:
                total += gradient.float() / len(pairs)
    means = iter(sums)
    return {
        layer: joined(encoder.places(layer), [next(means) for _ in group])
        for layer, group in parameters.items()
    }


def _loss(llava: Llava, pairs: Sequence[tuple[Question, str]], name: str) -> Tensor:
    """Return the sum over some pairs of minus the log-odds of the name's tokens."""
    questions, answers = [question for question, _ in pairs], [answer for _, answer in pairs]
    prompt_length = llava.inputs(questions, padding_side="right")["input_ids"].shape[1]
    inputs = llava.inputs(questions, padding_side="right", answers=answers)
    logits = llava.model(**inputs).logits[:, prompt_length - 1 : -1].float()
    tokens = inputs["input_ids"][:, prompt_length:]
    chosen = logits.gather(-1, tokens.unsqueeze(-1))
    rest = logits.scatter(-1, tokens.unsqueeze(-1), float("-inf")).logsumexp(dim=-1)
    odds: Tensor = (chosen.squeeze(-1) - rest) * _of_name(llava, tokens, name)
    return -odds.sum()


def _of_name(llava: Llava, tokens: Tensor, name: str) -> Tensor:
    """Return which tokens of answers spell the name: 1 there, 0 elsewhere."""
    tokenizer = llava.processor.tokenizer
    mask = torch.zeros(tokens.shape)
    for number, row in enumerate(tokens.tolist()):
        spans_of_row = itertools.combinations(range(len(row) + 1), 2)
        for start, stop in (span for span in spans_of_row if span[1] - span[0] <= LONGEST):
            text = tokenizer.decode(row[start:stop], skip_special_tokens=True)
            if text.strip().casefold() == name.casefold():
                mask[number, start:stop] = 1
                break
    return mask.to(tokens.device)


ROWS = 32


class Subject(Protocol):
    """What a search needs of a target. All of it is of the weights as they are at the time."""

    encoder: LiveEncoder

    def concept(self) -> Share:
        """Return how much of the concept's budget still shows it."""

    def others(self) -> Share:
        """Return how much of the others' budget shows what it should."""

    def run_retained(self) -> None:
        """Run the CLIP tower over the retain set exactly as the target does."""

    def read(self) -> Tensor | None:
        """Return what the target reads of its CLIP on a few retained inputs, flattened.

        None where layers are to be ranked by what they do to their own outputs.
        """

    def forget_gradient(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradient of the target's own forget loss, to be ascended, by layer."""


@dataclass(slots=True)
class PaintedSubject:
    """A diffusion pipeline: a judge says what its images show."""

    pipe: Pipeline
    encoder: LiveEncoder
    judged: JudgedPrompts
    captions: Sequence[str]

    @classmethod
    def load(
        cls, store: Store, manifest: SetManifest, target: Path, judge: ModelSpec, budget: Budget,
        *, encoder: str | None, device: str,
    ) -> "PaintedSubject":  # fmt: skip
        """Load a pipeline and its judge. Raises UsageError where an encoder must be named."""
        pipe = Pipeline.load(target, device=device)
        names = [live.encoder.name for live in pipe.encoders]
        fitting = [live for live in pipe.encoders if encoder in (None, live.encoder.name)]
        if len(fitting) != 1:
            raise UsageError(
                f"{target} has the encoders {', '.join(names)}", hint=f"--encoder {names[0]}"
            )
        judged = JudgedPrompts.of_set(store, manifest, judge, budget, device=device)
        return cls(pipe, fitting[0], judged, _captions(store, manifest))

    def concept(self) -> Share:
        """Return how many images of the concept's prompts are taken for it."""
        return self._recognised(self.judged.of_concept)

    def others(self) -> Share:
        """Return how many images of other classes' prompts are taken for theirs."""
        return self._recognised(self.judged.of_others)

    def run_retained(self) -> None:
        """Run the text encoder over the retain set's captions, padded as the pipeline pads."""
        name = self.encoder.encoder.name
        tokenizer: Any = getattr(self.pipe.pipeline, name.replace("text_encoder", "tokenizer"))
        for start, stop in spans(len(self.captions), ROWS):
            ids = tokenizer(
                list(self.captions[start:stop]), padding="max_length", truncation=True,
                max_length=tokenizer.model_max_length, return_tensors="pt",
            ).input_ids  # fmt: skip
            self.encoder.module(ids.to(self.pipe.device))

    def read(self) -> None:
        """Return None: a pipeline's layers are ranked by what they do to their own outputs."""

    def forget_gradient(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Raise UsageError: a pipeline is steered along CLIP's own gradient."""
        raise UsageError(
            "a diffusion pipeline is moved along CLIP's own forget gradient", hint="--gradient clip"
        )

    def _recognised(self, prompts: Sequence[JudgedPrompt]) -> Share:
        return self.judged.recognised(prompts, list(self.judged.painted(self.pipe, prompts)))


@dataclass(slots=True)
class AskedSubject:
    """A vision-language model: its answers name what an image shows, or they do not."""

    llava: Llava
    encoder: LiveEncoder
    name: str
    shown: Sequence[Question]
    rest: Sequence[tuple[str, Question]]
    forget: Sequence[Question]
    retained: Sequence[Image.Image]

    @classmethod
    def load(
        cls, store: Store, manifest: SetManifest, target: Path, budget: Budget, *, device: str
    ) -> "AskedSubject":
        """Load a LLaVA and the set's images. Raises InputError without held-out ones."""
        if manifest.forget_eval is None:
            raise InputError(
                f"no evaluation set shows {manifest.concept!r}",
                hint="build the set with --eval NAME=SOURCE that has labelled images of it",
            )
        llava = Llava.load(target, device=device)
        generator = np.random.default_rng(budget.seed)
        shown: list[Image.Image] = []
        rest: list[tuple[str, Image.Image]] = []
        for name, ref in sorted(manifest.evals.items()):
            block = DataBlock.open(store, ref)
            concept_class = find_class(block.class_names, manifest.concept)
            order = generator.permutation(np.flatnonzero(block.labels >= 0))
            is_concept = block.labels[order] == concept_class
            share = -(-budget.others // len(manifest.evals))
            others = order[~is_concept][:share]
            labels = [block.class_names[block.labels[row]] for row in others]
            rest += zip(labels, _images(block, others), strict=True)
            if name == manifest.forget_eval:
                shown = _images(block, order[is_concept][: budget.concept])
        forget = DataBlock.open(store, manifest.forget)
        retain = DataBlock.open(store, manifest.retain)
        questions = [Question(image, text) for image in shown for text in budget.questions]
        return cls(
            llava,
            llava.encoder,
            manifest.concept,
            questions,
            [(label, Question(image, text)) for label, image in rest for text in budget.questions],
            [
                Question(image, budget.questions[0])
                for image in _images(forget, chosen_rows(forget.rows))
            ],
            _images(retain, chosen_rows(retain.rows)),
        )

    def concept(self) -> Share:
        """Return how many answers about images of the concept name it."""
        return self._named([(self.name, question) for question in self.shown])

    def others(self) -> Share:
        """Return how many answers about other images name what they show."""
        return self._named(self.rest)

    def run_retained(self) -> None:
        """Run the vision tower over the retain set's images."""
        for start, stop in spans(len(self.retained), ROWS):
            self._features(self.retained[start:stop])

    def read(self) -> Tensor:
        """Return the projected features of a few of the retain set's images, flattened."""
        few = [self.retained[row] for row in spread(len(self.retained), ROWS)]
        return torch.cat([features.float().flatten() for features in self._features(few)])

    def forget_gradient(self, layers: Sequence[str]) -> dict[str, Tensor]:
        """Return the gradient of minus the log-odds of the concept's name in the answers.

        The answers are the model's own to images of the forget set.
        """
        with torch.no_grad():
            answers = list(self.llava.answers(self.forget))
        pairs = [
            (question, answer)
            for question, answer in zip(self.forget, answers, strict=True)
            if class_in(answer, [self.name])
        ]
        if not pairs:
            raise InputError(f"the target names {self.name!r} in no answer: nothing to forget")
        return answer_gradient(self.llava, self.encoder, pairs, self.name, layers)

    @torch.no_grad()
    def _features(self, images: Sequence[Image.Image]) -> list[Tensor]:
        """Return what the language model is given of each image."""
        model = self.llava.model
        pixels = self.llava.processor.image_processor(list(images), return_tensors="pt")
        features = model.get_image_features(
            pixel_values=pixels["pixel_values"].to(model.device, model.dtype), return_dict=True
        )
        return list(features.pooler_output)

    def _named(self, wanted: Sequence[tuple[str, Question]]) -> Share:
        answers = self.llava.answers([question for _, question in wanted])
        hits = [
            class_in(a, [label]) is not None for (label, _), a in zip(wanted, answers, strict=True)
        ]
        return Share(sum(hits), len(hits))


def _images(block: DataBlock, rows: Any) -> list[Image.Image]:
    return [Image.fromarray(pixels) for pixels in block.take(rows)]


def _captions(store: Store, manifest: SetManifest) -> list[str]:
    block = DataBlock.open(store, manifest.retain)
    return [block.captions[row] for row in chosen_rows(block.rows)]
