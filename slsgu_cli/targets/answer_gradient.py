"""The gradient of a vision-language model's own loss: the log-odds of the concept's name."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from slsgu_cli.clip.batches import spans
from slsgu_cli.targets.models import LiveEncoder, Llava, Question

QUESTIONS_AT_ONCE = 16

# A name has at most this many tokens.
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
    means: dict[str, Tensor] = {}
    for start, stop in spans(len(pairs), QUESTIONS_AT_ONCE):
        with torch.enable_grad():
            gradients = encoder.gradients(_loss(llava, pairs[start:stop], name), layers)
        for layer, gradient in gradients.items():
            means[layer] = means.get(layer, 0.0) + gradient / len(pairs)
    return means


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
    """Return a mask of the answers' tokens: 1 for those of the name, 0 elsewhere."""
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
