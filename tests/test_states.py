"""Losses on inner states against a dense reference in float64, and the laws that they keep."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from quick import QUICK

from ddk_jax.losses.chunked import ChunkPlan, LossInputs, chunked_objective
from ddk_jax.losses.objective import make_term
from ddk_jax.losses.states import (
    evenly_spaced,
    explicit_map,
    filtered,
    filtered_readouts,
    hidden_cosine,
    hidden_mse,
    initial_projections,
    relation_kl,
)
from ddk_jax.losses.targets import Head
from ddk_jax.models.collect import Collect
from ddk_jax.models.decoder import Decoder, segment_positions
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import DATA_AXES, make_mesh

N, B, T, S, U, F = 2, 2, 7, 6, 8, 5
SEGMENTS = np.array([[1, 1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 2, 0, 0]], np.int32)
MASK = np.array([[1, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 1, 0, 0]], bool)
HEADS = ((4, 2, 2, 6), (3, 3, 3, 4))
"""Heads of queries, keys and values and their width, of student and teacher."""
RELATION_HEADS = 6


# The reference: float64, one token at a time


def central_differences(
    function: Callable[..., float], arguments: tuple[np.ndarray, ...], step: float = 1e-6
) -> list[np.ndarray]:
    """Gradients of a function of float64 arrays in all of them."""
    found = []
    for i, argument in enumerate(arguments):
        gradient = np.zeros_like(argument)
        for place in np.ndindex(argument.shape):
            values = []
            for sign in (1, -1):
                moved = argument.copy()
                moved[place] += sign * step
                values.append(function(*arguments[:i], moved, *arguments[i + 1 :]))
            gradient[place] = (values[0] - values[1]) / (2 * step)
        found.append(gradient)
    return found


def mse_reference(student: np.ndarray, teacher: np.ndarray, *maps: np.ndarray | None) -> np.ndarray:
    found = np.zeros((N, B, T))
    for n, b, t in np.ndindex(N, B, T):
        pair = [
            x[n, b, t] if weights is None else x[n, b, t] @ weights[n]
            for x, weights in zip((student, teacher), maps, strict=True)
        ]
        found[n, b, t] = np.mean((pair[0] - pair[1]) ** 2)
    return found.mean(axis=0) * MASK


def cosine_reference(
    student: np.ndarray, teacher: np.ndarray, *maps: np.ndarray | None
) -> np.ndarray:
    found = np.zeros((N, B, T))
    for n, b, t in np.ndindex(N, B, T):
        one, other = (
            x[n, b, t] if weights is None else x[n, b, t] @ weights[n]
            for x, weights in zip((student, teacher), maps, strict=True)
        )
        found[n, b, t] = 1 - one @ other / np.linalg.norm(one) / np.linalg.norm(other)
    return found.mean(axis=0) * MASK


def relation_reference(
    student: tuple[np.ndarray, ...], teacher: tuple[np.ndarray, ...], relation_heads: int
) -> np.ndarray:
    """A loop over relations, layers, queries and heads, over the visible keys and no others."""
    found = np.zeros((B, T))
    count = len(student) * N * relation_heads
    for ours, theirs in zip(student, teacher, strict=True):
        for n, b, t in np.ndindex(N, B, T):
            if not MASK[b, t] or not SEGMENTS[b, t]:
                continue
            seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
            for r in range(relation_heads):
                log_p, log_q = (
                    log_relation(x[n, b], t, seen, r, relation_heads) for x in (theirs, ours)
                )
                found[b, t] += np.sum(np.exp(log_p) * (log_p - log_q)) / count
    return found


def log_relation(x: np.ndarray, t: int, seen: list[int], r: int, relation_heads: int) -> np.ndarray:
    """Of one row, [T, heads, width]."""
    flat = x.reshape(len(x), -1)
    width = flat.shape[1] // relation_heads
    cut = flat[:, r * width : (r + 1) * width]
    scores = cut[seen] @ cut[t] / np.sqrt(width)
    return scores - np.log(np.sum(np.exp(scores)))


# Problems


class States(NamedTuple):
    student: np.ndarray
    teacher: np.ndarray
    student_map: np.ndarray
    teacher_map: np.ndarray


def states(seed: int = 0) -> States:
    rng = np.random.default_rng(seed)
    shapes = (N, B, T, S), (N, B, T, U), (N, S, F), (N, U, F)
    return States(*(rng.normal(size=shape) for shape in shapes))


def projections(seed: int = 0) -> tuple[tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Queries, keys and values of the student and of the teacher."""
    rng = np.random.default_rng(seed)
    student, teacher = (
        tuple(rng.normal(size=(N, B, T, heads, width)) for heads in counts)
        for *counts, width in HEADS
    )
    return student, teacher


