"""Sizes of the mesh, and where the parameters lie on it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import topologies
from jax.sharding import AxisType, PartitionSpec

from ddk_jax.models.decoder import Decoder
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.compiled import topology
from ddk_jax.parallel.mesh import (
    MESH_AXES,
    RULES,
    data_shards,
    make_mesh,
    param_shardings,
    replicated,
    row_axes,
)


@pytest.mark.parametrize(
    ("asked", "sizes", "shards"),
    [
        ((-1, 1, 1), (8, 1, 1), 8),
        ((-1, 2, 2), (2, 2, 2), 4),
        ((2, -1, 1), (2, 4, 1), 8),
        ((1, 1, -1), (1, 1, 8), 1),
        ((4, 1, 2), (4, 1, 2), 4),
    ],
)
def test_sizes(
    asked: tuple[int, int, int], sizes: tuple[int, int, int], shards: int, devices: list[jax.Device]
) -> None:
    mesh = make_mesh(*asked)
    assert tuple(mesh.shape.items()) == tuple(zip(MESH_AXES, sizes, strict=True))
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(devices)
    assert data_shards(mesh) == shards


def test_some_of_the_devices(devices: list[jax.Device]) -> None:
    assert make_mesh().shape["data"] == 8
    assert make_mesh(devices=devices[:1]).size == 1
    mesh = make_mesh(-1, 1, 2, devices=devices[2:6])
    assert mesh.shape["data"] == 2
    assert set(mesh.devices.flat) == set(devices[2:6])


@pytest.mark.tpu_compiler
def test_slices_share_replicas_and_nothing_else() -> None:
    topology("v5e:1x1")  # which tells libtpu that it is alone
    found = topologies.get_topology_desc("v5e:2x4", "tpu", num_slices=2).devices
    for sizes in ((-1, 8, 1), (4, 2, 2), (2, 4, 2)):
        mesh = make_mesh(*sizes, devices=found)
        replicas = [{d.slice_index for d in part.flat} for part in mesh.devices]
        half = mesh.shape["data"] // 2
        assert replicas == [{0}] * half + [{1}] * half
    with pytest.raises(ValueError, match="data=1 on 2 slices: must be a multiple"):
        make_mesh(1, 8, 2, devices=found)


@pytest.mark.parametrize(
    ("sizes", "rows", "axes"),
    [
        ((8, 1, 1), 8, ("data",)),
        ((2, 2, 2), 8, ("data", "fsdp")),
        ((1, 4, 2), 4, ("fsdp",)),
        ((1, 4, 2), 6, ()),
        ((1, 1, 8), 8, ()),
    ],
)
def test_axes_that_share_rows(
    sizes: tuple[int, int, int], rows: int, axes: tuple[str, ...]
) -> None:
    assert row_axes(make_mesh(*sizes), rows) == axes


@given(st.tuples(*[st.integers(-3, 9)] * 3))
def test_sizes_fit_or_are_refused(sizes: tuple[int, int, int]) -> None:
    try:
        mesh = make_mesh(*sizes)
    except ValueError as error:
        assert "does not fit 8 devices" in str(error)
        assert all(
            f"{name}={size}" in str(error) for name, size in zip(MESH_AXES, sizes, strict=True)
        )
    else:
        assert mesh.size == 8
        for size, found in zip(sizes, mesh.shape.values(), strict=True):
            assert size in (found, -1)


def specs(mesh: jax.sharding.Mesh, spec: ModelSpec) -> dict[str, PartitionSpec]:
    decoder = Decoder(spec=spec)
    shardings = param_shardings(mesh, decoder.logical_axes(), decoder.abstract())
    assert jax.tree.structure(shardings) == jax.tree.structure(decoder.abstract())
    flat = jax.tree_util.tree_leaves_with_path(shardings)
    return {jax.tree_util.keystr(path, simple=True, separator="."): s.spec for path, s in flat}


def test_parameters_follow_the_rules() -> None:
    spec = ModelSpec(
        vocab_size=16,
        hidden_size=8,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        ffn_size=12,
        tied_head=False,
    )
    found = specs(make_mesh(2, 2, 2), spec)
    assert found["head.kernel"] == PartitionSpec("fsdp", "tensor")
    assert found["embed.table"] == PartitionSpec(None, "fsdp")
    assert found["norm.scale"] == PartitionSpec(None)
    assert found["layers.0.attn.q"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert found["layers.0.attn.o"] == PartitionSpec(None, "tensor", None, "fsdp")
    assert found["layers.0.mlp.down"] == PartitionSpec(None, "tensor", "fsdp")
    assert found["layers.0.attn_norm.scale"] == PartitionSpec(None, None)


def test_axes_that_do_not_divide_stay_whole() -> None:
    spec = ModelSpec(
        vocab_size=15,
        hidden_size=8,
        num_layers=1,
        num_heads=4,
        num_kv_heads=1,
        ffn_size=10,
        tied_head=False,
    )
    found = specs(make_mesh(1, 2, 4), spec)
    assert found["head.kernel"] == PartitionSpec("fsdp", None)
    assert found["layers.0.attn.q"] == PartitionSpec(None, "fsdp", "tensor", None)
    assert found["layers.0.attn.k"] == PartitionSpec(None, "fsdp", None, None)
    assert found["layers.0.mlp.up"] == PartitionSpec(None, "fsdp", None)


def test_names_and_shapes_must_agree() -> None:
    mesh = make_mesh()
    leaf = jax.ShapeDtypeStruct((2, 2), jnp.float32)
    with pytest.raises(KeyError):
        param_shardings(mesh, {"x": ("embed", "unheard_of")}, {"x": leaf})
    with pytest.raises(ValueError, match="zip"):
        param_shardings(mesh, {"x": ("embed",)}, {"x": leaf})
    assert set(filter(None, RULES.values())) <= set(MESH_AXES)
    assert replicated(mesh).is_fully_replicated
