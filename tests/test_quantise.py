"""Teachers in 8 bits: what is stored, what it computes, and what of it exists at one time."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
import tiny
from hypothesis import given
from hypothesis import strategies as st
from quick import QUICK

from ddk_jax.losses.targets import finish
from ddk_jax.models.decoder import Decoder, segment_positions
from ddk_jax.models.quantise import Quantised, is_quantised, quantised
from ddk_jax.parallel.mesh import make_mesh
from ddk_jax.training.build import Job
from ddk_jax.training.loaded import abstract_params, load_model


def flat(tree: Any) -> dict[tuple[str, ...], Any]:
    """Leaves by path; a quantised matrix is one."""
    pairs = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: isinstance(x, Quantised))
    return {tuple(key.key for key in path): leaf for path, leaf in pairs}


@partial(jax.jit, static_argnames="names", compiler_options=QUICK)
def quickly(kernel: jax.Array, names: tuple[str, ...]) -> tuple[Quantised, jax.Array]:
    """The quantised kernel, and what it is restored to."""
    found = quantised(kernel, names)
    return found, found.restored()


@pytest.mark.parametrize(
    ("names", "inputs"),
    [
        (("embed", "heads", "head_width"), (0,)),
        (("layers", "embed", "ffn"), (1,)),
        (("layers", "heads", "head_width", "embed"), (1, 2)),
        (("ffn", "embed"), (0,)),
    ],
)
def test_every_output_has_a_scale_of_its_own(
    names: tuple[str, ...], inputs: tuple[int, ...]
) -> None:
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(3, 5, 4, 2)[: len(names)]).astype(np.float32)
    found, restored = quickly(jnp.asarray(kernel), names)
    largest = np.abs(kernel.astype(np.float64)).max(axis=inputs, keepdims=True)
    assert found.values.dtype == jnp.int8
    np.testing.assert_allclose(found.scale, largest / 127, rtol=1e-6)
    np.testing.assert_array_equal(np.abs(found.values).max(axis=inputs), 127)
    assert np.all(np.abs(restored - kernel) <= (0.5 + 1e-5) * largest / 127)


@given(st.floats(1e-30, 1e30), st.integers(0, 2**32 - 1))
def test_the_scale_of_a_matrix_makes_no_difference(factor: float, seed: int) -> None:
    kernel = np.random.default_rng(seed).normal(size=(4, 3)).astype(np.float32)
    plain, scaled = (
        np.asarray(quickly(jnp.asarray(x, jnp.float32), ("embed", "ffn"))[0].values, int)
        for x in (kernel, kernel * factor)
    )
    assert np.abs(plain - scaled).max() <= 1


def test_outputs_without_weights_stay_0() -> None:
    np.testing.assert_array_equal(quickly(jnp.zeros((4, 3)), ("embed", "ffn"))[1], 0)


def shapes_of(decoder: Decoder, mesh: Any) -> Any:
    return abstract_params(decoder, mesh, jnp.dtype(jnp.int8))


def alike(x: Any, y: Any) -> bool:
    return (x.shape, x.dtype) == (y.shape, y.dtype) and x.sharding.is_equivalent_to(
        y.sharding, x.ndim
    )


def logits(decoder: Decoder, params: Any, tokens: np.ndarray) -> np.ndarray:
    ids, segments = jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, jnp.int32)

    @partial(jax.jit, compiler_options=QUICK)
    def run(params: Any) -> Any:
        hidden, _ = decoder.apply(params, ids, segments, segment_positions(segments))
        head = decoder.head(params)
        return finish((hidden @ head.kernel).reshape(-1, head.kernel.shape[1]), head, 0)

    return np.asarray(run(params))


@pytest.mark.slow
def test_a_quantised_model_computes_with_its_rounded_weights(exported: Path) -> None:
    """Loaded as integers and scales, as was announced; all else is as it was."""
    mesh, float32 = make_mesh(1, 2, 1, devices=jax.devices()[:2]), jnp.dtype(jnp.float32)
    plain, small = (
        load_model(str(exported), mesh, dtype=float32, params_dtype=jnp.dtype(held))
        for held in (jnp.float32, jnp.int8)
    )
    assert all(jax.tree.leaves(jax.tree.map(alike, small.params, shapes_of(small.decoder, mesh))))
    before, after = flat(plain.params), flat(small.params)
    assert before.keys() == after.keys()
    restored = {}
    for path, leaf in after.items():
        assert isinstance(leaf, Quantised) == is_quantised(path)
        restored[path] = leaf.restored() if isinstance(leaf, Quantised) else leaf
        if not isinstance(leaf, Quantised):
            np.testing.assert_array_equal(leaf, before[path])
    assert sum(map(is_quantised, after)) >= 7
    whole = jax.tree.unflatten(jax.tree.structure(plain.params), list(restored.values()))
    tokens = np.arange(12).reshape(2, 6)
    found = logits(small.decoder, small.params, tokens)
    np.testing.assert_allclose(found, logits(small.decoder, whole, tokens), rtol=1e-5, atol=1e-5)
    exact = logits(plain.decoder, plain.params, tokens)
    assert 0 < np.abs(found - exact).mean() < 0.02 * np.abs(exact).mean()


def test_a_config_asks_for_it(tiny_root: Path, tmp_path: Path) -> None:
    job = Job(tiny.config(tiny_root, tmp_path, **{"teacher.dtype": "int8"}))
    (params,) = job.teachers.params
    assert isinstance(params["layers"]["0"]["attn"]["q"], Quantised)
    assert params["embed"]["table"].dtype == jnp.float32


def test_floats_exist_for_one_layer_at_a_time() -> None:
    """The temporaries of a forward pass do not grow with the depth."""

    def temporaries(num_layers: int) -> int:
        spec = replace(small_model.SPEC, pattern=("global",), window=0, num_layers=num_layers)
        decoder = Decoder(spec=replace(spec, hidden_size=256, head_dim=32, ffn_size=512))
        params = shapes_of(decoder, make_mesh(devices=jax.devices()[:1]))
        ids = jax.ShapeDtypeStruct((1, 4), jnp.int32)
        lowered = jax.jit(partial(decoder.apply)).lower(params, ids, ids, ids)
        compiled: Any = lowered.compile(compiler_options=QUICK)
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(16) < 1.1 * temporaries(2)
