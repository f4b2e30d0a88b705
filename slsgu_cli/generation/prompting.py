"""The prompts to generate from, and the class that each of them asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slsgu_cli.errors import InputError, MissingError, UsageError
from slsgu_cli.generation.judging import class_in
from slsgu_cli.prompts import find_class


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, and the class it asks for where one is known."""

    text: str
    label: str | None = None


def read_prompts(
    texts: Sequence[str], file: Path | None, classes: Sequence[str], concept: str
) -> list[Prompt]:
    """Return the prompts of the command line, then those of a file.

    A file has a prompt a line, or `prompt<TAB>class`. Of other prompts the class is the
    longest class name in them. Raises UsageError without any, MissingError, InputError.
    """
    lines = [(text.strip(), "--prompt") for text in texts]
    if file is not None:
        try:
            content = file.read_text(encoding="utf-8")
        except FileNotFoundError as error:
            raise MissingError(f"there is no file of prompts {file}") from error
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read prompts from {file}: {error}") from error
        numbered = enumerate(content.splitlines(), 1)
        lines += [(line.strip(), f"{file}, line {number}") for number, line in numbered]
    known = [*classes, concept] if find_class(classes, concept) is None else list(classes)
    prompts = [_prompt(line, origin, known) for line, origin in lines if line]
    if not prompts:
        raise UsageError(
            "there is nothing to generate from", hint=f"--prompt 'a picture of {concept}'"
        )
    return prompts


def _prompt(line: str, origin: str, classes: Sequence[str]) -> Prompt:
    text, tab, label = line.partition("\t")
    if not tab:
        return Prompt(text, class_in(text, classes))
    text, label = text.strip(), label.strip()
    place = find_class(classes, label)
    if place is None or not text:
        raise InputError(
            f"{origin}: {label!r} is no class that the judge knows",
            hint="prompt<TAB>class, with a class name of the evaluation sets or of --classes",
        )
    return Prompt(text, classes[place])
