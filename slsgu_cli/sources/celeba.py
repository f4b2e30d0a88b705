"""CelebA's list of identities, with its file of splits."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import fsspec

from slsgu_cli.sources.files import file_identity, folder_of
from slsgu_cli.sources.image_list import ImageListSource
from slsgu_cli.sources.table import TableSource
from slsgu_cli.sources.text_table import Listing, Record

NAME = r"identity_celeba\w*\.txt"
PARTITION = ("list_eval_partition.txt", "../Eval/list_eval_partition.txt")
SPLITS = {"0": "train", "1": "valid", "2": "test"}


@dataclass(frozen=True, slots=True)
class CelebASource(ImageListSource):
    """A list of CelebA's images and identities; rows have a column `split`."""

    names: ClassVar[re.Pattern[str] | None] = re.compile(f"{NAME}$")
    image_folders: ClassVar[Mapping[str, Sequence[str]]] = {
        NAME: ("img_align_celeba", "../Img/img_align_celeba")
    }

    def identity(self) -> Any:
        """Return the identity of the table, its images, and the file of splits."""
        identity, partition = TableSource.identity(self), self._partition()
        return [*identity, file_identity(partition)] if partition else identity

    def listing(self, file: Any) -> Listing:
        """Return the columns and the rows, with their splits if the file of splits exists."""
        names, rows = ImageListSource.listing(self, file)
        partition = self._partition()
        return ((*names, "split"), _with_splits(rows, partition)) if partition else (names, rows)

    def _partition(self) -> str | None:
        for name in PARTITION:
            path = f"{folder_of(self.path)}/{name}"
            fs, inner = fsspec.core.url_to_fs(path)
            if fs.exists(inner):
                return path
        return None


def _with_splits(rows: Iterable[Record], partition: str) -> Iterator[Record]:
    splits: dict[str, str | None] = {}
    with fsspec.open(partition, "r", encoding="utf-8-sig", errors="replace") as file:
        for line in file:
            image, _, number = line.strip().rpartition(" ")
            splits[image.strip()] = SPLITS.get(number)
    for row in rows:
        yield row if isinstance(row, str) else {**row, "split": splits.get(row["image"])}
