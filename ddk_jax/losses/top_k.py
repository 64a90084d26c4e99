"""The largest entries of a vocabulary that may lie on several devices, and values at given entries.

Everything works on the vocabulary cut into `shards` equal blocks, one a device, so that the
partitioner finds each block whole where it lies: only candidates and sums travel. With
`shards = 1` there is one block and nothing to gather.

The order of entries is everywhere the same: by value, descending, ties by the lowest id. (Other
implementations break ties otherwise; bfloat16 logits tie often.)

Legend: N tokens, V vocabulary, S shards, W = V / S entries of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from ddk_jax.losses.divergences import Scalar, softmax


def top_k(
    logits: Float[Array, "N V"], k: int, shards: int = 1
) -> tuple[Float[Array, "N k"], Int[Array, "N k"]]:
    """The k largest entries of every token in order, exactly. No gradient: see `gather`.

    Args:
      logits: any values; NaN counts as the largest.
      k: from 1 to V. At k = V this is a full sort, which gathers the vocabulary.
      shards: equal blocks of the vocabulary on different devices.

    Returns:
      values and ids.

    Raises:
      ValueError: k is not in 1..V.
    """
    V = logits.shape[1]
    if not 1 <= k <= V:
        raise ValueError(f"the {k} largest of {V} entries: must be from 1 to the vocabulary's size")
    logits = jax.lax.stop_gradient(logits)
    if shards == 1:
        return _top_k(logits, k)
    width = _width(V, shards)
    # Every block's own largest, then the largest of these. Candidates stand in the order of blocks
    # and, within a block, of the rule above: so the rule holds for the whole.
    values, ids = jax.lax.platform_dependent(
        _blocks(logits, shards),
        tpu=partial(_top_k, k=min(k, width)),
        default=partial(_top_k_by_sorting, k=min(k, width)),
    )
    ids = ids + _first_ids(shards, width)
    values, places = _top_k(values.reshape(logits.shape[0], -1), k)
    return values, jnp.take_along_axis(ids.reshape(logits.shape[0], -1), places, axis=1)


def up_to(
    logits: Float[Array, "N V"], value: Float[Array, "N"], entry: Int[Array, "N"]
) -> Bool[Array, "N V"]:
    """Marks the entries that do not come after a given one in the order; where NaN is, everything.

    With the last of a `top_k` these are the k largest, without a gather or a scatter.

    Args:
      logits: any values.
      value: logit of the last entry to mark.
      entry: id of that entry.
    """
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :]
    tie = (logits == value[:, None]) & (ids > entry[:, None])
    return ~((logits < value[:, None]) | tie)


class Ranking(NamedTuple):
    """The leading entries of every token, in order."""

    values: Float[Array, "N c"]
    """Their logits."""
    ids: Int[Array, "N c"]
    probabilities: Float[Array, "N c"]
    """Of the softmax over the whole vocabulary."""


def most_probable(
    logits: Float[Array, "N V"], temperature: Scalar, candidates: int, shards: int = 1
) -> Ranking:
    """The leading entries and what they hold. No gradient.

    Args:
      logits: of one model.
      temperature: of its softmax.
      candidates: number of entries; 0: all, a full sort, which gathers the vocabulary.
      shards: equal blocks of the vocabulary on different devices.
    """
    logits = jax.lax.stop_gradient(logits)
    values, ids = top_k(logits, candidates or logits.shape[1], shards)
    return Ranking(values, ids, jnp.exp(softmax(logits, temperature).log_prob(values)))


def up_to_last(
    logits: Float[Array, "N V"], ranking: Ranking, wanted: Bool[Array, "N c"]
) -> Bool[Array, "N V"]:
    """Marks the entries of a ranking that are wanted, and the first of them in any case.

    Args:
      logits: what the ranking is of.
      ranking: from `most_probable`.
      wanted: True for a number of leading entries.
    """
    last = jnp.maximum(jnp.sum(wanted, axis=1, keepdims=True) - 1, 0)
    value, entry = (jnp.take_along_axis(x, last, axis=1)[:, 0] for x in ranking[:2])
    return up_to(logits, value, entry)


def gather(
    logits: Float[Array, "N V"], ids: Int[Array, "N k"], shards: int = 1
) -> Float[Array, "N k"]:
    """logits[n, ids[n, i]], differentiable in the logits; an id may appear repeatedly.

    Args:
      logits: any values.
      ids: in [0, V).
      shards: equal blocks of the vocabulary on different devices.
    """
    width = _width(logits.shape[1], shards)
    local = ids[:, None, :] - _first_ids(shards, width)
    inside = (local >= 0) & (local < width)
    # One block of all holds the id; the others give 0 to the sum, and take 0 from its gradient.
    taken = _per_block(_take)(_blocks(logits, shards), jnp.clip(local, 0, width - 1))
    return jnp.sum(jnp.where(inside, taken, jnp.zeros((), logits.dtype)), axis=1)


def members(ids: Int[Array, "N k"], vocabulary: int, shards: int = 1) -> Bool[Array, "N V"]:
    """Marks the given entries; ids outside of [0, V) mark nothing.

    Args:
      ids: entries of every token.
      vocabulary: V.
      shards: equal blocks of the vocabulary on different devices.
    """
    width = _width(vocabulary, shards)
    local = ids[:, None, :] - _first_ids(shards, width)
    inside = (local >= 0) & (local < width)

    def mark(local: Int[Array, "k"]) -> Bool[Array, "W"]:
        return jnp.zeros(width, bool).at[local].set(True, mode="drop")

    marked = _per_block(mark)(jnp.where(inside, local, width))
    return marked.reshape(ids.shape[0], vocabulary)


def search(
    steps: Int[Array, "N V"], positions: Int[Array, "N k"], shards: int = 1
) -> Int[Array, "N k"]:
    """The entry in whose interval a position falls, where entry v has the length steps[v].

    The inverse of a cumulative distribution, in whole numbers: exact and the same for any number of
    shards.

    Args:
      steps: lengths, at least 0; their sum is below 2^31.
      positions: in [0, sum of the lengths).
      shards: equal blocks of the vocabulary on different devices.

    Returns:
      ids; an entry of length 0 is never among them.
    """
    V = steps.shape[1]
    blocks = _blocks(steps, shards)
    lengths = jnp.sum(blocks, axis=2)
    local = positions[:, None, :] - (jnp.cumsum(lengths, axis=1) - lengths)[:, :, None]
    inside = (local >= 0) & (local < lengths[:, :, None])

    found = _per_block(_bisect)(jnp.cumsum(blocks, axis=2), local)
    found = found + _first_ids(shards, _width(V, shards))
    return jnp.sum(jnp.where(inside, found, jnp.int32(0)), axis=1)


def _width(vocabulary: int, shards: int) -> int:
    assert vocabulary % shards == 0, f"{vocabulary} entries do not make {shards} equal blocks"
    return vocabulary // shards


def _blocks(values: Array, shards: int) -> Array:
    """[N, V] as [N, S, W]."""
    return values.reshape(values.shape[0], shards, -1)


def _first_ids(shards: int, width: int) -> Int[Array, "1 S 1"]:
    return (jnp.arange(shards, dtype=jnp.int32) * width)[None, :, None]


def _per_block(function: Callable[..., Array]) -> Callable[..., Array]:
    """Of one token and one block, mapped over N and S: axes that the partitioner can tell apart."""
    return jax.vmap(jax.vmap(function))


def _take(values: Shaped[Array, "W"], ids: Int[Array, "k"]) -> Shaped[Array, "k"]:
    return values.at[ids].get(mode="promise_in_bounds")


def _top_k(values: Float[Array, "*axes W"], k: int) -> tuple[Array, Array]:
    values, ids = jax.lax.top_k(values, k)  # a list
    # Where only the last entry is read, XLA's CPU compiler makes a full sort of it.
    return jax.lax.optimization_barrier((values, ids))


def _top_k_by_sorting(blocks: Float[Array, "N S W"], k: int) -> tuple[Array, Array]:
    """The same, slower, for partitioners that gather the operand of a `top_k`, as the CPU's does.

    A sort along one axis leaves the others where they lie everywhere.
    """
    ids = jax.lax.broadcasted_iota(jnp.int32, blocks.shape, 2)
    keys = jnp.where(jnp.isnan(blocks), -jnp.inf, -blocks)  # NaN first, as in a top_k
    keys, ids = jax.lax.sort((keys, ids), num_keys=1, is_stable=True)
    return -keys[..., :k], ids[..., :k]


def _bisect(ends: Int[Array, "W"], positions: Int[Array, "k"]) -> Int[Array, "k"]:
    """How many of the ascending `ends` are at most the position."""
    (width,) = ends.shape
    found = positions * 0
    for power in reversed(range(width.bit_length())):
        further = found + 2**power
        end = _take(ends, jnp.minimum(further, width) - 1)
        found = jnp.where((further <= width) & (end <= positions), further, found)
    return found
