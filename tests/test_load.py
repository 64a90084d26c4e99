"""Parameters out of tensors: the same on any path and any devices, and with little memory."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import assert_equal_trees, randomised

from ddk_jax.errors import StorageError, UserError
from ddk_jax.models import families, load
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.directory import open_tensors
from ddk_jax.models.layout import stored_shape
from ddk_jax.models.load import layer_shape, load_params
from ddk_jax.models.save import write_weights
from ddk_jax.models.spec import ModelSpec
from ddk_jax.models.tensors import StoredFile, header_bytes
from ddk_jax.parallel import mesh

LLAMA = ModelSpec(
    vocab_size=64,
    hidden_size=32,
    num_layers=5,
    num_heads=4,
    num_kv_heads=4,
    head_dim=8,
    ffn_size=48,
    tied_head=False,
    max_positions=16,
)
_BIASES = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
_GPT = _BIASES | {"norm": "layer", "gated_mlp": False, "tied_head": True}
SPECS = {
    "llama": LLAMA,
    "alternating": dataclasses.replace(
        LLAMA, family="gemma2", pattern=("local", "global"), window=4, norm_placement="both"
    ),
    "heads in groups": dataclasses.replace(
        LLAMA, family="gpt_neox", norm="layer", gated_mlp=False, **_BIASES
    ),
    "convolutions": dataclasses.replace(LLAMA, family="gpt2", positions="learned", **_GPT),
    "one kv head": dataclasses.replace(
        LLAMA, family="gpt_bigcode", num_kv_heads=1, positions="learned", **_GPT
    ),
    "fused": dataclasses.replace(LLAMA, family="phi3", num_kv_heads=2),
}


def write(directory: Path, params: Params, spec: ModelSpec, dtype: Any = np.float32) -> Path:
    write_weights(params, spec, directory, dtype=np.dtype(dtype), max_shard_bytes=2**30)
    return directory


def read(directory: Path, spec: ModelSpec, **settings: Any) -> Params:
    with ExitStack() as stack:
        tensors = open_tensors(directory, stack)
        return load_params(tensors, spec, origin="the model", **settings)


def shardings_over(devices: list[jax.Device], spec: ModelSpec) -> Params:
    grid = mesh.make_mesh(data=1, fsdp=2, tensor=4, devices=devices)
    decoder = Decoder(spec=spec)
    return mesh.param_shardings(grid, decoder.logical_axes(), decoder.abstract())


@pytest.fixture
def no_leaf_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every parameter is made on the devices."""
    monkeypatch.setattr(load, "SMALL_BYTES", 0)


_FAST = ("llama", "heads in groups")


@pytest.mark.parametrize(
    "name", [*_FAST, *(pytest.param(n, marks=pytest.mark.slow) for n in SPECS if n not in _FAST)]
)
def test_what_was_written_is_read_on_the_host_and_on_the_devices(
    tmp_path: Path, devices: list[jax.Device], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    spec = SPECS[name]
    params, shardings = randomised(spec), shardings_over(devices, spec)
    write(tmp_path, params, spec)
    assert_equal_trees(read(tmp_path, spec), params)
    assert_equal_trees(read(tmp_path, spec, shardings=shardings), params)
    monkeypatch.setattr(load, "SMALL_BYTES", 0)
    loaded = read(tmp_path, spec, shardings=shardings)
    assert_equal_trees(loaded, params)
    assert jax.tree.map(lambda leaf: leaf.sharding, loaded) == shardings


@pytest.mark.parametrize(
    ("stored", "dtype"),
    [
        ("bfloat16", "float32"),
        ("float64", "bfloat16"),
        *(
            pytest.param(stored, dtype, marks=pytest.mark.slow)
            for stored, dtype in [
                ("float64", "float32"),
                ("float32", "float32"),
                ("float32", "bfloat16"),
                ("float16", "float32"),
                ("float16", "bfloat16"),
                ("bfloat16", "bfloat16"),
            ]
        ),
    ],
)
def test_numbers_are_rounded_once_on_the_host_and_on_the_devices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, dtype: str
) -> None:
    spec = dataclasses.replace(LLAMA, num_layers=2)
    params = randomised(spec)
    write(tmp_path, params, spec, jnp.dtype(stored))
    expected = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(jnp.dtype(stored)).astype(jnp.dtype(dtype)), params
    )
    assert_equal_trees(read(tmp_path, spec, dtype=dtype), expected)
    monkeypatch.setattr(load, "SMALL_BYTES", 0)
    assert_equal_trees(read(tmp_path, spec, dtype=dtype), expected)


@pytest.mark.parametrize("small", [True, False])
def test_unsharded_parameters_are_tied_to_no_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    if not small:
        monkeypatch.setattr(load, "SMALL_BYTES", 0)
    loaded = read(write(tmp_path, randomised(LLAMA), LLAMA), LLAMA)
    assert not any(leaf.committed for leaf in jax.tree.leaves(loaded))


