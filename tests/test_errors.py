import pickle

import pytest

from slsgu_cli.errors import (
    ExitCode,
    InputError,
    MissingError,
    NotForgottenError,
    SlsguError,
    StaleError,
    UsageError,
)


@pytest.mark.parametrize(
    ("kind", "builtin", "code"),
    [
        (SlsguError, Exception, 1),
        (UsageError, ValueError, 2),
        (InputError, ValueError, 3),
        (MissingError, FileNotFoundError, 3),
        (StaleError, ValueError, 4),
        (NotForgottenError, Exception, 5),
    ],
)
def test_each_kind_has_its_code_builtin_message_and_hint(kind, builtin, code):
    error = kind("what and where", hint="do this")
    assert isinstance(error, SlsguError)
    assert isinstance(error, builtin)
    assert error.exit_code == code
    assert str(error) == error.message == "what and where"
    assert error.hint == "do this"
    assert kind("what").hint is None


@pytest.mark.parametrize("kind", [InputError, MissingError, StaleError])
def test_errors_cross_processes_whole(kind):
    error = pickle.loads(pickle.dumps(kind("what", hint="do this")))
    assert (type(error), error.message, error.hint, str(error)) == (kind, "what", "do this", "what")


def test_exit_codes_are_stable():
    assert {code.name: int(code) for code in ExitCode} == {
        "OK": 0,
        "UNEXPECTED": 1,
        "USAGE": 2,
        "BAD_INPUT": 3,
        "STALE": 4,
        "NOT_FORGOTTEN": 5,
        "HUNG_UP": 129,
        "INTERRUPTED": 130,
        "UNREAD": 141,
        "TERMINATED": 143,
    }
