"""Images in a tar that a table names, as in ImageNet's validation set."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from slsgu_cli.sources.files import file_identity
from slsgu_cli.sources.image_files import ImageValue
from slsgu_cli.sources.reader import Columns
from slsgu_cli.sources.tar import TarSource


@dataclass(frozen=True, slots=True)
class TarImages:
    """Images in a tar by their names, with or without suffix."""

    path: str

    def where(self, name: str) -> str:
        """Return the name and the tar."""
        return f"{name} in {self.path}"

    def has(self, name: str) -> None:
        """Return None: the whole tar would have to be read."""

    def names(self) -> list[str]:
        """Return the names of all images without suffixes, sorted."""
        rows = TarSource(self.path, Columns(), {}).rows(Counter())
        return sorted(_key(row.key) for row in rows if row.has_image)

    def identity(self, names: Iterable[str]) -> Any:
        """Return the tar's path, size and modification time."""
        return file_identity(self.path)

    def read(self, images: Iterable[tuple[int, ImageValue]]) -> Iterator[tuple[int, bytes | None]]:
        """Yield images in the requested order; from a streamed tar, in its own order."""
        values = dict(images)
        requests: dict[str, list[int]] = {}
        for number, name in values.items():
            if isinstance(name, str):
                requests.setdefault(_key(name), []).append(number)
        shard = TarSource(self.path, Columns(), {})
        rows = {
            row.index: row
            for row in shard.rows(Counter())
            if row.has_image and _key(row.key) in requests
        }
        numbers = {index: requests.pop(_key(row.key), []) for index, row in rows.items()}
        seekable = all(row.extent is not None for row in rows.values())
        order = sorted(rows, key=lambda index: numbers[index]) if seekable else [*rows]
        for part in [[index] for index in order] if seekable else [order]:
            for index, data in shard.images({i: rows[i].extent for i in part}) if part else ():
                for number in numbers[index]:
                    yield number, data
        for number, value in values.items():
            if not isinstance(value, str):
                yield number, value
            elif number in requests.get(_key(value), ()):
                yield number, None


def _key(name: str) -> str:
    """Return an image's key in a tar: its name up to the first dot."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    return f"{folder}{slash}{base.split('.', 1)[0]}"
