"""Losses on hidden states and on queries, keys and values, per token like all others.

Every function takes the mask itself: it replaces what masked tokens hold before the first product,
because a learned map is shared by all tokens and 0 * NaN is NaN. A masked token's value is 0.
No gradient flows into anything of the teacher's. Values are float32.

Legend: n pairs of mapped layers, B rows, T tokens, S width of the student, U of the teacher, F of
the space that they are compared in, R relation heads, Q queries of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Mask: TypeAlias = Bool[Array, "B T"]
PerToken: TypeAlias = Float[Array, "B T"]


class LayerMap(NamedTuple):
    """Which layer of the student learns from which of the teacher, pair by pair."""

    student: tuple[int, ...]
    teacher: tuple[int, ...]


def evenly_spaced(student_layers: int, teacher_layers: int, pairs: int) -> LayerMap:
    """Hidden states at equal distances over the depth of both models, the last ones included.

    Pair i of n, from 1 on, is at the share i / n of both depths, rounded (halves up). The
    embeddings, hidden state 0, are left out. Less 1 they are the layers that lead to these states.

    Args:
      student_layers: of the whole student.
      teacher_layers: of the whole teacher.
      pairs: number of pairs, n.

    Raises:
      ValueError: a model has fewer layers than there shall be pairs.
    """
    fewest = min(student_layers, teacher_layers)
    if not 1 <= pairs <= fewest:
        raise ValueError(
            f"{pairs} pairs of layers: between {student_layers} layers of the student and "
            f"{teacher_layers} of the teacher there can be 1 to {fewest}"
        )

    def spaced(layers: int) -> tuple[int, ...]:
        return tuple((2 * i * layers + pairs) // (2 * pairs) for i in range(1, pairs + 1))

    return LayerMap(spaced(student_layers), spaced(teacher_layers))


def explicit_map(
    student: Sequence[int], teacher: Sequence[int], *, student_last: int, teacher_last: int
) -> LayerMap:
    """Check a map that somebody wrote.

    Args:
      student: of every pair, the student's index; they increase.
      teacher: the teacher's, likewise.
      student_last: largest index there is: the number of layers for hidden states, one less for
        queries, keys and values.
      teacher_last: the teacher's, likewise.

    Raises:
      ValueError: lists of different length or empty, an index out of range, twice, or out of order.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(
            f"student_layers = {list(student)} and teacher_layers = {list(teacher)}: name one "
            "layer of the teacher for every layer of the student, and at least one pair"
        )
    for name, chosen, last in (
        ("student_layers", student, student_last),
        ("teacher_layers", teacher, teacher_last),
    ):
        if wrong := [i for i in chosen if not 0 <= i <= last]:
            raise ValueError(f"{name} = {list(chosen)}: {wrong[0]} is not in 0 to {last}")
        if twice := [i for i in chosen if list(chosen).count(i) > 1]:
            raise ValueError(f"{name} = {list(chosen)}: {twice[0]} is there twice")
        if list(chosen) != sorted(chosen):
            raise ValueError(f"{name} = {list(chosen)}: write the pairs in increasing order")
    return LayerMap(tuple(student), tuple(teacher))


def initial_projections(
    key: Array, pairs: int, student_width: int, teacher_width: int
) -> Float[Array, "n S U"]:
    """Maps from the student's space to the teacher's: the identity where the widths agree.

    Otherwise a random map with orthonormal rows, which keeps lengths and angles; with orthonormal
    columns where the teacher's space is the smaller one.
    """
    if student_width == teacher_width:
        return jnp.tile(jnp.eye(student_width, dtype=jnp.float32), (pairs, 1, 1))
    return jax.random.orthogonal(key, student_width, (pairs,), jnp.float32, m=teacher_width)


def filtered(
    hidden: Float[Array, "n B T S"], filters: Float[Array, "n S F"], mask: Mask
) -> Float[Array, "n B T F"]:
    """Hidden states of every layer through the layer's filter; masked tokens are 0.

    The filters are used in the type of the hidden states, as a model's parameters are.
    """
    return jax.vmap(partial(_mapped, mask=mask))(hidden, filters).astype(hidden.dtype)


def filtered_readouts(
    hidden: Float[Array, "n B T S"],
    filters: Float[Array, "n S F"],
    mask: Mask,
    final_norm: Callable[[Float[Array, "B T F"]], Float[Array, "B T F"]],
    *,
    normed: Sequence[bool],
) -> Float[Array, "n B T F"]:
    """TED, stage 1 (arXiv 2210.01351): what a frozen LM head reads to predict from every layer.

    A filter learns what of its layer's state serves the task. The paper gives every layer a task
    head of its own; for language models that is a vocabulary of columns for each of them, so here
    all layers share the frozen final norm and head of one model, whose width is F. It may be the
    teacher's for the student too: then the filters of both lead to one space, as stage 2 needs.

    Args:
      hidden: of the chosen layers of the frozen model.
      filters: the learned filters.
      mask: tokens that count.
      final_norm: of the model whose head predicts.
      normed: of every layer, whether its hidden states are normed already, as the last ones are:
        they skip the norm. With the identity as their filter they predict what the model predicts.
    """
    outputs = filtered(hidden, filters, mask)
    read = [x if done else final_norm(x) for x, done in zip(outputs, normed, strict=True)]
    return jnp.stack(read)


