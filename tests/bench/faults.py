"""Kill, damage, starve and crowd the commands, and count losses and silent errors.

    python tests/bench/faults.py                             # all parts, half an hour
    python tests/bench/faults.py --parts flips --flips 30    # one part, smaller
    python tests/bench/faults.py --folder faults             # keep the files

A tiny CLIP of coloured shapes goes through the commands once, undisturbed. Then, by seed:

- `flips`, `cuts`: a bit of an artifact is flipped, or its end is cut off, kind after kind; the
  command that reads it runs. It may refuse (exit 3) or give the same result.
- `kills`: each command is killed by SIGKILL at random times, three times in a row, and then runs
  to its end; `slsgu check` follows. Times are drawn over the command's duration.
- `pairs`: two processes build or grade the same set at once.
- `full`, `readonly`: the store is on a small tmpfs, or on a read-only mount (needs root).
- `s3`: the store is on an S3 server on loopback, which answers each command once with 500 and
  503, once with a closed connection and once with a truncated answer;
- `models`: a file of a model is damaged, in every layout that is read, and a command loads it.

Losses, silent errors and unexpected errors must be 0; otherwise the exit code is 1.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

import tiny_clip
from forked import KEEP_ALWAYS, Forked
from processes import environment, inside, start
from safetensors import safe_open

LAYER = "transformer.resblocks.2.mlp.c_proj.weight"
# Commands in the order of use, with the store folders that they read; in turn, a flip or a cut
# is made in each folder, and the command next to it runs.
READERS = {
    "sets": "eval",
    "data": "grad",
    "gradients": "rank",
    "covariances": "rank",
    "rankings": "search",
    "trials": "search",
    "edits": "apply",
    "trajectories": "trajectory",
    "verifications": "verify",
    "comparisons": "compare",
    "joint": "joint",
}
# Commands that would find their own result and compute nothing.
AGAIN = {"grad": ("gradients", "covariances", "rankings")}
# Fields that may differ between two equal runs.
TIMES = re.compile(r"seconds|took|version|created|path|files|plots|sha256")


@dataclass
class Count:
    """The outcomes of the faults of one part."""

    tried: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def add(self, outcome: str, what: str, *, bad: bool = False) -> None:
        """Count one fault; bad outcomes are shown at the end."""
        self.tried += 1
        self.outcomes[outcome] += 1
        if bad:
            self.bad.append(f"{outcome}: {what}")


class Bench:
    """A tiny model with its rows, the arguments of every command, and the store before each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "clip").exists():
            tiny_clip.write_folder(folder / "clip", tiny_clip.fitted_model())
        pairs = tiny_clip.write_pairs(folder / "pairs.parquet", range(160))
        kinds = {"colour": range(1000, 1064), "shape": range(2000, 2040)}
        labelled = tiny_clip.write_labelled(folder / "labelled.parquet", kinds)
        build = (
            f"--model local-dir:{folder / 'clip'} --source {pairs} --label-column label "
            f"--retain-samples 60 --test-fraction 0 --retain-exclude blue --retain-exclude red "
            f"--eval first={labelled}?kind=colour --eval second={labelled}?kind=shape"
        )
        options = f"--layer {LAYER} --direction whitened --criterion fa1"
        self.words = {
            "build": f"build-sets blue {build}",
            "build red": f"build-sets red {build}",
            "grad": "grad blue",
            "grad red": "grad red",
            "rank": "rank blue",
            "rank red": "rank red",
            "search": f"search blue {options}",
            "joint": f"search blue red --joint {options}",
            "trajectory": f"trajectory blue {options} --points 6",
            "verify": "verify blue --checks typos,relearn,prefix,ring-a-bell --rows 20 "
            "--steps 4 --attack-steps 1 --population 20 --generations 4",
            "compare": "compare blue --methods ga,ft --lr 1e-4 --retain-rows 32",
            "eval": "eval blue",
            "apply": "apply blue --overwrite --out {out}",
            "report": "report blue --overwrite --no-examples --out {out}.html",
        }
        # The store before each command, and at the end.
        self.before: dict[str, Path] = {}
        self.whole = folder / "whole"

    def run_whole(self) -> None:
        """Run every command, and save the store before each."""
        shutil.rmtree(self.whole, ignore_errors=True)
        for name in self.words:
            self.before[name] = self.folder / "before" / name
            shutil.rmtree(self.before[name], ignore_errors=True)
            if self.whole.exists():
                shutil.copytree(self.whole, self.before[name])
            done = self.run(name, self.whole)
            if done.exit_code not in (0, 5):
                raise SystemExit(f"{name}: {done.stderr}")

    def line(self, name: str, store: Path | str) -> list[str]:
        """Return the arguments of a command on a store."""
        words = self.words[name].format(out=self.folder / "out").split()
        return [*words, "--json", "--store", str(store)]

    def run(self, name: str, store: Path | str) -> Any:
        """Run a command in this process."""
        shutil.rmtree(self.folder / "out", ignore_errors=True)
        return inside(*self.line(name, store))

    def result(self, name: str, done: Any) -> Any:
        """Return the result of a command: its exit code, its figures, the copy that it wrote."""
        copy = self.folder / "out" / "open_clip_model.safetensors"
        written = copy.read_bytes() if name == "apply" and copy.exists() else b""
        return done.exit_code, without_times(json.loads(done.stdout or "{}")), written

    @contextmanager
    def copied(self, store: Path) -> Iterator[Path]:
        """Yield a copy of a store and remove it afterwards."""
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            copy = Path(folder) / "store"
            if store.exists():
                shutil.copytree(store, copy)
            yield copy


