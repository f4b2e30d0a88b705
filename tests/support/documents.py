"""Validation of `--json` output against the schema in docs/artifacts."""

import functools
import json
from pathlib import Path

FILE = Path(__file__).parents[2] / "docs" / "artifacts" / "documents.schema.json"


@functools.cache
def _validators():
    """Return the validators of the documents of each command, and of errors."""
    from jsonschema import Draft202012Validator

    whole = json.loads(FILE.read_text())
    *known, failed = whole["anyOf"]
    by_command = {}
    for each in known:
        name = each["properties"]["command"]["const"]
        by_command.setdefault(name, []).append(each)
    return {
        name: Draft202012Validator({"anyOf": [*each, failed], "$defs": whole["$defs"]})
        for name, each in [*by_command.items(), (None, [failed])]
    }


def validated(text):
    """Return the one document in `text`. Raises AssertionError unless it fits the schema."""
    document = json.loads(text)
    validator = _validators()[document["command"]]
    told = [_deepest(error) for error in validator.iter_errors(document)]
    assert not told, told
    return document


def _deepest(error):
    """Return the error for the variant of the schema that matches best."""
    while error.context:
        error = max(error.context, key=lambda each: len(each.absolute_path))
    return f"{'/'.join(map(str, error.absolute_path))}: {error.message[:300]}"
