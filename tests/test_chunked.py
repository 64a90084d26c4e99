"""Heads and losses by chunks against a dense reference in float64, and the laws that they keep."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.extend.core import jaxprs_in_params
from jax.sharding import NamedSharding, PartitionSpec
from quick import EXACT

from ddk_jax.losses.chunked import (
    ChunkPlan,
    LossInputs,
    aligned_heads,
    chunk_tokens,
    chunked_objective,
    sharded_objective,
)
from ddk_jax.losses.objective import (
    Objective,
    check_terms,
    constant,
    make_term,
    needs_teacher,
    temperatures,
    term_factors,
    term_weights,
)
from ddk_jax.losses.sums import domain_sums
from ddk_jax.losses.targets import Head, TeacherTargets, fit
from ddk_jax.parallel.mesh import DATA_AXES, VOCAB_AXIS, make_mesh, param_shardings

B, T, E, E_T, V = 3, 5, 7, 6, 11
CHUNKS = (1, 4, 5, 64)
"""One token, not dividing the 15 tokens, dividing them, and more than there are."""


FOUR = ChunkPlan(tokens=4)


class Kind(NamedTuple):
    """A term as the reference sees it; temperature None is cross-entropy."""

    temperature: float | None
    weight: float
    roles: tuple[int, ...]


OBJECTIVE: Objective = (
    make_term("cross_entropy"),
    make_term(
        "forward_kl",
        name="of prompts",
        weight=0.2,
        temperature=2.0,
        temperature_squared=True,
        roles="prompt",
    ),
    make_term("forward_kl", name="of responses", weight=0.7, temperature=0.5, roles="response"),
)
KINDS = (
    Kind(None, 1.0, (1, 2)),
    Kind(2.0, 0.2 * 4, (1,)),
    Kind(0.5, 0.7, (2,)),
)
DDK: Objective = (make_term("cross_entropy"), make_term("forward_kl", weight=0.2))
DDK_KINDS = (Kind(None, 1.0, (1, 2)), Kind(1.0, 0.2, (1, 2)))


class Problem(NamedTuple):
    """Host arrays of one batch."""

    hidden: np.ndarray
    head: np.ndarray
    teacher_hidden: np.ndarray
    teacher_head: np.ndarray
    labels: np.ndarray
    role: np.ndarray
    mask: np.ndarray


class Answer(NamedTuple):
    value: float
    nats: np.ndarray
    d_hidden: np.ndarray
    d_head: np.ndarray


def problem(seed: int = 0, *, rows: int = B, vocab: int = V, width: int = E) -> Problem:
    rng = np.random.default_rng(seed)
    return Problem(
        hidden=rng.normal(size=(rows, T, width)),
        head=rng.normal(size=(width, vocab)),
        teacher_hidden=rng.normal(size=(rows, T, E_T)),
        teacher_head=rng.normal(size=(E_T, vocab)),
        labels=rng.integers(0, vocab, (rows, T)),
        role=rng.integers(1, 3, (rows, T)),
        mask=rng.random((rows, T)) < 0.7,
    )


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def scales(p: Problem, kinds: tuple[Kind, ...]) -> np.ndarray:
    """[K, B, T]: weight over the number of the term's tokens, where it has the token."""
    wanted = np.stack([p.mask & np.isin(p.role, kind.roles) for kind in kinds])
    counts = np.maximum(wanted.sum(axis=(1, 2)), 1)
    return wanted * (np.array([kind.weight for kind in kinds]) / counts)[:, None, None]


def dense(p: Problem, kinds: tuple[Kind, ...], kept: Any = np.float64) -> Answer:
    """Value and gradients, token by token, in float64: q - onehot and (q - p) / temperature.

    `kept` is the type that logits are rounded to.
    """
    scale = scales(p, kinds)
    nats = np.zeros(scale.shape)
    d_hidden, d_head = np.zeros(p.hidden.shape), np.zeros(p.head.shape)
    for b, t in zip(*np.nonzero(scale.max(axis=0)), strict=True):
        student = (p.hidden[b, t] @ p.head).astype(kept).astype(np.float64)
        teacher = (p.teacher_hidden[b, t] @ p.teacher_head).astype(kept).astype(np.float64)
        d_logits = np.zeros_like(student)
        for k, kind in enumerate(kinds):
            if not scale[k, b, t]:
                continue
            if kind.temperature is None:
                log_q = log_softmax(student)
                nats[k, b, t] = -log_q[p.labels[b, t]]
                gradient = np.exp(log_q)
                gradient[p.labels[b, t]] -= 1
            else:
                log_q = log_softmax(student / kind.temperature)
                log_p = log_softmax(teacher / kind.temperature)
                some = np.exp(log_p) > 0
                nats[k, b, t] = np.sum(np.exp(log_p[some]) * (log_p[some] - log_q[some]))
                gradient = (np.exp(log_q) - np.exp(log_p)) / kind.temperature
            d_logits += scale[k, b, t] * gradient
        d_hidden[b, t] = p.head @ d_logits
        d_head += np.outer(p.hidden[b, t], d_logits)
    return Answer(float(np.sum(scale * nats)), nats, d_hidden, d_head)


