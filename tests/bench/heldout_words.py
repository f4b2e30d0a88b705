"""Measure edits that are made from words alone on test images.

    python tests/bench/heldout_words.py                     # 16 concepts drawn by seed 0
    python tests/bench/heldout_words.py --concepts github,castle --store heldout-words
    python tests/bench/heldout_words.py --retain captions   # retain the icons' captions
    python tests/bench/heldout_words.py --to "a logo"

Concepts are those of heldout.py. Each set is built from the concept's name and, by default, from
the names of the embedded model's classes to retain: no image has a part in the gradient, the
ranking or the search. The edit is then measured on the test images of the concept's image set.
Run it again on the same store to resume.
"""

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from heldout import draw

from slsgu_cli.checkpoints.edits import load_edit
from slsgu_cli.cli.demo import DATA, demo_request
from slsgu_cli.clip.evaluation import prepare
from slsgu_cli.clip.loading import load
from slsgu_cli.clip.models import resolve
from slsgu_cli.clip.tokenizers import tokenizer
from slsgu_cli.engine.effect import report
from slsgu_cli.engine.gradients import compute_gradients
from slsgu_cli.engine.ranking import rank
from slsgu_cli.engine.search import search
from slsgu_cli.errors import SlsguError
from slsgu_cli.records.directions import Direction
from slsgu_cli.records.figures import Report
from slsgu_cli.records.method import Criterion
from slsgu_cli.records.options import (
    BuildRequest,
    PassOptions,
    RankOptions,
    SearchOptions,
)
from slsgu_cli.records.sets import PROMPTS
from slsgu_cli.sets.build import build_sets
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.store import Store

RETAINED = ("classes", "captions", "neutral")


def words_request(name: str, retain: str, classes: Path) -> BuildRequest:
    """Return the request of a set from a concept's name alone."""
    request = BuildRequest(
        name=f"{name} words",
        concept=name,
        model=demo_request(name).model,
        words=(name,),
        templates={PROMPTS: str(DATA / "templates.txt")},
    )
    if retain != "neutral":
        request = replace(request, classes={PROMPTS: str(classes)})
    if retain == "captions":
        request = replace(request, retain_sources=(str(DATA / "train.parquet"),))
    return request


def class_file(folder: Path) -> Path:
    """Write the names of the embedded model's classes to a file in a folder."""
    names = json.loads((DATA / "classes.json").read_text())
    path = folder / "classes.txt"
    path.write_text("\n".join(name for kind in sorted(names) for name in sorted(names[kind])))
    return path


def effect(store: Store, name: str, edit_name: str) -> Report:
    """Return the effect of an edit on the test rows of an image set."""
    manifest, edit = read_manifest(store, name), load_edit(store, edit_name)
    model = resolve(manifest.model)
    module, layer = load(model, "cpu"), edit.header.layer
    with torch.no_grad():
        evaluation = prepare(store, manifest, module, tokenize=tokenizer(model), device="cpu")
        evaluation.base_pass((), cache_bytes=0)
        return report(evaluation, [(layer, torch.from_numpy(edit.delta()), edit.factor)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concepts", default="16", help="how many, `all`, or names with commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--retain", choices=RETAINED, default="classes")
    parser.add_argument("--direction", type=Direction)
    parser.add_argument("--layers", nargs="*", default=())
    parser.add_argument("--to", help="what each name becomes")
    parser.add_argument("--criterion", type=Criterion, default=SearchOptions().criterion)
    parser.add_argument("--overshoot", type=float, default=SearchOptions().overshoot)
    parser.add_argument("--store", type=Path, help="keep everything here, to resume later")
    options = parser.parse_args()
    folder = options.store or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    classes = class_file(folder)
    store = Store(str(folder / "store"))
    search_options = SearchOptions(
        criterion=options.criterion, overshoot=options.overshoot, layers=options.layers
    )
    print("concept\tlayer\tshare\tFA@1\tFA@5\tof\tbrands lost\tobjects lost\tnearest lost\tseconds")
    table: list[tuple[float, ...]] = []
    for name in draw(options.concepts, options.seed):
        request = words_request(name, options.retain, classes)
        try:
            if not store.exists(Artifact.SET.path(name)):
                build_sets(store, demo_request(name))
            start = time.perf_counter()
            build_sets(store, request)
            compute_gradients(store, request.name, options=PassOptions(anchor=options.to))
            rank(store, request.name, options=RankOptions(direction=options.direction))
            result = search(store, request.name, options=search_options)
        except SlsguError as error:
            print(f"{name}\t{error}")
            continue
        seconds = time.perf_counter() - start
        found = effect(store, name, request.name)
        lost = [
            found.before.utility[group].top1 - found.after.utility[group].top1
            for group in ("brands", "objects")
        ]
        nearest = mean(each.lost for each in found.nearest)
        forget = found.after.forget
        table.append((forget.top1, forget.top5, *lost, nearest, seconds))
        chosen = result.chosen
        print(
            f"{name}\t{chosen.layer}\t{chosen.share:.2f}\t{forget.top1:.1f}\t{forget.top5:.1f}\t"
            f"{forget.rows}\t{lost[0]:.2f}\t{lost[1]:.2f}\t{nearest:.2f}\t{seconds:.1f}",
            flush=True,
        )
    if table:
        columns = list(zip(*table, strict=True))
        print("mean\t\t\t" + "\t".join(f"{mean(column):.2f}" for column in columns))
        print("worst\t\t\t" + "\t".join(f"{max(column):.2f}" for column in columns))


if __name__ == "__main__":
    main()
