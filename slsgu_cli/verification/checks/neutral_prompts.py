"""`neutral-prompts`: the structure of text embeddings, next to a random change of the same size."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from slsgu_cli.clip.towers import EMBED
from slsgu_cli.engine.text_structure import (
    prompts_without,
    same_text_tower,
    text_parameters,
    text_structure,
)
from slsgu_cli.records.figures import TextStructure
from slsgu_cli.records.verification import Check, Settings, VerifiedModel
from slsgu_cli.verification.model import ModelUnderTest, SkippedCheck, altered
from slsgu_cli.verification.registry import CheckSpec
from slsgu_cli.verification.verdicts import VerdictRow

EDIT, RANDOM = "the edit", "a random change"


def sentence(
    _original: VerifiedModel, other: VerifiedModel, _strongest: VerdictRow | None
) -> str | None:
    """Return both figures, and those of the control."""
    finding = other.finding(Check.NEUTRAL_PROMPTS)
    if finding is None or not finding.structure:
        return None
    edit, control = finding.structure[EDIT], finding.structure.get(RANDOM)
    if control is None:
        return "The text embeddings of neutral prompts are unchanged."
    return (
        f"The text embeddings of {edit.prompts} neutral prompts have {edit.spread:.1f}% of their "
        f"spread, and their nearest prompts overlap by {edit.overlap:.1f}% "
        f"(a random change of the same size: {control.spread:.1f}% and {control.overlap:.1f}%)."
    )


def neutral_prompts(model: ModelUnderTest, settings: Settings) -> dict[str, TextStructure]:
    """Return the figures of the edit and of its control, both against the original model.

    There are none for the original itself, and no control if the text tower is unchanged. Raises
    SkippedCheck without prompts, or for a text tower with other parameters.
    """
    if model.original is None:
        return {}
    if (count := len(prompts_without([model.manifest]))) < 2:
        raise SkippedCheck("every neutral prompt is about the concept")
    original = model.original()
    if same_text_tower(original.module, model.module):
        return {EDIT: TextStructure(count)}
    parameters, others = (text_parameters(each.module) for each in (original, model))
    shapes = [{name: each.shape for name, each in side.items()} for side in (parameters, others)]
    if shapes[0] != shapes[1]:
        raise SkippedCheck("its text tower has other parameters than the original's")
    before, neutral = original.neutral_prompts().embeddings, model.neutral_prompts()
    found = {EDIT: text_structure(before, neutral.embeddings)}
    with altered(model.module, random_change(parameters, settings.seed)):
        found[RANDOM] = text_structure(before, neutral.after_edit(EMBED))
    return found


def random_change(originals: Mapping[str, Tensor], seed: int) -> Callable[[str, Tensor], Tensor]:
    """Return a change that moves parameters from `originals` as far as they are, at random.

    The direction of each is drawn from a normal distribution over the weights that differ.
    """
    generator = torch.Generator().manual_seed(seed)

    def change(name: str, values: Tensor) -> Tensor:
        if name not in originals or values.equal(originals[name]):
            return values
        moved = values - originals[name]
        drawn = torch.randn(moved.shape, generator=generator).to(moved) * (moved != 0)
        return torch.add(originals[name], drawn * (moved.norm() / drawn.norm()))

    return change


SPEC = CheckSpec(
    run=neutral_prompts,
    fills="structure",
    settings=("prompts", "seed"),
    sentence=sentence,
)
