from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder, Params, segment_positions
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel import mesh

QUICK = {"xla_backend_optimization_level": 0}
"""Compiler options for programs that take longer to compile than to run."""
SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=48,
    rope_theta=300.0,
)


def randomised(decoder: Decoder, seed: int = 0) -> Params:
    """Parameters large enough that attention is far from uniform and norms matter."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        mean, scale = (1.0, 0.3) if "norm" in jax.tree_util.keystr(path) else (0.0, 0.25)
        return jnp.asarray(rng.normal(mean, scale, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.abstract())


def documents(*lengths: int, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SPEC.vocab_size, length, dtype=np.int32) for length in lengths]


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def run(
    decoder: Decoder, params: Params, tokens: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Logits, and the input of every layer with the final hidden states behind."""
    positions = segment_positions(segment_ids)
    hidden, inputs = decoder.apply(params, tokens, segment_ids, positions, collect=True)
    return hidden @ decoder.head(params), jnp.concatenate([inputs, hidden[None]])


def logits_of(
    decoder: Decoder, params: Params, tokens: np.ndarray, segment_ids: np.ndarray | None = None
) -> np.ndarray:
    segments = np.ones_like(tokens) if segment_ids is None else segment_ids
    return np.asarray(run(decoder, params, jnp.asarray(tokens), jnp.asarray(segments))[0])


