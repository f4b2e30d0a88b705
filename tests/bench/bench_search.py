"""Compare a whole search with one plain evaluation of the same sets, side by side.

    python tests/bench/bench_search.py                       # the embedded CLIP, facebook
    python tests/bench/bench_search.py --concept castle --criterion fa5
    python tests/bench/bench_search.py --exact               # doubling, bisection and proof
    python tests/bench/bench_search.py --wrong 0.4 --tower vision   # vision layers alone
    python tests/bench/bench_search.py --model ViT-B-32 --images 400 --wrong 0
    python tests/bench/bench_search.py --direction whitened --criterion fa1 --utility ta1 \
        --overshoot 1 --test-fraction 0                # one direction, no more than forgets

`plain` loads the model and runs open_clip's own forward once over every evaluation image
and every prompt at the full context. A plain search does that 1 + steps x layers times.
With --model, the weights are random and the images made up: see synthetic.py. `--further`
searches with the original model's features in the store, as for a further concept. On a CPU
seconds are those of the processor, of all threads: others on the machine do not count in them.
"""

import argparse
import json
import tempfile
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from synthetic import random_model, synthetic_set

from slsgu_cli.cli.demo import DATA, demo_request
from slsgu_cli.clip.batches import pixel_normalizer, spans, to_tokens
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.method import Criterion, Precision, Tower, UtilityMetric
from slsgu_cli.records.option_fields import bytes_of
from slsgu_cli.records.options import (
    MAX_CLASS_LOSS,
    NO_BOUND,
    BuildRequest,
    PassOptions,
    RankOptions,
    SearchOptions,
)
from slsgu_cli.records.sets import SetManifest
from slsgu_cli.sets.build import build_sets
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

# The batch size at which open_clip is fastest, of those tried.
BATCH = {"cpu": 16, "cuda": 512}


def clock(device: str) -> float:
    """Return the CPU seconds so far, or on another device the elapsed seconds."""
    return time.process_time() if device == "cpu" else time.perf_counter()


def mislabelled(request: BuildRequest, share: float, folder: Path) -> BuildRequest:
    """Return a request whose evaluation sets have a share of wrong labels.

    The concept's labels stay right, and no other image gets its label.
    """
    heldout = pq.read_table(DATA / "heldout.parquet")
    labels = np.array(heldout["concept"].to_pylist())
    rng = np.random.default_rng(0)
    for kind in ("brand", "object"):
        others = (np.array(heldout["kind"].to_pylist()) == kind) & (labels != request.concept)
        rows = rng.permutation(np.flatnonzero(others))[: int(share * others.sum())]
        labels[rows] = labels[np.roll(rows, 1)]
    place = heldout.schema.get_field_index("concept")
    path = folder / "heldout.parquet"
    pq.write_table(heldout.set_column(place, "concept", pa.array(labels.tolist())), path)
    sources = {
        n: s.replace(str(DATA / "heldout.parquet"), str(path)) for n, s in request.evals.items()
    }
    return replace(request, evals=sources)


def plain_evaluation(store: Store, manifest: SetManifest, device: str) -> float:
    """Return the seconds that open_clip takes to classify every evaluation image once."""
    start = clock(device)
    resolved = resolve(manifest.model)
    model: Any = load(resolved, device)
    tokenize = tokenizer(resolved)
    normalize = pixel_normalizer(manifest.input, device)
    with torch.no_grad():
        for ref in manifest.evals.values():
            block = DataBlock.open(store, ref)
            texts = [t.replace("{}", name) for name in block.class_names for t in block.templates]
            tokens = to_tokens(tokenize(texts), device)
            prompts = torch.cat([model.encode_text(p, True) for p in tokens.split(BATCH[device])])
            images = torch.cat(
                [
                    model.encode_image(normalize(block.images(a, b)), True)
                    for a, b in spans(block.rows, BATCH[device])
                ]
            )
            classes = prompts.view(len(block.class_names), -1, prompts.shape[1]).mean(dim=1)
            (images @ classes.T).argmax(dim=1).sum().item()
    return clock(device) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", default="facebook")
    parser.add_argument("--retain", type=int, default=2000)
    parser.add_argument("--model", help="an open_clip architecture, with random weights")
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--pairs", type=int, default=64)
    parser.add_argument("--wrong", type=float, default=0.0, help="share of labels that are wrong")
    parser.add_argument("--tower", type=Tower, help="search only its layers")
    parser.add_argument("--exact", action="store_true", help="as for search")
    parser.add_argument("--further", action="store_true", help="keep the original's features")
    parser.add_argument("--criterion", type=Criterion, default=SearchOptions().criterion)
    parser.add_argument("--direction", type=Direction, default=Direction.BOTH)
    parser.add_argument("--utility", type=UtilityMetric, default=SearchOptions().utility)
    parser.add_argument("--overshoot", type=float, default=SearchOptions().overshoot)
    parser.add_argument("--test-fraction", type=float, default=0.5, help="as for build-sets")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", type=Precision, default=Precision.FP32)
    size = partial(bytes_of, "--cache-budget")
    parser.add_argument("--cache-budget", type=size, help="as for search, such as 500M")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--store", help="keep the set here, to run again without building it")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = Store(args.store or f"{folder}/store")
        if args.model:
            manifest = synthetic_set(
                store,
                "made-up",
                random_model(Path(folder) / "model", args.model),
                forget=args.pairs,
                retain=args.pairs,
                evals={"first": (args.images, args.classes)},
                device=args.device,
                wrong=args.wrong,
                test_fraction=args.test_fraction,
            )
        else:
            request = replace(
                demo_request(args.concept),
                retain_samples=args.retain,
                test_fraction=args.test_fraction,
            )
            if args.wrong:
                request = mislabelled(request, args.wrong, Path(folder))
            manifest = build_sets(store, request)
        options = PassOptions(device=args.device, precision=args.precision)
        compute_gradients(store, manifest.name, model=None, options=options)
        ranking = rank(
            store, manifest.name, options=RankOptions(direction=args.direction, tower=args.tower)
        )
        plain, ours = [], []
        for _ in range(args.rounds):
            plain.append(plain_evaluation(store, manifest, args.device))
            store.remove(Artifact.TRIALS.path(manifest.name))
            for kept in () if args.further else Artifact.FEATURES.names(store):
                store.remove(Artifact.FEATURES.path(kept))
            start = clock(args.device)
            result = search(
                store,
                manifest.name,
                options=SearchOptions(
                    criterion=args.criterion,
                    utility=args.utility,
                    overshoot=args.overshoot,
                    exact=args.exact,
                    max_class_loss=NO_BOUND if args.overshoot == 1 else MAX_CLASS_LOSS,
                    device=args.device,
                    precision=args.precision,
                    cache_budget=args.cache_budget,
                ),
            )
            ours.append(clock(args.device) - start)
        layers = len({score.layer for score in ranking.scores if score.front})
        lines = len({trial.move for trial in result.trials.trials})
        figures = {
            "set": args.model or args.concept,
            "front layers": layers,
            "layers and directions": lines,
            "trials": len(result.trials.trials),
            "measurement": Counter(
                str(t.measurement) for t in result.trials.trials if t.measurement
            ),
            "chosen": f"{result.chosen.layer} {result.chosen.step:.5g}",
            "plain evaluation, s": round(min(plain), 2),
            "whole search, s": round(min(ours), 2),
            "search / plain evaluation": round(min(ours) / min(plain), 2),
            "plain search / plain evaluation": 1 + 11 * lines,
        }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
