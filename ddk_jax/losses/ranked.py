"""Losses that rank the vocabulary by probability, or compare two such rankings.

Legend: N tokens of the chunk, V vocabulary, V_t the teacher's; p, q and KL as in `divergences`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddk_jax.losses.divergences import ChunkView, Scalar, kl, log_probs, log_probs_of_both
from ddk_jax.losses.top_k import gather, most_probable, top_k, up_to_last


def adaptive_kl(
    view: ChunkView, *, temperature: Scalar = 1.0, mu: float = 0.5, candidates: int = 0
) -> Float[Array, "N"]:
    """With w the share of the head in what is missed: w KL(p || q) + (1 - w) KL(q || p), in nats.

    AKL (arXiv 2404.02657). The head is the longest run of the teacher's most probable entries
    (ties: lowest id first) that holds at most mu, but always the first; the entry with which it
    would cross mu is tail, like all after it, as in the authors' code. w is the part of
    sum_v |p_v - q_v| that lies in the head, at each token; no gradient flows through it.
    Infinite where `reverse_kl` is.

    With all candidates the vocabulary is sorted, and gathered if it is sharded.

    Args:
      view: one chunk.
      temperature: of both softmaxes.
      mu: mass of the head, in (0, 1).
      candidates: the head is sought among so many entries, all others are tail: exact as soon as
        they hold mu; 0: all of the vocabulary.
    """
    if not 0 < mu < 1:
        raise ValueError(f"adaptive_kl: mu must lie in (0, 1), got {mu}")
    assert view.teacher_logits is not None
    log_p, log_q = log_probs_of_both(view, temperature)
    ranking = most_probable(view.teacher_logits, temperature, candidates, view.vocab_shards)
    head = up_to_last(view.teacher_logits, ranking, jnp.cumsum(ranking.probabilities, axis=1) <= mu)
    gap = jax.lax.stop_gradient(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)))
    of_head = jnp.sum(jnp.where(head, gap, jnp.float32(0)), axis=1)
    of_all = jnp.sum(gap, axis=1)
    # Where p = q both KLs are 0, whatever their weights.
    w = jnp.where(of_all == 0, jnp.float32(0.5), of_head / of_all)
    return w * kl(log_p, log_q) + (1 - w) * kl(log_q, log_p)


def uld(view: ChunkView, *, temperature: Scalar = 1.0, candidates: int = 0) -> Float[Array, "N"]:
    """sum_i |p_(i) - q_(i)| over probabilities sorted in descending order, in [0, 2].

    Universal logit distillation (arXiv 2402.12030): the Wasserstein distance under a cost of 1
    between any two entries. The vocabularies may differ: the shorter vector is padded with zeros.
    It compares shapes only: right probabilities on wrong tokens cost nothing. Not nats. (The
    paper's is at temperature 1.)

    With all candidates both vocabularies are sorted, and gathered if they are sharded.

    Args:
      view: one chunk; teacher_logits may be of another width, V_t.
      temperature: of both softmaxes.
      candidates: compare so many entries one by one, and the mass of all others as one: a lower
        bound that tends to the whole; at most the smaller vocabulary. 0: all.
    """
    assert view.teacher_logits is not None

    def ranked(logits: Float[Array, "N any"]) -> Float[Array, "N c"]:
        log_q = log_probs(logits, temperature)
        _, ids = top_k(logits, candidates or logits.shape[1], view.vocab_shards)
        return jnp.exp(gather(log_q, ids, view.vocab_shards))

    p, q = ranked(view.teacher_logits), ranked(view.student_logits)
    width = max(p.shape[1], q.shape[1])
    p, q = (jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (p, q))
    distance = jnp.sum(jnp.abs(p - q), axis=1)
    # What the others hold differs by as much as what these hold, the other way round.
    return distance + jnp.abs(jnp.sum(p - q, axis=1)) if candidates else distance


def top_k_overlap(view: ChunkView, *, k: int = 8) -> Float[Array, "N"]:
    """Fraction of the teacher's k largest logits that are among the student's k largest, in [0, 1].

    BiLD (arXiv 2406.13555), overlap@k. A metric in the shape of a term: its gradient is 0.

    Args:
      view: one chunk.
      k: entries of each model (ties: lowest id first).
    """
    assert view.teacher_logits is not None
    both = (view.teacher_logits, view.student_logits)
    teacher, student = (top_k(logits, k, view.vocab_shards)[1] for logits in both)
    common = jnp.sum(teacher[:, :, None] == student[:, None, :], axis=(1, 2))
    return common.astype(jnp.float32) / k
