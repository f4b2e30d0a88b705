"""Where a copy of a model may go, so that nothing already on disk is lost to it."""

from collections.abc import Iterable
from pathlib import Path

from slsgu_cli.atomic import PARTIAL
from slsgu_cli.copying import same_place
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.weights import SUFFIXES


def require_place(origin: Path, out: Path, *, overwrite: bool) -> None:
    """Refuse an `out` that is taken or that lies across the model at `origin`.

    With `overwrite` it may be taken, by the model itself as well. Raises InputError or
    UsageError.
    """
    if origin.is_dir() and out.suffix in SUFFIXES and not out.is_dir():
        raise UsageError(f"{out} names a file, but the model is a folder", hint="--out FOLDER")
    if same_place(origin, out):
        if not overwrite:
            raise InputError(
                f"{out} is the model itself",
                hint="another --out, or --overwrite to edit it in place",
            )
        return
    if out.resolve().is_relative_to(origin.resolve()):
        raise InputError(f"{out} lies inside the model {origin}", hint="another --out")
    if origin.resolve().is_relative_to(out.resolve()) and overwrite:
        raise InputError(f"{out} holds the model {origin}", hint="another --out")
    taken = any(out.iterdir()) if out.is_dir() else out.exists()
    if taken and not overwrite:
        raise InputError(f"{out} exists already", hint="another --out, or --overwrite")
    if origin.is_dir() and taken and not out.is_dir():
        raise InputError(f"{out} is a file, but the model is a folder", hint="another --out")


def require_nothing_lost(out: Path, written: Iterable[str]) -> None:
    """Refuse to replace a folder that holds files whose names are not `written` anew."""
    if not out.is_dir():
        return
    kept = set(written)
    held = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (str(path.relative_to(out)) for path in held)
    lost = sorted(name for name in names if name not in kept and not name.startswith(PARTIAL))
    if lost:
        more = f" and {len(lost) - 3} more" if len(lost) > 3 else ""
        raise InputError(
            f"{out} holds files that would be lost: {', '.join(lost[:3])}{more}",
            hint="another --out, or move them away",
        )


def all_files(folder: Path) -> dict[str, Path]:
    """Return every file below a folder by its relative name; links to files are followed.

    Raises InputError for what cannot be copied.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(PARTIAL) for part in name.parts):
            continue
        if path.is_symlink() and path.is_dir():
            raise InputError(f"{path} is a link to a folder", hint="replace it by what it leads to")
        if path.is_file():
            found[str(name)] = path
        elif not path.is_dir():
            raise InputError(f"{path} is neither a file nor a folder", hint="remove it")
    return found
