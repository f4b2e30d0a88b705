"""Where a copy of a model may be written."""

from collections.abc import Iterable
from pathlib import Path

from slsgu_cli.checkpoints.conversion import OtherLayout
from slsgu_cli.checkpoints.layouts import SUFFIXES
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.store.atomic import PARTIAL, require_regular
from slsgu_cli.store.copying import same_place
from slsgu_cli.text import listed


def require_place(
    origin: Path, out: Path, *, overwrite: bool, layout: OtherLayout | None = None
) -> None:
    """Refuse an `out` that exists, or that is inside or around the model at `origin`.

    With `overwrite` it may exist, and may be the model itself unless that gets another layout.
    Raises InputError or UsageError.
    """
    require_regular(out)
    as_folder = origin.is_dir() if layout is None else bool(layout.file)
    if as_folder and out.suffix in SUFFIXES and not out.is_dir():
        what = "the model is a folder" if layout is None else f"{layout.client} loads a folder"
        raise UsageError(f"{out} names a file, but {what}", hint="--out FOLDER")
    if layout is not None and not as_folder and (out.suffix != SAFETENSORS or out.is_dir()):
        raise UsageError(f"{layout.client} loads one file", hint=f"--out FILE{SAFETENSORS}")
    if same_place(origin, out):
        if layout is None and overwrite:
            return
        in_place = ", or --overwrite to edit it in place" if layout is None else ""
        raise InputError(f"{out} is the model itself", hint=f"another --out{in_place}")
    if out.resolve().is_relative_to(origin.resolve()):
        raise InputError(f"{out} is inside the model {origin}", hint="another --out")
    if origin.resolve().is_relative_to(out.resolve()) and overwrite:
        raise InputError(f"{out} contains the model {origin}", hint="another --out")
    occupied = any(out.iterdir()) if out.is_dir() else out.exists()
    if occupied and not overwrite:
        raise InputError(f"{out} exists already", hint="another --out, or --overwrite")
    if as_folder and occupied and not out.is_dir():
        raise InputError(f"{out} is a file, but the model is a folder", hint="another --out")


def require_nothing_lost(out: Path, written: Iterable[str]) -> None:
    """Raise InputError for a folder with files that will not be `written` again."""
    if not out.is_dir():
        return
    replaced = set(written)
    card = out / README
    if card.is_file() and OURS.encode() in card.read_bytes():
        replaced.add(README)
    present = (path for path in out.rglob("*") if path.is_symlink() or not path.is_dir())
    names = (str(path.relative_to(out)) for path in present)
    lost = sorted(name for name in names if name not in replaced and not name.startswith(PARTIAL))
    if lost:
        raise InputError(
            f"{out} holds files that would be lost: {listed(lost)}",
            hint="another --out, or move them away",
        )


def all_files(folder: Path) -> dict[str, Path]:
    """Return every file below a folder by its relative name; links to files are followed.

    Raises InputError for a link to a folder.
    """
    files: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if any(part.startswith(PARTIAL) for part in name.parts):
            continue
        if path.is_symlink() and path.is_dir():
            raise InputError(
                f"{path} is a link to a folder", hint="replace it by the folder itself"
            )
        if path.is_file():
            files[str(name)] = path
    return files


SAFETENSORS, README = ".safetensors", "README.md"

# Marks a model card that slsgu wrote with edits.
OURS = "<!-- slsgu: edited -->"
