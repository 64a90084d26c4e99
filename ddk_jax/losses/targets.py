"""LM heads, and what teachers say about a batch, in the form that the loss machinery reads.

Legend: B rows, T tokens, E hidden, V vocabulary, N tokens of a chunk, M teachers.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ddk_jax.losses.divergences import RULED_OUT, ChunkView, cross_entropy


class Head(NamedTuple):
    """What turns normed final hidden states into logits: `softcap(hidden @ kernel + bias)`."""

    kernel: Float[Array, "E V"]
    bias: Float[Array, "V"] | None = None
    softcap: Float[Array, ""] | None = None
    """Logits are squeezed into (-softcap, softcap) by a tanh, as in Gemma 2; None: they are not."""


class TeacherTargets(NamedTuple):
    """Teachers that run live: their logits are made chunk by chunk, beside the student's.

    No gradient flows into any field.
    """

    hidden: tuple[Float[Array, "B T _"], ...]
    """Normed final hidden states of every teacher; each has its own width."""
    heads: tuple[Head, ...]
    """Their LM heads, over one vocabulary."""
    weights: Float[Array, "M B T"] | None = None
    """Weight of every teacher at every token; they need not add up to 1. None: a single teacher."""


def finish(raw: Float[Array, "N V"], head: Head, vocab_size: int) -> Float[Array, "N V"]:
    """Float32 logits out of `hidden @ kernel`: bias, soft cap, and padding columns ruled out.

    Args:
      raw: the product.
      head: its bias and soft cap.
      vocab_size: tokens of the vocabulary; columns from there on are padding. 0: all are tokens.
    """
    logits = raw.astype(jnp.float32)
    if head.bias is not None:
        logits = logits + head.bias.astype(jnp.float32)[None, :]
    if head.softcap is not None:
        cap = head.softcap.astype(jnp.float32)
        logits = cap * jnp.tanh(logits / cap)
    if vocab_size and vocab_size < logits.shape[1]:
        is_token = jnp.arange(logits.shape[1], dtype=jnp.int32) < vocab_size
        logits = jnp.where(is_token[None, :], logits, jnp.float32(RULED_OUT))
    return logits


def mixture(
    logits: tuple[Float[Array, "N V"], ...],
    weights: Float[Array, "M N"],
    labels: Int[Array, "N"],
    *,
    by_confidence: bool,
) -> Float[Array, "N V"]:
    """Log-probabilities of a mixture of teachers, log(sum_m w_m p_m): as good as logits to a loss.

    Args:
      logits: of every teacher, over one vocabulary.
      weights: of every teacher and token; normalised here over the teachers.
      labels: next tokens.
      by_confidence: divide a teacher's weight by 1 + its cross-entropy on the label in nats, so
        that teachers which are wrong here count less (MT-BERT, arXiv 2106.01023).
    """
    log_p = [jax.nn.log_softmax(z, axis=1) for z in logits]
    if by_confidence:
        is_label = jnp.arange(logits[0].shape[1], dtype=jnp.int32)[None, :] == labels[:, None]
        nats = [-jnp.sum(jnp.where(is_label, lp, jnp.float32(0)), axis=1) for lp in log_p]
        weights = weights / (1 + jnp.stack(nats))
    # Masked tokens may come without any weight; what they get must be finite, no more.
    weights = jnp.where(jnp.sum(weights, axis=0)[None, :] > 0, weights, jnp.float32(1))
    shares = weights / jnp.sum(weights, axis=0)[None, :]
    # A weight of 0 is log 0 = -inf, as it should be.
    log_shares = jnp.log(shares)
    mixed = log_p[0] + log_shares[0][:, None]
    for log_share, lp in zip(log_shares[1:], log_p[1:], strict=True):
        mixed = jnp.logaddexp(mixed, lp + log_share[:, None])
    return mixed


def teacher_cross_entropy(view: ChunkView) -> Float[Array, "N"]:
    """-log p[label] in nats: measures the teacher, or the mixture of teachers; teaches nothing."""
    assert view.teacher_logits is not None
    return cross_entropy(view._replace(student_logits=view.teacher_logits))


def clipped_excess(view: ChunkView) -> Float[Array, "N"]:
    """max(cross-entropy of the student - of the teacher, 0), in nats; it has no gradient.

    What DoReMi's weights of the domains follow, with the reference model as the teacher (arXiv
    2305.10429, algorithm 1): clipped at every token, before any mean is taken.
    """
    excess = cross_entropy(view) - teacher_cross_entropy(view)
    return jax.lax.stop_gradient(jnp.maximum(excess, jnp.float32(0)))


def fit(head: Head, width: int) -> Head:
    """The head with `width` columns: those beyond are cut off, missing ones are 0 (and ruled out).

    Models that share a tokenizer may pad their vocabularies to different sizes (Qwen2.5: 151,936
    and 152,064 columns for 151,665 tokens).
    """

    def resized(x: Array) -> Array:
        missing = width - x.shape[-1]
        if missing > 0:
            return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, missing)])
        return x[..., :width]

    bias = None if head.bias is None else resized(head.bias)
    return Head(resized(head.kernel), bias, head.softcap)
