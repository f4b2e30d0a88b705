"""A command that waits at a call of one of its functions: `held.py FD MODULE:NAME CALL WORDS...`.

At that call it writes a byte to the file descriptor and goes on when there is one to read from
stdin, or its end. So a test can do something to it there, and no clock decides what it met.
"""

import functools
import itertools
import os
import sys
from importlib import import_module

from slsgu_cli.__main__ import main
from slsgu_cli.method import gradients

# A variable that lets a gradient pass keep its sums after every mini-batch.
KEEP_ALWAYS = "KEEP_ALWAYS"


def hold(place: str, call: int, reached: int) -> None:
    """Let the `call`th call of a function, named by its module and name, wait."""
    module, _, name = place.partition(":")
    *outer, name = name.split(".")
    owner = functools.reduce(getattr, outer, import_module(module))
    function, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(function)
    def held(*arguments, **options):
        if next(calls) == call:
            os.write(reached, b".")
            os.read(sys.stdin.fileno(), 1)
        return function(*arguments, **options)

    setattr(owner, name, held)


if __name__ == "__main__":
    reached, place, call, *words = sys.argv[1:]
    if os.environ.get(KEEP_ALWAYS):
        gradients.KEEP_SECONDS = gradients.KEEP_SHARE = 0.0
    hold(place, int(call), int(reached))
    sys.argv[1:] = words
    main()