def single(tree: Any) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


WEIGHTS = np.random.default_rng(5).normal(size=(B, T))
"""Of the tokens, in the sum that is differentiated."""


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def values_and_gradients(loss: Callable[..., jax.Array], *arguments: Any) -> Any:
    """Of the weighted sum over tokens, in all arguments."""

    def total(arguments: Any) -> tuple[jax.Array, jax.Array]:
        values = loss(*arguments)
        # As the machinery masks: what stands under a zero weight is dropped.
        kept = jnp.where(MASK, values, jnp.float32(0))
        return jnp.sum(kept * WEIGHTS.astype(np.float32)), values

    gradients, values = jax.grad(total, has_aux=True)(arguments)
    return values, gradients


def hidden_loss(function: Callable[..., jax.Array], *arguments: jax.Array) -> jax.Array:
    student, teacher, *maps = arguments
    names = ("student_map", "teacher_map")
    named = dict(zip(names, maps, strict=False))
    return function(student, teacher, jnp.asarray(MASK), **named)


MSE, COSINE = partial(hidden_loss, hidden_mse), partial(hidden_loss, hidden_cosine)


def relation_loss(
    student: Any, teacher: Any, *, heads: int = RELATION_HEADS, block_tokens: int = 128
) -> jax.Array:
    return relation_kl(
        student, teacher, jnp.asarray(SEGMENTS), jnp.asarray(MASK),
        relation_heads=heads, block_tokens=block_tokens,
    )  # fmt: skip


@partial(jax.jit, static_argnames="heads", compiler_options=QUICK)
def relations(
    student: Any, teacher: Any, segments: Any = SEGMENTS, mask: Any = MASK, *, heads: int = 6
) -> jax.Array:
    return relation_kl(
        student, teacher, jnp.asarray(segments), jnp.asarray(mask), relation_heads=heads
    )


# Values and gradients


@pytest.mark.parametrize("maps", ["none", "of_the_student", "of_both"])
@pytest.mark.parametrize(("loss", "expected"), [(MSE, mse_reference), (COSINE, cosine_reference)])
def test_hidden_losses_equal_a_float64_reference(
    loss: Callable[..., jax.Array], expected: Callable[..., np.ndarray], maps: str
) -> None:
    drawn = states()
    arguments: tuple[Any, ...] = tuple(drawn)
    if maps == "none":
        arguments = (drawn.student, drawn.teacher[..., :S])
    elif maps == "of_the_student":
        arguments = (drawn.student, drawn.teacher[..., :F], drawn.student_map)
    values, gradients = values_and_gradients(loss, *single(arguments))
    assert values.dtype == jnp.float32

    def total(student: np.ndarray, *student_map: np.ndarray) -> float:
        both = (*student_map, *arguments[3:], None, None)[:2]
        return float(np.sum(expected(student, arguments[1], *both) * WEIGHTS))

    both = (*arguments[2:], None, None)[:2]
    exact = expected(arguments[0], arguments[1], *both)
    np.testing.assert_allclose(values, exact, rtol=1e-5, atol=1e-6)
    learned = (arguments[0], *arguments[2:3])
    found = (gradients[0], *gradients[2:3])
    for ours, theirs in zip(found, central_differences(total, learned), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    for frozen in (gradients[1], *gradients[3:]):
        np.testing.assert_array_equal(frozen, 0)


@pytest.mark.slow
@pytest.mark.parametrize("block_tokens", [3, 128])
def test_relations_equal_a_float64_reference(block_tokens: int) -> None:
    student, teacher = projections()
    loss = partial(relation_loss, block_tokens=block_tokens)
    values, (gradient, frozen) = values_and_gradients(loss, single(student), single(teacher))
    assert values.dtype == jnp.float32
    exact = relation_reference(student, teacher, RELATION_HEADS)
    np.testing.assert_allclose(values, exact, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradient, relation_gradients(), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), frozen)