@pytest.mark.usefixtures("no_leaf_is_small")
def test_a_host_reads_what_its_devices_hold_and_that_once(
    tmp_path: Path, devices: list[jax.Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = LLAMA
    shardings = shardings_over(devices, spec)
    write(tmp_path, randomised(spec), spec)
    sizes: list[int] = []
    whole = StoredFile.read_into

    def noted(self: StoredFile, offset: int, memory: memoryview) -> None:
        sizes.append(len(memory))
        whole(self, offset, memory)

    monkeypatch.setattr(StoredFile, "read_into", noted)
    monkeypatch.setattr("ddk_jax.models.tensors._LOCAL_GAP", 0)

    def bytes_read() -> int:
        sizes.clear()
        read(tmp_path, spec, shardings=shardings)
        return sum(sizes[1:])  # behind the header

    leaves = jax.tree.leaves(Decoder(spec=spec).abstract())
    assert bytes_read() == 4 * sum(math.prod(leaf.shape) for leaf in leaves)

    # A host with the first of the eight devices, which has a part of every parameter.
    def first_alone(shape: Any, sharding: Any, values: Any) -> jax.Array:
        mine = sharding.devices_indices_map(shape)[devices[0]]
        piece = values(mine)
        assert piece.shape == sharding.shard_shape(shape)
        return jax.device_put(np.zeros(shape, piece.dtype), sharding)

    monkeypatch.setattr(jax, "make_array_from_callback", first_alone)
    shards = jax.tree.map(
        lambda leaf, s: s.shard_shape(leaf.shape), Decoder(spec=spec).abstract(), shardings
    )
    owned = [math.prod(s) for s in jax.tree.leaves(shards, is_leaf=lambda s: isinstance(s, tuple))]
    assert bytes_read() == 4 * sum(owned)


@pytest.mark.usefixtures("no_leaf_is_small")
def test_parameters_of_equal_shape_share_a_program(
    tmp_path: Path, devices: list[jax.Device]
) -> None:
    write(tmp_path, randomised(LLAMA), LLAMA)
    shardings = shardings_over(devices, LLAMA)
    gate = shardings["layers"]["0"]["mlp"]["gate"]
    assert gate == shardings["layers"]["0"]["mlp"]["up"]
    load._insert.cache_clear()
    read(tmp_path, LLAMA, shardings=shardings)
    assert load._insert(gate)._cache_size() == 1
    read(tmp_path, LLAMA, shardings=shardings)
    assert load._insert(gate)._cache_size() == 1


def test_progress_ends_at_all_the_bytes(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    write(tmp_path, randomised(LLAMA), LLAMA)
    read(tmp_path, LLAMA, progress=lambda *said: told.append(said))
    total = 4 * sum(leaf.size for leaf in jax.tree.leaves(Decoder(spec=LLAMA).abstract()))
    assert {said[0] for said in told} == {"reading"} and {said[2] for said in told} == {total}
    done = [said[1] for said in told]
    assert done == sorted(done) and done[-1] == total


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool, stored: str, bad: float
) -> None:
    params = randomised(LLAMA)
    params["layers"]["0"]["mlp"]["up"] = params["layers"]["0"]["mlp"]["up"].at[3, 7, 9].set(bad)
    write(tmp_path, params, LLAMA, jnp.dtype(stored))
    if not small:
        monkeypatch.setattr(load, "SMALL_BYTES", 0)
    with pytest.raises(StorageError, match=r"the model: model.layers.3.mlp.up_proj.weight holds"):
        read(tmp_path, LLAMA)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_all_other_numbers_are_numbers(dtype: str) -> None:
    info = jnp.finfo(dtype)
    values = np.array([info.max, info.min, info.tiny, -info.tiny / 2, 0, -0.0], jnp.dtype(dtype))
    assert load._all_finite(values)
    assert not load._all_finite(np.append(values, values.dtype.type(np.nan)))
    assert load._all_finite(values[:0].reshape(0, 3))


def test_parameters_of_another_model_are_not_written(tmp_path: Path) -> None:
    deeper = dataclasses.replace(LLAMA, num_layers=6)
    with pytest.raises(UserError, match="do not have the shape of the model"):
        write(tmp_path, randomised(LLAMA), deeper)
    with pytest.raises(UserError, match="int8: weights are written as"):
        write(tmp_path, randomised(LLAMA), LLAMA, np.int8)


@pytest.mark.slow
@pytest.mark.parametrize(("stored", "dtype"), [("BF16", "float32"), ("F32", "bfloat16")])
def test_loading_needs_the_memory_of_the_parameters_and_of_one_tensor(
    tmp_path: Path, stored: str, dtype: str
) -> None:
    spec = dataclasses.replace(
        LLAMA,
        vocab_size=16_000,
        hidden_size=768,
        num_layers=24,
        num_heads=12,
        num_kv_heads=12,
        head_dim=64,
        ffn_size=2304,
        tied_head=True,
    )
    abstract = Decoder(spec=spec).abstract()
    shapes = {
        place.name: stored_shape(place, layer_shape(place, abstract))
        for place in families.placements(spec)
    }
    header = header_bytes({name: (stored, shape) for name, shape in shapes.items()})
    numbers = sum(map(math.prod, shapes.values()))
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(header)  # the zeros behind it take no room on the disk
        file.truncate(len(header) + numbers * (2 if stored == "BF16" else 4))
    (tmp_path / "config.json").write_text(json.dumps(families.config_from_spec(spec)))
    child = [sys.executable, str(Path(__file__).with_name("child_load.py")), str(tmp_path), dtype]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    output = subprocess.run(child, capture_output=True, check=True, timeout=240, env=environment)
    took = json.loads(output.stdout)
    assert took["params"] == numbers * jnp.dtype(dtype).itemsize
    largest = 4 * max(map(math.prod, shapes.values()))
    assert took["peak"] < took["params"] + 1.5 * largest + 64 * 2**20