def hidden_mse(
    student: Float[Array, "n B T S"],
    teacher: Float[Array, "n B T U"],
    mask: Mask,
    *,
    student_map: Float[Array, "n S F"] | None = None,
    teacher_map: Float[Array, "n U F"] | None = None,
) -> PerToken:
    """sum_l |h_student W_student - h_teacher W_teacher|^2 / (n F): a mean over layers and features.

    The loss of TinyBERT (arXiv 1909.10351) and MT-BERT (arXiv 2106.01023) on hidden states; with
    both maps, stage 2 of TED (arXiv 2210.01351). A weight that is quoted for a sum over features
    has to be F times larger here.

    Args:
      student: hidden states of the mapped layers.
      teacher: likewise.
      mask: tokens that count.
      student_map: learned projections, or TED's filters. None: the states as they are.
      teacher_map: frozen filters of the teacher, likewise.
    """

    def of_layer(student: Array, teacher: Array) -> PerToken:
        return jnp.mean(jnp.square(student - teacher), axis=-1)

    return _compared(of_layer, student, teacher, mask, student_map, teacher_map)


def hidden_cosine(
    student: Float[Array, "n B T S"],
    teacher: Float[Array, "n B T U"],
    mask: Mask,
    *,
    student_map: Float[Array, "n S F"] | None = None,
    teacher_map: Float[Array, "n U F"] | None = None,
) -> PerToken:
    """sum_l (1 - cos(h_student W_student, h_teacher W_teacher)) / n: from 0 to 2.

    The loss of DistilBERT (arXiv 1910.01108) on hidden states. Blind to their length; a vector
    shorter than 1e-8 counts as if it were that long. The arguments are those of `hidden_mse`.
    """

    def unit(x: Array) -> Array:
        square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(jnp.maximum(square, 1e-16))

    def of_layer(student: Array, teacher: Array) -> PerToken:
        return 1 - jnp.sum(unit(student) * unit(teacher), axis=-1)

    return _compared(of_layer, student, teacher, mask, student_map, teacher_map)


def relation_kl(
    student: tuple[Float[Array, "n B T _ _"], ...],
    teacher: tuple[Float[Array, "n B T _ _"], ...],
    segment_ids: Int[Array, "B T"],
    mask: Mask,
    *,
    relation_heads: int,
    block_tokens: int = 128,
) -> PerToken:
    """KL(teacher || student) between relations of tokens: MiniLMv2 (arXiv 2012.15828).

    A relation of a query token is softmax_s(x_t . x_s / sqrt(d)) over the tokens s that it sees,
    where x are the queries of all heads side by side, cut anew into `relation_heads` vectors of
    length d; or the keys, or the values. So numbers of heads and widths of the two models may
    differ. The mean is over relations, relation heads and layers. Unlike in the papers, whose
    models read in both directions, a token sees itself and what stands before it in its segment:
    the students here are causal.

    Args:
      student: queries, keys and values of the mapped layers, [n, B, T, heads, width]; heads and
        width may differ between them (grouped-query attention). Or fewer of them.
      teacher: likewise, in the same order.
      segment_ids: tokens see within equal ids; those with 0 are padding, which nobody sees. To
        hide other tokens altogether, give them the id 0.
      mask: query tokens that count; the others are still seen by later ones. What no token that
        counts can see has no influence.
      relation_heads: R; divides heads * width of everything that is compared.
      block_tokens: queries that are compared at one time: the memory is that of R * block_tokens *
        T scores for every row, and they are computed again for the gradient.

    Raises:
      ValueError: `relation_heads` does not divide what it must, or there is nothing to relate.
    """
    _check_relation_heads(relation_heads, student, teacher)
    queried = mask & (segment_ids > 0)
    index = jnp.arange(mask.shape[1], dtype=jnp.int32)
    later = index[None, :, None] >= index[None, None, :]
    sees = later & (segment_ids[:, :, None] == segment_ids[:, None, :])
    seen = jnp.any(sees & queried[:, :, None], axis=1)

    def of_layer(pair: tuple[Array, Array]) -> PerToken:
        heads = [_relation_heads(x, seen, relation_heads) for x in pair]
        return _relation(heads[0], heads[1], segment_ids, queried, block_tokens)

    relations = [
        jnp.mean(jax.lax.map(of_layer, (s, jax.lax.stop_gradient(t))), axis=0)
        for s, t in zip(student, teacher, strict=True)
    ]
    return jnp.mean(jnp.stack(relations), axis=0)


