"""The train step and the evaluation step, against float64 and against each other on meshes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from quick import QUICK

from ddk_jax.config import OptimConfig
from ddk_jax.losses.chunked import ChunkPlan
from ddk_jax.losses.objective import make_term
from ddk_jax.losses.targets import Head
from ddk_jax.models.collect import NOTHING, Collect, Collected
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import make_mesh, param_shardings
from ddk_jax.training.micro import Frozen, MicroLoss, Teachers
from ddk_jax.training.optimizer import make_optimizer
from ddk_jax.training.state import (
    Batch,
    StepSums,
    TrainState,
    initial_state,
    place_batch,
    state_shardings,
)
from ddk_jax.training.step import TrainStep, make_eval_step, make_train_step, predicted

R, T, V, E, D = 8, 6, 16, 8, 3
POISON = V - 1
"""A token that makes the gradient of one parameter of the `Bag` NaN; random rows have none."""
TEMPERATURE, KL_WEIGHT = 2.0, 0.2
OBJECTIVE = (
    make_term("cross_entropy"),
    make_term("forward_kl", weight=KL_WEIGHT, temperature=TEMPERATURE, roles="response"),
)
OPTIM = OptimConfig(
    learning_rate=1e-2,
    final_learning_rate=1e-3,
    warmup_steps=2,
    clip_norm=0.3,
    eps=1e-3,
    weight_decay=0.1,
)
STEPS = 5


class Rows(NamedTuple):
    """Host arrays in the order of `Batch`."""

    tokens: np.ndarray
    segment_ids: np.ndarray
    role: np.ndarray
    domain: np.ndarray


def random_rows(seed: int) -> Rows:
    """Rows of two segments, prompts and responses, and uneven padding; row 1 holds nothing."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, POISON, (R, T + 1)).astype(np.int32)
    ends = rng.integers(2, T + 2, R)
    ends[0], ends[1] = T + 1, 0
    starts = rng.integers(1, T, R)
    index = np.arange(T + 1)[None]
    text = index < ends[:, None]
    segments = np.where(text, 1 + (index >= starts[:, None]), 0).astype(np.int32)
    role = np.where(text, rng.integers(1, 3, (R, T + 1)), 0).astype(np.int32)
    return Rows(tokens, segments, role, rng.integers(0, D, R).astype(np.int32))


def recount(rows: Rows) -> np.ndarray:
    """[R, T] where the next token is predicted, one token at a time."""
    found = np.zeros((R, T), bool)
    for r in range(R):
        for t in range(T):
            same = rows.segment_ids[r, t + 1] == rows.segment_ids[r, t]
            found[r, t] = same and rows.role[r, t + 1] > 0
    return found


# A model small enough to differentiate by hand: hidden = table[token] * scale.


@jax.custom_vjp
def poisoned(x: jax.Array, poison: jax.Array) -> jax.Array:
    return x


poisoned.defvjp(
    lambda x, poison: (x, poison),
    lambda poison, d_x: (jnp.where(poison, jnp.float32(jnp.nan), d_x), None),
)


class Bag:
    """A model without context."""

    def apply(
        self,
        params: Any,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        collect: Collect = NOTHING,
    ) -> tuple[jax.Array, Collected]:
        scale = poisoned(params["scale"], jnp.any(tokens == POISON))
        none = jnp.zeros((0, *tokens.shape, 1))
        states = Collected(none, *(none[..., None],) * 3)
        return params["table"][tokens] * scale[None, None], states

    def final_norm(self, params: Any, x_BTE: jax.Array) -> jax.Array:
        return x_BTE

    def head(self, params: Any) -> Head:
        return Head(params["head"])


BAG_AXES = {"table": ("vocab_in", "embed"), "scale": ("norm",), "head": ("embed", "vocab")}