def without_times(value: Any) -> Any:
    """Return a JSON value without the fields that may differ between two equal runs."""
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not TIMES.search(k)}
    return [without_times(each) for each in value] if isinstance(value, list) else value


def contents(store: Path) -> dict[str, Any]:
    """Return the contents of a store, without plots and leftovers, in a comparable form."""
    found: dict[str, Any] = {}
    for path in sorted(store.rglob("*")):
        place = str(path.relative_to(store))
        parts = place.split("/")
        if not path.is_file() or parts[0] == "plots" or any(p.startswith(".") for p in parts):
            continue
        if path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                names = sorted(file.keys())
                found[place] = {name: file.get_tensor(name).tobytes() for name in names}
        elif path.suffix == ".json":
            found[place] = without_times(json.loads(path.read_bytes()))
        else:
            found[place] = path.read_bytes()
    return found


def damage(bench: Bench, rng: random.Random, times: int, harm: Callable[[bytes], bytes]) -> Count:
    """Damage artifacts of each kind in turn, and run the commands that read them."""
    count, expected = Count(), dict[str, Any]()
    kinds = [kind for kind in READERS if (bench.whole / kind).exists()]
    for number in range(times):
        kind = kinds[number % len(kinds)]
        name = READERS[kind]
        with bench.copied(bench.whole) as store:
            for folder in AGAIN.get(name, ()):
                shutil.rmtree(store / folder)
            if name not in expected:
                with bench.copied(store) as other:
                    expected[name] = bench.result(name, bench.run(name, other))
            files = sorted(path for path in (store / kind).rglob("*") if path.is_file())
            files = [path for path in files if not path.name.startswith("red.")]
            path = rng.choice(files)
            path.write_bytes(harm(path.read_bytes()))
            what = f"{path.relative_to(store)}, read by {name}"
            seen = damaged(store)
            done = bench.run(name, store)
            same = bench.result(name, done) == expected[name]
            told = done.exit_code in (3, 4) and "error:" in done.stderr
            outcome = "refused" if told else "same result" if same else "SILENT"
            if not seen:
                outcome += ", unseen by check"
            count.add(outcome, f"{what}: {done.stderr[-200:]}", bad=not (seen and (told or same)))
    return count


def flips(bench: Bench, rng: random.Random, times: int) -> Count:
    """Flip a bit of artifacts."""

    def flip(content: bytes) -> bytes:
        place = rng.randrange(len(content))
        changed = content[place] ^ (1 << rng.randrange(8))
        return content[:place] + bytes([changed]) + content[place + 1 :]

    return damage(bench, rng, times, flip)


def cuts(bench: Bench, rng: random.Random, times: int) -> Count:
    """Cut off the end of artifacts."""
    return damage(bench, rng, times, lambda content: content[: rng.randrange(len(content))])


