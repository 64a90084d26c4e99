"""Look-ups in a table that devices share, against plain indexing."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quick import QUICK

from ddk_jax.models.lookup import look_up, share_rows
from ddk_jax.parallel.mesh import DATA_AXES, make_mesh

V, E, B, T = 11, 8, 8, 3


@pytest.mark.parametrize("sizes", [(2, 4, 1), (1, 2, 4), (8, 1, 1)])
def test_a_look_up_on_a_mesh_equals_indexing(sizes: tuple[int, int, int]) -> None:
    """Forward and backward; and neither the table nor the whole batch is ever in one place."""
    mesh, rng = make_mesh(*sizes), np.random.default_rng(0)
    table = rng.normal(size=(V, E)).astype(np.float32)
    index = rng.integers(0, V, (B, T)).astype(np.int32)
    d_out = rng.normal(size=(B, T, E)).astype(np.float32)
    columns = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec(DATA_AXES))
    given = (
        jax.device_put(x, s)
        for x, s in zip((table, index, d_out), (columns, rows, rows), strict=True)
    )

    @partial(jax.jit, out_shardings=(rows, columns), compiler_options=QUICK)
    def run(table: Any, index: Any, d_out: Any) -> Any:
        out, pull = jax.vjp(lambda t: look_up(t, index, jnp.float32, mesh), table)
        return out, pull(d_out)[0]

    given = tuple(given)
    found, d_table = run(*given)
    np.testing.assert_array_equal(found, table[index])
    expected = np.zeros((V, E))
    np.add.at(expected, index, d_out)
    np.testing.assert_allclose(d_table, expected, rtol=1e-5, atol=1e-5)
    text = run.lower(*given).compile().as_text() or ""
    assert f"f32[{B},{T},{E}]" not in text
    assert sizes[1] == 1 or f"f32[{V},{E}]" not in text


@pytest.mark.parametrize(
    ("rows", "width"),
    [(6, E), (B, 6)],
    ids=["rows that do not divide", "columns that do not divide"],
)
def test_what_cannot_be_shared_is_whole(rows: int, width: int) -> None:
    mesh, rng = make_mesh(2, 4, 1), np.random.default_rng(1)
    table = jnp.asarray(rng.normal(size=(V, width)), jnp.float32)
    index = jnp.asarray(rng.integers(0, V, (rows, T)), jnp.int32)
    found = jax.jit(partial(look_up, dtype=jnp.bfloat16, mesh=mesh))(table, index)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, table.astype(jnp.bfloat16)[index])


def test_activations_lie_by_rows() -> None:
    mesh = make_mesh(2, 2, 2)
    found = jax.jit(partial(share_rows, mesh=mesh))(jnp.zeros((B, T, E)))
    assert found.sharding.shard_shape(found.shape) == (B // 4, T, E)
    alone = jnp.zeros((B, T, E))
    assert share_rows(alone, None) is alone
