"""Bi-directional logits difference (BiLD, arXiv 2406.13555).

Legend: N tokens of the chunk, V vocabulary, k leading entries.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddk_jax.losses.divergences import RULED_OUT, ChunkView, Scalar, exists, inverse_of, kl
from ddk_jax.losses.top_k import gather, top_k


def bild(
    view: ChunkView,
    *,
    temperature: Scalar = 1.0,
    k: int = 8,
    lead: Literal["both", "teacher", "student"] = "both",
) -> Float[Array, "N"]:
    """KL(P || Q) of softmaxed logit differences, summed over both choices of the leader, in nats.

    With the k largest logits of the leading model in descending order (ties: lowest id first),
    a the teacher's and b the student's logits at these entries, all over the temperature:

        P = softmax over m < n of a_m - a_n,    Q = softmax over m < n of b_m - b_n.

    The teacher comes first in the KL whoever leads; the two parts are the paper's t-LD and s-LD,
    equally weighted. No factor T^2. The gradient flows through the student's values, never through
    the choice of entries. A pair with an entry that either model rules out (-inf, `RULED_OUT`) is
    left out on both sides.

    The paper adds the `forward_kl` of prompt tokens at temperature 1, and no cross-entropy.

    Args:
      view: one chunk.
      temperature: of both models' differences; the paper's is 3.
      k: leading entries; at least 3, since the softmax of one pair is 1 whatever the logits are.
      lead: whose k largest logits count: "both" is t-LD + s-LD.
    """
    if k < 3:
        raise ValueError(f"bild: k must be at least 3, got {k}: fewer make no two pairs to compare")
    assert view.teacher_logits is not None
    leaders = {"teacher": view.teacher_logits, "student": view.student_logits}
    chosen = leaders.values() if lead == "both" else [leaders[lead]]
    ids = jnp.concatenate([top_k(leader, k, view.vocab_shards)[1] for leader in chosen], axis=1)
    # Of both choices at once: each gather has a scatter as its gradient.
    teacher, student = (gather(logits, ids, view.vocab_shards) for logits in leaders.values())
    parts = [slice(at, at + k) for at in range(0, ids.shape[1], k)]
    inverse = inverse_of(temperature)
    each = [_difference_kl(teacher[:, part], student[:, part], inverse) for part in parts]
    return jnp.sum(jnp.stack(each), axis=0)


def _difference_kl(
    teacher: Float[Array, "N k"], student: Float[Array, "N k"], inverse: Float[Array, ""]
) -> Float[Array, "N"]:
    """KL of the difference distributions over the pairs of some entries, in their given order."""
    there = exists(teacher) & exists(student)
    k = teacher.shape[1]
    rank = jnp.arange(k, dtype=jnp.int32)
    pairs = there[:, :, None] & there[:, None, :] & (rank[:, None] < rank[None, :])[None]

    def log_shares(values: Float[Array, "N k"]) -> Float[Array, "N pairs"]:
        # Before the difference: -inf less -inf is NaN.
        values = jnp.where(there, values.astype(jnp.float32), jnp.float32(0))
        differences = (values[:, :, None] - values[:, None, :]) * inverse
        kept = jnp.where(pairs, differences, jnp.float32(RULED_OUT))
        return jax.nn.log_softmax(kept.reshape(-1, k * k), axis=1)

    return kl(log_shares(teacher), log_shares(student))
