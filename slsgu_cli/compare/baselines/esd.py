"""ESD-x: train the cross-attention of a UNet to steer away from the concept's prompts."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.compare.cross_attention import cross_attention
from slsgu_cli.compare.pipeline_data import PipelineData
from slsgu_cli.compare.registry import Baseline, OnPipeline, register
from slsgu_cli.compare.unet import Condition, Denoiser, in_fp32
from slsgu_cli.records.comparison import Method, PipelinePlan

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
    trained = [parameter for each in cross_attention(unet) for parameter in each.parameters()]
    unet.requires_grad_(False)
    for parameter in trained:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(trained, lr=plan.rate)
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


def edit(data: PipelineData, plan: PipelinePlan) -> None:
    """Train the pipeline's UNet on the prompts of the concept."""
    judged = data.judged
    prompts = [judged.prompt(judged.name, number) for number in range(len(judged.templates))]
    with in_fp32(data.pipe.pipeline):
        erase(data.denoiser, prompts, plan)


register(Method.ESD, Baseline(label="ESD-x", on_pipeline=OnPipeline(edit=edit)))
