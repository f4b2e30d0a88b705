"""The forget gradient on a vision-language model's own answers.

L = minus the log-odds of the words of the concept's name, where the model's own answers to
the forget images have them. The log-odds log p / (1 - p) count every image, where the
gradient of log p alone would vanish with 1 - p for all that are answered surely.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from slsgu_cli.batches import spans
from slsgu_cli.generation.answering import Question, Respondent
from slsgu_cli.generation.live import LiveEncoder, joined

ROWS = 16
# Tokens that a name is looked for in.
LONGEST = 12


def name_odds(
    respondent: Respondent,
    encoder: LiveEncoder,
    pairs: Sequence[tuple[Question, str]],
    name: str,
    layers: Sequence[str],
) -> dict[str, Tensor]:
    """Return the gradient of L, the mean over `pairs`, for each layer in open_clip's shape.

    `pairs` are questions with the answers that name the concept; all of one question text.
    """
    parameters = {layer: encoder.parameters(layer) for layer in layers}
    flat = [parameter for own in parameters.values() for parameter in own]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in flat]
    for start, stop in spans(len(pairs), ROWS):
        with torch.enable_grad():
            loss = _loss(respondent, pairs[start:stop], name)
            found = torch.autograd.grad(loss, flat, allow_unused=True)
        for total, gradient in zip(sums, found, strict=True):
            if gradient is not None:
                total += gradient.float() / len(pairs)
    means = iter(sums)
    return {
        layer: joined(encoder.slots(layer), [next(means) for _ in own])
        for layer, own in parameters.items()
    }


def _loss(respondent: Respondent, pairs: Sequence[tuple[Question, str]], name: str) -> Tensor:
    """Return the sum over some pairs of minus the log-odds of the name's tokens."""
    questions, answers = [question for question, _ in pairs], [answer for _, answer in pairs]
    asked = respondent.inputs(questions, padding_side="right")["input_ids"].shape[1]
    inputs = respondent.inputs(questions, padding_side="right", answers=answers)
    logits = respondent.model(**inputs).logits[:, asked - 1 : -1].float()
    tokens = inputs["input_ids"][:, asked:]
    own = logits.gather(-1, tokens.unsqueeze(-1))
    rest = logits.scatter(-1, tokens.unsqueeze(-1), float("-inf")).logsumexp(dim=-1)
    odds: Tensor = (own.squeeze(-1) - rest) * _of_name(respondent, tokens, name)
    return -odds.sum()


def _of_name(respondent: Respondent, tokens: Tensor, name: str) -> Tensor:
    """Return which tokens of answers spell the name: 1 there, 0 elsewhere."""
    tokenizer = respondent.processor.tokenizer
    mask = torch.zeros(tokens.shape)
    for number, row in enumerate(tokens.tolist()):
        spans_of_row = itertools.combinations(range(len(row) + 1), 2)
        for start, stop in (span for span in spans_of_row if span[1] - span[0] <= LONGEST):
            text = tokenizer.decode(row[start:stop], skip_special_tokens=True)
            if text.strip().casefold() == name.casefold():
                mask[number, start:stop] = 1
                break
    return mask.to(tokens.device)
