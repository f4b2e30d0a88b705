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
apart.time_digests()
atexit.register(apart.tell)
from slsgu_cli.__main__ import main
main()
"""


# The seconds that this process spent on the digests of artifacts.
DIGESTS = [0.0]

# Whether one is under way: comparing one makes another.
BUSY = []


def time_digests() -> None:
    """Count what the digests of artifacts take, as they are made and compared."""
    from slsgu_cli.records import codec
    from slsgu_cli.store import digests

    for module, name in ((digests, "content_digest"), (codec, "_seal")):
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
    """Run `slsgu` with these words.

    Return its seconds, peak memory in kB by its kind, and the seconds that digests took.
    """
    start = time.perf_counter()
    line = [sys.executable, "-c", RUN, *words]
    done = subprocess.run(line, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(done.stderr)
    peak, digests = json.loads(done.stderr.rpartition("TOLD ")[2])
    return seconds, peak, digests


def tell() -> None:
    """Print what memory this process took at most, its tensors on a GPU, and its digests' time."""
    peak = {"process": peak_memory()}
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        peak["GPU"] = torch.cuda.max_memory_allocated() / 1024
    print("TOLD", json.dumps([peak, DIGESTS[0]]), file=sys.stderr)


def peak_memory() -> int:
    """Return the most kB that this process had in memory.

    Not getrusage: its peak begins at what the parent had.
    """
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
