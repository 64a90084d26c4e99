"""LM heads and losses, a chunk of tokens at a time: `[B, T, V]` never exists.

The gradients of a chunk are taken while its logits are at hand, in the forward pass: recomputing
the logits in a backward pass would cost 0.6 of the head's work again, keeping them costs the memory
that this module is there to save. A call that asks for the value alone does no gradient work.

Legend: B rows, T tokens, E hidden, V vocabulary, K terms of the objective, N tokens of a chunk,
C = ceil(B T / N) chunks, M teachers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, UInt32

from ddk_jax.losses.divergences import ChunkView
from ddk_jax.losses.objective import Objective
from ddk_jax.losses.targets import Head, TeacherTargets, finish, fit, mixture


class LossInputs(NamedTuple):
    """Everything that the loss reads and does not differentiate."""

    teacher: TeacherTargets | None
    labels: Int[Array, "B T"]
    role: Int[Array, "B T"]
    draw: UInt32[Array, "B T"]
    """A number of its own for every token of the run: all randomness of a term is made from it."""
    scale: Float[Array, "K B T"]
    """What a token's nats of each term add to the scalar; 0 masks the token out of the term."""
    temperature: Float[Array, "K"]
    """Softmax temperature of every term; unused by terms that have none."""


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """How heads and losses are computed; static."""

    tokens: int
    """Tokens whose logits exist at one time."""
    vocab_size: int = 0
    """Tokens of the vocabulary; columns of the heads from there on are padding. 0: all of them."""
    teacher_vocab_size: int = 0
    """The same of the teacher, where it has a vocabulary of its own. 0: it shares the student's."""
    vocab_shards: int = 1
    """Devices that share the columns of the heads."""
    by_confidence: bool = False
    """Whether several teachers weigh by their confidence as well (`targets.mixture`)."""
    round_logits: bool = False
    """In training, keep the logits of bfloat16 models in bfloat16: they are needed again after the
    softmax, and are most of a chunk's memory. A value alone is never rounded."""
    head_gradient: bool = True
    """False where the student's head is frozen: its gradient is 0, and is not computed."""


def chunk_tokens(logits_mib: float, columns: int, vocab_shards: int = 1) -> int:
    """Tokens of a chunk whose float32 logits take at most `logits_mib` MiB on a device.

    A multiple of 128, the side of a matrix unit, if there are so many; at most 2,048, beyond which
    the heads' products are as fast as they get.

    Args:
      logits_mib: the budget, for one model.
      columns: of its head, over all devices.
      vocab_shards: devices that share them.
    """
    tokens = int(logits_mib * 2**20 / (4 * columns / vocab_shards))
    return max(1, min(tokens - tokens % 128 if tokens > 128 else tokens, 2048))


class _Chunk(NamedTuple):
    """The inputs of one chunk; stacked on a leading axis C outside the scan."""

    student_hidden: Float[Array, "*C N E"]
    teacher_hidden: tuple[Float[Array, "*C N _"], ...]
    teacher_weights: Float[Array, "*C M N"] | None
    labels: Int[Array, "*C N"]
    role: Int[Array, "*C N"]
    draw: UInt32[Array, "*C N"]
    scale: Float[Array, "*C K N"]


Result = tuple[Float[Array, ""], Float[Array, "K B T"]]


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def chunked_objective(
    student_hidden: Float[Array, "B T E"],
    student_head: Head,
    inputs: LossInputs,
    terms: Objective,
    plan: ChunkPlan,
) -> Result:
    """The scalar to minimise, and the nats of every token under every term.

    Only the scalar is differentiable, and only in the student's hidden states and head.

    Args:
      student_hidden: normed final hidden states, float32 or bfloat16.
      student_head: LM head, same type.
      inputs: teacher, labels, roles, and the scale of every token. A token whose scale is 0 in all
        terms has no influence: whatever its hidden states or logits hold, NaN included.
      terms: the objective.
      plan: size of the chunks, and what is special about the heads.

    Returns:
      sum over terms and tokens of scale * nats, float32; and the nats, float32, 0 where masked.
    """
    chunks = _cut(student_hidden, inputs, plan.tokens)

    def body(total: Array, part: _Chunk) -> tuple[Array, Array]:
        raw, view = _view(part, student_head, inputs.teacher, plan, kept=jnp.float32)
        value, nats = _chunk_value(raw, student_head, view, part, inputs, terms, plan)
        return total + value, nats

    total, nats = jax.lax.scan(body, _zero_like_sum(inputs.scale), chunks)
    return total, _uncut(nats, inputs.scale.shape)


