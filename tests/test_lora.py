from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK

from ddk_jax.models.decoder import Decoder, Params, segment_positions
from ddk_jax.models.lora import LoRA, LowRank
from ddk_jax.models.spec import ModelSpec

# Three layers in a pattern of two: a stacked one of each kind, and one in the tail.
SPEC = ModelSpec(
    vocab_size=32,
    hidden_size=16,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    ffn_size=24,
    pattern=("local", "global"),
    window=4,
)
DECODER = Decoder(spec=SPEC)
LORA = LoRA(rank=3, alpha=6.0)


@pytest.fixture(scope="module")
def base() -> Params:
    return DECODER.init(jax.random.key(0))


@pytest.fixture(scope="module")
def adapters(base: Params) -> Params:
    """Adapters that change something."""
    made = LORA.init(jax.random.key(1), base, DECODER.logical_axes())
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), made)


def states(params: Params) -> jax.Array:
    tokens = jnp.asarray(np.random.default_rng(2).integers(0, 32, (2, 8)), jnp.int32)
    segments = jnp.ones_like(tokens)
    return DECODER.apply(params, tokens, segments, segment_positions(segments))[0]


hidden = jax.jit(states, compiler_options=QUICK)


def leaves(tree: Params) -> dict[str, Any]:
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in flat}


@pytest.mark.slow
def test_new_adapters_change_nothing(base: Params) -> None:
    made = LORA.init(jax.random.key(1), base, DECODER.logical_axes())
    np.testing.assert_array_equal(hidden(LORA.adapted(base, made)), hidden(base))
    # A layer's matrix of 16 inputs has a variance of 1 / 16.
    assert np.std(made["layers"]["0"]["attn"]["q"]["a"]) == pytest.approx(0.25, rel=0.25)


def test_adapted_and_merged_parameters_compute_the_same(base: Params, adapters: Params) -> None:
    merged = LORA.merged(base, adapters)
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    assert float(jnp.max(jnp.abs(hidden(merged) - hidden(base)))) > 0.1
    np.testing.assert_allclose(
        hidden(LORA.adapted(base, adapters)), hidden(merged), rtol=0, atol=1e-5
    )


def test_merging_adds_the_scaled_product(base: Params, adapters: Params) -> None:
    merged, before, given = leaves(LORA.merged(base, adapters)), leaves(base), leaves(adapters)
    for name, kernel in before.items():
        expected = np.asarray(kernel, np.float64)
        if name + ".a" in given:
            a, b = (np.asarray(given[f"{name}.{part}"], np.float64) for part in "ab")
            if name.startswith("layers"):
                expected = expected + 2.0 * np.stack(
                    [np.tensordot(x, y, axes=1) for x, y in zip(a, b, strict=True)]
                )
            else:
                expected = expected + 2.0 * np.tensordot(a, b, axes=1)
        np.testing.assert_allclose(merged[name], expected, rtol=1e-5, atol=1e-6)


def test_every_matrix_of_a_layer_has_an_adapter_and_nothing_else_has(
    base: Params, adapters: Params
) -> None:
    kernels = {name.rpartition(".")[0] for name in leaves(adapters)}
    assert kernels == {name for name in leaves(base) if ".attn." in name or ".mlp." in name}


@pytest.mark.parametrize("targets", [("q", "v"), ("down",)])
def test_targets_are_chosen_by_name(base: Params, targets: tuple[str, ...]) -> None:
    chosen = LoRA(rank=2, alpha=2.0, targets=targets)
    made = chosen.init(jax.random.key(0), base, DECODER.logical_axes())
    assert {name.split(".")[-2] for name in leaves(made)} == set(targets)


def test_axes_name_every_axis_of_every_adapter(adapters: Params) -> None:
    axes = LORA.logical_axes(DECODER.abstract(), DECODER.logical_axes())
    assert axes["layers"]["1"]["attn"]["o"] == {
        "a": ("layers", "heads", "head_width", "rank"),
        "b": ("layers", "rank", "embed"),
    }
    assert axes["tail"]["0"]["mlp"]["up"] == {"a": ("embed", "rank"), "b": ("rank", "ffn")}
    ranks = jax.tree.map(len, axes, is_leaf=lambda node: isinstance(node, tuple))
    assert ranks == jax.tree.map(jnp.ndim, adapters)


@pytest.mark.slow
def test_gradients_are_those_of_the_merged_model(base: Params, adapters: Params) -> None:
    """By the chain rule: da = scale * dW b^T, db = scale * a^T dW."""

    def loss(params: Params) -> jax.Array:
        return jnp.sum(jnp.sin(states(params)))

    ours = jax.jit(jax.grad(lambda given: loss(LORA.adapted(base, given))), compiler_options=QUICK)
    whole = jax.jit(jax.grad(loss), compiler_options=QUICK)(LORA.merged(base, adapters))
    found = ours(adapters)
    dW = np.asarray(whole["tail"]["0"]["attn"]["o"], np.float64)
    a, b = (np.asarray(adapters["tail"]["0"]["attn"]["o"][part], np.float64) for part in "ab")
    for part, expected in {
        "a": 2.0 * np.einsum("hde,re->hdr", dW, b),
        "b": 2.0 * np.einsum("hdr,hde->re", a, dW),
    }.items():
        np.testing.assert_allclose(
            found["tail"]["0"]["attn"]["o"][part], expected, rtol=1e-3, atol=1e-4
        )


def test_a_kernel_in_bfloat16_is_widened_before_the_adapter_is_added() -> None:
    kernel = jnp.full((2, 2), 256, jnp.bfloat16)
    one = jnp.full((2, 1), 1, jnp.float32)
    low_rank = LowRank(kernel, one, one.T, 1.0)
    # 257 is no bfloat16 number.
    assert low_rank.added().dtype == jnp.float32 and float(low_rank.added()[0, 0]) == 257.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "must be positive"),
        ({"alpha": 0.0}, "must be positive"),
        ({"alpha": float("inf")}, "must be positive"),
        ({"targets": ("q", "query")}, "needs names out of q, k"),
        ({"targets": ()}, "needs names out of"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LoRA(**{"rank": 2, "alpha": 2.0} | changes)
