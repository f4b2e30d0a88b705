"""Records to and from JSON, and their digests."""

import dataclasses
import functools
import hashlib
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from slsgu_cli.errors import FormatError, NotFiniteError, StaleError
from slsgu_cli.text import reason_of

T = TypeVar("T")

# The format of all records and headers in a store. Raise it when an earlier version of slsgu
# could not read what this one writes, or the reverse.
FORMAT = 1


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError, for deep nesting too."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def encode(record: Any) -> Any:
    """Return the JSON-ready form of a record (or of a container of records)."""
    if dataclasses.is_dataclass(record) and not isinstance(record, type):
        return {
            field.name: encode(getattr(record, field.name)) for field in dataclasses.fields(record)
        }
    if isinstance(record, Mapping):
        return {str(key): encode(value) for key, value in record.items()}
    if isinstance(record, list | tuple):
        return [encode(value) for value in record]
    return record


def document(value: Any) -> Any:
    """Return a JSON-ready form in which no key depends on data.

    A map in a record becomes a list of objects, each with its `name` and either the fields of a
    record or a `value`. A dict that is not a field of a record has fixed keys, and keeps them.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {name: _without_maps(each) for name, each in fields.items()}
    if isinstance(value, Mapping):
        return {key: document(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [document(each) for each in value]
    return value


def by_name(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the items of a map as rows, each with its `name`."""
    encoded = {name: _without_maps(value) for name, value in values.items()}
    return [
        {"name": name, **(each if isinstance(each, dict) else {"value": each})}
        for name, each in encoded.items()
    ]


def _without_maps(value: Any) -> Any:
    if isinstance(value, Mapping):
        return by_name(value)
    if isinstance(value, list | tuple):
        return [_without_maps(each) for each in value]
    return document(value)


def usual_value(field: "dataclasses.Field[Any]") -> Any:
    """Return the default of a field; MISSING if it is required."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def without_none(kind: Any) -> Any:
    """Return the type of an optional value without None."""
    if typing.get_origin(kind) in (types.UnionType, typing.Union):
        return next(each for each in typing.get_args(kind) if each is not type(None))
    return kind


def decode(kind: type[T], value: Any) -> T:
    """Rebuild a record of type `kind` from its JSON form.

    Raises StaleError if a field is missing or has another shape.
    """
    try:
        return typing.cast(T, _build(kind, value))
    except (KeyError, TypeError, ValueError) as error:
        raise StaleError(
            f"this {kind.__name__} record was not written by this version of slsgu: "
            + reason_of(error),
            hint="make the artifact again with the command that wrote it",
        ) from error


def _build(kind: Any, value: Any) -> Any:
    origin = typing.get_origin(kind)
    arguments = typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _build(without_none(kind), value)
    if kind is Any:
        return value
    if origin in (tuple, Sequence):
        return tuple(_build(arguments[0], item) for item in _checked(value, list, tuple))
    if origin is dict:
        return {key: _build(arguments[1], item) for key, item in _checked(value, dict).items()}
    if dataclasses.is_dataclass(kind):
        _checked(value, dict)
        make: Any = kind
        return make(**{name: _build(hint, value[name]) for name, hint in _fields(make)})
    if kind is float:
        return float(_checked(value, float, int))
    return kind(_checked(value, kind)) if kind in (str, int, bool) else kind(value)


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, Any], ...]:
    """Return the name and the type of each field of a record."""
    hints = typing.get_type_hints(kind)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(kind))


def _checked(value: Any, *kinds: type) -> Any:
    """Refuse a value that a constructor would convert, such as None to "None"."""
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise TypeError(f"{value!r} is not a {kinds[0].__name__}")
    return value


def canonical_json(value: Any) -> str:
    """Return one JSON text per value: keys sorted, no white space. Raises NotFiniteError."""
    return _compact(encode(value))


def _compact(encoded: Any) -> str:
    try:
        return json.dumps(encoded, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise NotFiniteError(
            "a figure in the record is not finite, which JSON cannot hold"
        ) from error


def digest(value: Any) -> str:
    """Return 24 hexadecimal digits that identify the content of a JSON-ready value or record."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:24]


def finite(value: Any) -> Any:
    """Return `value` with null for NaN and infinities, which JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# The keys under which a JSON object carries its format, and the digest of all the rest.
FORMAT_KEY, SEAL = "format", "sha256"


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON-ready object with its format, and last a digest of its content.

    Raises NotFiniteError for NaN and infinities.
    """
    unsealed = {FORMAT_KEY: FORMAT} | {key: v for key, v in content.items() if key != SEAL}
    return {**unsealed, SEAL: _seal(unsealed)}


def require_seal(content: Any) -> None:
    """Raise ValueError unless an object carries the digest of its content.

    Raises FormatError where another version of slsgu wrote it in another format.
    """
    if not isinstance(content, Mapping) or SEAL not in content:
        raise ValueError("it carries no digest")
    if content[SEAL] != _seal({key: value for key, value in content.items() if key != SEAL}):
        raise ValueError("its content does not match its digest")
    if (found := content.get(FORMAT_KEY, 0)) != FORMAT:
        raise FormatError(
            f"another version of slsgu wrote this store, in format {found}; "
            f"this version reads format {FORMAT}",
            hint="build the sets again in a new store (--store)",
        )


def _seal(unsealed: Mapping[str, Any]) -> str:
    return hashlib.sha256(_compact(unsealed).encode()).hexdigest()
