"""ESD-x: train the cross-attention of a UNet to steer away from the concept's prompts."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.compare.registry import Baseline, register
from slsgu_cli.compare.unet import Condition, Denoiser
from slsgu_cli.errors import InputError
from slsgu_cli.records.comparison import Method, PipelinePlan
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.targets.judged_prompts import JudgedPrompts

# The strength of the negative guidance.
ERASING = 1.0
# The guidance for denoising latents.
GUIDANCE = 3.0


def erase(denoiser: Denoiser, prompts: Sequence[str], plan: PipelinePlan) -> None:
    """Train the UNet in place, cycling through the concept's `prompts`.

    Raises InputError if the UNet has no cross-attention.
    """
    unet = denoiser.unet
    original = copy.deepcopy(unet).requires_grad_(False)
    attention = cross_attention(unet)
    unet.requires_grad_(False)
    for parameter in attention.values():
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(attention.values(), lr=plan.rate)
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    conditions = [denoiser.conditions([prompt]) for prompt in prompts]
    with progress.bar(f"ESD {plan.rate:g}", plan.iterations) as ticker:
        for number in range(plan.iterations):
            condition, empty = conditions[number % len(conditions)]
            until = int(torch.randint(plan.steps, (), generator=generator))
            noisy, time = denoiser.partly_denoised(
                condition,
                empty,
                steps=plan.steps,
                until=until,
                guidance=GUIDANCE,
                generator=generator,
            )
            goal = negated(denoiser, original, noisy, time, condition, empty)
            loss = nn.functional.mse_loss(denoiser.predict(noisy, time, condition), goal)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            ticker.advance()
    unet.requires_grad_(True)


def negated(
    denoiser: Denoiser,
    original: nn.Module,
    noisy: Tensor,
    time: Tensor,
    condition: Condition,
    empty: Condition,
) -> Tensor:
    """Return the negatively guided prediction of the original UNet."""
    with torch.no_grad():
        prompted = denoiser.predict(noisy, time, condition, original)
        unprompted = denoiser.predict(noisy, time, empty, original)
        return unprompted - ERASING * (prompted - unprompted)


def cross_attention(unet: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of the layers that read the prompt. Raises InputError without any."""
    layers = [
        name
        for name, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False)
    ]
    parameters = {
        name: parameter
        for name, parameter in unet.named_parameters()
        if any(name.startswith(f"{layer}.") for layer in layers)
    }
    if not parameters:
        raise InputError("the pipeline's UNet has no cross-attention that ESD could train")
    return parameters


def train_unet(
    denoiser: Denoiser,
    judged: JudgedPrompts,
    _forget: DataBlock,
    _retain: DataBlock,
    plan: PipelinePlan,
) -> None:
    """Train the pipeline's UNet on the judged prompts of the concept."""
    prompts = [judged.prompt(judged.name, number) for number in range(len(judged.templates))]
    erase(denoiser, prompts, plan)


register(Method.ESD, Baseline(label="ESD-x", train_unet=train_unet))
