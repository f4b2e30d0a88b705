"""What baselines edit a diffusion pipeline with: the loaded pipeline, the concept and the set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slsgu_cli.clip.batches import spans
from slsgu_cli.compare.anchor import anchor_of
from slsgu_cli.compare.unet import Denoiser
from slsgu_cli.engine.covariance import chosen_rows
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.targets.judged_prompts import JudgedPrompts
from slsgu_cli.targets.models import Pipeline

# Prompts in one forward of the text encoders.
ROWS = 64


@dataclass(frozen=True, slots=True)
class PipelineData:
    """A loaded pipeline, the judged prompts of the concept, and the blocks of the set.

    `anchor` is the set's choice of what the concept becomes.
    """

    pipe: Pipeline
    judged: JudgedPrompts
    forget: DataBlock
    retain: DataBlock
    anchor: str | None = None

    @property
    def denoiser(self) -> Denoiser:
        """The UNet."""
        return Denoiser(self.pipe.pipeline, self.pipe.device)

    @property
    def captions(self) -> list[str]:
        """The captions of at most as many retain rows as covariances take."""
        return [self.retain.captions[row] for row in chosen_rows(self.retain.rows)]

    def named(self, names: Sequence[str]) -> tuple[list[str], list[int]]:
        """Return each name in each template of the set, and the positions of the names' ends."""
        places = [(text, name) for name in names for text in self.judged.templates]
        prompts = [text.replace("{}", name) for text, name in places]
        return prompts, [self.last_token(f"{t.partition('{}')[0]}{name}") for t, name in places]

    def of_concept(self) -> tuple[list[str], list[int]]:
        """Return the prompts with the concept's names, and the positions of the names' ends."""
        return self.named(self.judged.names)

    def of_anchor(self) -> tuple[list[str], list[int]]:
        """Return the same prompts with the anchor in place of each name."""
        return self.named([anchor_of(self.anchor)] * len(self.judged.names))

    def keys(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the cross-attention reads of each prompt of the concept and of the anchor.

        The keys of a prompt are those of the name's last token and of all positions after it,
        padding included, (positions, width) in fp64.
        """
        own, other = (
            [rows[start:] for rows, start in zip(self.states(prompts), starts, strict=True)]
            for prompts, starts in (self.of_concept(), self.of_anchor())
        )
        return own, aligned(own, other)

    def retained_keys(self) -> Tensor:
        """Return keys of each distinct retain caption: its last token, its end, and the padding."""
        captions = list(dict.fromkeys(self.captions))
        states = self.states(captions)
        last = torch.tensor([self.last_token(caption) for caption in captions])
        end, rows = (last + 1).clamp(max=states.shape[1] - 1), torch.arange(len(states))
        return torch.cat([states[rows, last], states[rows, end], states[:, -1]])

    def states(self, prompts: Sequence[str]) -> Tensor:
        """Return what the cross-attention reads of prompts, (prompts, positions, width) in fp64."""
        parts = [
            self.denoiser.conditions(prompts[start:stop])[0].states
            for start, stop in spans(len(prompts), ROWS)
        ]
        return torch.cat(parts).double()

    def last_token(self, text: str) -> int:
        """Return the position of the last token of a text before its end; 0 for the start."""
        tokenizer: Any = self.pipe.pipeline.tokenizer
        return len(tokenizer(text, truncation=True).input_ids) - 2


def aligned(own: Sequence[Tensor], other: Sequence[Tensor]) -> list[Tensor]:
    """Return as many rows of each other as its own has; the last one is repeated."""
    pairs = zip(own, other, strict=True)
    return [theirs[torch.arange(len(ours)).clamp(max=len(theirs) - 1)] for ours, theirs in pairs]
