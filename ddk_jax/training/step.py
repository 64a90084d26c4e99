"""The train step and the evaluation step: pure functions, jitted once, on one screen.

Legend: M micro-batches, B rows, T tokens, K terms, D domains, E hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from ddk_jax.losses.chunked import ChunkPlan
from ddk_jax.losses.objective import make_term, temperatures, term_factors, term_weights
from ddk_jax.losses.sums import DomainSums, domain_sums
from ddk_jax.losses.targets import Head
from ddk_jax.parallel.mesh import replicated
from ddk_jax.training.micro import (
    LABELS,
    Frozen,
    MicroLoss,
    Teachers,
    draws,
    gathered,
    label_inputs,
    on_mesh,
    paired,
    teacher_forward,
    teacher_targets,
)
from ddk_jax.training.state import Batch, StepSums, TrainState

TrainStep: TypeAlias = Callable[[TrainState, Frozen, Batch], tuple[TrainState, StepSums]]
EvalStep: TypeAlias = Callable[[Any, Batch], DomainSums]
ComparisonStep: TypeAlias = Callable[[Any, Frozen, Batch], DomainSums]


def make_train_step(
    loss: MicroLoss,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    num_domains: int,
    seed: int,
    state_shardings: TrainState,
) -> TrainStep:
    """Jit `(state, frozen, batch) -> (state, sums)`.

    The state is donated. Each term is averaged over its tokens in the whole batch (of each domain,
    where `frozen` weighs them), so the result does not depend on the cut into micro-batches or
    shards. A non-finite loss, gradient or update leaves parameters and optimizer state untouched
    and is counted.
    """
    objective = loss.objective

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepSums]:
        predicted_MBT = predicted(batch)
        weights_KMBT = term_weights(objective, batch.role[:, :, 1:], predicted_MBT)
        with_teacher_K = jnp.array([term.needs_teacher for term in objective])
        counted_KMBT = paired(batch)[None] | ~with_teacher_K[:, None, None, None]
        weights_KMBT = jnp.where(counted_KMBT, weights_KMBT, jnp.float32(0))
        factors_K = term_factors(objective, state.step)
        factors_KD = _token_factors(factors_K, weights_KMBT, batch.domain, frozen, num_domains)
        temperatures_K = temperatures(objective, state.step)
        weights_MKBT = jnp.moveaxis(weights_KMBT, 1, 0)
        draws_MBT = draws(predicted_MBT.shape, state.step, seed)
        heads = loss.heads(state.params, frozen)

        def micro_step(carry: Any, part: tuple[Batch, Array, Array]) -> tuple[Any, None]:
            micro, weights_KBT, draws_BT = part
            by_row = factors_KD if frozen.domain_weights is None else factors_KD[:, micro.domain]
            scale_KBT = weights_KBT * by_row[:, :, None]
            inputs = label_inputs(micro, scale_KBT)
            inputs = inputs._replace(draw=draws_BT, temperature=temperatures_K)
            (value, nats_KBT), grads = jax.value_and_grad(loss, has_aux=True)(
                state.params, frozen, micro, inputs, heads
            )
            sums = jax.vmap(lambda n, w: domain_sums(n, w, micro.domain, num_domains))(
                nats_KBT, weights_KBT
            )
            return jax.tree.map(jnp.add, carry, (value, grads, sums)), None

        zeros = jnp.zeros((len(objective), num_domains), jnp.float32)
        carry = (
            jnp.float32(0),
            jax.tree.map(jnp.zeros_like, state.params),
            DomainSums(zeros, zeros),
        )
        (value, grads, sums), _ = jax.lax.scan(micro_step, carry, (batch, weights_MKBT, draws_MBT))

        # Where the parameters are: moments and parameters would each be moved there otherwise.
        grads = jax.lax.with_sharding_constraint(grads, state_shardings.params)
        grad_norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integer counts
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.all(jnp.isfinite(jnp.stack([value, grad_norm, optax.tree.norm(updates)])))
        params = optax.apply_updates(state.params, updates)
        params, opt_state = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state),
            (state.params, state.opt_state),
        )
        skipped = jnp.int32(1) - finite.astype(jnp.int32)
        in_a_row = jnp.where(finite, jnp.int32(0), state.skipped_in_a_row + 1)
        rows_MB = jnp.sum(predicted_MBT, axis=2)
        tokens = jax.ops.segment_sum(rows_MB.reshape(-1), batch.domain.reshape(-1), num_domains)
        report = StepSums(
            value, sums.total, sums.count, tokens, grad_norm, skipped, state.skipped, in_a_row
        )
        skipped_so_far = state.skipped + skipped
        return TrainState(state.step + 1, params, opt_state, skipped_so_far, in_a_row), report

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, replicated(mesh)))


def _token_factors(
    factors_K: Float[Array, "K"],
    weights_KMBT: Float[Array, "K M B T"],
    domain_MB: Int[Array, "M B"],
    frozen: Frozen,
    num_domains: int,
) -> Float[Array, "K _"]:
    """What the nats of one token are multiplied by: [K, 1], or [K, D] if domains are weighted.

    The sum over the batch is then factor * (mean over its tokens), or factor * (sum over the
    domains of weight * mean over the domain's tokens); a domain without tokens adds nothing.
    """
    if frozen.domain_weights is None:
        counts_K = jnp.maximum(jnp.sum(weights_KMBT, axis=(1, 2, 3)), 1)
        return (factors_K / counts_K)[:, None]
    rows_KR = jnp.sum(weights_KMBT, axis=3).reshape(factors_K.size, -1)
    counts_DK = jax.ops.segment_sum(rows_KR.T, domain_MB.reshape(-1), num_domains)
    return factors_K[:, None] * frozen.domain_weights[None] / jnp.maximum(counts_DK.T, 1)


def make_eval_step(models: Teachers, mesh: Mesh, *, num_domains: int, plan: ChunkPlan) -> EvalStep:
    """Jit `(params, batch) -> DomainSums`: cross-entropy on the labels, of a model or a mixture.

    `params` is a tuple, one tree for each model.
    """
    single = len(models.models) == 1
    terms = LABELS if single else (make_term("teacher_cross_entropy"),)

    def micro_sums(params: tuple[Any, ...], heads: tuple[Head, ...], micro: Batch) -> DomainSums:
        weights_BT = predicted(micro)
        inputs = label_inputs(micro, weights_BT[None])
        made = teacher_forward(models, params, micro)
        if not single:
            inputs = inputs._replace(teacher=teacher_targets(models, heads, made, micro))
        _, nats_KBT = on_mesh(made[0].hidden, heads[0], inputs, terms, plan, mesh, heads[0])
        return domain_sums(nats_KBT[0], weights_BT, micro.domain, num_domains)

    def step(params: Any, batch: Batch) -> DomainSums:
        zeros = jnp.zeros(num_domains, jnp.float32)
        pairs = zip(models.models, params, strict=True)
        heads = tuple(gathered(model.head(each), mesh) for model, each in pairs)

        def add(total: DomainSums, micro: Batch) -> tuple[DomainSums, None]:
            return jax.tree.map(jnp.add, total, micro_sums(params, heads, micro)), None

        return jax.lax.scan(add, DomainSums(zeros, zeros), batch)[0]

    return jax.jit(step, out_shardings=replicated(mesh))


def make_comparison_step(loss: MicroLoss, *, num_domains: int) -> ComparisonStep:
    """Jit `(params, frozen, batch) -> DomainSums` of every term, [K, D]; no gradient is taken."""

    def step(params: Any, frozen: Frozen, batch: Batch) -> DomainSums:
        heads = loss.heads(params, frozen)

        def micro_sums(micro: Batch) -> DomainSums:
            weights_KBT = term_weights(loss.objective, micro.role[:, 1:], predicted(micro))
            inputs = label_inputs(micro, weights_KBT)
            _, nats_KBT = loss(params, frozen, micro, inputs, heads)
            return jax.vmap(lambda n, w: domain_sums(n, w, micro.domain, num_domains))(
                nats_KBT, weights_KBT
            )

        sums = jax.lax.map(micro_sums, batch)
        return jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)

    return jax.jit(step, out_shardings=replicated(loss.mesh))


def predicted(batch: Batch) -> Float[Array, "*M B T"]:
    """1 where token t + 1 is predicted from token t: same segment, and not padding."""
    segments = batch.segment_ids
    same = segments[..., 1:] == segments[..., :-1]
    return (same & (batch.role[..., 1:] > 0)).astype(jnp.float32)
