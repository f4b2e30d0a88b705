"""What an earlier run left on record, for a command to go on from."""

from typing import TypeVar

from slsgu_cli import progress
from slsgu_cli.errors import InputError, StaleError
from slsgu_cli.store import Store

T = TypeVar("T")


def recorded(store: Store, path: str, kind: type[T], *, unusable: str) -> T | None:
    """Return the record at `path`, or None where there is none that can be read.

    One that cannot be read is told of by `unusable` and the reason. Whether it was made
    from what is there now is for the caller to say.
    """
    if not store.exists(path):
        return None
    try:
        return store.read_record(path, kind)
    except (StaleError, InputError) as error:
        progress.note(f"{unusable}: {error}")
        return None
