"""The structure of a text tower's embeddings of neutral prompts, before and after an edit."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip.activations import CacheBudget
from slsgu_cli.clip.evaluation import prompt_side
from slsgu_cli.clip.tokenizers import Tokenize
from slsgu_cli.clip.towers import SplitTower
from slsgu_cli.clip.zeroshot import PromptSide
from slsgu_cli.method.text_structure import neighbour_overlap, spread_ratio
from slsgu_cli.records.figures import TextStructure
from slsgu_cli.records.method import Tower
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.sources.matching import matcher
from slsgu_cli.sources.neutral import neutral_prompts


def prompts_without(manifests: Iterable[SetManifest]) -> tuple[str, ...]:
    """Return the neutral prompts that are about none of the concepts of sets."""
    about = [matcher(each.patterns, regex=each.regex) for each in manifests]
    return tuple(text for text in neutral_prompts() if not any(test(text) for test in about))


def embedded(
    tower: SplitTower, prompts: Sequence[str], *, tokenize: Tokenize, device: str
) -> PromptSide:
    """Return prompts with their embeddings by a text tower; each is a class of its own."""
    side = prompt_side(tower, prompts, ("{}",), tokenize=tokenize, device=device)
    side.base_pass((), CacheBudget(0))
    return side


def text_structure(before: Tensor, after: Tensor) -> TextStructure:
    """Return the figures of unit embeddings (prompts, width) before and after an edit."""
    figures = spread_ratio(before, after), neighbour_overlap(before, after)
    return TextStructure(len(before), *figures)


def text_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return the values of the parameters of the text tower by their names."""
    return {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if Layer.parse(name).tower is Tower.TEXT
    }


def same_text_tower(first: nn.Module, second: nn.Module) -> bool:
    """Return whether the text towers of two models are equal to the bit."""
    parameters, others = text_parameters(first), text_parameters(second)
    return parameters.keys() == others.keys() and all(
        values.equal(others[name]) for name, values in parameters.items()
    )