def inputs_of(
    teacher: TeacherTargets | None, labels: Any, role: Any, scale: Any, objective: Objective
) -> LossInputs:
    draw = jnp.arange(labels.size, dtype=jnp.uint32).reshape(labels.shape)
    return LossInputs(teacher, labels, role, draw, scale, temperatures(objective, jnp.int32(0)))


def placed(
    p: Problem, kinds: tuple[Kind, ...], dtype: Any = np.float32
) -> tuple[jax.Array, jax.Array, LossInputs]:
    """The arguments of `chunked_objective`."""
    hidden, head, teacher_hidden, teacher_head = (jnp.asarray(x.astype(dtype)) for x in p[:4])
    teacher = TeacherTargets((teacher_hidden,), (Head(teacher_head),))
    labels, role = (jnp.asarray(x.astype(np.int32)) for x in (p.labels, p.role))
    scale = jnp.asarray(scales(p, kinds).astype(np.float32))
    objective = OBJECTIVE if kinds is KINDS else DDK
    return hidden, head, inputs_of(teacher, labels, role, scale, objective)


@partial(jax.jit, static_argnums=(0, 1), compiler_options=EXACT)
def value_and_gradient(
    objective: Objective,
    chunk: int,
    hidden: jax.Array,
    head: jax.Array,
    inputs: LossInputs,
    factor: jax.Array,
) -> Any:
    def scaled(hidden: jax.Array, head: jax.Array) -> Any:
        plan = ChunkPlan(tokens=chunk)
        value, nats = chunked_objective(hidden, Head(head), inputs, objective, plan)
        return factor * value, nats

    return jax.value_and_grad(scaled, argnums=(0, 1), has_aux=True)(hidden, head)


def answer(p: Problem, chunk: int = 4, dtype: Any = np.float32, factor: float = 1.0) -> Answer:
    (value, nats), gradients = value_and_gradient(
        OBJECTIVE, chunk, *placed(p, KINDS, dtype), jnp.asarray(np.float32(factor))
    )
    assert value.dtype == nats.dtype == jnp.float32
    assert all(gradient.dtype == dtype for gradient in gradients)
    return Answer(float(value), np.asarray(nats), *(np.asarray(g, np.float32) for g in gradients))


def check(found: Answer, expected: Answer, gradient_tolerance: float) -> None:
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-5, atol=2e-6)
    for got, want in zip(found[2:], expected[2:], strict=True):
        atol = gradient_tolerance * max(float(np.abs(want).max()), 1e-3)
        np.testing.assert_allclose(got, want, rtol=0, atol=atol)


def same(found: Answer, expected: Answer) -> None:
    """Bitwise equal."""
    for got, want in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, want)


# The chunked objective against the reference


def test_the_reference_itself_agrees_with_finite_differences() -> None:
    p, rng = problem(), np.random.default_rng(9)
    d_hidden, d_head = rng.normal(size=p.hidden.shape), rng.normal(size=p.head.shape)

    def value(step: float) -> float:
        moved = p._replace(hidden=p.hidden + step * d_hidden, head=p.head + step * d_head)
        return dense(moved, KINDS).value

    expected = dense(p, KINDS)
    slope = np.sum(expected.d_hidden * d_hidden) + np.sum(expected.d_head * d_head)
    np.testing.assert_allclose((value(1e-5) - value(-1e-5)) / 2e-5, slope, rtol=1e-7)


@pytest.mark.parametrize(
    ("chunk", "dtype"),
    [*((chunk, jnp.float32) for chunk in CHUNKS), (4, jnp.bfloat16), (64, jnp.bfloat16)],
)
def test_chunked_equals_dense(chunk: int, dtype: Any) -> None:
    for seed in range(3):
        p = problem(seed)
        # The reference gets the rounded inputs: sums and softmaxes are float32 for bfloat16 too.
        exact = {n: getattr(p, n).astype(dtype).astype(np.float64) for n in Problem._fields[:4]}
        tolerance = 1e-5 if dtype == jnp.float32 else 2e-2
        check(answer(p, chunk, dtype), dense(p._replace(**exact), KINDS), tolerance)


