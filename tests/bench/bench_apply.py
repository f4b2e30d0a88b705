"""Time `apply` beside `cp` on a checkpoint of a given size, and its peak memory.

    python tests/bench/bench_apply.py --gigabytes 2 --rounds 5 --dtype F16

Both run as processes of their own, in turn, each to a fresh target after a sync; `apply`
thus pays for starting Python. The goal: at most 1.2 times cp and half a second, and less
than 300 MB.
"""

import argparse
import json
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import numpy as np

SUPPORT = Path(__file__).parents[1] / "support"
WIDTH = {"F32": 4, "F16": 2, "BF16": 2}
SHAPE = (4096, 1024)
LAYER = "visual.transformer.resblocks.0.mlp.c_fc.weight"
APPLY = """
    import sys
    from pathlib import Path
    from slsgu_cli.checkpoints.apply import apply_edits
    from slsgu_cli.checkpoints.edits import ApplyOptions, load_edit
    from slsgu_cli.checkpoints.targets import read_target
    from slsgu_cli.store.store import Store
    store, source, out = sys.argv[1:]
    edit = load_edit(Store(store), "facebook")
    apply_edits([edit], read_target(Path(source)), Path(out), options=ApplyOptions())
    status = Path("/proc/self/status")
    if status.exists():
        print(status.read_text().partition("VmHWM:")[2].split()[0])
"""


def make_checkpoint(path: Path, gigabytes: float, dtype: str) -> None:
    """Write random tensors of one shape until the file is as large as asked."""
    size = SHAPE[0] * SHAPE[1] * WIDTH[dtype]
    count = max(1, round(gigabytes * 1e9 / size))
    names = [LAYER.replace(".0.", f".{index}.") for index in range(count)]
    entries = {
        name: {"dtype": dtype, "shape": SHAPE, "data_offsets": [i * size, (i + 1) * size]}
        for i, name in enumerate(names)
    }
    header = json.dumps(entries).encode()
    generator = np.random.default_rng(0)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(count):
            values = generator.standard_normal(SHAPE, np.float32)
            file.write(values.astype("<f4" if dtype == "F32" else "<f2").tobytes())


def make_edit(store_path: Path, checkpoint: Path) -> None:
    """Write an edit of the first layer into a store."""
    sys.path.insert(0, str(SUPPORT))
    from edit_headers import edit

    from slsgu_cli.checkpoints.edits import write_edit
    from slsgu_cli.checkpoints.weights import read_layer
    from slsgu_cli.store.store import Store

    before = read_layer(checkpoint, LAYER)
    delta = np.full(SHAPE, 1e-3, np.float32)
    write_edit(Store(str(store_path)), edit(LAYER, delta, before))


def timed(command: list[str], target: Path) -> tuple[float, str]:
    """Run a command that writes `target`; return its seconds and its output."""
    target.unlink(missing_ok=True)
    subprocess.run(["sync"], check=True)
    start = time.perf_counter()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return time.perf_counter() - start, done.stdout


def main() -> None:
    """Print the times of both, their ratio, and the peak memory of apply."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--gigabytes", type=float, default=1.0)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--dtype", choices=sorted(WIDTH), default="F16")
    options.add_argument("--folder", type=Path, help="where to write (default: a temporary one)")
    chosen = options.parse_args()
    folder = Path(tempfile.mkdtemp(dir=chosen.folder))
    try:
        source, target = folder / "m.safetensors", folder / "out.safetensors"
        make_checkpoint(source, chosen.gigabytes, chosen.dtype)
        make_edit(folder / "store", source)
        script = [sys.executable, "-c", textwrap.dedent(APPLY), str(folder / "store")]
        apply, cp, memory = [], [], 0
        for turn in range(chosen.rounds):
            pair = [
                (cp, ["cp", str(source), str(target)]),
                (apply, [*script, str(source), str(target)]),
            ]
            # In turn first and second, for the disk remembers what was written before.
            for times, command in pair[:: 1 if turn % 2 else -1]:
                seconds, output = timed(command, target)
                times.append(seconds)
                memory = max(memory, int(output or 0) // 1024)
    finally:
        shutil.rmtree(folder)
    slow, fast = statistics.median(apply), statistics.median(cp)
    limit = 1.2 * fast + 0.5
    print(f"checkpoint {chosen.gigabytes:.2f} GB {chosen.dtype}, median of {chosen.rounds}")
    print(f"cp    {fast:7.3f} s   ({', '.join(f'{value:.2f}' for value in cp)})")
    print(f"apply {slow:7.3f} s   ({', '.join(f'{value:.2f}' for value in apply)})")
    print(f"ratio {slow / fast:7.2f}     limit 1.2 * cp + 0.5 s = {limit:.3f} s")
    print(f"peak memory {memory} MB, limit 300 MB")
    print("within both limits" if slow <= limit and memory < 300 else "ABOVE A LIMIT")


if __name__ == "__main__":
    main()
