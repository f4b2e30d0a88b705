"""Training of the model under test on batches of pairs, measured on the way, and resumed."""

from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli.compare.training import BETAS, EPSILON, clamp_logit_scale
from slsgu_cli.engine.resumable import SavedSums
from slsgu_cli.records.figures import Accuracy
from slsgu_cli.records.verification import Point, Settings
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Arrays
from slsgu_cli.verification.model import ModelUnderTest, Utility, altered

Rows = npt.NDArray[np.integer]
# The settings that change the result of training.
SETTINGS = ("steps", "learning_rate", "batch_size", "rows", "seed")
# The state that Adam has for a parameter, and the key of the measured accuracies.
ADAM = ("step", "exp_avg", "exp_avg_sq")
FIGURES = "figures"


@dataclass(slots=True)
class Training:
    """Training by Adam that saves its state from time to time, and resumes from it.

    `figures` are accuracies measured during training. On a CPU, a resumed training ends with the
    same bytes as one without interruption.
    """

    optimizer: torch.optim.Optimizer
    steps: int
    saved: SavedSums | None
    figures: list[Accuracy] = field(default_factory=list)
    done: int = 0

    def __post_init__(self) -> None:
        if self.saved is not None:
            self.done, arrays = self.saved.read(self.steps)
            if self.done:
                self._load(arrays)

    def advance(self) -> None:
        """Count a step; save the state if it is due."""
        self.done += 1
        if self.saved is not None and self.saved.due:
            self.saved.write(self._arrays(), done=self.done, batches=self.steps)

    def remove(self) -> None:
        """Remove the saved state."""
        if self.saved is not None:
            self.saved.remove()

    def _arrays(self) -> Arrays:
        figures = [astuple(each) for each in self.figures]
        arrays = {FIGURES: np.array(figures, dtype=np.float64).reshape(-1, 5)}
        for number, parameter in enumerate(self._parameters()):
            arrays[f"{number}"] = parameter.detach().cpu().numpy()
        for number, state in self.optimizer.state_dict()["state"].items():
            arrays |= {f"{number}.{name}": value.cpu().numpy() for name, value in state.items()}
        return arrays

    @torch.no_grad()
    def _load(self, arrays: Arrays) -> None:
        for top1, top5, rows, *kinds in arrays[FIGURES].tolist():
            self.figures.append(Accuracy(top1, top5, int(rows), *map(bool, kinds)))
        state: dict[int, dict[str, Tensor]] = {}
        for number, parameter in enumerate(self._parameters()):
            parameter.copy_(torch.tensor(arrays[f"{number}"]))
            keys = {name: f"{number}.{name}" for name in ADAM if f"{number}.{name}" in arrays}
            state[number] = {name: torch.tensor(arrays[key]) for name, key in keys.items()}
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _parameters(self) -> list[Tensor]:
        return [each for group in self.optimizer.param_groups for each in group["params"]]


@dataclass(frozen=True, slots=True)
class Batch:
    """A mini-batch of pairs; the first `alike` show the same thing and match each other."""

    images: npt.NDArray[np.uint8]
    tokens: npt.NDArray[np.integer]
    alike: int = 0


def trained(
    model: ModelUnderTest,
    batches: Iterator[Batch],
    settings: Settings,
    *,
    name: str,
    measure: Callable[[], Accuracy],
    utility: bool,
) -> tuple[tuple[Point, ...], Utility | None]:
    """Train the model on batches; return accuracies by `measure` on the way and utility after.

    `name` is that of the state saved for resuming. The weights are restored in the end.
    """
    with altered(model.module, lambda _, values: values.clone()):
        optimizer = torch.optim.AdamW(
            [p for p in model.module.parameters() if p.requires_grad],
            lr=settings.learning_rate,
            betas=BETAS,
            eps=EPSILON,
            weight_decay=0.0,
        )
        training = Training(optimizer, settings.steps, model.saved_state(name))
        measured_at = schedule(settings.steps)
        for _ in range(training.done):
            next(batches)
        for step in measured_at[len(training.figures) :]:
            while training.done < step:
                _update(model, next(batches), training)
            training.figures.append(measure())
        optimizer.zero_grad()
        after = model.utility_now() if utility else None
        training.remove()
    points = map(Point, measured_at, training.figures)
    return tuple(points), after


def _update(model: ModelUnderTest, batch: Batch, training: Training) -> None:
    bias: Any = getattr(model.module, "logit_bias", None)
    with torch.enable_grad():
        loss = contrastive_of(
            model.image_features(batch.images),
            model.text_features(batch.tokens),
            alike=batch.alike,
            scale=model.scale,
            bias=None if bias is None else bias.reshape(()),
        )
        training.optimizer.zero_grad()
        torch.autograd.backward(loss)
    training.optimizer.step()
    clamp_logit_scale(model.module)
    training.advance()


def schedule(steps: int) -> list[int]:
    """Return the steps to measure at: 0, 1, 2, 3, 4, 6, 8, 12, 16, 24, ..., and the last."""
    doubled = [2**power for power in range(steps.bit_length())]
    between = [3 * step // 2 for step in doubled if step > 1]
    return sorted({0, *(step for step in (*doubled, *between) if step < steps), steps})


def pairs(block: DataBlock, rows: Rows) -> Batch:
    """Return some rows of a block with their own captions."""
    return Batch(block.take(rows), block.tokens[rows])


def cycled(rows: int, size: int, *, seed: int) -> Iterator[Rows]:
    """Yield `size` row numbers at a time, endlessly; each row occurs once per epoch."""
    generator = np.random.default_rng(seed)
    order = np.empty(0, dtype=np.int64)
    while True:
        while len(order) < size:
            order = np.concatenate([order, generator.permutation(rows)])
        yield order[:size]
        order = order[size:]


def contrastive_of(
    images: Tensor, texts: Tensor, *, alike: int, scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Return the model's own contrastive loss of a mini-batch whose first pairs are alike.

    It is the symmetric contrastive loss (Eq. 4), or SigLIP's pairwise sigmoid loss if the
    model has a `bias`. Pairs that are alike have all their texts as equal targets.
    """
    match = torch.eye(len(images), device=images.device)
    match[:alike, :alike] = 1
    logits = scale * images @ texts.T
    if bias is not None:
        return -F.logsigmoid((2 * match - 1) * (logits + bias)).sum() / len(images)
    target = match / match.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2
