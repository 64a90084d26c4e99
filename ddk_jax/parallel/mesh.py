"""The device mesh, and the one place that says which logical axis lies on which mesh axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_hybrid_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
DATA_AXES = ("data", "fsdp")
"""Axes that share the rows of a batch."""
PARAM_AXIS = "fsdp"
"""Axis that shares parameters which are gathered where they are used."""
VOCAB_AXIS = "tensor"
"""Axis that shares the columns of the LM heads."""
HEAD_AXIS = "tensor"
"""Axis that shares the heads of the attention."""

RULES: dict[str, str | None] = {
    "layers": None,
    "embed": PARAM_AXIS,
    "heads": HEAD_AXIS,
    "kv_heads": HEAD_AXIS,
    "head_width": None,
    "ffn": "tensor",
    "norm": None,
    "positions": None,
    "rank": None,
    "vocab": VOCAB_AXIS,
    # The look-up in a vocabulary-sharded table all-reduces the whole batch: shard its width alone.
    "vocab_in": None,
}


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`.

    Devices of several TPU slices, which are joined by the slower network of the data centre, are
    ordered slice by slice: replicas of the model may be on different slices, parts of one are not.

    Args:
      data: replicas that share the batch; -1 takes what the other two leave.
      fsdp: devices that share the batch and the parameters.
      tensor: devices that share heads, MLP and vocabulary.
      devices: default: all of them.

    Raises:
      ValueError: the sizes do not multiply to the number of devices, or the slices do not divide
        the replicas.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = [data, fsdp, tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices) or min(sizes) < 1:
        raise ValueError(
            f"mesh data={data} x fsdp={fsdp} x tensor={tensor} does not fit {len(devices)} "
            "devices: set one of them to -1"
        )
    axis_types = (AxisType.Auto,) * len(MESH_AXES)
    # A single slice need not have an index, and on other platforms it says something else.
    index = {getattr(device, "slice_index", 0) for device in devices}
    slices = len(index) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=axis_types, devices=devices)
    if sizes[0] % slices:
        raise ValueError(
            f"mesh data={sizes[0]} on {slices} slices: must be a multiple of their number, for "
            "fsdp and tensor stay within a slice"
        )
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, 1, 1)
    grid = create_hybrid_device_mesh(within, across, devices=devices)
    return Mesh(grid, MESH_AXES, axis_types=axis_types)


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def data_shards(mesh: Mesh) -> int:
    """Number of shards that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


def row_axes(mesh: Mesh, rows: int) -> tuple[str, ...]:
    """The axes, of more than one device, that share so many rows; none if they do not divide."""
    axes = tuple(axis for axis in DATA_AXES if mesh.shape[axis] > 1)
    return axes if rows % data_shards(mesh) == 0 else ()


def param_shardings(mesh: Mesh, logical_axes: Any, abstract: Any) -> Any:
    """A NamedSharding in the place of every parameter.

    Args:
      mesh: from `make_mesh`.
      logical_axes: tuples of names out of `RULES`, in the shape of the parameter tree.
      abstract: the parameters' shapes; an axis that a mesh axis does not divide stays whole.
    """

    def sharding(leaf: jax.ShapeDtypeStruct, names: tuple[str, ...]) -> NamedSharding:
        spec = []
        for size, name in zip(leaf.shape, names, strict=True):
            axis = RULES[name]
            fits = axis is not None and size % mesh.shape[axis] == 0
            spec.append(axis if fits else None)
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, abstract, logical_axes)