def _forward(
    student_hidden: Array, student_head: Head, inputs: LossInputs, terms: Objective, plan: ChunkPlan
) -> tuple[Result, tuple[Array, Head]]:
    chunks = _cut(student_hidden, inputs, plan.tokens)
    kernel = student_head.kernel
    kept = None if plan.round_logits else jnp.float32

    def body(carry: tuple[Array, Any], part: _Chunk) -> tuple[tuple[Array, Any], Any]:
        total, d_head = carry
        raw, view = _view(part, student_head, inputs.teacher, plan, kept=kept)
        (value, nats), d_raw = jax.value_and_grad(_chunk_value, has_aux=True)(
            raw, student_head, view, part, inputs, terms, plan
        )
        d_hidden = d_raw.astype(kernel.dtype) @ kernel.T
        if plan.head_gradient:
            d_head = jax.tree.map(jnp.add, d_head, _head_gradient(part, d_raw, student_head))
        return (total + value, d_head), (nats, d_hidden)

    zero = _zero_like_sum(inputs.scale)
    # Accumulated in float32 over the chunks: in training this is the head's gradient.
    none = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32) + zero, student_head)
    (total, d_head), (nats, d_hidden) = jax.lax.scan(body, (zero, none), chunks)
    B, T, E = student_hidden.shape
    d_hidden = d_hidden.reshape(-1, E)[: B * T].reshape(B, T, E)
    d_head = jax.tree.map(lambda x, like: x.astype(like.dtype), d_head, student_head)
    return (total, _uncut(nats, inputs.scale.shape)), (d_hidden, d_head)


def _head_gradient(part: _Chunk, d_raw: Array, head: Head) -> Head:
    """What one chunk adds to the gradient of the student's head; a soft cap is not learned."""
    d_logits = d_raw.astype(head.kernel.dtype)
    hidden = _active(part, part.student_hidden)
    return Head(
        jnp.matmul(hidden.T, d_logits, preferred_element_type=jnp.float32),
        None if head.bias is None else jnp.sum(d_raw.astype(jnp.float32), axis=0),
        None if head.softcap is None else jnp.float32(0),
    )


def _backward(
    terms: Objective, plan: ChunkPlan, gradients: tuple[Array, Head], cotangents: Result
) -> tuple[Array, Head, None]:
    factor = cotangents[0]

    def scaled(gradient: Array) -> Array:
        return (gradient.astype(jnp.float32) * factor).astype(gradient.dtype)

    d_hidden, d_head = gradients
    return scaled(d_hidden), jax.tree.map(scaled, d_head), None


chunked_objective.defvjp(_forward, _backward)


