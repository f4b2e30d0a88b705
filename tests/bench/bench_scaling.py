"""Measure time and peak memory against the number of samples, of layers, and the size of the model.

    python tests/bench/bench_scaling.py                     # all tables; about 15 minutes
    python tests/bench/bench_scaling.py --tables pairs layers --most 4096
    python tests/bench/bench_scaling.py --tables models --models ViT-B-32 ViT-L-14 --pairs 64

Every line is the work of one command in its own process, from store to store, so that its peak
memory is its own. Sets are random (see synthetic.py); except in the table of models, the model
is the embedded CLIP.

- pairs: `grad` against the rows of the retain set
- images: `search` against the evaluation images, with a cache budget of 256 MiB
- layers: `search` against the layers searched, the front first
- models: `grad` against the size of the model
- processes: `grad`, the covariances of `rank`, `search` and `sweep` in 1, 2 and 4 processes of
  one thread. Efficiency is computed from the core-seconds of the busiest process, without
  start-up, so that other load does not affect it
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from apart import peak_memory
from synthetic import random_model, synthetic_set

import slsgu_cli
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.method import GradientHeader
from slsgu_cli.records.options import PassOptions, RankOptions, SearchOptions
from slsgu_cli.records.sets import ModelSpec
from slsgu_cli.store.artifacts import read_manifest, read_pointer
from slsgu_cli.store.store import Store

EMBEDDED = ModelSpec(f"local-dir:{Path(slsgu_cli.__file__).parent / 'demo' / 'clip'}")
CACHE = 256 << 20
FORGET = 32

# The memory that every process needs before it does any work.
START_UP = "import torch.distributed, open_clip, slsgu_cli.cli.app"


def counts(most: int, least: int = 1024) -> list[int]:
    """Return `least`, twice as many, and so on, up to `most`."""
    found = [least]
    while 2 * found[-1] <= most:
        found.append(2 * found[-1])
    return found


def measure(folder: str, name: str, device: str, layers: list[str] | None) -> None:
    """Do the work of one command and print its seconds and this process's peak memory."""
    store = Store(folder)
    start = time.perf_counter()
    if layers is None:
        options = PassOptions(device=device)
        compute_gradients(store, name, model=None, options=options)
    else:
        search(
            store,
            name,
            options=SearchOptions(layers=layers, device=device, cache_budget=CACHE),
        )
    seconds = time.perf_counter() - start
    peak = round(peak_memory() / 1024)
    print(json.dumps({"seconds": round(seconds, 1), "peak memory, MB": peak}))


def apart(store: Store, name: str, device: str, layers: list[str] | None = None) -> dict:
    """Run `measure` in its own process and return its results."""
    command = [sys.executable, __file__, "--measure", store.root, name, "--device", device]
    if layers is not None:
        command += ["--layers", *layers]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def pairs_table(store: Store, args: argparse.Namespace) -> list[dict]:
    rows = []
    for count in counts(args.most):
        name = f"pairs-{count}"
        synthetic_set(
            store, name, EMBEDDED, forget=FORGET, retain=count, evals={}, device=args.device
        )
        found = apart(store, name, args.device)
        rate = round((count + FORGET) / found["seconds"])
        rows.append({"pairs": count, **found, "pairs/s": rate})
    return rows


def searchable(store: Store, name: str, images: int, device: str) -> list[str]:
    """Build, grade and rank a set; return its layers, the front first."""
    evals = {"made-up": (images, 100)}
    synthetic_set(store, name, EMBEDDED, forget=64, retain=256, evals=evals, device=device)
    options = PassOptions(device=device)
    compute_gradients(store, name, model=None, options=options)
    scores = rank(store, name, options=RankOptions(direction=Direction.WHITENED)).scores
    return [score.layer for score in sorted(scores, key=lambda score: not score.front)]


def images_table(store: Store, args: argparse.Namespace) -> list[dict]:
    rows = []
    for count in counts(args.most):
        layers = searchable(store, f"images-{count}", count, args.device)[:4]
        rows.append({"images": count, **apart(store, f"images-{count}", args.device, layers)})
    return rows


def layers_table(store: Store, args: argparse.Namespace) -> list[dict]:
    layers = searchable(store, "layers", 1024, args.device)
    rows = []
    for count in counts(16, least=1):
        store.remove("trials/layers.json")
        found = apart(store, "layers", args.device, layers[:count])
        rows.append({"layers": count, **found})
    return rows


