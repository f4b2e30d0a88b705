"""Run a recipe of many requests, then kill and resume a second run: are the bytes equal?

    python tests/bench/bench_recipe.py --store recipe-store
    python tests/bench/bench_recipe.py --requests 6 --retain 100 --kill-at grad:4 search:1

Classes of the embedded model are drawn by seed, and searched jointly on text layers along the
whitened direction. `whole` runs undisturbed. `killed` gets SIGKILL a few seconds into a stage,
such as the fourth `grad`, and is started again. The script prints the seconds of each stage, the
seconds per request, the checkpoint's figures on test images, and whether all written files are
equal. Run again on the same store, it resumes; its seconds then cover the rest only.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path
from urllib.parse import quote

import heldout

from slsgu_cli.cli.demo import DATA

RECIPE = f"""\
model = "local-dir:{DATA / "clip"}"
shared_retain = true
outputs = {{checkpoint = "checkpoint", edits = "edits"}}
[sets]
retain_sources = ["{DATA / "train.parquet"}"]
retain_samples = RETAIN
[evaluation.brands]
source = "{DATA / "heldout.parquet"}?kind=brand"
templates = "{DATA / "templates.txt"}"
[evaluation.objects]
source = "{DATA / "heldout.parquet"}?kind=object"
templates = "{DATA / "templates.txt"}"
[rank]
tower = "text"
direction = "whitened"
[search]
criterion = "STEER"
"""
# Seconds into a stage before it is killed.
SECONDS = 3.0


def write_recipe(folder: Path, options: argparse.Namespace) -> None:
    """Write a recipe with so many requests into a folder, unless it has one."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.toml"
    if not path.exists():
        recipe = RECIPE.replace("RETAIN", str(options.retain)).replace("STEER", options.criterion)
        for concept in list(heldout.draw("all", options.seed))[: options.requests]:
            name = concept.replace(" ", "-")
            recipe += f'[[request]]\nname = "{name}"\nconcept = "{concept}"\n'
            recipe += f'sources = ["{DATA / "train.parquet"}?concept={quote(concept)}"]\n'
        path.write_text(recipe)


def run(folder: Path, kill_at: str | None = None) -> list[dict]:
    """Run the recipe of a folder; return its events until it ends or is killed."""
    command = [sys.executable, "-m", "slsgu_cli", "run", "recipe.toml", "--json-lines", "-q"]
    events, begun = [], Counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            event = json.loads(line)
            events.append(event)
            if event["event"] == "begin":
                begun[event["stage"]] += 1
                if f"{event['stage']}:{begun[event['stage']]}" == kill_at:
                    time.sleep(SECONDS)
                    process.kill()
                    break
    return events


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of each file that a recipe wrote."""
    files = (file for out in ("checkpoint", "edits") for file in (folder / out).rglob("*"))
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.is_file()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--retain", type=int, default=400, help="retain rows without requests")
    parser.add_argument("--criterion", choices=("fa1", "fa5"), default="fa1", help="as for search")
    parser.add_argument(
        "--kill-at", nargs="*", default=["rank:35", "search:1"], metavar="STAGE:N", help="in turn"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", type=Path, help="keep everything here, to resume later")
    options = parser.parse_args()
    folder = options.store or Path(tempfile.mkdtemp())
    for name in ("whole", "killed"):
        write_recipe(folder / name, options)
    events = run(folder / "whole")
    took: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event["event"] == "end":
            took[event["stage"]].append(event["seconds"])
    print("stage\tsteps\tseconds\ta request")
    for stage, seconds in took.items():
        whole = sum(seconds)
        print(f"{stage}\t{len(seconds)}\t{whole:.0f}\t{whole / options.requests:.1f}")
    print(json.dumps(events[-1], indent=1))
    for step in options.kill_at:
        if run(folder / "killed", step)[-1]["event"] != "begin":
            sys.exit(f"the run ended before it could be killed in {step}")
        print(f"killed in {step}", flush=True)
    run(folder / "killed")
    files, others = (digests(folder / name).items() for name in ("whole", "killed"))
    differing = sorted({name for name, _ in files ^ others})
    print(f"{len(files)} files, not the same: {', '.join(differing) or 'none'}")


if __name__ == "__main__":
    main()
