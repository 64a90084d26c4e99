"""Fields of a row by name, and what a source makes depend on them: filters and domains."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ddk_jax.config import FilterConfig, SharedSourceConfig, SourceConfig
from ddk_jax.errors import UserError

FILE_FIELD = "@file"
"""The name of the file that a row is in, as if it were a column."""

MISSING: Any = object()
"""What `value_at` gives for a field that is not there."""


def value_at(columns: Mapping[str, Any], field: str) -> Any:
    """The value of a column; dots lead into nested objects. `MISSING` if there is none."""
    if field in columns:
        return columns[field]
    value: Any = columns
    for name in field.split("."):
        if not isinstance(value, Mapping) or name not in value:
            return MISSING
        value = value[name]
    return value


def kind_of(value: object) -> str:
    """The type of a value, for messages."""
    return "null" if value is None else type(value).__name__


def columns_read(source: SourceConfig, field: str = "") -> list[str]:
    """The fields of a row that a source looks at; `field` is that of a shared source."""
    if source.messages:
        names = [source.messages]
    elif source.prompt:
        names = [source.prompt, source.response]
    else:
        names = [source.text, "query", "choices", "gold", "suffix"]
    names += [test.field for test in source.filters] + [field]
    return [name for name in dict.fromkeys(names) if name and name != FILE_FIELD]


def passes(filters: Sequence[FilterConfig], columns: Mapping[str, Any], file: str) -> bool:
    """Whether a row passes every filter.

    Raises:
        ValueError: a field is missing or of another type than the test needs.
    """
    return all(_passes(test, _field(columns, test.field, file)) for test in filters)


def domain_of(shared: SharedSourceConfig, columns: Mapping[str, Any], file: str) -> str:
    """The domain of a row of a shared source; empty if it belongs to none.

    Raises:
        ValueError: the field is missing, or is no text, number or truth value.
    """
    value = _field(columns, shared.field, file)
    if not isinstance(value, str | int | float):
        raise ValueError(f"field {shared.field!r} must be text, found {kind_of(value)}")
    for pattern, domain in shared.domains.items():
        if fnmatch.fnmatchcase(str(value), pattern):
            return domain
    return ""


def check_filters(filters: Sequence[FilterConfig], where: str) -> None:
    """That every filter has a value of the type that its test needs.

    Raises:
        UserError: one has not.
    """
    for test in filters:
        value, needs = test.value, _NEEDS[test.test]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        good = {
            "a value": value is not None and not isinstance(value, Mapping | list),
            "a list": isinstance(value, list | tuple) and len(value) > 0,
            "a text": isinstance(value, str),
            "a number": number,
        }
        if not good[needs]:
            raise UserError(
                f"{where}: the filter {test.test} on {test.field} needs {needs}, got {value!r}"
            )


_NEEDS = {
    "equals": "a value",
    "in": "a list",
    "not_in": "a list",
    "matches": "a text",
    "at_least": "a number",
    "at_most": "a number",
    "min_chars": "a number",
    "max_chars": "a number",
}


def _field(columns: Mapping[str, Any], field: str, file: str) -> Any:
    value = file if field == FILE_FIELD else value_at(columns, field)
    if value is MISSING:
        raise ValueError(f"field {field!r} is missing")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _passes(test: FilterConfig, value: Any) -> bool:
    name, wanted = test.test, test.value
    if name in ("equals", "in", "not_in"):
        among = _same(value, [wanted] if name == "equals" else wanted)
        return among != (name == "not_in")
    numeric = name in ("at_least", "at_most")
    if isinstance(value, bool) or not isinstance(value, int | float if numeric else str):
        raise ValueError(
            f"field {test.field!r} must be {'a number' if numeric else 'text'} for the filter "
            f"{name}, found {kind_of(value)}"
        )
    return _COMPARED[name](value, wanted)


def _same(value: Any, wanted: Sequence[Any]) -> bool:
    # True is not 1 here: a filter on a truth value and one on a number are different things.
    return any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in wanted)


_COMPARED: dict[str, Callable[[Any, Any], bool]] = {
    "matches": fnmatch.fnmatchcase,
    "at_least": lambda value, least: value >= least,
    "at_most": lambda value, most: value <= most,
    "min_chars": lambda value, least: len(value) >= least,
    "max_chars": lambda value, most: len(value) <= most,
}
