"""SPEED: give the concept the values of an anchor, in the null space of others (arXiv 2503.07392).

K and A are the keys of the concept and of the anchor. The retained keys that an edit without
constraints moves most (influence-based prior filtering), and copies of them with noise that the
layer hardly sees (directed prior augmentation), define the null space. The keys of the empty
prompt keep their values exactly (invariant equality constraints).
"""

import torch
from torch import Tensor

from slsgu_cli.compare.cross_attention import edit_layers
from slsgu_cli.compare.pipeline_data import PipelineData
from slsgu_cli.compare.registry import Baseline, Hyperparameter, OnPipeline, register
from slsgu_cli.records.comparison import Method

# Noisy copies of each filtered key, clusters of the empty prompt's keys, and steps of k-means.
COPIES, CLUSTERS, STEPS = 10, 3, 100


def edit(data: PipelineData, below: float) -> None:
    """Edit the value layers of the pipeline's UNet."""
    (keys, anchors), retained = map(torch.cat, data.keys()), data.retained_keys()
    empty = data.states([""])[0]
    fixed = torch.cat([empty[:1], centres(empty[1:])])
    generator = torch.Generator().manual_seed(data.judged.budget.seed)

    def edited(weight: Tensor) -> Tensor:
        chosen = refined(weight, keys, anchors, retained, generator)
        space = null_space(chosen, below)
        return weight + constrained(weight, keys, anchors, space, fixed)

    edit_layers(data.denoiser.unet, ("to_v",), edited)


register(
    Method.SPEED,
    Baseline(
        label="SPEED",
        on_pipeline=OnPipeline(
            edit=edit, hyperparameter=Hyperparameter("below", 0.1, (0.001, 0.01, 0.1))
        ),
    ),
)


def constrained(
    weight: Tensor, keys: Tensor, anchors: Tensor, space: Tensor, fixed: Tensor
) -> Tensor:
    """Return the change D = D P of a weight (outputs, inputs) with D f = 0 for the `fixed` keys.

    It minimises the mean of |(W + D) k - W a|^2 over pairs of `keys` and `anchors` (rows, inputs),
    plus |D|^2. The projector P on the null space is `space`.
    """
    second = keys.T @ keys / len(keys)
    wanted = weight @ (anchors - keys).T @ keys / len(keys) @ space
    inverse = torch.linalg.inv(second @ space + torch.eye(len(space)).to(space))
    columns = space @ fixed.T
    # Fixed keys outside the null space are not moved by any change in it.
    multipliers = torch.linalg.pinv(columns.T @ inverse @ columns, rtol=1e-10)
    held = wanted @ inverse @ columns @ multipliers @ columns.T
    change: Tensor = (wanted - held) @ inverse
    return change


def refined(
    weight: Tensor, keys: Tensor, anchors: Tensor, retained: Tensor, generator: torch.Generator
) -> Tensor:
    """Return the retained keys that the unconstrained edit moves more than their mean.

    Copies with noise along the input that the weight maps to the least follow, filtered alike.
    """
    whole = torch.eye(weight.shape[1]).to(weight)
    change = constrained(weight, keys, anchors, whole, whole[:0])

    def moved(rows: Tensor) -> Tensor:
        sizes = (rows @ change.T).norm(dim=1)
        return rows[sizes > sizes.mean()]

    filtered = moved(retained)
    quiet = torch.linalg.svd(weight)[2][-1]
    noise = torch.randn((COPIES, len(filtered), 1), generator=generator).to(weight)
    return torch.cat([filtered, moved((filtered + noise * quiet).flatten(0, 1))])


def null_space(rows: Tensor, below: float) -> Tensor:
    """Return the projector on eigenvectors of the second moment below `below` times their mean.

    At least the smallest one is among them.
    """
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    quiet: Tensor = vectors[:, : max(1, int((values < below * values.mean()).sum()))]
    return quiet @ quiet.T


def centres(rows: Tensor) -> Tensor:
    """Return the centres of k-means clusters of rows, from evenly spaced rows on."""
    found = rows[torch.linspace(0, len(rows) - 1, min(CLUSTERS, len(rows))).long()]
    for _ in range(STEPS):
        nearest = torch.cdist(rows, found).argmin(dim=1)
        members = [rows[nearest == place] for place in range(len(found))]
        pairs = zip(members, found, strict=True)
        moved = torch.stack([each.mean(dim=0) if len(each) else old for each, old in pairs])
        if torch.equal(moved, found):
            break
        found = moved
    return found
