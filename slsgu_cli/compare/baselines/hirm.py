"""HiRM: train the text encoder's first block by its last states (arXiv 2602.19631).

The states of captions with the concept's name are misdirected: in HiRM-S to those of the same
captions with an anchor in place of the name, in HiRM-R to a long random vector at each position.
Neither images nor retained captions are used.
"""

from collections.abc import Iterator
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from slsgu_cli import progress
from slsgu_cli.checkpoints.layers import block_of
from slsgu_cli.clip.batches import spans, to_tokens
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.towers import OpenClipText, text_tower
from slsgu_cli.compare.anchor import anchor_of
from slsgu_cli.compare.pipeline_data import PipelineData
from slsgu_cli.compare.registry import FIRST_BLOCK, OnPipeline, Trained, register
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.compare.training import adamw, cosine_rate
from slsgu_cli.engine.gradients import open_pairs
from slsgu_cli.errors import InputError
from slsgu_cli.records.comparison import Method, PipelinePlan
from slsgu_cli.targets.models import LiveEncoder
from slsgu_cli.targets.states import TextStates

# The length of the random vectors, and the updates on a pipeline.
LENGTH, UPDATES = 500.0, 25


def epochs(runner: BaselineRunner, rate: float, *, random: bool) -> Iterator[int]:
    """Train the first block of the text tower on the forget captions; yield each epoch's number.

    Raises InputError if the positions of the tower's states are unknown.
    """
    tower, plan = text_tower(runner.model), runner.plan
    if not isinstance(tower, OpenClipText):
        raise InputError("the states of this model's text tower cannot be read")
    ids, goals, counted = _goals(runner, tower, random=random)
    block = tower.blocks[0]
    parameters, optimizer = list(block.parameters()), adamw(block, rate)
    batches = spans(len(ids), plan.batch_size)
    for epoch in range(plan.epochs):
        for number, (start, stop) in enumerate(batches):
            for group in optimizer.param_groups:
                step = epoch * len(batches) + number
                group["lr"] = cosine_rate(rate, step, plan.epochs * len(batches))
            states = tower.states(ids[start:stop])
            loss = misdirection(states, goals[start:stop], counted[start:stop])
            _update(optimizer, parameters, loss)
        yield epoch + 1


def _goals(
    runner: BaselineRunner, tower: OpenClipText, *, random: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the tokens of the forget captions, and the goal and the mask of each position."""
    times, pointer, device = runner.times, runner.pointer, runner.times.device
    block = open_pairs(
        times.store,
        times.manifest,
        "forget",
        (),
        resolve(pointer.model),
        anchor=anchor_of(pointer.anchor),
    )
    ids, others = (to_tokens(np.asarray(each), device) for each in (block.tokens, block.anchors))
    with torch.no_grad():
        states = torch.cat([tower.states(others[a:b]) for a, b in spans(len(ids), 64)])
    if random:
        goals = random_goals(states.shape[1], states.shape[2], runner.plan.seed)
        return ids, goals.to(device).expand_as(states), tower.counted(ids)
    # Where the caption ends, the other's end is the goal.
    ends, other_ends = tower.lengths(ids) - 1, tower.lengths(others) - 1
    places = torch.arange(states.shape[1], device=device).expand(len(ids), -1)
    places = places.minimum(other_ends[:, None]).clone()
    rows = torch.arange(len(ids), device=device)
    places[rows, ends] = other_ends
    return ids, states[rows[:, None], places], tower.counted(ids)


def edit(data: PipelineData, plan: PipelinePlan, *, random: bool) -> None:
    """Train the first block of each text encoder of the pipeline on the concept's prompts."""
    for live in data.pipe.encoders:
        precision = live.value("transformer.resblocks.0.ln_1.weight").dtype
        with progress.quiet():
            live.module.float()
        _train(data, TextStates(data.pipe, live), plan, random=random)
        with progress.quiet():
            live.module.to(precision)


def _train(data: PipelineData, states: TextStates, plan: PipelinePlan, *, random: bool) -> None:
    prompts, goals = data.of_concept()[0], states.of(data.of_anchor()[0])
    if random:
        goals = [
            random_goals(each.shape[1], each.shape[2], plan.seed).to(each).expand_as(each)
            for each in goals
        ]
    parameters = first_block(states.encoder)
    optimizer = torch.optim.Adam(parameters, lr=plan.rate)
    with progress.bar(f"HiRM {plan.rate:g}", plan.iterations) as ticker:
        for _ in range(plan.iterations):
            read = zip(states.read(states.ids(prompts)), goals, strict=True)
            losses = [misdirection(*each) for each in read]
            _update(optimizer, parameters, torch.stack(losses).sum())
            ticker.advance()


def first_block(live: LiveEncoder) -> list[torch.nn.Parameter]:
    """Return the parameters of a text encoder's first block."""
    return [each for name, each in live.module.named_parameters() if block_of(name) == 0]


def misdirection(states: Tensor, goals: Tensor, counted: Tensor | None = None) -> Tensor:
    """Return the mean of |h - goal|^2 over the positions that are `counted`, by default all."""
    sizes = (states.float() - goals).square().sum(dim=-1)
    return sizes.mean() if counted is None else sizes[counted].mean()


def random_goals(positions: int, width: int, seed: int) -> Tensor:
    """Return a random vector of LENGTH for each position, by seed."""
    drawn = torch.randn((positions, width), generator=torch.Generator().manual_seed(seed))
    return LENGTH * F.normalize(drawn, dim=-1)


def _update(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], loss: Tensor
) -> None:
    gradients = torch.autograd.grad(loss, parameters)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    optimizer.step()
    optimizer.zero_grad()


for method, label, random in (
    (Method.HIRM_S, "HiRM-S", False),
    (Method.HIRM_R, "HiRM-R", True),
):
    register(
        method,
        Trained(
            label=label,
            epochs=partial(epochs, random=random),
            needs=FIRST_BLOCK,
            # One block and few updates need longer steps than whole models.
            decades=(1e-5, 1e-4, 1e-3),
            on_pipeline=OnPipeline(edit=partial(edit, random=random), updates=UPDATES, text=True),
        ),
    )
