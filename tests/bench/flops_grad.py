"""Count the operations of a gradient pass by PyTorch's counter, which no machine's load affects.

    python tests/bench/flops_grad.py
    python tests/bench/flops_grad.py --device cuda

Models have their real sizes and no weights: tensors are on the meta device, which computes
shapes only. Matrix products and convolutions count; sums, norms and look-ups do not. `backward`
is divided by purpose: gradients that only pass to earlier layers, those of candidate layers, and
what all other parameters (biases, embeddings) add. Texts run in the groups that a pass on
`--device` forms, each at the length of its longest. `least` is the gradient of the candidates
alone, with each text at its own length.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import open_clip
import torch
from synthetic import random_tokens
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from slsgu_cli.clip.batches import TEXTS_PER_FORWARD, by_length
from slsgu_cli.clip.towers import text_tower, vision_tower
from slsgu_cli.engine.gradient_pass import BEST_PAIRS
from slsgu_cli.method.layers import is_candidate
from slsgu_cli.records.options import PassOptions

MODELS = ["ViT-B-32", "ViT-L-14", "ViT-SO400M-14-SigLIP", "EVA01-g-14"]
PARTS = ("forward", "backward: inputs", "backward: candidates", "backward: other parameters")


def shapes_of(name: str) -> Any:
    """Return a model of real size on the meta device."""
    with torch.device("meta"):
        return open_clip.create_model(name, device="meta").eval()


def flop(model: nn.Module, wanted: Callable[[str], bool], work: Callable[[], Tensor]) -> int:
    """Return the operations of a forward, and of the backward to the `wanted` parameters."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(wanted(name))
    with FlopCounterMode(display=False) as counter:
        features = work()
        if features.requires_grad:
            features.backward(torch.empty_like(features))
    model.zero_grad()
    return counter.get_total_flops()


def counts(model: nn.Module, work: Callable[[], Tensor]) -> np.ndarray:
    """Return the operations of `work`, one number for each of PARTS."""
    names = {name for name, _ in model.named_parameters()}
    competing = {name for name in names if is_candidate(name)}
    forward = flop(model, lambda name: False, work)
    every = flop(model, lambda name: True, work)
    needed = flop(model, competing.__contains__, work)
    weights = every - flop(model, (names - competing).__contains__, work)
    return np.array([forward, needed - forward - weights, weights, every - needed])


def figures(name: str, device: str, pairs: int) -> dict[str, float]:
    """Return GFLOP per pair: of each part, of all, and the least."""
    model = shapes_of(name)
    vision, text = vision_tower(model), text_tower(model)
    size = open_clip.get_model_config(name)["vision_cfg"]["image_size"]
    pixels = torch.empty(1, 3, size, size, device="meta")
    images = counts(model, lambda: vision.features(pixels, pixels))
    tokens = torch.from_numpy(random_tokens(pairs, model.context_length, model.vocab_size, 0))
    tokens, lengths = tokens.long(), text.lengths(tokens)
    # A text's operations are at most quadratic in its length (attention), so three lengths
    # determine all others.
    known = lengths.unique()
    known = known[[0, len(known) // 2, -1]].unique().tolist()
    alone = [text.trim(tokens[lengths == each][:1]).to("meta") for each in known]
    counted = [counts(model, partial(text.features, short, short)) for short in alone]
    powers = np.linalg.solve(np.vander(known, increasing=True), counted)

    def of_length(length: int) -> np.ndarray:
        return length ** np.arange(len(known)) @ powers

    together = max(PassOptions().batch_size, BEST_PAIRS[device])
    run_at = [
        (len(rows), int(lengths[start : start + together][rows].max()))
        for start in range(0, pairs, together)
        for rows in by_length(text, tokens[start : start + together], TEXTS_PER_FORWARD[device])
    ]
    texts = sum(rows * of_length(length) for rows, length in run_at) / pairs
    own = sum(of_length(length) for length in lengths.tolist()) / pairs
    parts = images + texts
    least = (images + own)[:-1].sum()
    shown = dict(zip(PARTS, parts, strict=True)) | {"all": parts.sum(), "least": least}
    shown = {part: round(float(number) / 1e9, 2) for part, number in shown.items()}
    return shown | {"all / least": round(float(parts.sum() / least), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--device", default="cpu", choices=sorted(BEST_PAIRS))
    parser.add_argument("--pairs", type=int, default=8192)
    args = parser.parse_args()
    for name in args.models:
        print(json.dumps({"model": name, **figures(name, args.device, args.pairs)}), flush=True)


if __name__ == "__main__":
    main()
