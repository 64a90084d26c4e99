"""One layer's parameter and the Hugging Face tensor that holds the same numbers.

Ours is [*inputs, *outputs]. Theirs is the transposed matrix [outputs, inputs], and may hold more
than ours: `families.Rows` says which of its outputs are ours. *Our part* of a tensor is what is
left of it without the others; it has the tensor's layout. These functions read it, turn it into the
parameter, and do the same backwards.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from ddk_jax.models.families import Placement, Rows
from ddk_jax.models.tensors import Tensor, empty

Shape = tuple[int, ...]
Axis = TypeVar("Axis")


def stored_shape(place: Placement, shape: Shape) -> Shape:
    """Shape of the whole tensor, for a parameter of this shape."""
    part = part_shape(place, shape)
    if place.rows is None:
        return part
    whole = list(part)
    whole[_row_axis(place)] = place.rows.groups * place.rows.total
    return tuple(whole)


def part_shape(place: Placement, shape: Shape) -> Shape:
    """Shape of our part of the tensor, for a parameter of this shape."""
    if place.inputs is None:
        return shape
    rows, columns = math.prod(shape[place.inputs :]), math.prod(shape[: place.inputs])
    if place.inputs == 0:
        return (rows,)
    return (columns, rows) if place.conv else (rows, columns)


def part_axes(place: Placement, axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """What is said of the parameter's axes, said of those of our part.

    An axis of the part is several of the parameter's; what holds for the first of these is taken.
    """
    if place.inputs is None:
        return tuple(axes)
    if place.inputs == 0:
        return (axes[0],)
    rows, columns = axes[place.inputs], axes[0]
    return (columns, rows) if place.conv else (rows, columns)


def read_part(tensor: Tensor, place: Placement, index: Sequence[slice]) -> np.ndarray:
    """Read a slice of every axis of our part, in the file's type.

    Where the outputs are in groups, each group is read by itself, and nothing between them.
    """
    if place.rows is None:
        return tensor[tuple(index)]
    axis = _row_axis(place)
    first, stop = index[axis].start, index[axis].stop
    runs = list(_stored_rows(place.rows, first, stop))
    parts = (tensor[*index[:axis], run, *index[axis + 1 :]] for _, run in runs)
    if len(runs) == 1:
        return next(parts)
    out: np.ndarray | None = None
    for (start, run), part in zip(runs, parts, strict=True):
        if out is None:
            shape = list(part.shape)
            shape[axis] = stop - first
            out = empty(shape, part.dtype)
        at = slice(start - first, start - first + run.stop - run.start)
        out[*(slice(None),) * axis, at] = part
    assert out is not None
    return out


def arranged(part: Any, place: Placement, shape: Shape) -> Any:
    """The parameter, from the whole of our part; arrays of numpy or of jax."""
    if place.inputs and not place.conv:
        part = part.T
    return part.reshape(shape)


def stored_part(value: Any, place: Placement) -> Any:
    """Our part of the tensor, from the parameter."""
    part = value if place.inputs is None else value.reshape(part_shape(place, value.shape))
    if place.inputs and not place.conv:
        part = value.reshape(part.shape[::-1]).T
    return part


def write_part(tensor: np.ndarray, place: Placement, part: np.ndarray) -> None:
    """Put our part where it belongs in the whole tensor."""
    if place.rows is None:
        tensor[...] = part
        return
    before = (slice(None),) * _row_axis(place)
    for start, run in _stored_rows(place.rows, 0, place.rows.groups * place.rows.size):
        tensor[*before, run] = part[*before, start : start + run.stop - run.start]


def _row_axis(place: Placement) -> int:
    """The axis of the tensor that its outputs are on."""
    return 1 if place.inputs and place.conv else 0


def _stored_rows(rows: Rows, first: int, stop: int) -> Iterator[tuple[int, slice]]:
    """Contiguous pieces of our rows [first, stop): number of the first, and where they are."""
    while first < stop:
        group, row = divmod(first, rows.size)
        count = min(rows.size - row, stop - first)
        start = group * rows.total + rows.start + row
        yield first, slice(start, start + count)
        first += count
