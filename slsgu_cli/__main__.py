"""Entry point of the `slsgu` command."""

import gc
import io
import os
import signal
import sys
from typing import Any

from slsgu_cli.errors import Ended, ExitCode

# Signals that end a command like Ctrl-C, unless they are ignored, as under `nohup`.
ENDING = {"SIGTERM": ExitCode.TERMINATED, "SIGHUP": ExitCode.HUNG_UP}


def main() -> None:
    """Run the command line."""
    for name, code in ENDING.items():
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _ending(code))
    # Spinning threads make PyTorch many times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # Escape characters that the encoding of the terminal lacks.
            stream.reconfigure(errors="backslashreplace")
    try:
        from slsgu_cli.cli import app
    except KeyboardInterrupt as interrupt:
        sys.exit(Ended.code(interrupt))
    try:
        app(prog_name="slsgu")
    except OSError as error:
        # Commands report this themselves; `--help` and `--version` do not.
        sys.exit(f"error: cannot write the output: {error.strerror}")
    finally:
        _flush()
        # At exit, Python would spend a second collecting the objects of PyTorch and open_clip.
        gc.freeze()


def _flush() -> None:
    """Flush the outputs; discard what cannot be written, so that Python keeps the exit code."""
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _ending(code: ExitCode) -> Any:
    def end(number: int, frame: Any) -> None:
        raise Ended(code)

    return end


if __name__ == "__main__":
    main()
