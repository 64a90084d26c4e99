from __future__ import annotations

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

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
    regrouped,
    run,
)
from jax.sharding import NamedSharding, PartitionSpec
from quick import QUICK

from ddk_jax.models import hf
from ddk_jax.models.collect import NOTHING, Collect, Collected
from ddk_jax.models.decoder import Decoder, Params, num_parameters, segment_positions
from ddk_jax.parallel import mesh


@pytest.mark.parametrize("tied", [True, False])
def test_logits_equal_a_float64_reference(tied: bool) -> None:
    spec = dataclasses.replace(SPEC, tied_head=tied, norm_eps=1e-2)
    decoder = Decoder(spec=spec)
    params = randomised(decoder)
    (tokens,) = documents(20)
    ours = logits_of(decoder, params, tokens[None])[0]
    expected = numpy_states(params, spec, tokens).logits
    assert np.abs(ours - expected).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.torch
@pytest.mark.parametrize("variant", ["llama", "llama_tied", "llama_biases"])
def test_logits_layers_and_projections_equal_transformers(tmp_path: Path, variant: str) -> None:
    torch_models = pytest.importorskip("torch_models")
    model = torch_models.random_model(tmp_path, torch_models.VARIANTS[variant])
    spec = hf.read_spec(tmp_path)
    decoder, params = Decoder(spec=spec), hf.load(tmp_path, spec=spec)
    tokens = np.stack(documents(40, 40))
    projected: dict[str, np.ndarray] = {}
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            module.register_forward_hook(
                lambda module, inputs, out, name=name: projected.update({name: out.numpy()})
            )
    expected, layers = torch_models.forward(model, tokens)

    ours, found = run(decoder, params, jnp.asarray(tokens), jnp.ones(tokens.shape, jnp.int32))
    assert np.abs(np.asarray(ours) - expected).max() < 1e-4 * np.abs(expected).max()
    assert found.hidden.shape == layers.shape
    for i, (one, other) in enumerate(zip(np.asarray(found.hidden), layers, strict=True)):
        assert np.abs(one - other).max() < 1e-4 * np.abs(other).max(), i
    for name, collected in zip("qkv", found[1:], strict=True):
        for i, one in enumerate(np.asarray(collected)):
            other = projected[f"model.layers.{i}.self_attn.{name}_proj"].reshape(one.shape)
            assert np.abs(one - other).max() < 1e-4 * np.abs(other).max(), (name, i)


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
        alone = numpy_states(params, SPEC, document).logits
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_layers", "pattern"),
    [(1, ("global",) * 2), (3, ("global",) * 2), (5, ("local", "global")), (7, ("local",) * 6)],
)
def test_layers_in_periods_and_in_the_tail_are_the_same_model(
    num_layers: int, pattern: tuple[str, ...]
) -> None:
    tail = (pattern * num_layers)[: num_layers + 1]
    specs = [
        dataclasses.replace(SPEC, num_layers=num_layers, pattern=kinds, window=4)
        for kinds in (pattern, tail)
    ]
    one, two = (Decoder(spec=spec) for spec in specs)
    params = randomised(one)
    other = regrouped(params, *specs)
    assert jax.tree.map(jnp.shape, other) == jax.tree.map(jnp.shape, two.abstract())

    tokens = jnp.asarray(np.stack(documents(12, 12)))
    segments = jnp.ones_like(tokens)
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
        run(one, params, tokens, segments),
        run(two, other, tokens, segments),
    )


# Inner states

SMALL = dataclasses.replace(SPEC, num_heads=2, num_kv_heads=1)
PATTERNS = {"scanned": 1, "periods_and_a_tail": 2, "tail_only": 4}


class Weights(NamedTuple):
    """What every number of the inner states counts in a loss; 0 where a state is not chosen."""

    hidden: np.ndarray
    qkv: tuple[np.ndarray, ...]


def weights_of(collect: Collect) -> Weights:
    rng = np.random.default_rng(7)
    T, D = 9, SMALL.head_width
    shapes = [(SMALL.hidden_size,), (SMALL.num_heads, D), *[(SMALL.num_kv_heads, D)] * 2]
    drawn = [rng.normal(size=(SMALL.num_layers + 1, T, *shape)) for shape in shapes]
    for weights, chosen in zip(drawn, (collect.hidden, *[collect.qkv] * 3), strict=True):
        weights[[i for i in range(SMALL.num_layers + 1) if i not in chosen]] = 0
    hidden, *qkv = (weights.astype(np.float32) for weights in drawn)
    return Weights(hidden, tuple(qkv))


