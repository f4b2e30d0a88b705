"""SalUn: train only the weights that the forget gradient moves most, on CLIP and on a UNet."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from slsgu_cli import progress
from slsgu_cli.clip.batches import spans
from slsgu_cli.compare.pipeline_data import PipelineData
from slsgu_cli.compare.registry import OnPipeline, Trained, register
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.compare.training import mask_gradients
from slsgu_cli.compare.unet import Denoiser, in_fp32
from slsgu_cli.engine.covariance import chosen_rows
from slsgu_cli.records.comparison import Method, PipelinePlan
from slsgu_cli.store.blocks import DataBlock

# Rows of a mini-batch of the UNet, and images whose latents are computed at a time.
BATCH, ROWS = 8, 16
# The weight of the retain loss, relative to that of the wrong labels.
RETAIN_WEIGHT = 0.1


def mask_of(runner: BaselineRunner) -> dict[str, Tensor]:
    """Return the mask by the stored forget gradient, on the runner's device."""
    mask = saliency_mask(runner.gradient("forget"))
    return {name: values.to(runner.times.device) for name, values in mask.items()}


def saliency_mask(gradient: Mapping[str, npt.NDArray[np.floating]]) -> dict[str, Tensor]:
    """Return where |gradient| is in its top half over all parameters (SalUn).

    The mask selects exactly half of all entries, rounded down. Ties at the threshold are
    broken by the order of names.
    """
    names = sorted(gradient)
    sizes = np.concatenate([np.abs(gradient[name]).ravel() for name in names])
    count = sizes.size // 2
    threshold = np.partition(sizes, sizes.size - count)[sizes.size - count] if count else np.inf
    chosen = sizes > threshold
    ties = np.flatnonzero(sizes == threshold)
    chosen[ties[: count - int(chosen.sum())]] = True
    parts = np.split(chosen, np.cumsum([gradient[name].size for name in names])[:-1])
    return {
        name: torch.from_numpy(part.reshape(gradient[name].shape))
        for name, part in zip(names, parts, strict=True)
    }


@dataclass(frozen=True, slots=True)
class SalunData:
    """Latents of the forget set, and latents and captions of the retain set.

    `prompt` returns the n-th prompt of a class. The concept is relabelled as `others`.
    """

    forget: Tensor
    retain: Tensor
    captions: Sequence[str]
    concept: str
    others: Sequence[str]
    prompt: Callable[[str, int], str]


def unlearn(denoiser: Denoiser, data: SalunData, plan: PipelinePlan) -> None:
    """Train the UNet in place on wrong labels and on the retain set, masked."""
    unet = denoiser.unet.requires_grad_(True)
    generator = torch.Generator("cpu").manual_seed(plan.seed)
    mask = forget_mask(denoiser, data, generator)
    optimizer = torch.optim.Adam(unet.parameters(), lr=plan.rate)
    with progress.bar(f"SalUn {plan.rate:g}", plan.iterations) as ticker:
        for _ in range(plan.iterations):
            optimizer.zero_grad()
            loss = relabelled(denoiser, data, generator)
            loss = loss + RETAIN_WEIGHT * retained(denoiser, data, generator)
            loss.backward()  # type: ignore[no-untyped-call]
            mask_gradients(unet, mask)
            optimizer.step()
            ticker.advance()


def forget_mask(
    denoiser: Denoiser, data: SalunData, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return the mask by the gradient of the forget set's diffusion loss."""
    unet, latents = denoiser.unet, data.forget
    unet.zero_grad()
    for start, stop in spans(len(latents), BATCH):
        prompts = [data.prompt(data.concept, number) for number in range(start, stop)]
        _loss(denoiser, latents[start:stop], prompts, generator).backward()  # type: ignore[no-untyped-call]
    gradient = {
        name: parameter.grad.cpu().numpy()
        for name, parameter in unet.named_parameters()
        if parameter.grad is not None
    }
    unet.zero_grad()
    return {name: values.to(denoiser.device) for name, values in saliency_mask(gradient).items()}


def relabelled(denoiser: Denoiser, data: SalunData, generator: torch.Generator) -> Tensor:
    """Return the error of the concept's prompt against the prediction for another class."""
    latents = data.forget[_drawn(len(data.forget), generator)]
    labels = _drawn(len(data.others), generator, len(latents))
    named = [data.prompt(data.concept, number) for number in labels]
    other = [data.prompt(data.others[number], number) for number in labels]
    times = denoiser.drawn_times(len(latents), generator)
    noisy = denoiser.noised(latents, denoiser.noise(len(latents), generator), times)
    with torch.no_grad():
        goal = denoiser.predict(noisy, times, denoiser.conditions(other)[0])
    return nn.functional.mse_loss(
        denoiser.predict(noisy, times, denoiser.conditions(named)[0]), goal
    )


def retained(denoiser: Denoiser, data: SalunData, generator: torch.Generator) -> Tensor:
    """Return the diffusion loss of random rows of the retain set."""
    rows = _drawn(len(data.retain), generator)
    captions = [data.captions[row] for row in rows]
    return _loss(denoiser, data.retain[rows], captions, generator)


def _loss(
    denoiser: Denoiser, latents: Tensor, prompts: Sequence[str], generator: torch.Generator
) -> Tensor:
    times = denoiser.drawn_times(len(latents), generator)
    noise = denoiser.noise(len(latents), generator)
    predicted = denoiser.predict(
        denoiser.noised(latents, noise, times), times, denoiser.conditions(prompts)[0]
    )
    return nn.functional.mse_loss(predicted, denoiser.target(latents, noise, times))


def _drawn(rows: int, generator: torch.Generator, count: int = BATCH) -> list[int]:
    """Return `count` random rows, with replacement."""
    return torch.randint(rows, (count,), generator=generator).tolist()


def edit(data: PipelineData, plan: PipelinePlan) -> None:
    """Train the pipeline's UNet on the set's forget and retain rows."""
    judged = data.judged
    with in_fp32(data.pipe.pipeline):
        salun_data = SalunData(
            forget=_latents(data.denoiser, data.forget),
            retain=_latents(data.denoiser, data.retain),
            captions=data.captions,
            concept=judged.name,
            others=[name for name in judged.judge.names if name != judged.name],
            prompt=judged.prompt,
        )
        unlearn(data.denoiser, salun_data, plan)


def _latents(denoiser: Denoiser, block: DataBlock) -> Tensor:
    """Return the latents of at most as many rows as covariances take."""
    rows = chosen_rows(block.rows)
    parts = [
        denoiser.latents(block.take(rows[start:stop])) for start, stop in spans(len(rows), ROWS)
    ]
    return torch.cat(parts)


register(
    Method.SALUN,
    Trained(
        label="SalUn",
        losses=("forget", "retain"),
        gradients=("forget",),
        mask=mask_of,
        on_pipeline=OnPipeline(edit=edit),
    ),
)
