"""Targets that hold a few entries of the teacher's distribution, and the losses on them.

Two kinds: the most probable entries with the mass of all others (`SparseTargets`), and entries
drawn at random with weights that make every sum over the vocabulary unbiased (`SampledTargets`).
Either is made once, where the teacher's logits are at hand; the losses need the student's alone.

A temperature is that of the targets: log-probabilities at one temperature do not tell those at
another, since the entries that were left out change the sum. So it is fixed when they are made.

Legend: N tokens of the chunk, V vocabulary, T temperature, k entries of a target;
p = softmax(z_teacher / T), q = softmax(z_student / T).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from ddk_jax.losses.divergences import RULED_OUT, ChunkView, Scalar, exists, kl, softmax
from ddk_jax.losses.top_k import gather, members, search, top_k, up_to
from ddk_jax.losses.truncated import Renormalise, check_truncation


class SparseTargets(NamedTuple):
    """The most probable entries of the teacher."""

    ids: Int[Array, "N k"]
    """No entry twice."""
    log_probs: Float[Array, "N k"]
    """log p of these, of the softmax over the whole vocabulary. `RULED_OUT` or -inf marks a slot
    that is not used, whatever its id."""
    log_tail: Float[Array, "N"]
    """log of the mass of all entries that are not listed."""


class SampledTargets(NamedTuple):
    """Entries drawn with replacement; one that is drawn twice stands twice."""

    ids: Int[Array, "N k"]
    log_probs: Float[Array, "N k"]
    """log p of these."""
    weights: Float[Array, "N k"]
    """E[sum_i weights_i f(ids_i)] = sum_v p_v f(v), for any f."""


def top_k_targets(
    teacher_logits: Float[Array, "N V"], k: int, *, temperature: Scalar = 1.0, shards: int = 1
) -> SparseTargets:
    """The k most probable entries and the exact mass of the others.

    Args:
      teacher_logits: any values; -inf is an entry that the teacher rules out.
      k: number of entries.
      temperature: of the softmax.
      shards: equal blocks of the vocabulary on different devices.
    """
    values, ids = top_k(teacher_logits, k, shards)
    p = softmax(teacher_logits, temperature)
    listed = up_to(teacher_logits, values[:, -1], ids[:, -1])
    others = jnp.where(listed, jnp.float32(RULED_OUT), p.log_prob(teacher_logits))
    return SparseTargets(ids, p.log_prob(values), jax.nn.logsumexp(others, axis=1))


def sparse_kl(
    student_logits: Float[Array, "N V"],
    targets: SparseTargets,
    *,
    temperature: Scalar = 1.0,
    renormalise: Renormalise = "none",
    tail: bool = True,
    shards: int = 1,
) -> Float[Array, "N"]:
    """KL over the entries of the targets, in nats, under the conventions of `truncated`.

    Equal to `truncated.top_k_kl` on targets of `top_k_targets` at the same temperature.

    Args:
      student_logits: any values.
      targets: made at `temperature`.
      temperature: of the student's softmax.
      renormalise: whose probabilities are divided by their sum over the entries of the targets.
      tail: whether all other entries count, as one; only with `renormalise` none.
      shards: equal blocks of the vocabulary on different devices.
    """
    check_truncation("sparse_kl", renormalise, tail)
    used = exists(targets.log_probs)
    log_p = jnp.where(used, targets.log_probs, jnp.float32(RULED_OUT))
    q = softmax(student_logits, temperature)
    log_q = q.log_prob(gather(student_logits, targets.ids, shards))
    log_q = jnp.where(used, log_q, jnp.float32(RULED_OUT))
    if renormalise != "none":
        log_p = jax.nn.log_softmax(log_p, axis=1)
    if renormalise == "both":
        log_q = jax.nn.log_softmax(log_q, axis=1)
    head = kl(log_p, log_q)
    if not tail:
        return head
    V = student_logits.shape[1]
    listed = members(jnp.where(used, targets.ids, V), V, shards)
    others = jnp.where(listed, jnp.float32(RULED_OUT), q.log_prob(student_logits))
    log_q_tail = jax.nn.logsumexp(others, axis=1, keepdims=True)
    return head + kl(targets.log_tail[:, None], log_q_tail)


def sampled_kl(
    view: ChunkView, *, temperature: Scalar = 1.0, samples: int = 50, proposal: float = 1.0
) -> Float[Array, "N"]:
    """An unbiased estimate of `forward_kl` from random entries of the teacher, in nats.

    Random-sampling KD of "Sparse Logit Sampling" (arXiv 2503.16870): entries are drawn with
    replacement from r ~ p^proposal and weigh p / (samples r), so value and gradient are those of
    the dense KL on average, with an error that falls like 1 / sqrt(samples). The weights are not
    divided by their sum, which would bias them. A single token's estimate can be negative.

    What is drawn depends on `view.draw` and the teacher's logits at that token only.

    Args:
      view: one chunk.
      temperature: of both softmaxes.
      samples: entries drawn for every token.
      proposal: exponent of p; 1 draws from the teacher itself, where every draw weighs the same.
        The paper finds 0.8 to 1.2 to work.
    """
    return _of_draws("sampled_kl", view, temperature, samples, proposal, entropy=True)


def sampled_cross_entropy(
    view: ChunkView, *, temperature: Scalar = 1.0, samples: int = 50, proposal: float = 1.0
) -> Float[Array, "N"]:
    """An unbiased estimate of -sum_v p_v log q_v, in nats: `sampled_kl` less the teacher's entropy.

    The gradients are the same. The settings are those of `sampled_kl`.
    """
    return _of_draws("sampled_cross_entropy", view, temperature, samples, proposal, entropy=False)


def sparse_cross_entropy(
    student_logits: Float[Array, "N V"],
    targets: SampledTargets,
    *,
    temperature: Scalar = 1.0,
    shards: int = 1,
) -> Float[Array, "N"]:
    """-sum_i weights_i log q(ids_i), in nats.

    Args:
      student_logits: any values.
      targets: made at `temperature`.
      temperature: of the student's softmax.
      shards: equal blocks of the vocabulary on different devices.
    """
    drawn = gather(student_logits, targets.ids, shards)
    return -_weighted(targets.weights, softmax(student_logits, temperature).log_prob(drawn))


def draw_targets(
    teacher_logits: Float[Array, "N V"],
    draw: UInt32[Array, "N"],
    *,
    samples: int,
    proposal: float = 1.0,
    temperature: Scalar = 1.0,
    shards: int = 1,
) -> SampledTargets:
    """Entries drawn from r ~ p^proposal, with weights p / (samples r).

    r is rounded to whole multiples of about 2^-26, at least one for every entry that exists, and
    the weights are those of the rounded r: so no entry of a large vocabulary is out of reach, as
    it would be for a float32 cumulative sum, and the estimate stays unbiased.

    Args:
      teacher_logits: any values; entries that are ruled out are never drawn.
      draw: a number of its own for every token.
      samples: entries a token.
      proposal: exponent, above 0.
      temperature: of the softmax.
      shards: equal blocks of the vocabulary on different devices.
    """
    p, r = (softmax(teacher_logits, t) for t in (temperature, temperature / proposal))

    def parts(logits: Float[Array, "N any"]) -> Int[Array, "N any"]:
        """The rounded r of entries, in units of 2^-26."""
        rounded = jnp.round(jnp.exp(r.log_prob(logits)) * jnp.float32(2**26))
        return jnp.maximum(rounded, 1).astype(jnp.int32)

    all_parts = jnp.where(exists(teacher_logits), parts(teacher_logits), jnp.int32(0))
    total = jnp.sum(all_parts, axis=1, keepdims=True)
    bits = jax.vmap(lambda d: jax.random.bits(jax.random.key(d), (samples,), jnp.uint32))(draw)
    ids = search(all_parts, _scaled_bits(bits, total), shards)
    drawn = gather(teacher_logits, ids, shards)
    log_p = p.log_prob(drawn)
    share = parts(drawn).astype(jnp.float32) / total.astype(jnp.float32)
    return SampledTargets(ids, log_p, jnp.exp(log_p) / (samples * share))


def _of_draws(
    loss: str,
    view: ChunkView,
    temperature: Scalar,
    samples: int,
    proposal: float,
    *,
    entropy: bool,
) -> Float[Array, "N"]:
    if samples < 1:
        raise ValueError(f"{loss}: samples must be at least 1, got {samples}")
    if not 0 < proposal < math.inf:
        raise ValueError(f"{loss}: proposal must be a number above 0, got {proposal}")
    assert view.teacher_logits is not None
    shards = view.vocab_shards
    targets = draw_targets(
        view.teacher_logits,
        view.draw,
        samples=samples,
        proposal=proposal,
        temperature=temperature,
        shards=shards,
    )
    nats = sparse_cross_entropy(
        view.student_logits, targets, temperature=temperature, shards=shards
    )
    return nats + _weighted(targets.weights, targets.log_probs) if entropy else nats


def _weighted(weights: Float[Array, "N k"], values: Float[Array, "N k"]) -> Float[Array, "N"]:
    """The sum of weights * values, where a weight of 0 counts as 0 whatever the value is."""
    values = jnp.where(weights == 0, jnp.float32(0), values)
    return jnp.sum(weights * values, axis=1)


def _scaled_bits(bits: UInt32[Array, "N k"], total: Int[Array, "N 1"]) -> Int[Array, "N k"]:
    """floor(bits / 2^32 * total): the upper half of a 64-bit product, in pieces of 16 bits.

    Not bits % total: that would draw quite another entry when rounding moves the total by one, as
    another sharding may.
    """
    low, shift = jnp.uint32(0xFFFF), jnp.uint32(16)
    total = total.astype(jnp.uint32)
    a, b = bits >> shift, bits & low
    c, d = total >> shift, total & low
    middle = a * d + ((b * d) >> shift)
    upper = a * c + (middle >> shift) + ((b * c + (middle & low)) >> shift)
    return upper.astype(jnp.int32)