@partial(jax.jit, compiler_options=QUICK)
def reference_gradients(
    layers: list[Params], params: Params, tokens: jax.Array, weights: Weights
) -> tuple[list[Params], Params]:
    """Of the weighted sum of the inner states and the square of the final ones."""

    def loss(layers: list[Params], params: Params) -> jax.Array:
        states = reference(layers, params, SMALL, tokens, jnp)
        hidden = jnp.sum(jnp.stack(states.hidden) * weights.hidden)
        parts = zip(weights.qkv, zip(*states.qkv, strict=True), strict=True)
        qkv = sum(jnp.sum(jnp.stack(part) * weight[:-1]) for weight, part in parts)
        return hidden + qkv + jnp.sum(jnp.square(states.hidden[-1]))

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return jax.grad(loss, argnums=(0, 1))(layers, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("pattern", "remat", "collect"),
    [
        ("scanned", "full", Collect(hidden=(0, 2, 3), qkv=(1,))),
        ("periods_and_a_tail", "dots", Collect(hidden=(1,), qkv=(0, 2))),
        ("tail_only", "none", Collect(hidden=(0, 1), qkv=(1,))),
    ],
)
def test_chosen_states_and_their_gradients_equal_a_reference(
    pattern: str, remat: Any, collect: Collect
) -> None:
    spec = dataclasses.replace(SMALL, pattern=("global",) * PATTERNS[pattern])
    decoder = Decoder(spec=spec, remat=remat)
    params = randomised(decoder)
    (tokens,) = documents(9)
    weights = weights_of(collect)

    def loss(params: Params) -> tuple[jax.Array, Collected]:
        ids = jnp.asarray(tokens)[None]
        segments = jnp.ones_like(ids)
        final, found = decoder.apply(params, ids, segments, segment_positions(segments), collect)
        total = jnp.sum(found.hidden[:, 0] * weights.hidden[np.array(collect.hidden)])
        for states, weight in zip(found[1:], weights.qkv, strict=True):
            total += jnp.sum(states[:, 0] * weight[np.array(collect.qkv)])
        return total + jnp.sum(jnp.square(final)), found

    gradients, found = jax.jit(jax.grad(loss, has_aux=True), compiler_options=QUICK)(params)
    exact = numpy_states(params, spec, tokens)
    qkv = [np.stack([exact.qkv[i][part] for i in collect.qkv]) for part in range(3)]
    expected = [np.stack([exact.hidden[i] for i in collect.hidden]), *qkv]
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[:, 0], theirs, atol=1e-5 * np.abs(theirs).max())

    outer = {name: part for name, part in params.items() if name not in ("layers", "tail")}
    layers, rest = reference_gradients(layers_of(params, spec), outer, jnp.asarray(tokens), weights)
    jax.tree.map(
        lambda ours, theirs: np.testing.assert_allclose(
            ours, theirs, atol=1e-4 * np.abs(theirs).max()
        ),
        (layers_of(gradients, spec), {name: gradients[name] for name in rest}),
        (layers, rest),
    )


def memory(num_layers: int, collect: Collect, *, backward: bool) -> int:
    """Bytes that a compiled pass needs beyond its arguments."""
    decoder = Decoder(spec=dataclasses.replace(SMALL, num_layers=num_layers), remat="full")
    ids = jax.ShapeDtypeStruct((2, 128), jnp.int32)

    def forward(params: Params, tokens: jax.Array) -> Any:
        segments = jnp.ones_like(tokens)
        return decoder.apply(params, tokens, segments, segment_positions(segments), collect)

    def loss(params: Params, tokens: jax.Array) -> jax.Array:
        final, found = forward(params, tokens)
        return jnp.sum(jnp.square(final)) + sum(jnp.sum(jnp.square(states)) for states in found)

    function = jax.grad(loss) if backward else forward
    lowered = jax.jit(function).lower(decoder.abstract(), ids)
    found = lowered.compile(compiler_options=QUICK).memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes


SOME = Collect(hidden=(0, 2), qkv=(1,))
STATE = 2 * 128 * SMALL.hidden_size * 4
"""Bytes of one hidden state in `memory`; queries, keys and values together are twice as large."""


def test_memory_grows_with_the_chosen_layers_and_not_with_the_depth() -> None:
    shallow, deep = (memory(depth, SOME, backward=False) for depth in (4, 32))
    assert abs(deep - shallow) < 0.1 * STATE
    # The chosen ones, one to spare of each kind, and the result, which is cut out of these.
    assert shallow - memory(4, NOTHING, backward=False) < (2 + 1 + 2 * 2 + 4) * STATE


@pytest.mark.slow
def test_memory_of_the_backward_pass_grows_with_the_chosen_layers_and_not_with_the_depth() -> None:
    shallow, deep = (
        memory(depth, SOME, backward=True) - memory(depth, NOTHING, backward=True)
        for depth in (4, 32)
    )
    assert abs(deep - shallow) < 0.1 * STATE
    assert shallow < 2 * (2 + 1 + 2 * 2 + 1) * STATE


