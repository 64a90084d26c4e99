"""Divergences over a part of the vocabulary that a live teacher chooses.

Four conventions of "top-k KL" are in use, and give four numbers. With K the kept entries,
P = sum of p over K and Q likewise of q, in nats:

    renormalise none             sum over K of p (log p - log q): can be negative, and is 0 at
                                 q = p only; the tail of the student is free
    renormalise none, tail       the same + (1 - P) (log(1 - P) - log(1 - Q)): a KL, exact for the
                                 distribution whose other entries are lumped together
    renormalise teacher          sum over K of p / P (log(p / P) - log q): not 0 at q = p
    renormalise both             the same with q / Q: blind to how much the student gives to K

What is kept is marked on the whole vocabulary, not gathered: so a term works on any sharding, its
gradient is elementwise, and masses of the tail are summed over the tail. (One minus the rest would
be noise where the head holds almost everything; and a temperature acts on the entries of the tail,
not on its mass.)

Legend: N tokens of the chunk, V vocabulary, T temperature; p, q and KL as in `divergences`.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from ddk_jax.losses.divergences import (
    RULED_OUT,
    ChunkView,
    Scalar,
    is_label,
    kl,
    log_probs_of_both,
)
from ddk_jax.losses.top_k import most_probable, top_k, up_to, up_to_last

Renormalise: TypeAlias = Literal["none", "teacher", "both"]
"""Whose probabilities are divided by their sum over the kept entries."""


def top_k_kl(
    view: ChunkView,
    *,
    temperature: Scalar = 1.0,
    k: int = 64,
    renormalise: Renormalise = "none",
    tail: bool = True,
) -> Float[Array, "N"]:
    """KL over the teacher's k most probable entries (ties: lowest id first), in nats.

    By default with an exact bucket for all others: tends to `forward_kl` as k -> V. Without it a
    top-k KL is biased ("Sparse Logit Sampling", arXiv 2503.16870).

    Args:
      view: one chunk.
      temperature: of both softmaxes, which are over the whole vocabulary.
      k: entries kept.
      renormalise: see the head of this module.
      tail: whether the entries that are not kept count, as one; only with `renormalise` none.
    """
    check_truncation("top_k_kl", renormalise, tail)
    assert view.teacher_logits is not None
    values, ids = top_k(view.teacher_logits, k, view.vocab_shards)
    kept = up_to(view.teacher_logits, values[:, -1], ids[:, -1])
    return kept_kl(view, kept, temperature, renormalise, tail)


def top_p_kl(
    view: ChunkView,
    *,
    temperature: Scalar = 1.0,
    p: float = 0.9,
    candidates: int = 0,
    renormalise: Renormalise = "none",
    tail: bool = True,
) -> Float[Array, "N"]:
    """KL over the fewest most probable entries of the teacher that hold at least the mass p.

    The entry that reaches p is kept. With all candidates the vocabulary is sorted, and gathered if
    it is sharded.

    Args:
      view: one chunk.
      temperature: of both softmaxes; the mass is that of the tempered teacher.
      p: in (0, 1).
      candidates: look no further than so many entries, and keep them all if they do not hold p;
        0: all of the vocabulary.
      renormalise: see the head of this module.
      tail: whether the entries that are not kept count, as one; only with `renormalise` none.
    """
    check_truncation("top_p_kl", renormalise, tail)
    if not 0 < p < 1:
        raise ValueError(f"top_p_kl: p must lie in (0, 1), got {p}; 1 would be forward_kl")
    assert view.teacher_logits is not None
    ranking = most_probable(view.teacher_logits, temperature, candidates, view.vocab_shards)
    before = jnp.cumsum(ranking.probabilities, axis=1) - ranking.probabilities
    kept = up_to_last(view.teacher_logits, ranking, before < p)
    return kept_kl(view, kept, temperature, renormalise, tail)


def bounded_kl(
    view: ChunkView,
    *,
    temperature: Scalar = 1.0,
    lower: float = 1e-4,
    upper: float = 1.0,
    keep_label: bool = True,
) -> Float[Array, "N"]:
    """KL over the entries whose teacher probability lies in [lower, upper], both renormalised.

    After the DAC-KL of "Multi-Granularity Semantic Revision" (arXiv 2407.10068), which has a small
    network predict the bounds for every token; here they are given, the same for all tokens. 0
    where nothing is kept.

    Args:
      view: one chunk.
      temperature: of both softmaxes; the bounds are of the tempered teacher.
      lower: smallest probability kept.
      upper: largest probability kept.
      keep_label: keep the label whatever its probability.
    """
    if not 0 <= lower < upper <= 1:
        raise ValueError(f"bounded_kl: 0 <= lower < upper <= 1 must hold, got {lower} and {upper}")
    log_p, _ = log_probs_of_both(view, temperature)
    kept = clip_teacher(log_p, lower, upper)
    kept = kept | is_label(view) if keep_label else kept
    return kept_kl(view, kept, temperature, "both", False)


# What the losses are made of


def clip_teacher(log_p: Float[Array, "N V"], lower: float, upper: float) -> Bool[Array, "N V"]:
    """Marks the entries whose probability lies in [lower, upper]; a NaN is kept, to be seen."""
    p = jnp.exp(log_p)
    return ~((p < lower) | (p > upper))


def kept_kl(
    view: ChunkView,
    kept: Bool[Array, "N V"],
    temperature: Scalar,
    renormalise: Renormalise,
    tail: bool,
) -> Float[Array, "N"]:
    """The KL over the kept entries under one of the four conventions."""
    log_p, log_q = log_probs_of_both(view, temperature)

    def mass(log_probs: Float[Array, "N V"], marked: Bool[Array, "N V"]) -> Float[Array, "N 1"]:
        inside = jnp.where(marked, log_probs, jnp.float32(RULED_OUT))
        return jax.nn.logsumexp(inside, axis=1, keepdims=True)

    head_p = log_p - mass(log_p, kept) if renormalise != "none" else log_p
    head_q = log_q - mass(log_q, kept) if renormalise == "both" else log_q
    head = kl(jnp.where(kept, head_p, jnp.float32(RULED_OUT)), head_q)
    return head + kl(mass(log_p, ~kept), mass(log_q, ~kept)) if tail else head


def check_truncation(loss: str, renormalise: Renormalise, tail: bool) -> None:
    """Refuses settings that contradict each other."""
    if tail and renormalise != "none":
        raise ValueError(
            f"{loss}: with renormalise {renormalise} nothing is left for the tail: set tail: false"
        )
