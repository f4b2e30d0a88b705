"""Zero-shot classification with weights that may be edited, and its figures."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from slsgu_cli.checkpoints.layers import Layer
from slsgu_cli.clip import processes
from slsgu_cli.clip.inputs import (
    IMAGES_PER_FORWARD,
    TEXTS_PER_FORWARD,
    Activations,
    CacheBudget,
    Pixels,
    by_beginning,
    by_length,
    even_spans,
    packed,
    room,
    staged,
)
from slsgu_cli.clip.towers import EMBED, SplitTower
from slsgu_cli.errors import NotFiniteError
from slsgu_cli.prefetch import prefetch
from slsgu_cli.store.blocks import DataBlock, JoinedRows
from slsgu_cli.text import listed

Ints = npt.NDArray[np.integer]

TOP = 5


def ranks_of_truth(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each row how many classes score strictly above the true one.

    A class that ties with the truth counts as above it when its index is smaller, which
    is the order in which `topk` on sorted columns would list them. `logits` is (rows,
    classes); rank 0 is a top-1 hit, a rank below 5 a top-5 hit. Raises NotFiniteError where
    a logit is not finite: that an image is not recognised by it means nothing.
    """
    require_finite(logits, "cosines")
    truth = logits.gather(1, labels.unsqueeze(1))
    columns = torch.arange(logits.shape[1], device=logits.device)
    above = (logits > truth) | ((logits == truth) & (columns < labels.unsqueeze(1)))
    return above.sum(dim=1)


def require_finite(
    values: Tensor, what: str, rows: Ints | None = None, chosen: Tensor | None = None
) -> Tensor:
    """Return `values` (N, width) as they are. Raises NotFiniteError naming rows that are not.

    `rows` are what rows are called, by their places; `chosen` the places of those there are.
    """
    if bool(torch.isfinite(values).all()):
        return values
    broken = (~torch.isfinite(values)).any(dim=1).nonzero().squeeze(1)
    places = (broken if chosen is None else chosen[broken]).cpu().numpy()
    named = listed([str(row) for row in (places if rows is None else rows[places])])
    raise NotFiniteError(
        f"{len(broken)} of {len(values)} {what} are not finite (rows {named})",
        hint="use weights without NaN and infinite values",
    )


def require_finite_elsewhere(model: nn.Module, tokens: Tensor | None) -> None:
    """Look at weights that need not show in features: tokens without a prompt, scales.

    Raises NotFiniteError.
    """
    scales = [getattr(model, name, None) for name in ("logit_scale", "logit_bias")]
    for values in (tokens, *scales):
        if values is not None:
            whole = processes.unsharded(values.detach())
            require_finite(whole.reshape(len(whole) if whole.ndim else 1, -1), "weights")


@contextmanager
def counted_by(what: str, *, hint: str | None = None) -> Iterator[None]:
    """Say which model's features are not finite, and what mends it, for the length of a block."""
    try:
        yield
    except NotFiniteError as error:
        raise NotFiniteError(f"{what}: {error.message}", hint=hint or error.hint) from error


@contextmanager
def naming_layers(model: nn.Module) -> Iterator[None]:
    """Say which layers of a model are not finite, for the length of a block.

    Weights are looked at only once features are not finite.
    """
    try:
        yield
    except NotFiniteError as error:
        weights = ((name, processes.unsharded(p)) for name, p in model.named_parameters())
        counts = {name: int((~torch.isfinite(p)).sum()) for name, p in weights}
        words = [f"{count} in {name}" for name, count in counts.items() if count]
        found = f"; weights that are not: {listed(words)}" if words else ""
        raise NotFiniteError(error.message + found, hint=error.hint) from error


def gaps(logits: Tensor, labels: Tensor) -> Tensor:
    """Return for each row by how much the true class stays below the fifth best other.

    Positive exactly if it is not among the row's first five, ties aside. Of fewer than five
    others, the least counts.
    """
    truth = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf"))
    fifth = others.topk(min(TOP, logits.shape[1] - 1), dim=1).values[:, -1]
    return fifth - truth