def relation_gradients() -> list[np.ndarray]:
    """Of the reference's weighted sum: with d = q - p of a relation, each pair of tokens pulls."""
    student, teacher = projections()
    found = [np.zeros_like(x) for x in student]
    count = len(student) * N * RELATION_HEADS
    for ours, theirs, gradient in zip(student, teacher, found, strict=True):
        width = ours[0, 0, 0].size // RELATION_HEADS
        flat, d_flat = ours.reshape(N, B, T, -1), gradient.reshape(N, B, T, -1)
        for n, b, t, r in np.ndindex(N, B, T, RELATION_HEADS):
            if not MASK[b, t] or not SEGMENTS[b, t]:
                continue
            seen = [s for s in range(t + 1) if SEGMENTS[b, s] == SEGMENTS[b, t]]
            p, q = (
                np.exp(log_relation(x[n, b], t, seen, r, RELATION_HEADS)) for x in (theirs, ours)
            )
            d_scores = WEIGHTS[b, t] / count * (q - p) / np.sqrt(width)
            cut = np.s_[r * width : (r + 1) * width]
            for s, d_score in zip(seen, d_scores, strict=True):
                d_flat[n, b, t, cut] += d_score * flat[n, b, s, cut]
                d_flat[n, b, s, cut] += d_score * flat[n, b, t, cut]
    return found


def test_the_gradient_of_the_relation_reference_agrees_with_finite_differences() -> None:
    student, teacher = projections()
    rng = np.random.default_rng(3)
    directions = [rng.normal(size=x.shape) for x in student]

    def value(step: float) -> float:
        moved = tuple(x + step * d for x, d in zip(student, directions, strict=True))
        return float(np.sum(relation_reference(moved, teacher, RELATION_HEADS) * WEIGHTS))

    slope = sum(np.sum(g * d) for g, d in zip(relation_gradients(), directions, strict=True))
    np.testing.assert_allclose((value(1e-5) - value(-1e-5)) / 2e-5, slope, rtol=1e-6)


# Laws


@pytest.mark.parametrize("loss", [MSE, COSINE])
def test_equal_states_behind_the_identity_cost_nothing(loss: Callable[..., jax.Array]) -> None:
    student = single(states().student)
    identity = initial_projections(jax.random.key(0), N, S, S)
    values, gradients = values_and_gradients(loss, student, student, identity)
    for found in (values, *gradients):
        np.testing.assert_allclose(found, 0, atol=1e-6)


def test_equal_relations_cost_nothing_and_others_do() -> None:
    student, teacher = single(projections())
    equal = values_and_gradients(relation_loss, student[:1], student[:1])
    jax.tree.map(lambda x: np.testing.assert_allclose(x, 0, atol=1e-6), equal)
    different = np.asarray(relations(student, teacher))
    first = np.array([[1, 0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0]], bool)
    assert (different[MASK & ~first] > 1e-3).all()
    np.testing.assert_allclose(different[first | ~MASK], 0, atol=1e-6)  # it sees itself alone


def test_cosine_is_blind_to_lengths() -> None:
    drawn = single(states())
    ours = values_and_gradients(COSINE, *drawn)[0]
    scaled = values_and_gradients(COSINE, drawn.student * 50, drawn.teacher * 0.01, *drawn[2:])[0]
    np.testing.assert_allclose(ours, scaled, atol=1e-5)


def test_zero_vectors_have_a_cosine_with_finite_gradients() -> None:
    drawn = single(states())
    values, gradients = values_and_gradients(COSINE, drawn.student * 0, *drawn[1:])
    np.testing.assert_array_equal(values, MASK.astype(np.float32))
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("loss", [MSE, COSINE])
def test_masked_tokens_have_no_influence_on_hidden_losses(
    loss: Callable[..., jax.Array], garbage: float
) -> None:
    clean = states()
    dirty = clean._replace(
        student=np.where(MASK[None, :, :, None], clean.student, garbage),
        teacher=np.where(MASK[None, :, :, None], clean.teacher, garbage),
    )
    expected = values_and_gradients(loss, *single(clean))
    jax.tree.map(
        np.testing.assert_array_equal, values_and_gradients(loss, *single(dirty)), expected
    )
    np.testing.assert_array_equal(expected[0][~MASK], 0)
    np.testing.assert_array_equal(expected[1][0][:, ~MASK], 0)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 1e30])
