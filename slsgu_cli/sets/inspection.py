"""Inspecting a part of a set: its rows, frequent words, sources and a contact sheet."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from slsgu_cli.figures.sheets import contact_sheet
from slsgu_cli.records.sets import DataRef, Origin, SetManifest
from slsgu_cli.sets.dropped_rows import hashes, part_ref
from slsgu_cli.sources.matching import folded
from slsgu_cli.store.artifacts import plot_path, read_manifest
from slsgu_cli.store.blocks import DataBlock
from slsgu_cli.store.store import Store

FORGET = "forget"
TOP_WORDS = 20
WORD = re.compile(r"[^\W_]+(?:['-][^\W_]+)*")

# English words without information about an image.
STOPWORDS = frozenset(
    ("a", "an", "and", "at", "by", "for", "from", "in", "is", "it", "of", "on", "the", "to", "with")
)


@dataclass(frozen=True, slots=True)
class InspectedRow:
    """One row as `show` lists it; `hash` is that of its encoded image."""

    key: str
    hash: str
    caption: str
    origin: Origin | None


@dataclass(frozen=True, slots=True)
class Inspection:
    """One part of a set: its rows, frequent words of its captions, and its sources.

    `words` are (word, number of captions with it), the most frequent first; `sources` the same
    for files. `sheet` is the path of the contact sheet, None if it could not be written.
    """

    manifest: SetManifest
    part: str
    ref: DataRef
    rows: Sequence[InspectedRow]
    captions: int
    words: Sequence[tuple[str, int]]
    sources: Sequence[tuple[str, int]]
    sheet: str | None


def inspect_set(store: Store, name: str, *, part: str = FORGET, images: int = 48) -> Inspection:
    """Read one part of a set and draw the contact sheet of its first rows.

    Rows are in seeded random order, so the first ones are a fair sample. Raises MissingError,
    StaleError, or UsageError for an unknown part.
    """
    manifest = read_manifest(store, name)
    ref = part_ref(manifest, part)
    block = DataBlock.open(store, ref)
    shown = min(images, block.rows)
    rows = [
        InspectedRow(*row)
        for row in zip(block.keys, hashes(block), block.captions, block.origins, strict=True)
    ]
    sheet = plot_path(name, f"{part}-sheet")
    title = f"{name}: {shown} of {block.rows} rows of {part}"
    written = store.write_picture(sheet, sheet_of(block, images, title=title)) is not None
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


def sheet_of(block: DataBlock, images: int, *, title: str) -> bytes:
    """Return the contact sheet of the first rows of a block, as PNG bytes."""
    shown = min(images, block.rows)
    labels = [
        (key, caption or _label(block, index))
        for index, (key, caption) in enumerate(
            zip(block.keys[:shown], block.captions[:shown], strict=True)
        )
    ]
    return contact_sheet(block.images(0, shown), labels, title=title)


def top_words(captions: Sequence[str]) -> list[tuple[str, int]]:
    """Return the most frequent words, with the number of captions that contain them."""
    counts = Counter(word for caption in captions for word in set(WORD.findall(folded(caption))))
    informative = [(word, count) for word, count in counts.items() if word not in STOPWORDS]
    return sorted(informative, key=lambda item: (-item[1], item[0]))[:TOP_WORDS]


def _label(block: DataBlock, index: int) -> str:
    label = int(block.labels[index])
    return block.class_names[label] if 0 <= label < len(block.class_names) else ""
