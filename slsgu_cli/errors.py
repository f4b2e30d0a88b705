"""The errors of slsgu, each with its exit code.

Every error says what happened and where; `hint` is the command or change that fixes it.
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
    # What a shell reports for a program that a signal ended: SIGHUP, SIGINT, SIGPIPE, SIGTERM.
    # SIGPIPE means that the output is no longer read.
    HUNG_UP = 129
    INTERRUPTED = 130
    UNREAD = 141
    TERMINATED = 143


class Ended(KeyboardInterrupt):
    """A signal other than Ctrl-C asks the process to end: `exit_code` says which."""

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
    """Weights, features or figures that are NaN or infinite."""


class NoImagesError(InputError):
    """Images of a set that was made from words."""


class ForeignError(InputError):
    """A file among artifacts that slsgu did not write."""


class MissingError(SlsguError, FileNotFoundError):
    """A file or artifact that is not there."""

    exit_code = ExitCode.BAD_INPUT

    def __str__(self) -> str:
        return self.message


class StaleError(SlsguError, ValueError):
    """An artifact whose inputs have changed."""

    exit_code = ExitCode.STALE


class FormatError(StaleError):
    """A store that another version of slsgu wrote, in another format."""


class NotForgottenError(SlsguError):
    """The search found no step at which the concept is forgotten."""

    exit_code = ExitCode.NOT_FORGOTTEN


class AbsentError(SlsguError):
    """A checkpoint that does not contain the edit."""

    exit_code = ExitCode.NOT_FORGOTTEN


class AssertionsError(NotForgottenError):
    """A figure violates an assertion."""


def once(outcomes: dict[K, T | SlsguError], key: K, ask: Callable[[], T]) -> T:
    """Return or raise the outcome of `ask`, which is called once for each key."""
    if key not in outcomes:
        try:
            outcomes[key] = ask()
        except SlsguError as error:
            outcomes[key] = error
    outcome = outcomes[key]
    if isinstance(outcome, SlsguError):
        raise outcome
    return outcome


# The names of errors of numpy and PyTorch, which are not imported here.
SINGULAR = ("LinAlgError", "_LinAlgError")

# The names of errors of httpx, requests, aiohttp and botocore.
OF_THE_NETWORK = ("HTTPError", "RequestException", "ClientError", "BotoCoreError")


def _hint(error: OSError) -> str:
    """Return a hint for an error of the operating system."""
    if isinstance(error, FileNotFoundError):
        return (
            "the file disappeared while it was being used; "
            "check that it and the working directory still exist"
        )
    if isinstance(error, PermissionError):
        return "give this user permission, or name another path"
    if error.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    if isinstance(error, ConnectionError | TimeoutError):
        return "check the connection and try again"
    return "check the file or folder, and the disk it is on"


def lacks_memory(error: BaseException) -> bool:
    """Return whether memory ran out, of the machine or of a device."""
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def unexpected(error: BaseException) -> SlsguError:
    """Return an error of the system, PyTorch or another library as an error of slsgu."""
    if lacks_memory(error):
        return SlsguError(
            f"out of memory: {error}",
            hint="a smaller --memory-budget or --cache-budget, or --device cpu",
        )
    if any(base.__name__ in OF_THE_NETWORK for base in type(error).__mro__):
        return InputError(
            f"a server cannot be reached or refused the request: {first_lines(error)}",
            hint="check the URL, your network connection and your credentials",
        )
    if isinstance(error, OSError):
        # Any call may meet files that disappear or cannot be read.
        what = " ".join(str(name) for name in (error.filename, error.filename2) if name)
        reason = error.strerror or first_lines(error)
        message = (
            f"cannot use {what}: {reason}" if what else f"the operating system refused: {reason}"
        )
        return InputError(message, hint=_hint(error))
    if type(error).__name__ in SINGULAR:
        return InputError(
            "a linear system cannot be solved, perhaps because an artifact is damaged: "
            f"{first_lines(error)}",
            hint="a larger --damping; `slsgu check` finds damaged artifacts",
        )
    text = f"unexpected {type(error).__name__}: {first_lines(error)}"
    return SlsguError(text, hint="add --debug to see where, and report it")


def ended_by(error: BaseException) -> SlsguError:
    """Return the error, with its exit code, that a command ends with."""
    if isinstance(error, KeyboardInterrupt):
        ended = SlsguError("interrupted; completed work is saved")
        ended.exit_code = Ended.code(error)
        return ended
    return error if isinstance(error, SlsguError) else unexpected(error)
