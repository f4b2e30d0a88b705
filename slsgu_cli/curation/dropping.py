"""Take rows out of a block by hand: the same rows without some, under a fingerprint of its own."""

import difflib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records import DataRef
from slsgu_cli.set_writer import block_writer
from slsgu_cli.sets import DataBlock
from slsgu_cli.store import Store
from slsgu_cli.workshop import block_path, reference

DROPPED = "dropped by hand"
MIN_HASH = 8


def drop(store: Store, ref: DataRef, wanted: Sequence[str]) -> DataRef:
    """Return the block of `ref` without the rows that `wanted` names by key or hash.

    A hash (of the encoded image, or its first 8 digits or more) takes all rows that have
    it. Raises MissingError for what names no row, UsageError for a key that several rows
    have, InputError where nothing would be left.
    """
    block = DataBlock.open(store, ref)
    going = {index for name in wanted for index in rows_named(block, name)}
    if not going:
        return ref
    if len(going) == block.rows:
        raise InputError(f"all {block.rows} rows would be dropped", hint="drop fewer")
    recipe: dict[str, Any] = {
        "from": ref.path,
        "fingerprint": ref.fingerprint,
        "dropped": sorted(going),
    }
    path = block_path(recipe)
    if not store.exists(path):
        _copy(store, block, path, going, recipe)
    refused = Counter(ref.refused)
    refused[DROPPED] += len(going)
    kept = DataBlock.at(store, path)
    return reference(path, kept, seen=ref.seen, refused=refused, sources=ref.sources)


def hashes(block: DataBlock) -> list[str]:
    """Return what names each row's encoded image, in hexadecimal digits."""
    return [row.tobytes().hex() for row in block.source_digests]


def rows_named(block: DataBlock, name: str) -> list[int]:
    """Return the rows with this key or hash. Raises MissingError or UsageError."""
    names = hashes(block)
    keyed = [index for index, key in enumerate(block.keys) if key == name]
    if len(keyed) == 1:
        return keyed
    if keyed:
        listed = ", ".join(names[index][:12] for index in keyed)
        raise UsageError(
            f"{len(keyed)} rows have the key {name}", hint=f"name one by its hash: {listed}"
        )
    if len(name) >= MIN_HASH:
        found = [index for index, digest in enumerate(names) if digest.startswith(name.lower())]
        if found:
            return found
    near = difflib.get_close_matches(name, block.keys, 3)
    raise MissingError(
        f"{block.where} has no row with the key or hash {name}"
        + (f"; near: {', '.join(near)}" if near else ""),
        hint="`slsgu show NAME` lists keys and hashes",
    )


def _copy(
    store: Store, block: DataBlock, path: str, going: set[int], recipe: dict[str, Any]
) -> None:
    kept = [index for index in range(block.rows) if index not in going]
    height, width = block.images(0, 1).shape[1:3]
    with block_writer(store, path, height=height, width=width, rows=len(kept)) as writer:
        for start in range(0, block.rows, block.chunk_rows):
            images = block.images(start, start + block.chunk_rows)
            for index, image in enumerate(images, start):
                if index not in going:
                    writer.add(
                        image,
                        key=block.keys[index],
                        caption=block.captions[index],
                        label=int(block.labels[index]),
                        source_digest=block.source_digests[index].tobytes(),
                        origin=block.origins[index],
                    )
        attributes = {**block.attributes, "recipe": recipe}
        writer.finish(block.tokens[np.asarray(kept)], attributes)
