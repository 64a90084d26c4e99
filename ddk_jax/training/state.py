"""What a training step reads and returns: the state, and the batch on the devices."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Int64

from ddk_jax.parallel.mesh import DATA_AXES, param_shardings, replicated


class TrainState(NamedTuple):
    """Everything that a step changes. Donated to the step, so never use one twice."""

    step: Int[Array, ""]
    """Finished steps, skipped ones included."""
    params: dict[str, Any]
    """`student`: float32 master weights; `objective`: learned parameters of loss terms."""
    opt_state: Any
    skipped: Int[Array, ""]
    """Steps whose update was not finite and was not applied."""
    skipped_in_a_row: Int[Array, ""]


class TeacherRows(NamedTuple):
    """The text of the rows in the tokens of a teacher with another vocabulary, U + 1 of them."""

    tokens: Int[Array, "M B U+1"]
    segment_ids: Int[Array, "M B U+1"]
    position: Int[Array, "M B T"]
    """Where in the teacher's row a predicting token has read the same text; -1: nowhere."""


class Batch(NamedTuple):
    """Rows on the devices, cut into M micro-batches of B rows; a row holds T + 1 tokens."""

    tokens: Int[Array, "M B T+1"]
    segment_ids: Int[Array, "M B T+1"]
    role: Int[Array, "M B T+1"]
    domain: Int[Array, "M B"]
    teacher: TeacherRows | None = None


class StepSums(NamedTuple):
    """What a step reports; K terms, D domains."""

    loss: Float[Array, ""]
    """The objective: weighted sum of the terms' means."""
    term_total: Float[Array, "K D"]
    """Nats of every term by domain."""
    term_count: Float[Array, "K D"]
    """Tokens of every term by domain."""
    tokens: Float[Array, "D"]
    """Predicted tokens by domain, whatever the terms make of them."""
    grad_norm: Float[Array, ""]
    """Global norm before clipping."""
    skipped: Int[Array, ""]
    """1 when the update was not finite and was not applied."""
    skipped_before: Int[Array, ""]
    """Updates that were not applied before this one."""
    skipped_in_a_row: Int[Array, ""]
    """Updates up to this one that were not applied since the last that was."""


def initial_state(
    student_params: Any, objective_params: Any, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step."""
    params = {"student": student_params, "objective": objective_params}

    def zero() -> Array:
        return jnp.zeros((), jnp.int32)

    return TrainState(zero(), params, optimizer.init(params), zero(), zero())


def state_shardings(mesh: Mesh, abstract: TrainState, student_axes: Any) -> TrainState:
    """Shardings of a state: parameters by their logical axes, their moments alike, the rest whole.

    Args:
      mesh: the mesh.
      abstract: shapes of the state.
      student_axes: logical axis names in the shape of the student's parameter tree.
    """
    whole = replicated(mesh)
    params = {
        "student": param_shardings(mesh, student_axes, abstract.params["student"]),
        "objective": jax.tree.map(lambda _: whole, abstract.params["objective"]),
    }
    structure = jax.tree.structure(abstract.params)

    def is_moment(node: Any) -> bool:
        return jax.tree.structure(node) == structure

    opt_state = jax.tree.map(
        lambda node: params if is_moment(node) else whole, abstract.opt_state, is_leaf=is_moment
    )
    return TrainState(
        step=cast(Any, whole),
        params=params,
        opt_state=opt_state,
        skipped=cast(Any, whole),
        skipped_in_a_row=cast(Any, whole),
    )


def place_batch(mesh: Mesh, micro_rows: int, *arrays: Any) -> Batch:
    """Cut host arrays `tokens, segment_ids, role, domain` into micro-batches and place them.

    Args:
      mesh: rows of each micro-batch are shared by its data axes.
      micro_rows: rows of a micro-batch; divides the number of rows.
      *arrays: row arrays in the order of `Batch`'s fields; the last is a tuple of them, or None.
        Where several processes have the devices, each needs its `local_rows` only: the others are
        there, so that every row has its place, and may hold anything.
    """
    sharding = _row_sharding(mesh)

    def place(rows: np.ndarray) -> Array:
        cut = rows.reshape(-1, micro_rows, *rows.shape[1:])
        return jax.make_array_from_process_local_data(sharding, cut, cut.shape)

    batch = Batch(*jax.tree.map(place, arrays))
    return batch if batch.teacher is None else batch._replace(teacher=TeacherRows(*batch.teacher))


def local_rows(mesh: Mesh, rows: int, micro_rows: int) -> Int64[np.ndarray, "local"]:
    """Numbers of those rows of a batch that lie on devices of this process, in order.

    Args:
      mesh: from `make_mesh`.
      rows: of the batch.
      micro_rows: rows of a micro-batch.
    """
    numbers = np.arange(rows, dtype=np.int64).reshape(-1, micro_rows)
    places = _row_sharding(mesh).addressable_devices_indices_map(numbers.shape)
    return np.unique(np.concatenate([numbers[place].reshape(-1) for place in places.values()]))


def _row_sharding(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec(None, DATA_AXES))
