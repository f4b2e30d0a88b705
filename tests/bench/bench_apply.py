"""Compare `apply` with `cp -r` in time, on a model of a given architecture; measure peak memory.

    python tests/bench/bench_apply.py --model ViT-L-14 --rounds 5 --dtype F16

Three commands run in turn in their own processes, each to a new target after a sync: `cp -r`,
`slsgu apply`, and `slsgu apply --force`, which does not compare the other layers with those
that the edit was made for. `apply` includes the start of Python, reading the store and the
model's configuration, and hashing the weights. The goal: `--force` takes at most 1.2 times as
long as cp plus half a second, and less than 300 MB.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import apart
import numpy as np
import open_clip
import torch
from safetensors.torch import save_file

from slsgu_cli.checkpoints.clip_weights import ClipWeights
from slsgu_cli.checkpoints.edits import write_edit
from slsgu_cli.clip.models import fingerprint, resolve
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.store import Store

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from edit_headers import edit

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
LAYER = "visual.transformer.resblocks.0.mlp.c_fc.weight"


def make_model(folder: Path, name: str, dtype: str) -> ModelSpec:
    """Write a model of random weights in a number format."""
    folder.mkdir()
    config = {"model_cfg": open_clip.get_model_config(name), "preprocess_cfg": {}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    tensors = open_clip.create_model(name).state_dict()
    converted = {key: value.to(DTYPES[dtype]) for key, value in tensors.items()}
    save_file(converted, folder / "open_clip_model.safetensors")
    return ModelSpec(f"local-dir:{folder}")


def make_edit(store: Path, model: ModelSpec) -> None:
    """Write an edit of one layer of a model into a store."""
    resolved = resolve(model)
    before = ClipWeights.of_file(resolved.weights).layer(LAYER)
    made = edit(LAYER, np.full(before.shape, 1e-3, np.float32), before)
    header = replace(made.header, model=model, model_fingerprint=fingerprint(resolved))
    write_edit(Store(str(store)), replace(made, header=header))


def copied(source: Path, target: Path) -> tuple[float, float]:
    """Return the seconds of `cp -r`, and no memory."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    return time.perf_counter() - start, 0.0


def applied(store: Path, target: Path, *options: str) -> tuple[float, float]:
    """Return the seconds of `slsgu apply`, and its peak memory in MB."""
    words = ("apply", "facebook", "--store", str(store), "--out", str(target), *options)
    seconds, peak, _ = apart.command(*words)
    return seconds, peak["process"] / 1024


def main() -> None:
    """Print the times of all three, and the peak memory of apply."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--model", default="ViT-L-14", help="an architecture of open_clip")
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--dtype", choices=sorted(DTYPES), default="F16")
    options.add_argument("--folder", type=Path, help="output folder (default: a temporary one)")
    chosen = options.parse_args()
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        source, target, store = folder / "model", folder / "out", folder / "store"
        make_edit(store, make_model(source, chosen.model, chosen.dtype))
        gigabytes = sum(file.stat().st_size for file in source.iterdir()) / 1e9
        runs = {
            "cp -r": lambda: copied(source, target),
            "apply": lambda: applied(store, target),
            "apply --force": lambda: applied(store, target, "--force"),
        }
        times: dict[str, list[float]] = {name: [] for name in runs}
        memory = 0.0
        for turn in range(chosen.rounds):
            # Change the order each time: the disk cache has what was written before.
            for name in sorted(runs, reverse=turn % 2 == 1):
                shutil.rmtree(target, ignore_errors=True)
                subprocess.run(["sync"], check=True)
                seconds, peak = runs[name]()
                times[name].append(seconds)
                memory = max(memory, peak)
    finally:
        shutil.rmtree(folder)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"{chosen.model}, {gigabytes:.2f} GB {chosen.dtype}, median of {chosen.rounds}")
    for name, values in times.items():
        print(f"{name:14}{median[name]:7.3f} s   ({', '.join(f'{each:.2f}' for each in values)})")
    compared = median["apply"] - median["apply --force"]
    print(f"comparing the other layers {compared:.3f} s, {compared / gigabytes:.2f} s a GB")
    limit = 1.2 * median["cp -r"] + 0.5
    print(f"peak memory {memory:.0f} MB, limit 300 MB; without comparing, limit {limit:.3f} s")
    within = median["apply --force"] <= limit and memory < 300
    print("within both limits" if within else "ABOVE A LIMIT")


if __name__ == "__main__":
    main()
