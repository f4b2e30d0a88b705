"""The context of a build: the store, the model's inputs, and the addresses of blocks."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slsgu_cli import progress
from slsgu_cli.clip.decoding import Decoded
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.codec import digest
from slsgu_cli.records.sets import DataRef, InputSpec
from slsgu_cli.sets.pair_filter import PairFilter
from slsgu_cli.sources.reader import Reader
from slsgu_cli.store.artifacts import Artifact
from slsgu_cli.store.blocks import DataBlock, Ints
from slsgu_cli.store.store import Store

# Increased whenever a block of the same recipe would come out differently.
FORMAT = 2


@dataclass(frozen=True, slots=True)
class BuildContext:
    """The store, and the model's input format."""

    store: Store
    spec: InputSpec
    decode: Callable[[bytes], Decoded]
    tokenize: Callable[[Sequence[str]], Ints]
    filter: PairFilter | None = None

    def pixel_recipe(self) -> list[Any]:
        """Return everything that determines an image's pixels, which excludes mean and std."""
        spec = self.spec
        size = [spec.height, spec.width]
        return [*size, spec.interpolation, spec.resize_mode, spec.fill_color]

    def existing_block(self, path: str) -> DataBlock | None:
        """Return the earlier block at `path`; None if it is missing or damaged."""
        if not self.store.exists(path):
            return None
        try:
            return DataBlock.at(self.store, path)
        except MissingError:
            return None
        except InputError as error:
            progress.warn(f"{error.message}; it is built again")
            return None


def block_path(recipe: Mapping[str, Any]) -> str:
    """Return the path of the block with a recipe."""
    return Artifact.DATA.path(digest({"format": FORMAT, **recipe}))


def file_recipe(readers: Sequence[Reader]) -> str:
    """Return a digest of every file of a source, its size and modification time."""
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
