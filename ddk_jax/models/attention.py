"""Attention over grouped key/value heads, in one place for every backend.

Legend: B rows, T queries, S keys, H query heads, K key/value heads, G = H / K, D head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


def causal_segment_mask(segment_ids: Int[Array, "B T"], window: int = 0) -> Bool[Array, "B T T"]:
    """True where query t may see key s: s <= t, same segment, and t - s < window.

    Args:
      segment_ids: tokens see equal ids only.
      window: tokens that a query sees at most, itself among them. 0: all before it.
    """
    index = jnp.arange(segment_ids.shape[1])
    distance = index[None, :, None] - index[None, None, :]
    visible = distance >= 0
    if window:
        visible &= distance < window
    return visible & (segment_ids[:, :, None] == segment_ids[:, None, :])


def attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BSKD: Float[Array, "B S K D"],
    v_BSKD: Float[Array, "B S K D"],
    mask_BTS: Bool[Array, "B T S"],
    *,
    scale: float,
    softcap: float = 0.0,
) -> Float[Array, "B T H D"]:
    """Softmax attention; scores and softmax in float32.

    The queries of a group are stacked into one matrix per key/value head, and the softmax is
    normalised after the product with the values. On CPU this takes half the time of
    `jax.nn.dot_product_attention`, forward and backward.

    Args:
      q_BTHD: queries, already rotated.
      k_BSKD: keys, already rotated; K divides H.
      v_BSKD: values.
      mask_BTS: whether query t may see key s; every query sees at least one.
      scale: factor of the scores, usually D^-0.5.
      softcap: squeezes the scaled scores into (-softcap, softcap), before the mask. 0: it does not.
    """
    B, T, H, D = q_BTHD.shape
    S, K = k_BSKD.shape[1:3]
    G = H // K
    q = (q_BTHD * jnp.asarray(scale, q_BTHD.dtype)).reshape(B, T, K, G, D)
    q_BKND = q.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    k_BKDS, v_BKSD = k_BSKD.transpose(0, 2, 3, 1), v_BSKD.transpose(0, 2, 1, 3)

    scores = jnp.matmul(q_BKND, k_BKDS, preferred_element_type=jnp.float32)
    if softcap:
        scores = softcap * jnp.tanh(scores / softcap)
    bias_BTS = jnp.where(mask_BTS, jnp.float32(0), jnp.float32(-1e30))
    scores = scores.reshape(B, K, G, T, S) + bias_BTS[:, None, None]
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest).reshape(B, K, G * T, S)

    out = jnp.matmul(weights.astype(v_BKSD.dtype), v_BKSD, preferred_element_type=jnp.float32)
    out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q_BTHD.dtype)
    return out.reshape(B, K, G, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
