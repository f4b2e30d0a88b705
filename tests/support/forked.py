"""Commands as processes of their own, forked from one that has everything imported.

Importing PyTorch and open_clip takes seconds, which tests of signals, kills, leases and ranks
do not look at. `forked.py FD` imports all of the package once and then forks a process for each
request that comes over the socket FD; what is true of imports and the interpreter's start is
tested with `slsgu` in processes.py.
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

# A variable that lets a gradient pass keep its sums after every mini-batch.
KEEP_ALWAYS = "KEEP_ALWAYS"
# A variable that lets so many rows be run at once for covariances.
ROWS_AT_ONCE = "ROWS_AT_ONCE"


class Forked:
    """A command that runs, with what tests use of `subprocess.Popen`; its outputs are text.

    With `at`, "module:name" of a function, it waits at the `call`th call of it until its stdin
    is closed, as `communicate` does, and this returns when it waits. Where several servers
    forked them, processes hash strings differently.
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
        """Return the exit code, negative for a signal, as soon as the command has ended."""
        if self.returncode is None:
            self._channel.settimeout(timeout)
            self.returncode = int(self._answers.readline())
        return self.returncode

    def communicate(self, timeout=None):
        """Close stdin and return what was printed and told until the end."""
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
    """Start what forks; it ends when this process does, since its socket is closed then."""
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, str(theirs.fileno())]
    env = os.environ | {"PYTHONHASHSEED": str(number)}
    process = subprocess.Popen(
        command, pass_fds=[theirs.fileno()], env=env, stdin=subprocess.DEVNULL
    )
    theirs.close()
    return ours, process


def interruptible(ignore=None):
    """Let signals do what they do by default, also where the tests run in the background.

    A shell without job control starts what it puts there with SIGINT ignored, and who ignores
    a signal starts children that do.
    """
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sign, signal.SIG_IGN if sign == ignore else signal.SIG_DFL)
    if ignore != signal.SIGINT:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def hold(place, call, reached):
    """Let the `call`th call of a function, named by its module and name, wait.

    A byte is written to the file descriptor `reached`, and it goes on when stdin has one, or ends.
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
    """Fork for each request one that looks after the command, and the command itself."""
    import slsgu_cli

    modules = [m.name for m in pkgutil.walk_packages(slsgu_cli.__path__, "slsgu_cli.")]
    # What the package imports only where it is used.
    for name in (*modules, "open_clip"):
        if not name.endswith("__main__"):
            import_module(name)
    # Collecting garbage would have each of them copy all that was imported.
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
    """Fork the command; tell its process id, and its exit code when it has ended."""
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
    """Run the command as a process that was started with its words, environment and streams."""
    from slsgu_cli.__main__ import main
    from slsgu_cli.engine import covariance, resumable

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
        # Without leaving a measure of the lines that ran: those that were forked left theirs.
        os._exit(0)
    _become(*came)
