"""Divergences between teacher and student over the whole vocabulary, for one chunk of tokens.

A term maps a `ChunkView` to nats per token. It never masks, reduces, chunks or stops gradients
into the teacher: the machinery in `chunked` does, for every term alike. Softmaxes and sums are
float32; no loss here has a factor T^2 (the objective's `temperature_squared` puts it on).

Legend: N tokens of the chunk, V vocabulary, T temperature.
p = softmax(z_teacher / T), q = softmax(z_student / T), KL(a || b) = sum_v a_v (log a_v - log b_v).

What holds for every divergence here, unless it says otherwise: an entry that the teacher rules out
(-inf) is an entry with p = 0; an entry that is `RULED_OUT` in both models has no influence on value
or gradient; a KL is +inf, and never NaN, where its second argument is 0 and its first is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

RULED_OUT = -1e30
"""Logit of an entry that does not exist: padding of the heads up to a multiple of the sharding.

Its softmax is exactly 0, and unlike -inf it stays 0 in a product with a finite number.
"""


class ChunkView(NamedTuple):
    """What a term may look at. Masked tokens arrive with all logits 0."""

    student_logits: Float[Array, "N V"]
    teacher_logits: Float[Array, "N V_t"] | None
    """None when no term of the objective asks for a teacher. V_t is V but for the losses across
    vocabularies, which say so. Of a mixture of teachers: its log-probabilities."""
    labels: Int[Array, "N"]
    role: Int[Array, "N"]
    """Role of the label: 1 text or prompt, 2 response."""
    draw: UInt32[Array, "N"]
    """A number of its own for every token of the run: what randomness in a term is made from."""
    vocab_shards: int = 1
    """Static. Number of equal blocks of the vocabulary that lie on different devices."""


Scalar: TypeAlias = float | Float[Array, ""]
"""A number that a schedule may trace."""
Term: TypeAlias = Callable[[ChunkView], Float[Array, "N"]]


def cross_entropy(view: ChunkView) -> Float[Array, "N"]:
    """-log softmax(z_student)[label], in nats."""
    logits = view.student_logits.astype(jnp.float32)
    # A comparison with an iota instead of a gather: the gather makes XLA keep one more float32
    # copy of the logits.
    label_logit = jnp.sum(jnp.where(is_label(view), logits, jnp.float32(0)), axis=1)
    return jax.nn.logsumexp(logits, axis=1) - label_logit


def forward_kl(view: ChunkView, *, temperature: Scalar = 1.0) -> Float[Array, "N"]:
    """KL(p || q), in nats; its gradient in z_student is (q - p) / T.

    DDK (arXiv 2407.16154), equation 3: the direction of Hinton et al. (2015). +inf where the
    student gives -inf to an entry that the teacher does not; the gradient stays finite.
    """
    return kl(*log_probs_of_both(view, temperature))


def reverse_kl(view: ChunkView, *, temperature: Scalar = 1.0) -> Float[Array, "N"]:
    """KL(q || p), in nats; its gradient is q (log q - log p - KL(q || p)) / T.

    The single-step term of MiniLLM (arXiv 2306.08543). +inf, with a gradient that is not finite,
    where the teacher gives -inf to an entry that the student does not: take a divergence through
    a mixture (`generalised_jsd`, `skew_reverse_kl`) for a teacher that rules entries out.
    """
    log_p, log_q = log_probs_of_both(view, temperature)
    return kl(log_q, log_p)


def generalised_jsd(
    view: ChunkView, *, temperature: Scalar = 1.0, beta: float = 0.5
) -> Float[Array, "N"]:
    """With m = beta p + (1 - beta) q: beta KL(p || m) + (1 - beta) KL(q || m), in nats.

    The generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649). At most the entropy of
    (beta, 1 - beta), so at most log 2. It tends to 0 at both ends of beta, where the literature
    means a KL by the same name: jsd / beta -> KL(p || q) as beta -> 0, jsd / (1 - beta) ->
    KL(q || p) as beta -> 1. So the ends are refused.

    Args:
      view: one chunk.
      temperature: of both softmaxes.
      beta: weight of the TEACHER in the mixture, in (0, 1). (DistiLLM's `lam` is 1 - beta.)
    """
    if not 0 < beta < 1:
        raise ValueError(
            f"generalised_jsd: beta is the teacher's weight in the mixture and must lie in (0, 1), "
            f"got {beta}; at both ends the divergence is 0. For what others call beta 0 take "
            "forward_kl, for beta 1 reverse_kl"
        )
    log_p, log_q = log_probs_of_both(view, temperature)
    log_m = _log_mixture(log_p, log_q, beta)
    return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)


def skew_kl(view: ChunkView, *, temperature: Scalar = 1.0, alpha: float = 0.1) -> Float[Array, "N"]:
    """KL(p || alpha p + (1 - alpha) q), in nats; at most log(1 / alpha).

    The skew KL of DistiLLM (arXiv 2402.03898); the gradient flows through the mixture.

    Args:
      view: one chunk.
      temperature: of both softmaxes.
      alpha: weight of the teacher in the mixture, in (0, 1); at 0 it would be `forward_kl`.
    """
    _check_inner("skew_kl", "alpha", alpha, "0 would be forward_kl")
    log_p, log_q = log_probs_of_both(view, temperature)
    return kl(log_p, _log_mixture(log_p, log_q, alpha))


def skew_reverse_kl(
    view: ChunkView, *, temperature: Scalar = 1.0, alpha: float = 0.1
) -> Float[Array, "N"]:
    """KL(q || (1 - alpha) p + alpha q), in nats; at most log(1 / alpha).

    The skew reverse KL of DistiLLM (arXiv 2402.03898); the gradient flows through the mixture.
    (DistiLLM-2 stops it there.)

    Args:
      view: one chunk.
      temperature: of both softmaxes.
      alpha: weight of the STUDENT in the mixture, in (0, 1); at 0 it would be `reverse_kl`.
    """
    _check_inner("skew_reverse_kl", "alpha", alpha, "0 would be reverse_kl")
    log_p, log_q = log_probs_of_both(view, temperature)
    return kl(log_q, _log_mixture(log_p, log_q, 1 - alpha))


def symmetric_kl(
    view: ChunkView, *, temperature: Scalar = 1.0, forward_weight: float = 0.5
) -> Float[Array, "N"]:
    """forward_weight KL(p || q) + (1 - forward_weight) KL(q || p), in nats.

    Jeffreys' divergence, halved, at 0.5. (DistiLLM's `lam` is 1 - forward_weight.) Infinite where
    either of its parts is.

    Args:
      view: one chunk.
      temperature: of both softmaxes.
      forward_weight: in (0, 1).
    """
    hint = "0 would be reverse_kl, 1 forward_kl"
    _check_inner("symmetric_kl", "forward_weight", forward_weight, hint)
    log_p, log_q = log_probs_of_both(view, temperature)
    return forward_weight * kl(log_p, log_q) + (1 - forward_weight) * kl(log_q, log_p)


def total_variation(view: ChunkView, *, temperature: Scalar = 1.0) -> Float[Array, "N"]:
    """Half of sum_v |p_v - q_v|, in [0, 1].

    The TVD variant of f-distillation (arXiv 2307.15190), per token. Not nats, but a term like the
    others.
    """
    log_p, log_q = log_probs_of_both(view, temperature)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=1)


def spherical_kl(
    view: ChunkView, *, temperature: Scalar = 1.0, scale: float | Literal["teacher"] = "teacher"
) -> Float[Array, "N"]:
    """KL(p || q) of standardised logits m (z - mean(z)) / std(z), in nats.

    Spherical KD (arXiv 2010.07485): the student need not match how confident the teacher is, only
    what it prefers. The moments are over the entries that exist: neither `RULED_OUT` nor -inf
    enters them. A cross-entropy beside it stays on the student's raw logits (the paper's does not).

    Args:
      view: one chunk.
      temperature: of both softmaxes, after the standardisation.
      scale: m. "teacher": the standard deviation of the teacher's own logits at each token, so that
        they keep their scale and the student is given it. A number: the same at every token, of
        both models (the paper has 2 to 3 for image classes).
    """
    if not isinstance(scale, str) and not 0 < scale < math.inf:
        raise ValueError(f'spherical_kl: scale must be "teacher" or a number above 0, got {scale}')
    assert view.teacher_logits is not None
    teacher, deviation = _standardised(view.teacher_logits)
    student, _ = _standardised(view.student_logits)
    m = deviation if isinstance(scale, str) else jnp.float32(scale)

    def log_p(standard: Float[Array, "N V"], logits: Array) -> Float[Array, "N V"]:
        scaled = jnp.where(exists(logits), standard * m, logits.astype(jnp.float32))
        return log_probs(scaled, temperature)

    return kl(log_p(teacher, view.teacher_logits), log_p(student, view.student_logits))


# What the losses are made of


class Softmax(NamedTuple):
    """softmax(z / T) of every token, in a form that gives the log-probability of any logit.

    The largest logit is subtracted before the division: after it, the two roundings of a compiler
    that contracts products and sums would not cancel, an error of |z| / T * 2^-24.
    """

    top: Float[Array, "N 1"]
    """The largest logit."""
    inverse: Float[Array, ""]
    """1 / T."""
    log_sum: Float[Array, "N 1"]
    """log of the sum of exp((z - top) / T)."""

    def log_prob(self, logits: Float[Array, "N any"]) -> Float[Array, "N any"]:
        """Log-probabilities of entries with these logits, float32."""
        return (logits.astype(jnp.float32) - self.top) * self.inverse - self.log_sum


def softmax(logits: Float[Array, "N V"], temperature: Scalar) -> Softmax:
    """The softmax over the last axis, float32.

    Raises:
      ValueError: a temperature that is a constant is not above 0.
    """
    logits, inverse = logits.astype(jnp.float32), inverse_of(temperature)
    top = jax.lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
    total = jnp.sum(jnp.exp((logits - top) * inverse), axis=1, keepdims=True)
    return Softmax(top, inverse, jnp.log(total))


def inverse_of(temperature: Scalar) -> Float[Array, ""]:
    """1 / temperature, float32; refuses a constant that is not above 0."""
    if isinstance(temperature, float) and not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be a number above 0, got {temperature}")
    return jnp.float32(1) / temperature


def log_probs(logits: Float[Array, "N V"], temperature: Scalar) -> Float[Array, "N V"]:
    """Logarithm of softmax(logits / temperature), float32."""
    return softmax(logits, temperature).log_prob(logits)


def log_probs_of_both(
    view: ChunkView, temperature: Scalar
) -> tuple[Float[Array, "N V_t"], Float[Array, "N V"]]:
    """The teacher's log p and the student's log q."""
    assert view.teacher_logits is not None
    return log_probs(view.teacher_logits, temperature), log_probs(view.student_logits, temperature)


def kl(log_a: Float[Array, "N any"], log_b: Float[Array, "N any"]) -> Float[Array, "N"]:
    """KL(a || b) over the last axis, where a = 0 counts as 0 whatever log b is."""
    a = jnp.exp(log_a)
    # Inside the product: outside of it, its gradient would be 0 * inf. A NaN of a is not 0, stays.
    gap = jnp.where(a == 0, jnp.float32(0), log_a - log_b)
    return jnp.sum(a * gap, axis=1)


def exists(logits: Float[Array, "N V"]) -> Bool[Array, "N V"]:
    """False at entries that are `RULED_OUT` or -inf. A NaN exists, so that it is seen."""
    return ~(logits <= RULED_OUT / 2)


def is_label(view: ChunkView) -> Bool[Array, "N V"]:
    """True at the label of every token."""
    V = view.student_logits.shape[1]
    return jnp.arange(V, dtype=jnp.int32)[None, :] == view.labels[:, None]


def _log_mixture(
    log_p: Float[Array, "N V"], log_q: Float[Array, "N V"], weight: float
) -> Float[Array, "N V"]:
    """log(weight p + (1 - weight) q), in log space."""
    # logaddexp has no gradient at (-inf, -inf); the stand-in for log 0 gives the same mixture.
    p, q = (jnp.where(x == -jnp.inf, jnp.float32(RULED_OUT), x) for x in (log_p, log_q))
    return jnp.logaddexp(math.log(weight) + p, math.log1p(-weight) + q)


def _standardised(logits: Float[Array, "N V"]) -> tuple[Float[Array, "N V"], Float[Array, "N 1"]]:
    """Logits with mean 0 and variance 1 over the entries that exist, 0 elsewhere; and their std."""
    there = exists(logits)
    count = jnp.sum(there, axis=1, keepdims=True).astype(jnp.float32)
    kept = jnp.where(there, logits.astype(jnp.float32), jnp.float32(0))
    centred = jnp.where(there, kept - jnp.sum(kept, axis=1, keepdims=True) / count, jnp.float32(0))
    # A floor for logits that are all equal, as those of masked tokens are.
    deviation = jnp.sqrt(jnp.sum(centred * centred, axis=1, keepdims=True) / count + 1e-9)
    return centred / deviation, deviation


def _check_inner(loss: str, setting: str, value: float, hint: str) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{loss}: {setting} must lie in (0, 1), got {value}; {hint}")
