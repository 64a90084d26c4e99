"""Divergences between teacher and student, as pure functions of one chunk of tokens.

A term maps a `ChunkView` to nats per token. It never masks, reduces, chunks or stops gradients:
the machinery in `chunked` does, for every term alike. Softmaxes are taken in float32.

Legend: N tokens of the chunk, V vocabulary. p = softmax(z_teacher / T), q = softmax(z_student / T).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class ChunkView(NamedTuple):
    """What a term may look at. Masked tokens arrive with all logits 0."""

    student_logits: Float[Array, "N V"]
    teacher_logits: Float[Array, "N V"] | None
    """None when no term of the objective asks for a teacher."""
    labels: Int[Array, "N"]
    role: Int[Array, "N"]
    """Role of the label: 1 text or prompt, 2 response."""


Term: TypeAlias = Callable[[ChunkView], Float[Array, "N"]]


def cross_entropy(view: ChunkView) -> Float[Array, "N"]:
    """-log softmax(z_student)[label], in nats."""
    logits = view.student_logits.astype(jnp.float32)
    # A comparison with an iota instead of a gather: the gather makes XLA keep one more float32
    # copy of the logits.
    is_label = jnp.arange(logits.shape[1], dtype=jnp.int32)[None, :] == view.labels[:, None]
    label_logit = jnp.sum(jnp.where(is_label, logits, jnp.float32(0)), axis=1)
    return jax.nn.logsumexp(logits, axis=1) - label_logit


def forward_kl(view: ChunkView, *, temperature: float) -> Float[Array, "N"]:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), in nats; no factor T^2.

    DDK (arXiv 2407.16154), equation 3: the direction of Hinton et al. (2015). Entries that the
    teacher rules out (-inf) contribute nothing.
    """
    assert view.teacher_logits is not None
    inverse = jnp.float32(1 / temperature)
    log_p = jax.nn.log_softmax(view.teacher_logits.astype(jnp.float32) * inverse, axis=1)
    log_q = jax.nn.log_softmax(view.student_logits.astype(jnp.float32) * inverse, axis=1)
    p = jnp.exp(log_p)
    # p = 0 means p * (log p - log q) = 0; written out, since 0 * inf is NaN. A p that is NaN stays.
    return jnp.sum(jnp.where(p == 0, jnp.float32(0), p * (log_p - log_q)), axis=1)
