"""The interface of a source: rows first, image bytes later and only on request.

A source is read twice. The first pass yields a `Row` for each sample and reads no image. The
second pass yields the encoded images of the selected rows, in file order. A source of any size
is therefore read in constant memory.

A reader class also declares its format: the files it recognises, and how help texts and errors
describe them. `formats.READERS` lists all of them.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from slsgu_cli.errors import InputError
from slsgu_cli.records.sets import Origin
from slsgu_cli.sources.files import base_name
from slsgu_cli.sources.texts import as_text, label_words

IMAGE_SUFFIXES = frozenset(
    ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "img")
)
# The most bytes of a caption or a label, and of an encoded image.
TEXT_LIMIT, IMAGE_LIMIT = 1 << 16, 1 << 26
TOO_LARGE = "oversized file"
CAPTION_FIELDS = ("caption", "text")
LABEL_FIELDS = ("label", "concept", "class", "cls")
# Folders of these names are splits, not classes.
SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """The columns to read, if they do not have the usual names.

    `needs` names the required ones: `caption`, `label`. Without `images`, a table needs none.
    """

    image: str | None = None
    caption: str | None = None
    label: str | None = None
    needs: frozenset[str] = frozenset()
    images: bool = True


# The accepted values of each column.
Filters = dict[str, frozenset[str]]

# The first byte of an encoded image in a file, and how many there are.
Extent = tuple[int, int]

# The rows whose images are requested, with their extents if the first pass returned them.
Wanted = Mapping[int, Extent | None]


@dataclass(frozen=True, slots=True)
class Row:
    """One sample without its image; `index` is its position in the file, ignoring filters.

    `origin` is set if the sample was first found in another file, or has a URL. `extent` is
    where the image lies in an uncompressed file. `number` is the class number in the file, if
    `label` is the name that the file gives to this number.
    """

    index: int
    key: str
    caption: str | None
    label: str | None
    has_image: bool = True
    origin: Origin | None = None
    extent: Extent | None = field(default=None, compare=False)
    number: str | None = None


class SkippedImage(bytes):
    """Empty bytes in place of an image that is too expensive to read, with the reason."""

    reason: str

    def __new__(cls, reason: str) -> "SkippedImage":
        """Return the placeholder for an image that is skipped for `reason`."""
        made = super().__new__(cls)
        made.reason = reason
        return made


# Rows with their encoded images.
Selected = Iterator[tuple[Row, bytes | None]]


@dataclass(frozen=True, slots=True)
class Reader:
    """One file or folder of samples, restricted to the rows that match the filters.

    `suffixes` are those of the files it reads, `names` restricts them to certain file names, and
    `description` names them to a user. A folder of files whose class has `in_folders` is read as
    these files. With `by_folder`, images lie in folders named by class, and a label replaces a
    missing caption.
    """

    description: ClassVar[str]
    suffixes: ClassVar[tuple[str, ...]]
    names: ClassVar[re.Pattern[str] | None] = None
    in_folders: ClassVar[bool] = False
    path: str
    columns: Columns
    filters: Filters
    by_folder: bool = False

    @classmethod
    def recognises(cls, path: str) -> bool:
        """Return whether a file has this format, by its name."""
        name = base_name(path).lower()
        return name.endswith(cls.suffixes) and (cls.names is None or bool(cls.names.match(name)))

    @classmethod
    def open(cls, path: str, columns: Columns, filters: Filters, by_folder: bool = False) -> Self:
        """Return the reader of a file."""
        return cls(path, columns, filters, by_folder)

    def caption(self, row: Row) -> str | None:
        """Return a row's caption, or its label as words if labels replace missing captions."""
        if row.caption is None and self.by_folder and row.label:
            return label_words(row.label)
        return row.caption

    def identity(self) -> Any:
        """Return JSON that changes when the images may have changed."""
        raise NotImplementedError

    def rows(self, skipped: Counter[str]) -> Iterator[Row]:
        """Yield the rows that match the filters; count unreadable ones in `skipped`.

        Raises InputError if the source does not have the columns to filter by.
        """
        raise NotImplementedError

    def images(self, wanted: Wanted) -> Iterator[tuple[int, bytes | None]]:
        """Yield (index, encoded image) of the requested rows in order; None for no image."""
        raise NotImplementedError

    def select(self, wants: Callable[[Row], bool], skipped: Counter[str]) -> Selected:
        """Yield the rows that `wants` accepts with their encoded images."""
        rows = {row.index: row for row in self.rows(skipped) if wants(row)}
        for index, data in self.images(dict.fromkeys(rows)) if rows else ():
            yield rows[index], data


def matches(filters: Filters, fields: Mapping[str, Any]) -> bool:
    """Return whether a row's fields have one of the accepted values for every filter."""
    return all(as_text(fields.get(name)) in values for name, values in filters.items())


def no_column(path: str, name: str, columns: Sequence[str], hint: str) -> InputError:
    """Return the error for a column that a source does not have."""
    names = ", ".join(columns) or "none"
    return InputError(f"{path} has no {name}; its columns are: {names}", hint=hint)
