"""Time the commands that need no model, next to Python itself, and list their heavy imports.

    python tests/bench/bench_startup.py [--rounds 10]

The rounds of all commands are interleaved, so that other load affects all alike.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEMO = Path(__file__).parents[2] / "slsgu_cli" / "demo"
HEAVY = (
    "torch",
    "open_clip",
    "torchvision",
    "timm",
    "zarr",
    "pyarrow",
    "matplotlib",
    "numpy",
    "fsspec",
    "safetensors",
    "PIL",
    "rich",
    "typer",
)
LOOK = f"""
import atexit, sys
atexit.register(lambda: print(*(m for m in {HEAVY} if m in sys.modules), file=sys.stderr))
sys.argv = ["slsgu", *sys.argv[1:]]
from slsgu_cli.__main__ import main
main()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        words = {
            "slsgu --help": ["--help"],
            "slsgu ls": ["ls", "--store", folder],
            "slsgu rank": ["rank", "castle", "--direction", "gradient", "-q", "--store", folder],
            "slsgu apply": [
                "apply",
                "castle",
                "-q",
                "--store",
                folder,
                "--dry-run",
                "--layer",
                "visual.conv1",
                "--step",
                "1",
                "--direction",
                "gradient",
                "--out",
                f"{folder}/out",
            ],
        }
        make_store(folder)
        commands = {"python -c pass": [sys.executable, "-c", "pass"]}
        for label, arguments in words.items():
            commands[label] = [sys.executable, "-m", "slsgu_cli", *arguments]
        spans: dict[str, list[float]] = {label: [] for label in commands}
        for _ in range(rounds):
            for label, command in commands.items():
                began = time.perf_counter()
                subprocess.run(command, capture_output=True, check=True)
                spans[label].append(time.perf_counter() - began)
        bare = min(spans["python -c pass"])
        print(f"{'best of ' + str(rounds):16} {'seconds':>8} {'ratio':>7}  imports")
        for label in commands:
            best = min(spans[label])
            modules = imports(words[label]) if label in words else ""
            print(f"{label:16} {best:8.3f} {best / bare:7.1f}  {modules}")
        print(f"--help may take {3 * bare + 0.15:.3f} s: 3 times Python and 0.15 s")


def make_store(folder: str) -> None:
    """Build a small set of the embedded icons with its gradients."""
    build = [
        "build-sets",
        "castle",
        "-q",
        "--model",
        f"local-dir:{DEMO / 'clip'}",
        "--store",
        folder,
        "--source",
        str(DEMO / "train.parquet"),
        "--max-forget",
        "16",
        "--retain-samples",
        "32",
    ]
    for arguments in (build, ["grad", "castle", "-q", "--store", folder]):
        command = [sys.executable, "-m", "slsgu_cli", *arguments]
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def imports(arguments: list[str]) -> str:
    """Return the heavy modules that a command imports."""
    command = [sys.executable, "-c", LOOK, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stderr.splitlines()[-1]


if __name__ == "__main__":
    main()
