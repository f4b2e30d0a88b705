"""Compare the gradient pass with hand-written loops, side by side in one run.

    python tests/bench/bench_grad.py --model ViT-B-32 --device cuda --precision bf16 --rows 16384
    python tests/bench/bench_grad.py --model ViT-B-32 --device cuda --profile

`plain` is open_clip's own forward and backward on random data in the device's memory, with
77-token texts, at the best of several batch sizes; `sequential` is the same at batch 16.
`slsgu` reads its rows from the store on disk. The fraction of the device's peak matrix rate
(PyTorch's products or the towers', whichever are faster) counts the operations that each one
executes; `slsgu` skips what follows the end of a text. At the end come the statistics that
directions need of a retain row, relative to the time of its gradient.
--profile prints where the pass of `slsgu` spends its time. --compile also times the pass with
compiled half blocks, which `slsgu` does not use.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from synthetic import pairs_block, random_images, random_model, random_tokens
from torch.utils.flop_counter import FlopCounterMode

from slsgu_cli.clip import onednn, towers
from slsgu_cli.clip.batches import pixel_normalizer, to_tokens
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import input_spec
from slsgu_cli.engine.covariance import MOST_ROWS, layer_sums
from slsgu_cli.engine.gradient_pass import GradientPass, arithmetic
from slsgu_cli.method.layers import candidates
from slsgu_cli.records.directions import Statistic
from slsgu_cli.records.method import Precision
from slsgu_cli.records.options import PassOptions
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def plain_step(model, spec, *, batch: int, options: PassOptions) -> Callable[[], None]:
    """Return one forward and backward of open_clip over mini-batches of 16."""
    device = options.device
    images = pixel_normalizer(spec, device)(random_images(batch, spec.height, 1))
    tokens = to_tokens(random_tokens(batch, spec.context_length, 49408, 1), device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=options.precision is Precision.BF16)
    labels = torch.arange(16, device=device)

    def step() -> None:
        with autocast:
            v = model.encode_image(images, normalize=True)
            t = model.encode_text(tokens, normalize=True)
        logits = (
            model.logit_scale.exp()
            * v.float().view(-1, 16, v.shape[-1])
            @ t.float().view(-1, 16, t.shape[-1]).transpose(1, 2)
        )
        truth = labels.expand(logits.shape[0], 16).reshape(-1)
        rows = F.cross_entropy(logits.reshape(-1, 16), truth)
        columns = F.cross_entropy(logits.transpose(1, 2).reshape(-1, 16), truth)
        ((rows + columns) / 2).backward()

    return step


def plain_rate(model, spec, *, batch: int, groups: int, options: PassOptions) -> float:
    """Return pairs per second of open_clip's forward and backward in mini-batches of 16."""
    step = plain_step(model, spec, batch=batch, options=options)
    with arithmetic(options.precision):
        for _ in range(2):
            step()
        synchronize(options.device)
        start = time.perf_counter()
        for _ in range(groups):
            step()
        synchronize(options.device)
    model.zero_grad()
    return batch * groups / (time.perf_counter() - start)


def best_plain(
    model, spec, sizes: list[int], groups: int, options: PassOptions
) -> tuple[float, int]:
    best = (0.0, 0)
    for batch in sizes:
        try:
            best = max(
                best, (plain_rate(model, spec, batch=batch, groups=groups, options=options), batch)
            )
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
    return best


def flop_a_pair(work: Callable[[], object], pairs: int) -> float:
    """Return the floating-point operations of matrix products of `work`, per pair."""
    known = {torch.ops.mkldnn._linear_pointwise: of_linear} if onednn.HAS_ONEDNN else {}
    with FlopCounterMode(display=False, custom_mapping=known) as counter:
        work()
    return counter.get_total_flops() / pairs


def of_linear(x, weight, *_others, out_shape=None, **_options) -> int:
    """Return the operations of a oneDNN product from the shapes of its operands."""
    return 2 * prod(x) * weight[0]


