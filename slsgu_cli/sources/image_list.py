"""Text files with an image and its label per line, or only a label per line, in image order."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, ClassVar

from slsgu_cli.errors import InputError
from slsgu_cli.sources.csv_table import csv_listing, header_names
from slsgu_cli.sources.reader import IMAGE_SUFFIXES
from slsgu_cli.sources.table import IMAGE_FIELDS, PATH_FIELDS, usual_column
from slsgu_cli.sources.text_table import RAGGED, Listing, Record, TextTable

IMAGE_LINE = re.compile(
    rf"(.+?\.(?:{'|'.join(sorted(IMAGE_SUFFIXES))}))(?:[\s,]+(.*))?", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class ImageListSource(TextTable):
    """A list of images with labels, of labels only, or a CSV file with the suffix .txt."""

    description: ClassVar[str] = "lists of images with labels"
    suffixes: ClassVar[tuple[str, ...]] = (".txt",)

    def listing(self, file: Any) -> Listing:
        """Return the columns and the rows, by the form of the first line."""
        first = next(file, "")
        text = chain([first], file)
        if usual_column(header_names(first), (*IMAGE_FIELDS, *PATH_FIELDS)) is not None:
            return csv_listing(text)
        stripped = filter(None, map(str.strip, text))
        if not IMAGE_LINE.fullmatch(first.strip()):
            return ("image", "label"), self._labels_in_order(stripped)
        matches = map(IMAGE_LINE.fullmatch, stripped)
        rows = ({"image": m[1], "label": m[2]} if m else RAGGED for m in matches)
        return ("image", "label"), rows

    def _labels_in_order(self, text: Iterable[str]) -> Iterator[Record]:
        """Yield a row for each label; the images are sorted by name."""
        labels = list(text)
        if all(label.isdecimal() for label in labels):
            raise InputError(
                f"{self.path} has only numbers, and no image names",
                hint="the development kit's numbers have their own order: give a file with one "
                "ImageNet folder name (n01440764), or one image and its label, per line",
            )
        names = self._files().names()
        if len(names) != len(labels):
            raise InputError(
                f"{self.path} has {len(labels)} labels for {len(names)} images",
                hint="write one line per image, or lines with image and label",
            )
        yield from ({"image": n, "label": la} for n, la in zip(names, labels, strict=True))