def sharded_objective(
    student_hidden: Float[Array, "B T E"],
    student_head: Head,
    inputs: LossInputs,
    terms: Objective,
    plan: ChunkPlan,
    *,
    mesh: Mesh,
    data_axes: tuple[str, ...],
    vocab_axis: str,
    gathered: Head | None = None,
) -> Result:
    """`chunked_objective` on a mesh: `data_axes` share the rows, `vocab_axis` the heads' columns.

    Each data shard scans its own tokens; the gradient of the head is summed over them once. (Left
    to the partitioner, a scan over chunks of a sharded token axis makes every replica do all the
    work.) The vocabulary axis is left to the partitioner, which finds every device's columns.

    Args:
      student_hidden: as for `chunked_objective`, and so are the next four.
      student_head: likewise; what is differentiated.
      inputs: likewise.
      terms: likewise.
      plan: likewise.
      mesh: the devices.
      data_axes: see above.
      vocab_axis: see above.
      gathered: the student's head once more, with all rows on every data shard, where that was
        made ahead, for several calls. None: it is made here.
    """
    plan = replace(plan, vocab_shards=mesh.shape[vocab_axis])
    teacher = inputs.teacher
    theirs = () if teacher is None else teacher.heads
    whole, _ = aligned_heads(gathered or student_head, theirs, plan, mesh, vocab_axis)
    student_head, theirs = aligned_heads(student_head, theirs, plan, mesh, vocab_axis)
    if teacher is not None:
        teacher = teacher._replace(heads=theirs)
        inputs = inputs._replace(teacher=teacher)
    shared = tuple(axis for axis in data_axes if mesh.shape[axis] > 1)
    if not shared:  # XLA refuses a sum over one shard that leaves other axes to the partitioner
        return chunked_objective(student_hidden, student_head, inputs, terms, plan)
    rows, none = PartitionSpec(shared), PartitionSpec()
    by_row = PartitionSpec(None, shared)
    specs = LossInputs(
        teacher=None
        if teacher is None
        else TeacherTargets(
            hidden=jax.tree.map(lambda _: rows, teacher.hidden),
            heads=jax.tree.map(lambda _: none, teacher.heads),
            weights=jax.tree.map(lambda _: by_row, teacher.weights),
        ),
        labels=rows,  # type: ignore[arg-type]
        role=rows,  # type: ignore[arg-type]
        draw=rows,  # type: ignore[arg-type]
        scale=by_row,  # type: ignore[arg-type]
        temperature=none,  # type: ignore[arg-type]
    )

    def local(hidden: Array, head: Head, whole: Head, shard: LossInputs) -> Result:
        total, nats = chunked_objective(hidden, _stand_in(head, whole, shared), shard, terms, plan)
        return jax.lax.psum(total, shared), nats

    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, none, none, specs),
        out_specs=(none, by_row),
        axis_names=set(shared),
    )(student_hidden, student_head, jax.lax.stop_gradient(whole), inputs)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _stand_in(head: Head, whole: Head, shared: tuple[str, ...]) -> Head:
    """`whole`, the same head on all data shards, in the place of `head`, whose gradient it gets.

    The head is the same on all of them, its gradients are not: they are summed over the shards.
    """
    return jax.tree.map(lambda x: jax.lax.pcast(x, shared, to="varying"), whole)


def _stand_in_forward(head: Head, whole: Head, shared: tuple[str, ...]) -> tuple[Head, None]:
    return _stand_in(head, whole, shared), None


def _stand_in_backward(shared: tuple[str, ...], _: None, gradient: Head) -> tuple[Head, None]:
    return jax.tree.map(lambda x: jax.lax.psum(x, shared), gradient), None


_stand_in.defvjp(_stand_in_forward, _stand_in_backward)