def least_gap(logits: Tensor, labels: Tensor) -> float:
    """Return by how much the name stays below the fifth best other, where it comes closest."""
    return float(gaps(logits, labels).min())


def accuracies(ranks: Tensor) -> tuple[float, float]:
    """Return top-1 and top-5 accuracy in percent; NaN without rows."""
    if ranks.numel() == 0:
        return float("nan"), float("nan")
    hits = [(ranks < k).double().mean().item() * 100 for k in (1, TOP)]
    return hits[0], hits[1]


def class_accuracies(hits: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Return each class's top-1 accuracy in percent, NaN without rows, and how many rows it has.

    `hits` are whether, or how likely, each row is one; they and `labels` are (rows,), both
    results (classes,), the accuracies in fp64.
    """
    rows = torch.bincount(labels, minlength=classes)
    return 100 * torch.bincount(labels, weights=hits.double(), minlength=classes) / rows, rows


def class_means(features: Tensor, owners: Tensor, classes: int) -> Tensor:
    """Return the normalised mean of each class's prompt features, shape (classes, width).

    `features` are unit vectors (prompts, width) and `owners` the class of each.
    """
    sums = torch.zeros(classes, features.shape[1], dtype=features.dtype, device=features.device)
    return torch.nn.functional.normalize(sums.index_add_(0, owners, features), dim=-1)


def cosine_matrix(images: Tensor, labels: Tensor, texts: Tensor) -> Tensor:
    """Return the mean cosine of each class's images with each class's name (Figure 3)."""
    means = torch.zeros(texts.shape[0], images.shape[1], device=images.device)
    counts = torch.zeros(texts.shape[0], device=images.device)
    means.index_add_(0, labels, images)
    counts.index_add_(0, labels, torch.ones_like(labels, dtype=counts.dtype))
    return (means / counts.clamp(min=1).unsqueeze(1)) @ texts.T


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Return the squared Fréchet distance of normal distributions fitted to features.

    |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)), as FID has it; both are (rows, width), of at
    least two rows. The trace of the root is the sum of the singular values of A1 A2ᵀ, where
    A are the centred features over the root of rows - 1: no root is taken.
    """
    parts = [rows.double() for rows in (first, second)]
    means = [rows.mean(dim=0) for rows in parts]
    spread = [
        (rows - mean) / (len(rows) - 1) ** 0.5 for rows, mean in zip(parts, means, strict=True)
    ]
    shared = torch.linalg.svdvals(spread[0] @ spread[1].T).sum()
    apart = (means[0] - means[1]).square().sum()
    within = sum(rows.square().sum() for rows in spread)
    return float((apart + within - 2 * shared).clamp(min=0))


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """Return by how much the true class leads the best other one; negative if it does not."""
    truth = logits.gather(1, labels.unsqueeze(1)).squeeze(1)
    others = logits.scatter(1, labels.unsqueeze(1), float("-inf"))
    return truth - others.amax(dim=1)


# Images that are read together.
ROWS_PER_READ = 64

# Of prompts that are packed by their beginnings.
PROMPTS_PER_FORWARD = {"cpu": 1024, "cuda": 8192, "mps": 2048}

# Products of fewer rows are computed by other kernels, with other last digits.
LEAST_ROWS = 8


# Of images that few edits look at, what enters a stage is kept where it saves this share.
LEAST_SAVED = 0.02


@dataclass(slots=True)
class _Prompts:
    """Some of the prompts of a side, in the tower that they run through together."""

    rows: Tensor
    tower: SplitTower
    inputs: Tensor
    # What entered the stages.
    kept: dict[int, Tensor] = field(init=False, default_factory=dict)

    def entering(self, stage: int) -> Tensor:
        """Return what entered a stage that is kept, or the prompts."""
        return self.kept.get(stage, self.inputs)


@dataclass(slots=True)
class PromptSide:
    """The prompts of one list of classes, and their class embeddings.

    `tokens` is (prompts, context) and `owners` the class of each prompt. Prompts run in groups
    of like beginnings, which run once; where the tower cannot do that, in groups of similar
    lengths, each at its own length. States are kept a group at a time.
    """

    tower: SplitTower
    tokens: Tensor
    owners: Tensor
    classes: int
    embeddings: Tensor = field(init=False)
    _groups: list[_Prompts] = field(init=False)

    def __post_init__(self) -> None:
        device = self.tokens.device
        size = PROMPTS_PER_FORWARD[device.type]
        size = max(1, min(size, -(-len(self.tokens) // processes.count())))
        alike = by_beginning(self.tokens, size)
        towers = [packed(self.tower, self.tokens[rows]) for rows in alike]
        self._groups = [
            _Prompts(rows, tower, self.tokens[rows])
            for rows, tower in zip(alike, towers, strict=True)
            if tower is not None
        ]
        if not self._groups:
            size = TEXTS_PER_FORWARD[device.type]
            groups = [rows.to(device) for rows in by_length(self.tower, self.tokens, size)]
            self._groups = [
                _Prompts(rows, self.tower, self.tower.trim(self.tokens[rows])) for rows in groups
            ]

    def base_pass(self, stages: Collection[int], budget: CacheBudget) -> None:
        """Compute the class embeddings, keeping what enters `stages`."""
        features, groups = [], processes.dealt(self._groups)
        turns = in_step(self.tower, [(EMBED, ()) for _ in groups], self._run_along)
        for _, group in zip(turns, groups, strict=True):
            entering, outputs = _through(group.tower, group.inputs, stages)
            group.kept = {s: x for s, x in entering.items() if budget.take(x.nbytes)}
            features.append(outputs)
        self.embeddings = self._means(features, groups)

    def after_edit(self, stage: int) -> Tensor:
        """Return the class embeddings with the weights as they are now, from `stage` on."""
        features, groups = [], []
        for group in processes.dealt(self._groups):
            start = max((s for s in group.kept if s <= stage), default=EMBED)
            groups.append((start, group))
        # The deepest first, as all processes take them.
        groups.sort(key=itemgetter(0), reverse=True)
        shapes = [(start, group.entering(start).shape[1:]) for start, group in groups]
        turns = in_step(self.tower, shapes, self._run_along)
        for _, (start, group) in zip(turns, groups, strict=True):
            run = partial(resumed, group.tower, group.entering(start), group.inputs, start)
            features.append(group.tower.run(run, start))
        return self._means(features, [group for _, group in groups])

    def release(self) -> None:
        """Release what entered stages."""
        for group in self._groups:
            group.kept.clear()

    def _run_along(self, start: int, shape: Sequence[int]) -> None:
        """Run the tower from a stage, which `shape` enters of each row, as others do."""
        device = self.tokens.device
        if start == EMBED:
            x = inputs = self.tower.trim(self.tokens[:1])
        else:
            length = shape[0] if len(shape) > 1 else 1
            x = torch.zeros(1, *shape, device=device)
            inputs = torch.zeros(1, length, dtype=torch.long, device=device)
        self.tower.run(partial(self.tower.features, x, inputs, start), start)

    def _means(self, features: list[Tensor], groups: Sequence[_Prompts]) -> Tensor:
        rows = torch.cat([group.rows for group in self._groups])
        order = [group.rows for group in groups]
        whole = in_order(features, order, str(self.tokens.device))[rows]
        means = class_means(whole, self.owners[rows], self.classes)
        return require_finite(means, "class embeddings")


@dataclass(slots=True)
class ImageSide:
    """Some labelled rows of data blocks, and their image features.

    Features of the original model may be `known` before it runs. Nothing runs then, and what
    enters stages is kept of rows as they are looked at.
    """

    tower: SplitTower
    block: DataBlock | JoinedRows
    rows: Ints
    labels: Tensor
    normalize: Pixels
    known: Tensor | None = field(init=False, default=None)
    features: Tensor = field(init=False)
    _kept: dict[int, Activations] = field(init=False, default_factory=dict)
    # The margins by which rows are kept that are looked at; None where none are kept any more.
    _leads: Tensor | None = field(init=False, default=None)
    # Which of the rows that the base pass ran over these are, where they are a part of them.
    _chosen: Tensor | None = field(init=False, default=None)
    # Of each of those rows its place among those of this process; -1 where another one has it.
    _own: Tensor = field(init=False)

    def __post_init__(self) -> None:
        count, rows = processes.count(), np.arange(len(self.rows))
        size = max(ROWS_PER_READ, self._per_forward)
        size = max(1, min(size, -(-len(rows) // count)))
        mine = rows // size % count == processes.rank()
        self._own = torch.from_numpy(np.where(mine, np.cumsum(mine) - 1, -1)).to(self.labels.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def _per_forward(self) -> int:
        """How many images run together at most."""
        return IMAGES_PER_FORWARD[self.labels.device.type]

    def some(self, chosen: Ints) -> "ImageSide":
        """Return some of the rows, with what the base pass kept of them if it has run."""
        places = torch.from_numpy(chosen).to(self.labels.device)
        rows, labels = self.rows[chosen], self.labels[places]
        part = ImageSide(self.tower, self.block, rows, labels, self.normalize)
        if hasattr(self, "features"):
            part.features = self.features[places]
            part._kept, part._own, part._leads = self._kept, self._own, self._leads
            part._chosen = places if self._chosen is None else self._chosen[places]
        return part

    def part_of(self, whole: "ImageSide") -> "ImageSide | None":
        """Return these rows as a part of others, after their base pass; None where they are not."""
        if self.block.where != whole.block.where or not np.isin(self.rows, whole.rows).all():
            return None
        order = np.argsort(whole.rows)
        return whole.some(order[np.searchsorted(whole.rows, self.rows, sorter=order)])

    def base_pass(
        self,
        stages: Mapping[int, int],
        budget: CacheBudget,
        classes: Tensor | None = None,
        share: float = 1.0,
    ) -> Iterator[int]:
        """Compute the features, keeping what enters `stages`; yield rows as they are done.

        How many edits will resume at each stage says which are worth their bytes, of a share
        of the budget. With class embeddings, of rows that few edits look at, what saves little
        is not kept, and where not all rows fit, those are that the model is least certain of.
        """
        mine = (self._own >= 0).nonzero().squeeze(1)
        self._kept, self._leads = {}, None
        if self.known is not None and classes is not None:
            self.features, self.known = self.known, None
            self._make_room(mine, stages, budget, classes, share)
            yield len(mine)
            return
        features: list[Tensor] = []
        chunks = even_spans(len(mine), self._per_forward)
        turns = in_step(self.tower, [(EMBED, ()) for _ in chunks], self._run_along)
        for _, (start, pixels) in zip(turns, self._pixels(mine), strict=True):
            entering, outputs = _through(self.tower, pixels, self._kept if start else stages)
            features.append(outputs)
            if start == 0:
                least = 0.0 if classes is None else LEAST_SAVED
                self._kept = room(entering, len(mine), budget, stages, share, least)
            if self._kept:
                labels = self.labels[mine[start : start + len(pixels)]]
                lead = torch.zeros_like(labels, dtype=torch.float)
                if classes is not None:
                    lead = margins(outputs @ classes.T, labels)
                places = torch.arange(start, start + len(pixels), device=labels.device)
                for stage, kept in self._kept.items():
                    kept.offer(places, entering[stage], lead)
            yield len(pixels)
        whole = in_order(features, [mine], str(self.labels.device))
        self.features = require_finite(whole, "image features", self.rows)

    def _make_room(
        self,
        mine: Tensor,
        stages: Mapping[int, int],
        budget: CacheBudget,
        classes: Tensor,
        share: float,
    ) -> None:
        """Make room for what enters `stages` of rows, those of the least margins before others."""
        if stages and not len(mine) and self.tower.sharded:
            self._run_along(EMBED, ())
        if not stages or not len(mine):
            return
        for _, pixels in self._pixels(mine[:1]):
            entering, _ = _through(self.tower, pixels, stages)
            self._kept = room(entering, len(mine), budget, stages, share, LEAST_SAVED)
        self._leads = margins(self.features[mine] @ classes.T, self.labels[mine])

    def after_edit(self, stage: int, rows: Tensor | None = None) -> Tensor:
        """Return features with the weights as they are now, of some rows or of all.

        The weights before `stage` are those that the base pass ran with.
        """
        if rows is None:
            rows = torch.arange(len(self), device=self.labels.device)
        else:
            # By way of the host: another process has another card.
            rows = processes.agreed(rows.cpu()).to(rows.device)
        own = self._own[rows if self._chosen is None else self._chosen[rows]]
        parts = self._parts(own, stage)
        order, features = [some for _, some in parts], []
        anew = [some for start, some in parts if start == EMBED]
        pixels = self._pixels(rows[torch.cat(anew)] if anew else rows[:0])
        shapes = [
            (start, () if start == EMBED else self._kept[start].values.shape[1:])
            for start, _ in parts
        ]
        turns = in_step(self.tower, shapes, self._run_along)
        for _, (start, some) in zip(turns, parts, strict=True):
            if start == EMBED:
                _, x = next(pixels)
            else:
                x = self._kept[start].values[self._kept[start].places[own[some]]]
            run = partial(self._features, x, start, stage, own[some])
            features.append(self.tower.run(run, start))
        ordered = in_order(features, order, str(self.labels.device))
        return require_finite(ordered, "image features", self.rows, rows)

    def release(self) -> None:
        """Release what entered stages, of all parts of these rows."""
        self._kept.clear()

    def _parts(self, own: Tensor, stage: int) -> list[tuple[int, Tensor]]:
        """Return from where the rows of this process are run to an edit of `stage`, in parts.

        `own` is of each row its place among those of this process. Of each part come the stage
        that it enters, the deepest first, and its rows' places in `own`.
        """
        parts, waiting = [], own >= 0
        for start in sorted((s for s in self._kept if s <= stage), reverse=True):
            there = waiting & (self._kept[start].places[own.clamp(min=0)] >= 0)
            waiting &= ~there
            parts += [(start, some) for some in _split(there, self._per_forward)]
        return [*parts, *((EMBED, some) for some in _split(waiting, self._per_forward))]

    def _run_along(self, start: int, shape: Sequence[int]) -> None:
        """Run the tower from a stage, which `shape` enters of each row, as others do."""
        if start == EMBED:
            _, x = next(self._pixels(torch.zeros(1, dtype=torch.long)))
        else:
            x = torch.zeros(1, *shape, device=self.labels.device)
        self.tower.run(partial(self.tower.features, x, x, start), start)

    def _features(self, x: Tensor, start: int, stage: int, own: Tensor) -> Tensor:
        """Return the features of what enters `start`, an edit being in place from `stage` on.

        What enters stages up to that is the original model's, and kept. Which rows run together
        depends on what was looked at before; a few run as many, whose products are rounded alike.
        """
        count = len(x)
        if 0 < count < LEAST_ROWS:
            x = x[torch.arange(LEAST_ROWS, device=x.device) % count]
        inputs = x
        if self._leads is not None:
            with torch.no_grad():
                for each in sorted(s for s in self._kept if start < s <= stage):
                    x, start = self.tower.advance(x, inputs, start, each), each
                    self._kept[each].offer(own, x[:count], self._leads[own])
        return resumed(self.tower, x, inputs, start)[:count]

    def _pixels(self, rows: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield the pixels of `rows` a few at a time, each with how many came before."""
        wanted, device = self.rows[rows.cpu().numpy()], str(self.labels.device)
        parts = even_spans(len(wanted), self._per_forward)
        per_read = max(1, ROWS_PER_READ // self._per_forward)
        reads = [parts[at : at + per_read] for at in range(0, len(parts), per_read)]

        def take(read: list[tuple[int, int]]) -> Tensor:
            return staged(self.block.take(wanted[read[0][0] : read[-1][1]]), device)

        images = prefetch(take, reads) if len(reads) > 1 else map(take, reads)
        for read, pixels in zip(reads, images, strict=True):
            first = read[0][0]
            for start, stop in read:
                yield start, self.normalize(pixels[start - first : stop - first])


def _split(chosen: Tensor, size: int) -> list[Tensor]:
    """Return where `chosen` holds, at most `size` places together, as many each as can be."""
    places = chosen.nonzero().squeeze(1)
    return [places[start:stop] for start, stop in even_spans(len(places), size)]


def in_order(features: list[Tensor], rows: list[Tensor], device: str) -> Tensor:
    """Return the features of rows that are dealt to processes, of all, in the order of rows."""
    places = processes.rows_of_all(rows, device)
    return processes.rows_of_all(features, device)[torch.argsort(places)]


def _through(
    tower: SplitTower, inputs: Tensor, stages: Iterable[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """Return what enters each of `stages` behind the embedding, and the features."""
    entering: dict[int, Tensor] = {}

    def run() -> Tensor:
        x, at = inputs, EMBED
        for stage in sorted(stage for stage in set(stages) if stage > EMBED):
            entering[stage] = x = tower.advance(x, inputs, at, stage)
            at = stage
        return tower.features(x, inputs, at)

    features = tower.run(run)
    return entering, features


def in_step(
    tower: SplitTower,
    runs: Sequence[tuple[int, Sequence[int]]],
    run_along: Callable[[int, Sequence[int]], None],
) -> Iterator[None]:
    """Yield when it is the turn of each of this process's `runs` of a tower.

    They are the stages that are entered, the deepest first, with the shape of what enters of a
    row. A sharded tower all processes run as often, from the same stages: what others have more
    of, `run_along` runs for nothing.
    """
    if not tower.sharded:
        yield from (None for _ in runs)
        return
    for start, shape, counts in processes.in_step([(s, tuple(shape)) for s, shape in runs]):
        if counts:
            yield
        else:
            run_along(start, shape)


def resumed(tower: SplitTower, x: Tensor, inputs: Tensor, start: int) -> Tensor:
    """Return the features of what enters stage `start`.

    Where gradients are wanted, the stages run again when they are: nothing in between is kept.
    """
    if torch.is_grad_enabled():
        features: Tensor = checkpoint(tower.features, x, inputs, start, use_reentrant=False)
        return features
    return tower.features(x, inputs, start)


@contextmanager
def edited(model: nn.Module, name: str, values: Tensor) -> Iterator[None]:
    """Give a layer other values for the length of a block; no whole parameter is copied."""
    layer = Layer.parse(name)
    change = partial(layer.replaced, new=values)
    original = processes.exchange(model, layer.parameter, change)
    try:
        yield
    finally:
        processes.put_back(model, layer.parameter, original)


@contextmanager
def moved(model: nn.Module, moves: Iterable[tuple[str, Tensor, float]]) -> Iterator[None]:
    """Add moves, each a layer's change and how often, to a model for the length of a block."""
    values: dict[str, Tensor] = {}
    for name, change, factor in moves:
        layer = Layer.parse(name)
        whole = values.get(layer.parameter)
        if whole is None:
            whole = values[layer.parameter] = processes.whole(model, layer.parameter).clone()
        layer.rows(whole).add_(change.to(whole.device), alpha=factor)
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(edited(model, name, value))
        yield
