"""Rows that a user drops from a set by key or hash."""

import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.records.sets import DataRef, SetManifest, test_part
from slsgu_cli.sets.context import block_path, reference
from slsgu_cli.store.artifacts import Artifact, read_manifest
from slsgu_cli.store.blocks import DataBlock, row_writer
from slsgu_cli.store.store import Store

DROPPED = "dropped by hand"
MIN_HASH = 8


def drop(store: Store, ref: DataRef, names: Sequence[str], *, strict: bool = True) -> DataRef:
    """Return the block of `ref` without the rows that `names` lists by key or hash.

    A hash (of the encoded image, at least its first 8 digits) drops all rows with this image.
    Raises MissingError for an unknown name if `strict`, UsageError for a key of several rows,
    InputError if no row would remain.
    """
    block = DataBlock.open(store, ref)
    dropped: set[int] = set()
    for name in names:
        with nullcontext() if strict else suppress(MissingError):
            dropped.update(rows_named(block, name))
    if not dropped:
        return ref
    if len(dropped) == block.rows:
        raise InputError(f"all {block.rows} rows would be dropped", hint="drop fewer")
    recipe = {"from": ref.path, "fingerprint": ref.fingerprint, "dropped": sorted(dropped)}
    path = block_path(recipe)
    if not store.exists(path):
        _copy(store, block, path, dropped, recipe)
    refused = Counter(ref.refused)
    refused[DROPPED] += len(dropped)
    remaining = DataBlock.at(store, path)
    return reference(path, remaining, seen=ref.seen, refused=refused, sources=ref.sources)


def hashes(block: DataBlock) -> list[str]:
    """Return the hash of each row's encoded image, in hexadecimal digits."""
    return [row.tobytes().hex() for row in block.source_digests]


def rows_named(block: DataBlock, name: str) -> list[int]:
    """Return the rows with this key or hash. Raises MissingError or UsageError."""
    image_hashes = hashes(block)
    keyed = [index for index, key in enumerate(block.keys) if key == name]
    if len(keyed) == 1:
        return keyed
    if keyed:
        choices = ", ".join(image_hashes[index][:12] for index in keyed)
        raise UsageError(
            f"{len(keyed)} rows have the key {name}", hint=f"name one by its hash: {choices}"
        )
    if len(name) >= MIN_HASH:
        hashed = [
            index for index, digest in enumerate(image_hashes) if digest.startswith(name.lower())
        ]
        if hashed:
            return hashed
    near = difflib.get_close_matches(name, block.keys, 3)
    raise MissingError(
        f"{block.where} has no row with the key or hash {name}"
        + (f"; near: {', '.join(near)}" if near else ""),
        hint="`slsgu show NAME` lists keys and hashes",
    )


def _copy(
    store: Store, block: DataBlock, path: str, dropped: set[int], recipe: Mapping[str, Any]
) -> None:
    remaining = [index for index in range(block.rows) if index not in dropped]
    shape = block.content_of(0, 1).shape[1:]
    with row_writer(store, path, shape=shape, rows=len(remaining)) as writer:
        for start in range(0, block.rows, block.chunk_rows):
            rows = block.content_of(start, start + block.chunk_rows)
            for index, row in enumerate(rows, start):
                if index not in dropped:
                    writer.add(
                        row,
                        key=block.keys[index],
                        caption=block.captions[index],
                        label=int(block.labels[index]),
                        source_digest=block.source_digests[index].tobytes(),
                        origin=block.origins[index],
                    )
        attributes = {**block.attributes, "recipe": recipe}
        writer.finish(block.tokens[np.asarray(remaining)], attributes)


def drop_from_set(store: Store, name: str, names: Sequence[str], *, part: str) -> SetManifest:
    """Drop the rows that `names` lists from a part of the set; return the new manifest."""
    manifest = read_manifest(store, name)
    ref = drop(store, part_ref(manifest, part), names)
    request = dict(manifest.request)
    before = request.get("dropped", {})
    request["dropped"] = {**before, part: sorted({*before.get(part, ()), *names})}
    again = ("slsgu", "build-sets", name, "--replay")
    manifest = replace(manifest, request=request, command=again)
    if part in ("forget", "retain"):
        forget = ref if part == "forget" else manifest.forget
        retain = ref if part == "retain" else manifest.retain
        changed = replace(manifest, forget=forget, retain=retain)
    elif part in manifest.evals:
        changed = replace(manifest, evals={**manifest.evals, part: ref})
    else:
        tests = {n: ref if test_part(n) == part else r for n, r in manifest.tests.items()}
        changed = replace(manifest, tests=tests)
    store.write_record(Artifact.SET.path(name), changed)
    return changed


def read_keys(path: str) -> list[str]:
    """Return the keys or hashes listed in a file, one per line. Raises InputError."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the keys in {path}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def part_ref(manifest: SetManifest, part: str) -> DataRef:
    """Return the block of a part of a set. Raises UsageError for an unknown part."""
    parts = manifest.blocks()
    if part not in parts:
        raise UsageError(
            f"set {manifest.name} has no part {part}", hint=f"--part {'|'.join(parts)}"
        )
    return parts[part]