def test_rounded_logits_are_rounded_once_and_only_for_gradients() -> None:
    p = problem()
    hidden, head, inputs = placed(p, KINDS, jnp.bfloat16)
    exact = {n: getattr(p, n).astype(jnp.bfloat16).astype(np.float64) for n in Problem._fields[:4]}
    plan = ChunkPlan(tokens=4, round_logits=True)

    @partial(jax.jit, compiler_options=EXACT)
    def both(hidden: jax.Array, head: jax.Array) -> Any:
        def value(hidden: jax.Array, head: jax.Array) -> Any:
            return chunked_objective(hidden, Head(head), inputs, OBJECTIVE, plan)

        return value(hidden, head), jax.value_and_grad(value, (0, 1), has_aux=True)(hidden, head)

    alone, ((value, nats), gradients) = both(hidden, head)
    expected = dense(p._replace(**exact), KINDS)
    np.testing.assert_allclose(alone[0], expected.value, rtol=1e-5)
    np.testing.assert_allclose(alone[1], expected.nats, rtol=1e-5, atol=2e-6)
    found = Answer(float(value), *(np.asarray(x, np.float32) for x in (nats, *gradients)))
    check(found, dense(p._replace(**exact), KINDS, jnp.bfloat16), 2e-2)
    assert abs(found.value - expected.value) > 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_scale_with_their_cotangent(dtype: Any) -> None:
    once, four = (answer(problem(), dtype=dtype, factor=factor) for factor in (1.0, 4.0))
    np.testing.assert_array_equal(four.d_hidden, 4 * once.d_hidden)
    np.testing.assert_array_equal(four.d_head, 4 * once.d_head)


def test_gradient_agrees_with_finite_differences() -> None:
    p, rng = problem(1), np.random.default_rng(2)
    d_hidden, d_head = rng.normal(size=p.hidden.shape), rng.normal(size=p.head.shape)

    def at(step: float) -> Answer:
        moved = p._replace(hidden=p.hidden + step * d_hidden, head=p.head + step * d_head)
        return answer(moved)

    slope = np.sum(at(0).d_hidden * d_hidden) + np.sum(at(0).d_head * d_head)
    np.testing.assert_allclose((at(1e-2).value - at(-1e-2).value) / 2e-2, slope, rtol=2e-3)


def test_nothing_flows_into_the_teacher_or_out_of_the_nats() -> None:
    hidden, head, inputs = placed(problem(), DDK_KINDS)

    @partial(jax.jit, compiler_options=EXACT)
    @partial(jax.grad, argnums=(0, 1))
    def gradients(teacher: TeacherTargets, hidden: jax.Array) -> jax.Array:
        detached = jax.lax.stop_gradient(hidden)
        read = inputs._replace(teacher=teacher)
        value, _ = chunked_objective(detached, Head(head), read, DDK, FOUR)
        _, nats = chunked_objective(hidden, Head(head), inputs, DDK, FOUR)
        return value + jnp.sum(nats)

    assert inputs.teacher is not None
    for gradient in jax.tree.leaves(gradients(inputs.teacher, hidden)):
        np.testing.assert_array_equal(gradient, 0)


# Masks


GARBAGE = [np.nan, np.inf, -np.inf, 1e30]


@pytest.mark.parametrize("garbage", GARBAGE)
def test_masked_tokens_have_no_influence(garbage: float) -> None:
    p = problem(2)
    clean = answer(p)
    out = ~p.mask[..., None]
    poisoned = p._replace(
        hidden=np.where(out, garbage, p.hidden),
        teacher_hidden=np.where(out, garbage, p.teacher_hidden),
        labels=np.where(p.mask, p.labels, -7),
        role=np.where(p.mask, p.role, 0),
    )
    found = answer(poisoned)
    same(found, clean)
    assert all(np.all(np.isfinite(x)) for x in found)
    np.testing.assert_array_equal(found.nats[:, ~p.mask], 0)
    np.testing.assert_array_equal(found.d_hidden[~p.mask], 0)


def ruled_out(p: Problem, columns: list[int]) -> Problem:
    """The teacher gives -inf to some entries: its last hidden unit is 1 and carries a bias."""
    p.teacher_hidden[..., -1] = 1
    p.teacher_head[-1, columns] = -np.inf
    return p


def test_entries_that_the_teacher_rules_out_contribute_nothing() -> None:
    p = ruled_out(problem(3), [0, 4, 10])
    for chunk in (4, 64):
        found = answer(p, chunk)
        assert all(np.all(np.isfinite(x)) for x in found)
        check(found, dense(p, KINDS), 1e-5)
    # ... beside masked tokens whose hidden states are NaN.
    poisoned = p._replace(teacher_hidden=np.where(p.mask[..., None], p.teacher_hidden, np.nan))
    same(answer(poisoned), answer(p))


