"""Frozen dataclasses from plain data and back: strictly, with the key in every message."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from ddk_jax.errors import UserError


def to_plain(value: Any) -> Any:
    """Dataclasses and tuples as dicts and lists, ready for YAML and JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        other: Any = plain.pop(getattr(value, "OTHER_KEYS", ""), {})
        return plain | other
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [to_plain(item) for item in value]
    return value


def from_plain(kind: Any, value: Any, where: str = "") -> Any:
    """Build `kind` from plain data, strictly: no unknown keys, no silent conversions.

    Args:
      kind: a dataclass, `tuple[X, ...]`, `Literal[...]`, one of str, bool, int, float, or a
        union of a dataclass and one of these or None.
      value: what YAML gave.
      where: dotted key of `value`, for messages.
    """
    if dataclasses.is_dataclass(kind):
        return _dataclass_from_plain(kind, value, where)
    if isinstance(kind, types.UnionType):
        return _union_from_plain(typing.get_args(kind), value, where)
    if kind is Any:
        return value
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: needs a list, got {value!r}")
        item = typing.get_args(kind)[0]
        return tuple(from_plain(item, v, f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise UserError(f"{where}: needs names and values, got {value!r}")
        item = typing.get_args(kind)[1]
        return {key: from_plain(item, v, f"{where}.{key}") for key, v in value.items()}
    if origin is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{where} = {value!r}: {suggest(str(value), choices)}")
        return value
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind is float and isinstance(value, str):  # YAML 1.1 reads 3e-5 as a string
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{where}: needs {kind.__name__}, got {value!r}")
    return value


def _union_from_plain(kinds: Sequence[Any], value: Any, where: str) -> Any:
    """Keys and values are the dataclass among the kinds, all else but None the first of them."""
    if value is None and types.NoneType in kinds:
        return None
    if isinstance(value, Mapping):
        kinds = [kind for kind in kinds if dataclasses.is_dataclass(kind)] or kinds
    return from_plain(kinds[0], value, where)


@functools.cache
def _hints(kind: Any) -> Mapping[str, Any]:
    """Types of the fields: to evaluate annotations takes long."""
    hints = typing.get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def _dataclass_from_plain(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise UserError(f"{where or 'the file'}: needs keys and values, got {value!r}")
    hints = _hints(kind)
    prefix = f"{where}." if where else ""
    other = getattr(kind, "OTHER_KEYS", None)
    if other is not None:
        own = {key: item for key, item in value.items() if key in hints and key != other}
        rest = {key: item for key, item in value.items() if key not in own}
        value, hints = own | {other: rest}, {**hints, other: Any}
    for key in value:
        if key not in hints:
            raise UserError(f"unknown key {prefix}{key}: {suggest(str(key), list(hints))}")
    missing = [
        f.name
        for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
        and f.name not in value
    ]
    if missing:
        raise UserError(f"{where or 'the file'}: missing key {', '.join(missing)}")
    fields = {key: from_plain(hints[key], item, f"{prefix}{key}") for key, item in value.items()}
    try:
        return kind(**fields)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def suggest(name: str, known: Sequence[Any]) -> str:
    """`did you mean X?`, or the list of what is known."""
    close = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]}?"
    return f"choose one of {', '.join(str(k) for k in known)}"
