"""Attention over grouped key/value heads, in one place for every backend.

Legend: B rows, T tokens, H query heads, K key/value heads, G = H / K, D head width.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float


def attention(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKD: Float[Array, "B T K D"],
    mask_BTT: Bool[Array, "B T T"],
) -> Float[Array, "B T H D"]:
    """Softmax attention; scores and softmax in float32.

    The queries of a group are stacked into one matrix per key/value head, and the softmax is
    normalised after the product with the values. On CPU this takes half the time of
    `jax.nn.dot_product_attention`, forward and backward.

    Args:
      q_BTHD: queries, already rotated.
      k_BTKD: keys, already rotated; K divides H.
      v_BTKD: values.
      mask_BTT: whether query t may see key s; every query sees at least one.
    """
    B, T, H, D = q_BTHD.shape
    K = k_BTKD.shape[2]
    G = H // K
    q = (q_BTHD * jnp.asarray(D**-0.5, q_BTHD.dtype)).reshape(B, T, K, G, D)
    q_BKND = q.transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, D)
    k_BKDT, v_BKTD = k_BTKD.transpose(0, 2, 3, 1), v_BTKD.transpose(0, 2, 1, 3)

    scores = jnp.matmul(q_BKND, k_BKDT, preferred_element_type=jnp.float32)
    bias_BTT = jnp.where(mask_BTT, jnp.float32(0), jnp.float32(-1e30))
    scores = scores.reshape(B, K, G, T, T) + bias_BTT[:, None, None]
    largest = jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
    weights = jnp.exp(scores - largest).reshape(B, K, G * T, T)

    out = jnp.matmul(weights.astype(v_BKTD.dtype), v_BKTD, preferred_element_type=jnp.float32)
    out = (out / jnp.sum(weights, axis=-1, keepdims=True)).astype(q_BTHD.dtype)
    return out.reshape(B, K, G, T, D).transpose(0, 3, 1, 2, 4).reshape(B, T, H, D)
