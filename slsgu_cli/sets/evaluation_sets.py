"""Evaluation sets: rows with labels, planned from the labels, then decoded into blocks."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from slsgu_cli import progress
from slsgu_cli.clip.decoding import decode_in_order
from slsgu_cli.errors import InputError
from slsgu_cli.records.codec import encode
from slsgu_cli.records.options import BuildRequest
from slsgu_cli.records.sets import DataRef, Origin
from slsgu_cli.sets.context import BuildContext, block_path, counted, file_recipe, reference
from slsgu_cli.sources.grammar import parse_source
from slsgu_cli.sources.opening import RowId, fetch, scan
from slsgu_cli.sources.prompts import (
    DEFAULT_TEMPLATES,
    FROM_LABELS,
    ClassList,
    class_indices,
    find_class,
    read_classes,
    read_templates,
)
from slsgu_cli.sources.reader import Columns, Reader, Row
from slsgu_cli.store.blocks import DataBlock, block_writer
from slsgu_cli.store.locks import held


@dataclass(slots=True)
class EvalPlan:
    """An evaluation set before its images are read.

    `rows` are the rows to decode with the indices of their classes; `block` is that of an
    earlier build.
    """

    name: str
    source: str
    path: str
    recipe: dict[str, Any]
    readers: Sequence[Reader]
    templates: tuple[str, ...]
    class_names: tuple[str, ...]
    rows: Mapping[RowId, tuple[Row, int]]
    seen: int
    refused: Counter[str]
    block: DataBlock | None = None

    def rows_of(self, concept: str) -> int | None:
        """Return how many rows show the concept; None if it is not a class of this set."""
        index = find_class(self.class_names, concept)
        if index is None:
            return None
        if self.block is not None:
            return int((self.block.labels == index).sum())
        return sum(label == index for _, label in self.rows.values())


def plan_eval(
    context: BuildContext,
    request: BuildRequest,
    name: str,
    *,
    source: str,
    readers: Sequence[Reader],
    among: tuple[str, ...] | None = None,
) -> EvalPlan:
    """Read the labels of an evaluation set, or reuse an earlier build. Raises InputError.

    If the labels are the names, `among` restricts them to these classes.
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
    block = context.existing_block(path)
    if block is None:
        names, rows, seen, refused = _labelled(source, readers, known)
    else:
        names, rows, seen = block.class_names, {}, int(block.attributes["seen"])
        refused = Counter(block.attributes["refused"])
    if known is None and not numbers_are_names:
        _require_names(name, names)
    return EvalPlan(name, source, path, recipe, readers, prompts, names, rows, seen, refused, block)


def label_columns(request: BuildRequest) -> Columns:
    """Return the columns of evaluation rows."""
    return Columns(
        image=request.image_column, label=request.label_column, needs=frozenset(["label"])
    )


def build_eval(context: BuildContext, plan: EvalPlan) -> DataRef:
    """Build the block of an evaluation set, or reuse an earlier one."""
    title = f"evaluation set {plan.name}"
    with held(context.store, plan.path, what=title):
        # Another process may have built it in the meantime.
        block = plan.block or context.existing_block(plan.path)
        if block is None:
            block = _write(context, plan, title)
        else:
            progress.note(f"{title}: reusing {block.rows} decoded rows")
    refused = Counter(block.attributes["refused"])
    return reference(plan.path, block, seen=plan.seen, refused=refused, sources=(plan.source,))


def _write(context: BuildContext, plan: EvalPlan, title: str) -> DataBlock:
    """Build the block of an evaluation set. Raises InputError if it would have no rows."""
    height, width, rows = context.spec.height, context.spec.width, plan.rows
    wanted = {place: row.extent for place, (row, _) in rows.items()}
    stream = decode_in_order(fetch(plan.readers, wanted), context.decode)
    noted = Counter[str]()
    with (
        block_writer(
            context.store, plan.path, height=height, width=width, rows=len(rows)
        ) as writer,
        progress.bar(f"decoding {title}", len(rows)) as ticker,
    ):
        for place, decoded in stream:
            ticker.advance()
            if decoded.pixels is None:
                plan.refused[str(decoded.reason)] += 1
                continue
            row, label = rows[place]
            writer.add(
                decoded.pixels,
                key=row.key,
                caption=row.caption,
                label=label,
                source_digest=decoded.source_digest,
                origin=row.origin or Origin(plan.readers[place[0]].path, row.index),
            )
            noted.update(decoded.oddities)
        if not writer.rows:
            raise InputError(
                f"the {title} has no usable rows: {counted(plan.refused)}",
                hint="check that the images in its source are complete",
            )
        attributes = {
            "role": "eval",
            "sources": [plan.source],
            "seen": plan.seen,
            "refused": {reason: count for reason, count in plan.refused.items() if count},
            "noted": dict(sorted(noted.items())),
            "class_names": list(plan.class_names),
            "templates": list(plan.templates),
            "input": encode(context.spec),
            "recipe": plan.recipe,
        }
        writer.finish(None, attributes)
    return DataBlock.at(context.store, plan.path)


def _require_names(name: str, classes: Sequence[str]) -> None:
    """Raise InputError if classes are numbers, with which a model has no useful prompts."""
    if not classes or not all(label.isdecimal() for label in classes):
        return
    some = ", ".join(sorted(classes, key=int)[:4])
    raise InputError(
        f"the labels of evaluation set {name} are numbers ({some}{', ...' * (len(classes) > 4)}), "
        "not names",
        hint=f"give their names: --classes {name}=FILE with one name per line, for 0, 1, 2, ..., "
        f"or label<TAB>name; --classes {name}=labels if the numbers are the names",
    )


def _labelled(
    source: str, readers: Sequence[Reader], known: ClassList | None
) -> tuple[tuple[str, ...], dict[RowId, tuple[Row, int]], int, Counter[str]]:
    """Return class names, rows with a class, the number of all rows, and refusals."""
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
            f"no row of {source} can be used for evaluation: {seen} rows, "
            f"{counted(refused) or 'none'}",
            hint="name the label column with --label-column, or give a folder of class folders; "
            "for labels in a separate file: LABELS.txt?images=TAR; "
            "check the filter after the question mark",
        )
    names, index, numbered = _classes_of(known, [(row, label) for _, row, label in labelled])
    rows = {
        (number, row.index): (row, index[name])
        for number, row, label in labelled
        if (name := (row.number or label) if numbered else label) in index
    }
    refused["unknown label"] += len(labelled) - len(rows)
    return names, rows, seen, refused


def _classes_of(
    known: ClassList | None, labels: Sequence[tuple[Row, str]]
) -> tuple[tuple[str, ...], dict[str, int], bool]:
    """Return class names, the index of each label, and whether labels are matched by number.

    A file may give its classes both numbers and names, as Hugging Face's do. They are matched
    by whichever the list of classes knows more of: ImageNet's names are written in many ways.
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
