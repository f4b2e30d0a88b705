"""Folders that `save_to_disk` of Hugging Face's datasets wrote."""

from collections.abc import Sequence
from typing import Any

import fsspec

from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import parse_json

# What `save_to_disk` writes about one data set, and about one with several splits.
STATE, SPLITS = "state.json", "dataset_dict.json"


def parts(folder: str, names: Sequence[str]) -> list[str] | None:
    """Return the splits of a saved data set, or the files of its rows; None for other folders.

    `names` are the names in the folder, which can include caches. Raises InputError.
    """
    if SPLITS in names:
        splits = _read(f"{folder}/{SPLITS}").get("splits")
        return [name for name in splits if name in names] if isinstance(splits, list) else []
    return _row_files(folder, names) if STATE in names else None


def _row_files(folder: str, names: Sequence[str]) -> list[str]:
    state = _read(f"{folder}/{STATE}")
    if state.get("_indices_data_files"):
        raise InputError(
            f"{folder} was saved with its rows chosen by an index",
            hint="save it again: load_from_disk(...).flatten_indices().save_to_disk(...)",
        )
    entries = state.get("_data_files")
    files = [str(file.get("filename")) for file in entries or () if isinstance(file, dict)]
    missing = [name for name in files if name not in names]
    if missing or not files:
        what = f"no {missing[0]}, which {STATE} lists" if missing else f"no row files in {STATE}"
        raise InputError(f"{folder} has {what}", hint="save it again")
    return files


def _read(path: str) -> dict[str, Any]:
    try:
        with fsspec.open(path, "rb") as file:
            value = parse_json(file.read())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    return value if isinstance(value, dict) else {}
