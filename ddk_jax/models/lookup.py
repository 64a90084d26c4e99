"""Rows on a mesh: look-ups in a table that devices share, and where activations lie.

Legend: B rows, T tokens, V vocabulary, E hidden.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ddk_jax.parallel.mesh import PARAM_AXIS, row_axes


def look_up(
    table_VE: Float[Array, "V E"], index_BT: Int[Array, "B T"], dtype: Any, mesh: Mesh | None
) -> Float[Array, "B T E"]:
    """The rows of a table, in a type.

    Where devices share the columns of the table and the rows of the batch, each reads its columns
    for the tokens of all of them, and they exchange the results: neither the table nor the whole
    batch is anywhere gathered, and the table's gradient needs no sum over them.

    Args:
      table_VE: the table, its columns shared by the axis `fsdp`.
      index_BT: rows of the table.
      dtype: floating type of the result.
      mesh: the devices. None: a single one.
    """
    axes = () if mesh is None else row_axes(mesh, index_BT.shape[0])
    if mesh is None or PARAM_AXIS not in axes or table_VE.shape[1] % mesh.shape[PARAM_AXIS]:
        return share_rows(table_VE[index_BT].astype(dtype), mesh)

    def local(table: Array, index: Array) -> Array:
        index = jax.lax.all_gather(index, PARAM_AXIS, tiled=True)
        found = table[index].astype(dtype)
        return jax.lax.all_to_all(found, PARAM_AXIS, split_axis=0, concat_axis=2, tiled=True)

    rows = PartitionSpec(axes)
    in_specs = (PartitionSpec(None, PARAM_AXIS), rows)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=rows)(table_VE, index_BT)


def share_rows(x: Float[Array, "B *axes"], mesh: Mesh | None) -> Float[Array, "B *axes"]:
    """The same array, its rows on the devices that share them and all else whole.

    Said of the residual stream between the layers: left to itself, the partitioner may carry the
    shards of the parameters over to the activations, and gather those.
    """
    axes = () if mesh is None else row_axes(mesh, x.shape[0])
    if mesh is None or not axes:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(axes)))