def test_a_batch_without_tokens_gives_zero() -> None:
    p = ruled_out(problem(), [1])
    p = p._replace(mask=np.zeros_like(p.mask), hidden=p.hidden * np.nan)
    found = answer(p)
    for part in found:
        np.testing.assert_array_equal(part, 0)


def test_a_term_without_tokens_gives_zero() -> None:
    p = problem()
    p = p._replace(role=np.ones_like(p.role))  # no response
    found = answer(p)
    np.testing.assert_array_equal(found.nats[2], 0)
    check(found, dense(p, KINDS), 1e-5)


@pytest.mark.parametrize("size", [1e4, 1e-30])
def test_extreme_logits_stay_finite_and_exact(size: float) -> None:
    p = problem(4)
    p = p._replace(hidden=p.hidden * size, teacher_hidden=p.teacher_hidden * size)
    found, expected = answer(p), dense(p, KINDS)
    assert all(np.all(np.isfinite(x)) for x in found)
    np.testing.assert_allclose(found.value, expected.value, rtol=1e-5)
    np.testing.assert_allclose(found.nats, expected.nats, rtol=1e-4, atol=1e-6 * max(size, 1))


@pytest.mark.parametrize("whose", ["hidden", "teacher_hidden", "head", "teacher_head"])
def test_what_is_not_finite_at_a_token_that_counts_is_seen(whose: str) -> None:
    p = problem()
    array = getattr(p, whose)
    array[(*np.argwhere(p.mask & (p.role == 2))[0], 0) if array.ndim == 3 else (0, 0)] = np.nan
    found = answer(p)
    assert math.isnan(found.value)
    assert np.isnan(found.d_head).any()


# Heads and teachers


def logits_problem(
    student: np.ndarray, teachers: list[np.ndarray], labels: np.ndarray, weights: Any = None
) -> tuple[Head, LossInputs]:
    """Rows of one token whose hidden states select a row of given logits."""
    rows, objective = len(student), DDK
    ones, role = jnp.ones((2, rows, 1)), jnp.ones((rows, 1), jnp.int32)
    heads = tuple(Head(jnp.asarray(t, jnp.float32)) for t in teachers)
    if weights is not None:
        weights = jnp.asarray(weights, jnp.float32)[:, :, None]
    targets = TeacherTargets((selectors(rows),) * len(heads), heads, weights)
    label = jnp.asarray(labels, jnp.int32)[:, None]
    return Head(jnp.asarray(student, jnp.float32)), inputs_of(targets, label, role, ones, objective)


def selectors(rows: int) -> jax.Array:
    return jnp.eye(rows)[:, None, :]


def nats_of(head: Head, inputs: LossInputs, **plan: Any) -> np.ndarray:
    """Cross-entropy and forward KL of every row."""
    hidden = selectors(head.kernel.shape[0])
    _, nats = chunked_objective(hidden, head, inputs, DDK, ChunkPlan(tokens=2, **plan))
    return np.asarray(nats)[:, :, 0]


def test_bias_and_soft_cap_of_a_head() -> None:
    rng = np.random.default_rng(0)
    student, teacher, bias = rng.normal(size=(3, V)), rng.normal(size=(3, V)), rng.normal(size=V)
    labels = np.array([0, 4, 10])
    head, inputs = logits_problem(student, [teacher], labels)
    head = head._replace(bias=jnp.asarray(bias, jnp.float32), softcap=jnp.float32(1.5))
    hidden = selectors(3)

    @partial(jax.jit, compiler_options=EXACT)
    @partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def chunked(hidden: jax.Array, head: Head) -> Any:
        return chunked_objective(hidden, head, inputs, DDK, ChunkPlan(tokens=2))

    def value(student: np.ndarray, bias: np.ndarray) -> float:
        log_q = log_softmax(1.5 * np.tanh((student + bias) / 1.5))
        log_p = log_softmax(teacher)
        return -log_q[range(3), labels].sum() + np.sum(np.exp(log_p) * (log_p - log_q))

    (found, _), (_, gradient) = chunked(hidden, head)
    np.testing.assert_allclose(found, value(student, bias), rtol=1e-5)
    for where in [(0, 0), (1, 4), (2, 7)]:
        step = np.zeros_like(student)
        step[where] = 1e-5
        slope = (value(student + step, bias) - value(student - step, bias)) / 2e-5
        np.testing.assert_allclose(gradient.kernel[where], slope, rtol=1e-4, atol=1e-6)
    step = 1e-5 * (np.arange(V) == 4)
    slope = (value(student, bias + step) - value(student, bias - step)) / 2e-5
    np.testing.assert_allclose(gradient.bias[4], slope, rtol=1e-4)
    assert gradient.softcap == 0


