"""Local files and folders put in place whole, or removed, without a half-way state.

What is being written bears a partial name; it gets its own name by a rename.
"""

import errno
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial-"
# safetensors writes under a temporary name of its own; a killed process leaves that one.
UNFINISHED = (PARTIAL, ".tmp")


def partial_name(name: str) -> str:
    """Return a fresh name under which to write what will be called `name`."""
    return f"{PARTIAL}{secrets.token_hex(4)}-{name}"


def move(source: Path, target: Path) -> None:
    """Rename `source` to `target` and let it take its place; one step for files.

    A folder cannot take the place of another in one step: the old one steps aside first,
    again if another process has put its own there in between. Raises OSError.
    """
    while True:
        try:
            source.replace(target)
            return
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        remove(target)


def remove(path: Path) -> None:
    """Remove a file or folder if it is there, under a partial name while it goes."""
    aside = path.with_name(partial_name(path.name))
    with suppress(FileNotFoundError):
        path.replace(aside)
        if aside.is_dir():
            shutil.rmtree(aside)
        else:
            aside.unlink()
