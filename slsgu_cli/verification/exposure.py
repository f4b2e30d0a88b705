"""What a membership attack looks at: cosine and loss of pairs in and outside the forget set."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from slsgu_cli.sets import DataBlock
from slsgu_cli.verification.bench import Bench
from slsgu_cli.verification.membership import Values, attack
from slsgu_cli.verification.records import Attack, Settings

Rows = npt.NDArray[np.integer]
PAIRS = 32
FEWEST = 2
HELD_OUT, OTHERS, RETAINED = "held out", "other classes", "retain set"


def membership(bench: Bench, settings: Settings) -> list[Attack]:
    """Attack the forget set by either figure, against held-out pairs and against the retain set.

    Held-out pairs are the concept's images in the evaluation set. Where no set has the
    concept, they are images of other classes. A side of one pair cannot be attacked.
    """
    forget, retain = bench.forget, bench.retain
    against, block, rows = _outside(bench, settings)
    drawn = np.random.default_rng(settings.seed).permutation(retain.rows)[: settings.rows]
    captioned = all(block.captions[row] for row in rows)
    sides = {
        against: (block, rows, _words(bench, block, rows, captioned)),
        RETAINED: (retain, np.sort(drawn), retain.tokens[np.sort(drawn)]),
    }
    own = np.arange(forget.rows)
    found = []
    for name, side in sides.items():
        # Other pairs without captions get prompts; then the members get theirs too, or
        # the wording alone would tell the two apart.
        plain = name == against and not captioned
        words = _prompts(bench, [bench.names[bench.own]] * len(own)) if plain else forget.tokens
        size = min(PAIRS, len(own), len(side[1]))
        if size < FEWEST:
            continue
        members = _figures(bench, forget, own, words, size)
        others = _figures(bench, *side, size)
        for figure, values in members.items():
            accuracies = attack(values, others[figure], seed=settings.seed)
            found.append(
                Attack(
                    figure,
                    name,
                    float(accuracies.mean()),
                    float(accuracies.std()),
                    len(values),
                    len(others[figure]),
                )
            )
    return found


def _outside(bench: Bench, settings: Settings) -> tuple[str, DataBlock, Rows]:
    """Return what stands for data outside the forget set, and its rows."""
    group = bench.evaluation.forget
    if bench.manifest.forget_eval is not None:
        return HELD_OUT, group.images.block, group.images.rows
    first = next(iter(bench.evaluation.utility.values())).images
    return OTHERS, first.block, first.rows[: settings.rows]


def _words(bench: Bench, block: DataBlock, rows: Rows, captioned: bool) -> npt.NDArray[np.int32]:
    """Return the captions of some evaluation rows, or prompts with their classes."""
    if captioned:
        return bench.tokenize([block.captions[row] for row in rows])
    return _prompts(bench, [block.class_names[block.labels[row]] for row in rows])


def _prompts(bench: Bench, names: Sequence[str]) -> npt.NDArray[np.int32]:
    return bench.tokenize([bench.templates[0].replace("{}", name) for name in names])


def _figures(
    bench: Bench, block: DataBlock, rows: Rows, tokens: npt.NDArray[np.integer], size: int
) -> dict[str, Values]:
    """Return the cosine and the contrastive loss of each pair, in mini-batches of `size`.

    The last mini-batch is filled up from the first rows: the loss depends on its size.
    """
    v = bench.image_features(block.take(rows))
    t = bench.text_features(tokens)
    bench.tick()
    logits = bench.scale * v @ t.T
    losses = torch.empty(len(v), device=v.device)
    for start in range(0, len(v), size):
        batch = torch.arange(start, start + size, device=v.device) % len(v)
        own = logits[batch][:, batch]
        truth = torch.arange(size, device=v.device)
        each = F.cross_entropy(own, truth, reduction="none")
        each = each + F.cross_entropy(own.T, truth, reduction="none")
        here = min(size, len(v) - start)
        losses[start : start + here] = each[:here] / 2
    cosines = (v * t).sum(dim=1)
    return {"cosine": cosines.double().cpu().numpy(), "loss": losses.double().cpu().numpy()}