@pytest.mark.parametrize("shards", [1, 8])
def test_padding_columns_are_no_tokens(shards: int, devices: list[jax.Device]) -> None:
    """Whatever stands there, and however many there are in either head."""
    rng = np.random.default_rng(1)
    student, teacher = rng.normal(size=(2, 4, 10))
    labels = np.array([0, 4, 9, 9])
    expected = nats_of(*logits_problem(student, [teacher], labels))
    wide, wider = (
        np.pad(x, ((0, 0), (0, n)), constant_values=50.0) for x, n in ((student, 3), (teacher, 7))
    )
    head, inputs = logits_problem(wide, [wider], labels)
    mesh = make_mesh(1, 1, shards, devices=devices[:shards])

    @jax.jit
    def nats(head: Head, inputs: LossInputs) -> Any:
        plan = ChunkPlan(tokens=2, vocab_size=10)
        axes: Any = {"mesh": mesh, "data_axes": DATA_AXES, "vocab_axis": VOCAB_AXIS}
        return sharded_objective(selectors(4), head, inputs, DDK, plan, **axes)[1]

    np.testing.assert_allclose(nats(head, inputs)[:, :, 0], expected, rtol=1e-5)
    same_width, inputs = logits_problem(wide, [np.pad(teacher, ((0, 0), (0, 3)))], labels)
    np.testing.assert_allclose(nats_of(same_width, inputs, vocab_size=10), expected, rtol=1e-5)


@pytest.mark.parametrize(("shards", "width"), [(1, 10), (4, 12)])
def test_heads_are_brought_to_one_width_once(
    shards: int, width: int, devices: list[jax.Device]
) -> None:
    mesh = make_mesh(1, 1, shards, devices=devices[:shards])
    align = partial(
        aligned_heads, plan=ChunkPlan(tokens=2, vocab_size=10), mesh=mesh, vocab_axis=VOCAB_AXIS
    )
    narrow, wide = (Head(jnp.ones((4, columns))) for columns in (13, 17))
    ours, (theirs,) = align(narrow, (wide,))
    assert ours.kernel.shape == theirs.kernel.shape == (4, width)
    # Later, as in every micro-batch, nothing is copied; a head as it was follows the others.
    copies = re.compile(r"\b(slice|pad)\[")
    assert not copies.search(str(jax.make_jaxpr(align)(ours, (theirs,))))
    again, _ = align(narrow, (theirs,))
    assert again.kernel.shape == (4, width)


def test_fit_cuts_and_pads_columns() -> None:
    head = Head(jnp.ones((2, 5)), jnp.arange(5.0))
    np.testing.assert_array_equal(fit(head, 3).bias, [0, 1, 2])
    np.testing.assert_array_equal(fit(head, 7).kernel[1], [1, 1, 1, 1, 1, 0, 0])
    assert fit(head, 5).kernel.shape == (2, 5)


@pytest.mark.slow
def test_a_mixture_of_teachers() -> None:
    rng = np.random.default_rng(2)
    student = rng.normal(size=(4, V))
    teachers = [rng.normal(size=(4, V)) for _ in range(3)]
    labels = np.array([0, 4, 10, 3])
    weights = np.array([[1, 2, 0, 5], [1, 0, 0, 5], [2, 2, 3, 0.0]])
    p = np.exp([log_softmax(t) for t in teachers])

    def kl(shares: np.ndarray) -> np.ndarray:
        mixed = np.einsum("mn,mnv->nv", shares / shares.sum(axis=0), p)
        return np.sum(mixed * (np.log(mixed) - log_softmax(student)), axis=1)

    given = logits_problem(student, teachers, labels, weights)
    np.testing.assert_allclose(nats_of(*given)[1], kl(weights), rtol=1e-5)
    nats = -np.log(p[:, range(4), labels])
    found = nats_of(*given, by_confidence=True)[1]
    np.testing.assert_allclose(found, kl(weights / (1 + nats)), rtol=1e-5)
    # Tokens that fill up the last chunk have no weight at all.
    filled = partial(chunked_objective, terms=DDK, plan=ChunkPlan(tokens=3))
    gradient = jax.grad(lambda h: filled(selectors(4), h, given[1])[0])(given[0])
    assert np.all(np.isfinite(gradient.kernel))
    # One teacher, or several copies of it, are the same; and so are weights of another scale.
    alone = nats_of(*logits_problem(student, teachers[:1], labels))[1]
    copies = nats_of(*logits_problem(student, teachers[:1] * 3, labels, weights))[1]
    np.testing.assert_allclose(copies, alone, rtol=1e-5)
    scaled = nats_of(*logits_problem(student, teachers, labels, weights * 7))[1]
    np.testing.assert_allclose(scaled, nats_of(*given)[1], rtol=1e-5)