def test_padding_and_unasked_last_tokens_have_no_influence_on_relations(garbage: float) -> None:
    unseen = (SEGMENTS == 0) | np.array([[0] * 6 + [1], [0] * 7], bool)
    assert not MASK[unseen].any()
    clean = projections()
    dirty = jax.tree.map(lambda x: np.where(unseen[None, :, :, None, None], garbage, x), clean)
    expected = values_and_gradients(relation_loss, *single(clean))
    found = values_and_gradients(relation_loss, *single(dirty))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    for gradient in expected[1][0]:
        np.testing.assert_array_equal(gradient[:, unseen], 0)


def test_packed_segments_relate_as_separate_ones_and_nothing_sees_ahead() -> None:
    student, teacher = single(projections())
    together = np.asarray(relations(student, teacher))
    second = np.s_[:, 1, 2:5]
    alone = jax.tree.map(lambda x: x.at[:, 0, :3].set(x[second]), (student, teacher))
    segments, mask = SEGMENTS.copy(), MASK.copy()
    segments[0], mask[0] = [3, 3, 3, 0, 0, 0, 0], [*MASK[1, 2:5], 0, 0, 0, 0]
    segments[1, 2:] = 0
    apart = np.asarray(relations(*alone, segments, mask))
    np.testing.assert_allclose(apart[0, :3], together[1, 2:5], atol=1e-6)
    np.testing.assert_allclose(apart[1, :2], together[1, :2], atol=1e-6)
    np.testing.assert_array_equal(apart[segments == 0], 0)

    later = jax.tree.map(lambda x: x.at[:, :, 4:].add(1), (student, teacher))
    np.testing.assert_array_equal(np.asarray(relations(*later))[:, :4], together[:, :4])


def test_relations_do_not_depend_on_how_the_heads_are_cut() -> None:
    student, teacher = single(projections())
    expected = np.asarray(relations(student, teacher))
    q, k, v = (x.reshape(N, B, T, heads, -1) for x, heads in zip(student, (6, 1, 12), strict=True))
    # A relation head may be turned, too: only lengths and angles within it matter.
    turn, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(4, 4)))
    turned = (q @ turn.astype(np.float32), k, v)
    np.testing.assert_allclose(relations(turned, teacher), expected, atol=1e-5)
    assert np.abs(np.asarray(relations(student, teacher, heads=1)) - expected).max() > 1e-2


def test_values_alone_are_a_relation_too() -> None:
    student, teacher = projections()
    found = relations(single(student[2:]), single(teacher[2:]))
    exact = relation_reference(student[2:], teacher[2:], RELATION_HEADS)
    np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("heads", [0, -2, 5, 24])
def test_relation_heads_must_divide_all_widths(heads: int) -> None:
    student, teacher = single(projections())
    with pytest.raises(ValueError, match=r"relation_heads = .*here \[12, 24\]: take 12 or"):
        relation_loss(student, teacher, heads=heads)
    with pytest.raises(ValueError, match="no relations"):
        relation_loss((), (), heads=heads)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [MSE, COSINE, relation_loss])
def test_bfloat16_states_compute_near_float32(loss: Callable[..., jax.Array]) -> None:
    arguments: Any = tuple(states())[:3]
    if loss is relation_loss:
        arguments = tuple(model[:1] for model in projections())
    else:
        arguments = (arguments[0], arguments[1][..., :F], arguments[2])
    rough = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), arguments)
    exact, exact_gradients = values_and_gradients(loss, *single(rough))
    values, gradients = values_and_gradients(loss, *rough)
    assert values.dtype == jnp.float32
    np.testing.assert_allclose(values, exact, atol=0.02 * np.abs(exact).max())
    for near, far in zip(jax.tree.leaves(gradients), jax.tree.leaves(exact_gradients), strict=True):
        assert near.dtype == jnp.bfloat16
        rounded = np.asarray(near, np.float32)
        np.testing.assert_allclose(rounded, far, atol=0.02 * np.abs(far).max())


# Cost


