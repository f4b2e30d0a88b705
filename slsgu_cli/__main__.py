"""Entry point of the `slsgu` command."""

import gc
import io
import os
import sys


def main() -> None:
    """Run the command line."""
    # Threads that spin while they wait make torch many times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks is shown escaped, not refused.
            stream.reconfigure(errors="backslashreplace")
    try:
        from slsgu_cli.cli import app
    except KeyboardInterrupt:
        sys.exit(130)
    try:
        app(prog_name="slsgu")
    except OSError as error:
        # Commands tell this themselves; `--help` and `--version` come here.
        sys.exit(f"error: cannot write the output: {error.strerror}")
    finally:
        # As Python ends it looks for garbage among all that PyTorch and open_clip brought,
        # for a second. The process gives everything back at once anyway.
        gc.freeze()


if __name__ == "__main__":
    main()
