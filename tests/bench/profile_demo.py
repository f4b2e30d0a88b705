"""Print the seconds of `slsgu demo`, stage by stage.

    python tests/bench/profile_demo.py
    python tests/bench/profile_demo.py --concept castle

The demo runs in this process, with a stopwatch around each of its stages. `start` covers
imports and the command line.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module

STARTED = time.perf_counter()

from slsgu_cli.cli.app import app  # noqa: E402

# The stages and their functions, under the names by which the demo imports them.
STAGES = {
    "build-sets": "slsgu_cli.sets.build.build_sets",
    "grad": "slsgu_cli.engine.gradients.compute_gradients",
    "rank, with the covariances of the direction": "slsgu_cli.engine.plots.rank_and_plot",
    "search": "slsgu_cli.engine.plots.search_and_plot",
    "apply": "slsgu_cli.engine.apply.apply",
    "picture of before and after": "slsgu_cli.engine.examples.draw_examples",
}


def timed(call: Callable, seconds: dict[str, float], stage: str) -> Callable:
    """Return the function with a stopwatch around it."""

    @wraps(call)
    def wrapped(*args, **kwargs):
        seconds.setdefault("start", time.perf_counter() - STARTED)
        start = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            seconds[stage] = time.perf_counter() - start

    return wrapped


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concept", default="facebook")
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    for stage, place in STAGES.items():
        module, _, name = place.rpartition(".")
        room = import_module(module)
        setattr(room, name, timed(getattr(room, name), seconds, stage))
    with tempfile.TemporaryDirectory() as folder:
        command = ["demo", args.concept, "--store", f"{folder}/store", "-q"]
        app(command, standalone_mode=False)
    whole = time.perf_counter() - STARTED
    seconds["the rest"] = whole - sum(seconds.values())
    figures = {stage: round(spent, 1) for stage, spent in seconds.items()} | {
        "all": round(whole, 1)
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
