"""What can go wrong, with the exit code each kind ends the process with.

Every error says what happened and where; `hint` is the command or change that mends it.
The subclasses also inherit the builtin a caller of the Python API would expect to catch.
"""

import errno
from collections.abc import Callable, Hashable
from enum import IntEnum
from typing import TypeVar

from slsgu_cli.text import first_lines

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")


class ExitCode(IntEnum):
    """Exit codes of the command line, stable between releases."""

    OK = 0
    UNEXPECTED = 1
    USAGE = 2
    BAD_INPUT = 3
    STALE = 4
    NOT_FORGOTTEN = 5
    # What a shell reports of a program that a signal ends: SIGHUP, SIGINT, SIGPIPE, SIGTERM.
    # By SIGPIPE, nobody reads the output any more.
    HUNG_UP = 129
    INTERRUPTED = 130
    UNREAD = 141
    TERMINATED = 143


class Ended(KeyboardInterrupt):
    """The process is asked to end as by Ctrl-C, by another signal: `exit_code` says which."""

    def __init__(self, exit_code: ExitCode) -> None:
        super().__init__()
        self.exit_code = exit_code

    @staticmethod
    def code(interrupt: KeyboardInterrupt) -> ExitCode:
        """Return the exit code of a command that was interrupted, by this or by Ctrl-C."""
        return interrupt.exit_code if isinstance(interrupt, Ended) else ExitCode.INTERRUPTED


class SlsguError(Exception):
    """Base of every error the tool reports without a traceback."""

    exit_code = ExitCode.UNEXPECTED

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(SlsguError, ValueError):
    """Options that contradict each other or name something that does not exist."""

    exit_code = ExitCode.USAGE


class InputError(SlsguError, ValueError):
    """A source, checkpoint or option value that cannot be used as it is."""

    exit_code = ExitCode.BAD_INPUT


class NotFiniteError(InputError):
    """Weights or features that are NaN or infinite, by which nothing can be counted."""


class ForeignError(InputError):
    """A file among artifacts that slsgu did not write."""


class MissingError(SlsguError, FileNotFoundError):
    """A file or artifact that is not there."""

    exit_code = ExitCode.BAD_INPUT

    def __str__(self) -> str:
        return self.message


class StaleError(SlsguError, ValueError):
    """An artifact made from something other than what it meets now."""

    exit_code = ExitCode.STALE


class FormatError(StaleError):
    """A store that another version of slsgu wrote, in another format."""


class NotForgottenError(SlsguError):
    """The search met no step at which the concept is forgotten."""

    exit_code = ExitCode.NOT_FORGOTTEN


class AbsentError(SlsguError):
    """A checkpoint that does not hold the edit it was asked for."""

    exit_code = ExitCode.NOT_FORGOTTEN


class AssertionsError(NotForgottenError):
    """A figure is not what was asserted of it."""


def once(outcomes: dict[K, T | SlsguError], key: K, ask: Callable[[], T]) -> T:
    """Return what `ask` returned, or raise what it raised, when first asked for by a key."""
    if key not in outcomes:
        try:
            outcomes[key] = ask()
        except SlsguError as error:
            outcomes[key] = error
    outcome = outcomes[key]
    if isinstance(outcome, SlsguError):
        raise outcome
    return outcome


# What numpy and PyTorch raise, neither of which is imported to tell.
SINGULAR = ("LinAlgError", "_LinAlgError")

# What libraries raise that speak to servers: httpx, requests, aiohttp and botocore.
OF_THE_NETWORK = ("HTTPError", "RequestException", "ClientError", "BotoCoreError")


def _hint(error: OSError) -> str:
    """Return what mends what the system refuses."""
    if isinstance(error, FileNotFoundError):
        return "it went away meanwhile; look for it, and for the folder that this runs in"
    if isinstance(error, PermissionError):
        return "have this user be allowed to use it, or name another place"
    if error.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if isinstance(error, ConnectionError | TimeoutError):
        return "check the connection and try again"
    return "look at the file or folder, and at the disk it lies on"


def lacks_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the machine or of a device."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def unexpected(error: BaseException) -> SlsguError:
    """Return as an error of ours what the system, PyTorch or another library raised."""
    if lacks_memory(error):
        return SlsguError(
            f"out of memory: {error}",
            hint="a smaller --memory-budget or --cache-budget, or --device cpu",
        )
    if any(base.__name__ in OF_THE_NETWORK for base in type(error).__mro__):
        return InputError(
            f"a server cannot be reached, or refuses: {first_lines(error)}",
            hint="check the address, the connection and the leave to use it",
        )
    if isinstance(error, OSError):
        # Files and folders that vanish under a command, or may not be read, come from anywhere.
        what = " ".join(str(name) for name in (error.filename, error.filename2) if name)
        reason = error.strerror or first_lines(error)
        message = f"cannot use {what}: {reason}" if what else f"the system refuses: {reason}"
        return InputError(message, hint=_hint(error))
    if type(error).__name__ in SINGULAR:
        return InputError(
            f"figures that cannot be solved for, as damaged ones are: {first_lines(error)}",
            hint="`slsgu check` says what is damaged; remove it, and run the command that made it",
        )
    text = f"unexpected {type(error).__name__}: {first_lines(error)}"
    return SlsguError(text, hint="add --debug to see where, and report it")


def ended_by(error: BaseException) -> SlsguError:
    """Return the error that a command ends with, by what was raised, and its exit code."""
    if isinstance(error, KeyboardInterrupt):
        ended = SlsguError("interrupted; what was complete is kept")
        ended.exit_code = Ended.code(error)
        return ended
    return error if isinstance(error, SlsguError) else unexpected(error)
