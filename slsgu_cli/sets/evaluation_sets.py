"""Evaluation sets, every row of which has a known label; a look at rows, and rows taken out."""

import difflib
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np

from slsgu_cli import progress
from slsgu_cli.clip.inputs import decode_in_order
from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.figures.sheets import contact_sheet
from slsgu_cli.records.codec import encode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import DataRef, Origin, SetManifest, test_part
from slsgu_cli.sets.context import BuildContext, block_path, counted, file_recipe, reference
from slsgu_cli.sources.captions import (
    CLASS_NAMES,
    DEFAULT_TEMPLATES,
    FROM_LABELS,
    TEMPLATE_NAMES,
    ClassList,
    builtin_classes,
    builtin_templates,
    class_indices,
    find_class,
    folded,
    parse_classes,
    parse_names,
    parse_templates,
)
from slsgu_cli.sources.opening import RowId, fetch, parse_source, scan
from slsgu_cli.sources.rows import Columns, Reader, Row
from slsgu_cli.store.artifacts import Artifact, plot_path, read_manifest
from slsgu_cli.store.blocks import BlockWriter, DataBlock, block_writer
from slsgu_cli.store.sharing import held
from slsgu_cli.store.store import Store


@dataclass(frozen=True, slots=True)
class LabelledRow:
    """A row to decode and the index of the class it belongs to."""

    row: Row
    label: int


@dataclass(slots=True)
class EvalPlan:
    """An evaluation set before its images are read; `block` is set if it was made before."""

    name: str
    source: str
    path: str
    recipe: dict[str, Any]
    readers: Sequence[Reader]
    templates: tuple[str, ...]
    class_names: tuple[str, ...]
    rows: Mapping[RowId, LabelledRow]
    seen: int
    refused: Counter[str]
    block: DataBlock | None = None
    noted: Counter[str] = field(default_factory=Counter)

    def rows_of(self, concept: str) -> int | None:
        """Return how many rows show the concept; None if it is no class of this set."""
        index = find_class(self.class_names, concept)
        if index is None:
            return None
        if self.block is not None:
            return int((self.block.labels == index).sum())
        return sum(row.label == index for row in self.rows.values())


def read_classes(name: str) -> ClassList | None:
    """Return a built-in or a file's list of classes; None where labels are the names."""
    if name in CLASS_NAMES:
        return builtin_classes(name)
    return parse_classes(_text(name, "--classes", CLASS_NAMES), name)


def read_templates(name: str) -> tuple[str, ...]:
    """Return built-in templates or those of a file."""
    if name in TEMPLATE_NAMES:
        return builtin_templates(name)
    return parse_templates(_text(name, "--templates", TEMPLATE_NAMES), name)


def read_names(path: str) -> tuple[tuple[str, str], ...]:
    """Return the other names of a concept in a file, each with its kind."""
    return parse_names(_text(path, "--spellings", ()), path)


def plan_eval(
    context: BuildContext,
    request: BuildRequest,
    name: str,
    *,
    source: str,
    readers: Sequence[Reader],
    among: tuple[str, ...] | None = None,
) -> EvalPlan:
    """Read the labels of an evaluation set, or find the set made. Raises InputError.

    Where the labels are the names, `among` are the classes that they may be of.
    """
    classes = request.classes.get(name)
    known = read_classes(classes or FROM_LABELS[0])
    numbers_are_names = classes in FROM_LABELS or among is not None
    if known is None and among is not None:
        known = ClassList(among, None, f"evaluation set {name}")
    prompts = read_templates(request.templates.get(name) or DEFAULT_TEMPLATES)
    filters = parse_source(source).filters
    recipe = {
        "role": "eval",
        "files": file_recipe(readers),
        "filters": {column: sorted(values) for column, values in filters.items()},
        "label": request.label_column,
        "pixels": context.pixel_recipe(),
        "classes": encode([known.names, known.labels]) if known else None,
        "templates": list(prompts),
    }
    path = block_path(recipe)
    block = context.standing(path)
    if block is None:
        names, rows, seen, refused = _labelled(source, readers, known)
    else:
        names, rows, seen = block.class_names, {}, int(block.attributes["seen"])
        refused = Counter(block.attributes["refused"])
    if known is None and not numbers_are_names:
        _require_names(name, names)
    return EvalPlan(name, source, path, recipe, readers, prompts, names, rows, seen, refused, block)


def label_columns(request: BuildRequest) -> Columns:
    """Return the columns that evaluation rows are read by."""
    return Columns(
        image=request.image_column, label=request.label_column, needs=frozenset(["label"])
    )


def build_eval(context: BuildContext, plan: EvalPlan) -> DataRef:
    """Make the block of an evaluation set, or use the one made before."""
    title = f"evaluation set {plan.name}"
    block, made = plan.block, False
    if block is None:
        with held(context.store, plan.path, what=title):
            # Another process may have made it meanwhile.
            block = context.standing(plan.path, again=True)
            if block is None:
                block, made = _write(context, plan, title), True
    if not made:
        progress.note(f"{title}: {block.rows} rows were decoded before and are used again")
    refused = Counter(block.attributes["refused"])
    return reference(plan.path, block, seen=plan.seen, refused=refused, sources=(plan.source,))


def _write(context: BuildContext, plan: EvalPlan, title: str) -> DataBlock:
    """Make the block of an evaluation set. Raises InputError where it would have no rows."""
    height, width = context.spec.height, context.spec.width
    with block_writer(
        context.store, plan.path, height=height, width=width, rows=len(plan.rows)
    ) as writer:
        _decode_into(writer, context, plan, title)
        if not writer.rows:
            raise InputError(
                f"no row is left for the {title}: {counted(plan.refused)}",
                hint="check that its source holds whole images",
            )
        writer.finish(None, _attributes(context, plan))
    return DataBlock.at(context.store, plan.path)