def models_table(store: Store, args: argparse.Namespace) -> list[dict]:
    rows = []
    for name in ["embedded", *args.models]:
        folder = Path(store.root) / "models" / name
        model = EMBEDDED if name == "embedded" else random_model(folder, name)
        synthetic_set(
            store, name, model, forget=FORGET, retain=args.pairs, evals={}, device=args.device
        )
        found = apart(store, name, args.device)
        pointer = read_pointer(store, read_manifest(store, name))
        header = store.read_header(f"gradients/{pointer.forget}.safetensors", GradientHeader)
        size = sum(_product(norm.shape) for norm in header.weights.values())
        rate = round((args.pairs + FORGET) / found["seconds"], 1)
        rows.append({"model": name, "M parameters": round(size / 1e6), **found, "pairs/s": rate})
    return rows


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def swept(folder: Path, args: argparse.Namespace) -> list[str]:
    """Return a sweep over four brands of the embedded CLIP."""
    demo = Path(slsgu_cli.__file__).parent / "demo"
    (folder / "classes.txt").write_text("facebook\ntwitter\ngithub\ngoogle\n")
    return [
        "sweep",
        "brands",
        "--classes",
        str(folder / "classes.txt"),
        "-m",
        EMBEDDED.name,
        "-s",
        str(demo / "train.parquet"),
        "--retain-samples",
        str(args.rows_shared // 4),
        "--eval",
        f"brands={demo}/heldout.parquet?kind=brand",
        "--steps",
        "3",
        "--direction",
        "gradient",
    ]


def timed_in(processes: int, store: Path, words: list[str]) -> dict[str, float]:
    """Return the time that a command takes in a number of processes of one thread.

    `seconds` is wall time; `core` is the CPU time of all processes and their launcher, and
    `busiest` that of the process that worked longest.
    """
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), "slsgu_cli"]
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, *words, "-v", "--store", str(store)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    # A sweep that misses a brand ends with 5, and torchrun then with 1.
    if done.returncode not in (0, 5) and "no step forgets" not in done.stderr:
        raise SystemExit(done.stderr)
    core_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    match = re.search(r"the busiest of \d+ processes worked for ([0-9.]+) s", done.stderr)
    busiest = float(match[1]) if match else core_seconds
    return {"seconds": seconds, "core": core_seconds, "busiest": busiest}


def core_seconds_of(command: list[str]) -> float:
    """Return the CPU seconds of a process over all cores."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def processes_table(store: Store, args: argparse.Namespace) -> list[dict]:
    """Time four commands, each on a copy of its inputs."""
    synthetic_set(
        store,
        "many",
        EMBEDDED,
        forget=64,
        retain=args.rows_shared,
        evals={"made-up": (args.rows_shared, 100)},
        device=args.device,
    )
    commands = {
        "grad": ["grad", "many"],
        "covariances": ["rank", "many"],
        "search": ["search", "many", "--steps", "4", "--direction", "gradient"],
        "sweep": swept(Path(store.root), args),
    }
    rows = []
    start_up = core_seconds_of([sys.executable, "-c", START_UP])
    for what, words in commands.items():
        alone = {}
        for count in args.processes:
            copy = Path(f"{store.root}-{count}")
            shutil.copytree(store.root, copy)
            took = timed_in(count, copy, words)
            alone = alone or took
            rows.append(
                {
                    "command": what,
                    "processes": count,
                    "seconds": round(took["seconds"], 1),
                    "core-seconds": round(took["core"], 1),
                    "busiest": round(took["busiest"], 1),
                    "efficiency": round(
                        (alone["busiest"] - start_up) / (took["busiest"] - start_up) / count, 2
                    ),
                }
            )
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if count < args.processes[-1]:
                shutil.rmtree(copy)
        shutil.rmtree(store.root)
        copy.rename(store.root)
    return rows


TABLES = {
    "pairs": pairs_table,
    "images": images_table,
    "layers": layers_table,
    "models": models_table,
    "processes": processes_table,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--most", type=int, default=16384, help="samples in the longest lines")
    parser.add_argument("--models", nargs="*", default=["ViT-B-32", "ViT-L-14"])
    parser.add_argument("--pairs", type=int, default=32, help="retain rows in the table of models")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--rows-shared", type=int, default=960, help="rows in that table")
    parser.add_argument("--measure", nargs=2, metavar=("STORE", "NAME"), help=argparse.SUPPRESS)
    parser.add_argument("--layers", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        folder, name = args.measure
        measure(folder, name, args.device, args.layers)
        return
    with tempfile.TemporaryDirectory() as folder:
        for table in args.tables:
            rows = TABLES[table](Store(folder), args)
            print("| " + " | ".join(rows[0]) + " |")
            print("|" + "---|" * len(rows[0]))
            for row in rows:
                print("| " + " | ".join(map(str, row.values())) + " |")
            print(flush=True)


if __name__ == "__main__":
    main()
