"""Commands in their own processes, forked from one that has imported everything.

Importing PyTorch and open_clip takes seconds, which tests of signals, kills, locks and ranks
can do without. `forked.py FD` imports the whole package once and then forks a process for each
request that arrives on the socket FD. These processes do not draw their figures. Tests of imports
and of start-up use `slsgu` in processes.py.
"""

import contextlib
import functools
import gc
import itertools
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

from figures_undrawn import undrawn

# If set, a gradient pass saves its sums after every mini-batch.
KEEP_ALWAYS = "KEEP_ALWAYS"
# The number of rows per forward pass when covariances are computed.
ROWS_AT_ONCE = "ROWS_AT_ONCE"


class Forked:
    """A running command with the parts of `subprocess.Popen` that tests use; outputs are text.

    With `at`, the "module:name" of a function, the command waits at the `call`th call of it until
    its stdin is closed, as `communicate` does; the constructor returns when it waits. Processes of
    different servers hash strings differently.
    """

    def __init__(self, words, env, *, at=None, call=1, ignore=None, server=0):
        self.returncode = None
        self._channel, theirs = socket.socketpair()
        ends = [os.pipe() for _ in range(4)]
        (read_in, stdin), (stdout, write_out), (stderr, write_err), (reached, write_reached) = ends
        given = [theirs.fileno(), read_in, write_out, write_err, write_reached]
        socket.send_fds(_server(server)[0], [b"."], given)
        theirs.close()
        for end in given[1:]:
            os.close(end)
        self.stdin, self.stdout, self.stderr = (
            os.fdopen(stdin, "w"),
            os.fdopen(stdout),
            os.fdopen(stderr),
        )
        request = {"words": [*map(str, words)], "env": env, "cwd": str(Path.cwd()), "at": at}
        request |= {"call": call, "ignore": ignore}
        self._channel.sendall(json.dumps(request).encode() + b"\n")
        self._answers = self._channel.makefile()
        self.pid = int(self._answers.readline())
        with os.fdopen(reached, "rb") as pipe:
            if at and not pipe.read(1):
                raise AssertionError((f"ended before call {call} of {at}", *self.communicate()))

    def wait(self, timeout=None):
        """Wait for the end; return the exit code, negative for a signal."""
        if self.returncode is None:
            self._channel.settimeout(timeout)
            self.returncode = int(self._answers.readline())
        return self.returncode

    def communicate(self, timeout=None):
        """Close stdin and return stdout and stderr."""
        with contextlib.suppress(BrokenPipeError):
            self.stdin.close()
        told = []
        reader = threading.Thread(target=lambda: told.append(self.stderr.read()))
        reader.start()
        out = self.stdout.read()
        reader.join()
        self.wait(timeout)
        return out, told[0]

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


@functools.cache
def _server(number):
    """Start a fork server. It ends with this process, which holds the other end of its socket."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, str(theirs.fileno())]
    env = os.environ | {"PYTHONHASHSEED": str(number)}
    process = subprocess.Popen(
        command, pass_fds=[theirs.fileno()], env=env, stdin=subprocess.DEVNULL
    )
    theirs.close()
    return ours, process


def interruptible(ignore=None):
    """Restore the default handling of signals, even if the tests run in the background.

    A shell without job control starts background jobs with SIGINT ignored, and children inherit
    that.
    """
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN if sign == ignore else signal.SIG_DFL)
    if ignore != signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def hold(place, call, reached):
    """Make the `call`th call of a function wait.

    It writes a byte to the file descriptor `reached` and continues when stdin has a byte or ends.
    """
    module, _, name = place.partition(":")
    *outer, name = name.split(".")
    owner = functools.reduce(getattr, outer, import_module(module))
    function, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)
    def held(*arguments, **options):
        if next(calls) == call:
            os.write(reached, b".")
            os.read(0, 1)
        return function(*arguments, **options)

    setattr(owner, name, held)


def _serve(requests):
    """Fork a supervisor for each request."""
    from matplotlib.figure import Figure

    import slsgu_cli

    Figure.savefig = undrawn
    modules = [m.name for m in pkgutil.walk_packages(slsgu_cli.__path__, "slsgu_cli.")]
    # Modules that the package imports lazily.
    for name in (*modules, "open_clip"):
        if not name.endswith("__main__"):
            import_module(name)
    # A garbage collection would make every child copy all imported modules.
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while fds := socket.recv_fds(requests, 1, 5)[1]:
        if os.fork() == 0:
            requests.close()
            return _look_after(*fds)
        for fd in fds:
            os.close(fd)
    return None


def _look_after(channel, *fds):
    """Fork the command; send its process id, then its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(fileno=channel) as telling:
        with telling.makefile() as asked:
            request = json.loads(asked.readline())
        pid = os.fork()
        if pid:
            for fd in fds:
                os.close(fd)
            telling.sendall(b"%d\n" % pid)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            with contextlib.suppress(BrokenPipeError):
                telling.sendall(b"%d\n" % code)
            os._exit(0)
    return request, fds


def _become(request, fds):
    """Run the command with the request's arguments, environment and streams."""
    from slsgu_cli.__main__ import main
    from slsgu_cli.engine import covariance, gradient_pass, resumable

    for number, fd in enumerate(fds[:3]):
        os.dup2(fd, number)
        os.close(fd)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w", 1)
    interruptible(request["ignore"])
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    if KEEP_ALWAYS in os.environ:
        resumable.KEEP_SECONDS = resumable.KEEP_SHARE = 0.0
        gradient_pass.CHUNK = 1
    if ROWS_AT_ONCE in os.environ:
        covariance.ROWS_PER_FORWARD["cpu"] = int(os.environ[ROWS_AT_ONCE])
    if request["at"]:
        hold(request["at"], request["call"], fds[3])
    else:
        os.close(fds[3])
    sys.argv[:] = ["slsgu", *request["words"]]
    main()


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as asking:
        came = _serve(asking)
    if came is None:
        # Exit without writing coverage data: the forked processes have written theirs.
        os._exit(0)
    _become(*came)