def _require_names(name: str, classes: Sequence[str]) -> None:
    """Raise InputError where classes are numbers: prompts of them mean nothing to a model."""
    if not classes or not all(label.isdecimal() for label in classes):
        return
    some = ", ".join(sorted(classes, key=int)[:4])
    raise InputError(
        f"the labels of evaluation set {name} are numbers ({some}{', ...' * (len(classes) > 4)}), "
        "not names",
        hint=f"give their names: --classes {name}=FILE with a name a line, for 0, 1, 2, ..., or "
        f"label<TAB>name; --classes {name}=labels if the numbers are the names",
    )


def _labelled(
    source: str, readers: Sequence[Reader], known: ClassList | None
) -> tuple[tuple[str, ...], dict[RowId, LabelledRow], int, Counter[str]]:
    """Return class names, rows that have a class, how many rows were seen, and refusals."""
    refused: Counter[str] = Counter()
    labelled: list[tuple[int, Row, str]] = []
    seen = 0
    with progress.bar("reading labels", None) as ticker:
        for number, row in scan(readers, refused):
            ticker.advance()
            seen += 1
            if row.label is None or not row.has_image:
                refused["no label" if row.label is None else "no image"] += 1
            else:
                labelled.append((number, row, row.label))
    if not labelled:
        raise InputError(
            f"no row of {source} can be evaluated on: {seen} rows, {counted(refused) or 'none'}",
            hint="name the label column with --label-column, or give a folder of class folders; "
            "labels in a file apart from a tar: LABELS.txt?images=TAR; "
            "check the filter behind the question mark",
        )
    names, index, numbered = _classes_of(known, [(row, label) for _, row, label in labelled])
    rows = {
        (number, row.index): LabelledRow(row, index[called])
        for number, row, label in labelled
        if (called := (row.number or label) if numbered else label) in index
    }
    refused["unknown label"] += len(labelled) - len(rows)
    return names, rows, seen, refused


def _classes_of(
    known: ClassList | None, labels: Sequence[tuple[Row, str]]
) -> tuple[tuple[str, ...], dict[str, int], bool]:
    """Return class names, the index of each label, and whether labels go by their numbers.

    A file may name its classes by numbers and by names, as Hugging Face's do. To a list of
    classes they go by what more of them are known by: names of ImageNet are spelt in many ways.
    """
    names = {label for _, label in labels}
    numbers = {row.number for row, _ in labels if row.number is not None}
    if known is None or not numbers:
        return *class_indices(known, names), False
    by_name: dict[str, int] = {}
    with suppress(InputError):
        _, by_name = class_indices(known, names)
    with suppress(InputError):
        _, by_number = class_indices(known, numbers)
        if len(by_number) > len(by_name):
            return known.names, by_number, True
    return *class_indices(known, names), False


def _decode_into(writer: BlockWriter, context: BuildContext, plan: EvalPlan, title: str) -> None:
    wanted = {place: labelled.row.extent for place, labelled in plan.rows.items()}
    decoded_rows = 0
    with progress.bar(f"decoding {title}", len(plan.rows)) as ticker:
        for place, decoded in decode_in_order(fetch(plan.readers, wanted), context.decode):
            decoded_rows += 1
            ticker.advance()
            if decoded.pixels is None:
                plan.refused[decoded.reason or "unreadable"] += 1
                continue
            labelled = plan.rows[place]
            row = labelled.row
            writer.add(
                decoded.pixels,
                key=row.key,
                caption=row.caption,
                label=labelled.label,
                source_digest=decoded.source_digest,
                origin=row.origin or Origin(plan.readers[place[0]].path, row.index),
            )
            plan.noted.update(decoded.oddities)
    plan.refused["unreadable"] += len(plan.rows) - decoded_rows


def _attributes(context: BuildContext, plan: EvalPlan) -> dict[str, Any]:
    return {
        "role": "eval",
        "sources": [plan.source],
        "seen": plan.seen,
        "refused": {reason: count for reason, count in plan.refused.items() if count},
        "noted": dict(sorted(plan.noted.items())),
        "class_names": list(plan.class_names),
        "templates": list(plan.templates),
        "input": encode(context.spec),
        "recipe": plan.recipe,
    }


def _text(path: str, option: str, names: Sequence[str]) -> str:
    hint = f"give {option} a file" + (f", or one of: {', '.join(names)}" if names else "")
    try:
        with fsspec.open(path, "r", encoding="utf-8-sig") as file:
            return str(file.read())
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}", hint=hint) from error
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot read {path}: {error}", hint=hint) from error


DROPPED = "dropped by hand"
MIN_HASH = 8


def drop(store: Store, ref: DataRef, wanted: Sequence[str], *, strict: bool = True) -> DataRef:
    """Return the block of `ref` without the rows that `wanted` names by key or hash.

    A hash (of the encoded image, or its first 8 digits or more) takes all rows that have
    it. Raises MissingError for what names no row if `strict`, UsageError for a key that several
    rows have, InputError where nothing would be left.
    """
    block = DataBlock.open(store, ref)
    going: set[int] = set()
    for name in wanted:
        with nullcontext() if strict else suppress(MissingError):
            going.update(rows_named(block, name))
    if not going:
        return ref
    if len(going) == block.rows:
        raise InputError(f"all {block.rows} rows would be dropped", hint="drop fewer")
    recipe = {"from": ref.path, "fingerprint": ref.fingerprint, "dropped": sorted(going)}
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
    store: Store, block: DataBlock, path: str, going: set[int], recipe: Mapping[str, Any]
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
        tests = {n: ref if test_part(n) == part else r for n, r in manifest.tests.items()}
        changed = replace(manifest, tests=tests)
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