@pytest.mark.parametrize(
    ("mib", "columns", "shards", "tokens"),
    [
        (1200.0, 151_936, 1, 2048),
        (600.0, 151_936, 1, 1024),
        (600.0, 151_936, 4, 2048),
        (1.0, 4096, 1, 64),
    ],
)
def test_chunks_fit_a_memory_budget(mib: float, columns: int, shards: int, tokens: int) -> None:
    assert chunk_tokens(mib, columns, shards) == tokens
    assert 4 * tokens * columns / shards <= mib * 2**20


# Sums that do not depend on the cut


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    p = problem(5, rows=4)
    p.mask[0], p.mask[2] = False, True  # uneven
    hidden, head, inputs = placed(p, DDK_KINDS)
    teacher = inputs.teacher
    assert teacher is not None

    def part(rows: slice) -> Any:
        cut = inputs._replace(
            teacher=teacher._replace(hidden=(teacher.hidden[0][rows],)),
            labels=inputs.labels[rows],
            role=inputs.role[rows],
            draw=inputs.draw[rows],
            scale=inputs.scale[:, rows],
        )
        return value_and_gradient(DDK, 4, hidden[rows], head, cut, jnp.asarray(np.float32(1)))

    (value, nats), (d_hidden, d_head) = part(slice(None))
    parts = [part(slice(0, 2)), part(slice(2, 4))]
    np.testing.assert_allclose(sum(x[0][0] for x in parts), value, rtol=1e-6)
    np.testing.assert_allclose(sum(x[1][1] for x in parts), d_head, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([x[0][1] for x in parts], axis=1), nats, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([x[1][0] for x in parts]), d_hidden, atol=1e-6)


def test_float32_sums_of_many_bfloat16_tokens() -> None:
    # 4096 tokens of log 8 each: a bfloat16 sum would stop growing long before the end.
    objective = (make_term("cross_entropy"),)

    @partial(jax.jit, compiler_options=EXACT)
    def value(ones: jax.Array) -> jax.Array:
        zeros = jnp.zeros((4, 1024, 2), jnp.bfloat16)
        inputs = inputs_of(None, ones, ones, jnp.ones((1, 4, 1024)), objective)
        head = Head(jnp.zeros((2, 8), jnp.bfloat16))
        return chunked_objective(zeros, head, inputs, objective, ChunkPlan(tokens=512))[0]

    found = value(np.ones((4, 1024), np.int32))
    np.testing.assert_allclose(found, 4096 * math.log(8), rtol=1e-6)


# What is computed and held


def every_equation(jaxpr: Any) -> Iterator[Any]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from every_equation(inner)


def products(function: Any, *args: Any) -> list[tuple[int, ...]]:
    """Shapes of the results of all matrix products."""
    found = every_equation(jax.make_jaxpr(function)(*args).jaxpr)
    return [e.outvars[0].aval.shape for e in found if e.primitive.name == "dot_general"]


def test_a_value_alone_costs_no_gradient_work() -> None:
    hidden, head, inputs = placed(problem(), DDK_KINDS)

    def value(hidden: jax.Array, head: jax.Array, plan: ChunkPlan = FOUR) -> Any:
        return chunked_objective(hidden, Head(head), inputs, DDK, plan)

    logits = [(4, V), (4, V)]  # student and teacher, one chunk
    assert products(value, hidden, head) == logits
    both = products(jax.value_and_grad(value, argnums=(0, 1), has_aux=True), hidden, head)
    assert sorted(both) == sorted([*logits, (4, E), (E, V)])
    frozen = partial(value, plan=ChunkPlan(tokens=4, head_gradient=False))
    hidden_only = products(jax.value_and_grad(frozen, has_aux=True), hidden, head)
    assert sorted(hidden_only) == sorted([*logits, (4, E)])


def test_logits_of_the_batch_never_exist() -> None:
    args = (*placed(problem(), KINDS), jnp.asarray(np.float32(1)))
    whole = B * T * V
    assert max(math.prod(x.shape) for x in jax.tree.leaves(args)) < whole  # or nothing is shown
    traced = value_and_gradient.trace(OBJECTIVE, 4, *args)
    program = traced.lower().compile()
    shapes = re.findall(r"\b(?:pred|[a-z]+\d+)\[([\d,]+)\]", program.as_text())
    largest = max(math.prod(map(int, shape.split(","))) for shape in shapes)
    assert 4 * V <= largest < whole
    for equation in every_equation(traced.jaxpr.jaxpr):
        assert all(math.prod(x.aval.shape) < whole for x in equation.outvars), equation


# Objective and sums


