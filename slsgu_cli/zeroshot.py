"""Zero-shot classification of evaluation sets by a model whose weights may be edited.

One pass over images and prompts gives the original model's features and, for the stages
asked for, what enters them. An edit is then measured by running on from its layer's
stage; the other tower's features stay what they were. What does not fit the cache budget
is computed again from the nearest stage before it that was kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli.ahead import read_ahead
from slsgu_cli.batches import Pixels, by_length, spans, staged
from slsgu_cli.metrics import class_means
from slsgu_cli.sets import DataBlock
from slsgu_cli.thirds import held, parameter_of, third_of
from slsgu_cli.towers import EMBED, SplitTower

ROWS_PER_FORWARD = {"cpu": 64, "cuda": 1024, "mps": 256}


@dataclass(slots=True)
class CacheBudget:
    """Bytes of activations that may still be kept."""

    left: int

    def take(self, size: int) -> bool:
        """Reserve `size` bytes if they are left."""
        if size > self.left:
            return False
        self.left -= size
        return True


@dataclass(slots=True)
class PromptSide:
    """The prompts of one list of classes, and their class embeddings.

    `tokens` is (prompts, context) and `owners` the class of each prompt. States are kept
    a group of similar lengths at a time, since each group runs at its own length.
    """

    tower: SplitTower
    tokens: Tensor
    owners: Tensor
    classes: int
    embeddings: Tensor = field(init=False)
    _groups: list[Tensor] = field(init=False)
    _states: dict[int, list[Tensor]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        size = ROWS_PER_FORWARD[self.tokens.device.type]
        self._groups = [g.to(self.tokens.device) for g in by_length(self.tower, self.tokens, size)]

    def base_pass(self, stages: Sequence[int], budget: CacheBudget) -> None:
        """Compute the class embeddings, keeping what enters `stages`."""
        kept: dict[int, list[Tensor]] = {stage: [] for stage in stages if stage > EMBED}
        features = []
        for rows in self._groups:
            short = self.tower.trim(self.tokens[rows])
            x, at = short, EMBED
            for stage in sorted(kept):
                x = self.tower.advance(x, short, at, stage)
                at = stage
                if budget.take(x.nbytes):
                    kept[stage].append(x)
            features.append(self.tower.features(x, short, at))
        self._states = {s: parts for s, parts in kept.items() if len(parts) == len(self._groups)}
        self.embeddings = self._means(features)

    def after_edit(self, stage: int) -> Tensor:
        """Return the class embeddings with the weights as they are now, from `stage` on."""
        start = max((s for s in self._states if s <= stage), default=EMBED)
        features = []
        for index, rows in enumerate(self._groups):
            short = self.tower.trim(self.tokens[rows])
            x = short if start == EMBED else self._states[start][index]
            features.append(self.tower.features(x, short, start))
        return self._means(features)

    def _means(self, features: list[Tensor]) -> Tensor:
        owners = self.owners[torch.cat(self._groups)]
        return class_means(torch.cat(features), owners, self.classes)


@dataclass(slots=True)
class ImageSide:
    """Some labelled rows of a data block, and their image features."""

    tower: SplitTower
    block: DataBlock
    rows: npt.NDArray[np.integer]
    labels: Tensor
    normalize: Pixels
    features: Tensor = field(init=False)
    _states: dict[int, Tensor] = field(init=False, default_factory=dict)
    # Where the rows lie in the states, for a part of the rows that the states are of.
    _places: Tensor | None = field(init=False, default=None)

    def __len__(self) -> int:
        return len(self.rows)

    def some(self, chosen: npt.NDArray[np.integer]) -> "ImageSide":
        """Return some of the rows, with what the base pass kept of them if it has run."""
        places = torch.from_numpy(chosen).to(self.labels.device)
        rows, labels = self.rows[chosen], self.labels[places]
        part = ImageSide(self.tower, self.block, rows, labels, self.normalize)
        if hasattr(self, "features"):
            part.features = self.features[places]
            part._states = self._states
            part._places = places if self._places is None else self._places[places]
        return part

    def base_pass(self, stages: Sequence[int], budget: CacheBudget) -> Iterator[int]:
        """Compute the features, keeping what enters `stages`; yield rows as they are done."""
        wanted = sorted(stage for stage in set(stages) if stage > EMBED)
        features: list[Tensor] = []
        for start, pixels in self._pixel_chunks():
            x, at, entering = pixels, EMBED, {}
            for stage in wanted:
                entering[stage] = x = self.tower.advance(x, pixels, at, stage)
                at = stage
            features.append(self.tower.features(x, pixels, at))
            if start == 0:
                self._reserve(entering, budget)
            for stage, kept in self._states.items():
                kept[start : start + len(pixels)] = entering[stage]
            yield len(pixels)
        self.features = torch.cat(features)

    def after_edit(self, stage: int, rows: Tensor | None = None) -> Tensor:
        """Return features with the weights as they are now, of some rows or of all."""
        chosen = torch.arange(len(self)) if rows is None else rows.cpu()
        start = max((s for s in self._states if s <= stage), default=EMBED)
        parts = []
        for some in torch.split(chosen, ROWS_PER_FORWARD[self.labels.device.type]):
            if start == EMBED:
                pixels = self.normalize(self.block.take(self.rows[some.numpy()]))
                parts.append(self.tower.features(pixels, pixels))
            else:
                at = some.to(self.labels.device)
                x = self._states[start][at if self._places is None else self._places[at]]
                parts.append(self.tower.features(x, x, start))
        return torch.cat(parts)

    def keeps(self, stage: int) -> bool:
        """Return whether rows can be resumed in any order without reading images again."""
        return any(kept <= stage for kept in self._states)

    def _reserve(self, entering: dict[int, Tensor], budget: CacheBudget) -> None:
        """Allocate room for the states that fit, the deepest first: they save the most."""
        for stage, x in sorted(entering.items(), reverse=True):
            if budget.take(x[0].nbytes * len(self)):
                self._states[stage] = x.new_empty(len(self), *x.shape[1:])

    def _pixel_chunks(self) -> Iterator[tuple[int, Tensor]]:
        ranges = spans(len(self), ROWS_PER_FORWARD[self.labels.device.type])
        device = str(self.labels.device)
        read = read_ahead(
            lambda span: staged(self.block.take(self.rows[slice(*span)]), device), ranges
        )
        for (start, _), images in zip(ranges, read, strict=True):
            yield start, self.normalize(images)


@contextmanager
def edited(model: nn.Module, layer: str, values: Tensor) -> Iterator[None]:
    """Give `layer` other values for the length of a block; no whole parameter is copied."""
    parameter = model.get_parameter(parameter_of(layer))
    original = parameter.data
    if third_of(layer) is None:
        parameter.data = values
    else:
        parameter.data = original.clone()
        held(layer, parameter.data).copy_(values)
    try:
        yield
    finally:
        parameter.data = original


@contextmanager
def moved(model: nn.Module, moves: Iterable[tuple[str, Tensor, float]]) -> Iterator[None]:
    """Add moves, each a layer's change and how often, to a model for the length of a block."""
    values: dict[str, Tensor] = {}
    for layer, change, factor in moves:
        name = parameter_of(layer)
        if name not in values:
            values[name] = model.get_parameter(name).data.clone()
        held(layer, values[name]).add_(change.to(values[name].device), alpha=factor)
    with ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(edited(model, name, value))
        yield
