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
from jaxtyping import Array, Float

from ddk_jax.losses.chunked import ChunkPlan
from ddk_jax.losses.objective import make_term, temperatures, term_factors, term_weights
from ddk_jax.losses.sums import DomainSums, domain_sums
from ddk_jax.parallel.mesh import replicated
from ddk_jax.training.micro import (
    LABELS,
    Frozen,
    MicroLoss,
    Teachers,
    draws,
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

    The state is donated. Each term is averaged over its tokens in the whole batch, so the result
    does not depend on the cut into micro-batches or shards. A non-finite loss, gradient or update
    leaves parameters and optimizer state untouched and is counted.
    """
    objective = loss.objective

    def step(state: TrainState, frozen: Frozen, batch: Batch) -> tuple[TrainState, StepSums]:
        predicted_MBT = predicted(batch)
        weights_KMBT = term_weights(objective, batch.role[:, :, 1:], predicted_MBT)
        with_teacher_K = jnp.array([term.needs_teacher for term in objective])
        counted_KMBT = paired(batch)[None] | ~with_teacher_K[:, None, None, None]
        weights_KMBT = jnp.where(counted_KMBT, weights_KMBT, jnp.float32(0))
        counts_K = jnp.maximum(jnp.sum(weights_KMBT, axis=(1, 2, 3)), 1)
        factors_K = term_factors(objective, state.step) / counts_K
        temperatures_K = temperatures(objective, state.step)
        weights_MKBT = jnp.moveaxis(weights_KMBT, 1, 0)
        draws_MBT = draws(predicted_MBT.shape, state.step, seed)

        def micro_step(carry: Any, part: tuple[Batch, Array, Array]) -> tuple[Any, None]:
            micro, weights_KBT, draws_BT = part
            scale_KBT = weights_KBT * factors_K[:, None, None]
            inputs = label_inputs(micro, scale_KBT)
            inputs = inputs._replace(draw=draws_BT, temperature=temperatures_K)
            (value, nats_KBT), grads = jax.value_and_grad(loss, has_aux=True)(
                state.params, frozen, micro, inputs
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


def make_eval_step(models: Teachers, mesh: Mesh, *, num_domains: int, plan: ChunkPlan) -> EvalStep:
    """Jit `(params, batch) -> DomainSums`: cross-entropy on the labels, of a model or a mixture.

    `params` is a tuple, one tree for each model.
    """
    first, single = models.models[0], len(models.models) == 1
    terms = LABELS if single else (make_term("teacher_cross_entropy"),)

    def micro_sums(params: tuple[Any, ...], micro: Batch) -> DomainSums:
        weights_BT = predicted(micro)
        inputs = label_inputs(micro, weights_BT[None])
        made = teacher_forward(models, params, micro)
        if not single:
            inputs = inputs._replace(teacher=teacher_targets(models, params, made, micro))
        head = first.head(params[0])
        _, nats_KBT = on_mesh(made[0].hidden, head, inputs, terms, plan, mesh)
        return domain_sums(nats_KBT[0], weights_BT, micro.domain, num_domains)

    def step(params: Any, batch: Batch) -> DomainSums:
        zeros = jnp.zeros(num_domains, jnp.float32)

        def add(total: DomainSums, micro: Batch) -> tuple[DomainSums, None]:
            return jax.tree.map(jnp.add, total, micro_sums(params, micro)), None

        return jax.lax.scan(add, DomainSums(zeros, zeros), batch)[0]

    return jax.jit(step, out_shardings=replicated(mesh))


def make_comparison_step(loss: MicroLoss, *, num_domains: int) -> ComparisonStep:
    """Jit `(params, frozen, batch) -> DomainSums` of every term, [K, D]; no gradient is taken."""

    def step(params: Any, frozen: Frozen, batch: Batch) -> DomainSums:
        def micro_sums(micro: Batch) -> DomainSums:
            weights_KBT = term_weights(loss.objective, micro.role[:, 1:], predicted(micro))
            _, nats_KBT = loss(params, frozen, micro, label_inputs(micro, weights_KBT))
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
