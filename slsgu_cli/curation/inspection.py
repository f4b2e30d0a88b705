"""What a set is made of, for a person to look at: captions, words, sources, origins."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from slsgu_cli.curation.dropping import drop, hashes
from slsgu_cli.curation.sheet import contact_sheet
from slsgu_cli.errors import InputError, UsageError
from slsgu_cli.layout import manifest_path, plot_path, read_manifest
from slsgu_cli.matching import folded
from slsgu_cli.records import DataRef, SetManifest
from slsgu_cli.samples import Origin
from slsgu_cli.sets import DataBlock
from slsgu_cli.shelf import blocks
from slsgu_cli.store import Store

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
    for files. `sheet` is where the contact sheet was written.
    """

    manifest: SetManifest
    part: str
    ref: DataRef
    rows: Sequence[SeenRow]
    captions: int
    words: Sequence[tuple[str, int]]
    sources: Sequence[tuple[str, int]]
    sheet: str


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
    store.write_bytes(sheet, contact_sheet(block.images(0, shown), labels[:shown], title=title))
    files = Counter(row.origin.file for row in rows if row.origin)
    return Inspection(
        manifest=manifest,
        part=part,
        ref=ref,
        rows=rows,
        captions=len({row.caption for row in rows if row.caption}),
        words=top_words([row.caption for row in rows]),
        sources=sorted(files.items(), key=lambda item: (-item[1], item[0])),
        sheet=sheet,
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
    else:
        changed = replace(manifest, evals={**manifest.evals, part: ref})
    store.write_record(manifest_path(name), changed)
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
    found = Counter(word for caption in captions for word in set(WORD.findall(folded(caption))))
    told = [(word, count) for word, count in found.items() if word not in STOPWORDS]
    return sorted(told, key=lambda item: (-item[1], item[0]))[:TOP_WORDS]


def _part(manifest: SetManifest, part: str) -> DataRef:
    parts = dict(blocks(manifest))
    if part not in parts:
        raise UsageError(
            f"set {manifest.name} has no part {part}", hint=f"--part {'|'.join(parts)}"
        )
    return parts[part]


def _label(block: DataBlock, index: int) -> str:
    label = int(block.labels[index])
    return block.class_names[label] if 0 <= label < len(block.class_names) else ""
