"""The prompts and images of a zero-shot classification, and their features after edits."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from slsgu_cli import processes
from slsgu_cli.clip.activations import Activations, CacheBudget, allocate
from slsgu_cli.clip.batches import (
    IMAGES_PER_FORWARD,
    TEXTS_PER_FORWARD,
    Pixels,
    by_length,
    even_spans,
    staged,
)
from slsgu_cli.clip.finite import Ints, require_finite
from slsgu_cli.clip.metrics import class_means, margins
from slsgu_cli.clip.packing import by_prefix, packed
from slsgu_cli.clip.towers import EMBED, SplitTower
from slsgu_cli.prefetch import prefetch
from slsgu_cli.store.blocks import DataBlock, JoinedRows

# Images in one read.
ROWS_PER_READ = 64
# Packed prompts in one forward.
PROMPTS_PER_FORWARD = {"cpu": 1024, "cuda": 8192, "mps": 2048}
# Products of fewer rows use other kernels, which round differently.
LEAST_ROWS = 8
# With few edits a row, a cache has to save this fraction of the stages.
LEAST_SAVED = 0.02


@dataclass(slots=True)
class _Prompts:
    """Prompts that run together through one tower."""

    rows: Tensor
    tower: SplitTower
    inputs: Tensor
    # The inputs of stages.
    cached: dict[int, Tensor] = field(init=False, default_factory=dict)

    def entering(self, stage: int) -> Tensor:
        """Return the cached inputs of a stage, or the prompts."""
        return self.cached.get(stage, self.inputs)


@dataclass(slots=True)
class PromptSide:
    """The prompts of one list of classes, and their class embeddings.

    `tokens` is (prompts, context) and `owners` the class of each prompt. Prompts with a shared
    prefix run packed. If the tower cannot do that, prompts of similar length run together.
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
        size = max(1, min(size, -(-len(self.tokens) // processes.world_size())))
        alike = by_prefix(self.tokens, size)
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
        """Compute the class embeddings and cache the inputs of `stages`."""
        features, groups = [], processes.split(self._groups)
        for group in groups:
            entering, outputs = _through(group.tower, group.inputs, stages)
            group.cached = {s: x for s, x in entering.items() if budget.take(x.nbytes)}
            features.append(outputs)
        self.embeddings = self._means(features, groups)

    def after_edit(self, stage: int) -> Tensor:
        """Return the class embeddings after an edit of `stage` or later stages."""
        features, groups = [], processes.split(self._groups)
        for group in groups:
            start = max((s for s in group.cached if s <= stage), default=EMBED)
            features.append(resumed(group.tower, group.entering(start), group.inputs, start))
        return self._means(features, groups)

    def release(self) -> None:
        """Drop the cached inputs of stages."""
        for group in self._groups:
            group.cached.clear()

    def _means(self, features: list[Tensor], groups: Sequence[_Prompts]) -> Tensor:
        rows = torch.cat([group.rows for group in self._groups])
        order = [group.rows for group in groups]
        whole = in_order(features, order, str(self.tokens.device))[rows]
        means = class_means(whole, self.owners[rows], self.classes)
        return require_finite(means, "class embeddings")


@dataclass(slots=True)
class ImageSide:
    """Labelled images from data blocks, and their features.

    If the features of the original model are `known`, the base pass runs nothing. The inputs of
    stages are then cached when an edit needs them.
    """

    tower: SplitTower
    block: DataBlock | JoinedRows
    rows: Ints
    labels: Tensor
    normalize: Pixels
    known: Tensor | None = field(init=False, default=None)
    features: Tensor = field(init=False)
    _kept: dict[int, Activations] = field(init=False, default_factory=dict)
    # The margins of the original model by which rows are cached later; None after a full base pass.
    _leads: Tensor | None = field(init=False, default=None)
    # The indices of these rows among those of the base pass, if they are a part of them.
    _chosen: Tensor | None = field(init=False, default=None)
    # The index of each row of the base pass among the rows of this rank; -1 for other ranks.
    _own: Tensor = field(init=False)

    def __post_init__(self) -> None:
        count, rows = processes.world_size(), np.arange(len(self.rows))
        size = max(ROWS_PER_READ, self._per_forward)
        size = max(1, min(size, -(-len(rows) // count)))
        mine = rows // size % count == processes.rank()
        self._own = torch.from_numpy(np.where(mine, np.cumsum(mine) - 1, -1)).to(self.labels.device)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def _per_forward(self) -> int:
        """The most images in one forward."""
        return IMAGES_PER_FORWARD[self.labels.device.type]

    def some(self, chosen: Ints) -> "ImageSide":
        """Return some of the rows, with their features and caches if the base pass has run."""
        places = torch.from_numpy(chosen).to(self.labels.device)
        rows, labels = self.rows[chosen], self.labels[places]
        part = ImageSide(self.tower, self.block, rows, labels, self.normalize)
        if hasattr(self, "features"):
            part.features = self.features[places]
            part._kept, part._own, part._leads = self._kept, self._own, self._leads
            part._chosen = places if self._chosen is None else self._chosen[places]
        return part

    def part_of(self, whole: "ImageSide") -> "ImageSide | None":
        """Return these rows as a part of `whole` after its base pass; None if it lacks some."""
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
        """Compute the features and cache the inputs of `stages`; yield the rows of each forward.

        `stages` maps a stage to the number of edits that will resume there. Caches take a `share`
        of the budget. With class embeddings, caches that save little are left out, and if not all
        rows fit, those with the smallest margins are cached.
        """
        mine = (self._own >= 0).nonzero().squeeze(1)
        self._kept, self._leads = {}, None
        if not self.block.has_images:
            stand_ins = torch.from_numpy(self.block.content_at(self.rows))
            self.features = stand_ins.to(self.labels.device)
            yield len(self)
            return
        if self.known is not None and classes is not None:
            self.features, self.known = self.known, None
            self._allocate(mine, stages, budget, classes, share)
            yield len(mine)
            return
        features: list[Tensor] = []
        for start, pixels in self._pixels(mine):
            entering, outputs = _through(self.tower, pixels, self._kept if start else stages)
            features.append(outputs)
            if start == 0:
                least = 0.0 if classes is None else LEAST_SAVED
                self._kept = allocate(entering, len(mine), budget, stages, share, least)
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

    def _allocate(
        self,
        mine: Tensor,
        stages: Mapping[int, int],
        budget: CacheBudget,
        classes: Tensor,
        share: float,
    ) -> None:
        """Allocate caches of `stages` for rows that edits run later, smallest margins first."""
        if not stages or not len(mine):
            return
        for _, pixels in self._pixels(mine[:1]):
            entering, _ = _through(self.tower, pixels, stages)
            self._kept = allocate(entering, len(mine), budget, stages, share, LEAST_SAVED)
        self._leads = margins(self.features[mine] @ classes.T, self.labels[mine])

    def after_edit(self, stage: int, rows: Tensor | None = None) -> Tensor:
        """Return the features of some rows or all, after an edit of `stage` or later stages."""
        if not self.block.has_images:
            # An edit of the vision tower leaves features of words as they are.
            return self.features if rows is None else self.features[rows]
        if rows is None:
            rows = torch.arange(len(self), device=self.labels.device)
        else:
            # By way of the host: each rank has another GPU.
            rows = processes.agreed(rows.cpu()).to(rows.device)
        own = self._own[rows if self._chosen is None else self._chosen[rows]]
        parts = self._parts(own, stage)
        order, features = [some for _, some in parts], []
        uncached = [some for start, some in parts if start == EMBED]
        pixels = self._pixels(rows[torch.cat(uncached)] if uncached else rows[:0])
        for start, some in parts:
            if start == EMBED:
                _, x = next(pixels)
            else:
                x = self._kept[start].values[self._kept[start].places[own[some]]]
            features.append(self._features(x, start, stage, own[some]))
        ordered = in_order(features, order, str(self.labels.device))
        return require_finite(ordered, "image features", self.rows, rows)

    def release(self) -> None:
        """Drop the cached inputs of stages, for all parts of these rows."""
        self._kept.clear()

    def _parts(self, own: Tensor, stage: int) -> list[tuple[int, Tensor]]:
        """Return the stages at which this rank resumes its rows for an edit of `stage`.

        Each part is a stage and the indices of its rows in `own`, the deepest stage first. `own`
        holds the index of each row among those of this rank.
        """
        parts, waiting = [], own >= 0
        for start in sorted((s for s in self._kept if s <= stage), reverse=True):
            there = waiting & (self._kept[start].places[own.clamp(min=0)] >= 0)
            waiting &= ~there
            parts += [(start, some) for some in _split(there, self._per_forward)]
        return [*parts, *((EMBED, some) for some in _split(waiting, self._per_forward))]

    def _features(self, x: Tensor, start: int, stage: int, own: Tensor) -> Tensor:
        """Return the features of the inputs `x` of stage `start`, with an edit of `stage`.

        Inputs of stages up to that one are the original model's, and are cached. A few rows are
        repeated to LEAST_ROWS, so that their rounding does not depend on how rows are grouped.
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
        """Yield the pixels of `rows` in batches, each with the number of rows before it."""
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
    """Return the indices where `chosen` is true, in even parts of at most `size`."""
    places = chosen.nonzero().squeeze(1)
    return [places[start:stop] for start, stop in even_spans(len(places), size)]


def in_order(features: list[Tensor], rows: list[Tensor], device: str) -> Tensor:
    """Return the features of all rows, which the ranks share, in the order of `rows`."""
    if processes.world_size() > 1:
        # By way of the host: each rank has another GPU.
        parts = processes.gathered([[part.cpu() for part in each] for each in (rows, features)])
        rows, features = ([t for part in parts for t in part[index]] for index in range(2))
    order = torch.argsort(torch.cat(rows)).to(device)
    return torch.cat(features).to(device)[order]


def _through(
    tower: SplitTower, inputs: Tensor, stages: Iterable[int]
) -> tuple[dict[int, Tensor], Tensor]:
    """Return the inputs of each of `stages` after the embedding, and the features."""
    entering: dict[int, Tensor] = {}
    x, at = inputs, EMBED
    for stage in sorted(stage for stage in set(stages) if stage > EMBED):
        entering[stage] = x = tower.advance(x, inputs, at, stage)
        at = stage
    return entering, tower.features(x, inputs, at)


def resumed(tower: SplitTower, x: Tensor, inputs: Tensor, start: int) -> Tensor:
    """Return the features of the inputs `x` of stage `start`.

    With gradients enabled, activations are recomputed in the backward.
    """
    if torch.is_grad_enabled():
        features: Tensor = checkpoint(tower.features, x, inputs, start, use_reentrant=False)
        return features
    return tower.features(x, inputs, start)