def bag_params(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = {"table": (V, E), "scale": (E,), "head": (E, V)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


class Expected(NamedTuple):
    loss: float
    term_total: np.ndarray
    term_count: np.ndarray
    tokens: np.ndarray
    gradients: dict[str, np.ndarray]


def dense(params: dict[str, np.ndarray], teacher: dict[str, np.ndarray], rows: Rows) -> Expected:
    """Loss, sums by domain, and gradients of the bag in float64, token by token."""
    mask = recount(rows)
    fits = np.stack([mask, mask & (rows.role[:, 1:] == 2)])
    counts = fits.sum(axis=(1, 2))
    totals, by_domain = np.zeros((2, D)), np.zeros((2, D))
    gradients = {name: np.zeros(x.shape) for name, x in params.items()}
    for r, t in np.argwhere(mask):
        token, label, d = rows.tokens[r, t], rows.tokens[r, t + 1], rows.domain[r]
        hidden = params["table"][token] * params["scale"]
        logits = hidden @ params["head"]
        teacher_logits = (teacher["table"][token] * teacher["scale"]) @ teacher["head"]
        log_q = log_softmax(logits)
        d_logits = np.exp(log_q) / counts[0]
        d_logits[label] -= 1 / counts[0]
        totals[0, d] -= log_q[label]
        by_domain[0, d] += 1
        if fits[1, r, t]:
            log_p, log_q = (log_softmax(x / TEMPERATURE) for x in (teacher_logits, logits))
            totals[1, d] += np.sum(np.exp(log_p) * (log_p - log_q))
            by_domain[1, d] += 1
            d_logits += KL_WEIGHT / counts[1] * (np.exp(log_q) - np.exp(log_p)) / TEMPERATURE
        d_hidden = params["head"] @ d_logits
        gradients["head"] += np.outer(hidden, d_logits)
        gradients["scale"] += params["table"][token] * d_hidden
        gradients["table"][token] += params["scale"] * d_hidden
    loss = float(np.sum(totals.sum(axis=1) / counts * [1, KL_WEIGHT]))
    tokens = np.array([mask[rows.domain == d].sum() for d in range(D)])
    return Expected(loss, totals, by_domain, tokens, gradients)


def adamw(history: list[dict[str, np.ndarray]], params: dict[str, np.ndarray]) -> dict[str, Any]:
    """The parameters after one more gradient, the last of `history`; moments are made afresh."""
    count = len(history)
    peak, final, warmup = OPTIM.learning_rate, OPTIM.final_learning_rate, OPTIM.warmup_steps
    done = max(count - warmup, 0) / (STEPS - warmup)
    falling = final + (peak - final) * (1 + math.cos(math.pi * done)) / 2
    rate = peak * count / warmup if count <= warmup else falling
    clipped = []
    for gradients in history:
        norm = math.sqrt(sum(np.sum(g**2) for g in gradients.values()))
        clipped.append({k: g * min(1, OPTIM.clip_norm / norm) for k, g in gradients.items()})
    after = {}
    for name, value in params.items():
        m = v = np.zeros(value.shape)
        for g in clipped:
            m = OPTIM.beta1 * m + (1 - OPTIM.beta1) * g[name]
            v = OPTIM.beta2 * v + (1 - OPTIM.beta2) * g[name] ** 2
        m, v = m / (1 - OPTIM.beta1**count), v / (1 - OPTIM.beta2**count)
        decay = 0.0 if name == "scale" else OPTIM.weight_decay
        after[name] = value - rate * (m / (np.sqrt(v) + OPTIM.eps) + decay * value)
    return after


# Harness


class Setting(NamedTuple):
    """A step with what it starts from."""

    step: TrainStep
    start: Callable[[], TrainState]
    teacher: Any
    place: Callable[..., Batch]


def setting(
    student: Any,
    axes: Any,
    params: Callable[[int], Any],
    teacher: Any,
    teacher_axes: Any,
    teacher_params: Callable[[int], Any],
    sizes: tuple[int, int, int],
    micro_rows: int,
) -> Setting:
    mesh = make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])
    optimizer = make_optimizer(OPTIM, STEPS, axes)

    def make() -> TrainState:
        with jax.numpy_dtype_promotion("standard"):
            return initial_state(jax.tree.map(jnp.asarray, params(0)), {}, optimizer)

    shardings = state_shardings(mesh, jax.eval_shape(make), axes)
    loss = MicroLoss(
        student=student,
        teachers=Teachers((teacher,), np.ones((D, 1))),
        objective=OBJECTIVE,
        plan=ChunkPlan(tokens=5),
        mesh=mesh,
    )
    step = make_train_step(loss, optimizer, mesh, num_domains=D, seed=0, state_shardings=shardings)
    frozen = teacher_params(1)
    shapes = jax.eval_shape(lambda: frozen)
    frozen = Frozen((jax.device_put(frozen, param_shardings(mesh, teacher_axes, shapes)),))

    def start() -> TrainState:
        return jax.device_put(make(), shardings)

    return Setting(step, start, frozen, partial(place_batch, mesh, micro_rows))