def test_collected_states_stay_where_they_are_made(devices: list[jax.Device]) -> None:
    decoder, on_mesh = Decoder(spec=SMALL), mesh.make_mesh(2, 2, 2, devices=devices)
    rows = NamedSharding(on_mesh, PartitionSpec(mesh.DATA_AXES))
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32, sharding=rows)
    params = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        decoder.abstract(),
        mesh.param_shardings(on_mesh, decoder.logical_axes(), decoder.abstract()),
    )

    def compiled(collect: Collect) -> Any:
        apply = jax.jit(partial(decoder.apply, collect=collect))
        return apply.lower(params, ids, ids, ids).compile(compiler_options=QUICK)

    def moves(program: Any) -> int:
        text = program.as_text()
        return sum(text.count(f" {name}(") for name in ("all-gather", "all-reduce", "all-to-all"))

    some = compiled(SOME)
    assert moves(some) == moves(compiled(NOTHING))
    final, found = some.output_shardings
    shape = (8, 16, SMALL.hidden_size)
    assert found.hidden.shard_shape((2, *shape))[1:] == final.shard_shape(shape)
    assert found.q.shard_shape((1, 8, 16, 2, 16)) == (1, 2, 16, 1, 16)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"hidden": (2, 1)}, "hidden = .2, 1.: needs different numbers"),
        ({"qkv": (1, 1)}, "qkv = .1, 1.: needs different numbers"),
        ({"hidden": (-1,)}, "from 0 on"),
        ({"hidden": (0, 4)}, "of 3 layers there are 0 to 3"),
        ({"qkv": (3,)}, "of 3 layers there are 0 to 2"),
    ],
)
def test_layers_that_cannot_be_collected_are_refused(wrong: Any, message: str) -> None:
    decoder = Decoder(spec=SPEC)
    ids = jnp.ones((1, 4), jnp.int32)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            partial(decoder.apply, collect=Collect(**wrong)), decoder.abstract(), ids, ids, ids
        )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("pattern", [("global",), ("global", "global")])
def test_number_of_parameters_and_axes_match_the_tree(tied: bool, pattern: tuple[str, ...]) -> None:
    spec = dataclasses.replace(SPEC, tied_head=tied, pattern=pattern)
    abstract, axes = Decoder(spec=spec).abstract(), Decoder(spec=spec).logical_axes()
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == num_parameters(spec)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(abstract))
    ranks = jax.tree.map(len, axes, is_leaf=lambda names: isinstance(names, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, abstract)
    assert set(jax.tree.leaves(axes)) <= mesh.RULES.keys()
    made = jax.eval_shape(Decoder(spec=spec).init, jax.random.key(0))
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, abstract)
    abstract.clear()  # the caller's own
    assert Decoder(spec=spec).abstract()


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


def test_initial_values_have_the_declared_spread() -> None:
    params = jax.jit(Decoder(spec=SPEC).init, compiler_options=QUICK)(jax.random.key(2))
    residual = 0.02 / math.sqrt(2 * SPEC.num_layers)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = jax.tree_util.keystr(path)
        if "norm" in name:
            np.testing.assert_array_equal(leaf, 1)
            continue
        expected = residual if "'o'" in name or "'down'" in name else 0.02
        assert abs(float(jnp.std(leaf)) / expected - 1) < 5 / math.sqrt(2 * leaf.size), name


@pytest.mark.slow
def test_initial_values_do_not_depend_on_the_devices_or_on_the_pattern(
    devices: list[jax.Device],
) -> None:
    decoder, key = Decoder(spec=SPEC), jax.random.key(5)
    alone = jax.jit(decoder.init, compiler_options=QUICK)(key)
    on_mesh = mesh.make_mesh(2, 2, 2, devices=devices)
    shardings = mesh.param_shardings(on_mesh, decoder.logical_axes(), decoder.abstract())
    lowered = jax.jit(decoder.init, out_shardings=shardings).lower(key)
    together = lowered.compile(compiler_options=QUICK)
    jax.tree.map(np.testing.assert_array_equal, together(key), alone)
    # Every device makes its own part: it never holds a whole matrix, nor anything beside its part.
    found, whole = together.memory_analysis(), 4 * num_parameters(SPEC)
    assert found.output_size_in_bytes + found.temp_size_in_bytes < whole / 2

    grouped = dataclasses.replace(SPEC, pattern=("global", "global"))
    other = jax.jit(Decoder(spec=grouped).init, compiler_options=QUICK)(key)
    jax.tree.map(np.testing.assert_array_equal, layers_of(other, grouped), layers_of(alone, SPEC))


def test_bfloat16_computes_near_float32() -> None:
    decoder, rough_decoder = Decoder(spec=SPEC), Decoder(spec=SPEC, dtype=jnp.bfloat16)
    params = randomised(decoder)
    tokens = np.stack(documents(24))
    exact, rough = logits_of(decoder, params, tokens), logits_of(rough_decoder, params, tokens)
    assert np.abs(rough - exact).max() < 0.1 * np.abs(exact).max()
