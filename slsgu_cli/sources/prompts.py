"""Class names and prompt templates of an evaluation set: built in, or from a file.

The built-in ones are ImageNet's names and templates (from open_clip) and CelebA's template,
which is the bare name and a full stop. CelebA's release numbers its people without names, so
CelebA's class names are the labels or folder names of the source.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

import fsspec

from slsgu_cli.errors import InputError, MissingError
from slsgu_cli.sources.texts import label_words
from slsgu_cli.text import listed

DEFAULT_TEMPLATES = "imagenet-simple"
TEMPLATE_NAMES = ("imagenet", "imagenet-simple", "celeba")
FROM_LABELS = ("labels", "celeba")
CLASS_NAMES = ("imagenet", *FROM_LABELS)
WNID = re.compile(r"n\d{8}")
SLOT = "{}"


@dataclass(frozen=True, slots=True)
class ClassList:
    """Class names in order; `labels` are the labels of the classes if they are not the names."""

    names: tuple[str, ...]
    labels: dict[str, int] | None
    origin: str


def parse_classes(text: str, origin: str) -> ClassList:
    """Read one class name per line, or `label<TAB>name`. Raises InputError naming the line."""
    names: dict[str, int] = {}
    labels: dict[str, int] = {}
    filled = filled_lines(text)
    tabbed = sum("\t" in line for _, line in filled)
    if not filled or tabbed not in (0, len(filled)):
        content = f"{tabbed} of {len(filled)} lines have a tab" if filled else "it is empty"
        raise InputError(
            f"{origin} is not a list of classes: {content}",
            hint="one class name per line, or label<TAB>name on every line",
        )
    for number, line in filled:
        label, _, name = (part.strip() for part in line.rpartition("\t"))
        if (label in labels) if tabbed else (name in names):
            raise InputError(f"{origin}, line {number}: {line!r} appears twice")
        labels[label] = names.setdefault(name, len(names))
    return ClassList(tuple(names), labels if tabbed else None, origin)


def read_classes(name: str) -> ClassList | None:
    """Return a built-in list of classes or that of a file; None if labels are the names."""
    if name in FROM_LABELS:
        return None
    if name == "imagenet":
        from open_clip.zero_shot_metadata import IMAGENET_CLASSNAMES

        return ClassList(tuple(IMAGENET_CLASSNAMES), None, name)
    return parse_classes(read_text(name, "--classes", CLASS_NAMES), name)


def read_templates(name: str) -> tuple[str, ...]:
    """Return built-in templates or those of a file, as texts with one `{}` each."""
    if name == "celeba":
        return ("{}.",)
    if name in TEMPLATE_NAMES:
        from open_clip import zero_shot_metadata

        simple = zero_shot_metadata.SIMPLE_IMAGENET_TEMPLATES
        full = zero_shot_metadata.OPENAI_IMAGENET_TEMPLATES
        return tuple(str(template(SLOT)) for template in (full if name == "imagenet" else simple))
    return parse_templates(read_text(name, "--templates", TEMPLATE_NAMES), name)


def read_names(path: str, option: str) -> tuple[tuple[str, str], ...]:
    """Return the names in a file that an option gives, each with its kind."""
    return parse_names(read_text(path, option), path)


def read_text(path: str, option: str, names: Sequence[str] = ()) -> str:
    """Return the text of a file that an option gives, which may also be one of `names`.

    Raises MissingError and InputError.
    """
    hint = f"give {option} a file" + (f", or one of: {', '.join(names)}" if names else "")
    try:
        with fsspec.open(path, "r", encoding="utf-8-sig") as file:
            return str(file.read())
    except FileNotFoundError as error:
        raise MissingError(f"there is no {path}", hint=hint) from error
    except (OSError, ValueError, ImportError) as error:
        raise InputError(f"cannot read {path}: {error}", hint=hint) from error


def class_indices(
    classes: ClassList | None, labels: Collection[str]
) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the class names and the class index of every label that has one.

    Without a list, the labels are the names. With a list, labels are the labels in its file,
    its names, or (if none is a name) indices into it; for ImageNet also the 1000 folder names.
    Raises InputError if no label belongs to a class.
    """
    if classes is None:
        names = sorted({_plain(label) for label in labels})
        index = {name: place for place, name in enumerate(names)}
        return tuple(names), {label: index[_plain(label)] for label in sorted(labels)}
    known = _by_label(classes, labels) or _by_index(classes, labels) or _by_wnid(classes, labels)
    if not known:
        raise InputError(
            f"no label is a class of {classes.origin}: labels are {_some(sorted(labels))}; "
            f"classes are {_some(classes.names)}",
            hint="give a file of label<TAB>name lines with --classes",
        )
    return classes.names, known


