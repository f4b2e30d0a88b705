"""Filters of a source's rows: the values that a column may have."""

from collections.abc import Mapping, Sequence
from typing import Any

from slsgu_cli.errors import InputError
from slsgu_cli.sources.texts import as_text

Filters = dict[str, frozenset[str]]


class RowFilters:
    """Several filters on the same columns, tested against one row at a time."""

    def __init__(self, filters: Sequence[Filters]) -> None:
        self._filters = filters
        self.columns = sorted(filters[0])
        self._by_value: dict[str, list[int]] = {}
        for number, each in enumerate(filters):
            for value in each[self.columns[0]] if self.columns else ():
                self._by_value.setdefault(value, []).append(number)

    def matches(self, fields: Mapping[str, Any]) -> Sequence[int]:
        """Return the numbers of the filters that a row's fields match, in order."""
        if not self.columns:
            return range(len(self._filters))
        value = as_text(fields.get(self.columns[0]))
        numbers = self._by_value.get(value, ()) if value is not None else ()
        if len(self.columns) == 1:
            return numbers
        return [number for number in numbers if matches(self._filters[number], fields)]


def matches(filters: Filters, fields: Mapping[str, Any]) -> bool:
    """Return whether a row's fields have one of the accepted values for every filter."""
    return all(as_text(fields.get(name)) in values for name, values in filters.items())


def no_column(path: str, name: str, columns: Sequence[str], hint: str) -> InputError:
    """Return the error for a column that a source does not have."""
    names = ", ".join(columns) or "none"
    return InputError(f"{path} has no {name}; its columns are: {names}", hint=hint)
