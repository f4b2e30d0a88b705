"""`show`: what a set is made of; rows taken out by hand."""

import difflib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.figures.pictures import contact_sheet
from slsgu_cli.records.sets import DataRef, Origin, SetManifest, report_part
from slsgu_cli.sets.context import block_path, reference
from slsgu_cli.sources.captions import folded
from slsgu_cli.store.artifacts import Artifact, plot_path, read_manifest
from slsgu_cli.store.blocks import DataBlock, block_writer
from slsgu_cli.store.store import Store

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
        hashed = [index for index, digest in enumerate(names) if digest.startswith(name.lower())]
        if hashed:
            return hashed
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


FORGET = "forget"
TOP_WORDS = 20
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")

# Words that say nothing of what is in an image; other languages are left alone.
STOPWORDS = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "is", "it", "of", "on", "the", "to", "with")
)


@dataclass(frozen=True, slots=True)
class SeenRow:
    """One row as a person is told of it; `hash` names its encoded image."""

    key: str
    hash: str
    caption: str
    origin: Origin | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """One part of a set: its rows, what its captions speak of, and where it comes from.

    `words` are (word, captions that have it), the most frequent first; `sources` the same
    for files. `sheet` is where the contact sheet was written, None where it could not be.
    """

    manifest: SetManifest
    part: str
    ref: DataRef
    rows: Sequence[SeenRow]
    captions: int
    words: Sequence[tuple[str, int]]
    sources: Sequence[tuple[str, int]]
    sheet: str | None


def inspect_set(store: Store, name: str, *, part: str = FORGET, images: int = 48) -> Inspection:
    """Read one part of a set and draw the contact sheet of its first rows.

    Rows stand in the order of the seeded draw, so the first ones are a fair sample. Raises
    MissingError, StaleError, or UsageError for an unknown part.
    """
    manifest = read_manifest(store, name)
    ref = _part(manifest, part)
    block = DataBlock.open(store, ref)
    shown = min(images, block.rows)
    rows = [
        SeenRow(*row)
        for row in zip(block.keys, hashes(block), block.captions, block.origins, strict=True)
    ]
    labels = [(row.key, row.caption or _label(block, index)) for index, row in enumerate(rows)]
    sheet = plot_path(name, f"{part}-sheet")
    title = f"{name}: {shown} of {block.rows} rows of {part}"
    drawn = contact_sheet(block.images(0, shown), labels[:shown], title=title)
    written = store.write_picture(sheet, drawn) is not None
    files = Counter(row.origin.file for row in rows if row.origin)
    return Inspection(
        manifest=manifest,
        part=part,
        ref=ref,
        rows=rows,
        captions=len({row.caption for row in rows if row.caption}),
        words=top_words([row.caption for row in rows]),
        sources=sorted(files.items(), key=lambda item: (-item[1], item[0])),
        sheet=sheet if written else None,
    )


def drop_from_set(store: Store, name: str, wanted: Sequence[str], *, part: str) -> SetManifest:
    """Take the rows that `wanted` names out of a part of the set; return the new manifest."""
    manifest = read_manifest(store, name)
    ref = drop(store, _part(manifest, part), wanted)
    request = dict(manifest.request)
    before = request.get("dropped", {})
    request["dropped"] = {**before, part: sorted({*before.get(part, ()), *wanted})}
    again = ("slsgu", "build-sets", name, "--replay")
    manifest = replace(manifest, request=request, command=again)
    if part in ("forget", "retain"):
        forget = ref if part == FORGET else manifest.forget
        retain = ref if part == "retain" else manifest.retain
        changed = replace(manifest, forget=forget, retain=retain)
    elif part in manifest.evals:
        changed = replace(manifest, evals={**manifest.evals, part: ref})
    else:
        reports = {n: ref if report_part(n) == part else r for n, r in manifest.reports.items()}
        changed = replace(manifest, reports=reports)
    store.write_record(Artifact.SET.path(name), changed)
    return changed


def read_keys(path: str) -> list[str]:
    """Return the keys or hashes listed in a file, one a line. Raises InputError."""
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read the keys in {path}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def top_words(captions: Sequence[str]) -> list[tuple[str, int]]:
    """Return the words that most captions have, with how many do."""
    counts = Counter(word for caption in captions for word in set(WORD.findall(folded(caption))))
    telling = [(word, count) for word, count in counts.items() if word not in STOPWORDS]
    return sorted(telling, key=lambda item: (-item[1], item[0]))[:TOP_WORDS]


def _part(manifest: SetManifest, part: str) -> DataRef:
    parts = manifest.blocks()
    if part not in parts:
        raise UsageError(
            f"set {manifest.name} has no part {part}", hint=f"--part {'|'.join(parts)}"
        )
    return parts[part]


def _label(block: DataBlock, index: int) -> str:
    label = int(block.labels[index])
    return block.class_names[label] if 0 <= label < len(block.class_names) else ""
