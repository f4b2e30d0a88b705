"""Run `slsgu` commands in separate processes, and measure their time and peak memory."""

import json
import subprocess
import sys
import time
from pathlib import Path

# Runs the command line and prints its peak memory to stderr.
RUN = f"""
import atexit, sys
sys.path.append({str(Path(__file__).parent)!r})
import apart
apart.time_digests()
atexit.register(apart.print_usage)
from slsgu_cli.__main__ import main
main()
"""


# Seconds that this process has spent on digests of artifacts.
DIGESTS = [0.0]

# Non-empty while a digest is computed: comparing one computes another.
BUSY = []


def time_digests() -> None:
    """Measure the time spent on computing and comparing digests of artifacts."""
    from slsgu_cli.records import codec
    from slsgu_cli.store import tensor_format

    for module, name in ((tensor_format, "content_digest"), (codec, "_seal")):
        setattr(module, name, _timed(getattr(module, name)))


def _timed(digest):
    def timed(*arguments):
        if BUSY:
            return digest(*arguments)
        BUSY.append(True)
        start = time.perf_counter()
        try:
            return digest(*arguments)
        finally:
            DIGESTS[0] += time.perf_counter() - start
            BUSY.clear()

    return timed


def command(*words: str) -> tuple[float, dict[str, float], float]:
    """Run `slsgu` with these arguments.

    Return its seconds, its peak memory in kB by kind, and the seconds spent on digests.
    """
    start = time.perf_counter()
    line = [sys.executable, "-c", RUN, *words]
    done = subprocess.run(line, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    peak, digests = json.loads(done.stderr.rpartition("USAGE ")[2])
    return seconds, peak, digests


def print_usage() -> None:
    """Print the peak memory of this process and of its GPU tensors, and the time of digests."""
    peak = {"process": peak_memory()}
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        peak["GPU"] = torch.cuda.max_memory_allocated() / 1024
    print("USAGE", json.dumps([peak, DIGESTS[0]]), file=sys.stderr)


def peak_memory() -> int:
    """Return the peak memory of this process in kB.

    The peak of getrusage would start at the memory of the parent.
    """
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