def quickly_compiled(made: Setting) -> Setting:
    args = made.start(), made.teacher, made.place(*random_rows(0))
    lowered = made.step.lower(*args)  # type: ignore[attr-defined]
    return made._replace(step=lowered.compile(compiler_options=QUICK))


def jitted_bag(micro_rows: int) -> Setting:
    model = Bag()
    return setting(model, BAG_AXES, bag_params, model, BAG_AXES, bag_params, (1, 1, 1), micro_rows)


@cache
def bag(micro_rows: int) -> Setting:
    return quickly_compiled(jitted_bag(micro_rows))


def run(where: Setting, batches: list[Rows]) -> tuple[Any, list[StepSums]]:
    state, sums = where.start(), []
    for rows in batches:
        state, report = where.step(state, where.teacher, where.place(*rows))
        sums.append(jax.device_get(report))
    return jax.device_get(state), sums


# Against the reference


def test_steps_equal_a_float64_reference() -> None:
    batches = [random_rows(seed) for seed in range(4)]
    state, sums = run(bag(4), batches)
    params = {name: x.astype(np.float64) for name, x in bag_params(0).items()}
    teacher = {name: x.astype(np.float64) for name, x in bag_params(1).items()}
    history = []
    for rows, found in zip(batches, sums, strict=True):
        expected = dense(params, teacher, rows)
        np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-5)
        np.testing.assert_allclose(found.term_total, expected.term_total, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(found.term_count, expected.term_count)
        np.testing.assert_array_equal(found.tokens, expected.tokens)
        norm = math.sqrt(sum(np.sum(g**2) for g in expected.gradients.values()))
        np.testing.assert_allclose(found.grad_norm, norm, rtol=1e-5)
        assert (found.skipped, found.skipped_before, found.skipped_in_a_row) == (0, 0, 0)
        history.append(expected.gradients)
        params = adamw(history, params)
    assert state.step == len(batches)
    for name, value in params.items():
        np.testing.assert_allclose(state.params["student"][name], value, rtol=1e-5, atol=1e-6)


def test_predicted_tokens() -> None:
    rows = random_rows(7)
    np.testing.assert_array_equal(predicted(Batch(*map(jnp.asarray, rows))), recount(rows))
    by_hand = Rows(
        np.zeros((1, 7), np.int32),
        np.array([[1, 1, 2, 2, 2, 0, 0]], np.int32),
        np.array([[1, 2, 1, 0, 2, 0, 0]], np.int32),
        np.zeros(1, np.int32),
    )
    # A new segment, a token without a role, and padding are not predicted.
    expected = [[1, 0, 0, 1, 0, 0]]
    np.testing.assert_array_equal(predicted(Batch(*map(jnp.asarray, by_hand))), expected)


@pytest.mark.parametrize("micro_rows", [4, 2])
def test_accumulation_does_not_change_the_step(micro_rows: int) -> None:
    # Row 0 is full, row 1 empty, the others are uneven: a mean of means would differ.
    batches = [random_rows(seed) for seed in (10, 11)]
    batches[1].role[2:7] = 0
    (state, sums), (cut_state, cut_sums) = run(bag(R), batches), run(bag(micro_rows), batches)
    for whole, cut in zip(sums, cut_sums, strict=True):
        for name in ("loss", "term_total", "grad_norm"):
            got, want = getattr(cut, name), getattr(whole, name)
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(cut.term_count, whole.term_count)
        np.testing.assert_array_equal(cut.tokens, whole.tokens)
    for got, want in zip(*map(jax.tree.leaves, (cut_state, state)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_a_batch_without_predicted_tokens_is_harmless() -> None:
    rows = random_rows(0)
    rows.role[:] = 0
    state, (sums,) = run(bag(R), [rows])
    assert sums.loss == sums.grad_norm == sums.skipped == 0
    for name in ("term_total", "term_count", "tokens"):
        np.testing.assert_array_equal(getattr(sums, name), 0)
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


# Updates that are not finite


def bits(tree: Any) -> list[bytes]:
    return [np.asarray(x).tobytes() for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("kind", ["teacher", "gradient"])
def test_an_update_that_is_not_finite_is_not_applied(kind: str) -> None:
    where = bag(4)
    good, bad, teacher = random_rows(1), random_rows(2), where.teacher
    if kind == "gradient":
        bad.tokens[0, 0] = POISON  # the loss stays finite
        broken = teacher
    else:
        broken = jax.device_put(
            Frozen(({**teacher.teachers[0], "head": np.full((E, V), np.nan, np.float32)},)),
            jax.tree.map(lambda x: x.sharding, teacher),
        )

    state, _ = where.step(where.start(), teacher, where.place(*good))
    before = bits((state.params, state.opt_state))
    for count in (1, 2):
        state, sums = where.step(state, broken, where.place(*bad))
        assert bits((state.params, state.opt_state)) == before
        assert (int(state.skipped), int(state.skipped_in_a_row)) == (count, count)
        assert int(state.step) == 1 + count
        assert int(sums.skipped) == 1
        assert (int(sums.skipped_before), int(sums.skipped_in_a_row)) == (count - 1, count)
        assert math.isfinite(sums.loss) == (kind == "gradient")
        assert not math.isfinite(sums.grad_norm)

    state, sums = where.step(state, teacher, where.place(*good))
    assert bits((state.params, state.opt_state)) != before
    assert (int(state.skipped), int(state.skipped_in_a_row)) == (2, 0)
    assert (int(sums.skipped), int(sums.skipped_in_a_row)) == (0, 0)
    # The same as if the bad steps had never been.
    clean, _ = run(where, [good, good])
    assert bits((state.params, state.opt_state)) == bits((clean.params, clean.opt_state))


# Buffers, transfers, compilations


def test_the_state_is_donated_and_nothing_is_moved_or_compiled_again() -> None:
    where = jitted_bag(4)
    state, _ = where.step(where.start(), where.teacher, where.place(*random_rows(0)))
    for seed in range(1, 4):
        old, batch = state, where.place(*random_rows(seed))
        with jax.transfer_guard("disallow"):
            state, sums = where.step(old, where.teacher, batch)
        assert all(x.is_deleted() for x in jax.tree.leaves(old))
        kept = (where.teacher, batch, state, sums)
        assert not any(x.is_deleted() for x in jax.tree.leaves(kept))
    assert where.step._cache_size() == 1  # type: ignore[attr-defined]


def test_the_guard_above_sees_host_arrays() -> None:
    where = bag(4)
    batch = jax.device_get(where.place(*random_rows(0)))
    state = where.start()
    with jax.transfer_guard("disallow"), pytest.raises(Exception, match="isallowed"):
        where.step(state, where.teacher, batch)


def test_micro_batches_keep_the_order_of_the_rows() -> None:
    rows = random_rows(3)
    mesh = make_mesh(2, 2, 2)
    batch = place_batch(mesh, 4, *rows)
    assert batch.tokens.shape == (2, 4, T + 1)
    for placed, host in zip(batch[:4], rows, strict=True):
        assert placed.sharding == NamedSharding(mesh, PartitionSpec(None, ("data", "fsdp")))
        assert placed.dtype == np.int32
        np.testing.assert_array_equal(np.asarray(placed).reshape(host.shape), host)


def test_moments_lie_where_their_parameters_lie() -> None:
    optimizer = make_optimizer(OPTIM, STEPS, BAG_AXES)
    abstract = jax.eval_shape(lambda: initial_state(bag_params(0), {}, optimizer))
    found = state_shardings(make_mesh(2, 2, 2), abstract, BAG_AXES)
    assert jax.tree.structure(found) == jax.tree.structure(abstract)
    student = found.params["student"]
    assert student["head"].spec == PartitionSpec("fsdp", "tensor")

    def is_adam(node: Any) -> bool:
        return isinstance(node, optax.ScaleByAdamState)

    nodes: list[Any] = jax.tree.leaves(found.opt_state, is_leaf=is_adam)
    (adam,) = filter(is_adam, nodes)
    assert adam.mu == adam.nu == found.params
    assert adam.count.is_fully_replicated


# Decoders on meshes

TEACHER = Decoder(
    spec=ModelSpec(
        vocab_size=V,
        hidden_size=16,
        num_layers=1,
        num_heads=2,
        num_kv_heads=2,
        ffn_size=16,
        tied_head=False,
    )
)
STUDENT = Decoder(
    spec=ModelSpec(
        vocab_size=V, hidden_size=E, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=8
    )
)
MESHES = {"one": (1, 1, 1), "data": (8, 1, 1), "all": (2, 2, 2)}
BATCHES = [random_rows(seed) for seed in range(3)]


def decoder_params(decoder: Decoder, seed: int) -> Any:
    """Large enough that attention matters."""
    rng = np.random.default_rng(seed)

    def leaf(path: Any, x: Any) -> np.ndarray:
        mean = 1.0 if "norm" in jax.tree_util.keystr(path) else 0.0
        return rng.normal(mean, 0.3, x.shape).astype(np.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.abstract())


@cache
def decoders(name: str, dtype: Any = jnp.float32) -> Setting:
    mesh = make_mesh(*MESHES[name], devices=jax.devices()[: math.prod(MESHES[name])])
    made = setting(
        replace(STUDENT, dtype=dtype, mesh=mesh),
        STUDENT.logical_axes(),
        partial(decoder_params, STUDENT),
        replace(TEACHER, dtype=dtype, mesh=mesh),
        TEACHER.logical_axes(),
        partial(decoder_params, TEACHER),
        MESHES[name],
        R,
    )
    return quickly_compiled(made)


@cache
def decoder_run(name: str) -> tuple[Any, list[StepSums]]:
    return run(decoders(name), BATCHES)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MESHES if name != "one"])
def test_a_mesh_gives_what_one_device_gives(name: str) -> None:
    state, sums = decoder_run("one")
    found_state, found_sums = decoder_run(name)
    for got, want in zip(found_sums, sums, strict=True):
        np.testing.assert_allclose(got.loss, want.loss, rtol=1e-5)
        np.testing.assert_allclose(got.term_total, want.term_total, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(got.term_count, want.term_count)
        np.testing.assert_array_equal(got.tokens, want.tokens)
        np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=1e-4)
        assert want.grad_norm > 0.1
    for got, want in zip(*map(jax.tree.leaves, (found_state, state)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)


@pytest.mark.slow
def test_bfloat16_activations_train_float32_parameters() -> None:
    state, sums = decoder_run("one")
    found_state, found_sums = run(decoders("one", jnp.bfloat16), BATCHES)
    for got, want in zip(found_sums, sums, strict=True):
        np.testing.assert_allclose(got.loss, want.loss, rtol=5e-3)
        np.testing.assert_allclose(got.grad_norm, want.grad_norm, rtol=5e-2)
        assert got.loss != want.loss
    for got, want in zip(*map(jax.tree.leaves, (found_state, state)), strict=True):
        assert got.dtype == want.dtype


def test_what_stands_in_the_padding_has_no_influence() -> None:
    rng = np.random.default_rng(5)
    dirty = []
    for rows in BATCHES:
        noise = rng.integers(0, V, rows.tokens.shape).astype(np.int32)
        tokens = np.where(rows.segment_ids == 0, noise, rows.tokens)
        assert np.any(tokens != rows.tokens)
        dirty.append(rows._replace(tokens=tokens))
    state, sums = decoder_run("one")
    found_state, found_sums = run(decoders("one"), dirty)
    assert bits((found_state, found_sums)) == bits((state, sums))


# Evaluation


def test_evaluation_equals_a_recount() -> None:
    rows = random_rows(4)
    params = bag_params(0)
    models, plan = Teachers((Bag(),), np.ones((D + 1, 1))), ChunkPlan(tokens=3)
    step = make_eval_step(models, make_mesh(), num_domains=D + 1, plan=plan)
    placed = place_batch(make_mesh(), R, *rows)
    found = step((jax.tree.map(jnp.asarray, params),), placed)
    expected = dense(params, params, rows)
    np.testing.assert_allclose(found.total, [*expected.term_total[0], 0], rtol=1e-5)
    np.testing.assert_array_equal(found.count, [*expected.tokens, 0])
