"""Checks that train no model: coarser weights, other names and what they lost, membership."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.checkpoints.layers import is_candidate
from slsgu_cli.clip.zeroshot import class_accuracies
from slsgu_cli.method.trial import LEAST_ROWS
from slsgu_cli.records.figures import ClassLoss
from slsgu_cli.records.verification import (
    Attack,
    Became,
    Check,
    KnownClass,
    NearName,
    ProbeFigures,
    Settings,
    Taken,
    VerifiedModel,
)
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.verification.model import ModelUnderTest, altered

# Of int8 and of int4, to either side of zero; of int4 between its least and largest weight.
LEVELS, FOUR_BITS, STEPS = 127, 7, 15
GROUPS = (64, 128)
NF4_BLOCK = 64
# The largest number of e4m3, which has no infinity.
FP8, FP8_LARGEST = torch.float8_e4m3fn, 448.0


def to_int8(weight: Tensor, axis: int) -> Tensor:
    """Return weights rounded to 255 levels for each output channel, as floating point.

    Symmetric, to nearest: channel c becomes s_c * round(w / s_c) with s_c = max |w| / 127,
    so no weight moves by more than s_c / 2. `axis` is that of the output channels.
    """
    scale = _largest(weight, axis) / LEVELS
    # A channel of zeros stays one.
    return torch.where(scale > 0, (weight / scale).round() * scale, weight)


def to_fp8(weight: Tensor, axis: int) -> Tensor:
    """Return weights rounded to e4m3, each output channel scaled so that its largest is 448."""
    scale = _largest(weight, axis) / FP8_LARGEST
    # Not every device has the type; the largest may come out a little above 448.
    scaled = (weight / scale).clamp(-FP8_LARGEST, FP8_LARGEST).cpu().to(FP8)
    return torch.where(scale > 0, scaled.to(weight.device, weight.dtype) * scale, weight)


def _largest(weight: Tensor, axis: int) -> Tensor:
    others = [dimension for dimension in range(weight.ndim) if dimension != axis]
    return weight.abs().amax(dim=others, keepdim=True)


def to_int4(weight: Tensor, axis: int, *, group: int, symmetric: bool) -> Tensor:
    """Return weights rounded to 4 bits, `group` inputs of an output channel at a time.

    Symmetric: s * round(w / s), s = max |w| / 7. Asymmetric: s * (clamp(round(w / s) + z,
    0, 15) - z), with s = (max - min) / 15 and z = round(-min / s), zero always in the range.
    """

    def rounded(groups: Tensor) -> Tensor:
        if symmetric:
            scale = groups.abs().amax(dim=-1, keepdim=True) / FOUR_BITS
            levels = (groups / scale).round()
        else:
            least = groups.amin(dim=-1, keepdim=True).clamp(max=0)
            scale = (groups.amax(dim=-1, keepdim=True).clamp(min=0) - least) / STEPS
            zero = (-least / scale).round()
            levels = ((groups / scale).round() + zero).clamp(0, STEPS) - zero
        return torch.where(scale > 0, levels * scale, groups)

    return _by_group(weight, axis, group, rounded)


def nf4_levels() -> Tensor:
    """Return NF4's 16 numbers: quantiles of a normal distribution, scaled to -1 ... 1.

    Eight of its positive half and seven of its negative one, evenly spread in probability,
    and 0 (QLoRA, arXiv 2305.14314; the outermost probability is that of its code).
    """
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    inverse = NormalDist().inv_cdf

    def half(count: int) -> list[float]:
        spread = (outermost - 0.5) / count
        return [inverse(outermost - place * spread) for place in range(count)]

    values = [-value for value in half(7)] + [0.0] + half(8)[::-1]
    return torch.tensor(values) / max(values)


def to_nf4(weight: Tensor, axis: int) -> Tensor:
    """Return weights rounded to the nearest NF4 number times the largest of their block.

    Blocks are of 64 inputs of an output channel; their scales are not rounded themselves.
    """
    levels = nf4_levels().to(weight.device)
    between = (levels[1:] + levels[:-1]) / 2

    def rounded(blocks: Tensor) -> Tensor:
        scale = blocks.abs().amax(dim=-1, keepdim=True)
        nearest = levels[torch.bucketize((blocks / scale).contiguous(), between)]
        return torch.where(scale > 0, nearest * scale, blocks)

    return _by_group(weight, axis, NF4_BLOCK, rounded)


def _by_group(weight: Tensor, axis: int, size: int, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Round weights (channels, groups, size) at a time; a last group may have fewer inputs."""
    channels = weight.movedim(axis, 0)
    rows = channels.flatten(1)
    # Zeros change neither a group's largest weight nor a range that has zero in it.
    padded = F.pad(rows, (0, -rows.shape[1] % size))
    out = rounded(padded.reshape(len(rows), -1, size)).flatten(1)[:, : rows.shape[1]]
    return out.reshape(channels.shape).movedim(0, axis)


