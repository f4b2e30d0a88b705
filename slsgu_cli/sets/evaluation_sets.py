"""Evaluation sets: every row of a source that has a known label, in the source's order."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import fsspec

from slsgu_cli import progress
from slsgu_cli.clip.inputs import decode_in_order
from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.records.codec import encode
from slsgu_cli.records.sets import DataRef, Origin
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
    parse_classes,
    parse_names,
    parse_templates,
)
from slsgu_cli.sources.opening import RowId, fetch, parse_source, scan
from slsgu_cli.sources.rows import Columns, Reader, Row
from slsgu_cli.store.blocks import BlockWriter, DataBlock, block_writer
from slsgu_cli.store.sharing import held


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
    name: str,
    *,
    source: str,
    readers: Sequence[Reader],
    classes: str | None,
    templates: str | None,
    columns: Columns,
    among: tuple[str, ...] | None = None,
) -> EvalPlan:
    """Read the labels of an evaluation set, or find the set made. Raises InputError.

    Where the labels are the names, `among` are the classes that they may be of.
    """
    known = read_classes(classes or FROM_LABELS[0])
    if known is None and among is not None:
        known = ClassList(among, None, f"evaluation set {name}")
    prompts = read_templates(templates or DEFAULT_TEMPLATES)
    filters = parse_source(source).filters
    recipe = {
        "role": "eval",
        "files": file_recipe(readers),
        "filters": {column: sorted(values) for column, values in filters.items()},
        "label": columns.label,
        "pixels": context.pixel_recipe(),
        "classes": encode([known.names, known.labels]) if known else None,
        "templates": list(prompts),
    }
    path = block_path(recipe)
    block = context.standing(path)
    if block is not None:
        counts = Counter(block.attributes["refused"])
        seen = int(block.attributes["seen"])
        names = block.class_names
        return EvalPlan(
            name, source, path, recipe, readers, prompts, names, {}, seen, counts, block
        )
    names, rows, seen, refused = _labelled(context, source, readers, known)
    return EvalPlan(name, source, path, recipe, readers, prompts, names, rows, seen, refused)


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


def _labelled(
    context: BuildContext, source: str, readers: Sequence[Reader], known: ClassList | None
) -> tuple[tuple[str, ...], dict[RowId, LabelledRow], int, Counter[str]]:
    """Return class names, rows that have a class, how many rows were seen, and refusals."""
    refused: Counter[str] = Counter()
    labelled: list[tuple[int, Row, str]] = []
    seen = 0
    with progress.bar("reading labels", None) as ticker:
        for number, row in scan(readers, refused, tick=ticker.advance):
            seen += 1
            if row.label is None or not row.has_image:
                refused["no label" if row.label is None else "no image"] += 1
            else:
                labelled.append((number, row, row.label))
    if not labelled:
        raise InputError(
            f"no row of {source} can be evaluated on: {seen} rows, {counted(refused) or 'none'}",
            hint="name the label column with --label-column, or give a folder of class folders; "
            "check the filter behind the question mark",
        )
    names, index = class_indices(known, {label for *_, label in labelled})
    rows = {
        (number, row.index): LabelledRow(row, index[label])
        for number, row, label in labelled
        if label in index
    }
    refused["unknown label"] += len(labelled) - len(rows)
    return names, rows, seen, refused


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
