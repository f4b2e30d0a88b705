"""A baseline with the data of a world, and its training losses."""

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss

from slsgu_cli.compare.pass_times import PassTimes
from slsgu_cli.compare.runner import BaselineRunner
from slsgu_cli.records.comparison import ClipPlan
from slsgu_cli.store.blocks import DataBlock

PLAN = ClipPlan(epochs=2, batch_size=16, retain_rows=40)


def open_bench(world, plan=PLAN):
    times = PassTimes(world.store, world.manifest, "cpu")
    return BaselineRunner.open(world.pointer, plan, times)


def loss(world, model, role, rows):
    """Return the loss of one mini-batch, by open_clip's own forward."""
    manifest = world.manifest
    block = DataBlock.open(world.store, getattr(manifest, role))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (manifest.input.mean, manifest.input.std))
    images = torch.from_numpy(block.images(0, block.rows)[rows]).permute(0, 3, 1, 2) / 255
    v = model.encode_image((images - mean) / std, normalize=True)
    t = model.encode_text(torch.from_numpy(block.tokens[rows]).long(), normalize=True)
    if role == "forget":
        return (1 - F.cosine_similarity(v, t)).mean()
    return ClipLoss()(v, t, model.logit_scale.exp())
