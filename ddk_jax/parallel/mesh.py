"""The device mesh, and the one place that says which logical axis lies on which mesh axis."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
DATA_AXES = ("data", "fsdp")
"""Axes that share the rows of a batch."""
VOCAB_AXIS = "tensor"
"""Axis that shares the columns of the LM heads."""

RULES: dict[str, str | None] = {
    "layers": None,
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
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

    Args:
      data: replicas that share the batch; -1 takes what the other two leave.
      fsdp: devices that share the batch and the parameters.
      tensor: devices that share heads, MLP and vocabulary.
      devices: default: all of them.

    Raises:
      ValueError: the sizes do not multiply to the number of devices.
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
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES), devices=devices
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def data_shards(mesh: Mesh) -> int:
    """Number of shards that the rows of a batch are split into."""
    return math.prod(mesh.shape[axis] for axis in DATA_AXES)


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