def kills(bench: Bench, rng: random.Random, times: int) -> Count:
    """Kill each command at random times, three times in a row, and then let it end.

    Passes save their sums after every mini-batch or part, so that kills hit the saving. Commands
    are forked from a process that has PyTorch loaded, so that kills hit the work itself.
    """
    count, in_a_row = Count(), 3
    names = [name for name in bench.words if not name.endswith(" red")]
    expected, spans = {}, {}
    for number in range(-(-times // in_a_row)):
        name = names[number % len(names)]
        if name not in expected:
            with bench.copied(bench.before[name]) as store:
                began = time.perf_counter()
                forked(bench, name, store).communicate()
                spans[name] = time.perf_counter() - began
                expected[name] = contents(store)
        with bench.copied(bench.before[name]) as store:
            codes = [killed(bench, rng, name, store, spans[name]) for _ in range(in_a_row)]
            process = forked(bench, name, store)
            told = process.communicate()[1]
            whole = process.returncode in (0, 5) and contents(store) == expected[name]
            for code in codes:
                outcome = "ended before" if code != -9 else "killed"
                bad = not whole or damaged(store)
                outcome += "" if not bad else ", LOST"
                count.add(outcome, f"{name}: {told[-200:]}", bad=bad)
    return count


def forked(bench: Bench, name: str, store: Path) -> Forked:
    """Start a command in its own process."""
    shutil.rmtree(bench.folder / "out", ignore_errors=True)
    return Forked(bench.line(name, store), environment({KEEP_ALWAYS: "1"}))


def killed(bench: Bench, rng: random.Random, name: str, store: Path, span: float) -> int:
    """Kill a command some time after its start; return its exit code."""
    process = forked(bench, name, store)
    time.sleep(rng.uniform(0.02, 1.0) * span)
    with suppress(ProcessLookupError):
        process.kill()
    process.communicate()
    return process.returncode


def damaged(store: Path | str) -> bool:
    """Return whether `check` finds damage in a store."""
    return inside("check", "--store", store).exit_code == 3


def pairs(bench: Bench, _: random.Random, times: int) -> Count:
    """Build or grade the same set in two processes at once."""
    count = Count()
    for number in range(times):
        name = ("build", "grad")[number % 2]
        with bench.copied(bench.before[name]) as store, bench.copied(bench.before[name]) as other:
            bench.run(name, other)
            both = [start(*bench.line(name, store)) for _ in range(2)]
            told = [process.communicate()[1] for process in both]
            good = all(process.returncode == 0 for process in both)
            good = good and contents(store) == contents(other)
            outcome = "both ended, one result" if good else "LOST"
            count.add(outcome, f"{name}: {told}", bad=not good)
    return count


@contextmanager
def mounted(bench: Bench, size: int) -> Iterator[Path]:
    """Yield a tmpfs of so many kB. Raises CalledProcessError without permission."""
    place = bench.folder / "mounted"
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def pages(store: Path) -> int:
    """Return the size of a store in kB, in whole pages."""
    return sum(4 * -(-p.stat().st_size // 4096) for p in store.rglob("*") if p.is_file())


def full(bench: Bench, rng: random.Random, times: int) -> Count:
    """Fill the disk at a random point, then free it and run the command again."""
    count = Count()
    names = ("build", "grad", "rank", "search", "compare", "apply")
    for number in range(times):
        name = names[number % len(names)]
        with bench.copied(bench.before[name]) as other:
            there = pages(other.parent)
            bench.run(name, other)
            expected, added = contents(other), pages(other.parent) - there
        room = there + int(rng.random() * added)
        with mounted(bench, room) as place:
            store = place / "store"
            if bench.before[name].exists():
                shutil.copytree(bench.before[name], store)
            done = bench.run(name, store)
            ended = done.exit_code in (0, 5)
            told = done.exit_code == 3 and "free some space" in done.stderr
            whole = not damaged(store)
            subprocess.run(["mount", "-o", "remount,size=1g", place], check=True)
            again = bench.run(name, store)
            whole = whole and again.exit_code in (0, 5) and contents(store) == expected
        outcome = "told" if told else "fitted" if ended else "UNEXPECTED"
        outcome += "" if whole else ", LOST"
        count.add(outcome, f"{name}: {done.stderr[-200:]}", bad=not (whole and (told or ended)))
    return count


def readonly(bench: Bench, _: random.Random, times: int) -> Count:
    """Run commands on a read-only store."""
    count = Count()
    # Their results are printed or written elsewhere.
    elsewhere = ("eval", "apply", "report")
    for name in list(bench.words)[:times]:
        with mounted(bench, 1 << 17) as place:
            store = place / "store"
            shutil.copytree(bench.before[name] if name != "build" else bench.whole, store)
            before = contents(store)
            subprocess.run(["mount", "-o", "remount,ro", place], check=True)
            done = bench.run(name, store)
            same = contents(store) == before
        given = name in elsewhere and done.exit_code == 0
        told = done.exit_code == 3 and "error:" in done.stderr
        outcome = "result given" if given else "told" if told else "UNEXPECTED"
        count.add(outcome, f"{name}: {done.stderr[-200:]}", bad=not (same and (given or told)))
    return count


def s3(bench: Bench, rng: random.Random, times: int) -> Count:
    """Run commands on an S3 server, each on a fresh store, with a fault of each kind.

    A fault affects one request.
    """
    from s3_server import BUCKET, S3Server

    count, server = Count(), S3Server()
    os.environ |= server.environment | {"SLSGU_CACHE": str(bench.folder / "cache")}
    try:
        for number in range(times):
            store = f"s3://{BUCKET}/{number}"
            for name in ("build", "grad", "rank", "search", "verify", "eval"):
                faults = dict(zip(rng.sample(range(60), 4), (500, 503, "drop", "cut"), strict=True))
                server.faults = [faults.get(place) for place in range(60)]
                done = bench.run(name, store)
                server.faults = []
                whole = not damaged(store)
                told = done.exit_code == 3 and "error:" in done.stderr
                ended = done.exit_code in (0, 5)
                outcome = "ended" if ended else "told" if told else "UNEXPECTED"
                outcome += "" if whole else ", LOST"
                bad = not whole or not (told or ended)
                count.add(outcome, f"{name}: {done.stderr[-200:]}", bad=bad)
                if told:
                    bench.run(name, store)
    finally:
        server.stop()
    return count


def models(bench: Bench, rng: random.Random, times: int) -> Count:
    """Damage a file of a model and run a command that loads it, layout after layout."""
    from damaged_models import Models

    trained = os.environ.get("SLSGU_TEST_MODELS")
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        made = Models.write(
            Path(folder) / "models",
            clip=bench.folder / "clip",
            store=bench.whole,
            own=True,
            pairs=str(bench.folder / "pairs.parquet"),
            trained=Path(trained) if trained else None,
        )
        count, layouts = Count(), list(made.layouts.values())
        for number in range(times):
            layout = layouts[number % len(layouts)]
            outcome, about, fine = made.outcome(rng, layout, rng.choice(list(layout.commands)))
            count.add(outcome, about, bad=not fine)
    return count


PARTS = {
    "flips": (flips, 120),
    "cuts": (cuts, 30),
    "kills": (kills, 100),
    "pairs": (pairs, 25),
    "full": (full, 12),
    "readonly": (readonly, 14),
    "s3": (s3, 5),
    "models": (models, 200),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to keep the model and the stores")
    for part, (_, times) in PARTS.items():
        parser.add_argument(f"--{part}", type=int, default=times, metavar="N")
    options = parser.parse_args()
    bench = Bench(options.folder or Path(tempfile.mkdtemp()))
    bench.run_whole()
    bad = []
    print("part\ttried\twhat became of them", flush=True)
    for part in options.parts:
        run, _ = PARTS[part]
        count = run(bench, random.Random(options.seed), getattr(options, part))
        outcomes = ", ".join(f"{n} {what}" for what, n in sorted(count.outcomes.items()))
        print(f"{part}\t{count.tried}\t{outcomes}", flush=True)
        bad += count.bad
    for each in bad:
        print(f"# {each}")
    raise SystemExit(1 if bad else 0)


if __name__ == "__main__":
    main()