def test_make_term_binds_its_settings() -> None:
    term = make_term("forward_kl", weight=0.5, temperature=3.0, temperature_squared=True)
    step = jnp.int32(7)
    assert (term.name, term.roles, term.needs_teacher) == ("forward_kl", "all", True)
    np.testing.assert_allclose(temperatures((term,), step), [3.0])
    np.testing.assert_allclose(term_factors((term,), step), [4.5])
    assert needs_teacher(DDK)
    assert not needs_teacher((make_term("cross_entropy"),))
    assert make_term("cross_entropy", name="labels").name == "labels"


def test_weights_and_temperatures_follow_the_step() -> None:
    falling = make_term(
        "forward_kl",
        weight=lambda step: 2.0 / (1 + step.astype(jnp.float32)),
        temperature=constant(2.0),
    )
    rising = make_term(
        "forward_kl",
        weight=0.5,
        temperature=lambda step: 1.0 + step.astype(jnp.float32),
        temperature_squared=True,
    )
    terms = (falling, rising, make_term("cross_entropy", weight=3.0))
    for step, factors in ((0, [2.0, 0.5, 3.0]), (3, [0.5, 8.0, 3.0])):
        np.testing.assert_allclose(term_factors(terms, jnp.int32(step)), factors)
        np.testing.assert_allclose(temperatures(terms, jnp.int32(step)), [2.0, 1.0 + step, 1.0])


