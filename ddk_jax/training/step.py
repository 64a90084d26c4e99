"""The train step and the evaluation step: pure functions, jitted once, on one screen.

Legend: M micro-batches, B rows, T tokens, K terms, D domains, E hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ddk_jax.losses.chunked import LossInputs, sharded_objective
from ddk_jax.losses.objective import Objective, make_term, needs_teacher, term_weights
from ddk_jax.losses.sums import DomainSums, domain_sums
from ddk_jax.losses.targets import TeacherTargets
from ddk_jax.models.decoder import segment_positions
from ddk_jax.parallel.mesh import DATA_AXES, replicated
from ddk_jax.training.state import Batch, StepSums, TrainState

TrainStep: TypeAlias = Callable[[TrainState, Any, Batch], tuple[TrainState, StepSums]]
EvalStep: TypeAlias = Callable[[Any, Batch], DomainSums]


@runtime_checkable
class Model(Protocol):
    """What the steps need of a model, teacher or student."""

    def apply(
        self, params: Any, tokens: Array, segment_ids: Array, positions: Array
    ) -> tuple[Array, Any]:
        """Normed final hidden states [B, T, E]."""
        ...

    def head(self, params: Any) -> Array:
        """LM head [E, V]."""
        ...


def make_train_step(
    student: Model,
    teacher: Model | None,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    num_domains: int,
    chunk_tokens: int,
    state_shardings: TrainState,
) -> TrainStep:
    """Jit `(state, teacher_params, batch) -> (state, sums)`.

    The state is donated. Each term is averaged over its tokens in the whole batch, so the result
    does not depend on the cut into micro-batches or shards. A non-finite loss, gradient or update
    leaves parameters and optimizer state untouched and is counted.
    """

    def micro_loss(
        params: Any, teacher_params: Any, micro: Batch, scale: Float[Array, "K B T"]
    ) -> tuple[Array, Array]:
        hidden = _hidden(student, params["student"], micro)
        targets = None
        if teacher is not None and needs_teacher(objective):
            with jax.named_scope("teacher"):
                teacher_hidden = jax.lax.stop_gradient(_hidden(teacher, teacher_params, micro))
                targets = TeacherTargets(teacher_hidden, teacher.head(teacher_params))
        inputs = LossInputs(targets, micro.tokens[:, 1:], micro.role[:, 1:], scale)
        with jax.named_scope("loss"):
            return sharded_objective(
                hidden,
                student.head(params["student"]),
                inputs,
                objective,
                chunk_tokens,
                mesh=mesh,
                data_axes=DATA_AXES,
            )

    def step(state: TrainState, teacher_params: Any, batch: Batch) -> tuple[TrainState, StepSums]:
        predicted_MBT = predicted(batch)
        weights_KMBT = term_weights(objective, batch.role[:, :, 1:], predicted_MBT)
        counts_K = jnp.maximum(jnp.sum(weights_KMBT, axis=(1, 2, 3)), 1)
        factors_K = jnp.array([term.weight for term in objective], jnp.float32) / counts_K
        weights_MKBT = jnp.moveaxis(weights_KMBT, 1, 0)

        def micro_step(carry: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            micro, weights_KBT = part
            (loss, nats_KBT), grads = jax.value_and_grad(micro_loss, has_aux=True)(
                state.params, teacher_params, micro, weights_KBT * factors_K[:, None, None]
            )
            sums = jax.vmap(lambda n, w: domain_sums(n, w, micro.domain, num_domains))(
                nats_KBT, weights_KBT
            )
            return jax.tree.map(jnp.add, carry, (loss, grads, sums)), None

        zeros = jnp.zeros((len(objective), num_domains), jnp.float32)
        carry = (
            jnp.float32(0),
            jax.tree.map(jnp.zeros_like, state.params),
            DomainSums(zeros, zeros),
        )
        (loss, grads, sums), _ = jax.lax.scan(micro_step, carry, (batch, weights_MKBT))

        grad_norm = optax.tree.norm(grads)
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integer counts
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        finite = jnp.all(jnp.isfinite(jnp.stack([loss, grad_norm, optax.tree.norm(updates)])))
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
            loss, sums.total, sums.count, tokens, grad_norm, skipped, state.skipped, in_a_row
        )
        skipped_so_far = state.skipped + skipped
        return TrainState(state.step + 1, params, opt_state, skipped_so_far, in_a_row), report

    return jax.jit(step, donate_argnums=0, out_shardings=(state_shardings, replicated(mesh)))


def make_eval_step(model: Model, mesh: Mesh, *, num_domains: int, chunk_tokens: int) -> EvalStep:
    """Jit `(params, batch) -> DomainSums`: cross-entropy on the labels by domain."""
    objective = (make_term("cross_entropy"),)

    def micro_sums(params: Any, micro: Batch) -> DomainSums:
        weights_BT = predicted(micro)
        inputs = LossInputs(None, micro.tokens[:, 1:], micro.role[:, 1:], weights_BT[None])
        _, nats_KBT = sharded_objective(
            _hidden(model, params, micro),
            model.head(params),
            inputs,
            objective,
            chunk_tokens,
            mesh=mesh,
            data_axes=DATA_AXES,
        )
        return domain_sums(nats_KBT[0], weights_BT, micro.domain, num_domains)

    def step(params: Any, batch: Batch) -> DomainSums:
        zeros = jnp.zeros(num_domains, jnp.float32)

        def add(total: DomainSums, micro: Batch) -> tuple[DomainSums, None]:
            return jax.tree.map(jnp.add, total, micro_sums(params, micro)), None

        return jax.lax.scan(add, DomainSums(zeros, zeros), batch)[0]

    return jax.jit(step, out_shardings=replicated(mesh))


def predicted(batch: Batch) -> Float[Array, "*M B T"]:
    """1 where token t + 1 is predicted from token t: same segment, and not padding."""
    segments = batch.segment_ids
    same = segments[..., 1:] == segments[..., :-1]
    return (same & (batch.role[..., 1:] > 0)).astype(jnp.float32)


def _hidden(model: Model, params: Any, micro: Batch) -> Float[Array, "B T E"]:
    tokens, segments = micro.tokens[:, :-1], micro.segment_ids[:, :-1]
    return model.apply(params, tokens, segments, segment_positions(segments))[0]
