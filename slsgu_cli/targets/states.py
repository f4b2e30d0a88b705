"""The states of a text encoder that a pipeline reads: their forget loss, and a judge of them.

A pipeline reads more of its text encoder than CLIP's pooled feature: the states of all token
positions, padding included. For these, too, a stand-in takes the place of images: the state of a
prompt with the name, minus the mean state of the same prompt with other names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.checkpoints.reading import PENULTIMATE, PENULTIMATE_AND_POOLED, POOLED
from slsgu_cli.clip.batches import spans
from slsgu_cli.method.losses import cosine_forget
from slsgu_cli.sources.matching import in_place_of_names
from slsgu_cli.targets.models import ImageJob, LiveEncoder, Pipeline

# Texts in one forward.
ROWS = 64
# Prompts in the loss, and other names that each is compared with.
PROMPTS, OTHERS = 16, 32

# One tensor (texts, positions, width) for each output that the pipeline reads.
States = list[Tensor]


@dataclass(frozen=True, slots=True)
class TextStates:
    """One of a pipeline's text encoders as the pipeline reads it, with its tokenizer."""

    pipe: Pipeline
    encoder: LiveEncoder

    def ids(self, texts: Sequence[str]) -> Tensor:
        """Return the token ids of texts, padded as the pipeline pads, (texts, positions)."""
        name = self.encoder.encoder.name.replace("text_encoder", "tokenizer")
        tokenizer: Any = getattr(self.pipe.pipeline, name)
        ids: Tensor = tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=tokenizer.model_max_length,
            return_tensors="pt",
        ).input_ids
        return ids.to(self.pipe.device)

    def read(self, ids: Tensor) -> States:
        """Return what the pipeline reads of token ids: hidden states, the pooled vector, or both.

        A pooled vector has one position.
        """
        outputs = self.encoder.module(ids, output_hidden_states=True)
        reads = self.encoder.encoder.read_from.reads
        if reads == PENULTIMATE:
            return [outputs.hidden_states[-2]]
        pooled = getattr(outputs, "text_embeds", None)
        if reads == POOLED:
            return [(outputs.pooler_output if pooled is None else pooled).unsqueeze(1)]
        penultimate = reads == PENULTIMATE_AND_POOLED
        states = outputs.hidden_states[-2] if penultimate else outputs.last_hidden_state
        return [states] if pooled is None else [states, pooled.unsqueeze(1)]

    def of(self, texts: Sequence[str]) -> States:
        """Return the states of texts, fp32, without gradients."""
        parts = []
        with torch.no_grad():
            for start, stop in spans(len(texts), ROWS):
                parts.append([each.float() for each in self.read(self.ids(texts[start:stop]))])
        return [torch.cat(each) for each in zip(*parts, strict=True)]

    def mean_with(
        self, prompts: Sequence[str], names: Sequence[str], others: Sequence[str]
    ) -> States:
        """Return the mean states of each prompt with the others in place of the names."""
        texts = [text for other in others for text in in_place_of_names(prompts, names, other)]
        shape = (len(others), len(prompts))
        return [torch.unflatten(each, 0, shape).mean(dim=0) for each in self.of(texts)]

    def forget_gradient(
        self,
        prompts: Sequence[str],
        names: Sequence[str],
        others: Sequence[str],
        anchor: str | None,
        layers: Sequence[str],
    ) -> dict[str, Tensor]:
        """Return the gradient of the forget loss of all states, in open_clip's shape.

        It is the loss of Eq. 5 of each state with its stand-in; or, with an anchor, the cosine with
        the state of the same prompt with the anchor in place of the name.
        """
        if anchor is None:
            means = self.mean_with(prompts, names, others)
            pairs = zip(self.of(prompts), means, strict=True)
            wanted = [state - mean for state, mean in pairs]
        else:
            wanted = self.of(in_place_of_names(prompts, names, anchor))
        with torch.enable_grad():
            states = self.read(self.ids(prompts))
            loss = states_loss(states, wanted, towards=anchor is not None)
            return self.encoder.gradients(loss, layers)


def states_loss(states: States, wanted: States, *, towards: bool) -> Tensor:
    """Return 1 - cos, or `towards` the wanted states cos, as a mean over positions and outputs."""
    losses = []
    for state, other in zip(states, wanted, strict=True):
        unit = F.normalize(state.float(), dim=-1), F.normalize(other, dim=-1)
        losses.append(cosine_forget(*unit).mean())
    loss = torch.stack(losses).mean()
    return 1 - loss if towards else loss


@dataclass(frozen=True, slots=True)
class StatesJudge:
    """Recognises a name in the states of a prompt: no image is generated.

    The states of a prompt with other names are compared by cosine, after subtracting their mean.
    A name is recognised while its own original states are nearer than those of any other name.
    """

    states: TextStates
    others: tuple[str, ...]
    _known: dict[str, tuple[Tensor, Tensor]] = field(init=False, default_factory=dict)
    _own: dict[str, Tensor] = field(init=False, default_factory=dict)

    def look(self, jobs: Sequence[ImageJob]) -> None:
        """Remember the states of the original model for some prompts."""
        for template in {template_of(job) for job in jobs} - self._known.keys():
            vectors = self._vectors([template.replace("{}", name) for name in self.others])
            mean = vectors.mean(dim=0)
            self._known[template] = mean, F.normalize(vectors - mean, dim=-1)
        unseen = list(dict.fromkeys(job.prompt for job in jobs if job.prompt not in self._own))
        if unseen:
            self._own.update(zip(unseen, self._vectors(unseen), strict=True))

    def recognises(self, jobs: Sequence[ImageJob]) -> list[bool]:
        """Return for each prompt whether its present states still have its name."""
        vectors = self._vectors([job.prompt for job in jobs])
        return [self._recognised(job, now) for job, now in zip(jobs, vectors, strict=True)]

    def _recognised(self, job: ImageJob, now: Tensor) -> bool:
        mean, others = self._known[template_of(job)]
        own, present = (F.normalize(each - mean, dim=-1) for each in (self._own[job.prompt], now))
        cosines = others @ present
        if job.label in self.others:
            cosines[self.others.index(job.label)] = -1.0
        return bool(own @ present > cosines.max())

    def _vectors(self, texts: Sequence[str]) -> Tensor:
        """Return all states of each text in one vector, each output scaled to unit length."""
        parts = [F.normalize(each.flatten(1), dim=-1) for each in self.states.of(texts)]
        return torch.cat(parts, dim=-1)


def drawn_names(names: Sequence[str], seed: int) -> tuple[str, ...]:
    """Return at most OTHERS names, drawn by seed, in their order."""
    drawn = np.random.default_rng(seed).permutation(len(names))[:OTHERS]
    return tuple(names[place] for place in sorted(drawn))


def template_of(job: ImageJob) -> str:
    """Return a prompt with {} in place of its class."""
    return job.prompt.replace(job.label, "{}")