def output_axis(name: str) -> int:
    """Return the axis of output channels: 1 for projections that stand right of their input."""
    return 0 if name.endswith("weight") else 1


def quantise(model: ModelUnderTest, _settings: Settings) -> list[ProbeFigures]:
    """Measure with the weight matrices in 8 and 4 bits, then with all parameters in 16.

    Utility is measured in `COSTLY` alone: what may cost some.
    """

    def matrices(change: Callable[[Tensor, int], Tensor]) -> Callable[[str, Tensor], Tensor]:
        def of(name: str, values: Tensor) -> Tensor:
            matrix = values.ndim > 1 and is_candidate(name)
            return change(values, output_axis(name)) if matrix else values

        return of

    def through(kind: torch.dtype) -> Callable[[str, Tensor], Tensor]:
        return lambda _name, values: values.to(kind).to(values.dtype)

    changes = {"int8": matrices(to_int8), "fp8": matrices(to_fp8)}
    for size in GROUPS:
        for kind, symmetric in (("", True), (" asymmetric", False)):
            coarse = partial(to_int4, group=size, symmetric=symmetric)
            changes[f"int4{kind}, groups of {size}"] = matrices(coarse)
    changes |= {"nf4": matrices(to_nf4), "fp16": through(torch.float16)}
    changes["bf16"] = through(torch.bfloat16)
    probes = []
    for name, change in changes.items():
        with altered(model.module, change):
            probes.append(ProbeFigures(name, *model.figures(utility=name in COSTLY)))
    return probes


# The kinds of rounding whose utility is measured, one of each size.
COSTLY = ("int8", "int4, groups of 128", "nf4")
SHOWN = 5


def neighbours(model: ModelUnderTest, _settings: Settings) -> Became:
    """Return the names nearest to the concept's, and the first guesses for its images."""
    group = model.evaluation.forget
    cosines = group.prompts.embeddings @ model.concept_embedding
    order = [i for i in torch.argsort(-cosines, stable=True).tolist() if i != model.concept_class]
    guesses = (group.images.features @ group.prompts.embeddings.T).argmax(dim=1)
    counts = torch.bincount(guesses, minlength=len(group.names))
    frequent = torch.argsort(-counts, stable=True)[:SHOWN].tolist()
    return Became(
        tuple(NearName(group.names[i], float(cosines[i])) for i in order[:SHOWN]),
        tuple(Taken(group.names[i], int(counts[i])) for i in frequent if counts[i]),
        len(group.images),
    )


# Of the membership attack.


def nearest(model: ModelUnderTest, _settings: Settings) -> dict[str, tuple[KnownClass, ...]]:
    """Return the classes that have images, by evaluation set, nearest names first.

    They are measured on all images of the sets: a mean over all classes hides victims.
    """
    known = {}
    for name, group in model.groups().items():
        accuracies, rows = class_accuracies(
            group.base_ranks(), group.images.labels, len(group.names)
        )
        cosines = group.prompts.embeddings @ model.concept_embedding
        figures = zip(
            group.names, rows.tolist(), accuracies.tolist(), cosines.tolist(), strict=True
        )
        classes = [KnownClass(*each) for each in figures if each[1]]
        known[name] = tuple(sorted(classes, key=lambda each: (-each.cosine, each.name)))
    model.tick()
    return known


# Of the nearest names and of those that lost most, so many are told, the latter with rows enough.
NEAREST_NAMES, HARMED = 20, 10


@dataclass(frozen=True, slots=True)
class LossRow:
    """What a class of an evaluation set lost, and its name's cosine with the concept's."""

    evaluation: str
    cosine: float
    loss: ClassLoss