def numpy_logits(params: Params, spec: ModelSpec, tokens: np.ndarray) -> np.ndarray:
    """The forward pass of one document in float64, head by head, rotations as complex numbers."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    half = spec.head_width // 2
    turns = np.exp(
        1j * np.arange(len(tokens))[:, None] * spec.rope_theta ** (-np.arange(half) / half)[None]
    )

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + spec.norm_eps) * scale

    def turned(x: np.ndarray) -> np.ndarray:
        z = (x[:, :half] + 1j * x[:, half:]) * turns
        return np.concatenate([z.real, z.imag], -1)

    x = p["embed"]["table"][tokens]
    for i in range(spec.num_layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], p["layers"]["0"])
        y, attention = norm(x, layer["attn_norm"]["scale"]), layer["attn"]
        for h in range(spec.num_heads):
            group = h // (spec.num_heads // spec.num_kv_heads)
            q, k = turned(y @ attention["q"][:, h]), turned(y @ attention["k"][:, group])
            scores = np.where(
                np.tri(len(tokens), dtype=bool), q @ k.T / math.sqrt(spec.head_width), -np.inf
            )
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            x = x + weights @ (y @ attention["v"][:, group]) @ attention["o"][h]
        y = norm(x, layer["mlp_norm"]["scale"])
        gate = y @ layer["mlp"]["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (y @ layer["mlp"]["up"])) @ layer["mlp"]["down"]
    head = p["embed"]["table"].T if spec.tied_head else p["head"]["kernel"]
    return norm(x, p["norm"]["scale"]) @ head


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_a_float64_reference(tied: bool) -> None:
    spec = dataclasses.replace(SPEC, tied_head=tied, norm_eps=1e-2)
    decoder = Decoder(spec=spec)
    params = randomised(decoder)
    (tokens,) = documents(20)
    ours, reference = (
        logits_of(decoder, params, tokens[None])[0],
        numpy_logits(params, spec, tokens),
    )
    assert np.abs(ours - reference).max() < 1e-5 * np.abs(reference).max()


@pytest.mark.torch
@pytest.mark.parametrize("variant", ["tied", "untied", "wide_heads", "one_kv_head"])
def test_logits_and_every_layer_equal_transformers(tmp_path: Path, variant: str) -> None:
    pytest.importorskip("torch")
    import torch_llama

    model = torch_llama.random_llama(tmp_path, **torch_llama.VARIANTS[variant])
    spec = hf.read_spec(tmp_path)
    decoder, params = Decoder(spec=spec), hf.load(tmp_path, spec=spec)
    tokens = np.stack(documents(40, 40))
    reference, layers = torch_llama.forward(model, tokens)

    ours, inputs = run(decoder, params, jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32))
    assert np.abs(np.asarray(ours) - reference).max() < 1e-4 * np.abs(reference).max()
    assert inputs.shape == layers.shape
    for i, (one, other) in enumerate(zip(np.asarray(inputs), layers, strict=True)):
        assert np.abs(one - other).max() < 1e-4 * np.abs(other).max(), i


def test_packed_documents_equal_separate_ones_and_padding_has_no_influence() -> None:
    decoder = Decoder(spec=SPEC)
    params = randomised(decoder)
    first, second, third = documents(7, 12, 5)
    ids = np.repeat(np.int32([1, 2, 3, 0]), [7, 12, 5, 6])[None]
    rows = [
        np.concatenate([first, second, third, np.full(6, garbage, np.int32)])[None]
        for garbage in (0, 63)
    ]
    packed, other_garbage = (logits_of(decoder, params, row, ids)[0] for row in rows)
    np.testing.assert_array_equal(packed[:24], other_garbage[:24])
    start = 0
    for document in (first, second, third):
        alone = numpy_logits(params, SPEC, document)
        got = packed[start : start + len(document)]
        assert np.abs(got - alone).max() < 1e-5 * np.abs(alone).max()
        start += len(document)


def test_no_token_sees_the_ones_behind_it() -> None:
    decoder = Decoder(spec=SPEC)
    params = randomised(decoder)
    (tokens,) = documents(16)
    changed = tokens.copy()
    changed[10:] = (changed[10:] + 1) % SPEC.vocab_size
    before, after = (logits_of(decoder, params, row[None])[0] for row in (tokens, changed))
    np.testing.assert_array_equal(before[:10], after[:10])
    assert np.abs(before[10:] - after[10:]).min(axis=-1).max() > 0


def test_positions_restart_with_every_segment() -> None:
    segments = jnp.asarray([[1, 1, 1, 2, 2, 3, 0, 0], [4, 0, 0, 0, 0, 0, 0, 0]])
    expected = [[0, 1, 2, 0, 1, 0, 0, 1], [0, 0, 1, 2, 3, 4, 5, 6]]
    np.testing.assert_array_equal(segment_positions(segments), expected)


@pytest.mark.parametrize("num_layers", [1, 3])
def test_layers_in_periods_and_in_the_tail_are_the_same_model(num_layers: int) -> None:
    one = Decoder(spec=dataclasses.replace(SPEC, num_layers=num_layers))
    two = Decoder(spec=dataclasses.replace(one.spec, pattern=("global", "global")))
    params = randomised(one)
    layers = params["layers"]["0"]
    regrouped = {name: part for name, part in params.items() if name != "layers"}
    whole = num_layers // 2 * 2
    regrouped["layers"] = {
        str(i): jax.tree.map(lambda leaf, i=i: leaf[i:whole:2], layers) for i in range(2) if whole
    }
    if num_layers % 2:
        regrouped["tail"] = {"0": jax.tree.map(lambda leaf: leaf[-1], layers)}
    shapes = jax.tree.map(jnp.shape, regrouped)
    assert shapes == jax.tree.map(jnp.shape, two.abstract())

    tokens = jnp.asarray(np.stack(documents(12, 12)))
    segments = jnp.ones_like(tokens)
    for ours, theirs in zip(
        run(one, params, tokens, segments), run(two, regrouped, tokens, segments), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_every_remat_mode_gives_the_same_gradients() -> None:
    spec = dataclasses.replace(SPEC, num_layers=2)
    params = randomised(Decoder(spec=spec))
    tokens = jnp.asarray(np.stack(documents(12)))
    segments = jnp.ones_like(tokens)

    def gradients(remat: Any) -> Params:
        decoder = Decoder(spec=spec, remat=remat)

        def loss(params: Params) -> jax.Array:
            hidden, _ = decoder.apply(params, tokens, segments, segment_positions(segments))
            return jnp.sum(jnp.square(hidden @ decoder.head(params)))

        return jax.jit(jax.grad(loss), compiler_options=QUICK)(params)

    expected = gradients("none")
    for remat in ("full", "dots"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()),
            gradients(remat),
            expected,
        )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", [("global",), ("global", "global")])
def test_number_of_parameters_and_axes_match_the_tree(tied: bool, pattern: tuple[str, ...]) -> None:
    spec = dataclasses.replace(SPEC, tied_head=tied, pattern=pattern)
    abstract, axes = Decoder(spec=spec).abstract(), Decoder(spec=spec).logical_axes()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == spec.num_parameters
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    ranks = jax.tree.map(len, axes, is_leaf=lambda names: isinstance(names, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, abstract)
    assert set(jax.tree.leaves(axes)) <= mesh.RULES.keys()


def test_initial_values_follow_the_key_and_give_near_uniform_predictions() -> None:
    decoder = Decoder(spec=SPEC)
    init = jax.jit(decoder.init, compiler_options=QUICK)
    one, same, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, one, same)
    assert not np.array_equal(one["embed"]["table"], other["embed"]["table"])
    q = one["layers"]["0"]["attn"]["q"]
    assert not np.array_equal(q[0], q[1])
    logits = logits_of(decoder, one, np.stack(documents(16)))
    assert np.abs(logits).max() < 1


def test_bfloat16_computes_near_float32() -> None:
    decoder, rough_decoder = Decoder(spec=SPEC), Decoder(spec=SPEC, dtype=jnp.bfloat16)
    params = randomised(decoder)
    tokens = np.stack(documents(24))
    exact, rough = logits_of(decoder, params, tokens), logits_of(rough_decoder, params, tokens)
    assert rough.dtype == jnp.bfloat16
    assert np.abs(rough.astype(np.float32) - exact).max() < 0.1 * np.abs(exact).max()
