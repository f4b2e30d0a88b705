"""What building any block takes: the model's inputs, the store, and blocks made before."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slsgu_cli import progress
from slsgu_cli.errors import InputError
from slsgu_cli.preprocess import Picture
from slsgu_cli.records import DataRef, InputSpec, digest
from slsgu_cli.samples import Reader
from slsgu_cli.sets import DataBlock
from slsgu_cli.store import Store
from slsgu_cli.tokenizing import Tokenize

if TYPE_CHECKING:
    from slsgu_cli.curation.screening import Screen

# Counts up when a block of the same recipe would come out differently.
FORMAT = 2


@dataclass(frozen=True, slots=True)
class Workshop:
    """The store, and how the model takes its inputs."""

    store: Store
    spec: InputSpec
    decode: Callable[[bytes], Picture]
    tokenize: Tokenize
    screen: "Screen | None" = None

    def pixel_recipe(self) -> list[Any]:
        """Return what decides an image's pixels; mean and standard deviation do not."""
        spec = self.spec
        size = [spec.height, spec.width]
        return [*size, spec.interpolation, spec.resize_mode, spec.fill_color]

    def standing(self, path: str) -> DataBlock | None:
        """Return the block made before at `path`; None if there is none, or it is damaged."""
        if not self.store.exists(path):
            return None
        try:
            return DataBlock.at(self.store, path)
        except InputError as error:
            progress.warn(f"{error.message}; it is made again")
            return None


def block_path(recipe: Mapping[str, Any]) -> str:
    """Return where the block made by `recipe` lies."""
    return f"data/{digest({'format': FORMAT, **recipe})}.zarr"


def file_recipe(readers: Sequence[Reader]) -> str:
    """Return a digest of every file of a source, its size and time of change."""
    return digest([reader.identity() for reader in readers])


def text_digest(texts: Iterable[str]) -> str:
    """Return a digest of a sequence of texts of any length."""
    total = hashlib.sha256()
    for text in texts:
        data = text.encode("utf-8", "surrogatepass")
        total.update(len(data).to_bytes(8, "little") + data)
    return total.hexdigest()


def reference(
    path: str, block: DataBlock, *, seen: int, refused: Counter[str], sources: Sequence[str]
) -> DataRef:
    """Return the manifest's entry for a block."""
    counts = {reason: count for reason, count in sorted(refused.items()) if count}
    return DataRef(
        path=path,
        fingerprint=str(block.attributes["fingerprint"]),
        rows=block.rows,
        seen=seen,
        refused=counts,
        sources=tuple(sources),
        noted=dict(block.attributes.get("noted", {})),
    )


def counted(refused: Mapping[str, int]) -> str:
    """Return reasons with their counts as words, most frequent first."""
    ordered = sorted(refused.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{count} {reason}" for reason, count in ordered if count)