def losses(original: VerifiedModel, other: VerifiedModel) -> list[LossRow]:
    """Return what each class lost, set by set, the name nearest to the concept's first.

    Nearness is that of the original's class embeddings.
    """
    before, after = original.finding(Check.NEAREST), other.finding(Check.NEAREST)
    found = []
    for name, classes in ((before and before.classes) or {}).items():
        now = {known.name: known for known in ((after and after.classes) or {}).get(name, ())}
        for known in classes:
            if known.name in now:
                loss = ClassLoss(known.name, known.rows, known.top1, now[known.name].top1)
                found.append(LossRow(name, known.cosine, loss))
    return found


def nearest_names(rows: Sequence[LossRow]) -> dict[str, list[LossRow]]:
    """Return the classes of each set whose names are nearest to the concept's."""
    sets: dict[str, list[LossRow]] = {}
    for row in rows:
        sets.setdefault(row.evaluation, []).append(row)
    return {name: classes[:NEAREST_NAMES] for name, classes in sets.items()}


def harmed(rows: Sequence[LossRow]) -> list[LossRow]:
    """Return the classes with rows enough that lost most, whichever set they are of."""
    lost = [row for row in rows if row.loss.rows >= LEAST_ROWS and row.loss.lost > 0]
    return sorted(lost, key=lambda row: (-row.loss.lost, row.loss.name))[:HARMED]


Values = npt.NDArray[np.float64]
Rows = npt.NDArray[np.integer]
SEEDS, SPLITS = 10, 10
TEST_SHARE = 0.1
CLIP = 100.0
TOLERANCE = 1e-10
ITERATIONS = 100
PAIRS = 32
FEWEST = 2
HELD_OUT, OTHERS, RETAINED = "held out", "other classes", "retain set"


def membership(model: ModelUnderTest, settings: Settings) -> list[Attack]:
    """Attack the forget set by either figure, against held-out pairs and against the retain set.

    Held-out pairs are the concept's images in the evaluation set. Where no set has the
    concept, they are images of other classes. A side of one pair cannot be attacked.
    """
    forget, retain = model.forget, model.retain
    against, block, rows = _outside(model, settings)
    drawn = np.random.default_rng(settings.seed).permutation(retain.rows)[: settings.rows]
    captioned = all(block.captions[row] for row in rows)
    sides = {
        against: (block, rows, _words(model, block, rows, captioned)),
        RETAINED: (retain, np.sort(drawn), retain.tokens[np.sort(drawn)]),
    }
    member_rows = np.arange(forget.rows)
    attacks = []
    for name, side in sides.items():
        # Other pairs without captions get prompts; then the members get theirs too, or
        # the wording alone would tell the two apart.
        prompted = name == against and not captioned
        words = forget.tokens
        if prompted:
            words = _prompts(model, [model.names[model.concept_class]] * forget.rows)
        size = min(PAIRS, len(member_rows), len(side[1]))
        if size < FEWEST:
            continue
        members = _figures(model, forget, member_rows, words, size)
        others = _figures(model, *side, size)
        for figure, values in members.items():
            accuracies = attack(values, others[figure], seed=settings.seed)
            attacks.append(
                Attack(
                    figure,
                    name,
                    float(accuracies.mean()),
                    float(accuracies.std()),
                    len(values),
                    len(others[figure]),
                )
            )
    return attacks


def _outside(model: ModelUnderTest, settings: Settings) -> tuple[str, DataBlock, Rows]:
    """Return what stands for data outside the forget set, and its rows."""
    group = model.evaluation.forget
    if model.manifest.forget_eval is not None:
        return HELD_OUT, group.images.block, group.images.rows
    first = next(iter(model.evaluation.utility.values())).images
    return OTHERS, first.block, first.rows[: settings.rows]


def _words(
    model: ModelUnderTest, block: DataBlock, rows: Rows, captioned: bool
) -> npt.NDArray[np.int32]:
    """Return the captions of some evaluation rows, or prompts with their classes."""
    if captioned:
        return model.tokenize([block.captions[row] for row in rows])
    return _prompts(model, [block.class_names[block.labels[row]] for row in rows])


