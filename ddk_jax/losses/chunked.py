"""LM heads and losses, a chunk of tokens at a time: `[B, T, V]` never exists.

The gradients of a chunk are taken while its logits are at hand, in the forward pass: recomputing
the logits in a backward pass would cost 0.6 of the head's work again, keeping them costs the memory
that this module is there to save. A call that asks for the value alone does no gradient work.

Legend: B rows, T tokens, E hidden, V vocabulary, K terms of the objective, N tokens of a chunk,
M = ceil(B T / N) chunks.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from ddk_jax.losses.divergences import ChunkView
from ddk_jax.losses.objective import Objective
from ddk_jax.losses.targets import TeacherTargets


class LossInputs(NamedTuple):
    """Everything that the loss reads and does not differentiate."""

    teacher: TeacherTargets | None
    labels: Int[Array, "B T"]
    role: Int[Array, "B T"]
    scale: Float[Array, "K B T"]
    """What a token's nats of each term add to the scalar; 0 masks the token out of the term."""


class _Chunk(NamedTuple):
    """The same, cut into chunks; stacked on a leading axis M outside the scan."""

    student_hidden: Float[Array, "*M N E"]
    teacher_hidden: Float[Array, "*M N E_t"] | None
    labels: Int[Array, "*M N"]
    role: Int[Array, "*M N"]
    scale: Float[Array, "*M K N"]


Result = tuple[Float[Array, ""], Float[Array, "K B T"]]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def chunked_objective(
    student_hidden: Float[Array, "B T E"],
    student_head: Float[Array, "E V"],
    inputs: LossInputs,
    terms: Objective,
    chunk: int,
) -> Result:
    """The scalar to minimise, and the nats of every token under every term.

    Only the scalar is differentiable, and only in the student's hidden states and head.

    Args:
      student_hidden: normed final hidden states, float32 or bfloat16.
      student_head: LM head, same type.
      inputs: teacher, labels, roles, and the scale of every token. A token whose scale is 0 in all
        terms has no influence: whatever its hidden states or logits hold, NaN included.
      terms: the objective.
      chunk: tokens whose logits exist at one time.

    Returns:
      sum over terms and tokens of scale * nats, float32; and the nats, float32, 0 where masked.
    """
    chunks = _cut(student_hidden, inputs, chunk)

    def body(total: Array, part: _Chunk) -> tuple[Array, Array]:
        student_logits, view = _logits(part, student_head, inputs.teacher)
        value, nats = _chunk_value(student_logits, view, part.scale, terms)
        return total + value, nats

    total, nats = jax.lax.scan(body, _zero_like_sum(inputs.scale), chunks)
    return total, _uncut(nats, inputs.scale.shape)


def _forward(
    student_hidden: Array, student_head: Array, inputs: LossInputs, terms: Objective, chunk: int
) -> tuple[Result, tuple[Array, Array]]:
    chunks = _cut(student_hidden, inputs, chunk)

    def body(carry: tuple[Array, Array], part: _Chunk) -> tuple[tuple[Array, Array], Any]:
        total, d_head = carry
        student_logits, view = _logits(part, student_head, inputs.teacher)
        (value, nats), d_logits = jax.value_and_grad(_chunk_value, has_aux=True)(
            student_logits, view, part.scale, terms
        )
        d_logits = d_logits.astype(student_head.dtype)
        d_hidden = d_logits @ student_head.T
        # Accumulated in float32 over the chunks: in training this is the head's gradient.
        hidden = _active(part, part.student_hidden)
        d_head = d_head + jnp.matmul(hidden.T, d_logits, preferred_element_type=jnp.float32)
        return (total + value, d_head), (nats, d_hidden)

    zero = _zero_like_sum(inputs.scale)
    no_gradient = jnp.zeros(student_head.shape, jnp.float32) + zero
    (total, d_head), (nats, d_hidden) = jax.lax.scan(body, (zero, no_gradient), chunks)
    B, T, E = student_hidden.shape
    d_hidden = d_hidden.reshape(-1, E)[: B * T].reshape(B, T, E)
    return (total, _uncut(nats, inputs.scale.shape)), (d_hidden, d_head.astype(student_head.dtype))


def _backward(
    terms: Objective, chunk: int, gradients: tuple[Array, Array], cotangents: Result
) -> tuple[Array, Array, None]:
    factor = cotangents[0]

    def scaled(gradient: Array) -> Array:
        return (gradient.astype(jnp.float32) * factor).astype(gradient.dtype)

    d_hidden, d_head = gradients
    return scaled(d_hidden), scaled(d_head), None


chunked_objective.defvjp(_forward, _backward)