def test_relations_need_the_memory_of_a_block_of_queries() -> None:
    def memory(block_tokens: int) -> int:
        x = jax.ShapeDtypeStruct((1, 2, 256, 4, 8), jnp.float32)

        def loss(student: Any, teacher: Any) -> jax.Array:
            ids = jnp.ones((2, 256), jnp.int32)
            return jnp.sum(
                relation_kl(
                    student, teacher, ids, ids > 0,
                    relation_heads=4, block_tokens=block_tokens,
                )
            )  # fmt: skip

        lowered = jax.jit(jax.grad(loss)).lower((x,), (x,))
        return lowered.compile(compiler_options=QUICK).memory_analysis().temp_size_in_bytes

    scores = 2 * 4 * 256 * 256 * 4
    assert memory(16) < scores < 2 * scores < memory(256)


def test_rows_on_different_devices_do_not_talk(devices: list[jax.Device]) -> None:
    mesh = make_mesh(4, 2, devices=devices)
    rows = PartitionSpec(None, DATA_AXES)

    def placed(*shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, rows))

    hidden, heads = placed(N, 8, T, S), placed(N, 8, T, 2, 4)

    def total(hidden: Any, heads: Any) -> jax.Array:
        ids = jnp.ones((8, T), jnp.int32)
        values = hidden_mse(hidden[0], hidden[1], ids > 0)
        values += relation_kl(heads[:1], heads[1:], ids, ids > 0, relation_heads=2, block_tokens=3)
        return jnp.sum(values)

    gradient = jax.jit(jax.grad(total, argnums=(0, 1)))
    lowered = gradient.lower((hidden, hidden), (heads, heads))
    text = lowered.compile(compiler_options=QUICK).as_text()
    assert not any(f" {name}(" in text for name in ("all-gather", "all-reduce", "all-to-all"))


# Maps of layers


@pytest.mark.parametrize(
    ("layers", "student", "teacher"),
    [
        ((4, 12, 4), (1, 2, 3, 4), (3, 6, 9, 12)),
        ((12, 12, 12), tuple(range(1, 13)), tuple(range(1, 13))),
        ((6, 12, 3), (2, 4, 6), (4, 8, 12)),
        ((3, 5, 2), (2, 3), (3, 5)),
        ((24, 40, 1), (24,), (40,)),
    ],
)
def test_the_default_map_is_evenly_spaced(
    layers: tuple[int, int, int], student: tuple[int, ...], teacher: tuple[int, ...]
) -> None:
    assert evenly_spaced(*layers) == (student, teacher)


@given(st.integers(1, 130), st.integers(1, 130), st.integers(-1, 140))
def test_the_default_map_is_a_good_explicit_one(student: int, teacher: int, pairs: int) -> None:
    if not 1 <= pairs <= min(student, teacher):
        with pytest.raises(ValueError, match="pairs of layers"):
            evenly_spaced(student, teacher, pairs)
        return
    found = evenly_spaced(student, teacher, pairs)
    assert found == explicit_map(*found, student_last=student, teacher_last=teacher)
    for chosen, layers in zip(found, (student, teacher), strict=True):
        assert chosen[-1] == layers and chosen[0] > 0
        exact = np.arange(1, pairs + 1) * layers / pairs
        assert np.abs(np.array(chosen) - exact).max() <= 0.5


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        ((1, 2), (3,), "one layer of the teacher for every"),
        ((), (), "at least one pair"),
        ((1, 5), (3, 4), r"student_layers = \[1, 5\]: 5 is not in 0 to 4"),
        ((1, 2), (-1, 4), r"teacher_layers = \[-1, 4\]: -1 is not in 0 to 8"),
        ((1, 1), (3, 4), "student_layers = .* 1 is there twice"),
        ((1, 2), (3, 3), "teacher_layers = .* 3 is there twice"),
        ((2, 1), (3, 4), "increasing order"),
    ],
)
def test_maps_that_make_no_sense_are_refused(
    student: tuple[int, ...], teacher: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        explicit_map(student, teacher, student_last=4, teacher_last=8)


@pytest.mark.parametrize(("student", "teacher"), [(6, 6), (4, 9), (9, 4)])
def test_initial_projections_keep_lengths(student: int, teacher: int) -> None:
    make = jax.jit(
        partial(initial_projections, pairs=3, student_width=student, teacher_width=teacher),
        compiler_options=QUICK,
    )
    found = np.asarray(make(jax.random.key(1)))
    assert found.shape == (3, student, teacher)
    for one in found:
        gram = one @ one.T if student <= teacher else one.T @ one
        np.testing.assert_allclose(gram, np.eye(min(student, teacher)), atol=1e-5)
    if student == teacher:
        np.testing.assert_array_equal(found[1], np.eye(student))
    else:
        other = np.asarray(make(jax.random.key(2)))
        assert min(np.abs(found[0] - found[1]).max(), np.abs(found - other).max()) > 0.1


# TED


SPEC = ModelSpec(
    vocab_size=23, hidden_size=16, num_layers=3, num_heads=2, num_kv_heads=1, ffn_size=24
)


def test_identity_filters_behind_the_last_layer_predict_what_the_model_predicts() -> None:
    decoder, rng = Decoder(spec=SPEC), np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(0.5, 0.5, leaf.shape), jnp.float32), decoder.abstract()
    )
    ids = jnp.asarray(rng.integers(0, SPEC.vocab_size, (B, T)), jnp.int32)

    @partial(jax.jit, compiler_options=QUICK)
    def both(ids: jax.Array) -> Any:
        ones = jnp.ones_like(ids)
        collect = Collect(hidden=(1, 3))
        final, found = decoder.apply(params, ids, ones, segment_positions(ones), collect)
        filters = initial_projections(jax.random.key(0), 2, SPEC.hidden_size, SPEC.hidden_size)
        norm = partial(decoder.final_norm, params)
        outputs = filtered_readouts(found.hidden, filters, ones > 0, norm, normed=(False, True))
        return final, found.hidden[0], outputs

    final, inner, outputs = map(np.asarray, both(ids))
    np.testing.assert_array_equal(outputs[1], final)
    root = np.sqrt(np.mean(np.square(inner), axis=-1, keepdims=True) + SPEC.norm_eps)
    scale = np.asarray(params["norm"]["scale"])
    np.testing.assert_allclose(outputs[0], inner / root * scale, rtol=1e-5, atol=1e-6)


