"""Time the whole job after `build-sets`: the commands one after another.

    python tests/bench/bench_job.py --model ViT-B-32 --forget 64 --retain 64 --images 400 100
    python tests/bench/bench_job.py --model ViT-B-32 --device cuda --precision bf16

By default the sizes are the paper's: 6,000 forget and 7,900 retain pairs, and evaluation sets
of 50,000 images of 1,000 classes and of 10,000 more. Weights are random and the sets generated
(see synthetic.py). Each command runs in its own process, start-up included; peak memory is the
process's, and on a GPU that of its tensors too.
"""

import argparse
import json
import tempfile
from pathlib import Path

import apart
from safetensors import safe_open
from safetensors.numpy import save_file
from synthetic import random_model, synthetic_set

from slsgu_cli.store.store import Store

NAME = "job"


# `rank` runs several times: along the gradient, with defaults, with its covariances in the
# store, and at the end once more along gradients without digests.
def run(store: Store, command: str, *options: str) -> dict:
    """Run a command and return its seconds, the seconds spent on digests, and peak memory."""
    seconds, peak, digests = apart.command(command, NAME, *options, "--store", store.root)
    told = {f"{kind}, MB": round(size / 1024) for kind, size in peak.items()}
    times = {"seconds": round(seconds, 1), "digests, s": round(digests, 2)}
    return {"command": command, **times, "digests, %": round(100 * digests / seconds, 1), **told}


def without_digests(store: Store) -> None:
    """Write the gradients of a store without digests."""
    for name in store.names("gradients", ".safetensors"):
        path = store.where(f"gradients/{name}.safetensors")
        with safe_open(path, "np") as file:
            header = json.loads(file.metadata()["slsgu"])
            tensors = {key: file.get_tensor(key).copy() for key in file.keys()}  # noqa: SIM118
        bare = {key: value for key, value in header.items() if key not in ("sha256", "tensors")}
        save_file(tensors, path, {"slsgu": json.dumps(bare)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="ViT-B-32")
    parser.add_argument("--forget", type=int, default=6000)
    parser.add_argument("--retain", type=int, default=7900)
    parser.add_argument("--images", type=int, nargs=2, default=[50_000, 10_000])
    parser.add_argument("--classes", type=int, nargs=2, default=[1000, 10])
    parser.add_argument("--wrong", type=float, default=0.1, help="share of labels that are wrong")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="fp32")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/store")
        evals = {
            name: (args.images[number], args.classes[number])
            for number, name in enumerate(("first", "second"))
        }
        synthetic_set(
            store,
            NAME,
            random_model(Path(folder) / "model", args.model),
            forget=args.forget,
            retain=args.retain,
            evals=evals,
            device=args.device,
            wrong=args.wrong,
        )
        there = ("--device", args.device)
        # Accuracies are not measured in bf16.
        measuring = "tf32" if args.precision == "bf16" else args.precision
        rows = [
            run(store, "grad", *there, "--precision", args.precision),
            run(store, "rank", "--direction", "gradient"),
            run(store, "rank", *there),
            run(store, "rank", *there),
            run(store, "search", *there, "--precision", measuring),
            run(store, "apply", "--out", f"{folder}/edited"),
        ]
        without_digests(store)
        bare = run(store, "rank", "--direction", "gradient")
        rows.append({**bare, "command": "rank without digests"})
        trials = json.loads(store.read_bytes(f"trials/{NAME}.json"))["trials"]
    whole = round(sum(row["seconds"] for row in rows[:-1]), 1)
    print(json.dumps({"model": args.model, "device": args.device, "precision": args.precision}))
    for row in [*rows, {"command": "whole job", "seconds": whole, "trials": len(trials)}]:
        print(json.dumps(row))


if __name__ == "__main__":
    main()
