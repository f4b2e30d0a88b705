"""Commands in processes of their own, timed, with the most memory that they took."""

import json
import subprocess
import sys
import time
from pathlib import Path

# Runs the command line, and tells on stderr what memory it took.
RUN = f"""
import atexit, sys
sys.path.append({str(Path(__file__).parent)!r})
import apart
atexit.register(apart.tell)
from slsgu_cli.__main__ import main
main()
"""


def command(*words: str) -> tuple[float, dict[str, float]]:
    """Run `slsgu` with these words; return its seconds and peak memory in kB by its kind."""
    start = time.perf_counter()
    line = [sys.executable, "-c", RUN, *words]
    done = subprocess.run(line, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    return seconds, json.loads(done.stderr.rpartition("PEAK ")[2])


def tell() -> None:
    """Print what memory this process took at most, and its tensors on a GPU."""
    peak = {"process": peak_memory()}
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        peak["GPU"] = torch.cuda.max_memory_allocated() / 1024
    print("PEAK", json.dumps(peak), file=sys.stderr)


def peak_memory() -> int:
    """Return the most kB that this process had in memory.

    Not getrusage: its peak begins at what the parent had.
    """
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