def sharded_objective(
    student_hidden: Float[Array, "B T E"],
    student_head: Float[Array, "E V"],
    inputs: LossInputs,
    terms: Objective,
    chunk: int,
    *,
    mesh: Mesh,
    data_axes: tuple[str, ...],
) -> Result:
    """`chunked_objective` on a mesh whose `data_axes` share the rows.

    Each data shard scans its own tokens; the gradient of the head is summed over them once. (Left
    to the partitioner, a scan over chunks of a sharded token axis makes every replica do all the
    work.) Other axes of the mesh are left to the partitioner.
    """
    shared = tuple(axis for axis in data_axes if mesh.shape[axis] > 1)
    if not shared:  # XLA refuses a sum over one shard that leaves other axes to the partitioner
        return chunked_objective(student_hidden, student_head, inputs, terms, chunk)
    rows = PartitionSpec(shared)
    none = PartitionSpec()
    specs = LossInputs(
        teacher=None if inputs.teacher is None else TeacherTargets(hidden=rows, head=none),  # type: ignore[arg-type]
        labels=rows,  # type: ignore[arg-type]
        role=rows,  # type: ignore[arg-type]
        scale=PartitionSpec(None, shared),  # type: ignore[arg-type]
    )

    def local(hidden: Array, head: Array, shard: LossInputs) -> Result:
        # The head is the same on all data shards, its gradients are not: as a varying value its
        # cotangent is summed over the shards.
        varying = jax.lax.pcast(head, shared, to="varying")
        total, nats = chunked_objective(hidden, varying, shard, terms, chunk)
        return jax.lax.psum(total, shared), nats

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, none, specs),
        out_specs=(none, PartitionSpec(None, shared)),
        axis_names=set(shared),
    )(student_hidden, student_head, inputs)


def _cut(student_hidden: Array, inputs: LossInputs, chunk: int) -> _Chunk:
    """Flatten rows and tokens, pad with masked tokens, and stack chunks of equal size."""
    tokens = inputs.labels.size
    size = min(chunk, tokens)
    num_chunks = -(-tokens // size)

    def cut(x: Array, lead: int = 0) -> Array:
        x = x.reshape(*x.shape[:lead], tokens, *x.shape[lead + 2 :])
        pad = [(0, 0)] * x.ndim
        pad[lead] = (0, num_chunks * size - tokens)
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:lead], num_chunks, size, *x.shape[lead + 1 :])
        return jnp.moveaxis(x, lead, 0)

    teacher = inputs.teacher
    return _Chunk(
        student_hidden=cut(student_hidden),
        teacher_hidden=None if teacher is None else cut(jax.lax.stop_gradient(teacher.hidden)),
        labels=cut(inputs.labels),
        role=cut(inputs.role),
        scale=cut(inputs.scale, lead=1),
    )


def _active(part: _Chunk, values: Float[Array, "N any"]) -> Float[Array, "N any"]:
    """The same with masked tokens replaced by 0, before any product or softmax sees them.

    A mask on the loss alone would leave NaN in its gradients: 0 * NaN is NaN.
    """
    active = jnp.any(part.scale > 0, axis=0)[:, None]
    return jnp.where(active, values, jnp.zeros((), values.dtype))


def _logits(
    part: _Chunk, student_head: Array, teacher: TeacherTargets | None
) -> tuple[Array, ChunkView]:
    """Logits of both models for one chunk, float32."""

    def product(hidden: Array, head: Array) -> Array:
        return jnp.matmul(_active(part, hidden), head, preferred_element_type=jnp.float32)

    student_logits = product(part.student_hidden, student_head)
    teacher_logits = None
    if teacher is not None and part.teacher_hidden is not None:
        teacher_logits = product(part.teacher_hidden, jax.lax.stop_gradient(teacher.head))
        # Entries of the head that are -inf or NaN meet masked tokens too.
        teacher_logits = _active(part, teacher_logits)
    return student_logits, ChunkView(student_logits, teacher_logits, part.labels, part.role)


def _chunk_value(
    student_logits: Array, view: ChunkView, scale: Array, terms: Objective
) -> tuple[Array, Array]:
    """Scaled sum over terms and tokens of one chunk, and the nats [K, N]."""
    view = view._replace(student_logits=student_logits)
    nats = jnp.stack([term.term(view) for term in terms])
    nats = jnp.where(scale > 0, nats, jnp.float32(0))
    return jnp.sum(scale * nats), nats


def _uncut(nats: Array, shape: tuple[int, ...]) -> Array:
    """[M, K, N] back to [K, B, T]."""
    K, B, T = shape
    return jnp.moveaxis(nats, 1, 0).reshape(K, -1)[:, : B * T].reshape(K, B, T)


def _zero_like_sum(scale: Array) -> Array:
    """A float32 zero that varies over the same mesh axes as `scale`, as a scan's carry must."""
    return jnp.sum(scale * 0)