def _unmasked(x: Array, mask: Mask) -> Array:
    """The same with 0 for masked tokens."""
    return jnp.where(
        mask.reshape(*mask.shape, *(1 for _ in x.shape[2:])), x, jnp.zeros((), x.dtype)
    )


def _mapped(
    hidden: Float[Array, "B T S"], weights: Float[Array, "S F"] | None, mask: Mask
) -> Float[Array, "B T F"]:
    """Float32, of a product in the type of the hidden states."""
    hidden = _unmasked(hidden, mask)
    if weights is None:
        return hidden.astype(jnp.float32)
    return jnp.matmul(hidden, weights.astype(hidden.dtype), preferred_element_type=jnp.float32)


def _compared(
    of_layer: Callable[[Array, Array], PerToken],
    student: Array,
    teacher: Array,
    mask: Mask,
    student_map: Array | None,
    teacher_map: Array | None,
) -> PerToken:
    """Mean over the layers of a comparison of float32 vectors, one layer at a time."""

    @jax.checkpoint  # what is kept for the gradient is what is there anyway: the states
    def compare(layer: tuple[Array, Array, Array | None, Array | None]) -> PerToken:
        student, teacher, student_map, teacher_map = layer
        found = of_layer(_mapped(student, student_map, mask), _mapped(teacher, teacher_map, mask))
        return jnp.where(mask, found, jnp.float32(0))

    frozen = jax.lax.stop_gradient((teacher, teacher_map))
    layers = (student, frozen[0], student_map, frozen[1])
    return jnp.mean(jax.lax.map(compare, layers), axis=0)


def _check_relation_heads(
    relation_heads: int, student: tuple[Array, ...], teacher: tuple[Array, ...]
) -> None:
    widths = [math.prod(x.shape[-2:]) for x in (*student, *teacher)]
    if not widths:
        raise ValueError("no relations: give queries, keys or values")
    if relation_heads < 1 or any(width % relation_heads for width in widths):
        raise ValueError(
            f"relation_heads = {relation_heads}: must divide heads * width of all queries, keys "
            f"and values of both models, here {sorted(set(widths))}: take {math.gcd(*widths)} or "
            "a divisor of it"
        )


def _relation_heads(
    x: Float[Array, "B T heads width"], seen: Mask, relation_heads: int
) -> Float[Array, "B R T d"]:
    B, T = seen.shape
    return _unmasked(x, seen).reshape(B, T, relation_heads, -1).transpose(0, 2, 1, 3)


def _relation(
    student: Float[Array, "B R T d"],
    teacher: Float[Array, "B R T e"],
    segment_ids: Int[Array, "B T"],
    queried: Mask,
    block_tokens: int,
) -> PerToken:
    """The divergence of one relation in one layer, a block of queries at a time."""
    B, T = queried.shape
    size = min(block_tokens, T)
    num_blocks = -(-T // size)

    def blocks(x: Array, axis: int) -> Array:
        pad = [(0, 0)] * x.ndim
        pad[axis] = (0, num_blocks * size - T)
        x = jnp.pad(x, pad)
        x = x.reshape(*x.shape[:axis], num_blocks, size, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    keys = jnp.arange(T, dtype=jnp.int32)

    def log_relation(
        block: Float[Array, "B R Q w"], of: Array, seen: Bool[Array, "B Q T"]
    ) -> Array:
        scores = jnp.matmul(block, of.swapaxes(2, 3), preferred_element_type=jnp.float32)
        scores = jnp.where(seen[:, None], scores * of.shape[3] ** -0.5, jnp.float32(-1e30))
        return jax.nn.log_softmax(scores, axis=-1)

    @jax.checkpoint
    def compare(block: tuple[Array, Array, Array, Array, Array]) -> Float[Array, "B Q"]:
        ours, theirs, segments, position, counts = block
        causal = position[:, None] >= keys[None, :]
        seen = causal[None] & (segments[:, :, None] == segment_ids[:, None, :])
        log_p, log_q = log_relation(theirs, teacher, seen), log_relation(ours, student, seen)
        kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
        return jnp.where(counts, jnp.mean(kl, axis=1), jnp.float32(0))

    def hidden_where_not_queried(x: Array) -> Array:
        return jnp.where(queried[:, None, :, None], x, jnp.zeros((), x.dtype))

    found = jax.lax.map(
        compare,
        (
            blocks(hidden_where_not_queried(student), 2),
            blocks(hidden_where_not_queried(teacher), 2),
            blocks(segment_ids, 1),
            blocks(keys, 0),
            blocks(queried, 1),
        ),
    )
    return jnp.moveaxis(found, 0, 1).reshape(B, num_blocks * size)[:, :T]