def test_filters_learn_through_a_frozen_head_whatever_masked_tokens_hold() -> None:
    drawn, rng = states(), np.random.default_rng(1)
    head, labels = rng.normal(size=(F, 11)), rng.integers(0, 11, (B, T)).astype(np.int32)
    scale = MASK / MASK.sum()
    dirty = np.where(MASK[None, :, :, None], drawn.student, np.nan)

    def normed(x: Any, xp: Any) -> Any:
        return x / xp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)

    def ours(filters: jax.Array, hidden: jax.Array) -> jax.Array:
        outputs = filtered_readouts(
            hidden, filters, jnp.asarray(MASK), partial(normed, xp=jnp), normed=(False,) * N
        )
        inputs = LossInputs(
            teacher=None,
            labels=jnp.asarray(labels),
            role=jnp.ones((B, T), jnp.int32),
            draw=jnp.zeros((B, T), jnp.uint32),
            scale=jnp.asarray(scale[None], jnp.float32),
            temperature=jnp.ones(1, jnp.float32),
        )
        terms = (make_term("cross_entropy"),)
        plan = ChunkPlan(tokens=4, head_gradient=False)
        kernel = Head(jnp.asarray(head, jnp.float32))
        return sum(
            (chunked_objective(x, kernel, inputs, terms, plan)[0] for x in outputs), jnp.float32(0)
        )

    def theirs(filters: np.ndarray) -> float:
        logits = normed(np.einsum("nbts,nsf->nbtf", drawn.student, filters), np) @ head
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return float(
            -np.sum(np.take_along_axis(log_p, labels[None, :, :, None], -1)[..., 0] * scale)
        )

    value, gradient = jax.jit(jax.value_and_grad(ours), compiler_options=QUICK)(
        *single((drawn.student_map, dirty))
    )
    np.testing.assert_allclose(value, theirs(drawn.student_map), rtol=1e-5)
    (expected,) = central_differences(theirs, (drawn.student_map,))
    np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


def test_filtered_states_are_what_stage_two_compares() -> None:
    drawn = single(states())
    mask = jnp.asarray(MASK)
    pair = (filtered(drawn.student, drawn.student_map, mask),
            filtered(drawn.teacher, drawn.teacher_map, mask))  # fmt: skip
    expected = hidden_mse(*pair, mask)
    np.testing.assert_allclose(MSE(*drawn), expected, rtol=1e-5, atol=1e-6)
