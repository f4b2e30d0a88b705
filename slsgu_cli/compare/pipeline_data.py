"""What baselines edit a diffusion pipeline with: the loaded pipeline, the concept and the set."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from slsgu_cli.clip.batches import spans
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

    `anchor` is what the concept is to become, None without a choice.
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

    def keys(self, prompts: Sequence[str], positions: Sequence[int]) -> Tensor:
        """Return what the cross-attention reads at a position of each prompt, (prompts, width)."""
        parts = []
        for start, stop in spans(len(prompts), ROWS):
            states = self.denoiser.conditions(prompts[start:stop])[0].states
            at = torch.tensor(positions[start:stop], device=states.device)
            parts.append(states[torch.arange(len(states), device=states.device), at])
        return torch.cat(parts).double()

    def concept_keys(self) -> Tensor:
        """Return the keys of the last token of the concept's names in the set's templates."""
        return self.keys(*self.named(self.judged.names))

    def anchor_keys(self) -> Tensor:
        """Return the keys of the anchor, one for each key of the concept.

        Without an anchor, each is the first token of the empty prompt.
        """
        if self.anchor is None:
            return self.empty()[:1].expand(len(self.judged.names) * len(self.judged.templates), -1)
        return self.keys(*self.named([self.anchor])).repeat(len(self.judged.names), 1)

    def retained_keys(self) -> Tensor:
        """Return the keys of the last token of each distinct retain caption."""
        captions = list(dict.fromkeys(self.captions))
        return self.keys(captions, [self.last_token(caption) for caption in captions])

    def empty(self) -> Tensor:
        """Return what the cross-attention reads of the empty prompt, (positions, width)."""
        return self.denoiser.conditions([""])[0].states[0].double()

    def last_token(self, text: str) -> int:
        """Return the position of the last token of a text before its end; 0 for the start."""
        tokenizer: Any = self.pipe.pipeline.tokenizer
        return len(tokenizer(text, truncation=True).input_ids) - 2