def aligned_heads(
    student: Head, teachers: tuple[Head, ...], plan: ChunkPlan, mesh: Mesh, vocab_axis: str
) -> tuple[Head, tuple[Head, ...]]:
    """Heads over one vocabulary with the same columns, as many on every device of `vocab_axis`.

    What another width means is a copy of a whole head: to be made once, outside of a loop over
    micro-batches. Heads that are aligned come back as they are.
    """
    shards = mesh.shape[vocab_axis]

    def aligned(head: Head, tokens: int, others: tuple[Head, ...]) -> Head:
        widths = {other.kernel.shape[1] for other in others}
        width = head.kernel.shape[1]
        if len(widths) > 1 or width % shards:
            head = fit(head, -(-(tokens or min(widths)) // shards) * shards)
        if shards == 1:
            return head
        columns = NamedSharding(mesh, PartitionSpec(PartitionSpec.UNCONSTRAINED, vocab_axis))
        return head._replace(kernel=jax.lax.with_sharding_constraint(head.kernel, columns))

    if plan.teacher_vocab_size:
        ours = aligned(student, plan.vocab_size, (student,))
        return ours, tuple(aligned(h, plan.teacher_vocab_size, teachers) for h in teachers)
    together = (student, *teachers)
    ours, *theirs = (aligned(head, plan.vocab_size, together) for head in together)
    return ours, tuple(theirs)


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
    weights = None if teacher is None else teacher.weights
    return _Chunk(
        student_hidden=cut(student_hidden),
        teacher_hidden=()
        if teacher is None
        else tuple(cut(jax.lax.stop_gradient(hidden)) for hidden in teacher.hidden),
        teacher_weights=None if weights is None else cut(weights, lead=1),
        labels=cut(inputs.labels),
        role=cut(inputs.role),
        draw=cut(inputs.draw),
        scale=cut(inputs.scale, lead=1),
    )


def _active(part: _Chunk, values: Float[Array, "N any"]) -> Float[Array, "N any"]:
    """The same with masked tokens replaced by 0, before any product or softmax sees them.

    A mask on the loss alone would leave NaN in its gradients: 0 * NaN is NaN.
    """
    active = jnp.any(part.scale > 0, axis=0)[:, None]
    return jnp.where(active, values, jnp.zeros((), values.dtype))


def _view(
    part: _Chunk,
    student_head: Head,
    teacher: TeacherTargets | None,
    plan: ChunkPlan,
    *,
    kept: Any,
) -> tuple[Array, ChunkView]:
    """The student's product with its head, and all else that a term may see.

    The sums of a product are float32; `kept` is the type that it is kept in, None that of its
    factors.
    """

    def product(hidden: Array, head: Head) -> Array:
        return jnp.matmul(_active(part, hidden), head.kernel, preferred_element_type=kept)

    teacher_logits = None
    if teacher is not None:
        heads = jax.lax.stop_gradient(teacher.heads)
        size = plan.teacher_vocab_size or plan.vocab_size
        # Entries of the head that are -inf or NaN meet masked tokens too.
        all_logits = tuple(
            finish(_active(part, product(hidden, head)), head, size)
            for hidden, head in zip(part.teacher_hidden, heads, strict=True)
        )
        teacher_logits = all_logits[0]
        if part.teacher_weights is not None:
            teacher_logits = mixture(
                all_logits, part.teacher_weights, part.labels, by_confidence=plan.by_confidence
            )
    raw = product(part.student_hidden, student_head)
    view = ChunkView(raw, teacher_logits, part.labels, part.role, part.draw, plan.vocab_shards)
    return raw, view


def _chunk_value(
    raw: Array,
    head: Head,
    view: ChunkView,
    part: _Chunk,
    inputs: LossInputs,
    terms: Objective,
    plan: ChunkPlan,
) -> tuple[Array, Array]:
    """Scaled sum over terms and tokens of one chunk, and the nats [K, N]."""
    view = view._replace(student_logits=finish(raw, head, plan.vocab_size))
    nats = jnp.stack([t.nats(view, inputs.temperature[k]) for k, t in enumerate(terms)])
    nats = jnp.where(part.scale > 0, nats, jnp.float32(0))
    return jnp.sum(part.scale * nats), nats


def _uncut(nats: Array, shape: tuple[int, ...]) -> Array:
    """[C, K, N] back to [K, B, T]."""
    K, B, T = shape
    return jnp.moveaxis(nats, 1, 0).reshape(K, -1)[:, : B * T].reshape(K, B, T)


def _zero_like_sum(scale: Array) -> Array:
    """A float32 zero that varies over the same mesh axes as `scale`, as a scan's carry must."""
    return jnp.sum(scale * 0)
