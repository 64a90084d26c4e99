"""Every switch of ModelSpec against the float64 reference, alone and as families combine them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import (
    SPEC,
    documents,
    layers_of,
    logits_of,
    numpy_states,
    randomised,
    reference,
    run,
)
from quick import QUICK

from ddk_jax.models.decoder import Decoder, num_parameters, segment_positions
from ddk_jax.models.spec import ModelSpec, RopeScaling
from ddk_jax.models.tree import leaves
from ddk_jax.parallel import mesh

GEMMA: dict[str, Any] = {
    "norm_plus_one": True,
    "norm_placement": "both",
    "activation": "gelu_tanh",
    "scaled_embedding": True,
    "pattern": ("local", "global"),
    "window": 5,
    "local_rope_theta": 50.0,
    "rope_scaling": RopeScaling(kind="linear", factor=3.0),
    "attention_scale": 0.2,
    "attention_softcap": 5.0,
    "logit_softcap": 4.0,
}
NEOX: dict[str, Any] = {
    "norm": "layer",
    "parallel_residual": True,
    "rope_fraction": 0.25,
    "gated_mlp": False,
    "activation": "gelu",
    "qkv_bias": True,
    "out_bias": True,
    "mlp_bias": True,
    "tied_head": False,
    "num_kv_heads": 4,
}
GPT2: dict[str, Any] = NEOX | {
    "positions": "learned",
    "max_positions": 32,
    "parallel_residual": False,
    "activation": "gelu_tanh",
    "tied_head": True,
    "num_kv_heads": 1,
}
LONGROPE = RopeScaling(
    kind="longrope",
    original_positions=20,
    short_factor=(1.0, 1.1, 1.5, 2.0),
    long_factor=(1.2, 2.0, 3.0, 5.0),
)
VARIANTS: dict[str, dict[str, Any]] = {
    "gemma": GEMMA,
    "neox": NEOX,
    "gpt2": GPT2,
    "olmo2": {"norm_placement": "post", "qk_norm": "all"},
    "qwen3": {"qk_norm": "head", "attention_scale": 0.1},
    "gemma3": {"qk_norm": "head", "norm_plus_one": True, "pattern": ("local",) * 2 + ("global",)}
    | {"window": 3, "num_kv_heads": 1},
    "qwen2": {"qkv_bias": True, "pattern": ("local",), "window": 6},
    "starcoder2": {"norm": "layer", "gated_mlp": False, "mlp_bias": True, "out_bias": True},
    "gated_biases": {"mlp_bias": True, "activation": "relu", "logit_softcap": 3.0},
    "half_parallel": {"parallel_residual": True, "rope_fraction": 0.5, "norm_placement": "both"},
    "llama3": {
        "rope_scaling": RopeScaling(kind="llama3", factor=8.0, original_positions=40),
        "activation": "gelu",
    },
    "yarn": {
        "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_positions=200),
        "attention_softcap": 2.0,
    },
    "longrope": {"rope_scaling": LONGROPE, "rope_fraction": 0.5, "max_positions": 80},
}
# Three documents and padding.
SEGMENTS = np.repeat(np.int32([1, 2, 3, 0]), [7, 12, 5, 4])


def spec_of(variant: str) -> ModelSpec:
    return dataclasses.replace(SPEC, **VARIANTS[variant])


def packed(seed: int = 1) -> np.ndarray:
    return np.concatenate(documents(7, 12, 5, 4, seed=seed))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_equal_the_reference_of_each(variant: str) -> None:
    spec = spec_of(variant)
    decoder = Decoder(spec=spec)
    params = randomised(decoder)
    programs = run._cache_size()
    row, ids = jnp.asarray(packed())[None], jnp.asarray(SEGMENTS)[None]
    logits, found = run(decoder, params, row, ids)
    start = 0
    for length in (7, 12, 5):
        part = slice(start, start + length)
        exact = numpy_states(params, spec, packed()[part], row=len(SEGMENTS))
        pairs: list[tuple[Any, Any]] = [(logits[0, part], exact.logits)]
        pairs += zip(found.hidden[:, 0, part], exact.hidden, strict=True)
        for ours, theirs in zip(found[1:], zip(*exact.qkv, strict=True), strict=True):
            pairs += zip(ours[:, 0, part], theirs, strict=True)
        for ours, theirs in pairs:
            assert np.abs(ours - theirs).max() < 2e-5 * np.abs(theirs).max()
        start += length
    # Other tokens and other documents need no other program.
    run(decoder, params, row + 0, jnp.flip(ids, axis=1))
    assert run._cache_size() == programs + 1


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_parameter_has_axes(variant: str) -> None:
    decoder = Decoder(spec=spec_of(variant))
    abstract, axes = decoder.abstract(), decoder.logical_axes()
    ranks = jax.tree.map(len, axes, is_leaf=lambda names: isinstance(names, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, abstract)
    assert set(jax.tree.leaves(axes)) <= mesh.RULES.keys()
    sizes = [np.prod(leaf.shape, dtype=int) for leaf in jax.tree.leaves(abstract)]
    assert num_parameters(decoder.spec) == sum(sizes)


@pytest.mark.parametrize("variant", ["gemma", "gpt2"])
def test_initial_biases_are_0_and_norms_do_not_scale(variant: str) -> None:
    spec = spec_of(variant)
    for path, leaf in jax.tree_util.tree_leaves_with_path(leaves(spec)):
        if path[-1].key == "scale":
            assert (leaf.mean, leaf.stddev) == (0.0 if spec.norm_plus_one else 1.0, 0.0)
        elif path[-1].key.endswith("bias"):
            assert leaf.mean == leaf.stddev == 0
        else:
            inward = path[-1].key not in ("o", "down")
            spread = 0.02 if inward else 0.02 / np.sqrt(2 * spec.num_layers)
            assert leaf.mean == 0 and leaf.stddev == pytest.approx(spread)


def test_one_key_value_head_is_whole_on_every_device(devices: list[jax.Device]) -> None:
    decoder = Decoder(spec=spec_of("gpt2"))
    on_mesh = mesh.make_mesh(1, 2, 4, devices=devices)
    found = mesh.param_shardings(on_mesh, decoder.logical_axes(), decoder.abstract())
    attention = found["layers"]["0"]["attn"]
    assert tuple(attention["k"].spec) == (None, "fsdp", None, None)
    assert tuple(attention["k_bias"].spec) == (None, None, None)
    assert tuple(attention["q"].spec) == (None, "fsdp", "tensor", None)
    assert tuple(attention["q_bias"].spec) == (None, "tensor", None)


def test_a_window_hides_what_is_further_back() -> None:
    spec = dataclasses.replace(SPEC, num_layers=2, pattern=("local",), window=3)
    decoder = Decoder(spec=spec)
    params = randomised(decoder)
    (tokens,) = documents(12)
    changed = tokens.copy()
    changed[2] = (changed[2] + 1) % spec.vocab_size
    before, after = (logits_of(decoder, params, row[None])[0] for row in (tokens, changed))
    differ = np.abs(before - after).max(axis=-1) > 0
    # Two layers hand it on by two tokens each.
    np.testing.assert_array_equal(differ, [2 <= t <= 6 for t in range(12)])


@pytest.mark.parametrize(("length", "long"), [(20, False), (21, True)])
def test_longrope_follows_the_length_of_the_row(length: int, long: bool) -> None:
    spec = spec_of("longrope")
    decoder = Decoder(spec=spec)
    params = randomised(decoder)
    (tokens,) = documents(length)
    ours = logits_of(decoder, params, tokens[None])[0]
    exact, other = (
        numpy_states(params, spec, tokens, row=row).logits for row in (length, 0 if long else 21)
    )
    if long:
        other = numpy_states(params, spec, tokens, row=1).logits
    scale = np.abs(exact).max()
    assert np.abs(ours - exact).max() < 2e-5 * scale < 1e-2 * scale < np.abs(ours - other).max()


def test_rows_beyond_the_learned_positions_are_refused() -> None:
    decoder = Decoder(spec=spec_of("gpt2"))
    ids = jnp.ones((1, 33), jnp.int32)
    with pytest.raises(ValueError, match="rows of 33 tokens for a model with 32 learned"):
        jax.eval_shape(decoder.apply, decoder.abstract(), ids, ids, ids)


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["none", "full"])
def test_gradients_of_capped_scores_and_logits_equal_the_reference(remat: Any) -> None:
    spec = dataclasses.replace(spec_of("gemma"), num_heads=2, num_kv_heads=1)
    decoder = Decoder(spec=spec, remat=remat)
    params = randomised(decoder)
    (tokens,) = documents(9)
    ids = jnp.asarray(tokens)[None]

    def loss(params: Any) -> jax.Array:
        ones = jnp.ones_like(ids)
        hidden, _ = decoder.apply(params, ids, ones, segment_positions(ones))
        head = decoder.head(params)
        assert head.softcap is not None
        return jnp.sum(jnp.square(head.softcap * jnp.tanh(hidden @ head.kernel / head.softcap)))

    def reference_loss(params: Any) -> jax.Array:
        found = reference(layers_of(params, spec), params, spec, ids[0], jnp)
        return jnp.sum(jnp.square(found.logits))

    ours = jax.jit(jax.grad(loss), compiler_options=QUICK)(params)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        theirs = jax.jit(jax.grad(reference_loss), compiler_options=QUICK)(params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4 * np.abs(b).max()), ours, theirs
    )


@pytest.mark.parametrize("variant", ["gemma", pytest.param("neox", marks=pytest.mark.slow)])
def test_bfloat16_computes_near_float32(variant: str) -> None:
    decoder = Decoder(spec=spec_of(variant))
    params, tokens = randomised(decoder), packed()[None]  # a program that others have compiled
    exact = logits_of(decoder, params, tokens)
    rough = logits_of(dataclasses.replace(decoder, dtype=jnp.bfloat16), params, tokens)
    assert np.abs(rough - exact).mean() < 0.05 * np.abs(exact).mean()