@pytest.mark.parametrize(
    ("loss", "settings", "message"),
    [
        ("cross_entropy", {"temperature": 2.0}, "cross_entropy has no temperature"),
        ("forward_kl", {"settings": {"beta": 0.5}}, "forward_kl has no setting 'beta'"),
        ("generalised_jsd", {"settings": {"beta": "a"}}, "beta = 'a' is not float"),
        ("generalised_jsd", {"settings": {"beta": 1.0}}, "beta"),
        ("bild", {"settings": {"k": 2.5}}, "k = 2.5 is not int"),
        ("spherical_kl", {"settings": {"scale": "student"}}, "scale = 'student' is not one of"),
        ("bild", {"settings": {"k": 2}}, "k"),
        ("bild", {"settings": {"lead": "pupil"}}, "lead = 'pupil' is not one of"),
    ],
)
def test_wrong_settings_of_a_loss_are_refused(
    loss: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_terms((make_term(loss, **settings),))


def test_as_many_candidates_as_there_are_tokens() -> None:
    objective = (make_term("top_k_kl", settings={"k": 1000}),)
    check_terms(objective)
    check_terms((make_term("spherical_kl", settings={"scale": 2.0}),))
    with pytest.raises(ValueError, match="1000"):
        check_terms(objective, vocab_size=257)


def test_term_weights_select_roles() -> None:
    role = jnp.array([[0, 1, 2, 2]], jnp.int32)
    weights = jnp.array([[1.0, 1.0, 0.0, 0.5]])
    terms = tuple(make_term("cross_entropy", roles=r) for r in ("all", "prompt", "response"))
    expected = [[[0, 1, 0, 0.5]], [[0, 1, 0, 0]], [[0, 0, 0, 0.5]]]
    np.testing.assert_array_equal(term_weights(terms, role, weights), expected)


nats_and_weights = st.tuples(
    hnp.arrays(np.float32, (4, 3), elements=st.floats(0, 100, width=32)),
    hnp.arrays(np.float32, (4, 3), elements=st.sampled_from([0.0, 0.5, 1.0])),
    hnp.arrays(np.int32, 4, elements=st.integers(0, 2)),
    st.sampled_from(GARBAGE),
)


sums_by_domain = jax.jit(partial(domain_sums, num_domains=3), compiler_options=EXACT)


@given(nats_and_weights)
@settings(max_examples=30)
def test_laws_of_the_sums(drawn: tuple[np.ndarray, np.ndarray, np.ndarray, float]) -> None:
    nats, weights, domain, garbage = drawn
    found = sums_by_domain(nats, weights, domain)
    # The absolute tolerances: XLA flushes denormal numbers to zero.
    for d in range(3):
        rows = domain == d
        np.testing.assert_allclose(found.count[d], weights[rows].sum(), rtol=1e-6)
        expected = np.sum(nats[rows].astype(np.float64) * weights[rows])
        np.testing.assert_allclose(found.total[d], expected, rtol=1e-5, atol=1e-30)
    dirty = np.where(weights > 0, nats, np.float32(garbage))
    again = sums_by_domain(dirty, weights, domain)
    np.testing.assert_array_equal(again.total, found.total)
    halves = [
        sums_by_domain(dirty[part], weights[part], domain[part])
        for part in (slice(0, 2), slice(2, 4))
    ]
    for one, two, whole in zip(*halves, found, strict=True):
        np.testing.assert_allclose(one + two, whole, rtol=1e-5, atol=1e-30)


def test_sums_of_bfloat16_are_float32() -> None:
    nats, weights = jnp.ones((4, 1024), jnp.bfloat16), jnp.ones((4, 1024))
    assert domain_sums(nats, weights, jnp.zeros(4, jnp.int32), 1).total[0] == 4096


# On a mesh

MESHES = {
    "one": (1, 1, 1),
    "data": (8, 1, 1),
    "all": (2, 2, 2),
    "two": (4, 1, 2),
    "tensor": (1, 1, 8),
}
WIDE = 48
"""A vocabulary that no other axis has the size of, and that 8 divides."""


def on_mesh(sizes: tuple[int, int, int], devices: list[jax.Device]) -> tuple[Answer, str]:
    """The answer, and the compiled program."""
    mesh = make_mesh(*sizes, devices=devices[: math.prod(sizes)])
    hidden, head, inputs = placed(problem(6, rows=8, vocab=WIDE, width=8), DDK_KINDS)

    def place(x: jax.Array, *axes: Any) -> jax.Array:
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    def place_head(x: jax.Array) -> jax.Array:
        shape = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.device_put(x, param_shardings(mesh, ("embed", "vocab"), shape))

    assert inputs.teacher is not None
    teacher = TeacherTargets(
        (place(inputs.teacher.hidden[0], DATA_AXES),),
        (Head(place_head(inputs.teacher.heads[0].kernel)),),
    )
    inputs = inputs._replace(
        teacher=teacher,
        labels=place(inputs.labels, DATA_AXES),
        role=place(inputs.role, DATA_AXES),
        draw=place(inputs.draw, DATA_AXES),
        scale=place(inputs.scale, None, DATA_AXES),
    )
    hidden, head = place(hidden, DATA_AXES), place_head(head)

    def objective(hidden: jax.Array, head: jax.Array, inputs: LossInputs) -> Any:
        return sharded_objective(
            hidden,
            Head(head),
            inputs,
            DDK,
            ChunkPlan(tokens=2),
            mesh=mesh,
            data_axes=DATA_AXES,
            vocab_axis=VOCAB_AXIS,
        )

    function = jax.jit(
        jax.value_and_grad(objective, argnums=(0, 1), has_aux=True),
        out_shardings=((None, None), (hidden.sharding, head.sharding)),
    )
    program = function.lower(hidden, head, inputs).compile(compiler_options=EXACT)
    (value, nats), gradients = program(hidden, head, inputs)
    return Answer(float(value), *map(np.asarray, (nats, *gradients))), program.as_text() or ""


@pytest.fixture(scope="module")
def on_meshes(devices: list[jax.Device]) -> dict[str, tuple[Answer, str]]:
    return {name: on_mesh(sizes, devices) for name, sizes in MESHES.items()}


def collectives(program: str, kinds: str) -> list[tuple[str, list[list[int]]]]:
    """The computation that holds it, and the shapes of the results, of every such collective."""
    found, computation = [], ""
    for line in program.splitlines():
        if line and not line[0].isspace() and "{" in line:
            computation = line.split()[1 if line.startswith("ENTRY") else 0]
        if match := re.match(rf"\s+(?:ROOT )?\S+ = (.+?) (?:{kinds})(?:-start)?\(", line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append((computation, [[int(n) for n in x.split(",") if n] for x in shapes]))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_sharded_equals_dense(name: str, on_meshes: dict[str, tuple[Answer, str]]) -> None:
    found, _ = on_meshes[name]
    check(found, dense(problem(6, rows=8, vocab=WIDE, width=8), DDK_KINDS), 1e-5)
    np.testing.assert_allclose(found.value, on_meshes["one"][0].value, rtol=1e-6)
    check(found, on_meshes["one"][0], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MESHES)
def test_the_vocabulary_stays_where_it_is(
    name: str, on_meshes: dict[str, tuple[Answer, str]]
) -> None:
    program = on_meshes[name][1]
    data, fsdp, tensor = MESHES[name]
    gathered = collectives(program, "all-gather|all-to-all|collective-permute|reduce-scatter")
    # What is gathered is the shard of each head that lies on other data shards, once.
    heads = [] if fsdp == 1 else [[E_T, WIDE // tensor], [8, WIDE // tensor]]
    assert sorted(shape for _, shapes in gathered for shape in shapes) == heads
    # The head's gradient is summed once, not for every chunk: in no other computation than ENTRY.
    of_head = [
        where
        for where, shapes in collectives(program, "all-reduce")
        if any(math.prod(shape) >= 8 * WIDE // tensor for shape in shapes)
    ]
    entry = re.search(r"^ENTRY (\S+)", program, re.MULTILINE)
    assert entry is not None
    assert of_head == ([] if data * fsdp == 1 else [entry[1]])
