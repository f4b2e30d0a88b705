"""Commands run in this process, in another one, on a terminal, or held at a function."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import tempfile
import termios

from documents import validated
from forked import Forked, interruptible
from typer.testing import CliRunner

from slsgu_cli.cli.app import app

SLSGU = (sys.executable, "-m", "slsgu_cli")


def inside(*arguments, store=None, env=None):
    """Run a command in this process, where PyTorch is loaded already.

    Output of `--json` is validated against the schema.
    """
    options = [] if store is None else ["--store", str(store)]
    done = CliRunner().invoke(app, [*map(str, arguments), *options], env=env)
    if "--json" in arguments and "--help" not in arguments:
        validated(done.stdout)
    return done


def rows(tsv):
    """Return the tables of a piped output, each as a list of rows of cells."""
    tables = tsv.removesuffix("\n").split("\n\n")
    return [[line.split("\t") for line in table.split("\n")] for table in tables]


def environment(extra=None):
    left_out = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "SLSGU_STORE")
    own = {key: value for key, value in os.environ.items() if key not in left_out}
    return own | {"OMP_NUM_THREADS": "1", "TERM": "xterm"} | (extra or {})


def slsgu(*arguments, env=None, timeout=120, **options):
    """Run a command to its end; outputs are text."""
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run(
        [*SLSGU, *map(str, arguments)],
        text=True,
        timeout=timeout,
        env=environment(env),
        **outputs,
    )


def start(*arguments, env=None, program=SLSGU, ignore=None, **options):
    """Start a command that Ctrl-C ends; it ignores the signal `ignore`. Outputs are text."""
    outputs = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(
        [*program, *map(str, arguments)],
        text=True,
        env=environment(env),
        preexec_fn=lambda: interruptible(ignore),
        **outputs,
    )


def start_held(*arguments, at, call=1, ignore=None, env=None):
    """Start a command and return it when it waits at the `call`th call of a function.

    `at` names the function as "module:name". The command continues when its stdin is closed, as
    `communicate` does. It ignores the signal `ignore`.
    """
    return Forked(arguments, environment(env), at=at, call=call, ignore=ignore)


def on_terminal(*arguments, columns=80, env=None, both=False):
    """Run a command with stdout on a terminal; return exit code, the terminal's text, stderr.

    With `both`, stderr goes to the terminal too, and colours stay in.
    """
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    with tempfile.TemporaryFile("w+") as told:
        stderr = slave if both else told
        process = start(*arguments, env=env, stdin=slave, stdout=slave, stderr=stderr)
        os.close(slave)
        chunks = []
        while True:
            try:
                chunk = os.read(master, 1 << 16)
            except OSError:  # Linux reports a closed terminal this way
                break
            if not chunk:
                break
            chunks.append(chunk)
        os.close(master)
        code = process.wait(120)
        told.seek(0)
        shown = b"".join(chunks).decode().replace("\r\n", "\n")
        if not both:
            shown = re.sub(r"\x1b\[[013]?m", "", shown)
        return code, shown, told.read()