def find_class(names: Sequence[str], concept: str) -> int | None:
    """Return the index of the class with the concept's name, ignoring case; None for no class."""
    wanted = _same(concept)
    return next((index for index, name in enumerate(names) if _same(name) == wanted), None)


def find_classes(names: Sequence[str], words: Sequence[str]) -> list[int]:
    """Return the indices of the classes with one of the words as name, as `find_class`."""
    found = (find_class(names, word) for word in words)
    return [index for index in found if index is not None]


def parse_templates(text: str, origin: str) -> tuple[str, ...]:
    """Read one template per line, each with exactly one `{}`. Raises InputError naming the line."""
    templates = filled_lines(text)
    for number, line in templates:
        if line.count(SLOT) != 1:
            raise InputError(
                f"{origin}, line {number}: {line!r} contains {SLOT} {line.count(SLOT)} times",
                hint="write each template with one {} where the class name goes",
            )
    if not templates:
        raise InputError(f"{origin} contains no templates")
    return tuple(line for _, line in templates)


def filled_lines(text: str) -> list[tuple[int, str]]:
    """Return the lines that are not blank, stripped, with their numbers from 1."""
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return [(number, line) for number, line in lines if line]


def parse_names(text: str, origin: str) -> tuple[tuple[str, str], ...]:
    """Read names, one per line, each with its kind. Raises InputError.

    A line that begins with # gives the kind of the names below it, such as `# German`.
    """
    kind, names = "name", []
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#"):
            kind = " ".join(line.lstrip("#").replace(":", " ").split()) or kind
        elif line:
            names.append((kind, line))
    if not names:
        raise InputError(f"{origin} contains no names", hint="write one per line")
    return tuple(dict.fromkeys(names))


def _by_label(classes: ClassList, labels: Iterable[str]) -> dict[str, int]:
    table: dict[str, int] = {}
    for name, index in (classes.labels or {}).items():
        table.setdefault(_same(name), index)
    for index, name in enumerate(classes.names):
        # Two of ImageNet's names are those of two classes; the first class counts.
        table.setdefault(_same(name), index)
    return {label: table[_same(label)] for label in labels if _same(label) in table}


def _by_index(classes: ClassList, labels: Collection[str]) -> dict[str, int]:
    if classes.labels is not None or not all(label.isdecimal() for label in labels):
        return {}
    return {label: int(label) for label in labels if int(label) < len(classes.names)}


def _by_wnid(classes: ClassList, labels: Collection[str]) -> dict[str, int]:
    if classes.origin != "imagenet" or not all(WNID.fullmatch(label) for label in labels):
        return {}
    if len(labels) != len(classes.names):
        raise InputError(
            f"only {len(labels)} of ImageNet's {len(classes.names)} folder names are present; "
            "without the others, their classes are unknown",
            hint="give a file of folder<TAB>name lines with --classes",
        )
    return {label: index for index, label in enumerate(sorted(labels))}


def _plain(label: str) -> str:
    return label_words(label) or label


def _same(name: str) -> str:
    return _plain(name).casefold()


def _some(names: Sequence[str]) -> str:
    return listed([repr(name) for name in names], 4)