def profile(work: Callable[[], object], device: str) -> str:
    """Return a table of the operations on which `work` spends most time."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if device.startswith("cuda"):
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as found:
        work()
        synchronize(device)
    key = "self_cuda_time_total" if device.startswith("cuda") else "self_cpu_time_total"
    return found.key_averages().table(sort_by=key, row_limit=20, max_name_column_width=60)


def timed(work: Callable[[], object]) -> float:
    """Return the seconds that `work` takes, including the transfer of its results to the host."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def peak_rates(device: str, precision: Precision) -> tuple[float, float]:
    """Return the device's measured matrix rates in FLOP/s: PyTorch's and the towers'."""
    size = 8192 if device.startswith("cuda") else 2048
    kind = torch.bfloat16 if precision is Precision.BF16 else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=kind) for _ in range(2))
    rates = []
    for multiply in (F.linear, onednn.linear):
        with torch.no_grad(), arithmetic(precision):
            for _ in range(3):
                multiply(a, b)
            synchronize(device)
            start = time.perf_counter()
            for _ in range(10):
                multiply(a, b)
            synchronize(device)
        rates.append(10 * 2 * size**3 / (time.perf_counter() - start))
    return rates[0], rates[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", type=Precision, default=Precision.FP32)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64, 128])
    parser.add_argument("--groups", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="time compiled blocks as well")
    parser.add_argument("--profile", action="store_true", help="show where the pass spends time")
    args = parser.parse_args()
    options = PassOptions(precision=args.precision, device=args.device)
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve(random_model(Path(folder) / "model", args.model))
        model, spec = load(resolved, args.device), input_spec(resolved)
        store = Store(f"{folder}/store")
        tokens = random_tokens(args.rows, spec.context_length, 49408, 0)
        ref = pairs_block(store, "pairs", tokens=tokens, size=spec.height)
        sequential = plain_rate(model, spec, batch=16, groups=4 * args.groups, options=options)
        plain, size = best_plain(model, spec, args.sizes, args.groups, options)
        run = GradientPass(model, "contrastive", spec=spec, options=options)
        if args.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats()
        block = DataBlock.open(store, ref)
        rates = [args.rows / timed(lambda: run.run(block, "pass")) for _ in range(2)]
        figures = {
            "model": args.model,
            "device": torch.cuda.get_device_name()
            if args.device.startswith("cuda")
            else args.device,
            "precision": args.precision,
            "sequential 16, pairs/s": round(sequential, 1),
            "plain, pairs/s": round(plain, 1),
            "plain batch": size,
            "slsgu, pairs/s": round(max(rates), 1),
            "slsgu first run, pairs/s": round(rates[0], 1),
            "slsgu / plain": round(max(rates) / plain, 2),
            "slsgu / sequential": round(max(rates) / sequential, 2),
        }
        if args.device.startswith("cuda"):
            figures["peak memory, GiB"] = round(torch.cuda.max_memory_allocated() / 2**30, 1)
        products = peak_rates(args.device, args.precision)
        peak = max(products)
        step = plain_step(model, spec, batch=16, options=options)
        images = pixel_normalizer(spec, args.device)(block.images(0, 64))
        ids = to_tokens(tokens[:64], "cpu")
        flop = {
            "plain": (flop_a_pair(step, 16), plain),
            "slsgu": (
                flop_a_pair(lambda: run.losses(images, ids).sum().backward(), len(ids)),
                max(rates),
            ),
        }
        for kind, rate in zip(("PyTorch's", "towers'"), products, strict=True):
            figures[f"{kind} products, TFLOP/s"] = round(rate / 1e12, 3)
        for name, (each, rate) in flop.items():
            figures[f"{name}, GFLOP a pair"] = round(each / 1e9, 1)
            figures[f"{name}, share of the products"] = round(each * rate / peak, 3)
        layers = candidates(name for name, _ in model.named_parameters())
        for kind in Statistic:
            work = partial(layer_sums, kind, model, layers, block, spec=spec, device=args.device)
            a_row = timed(work) / min(args.rows, MOST_ROWS)
            figures[f"{kind} of a row / its gradient"] = round(a_row * max(rates), 2)
        if args.compile:
            towers.attention_half = torch.compile(towers.attention_half)
            towers.mlp_half = torch.compile(towers.mlp_half)
            seconds = [timed(lambda: run.run(block, "pass")) for _ in range(2)]
            figures["compiled, pairs/s"] = round(args.rows / seconds[1], 1)
            figures["compiled, s to warm up"] = round(seconds[0] - seconds[1], 1)
        table = profile(lambda: run.run(block, "pass"), args.device) if args.profile else ""
    print(json.dumps(figures, indent=1))
    print(table, end="")


if __name__ == "__main__":
    main()