def _prompts(model: ModelUnderTest, names: Sequence[str]) -> npt.NDArray[np.int32]:
    return model.tokenize([model.templates[0].replace("{}", name) for name in names])


def _figures(
    model: ModelUnderTest, block: DataBlock, rows: Rows, tokens: npt.NDArray[np.integer], size: int
) -> dict[str, Values]:
    """Return the cosine and the contrastive loss of each pair, in mini-batches of `size`.

    The last mini-batch is filled up from the first rows: the loss depends on its size.
    """
    v = model.image_features(block.take(rows))
    t = model.text_features(tokens)
    model.tick()
    logits = model.scale * v @ t.T
    losses = torch.empty(len(v), device=v.device)
    for start in range(0, len(v), size):
        batch = torch.arange(start, start + size, device=v.device) % len(v)
        square = logits[batch][:, batch]
        truth = torch.arange(size, device=v.device)
        each = F.cross_entropy(square, truth, reduction="none")
        each = each + F.cross_entropy(square.T, truth, reduction="none")
        here = min(size, len(v) - start)
        losses[start : start + here] = each[:here] / 2
    cosines = (v * t).sum(dim=1)
    return {"cosine": cosines.double().cpu().numpy(), "loss": losses.double().cpu().numpy()}


def attack(members: Values, others: Values, *, seed: int = 0) -> Values:
    """Return the accuracy in percent for each of ten seeds, the mean over ten splits each.

    From both sides as many values are drawn as the smaller one has, so 50 is chance.
    """
    size = min(len(members), len(others))
    accuracies = []
    for number in range(seed, seed + SEEDS):
        generator = np.random.default_rng(number)
        drawn = [generator.permutation(side)[:size] for side in (others, members)]
        values = np.clip(np.concatenate(drawn), -CLIP, CLIP)
        truth = np.repeat([0.0, 1.0], size)
        scores = [_score(values, truth, test) for test in _splits(size, generator)]
        accuracies.append(100 * float(np.mean(scores)))
    return np.array(accuracies)


def fit(values: Values, truth: Values) -> tuple[float, float]:
    """Return slope and intercept of the logistic regression of `truth` (0 or 1) on `values`.

    Minimises slope^2 / 2 plus the sum of the log losses, as scikit-learn does by default,
    by Newton's method with step halving: the problem is convex and has two unknowns.
    """
    w = np.zeros(2)
    design = np.stack([values, np.ones_like(values)], axis=1)
    penalty = np.diag([1.0, 0.0])
    loss = _loss(w, design, truth)
    for _ in range(ITERATIONS):
        chance = _probability(design @ w)
        slope = design.T @ (chance - truth) + penalty @ w
        curvature = (design * (chance * (1 - chance))[:, None]).T @ design + penalty
        step = np.linalg.lstsq(curvature, slope, rcond=None)[0]
        while (moved := _loss(w - step, design, truth)) > loss and np.abs(step).max() > TOLERANCE:
            step = step / 2
        w, loss = w - step, moved
        if np.abs(step).max() <= TOLERANCE * max(1.0, float(np.abs(w).max())):
            break
    return float(w[0]), float(w[1])


def _loss(w: Values, design: Values, truth: Values) -> float:
    z = design @ w
    return float(0.5 * w[0] ** 2 + np.sum(np.logaddexp(0, z) - truth * z))


def _probability(z: Values) -> Values:
    return np.exp(-np.logaddexp(0, -z))


def _score(values: Values, truth: Values, test: npt.NDArray[np.bool_]) -> float:
    slope, intercept = fit(values[~test], truth[~test])
    return float(np.mean((slope * values[test] + intercept > 0) == truth[test]))


def _splits(size: int, generator: np.random.Generator) -> list[npt.NDArray[np.bool_]]:
    """Return which of two times `size` values are tested on, a tenth of each side.

    Where the tenth is an odd number, one side, drawn anew each time, has one value more.
    """
    total = int(np.ceil(TEST_SHARE * 2 * size))
    masks = []
    for _ in range(SPLITS):
        more = int(generator.integers(2))
        counts = [total // 2 + (total % 2 and more == side) for side in range(2)]
        mask = np.zeros(2 * size, dtype=bool)
        for side, count in enumerate(counts):
            mask[side * size + generator.permutation(size)[:count]] = True
        masks.append(mask)
    return masks
