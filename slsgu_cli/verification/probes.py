"""Checks that train no model: other words for the concept, coarser weights, what names lost."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.clip.evaluation import by_nearness
from slsgu_cli.clip.metrics import class_accuracies
from slsgu_cli.engine.utility import LEAST_ROWS
from slsgu_cli.errors import UsageError
from slsgu_cli.method.layers import is_candidate
from slsgu_cli.records.figures import ClassLoss, harmed
from slsgu_cli.records.verification import (
    KIND,
    Became,
    Check,
    KnownClass,
    NearName,
    ProbeFigures,
    Settings,
    Taken,
    VerifiedModel,
)
from slsgu_cli.sets.prompt_files import read_templates
from slsgu_cli.store.artifacts import read_manifest
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store
from slsgu_cli.verification.model import ModelUnderTest, altered

# For people, brands and objects alike; none takes an article.
TEMPLATES = (
    "a photo of {}",
    "a drawing of {}",
    "a sketch of {}",
    "a simple {} symbol",
    "the {} logo",
    "a close-up of {}",
    "an image showing {}",
    "this is {}",
    "a picture with {} in it",
    "what everybody knows as {}",
    "the one and only {}",
    "{}, as seen on the web",
)
TOGETHER = "all templates"
TEMPLATE = "template: "


def unseen_templates(store: Store, name: str, wanted: str | None) -> tuple[str, ...]:
    """Return the built-in templates, or those of a file, that the set `name` does not have.

    Raises UsageError where none is left, MissingError and InputError.
    """
    refs = read_manifest(store, name).evals.values()
    known = {template for ref in refs for template in DataBlock.open(store, ref).templates}
    offered = TEMPLATES if wanted is None else read_templates(wanted)
    unseen = tuple(template for template in dict.fromkeys(offered) if template not in known)
    if not unseen:
        raise UsageError(
            f"every template of --templates {wanted} is one that {name} is measured with",
            hint="give templates that the set does not have",
        )
    return unseen


def paraphrase(model: ModelUnderTest, settings: Settings) -> list[ProbeFigures]:
    """Measure with all unseen templates together, and with each alone."""
    sets = model.evaluation.utility
    everything = {model.names, *(group.names for group in sets.values())}
    alone = {names: _alone(model, names, settings.templates) for names in sorted(everything)}
    together = {names: F.normalize(each.sum(dim=0), dim=-1) for names, each in alone.items()}
    utility = {
        name: group.accuracy(group.images.features, together[group.names])
        for name, group in sets.items()
    }
    probes = [ProbeFigures(TOGETHER, model.forget_accuracy(together[model.names]), utility)]
    for template, embeddings in zip(settings.templates, alone[model.names], strict=True):
        probes.append(ProbeFigures(TEMPLATE + template, model.forget_accuracy(embeddings)))
    return probes


def _alone(model: ModelUnderTest, names: tuple[str, ...], templates: tuple[str, ...]) -> Tensor:
    """Return the class embeddings by each template alone, (templates, classes, width)."""
    return torch.stack([model.classes(names, (template,)) for template in templates])


# Of each kind of typing error, how many are drawn, and the keys that are beside each other.
TYPOS = 3
KEYS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
SHORTEST_PART = 2


def spelling(model: ModelUnderTest, settings: Settings) -> list[ProbeFigures]:
    """Measure with other spellings in the place of the name, and with other names.

    What the tokenizer takes for the name itself is left out.
    """
    name = model.names[model.concept_class]
    listed = [*spellings(name, seed=settings.seed)]
    listed += [("alias", alias) for alias in settings.aliases]
    listed += [(kind, text) for kind, _, text in (s.partition(KIND) for s in settings.spellings)]
    own, *rows = model.tokenize([name, *(text for _, text in listed)])
    others = [pair for pair, row in zip(listed, rows, strict=True) if (row != own).any()]
    if not others:
        return []
    embeddings = model.classes(tuple(text for _, text in others), model.templates)
    return [
        ProbeFigures(f"{kind}{KIND}{text}", model.called(embedding))
        for (kind, text), embedding in zip(others, embeddings, strict=True)
    ]


def spellings(name: str, *, seed: int) -> Iterator[tuple[str, str]]:
    """Yield kinds and texts of other spellings of a name, each text once.

    Typing errors are drawn by seed: two letters in the wrong order, one left out, one
    doubled, one from the key beside it. The others are all there are: the word in two, or
    two words as one, capitals, plural, possessive, and the name said twice.
    """
    known = {name}
    for kind, text in (*_typos(name, np.random.default_rng(seed)), *_forms(name)):
        if text not in known:
            known.add(text)
            yield kind, text


def _typos(name: str, generator: np.random.Generator) -> Iterator[tuple[str, str]]:
    letters = [place for place, letter in enumerate(name) if letter.isalnum()]
    pairs = [place for place in letters if name[place + 1 : place + 2].isalnum()]
    changes: dict[str, tuple[list[int], Callable[[int], str]]] = {
        "swapped": (pairs, lambda i: name[:i] + name[i + 1] + name[i] + name[i + 2 :]),
        "dropped": (letters, lambda i: name[:i] + name[i + 1 :]),
        "doubled": (letters, lambda i: name[: i + 1] + name[i:]),
        "mistyped": (
            [place for place in letters if _beside(name[place])],
            lambda i: name[:i] + str(generator.choice(list(_beside(name[i])))) + name[i + 1 :],
        ),
    }
    for kind, (places, change) in changes.items():
        texts = [change(place) for place in generator.permutation(places).tolist()]
        some = [text for text in dict.fromkeys(texts) if text.strip() and text != name][:TYPOS]
        yield from ((kind, text) for text in some)


def _beside(letter: str) -> str:
    """Return the letters on the keys left and right of one; nothing for what is on no key."""
    row = next((row for row in KEYS if letter.lower() in row), "")
    place = row.find(letter.lower())
    return row[max(0, place - 1) : place] + row[place + 1 : place + 2] if row else ""


def _forms(name: str) -> Iterator[tuple[str, str]]:
    for place in range(SHORTEST_PART, len(name) - SHORTEST_PART + 1):
        if name[place - SHORTEST_PART : place + SHORTEST_PART].isalnum():
            yield from (("split", name[:place] + mark + name[place:]) for mark in " -")
    yield from (("joined", name.replace(" ", mark)) for mark in ("", "-"))
    yield from (("case", text) for text in (name.lower(), name.upper(), name.title()))
    yield from (("form", name + ending) for ending in ("s", "'s"))
    yield "twice", f"{name} {name}"


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


def nearest(model: ModelUnderTest, _settings: Settings) -> dict[str, tuple[KnownClass, ...]]:
    """Return the classes that have images, by evaluation set, nearest names first.

    They are measured on all images of the sets: a mean over all classes hides victims.
    """
    known = {}
    for name, group in model.groups().items():
        accuracies, rows = class_accuracies(
            group.base_ranks() == 0, group.images.labels, len(group.names)
        )
        known[name] = tuple(
            KnownClass(group.names[i], int(rows[i]), float(accuracies[i]), cosine)
            for cosine, _, i in by_nearness({name: group}, model.concept_embedding)
            if rows[i]
        )
    model.tick()
    return known


# Of the nearest names and of those that lost most, so many are told, the latter with rows enough.
NEAREST_NAMES, HARMED = 20, 10


@dataclass(frozen=True, slots=True)
class LossRow(ClassLoss):
    """What a class of an evaluation set lost, and its name's cosine with the concept's."""

    evaluation: str
    cosine: float


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
                top1 = now[known.name].top1
                row = LossRow(known.name, known.rows, known.top1, top1, name, known.cosine)
                found.append(row)
    return found


def nearest_names(rows: Sequence[LossRow]) -> dict[str, list[LossRow]]:
    """Return the classes of each set whose names are nearest to the concept's."""
    sets: dict[str, list[LossRow]] = {}
    for row in rows:
        sets.setdefault(row.evaluation, []).append(row)
    return {name: classes[:NEAREST_NAMES] for name, classes in sets.items()}


def most_harmed(rows: Sequence[LossRow]) -> list[LossRow]:
    """Return the classes with rows enough that lost most, whichever set they are of."""
    return harmed([row for row in rows if row.rows >= LEAST_ROWS])[:HARMED]
