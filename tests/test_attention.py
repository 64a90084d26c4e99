"""Attention against a float64 reference and against jax's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK

from ddk_jax.models.attention import attention, causal_segment_mask

B, T, H, D = 2, 6, 4, 8


def arrays(kv_heads: int, dtype: Any = np.float32, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Queries, keys, values, and the gradient of the output."""
    rng = np.random.default_rng(seed)
    heads = (H, kv_heads, kv_heads, H)
    return tuple(rng.normal(size=(B, T, h, D)).astype(dtype) for h in heads)


def segment_mask() -> np.ndarray:
    segments = np.array([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 0, 0]], np.int32)
    return np.asarray(causal_segment_mask(jnp.asarray(segments)))


MASK = np.tril(np.ones((T, T), bool))[None] & np.array(
    [[[True] * T] * T, [[s == t for s in (1, 1, 2, 2, 0, 0)] for t in (1, 1, 2, 2, 0, 0)]]
)


def reference(q: Any, k: Any, v: Any, d_out: Any) -> tuple[np.ndarray, ...]:
    """Output and gradients of q, k, v in float64, one head of one row at a time."""
    q, k, v, d_out = (x.astype(np.float64) for x in (q, k, v, d_out))
    out, d_q, d_k, d_v = (np.zeros_like(x) for x in (q, q, k, v))
    group = H // k.shape[2]
    for b in range(B):
        for h in range(H):
            at, kv = np.s_[b, :, h], np.s_[b, :, h // group]
            scores = q[at] @ k[kv].T / np.sqrt(D)
            scores[~MASK[b]] = -np.inf
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[at] = weights @ v[kv]
            d_weights = d_out[at] @ v[kv].T
            inner = np.sum(weights * d_weights, axis=1, keepdims=True)
            d_scores = weights * (d_weights - inner) / np.sqrt(D)
            d_q[at] = d_scores @ k[kv]
            d_k[kv] += d_scores.T @ q[at]
            d_v[kv] += weights.T @ d_out[at]
    return out, d_q, d_k, d_v


@partial(jax.jit, compiler_options=QUICK)
def run(q: Any, k: Any, v: Any, d_out: Any) -> tuple[jax.Array, ...]:
    out, pull = jax.vjp(partial(attention, mask_BTS=jnp.asarray(MASK), scale=D**-0.5), q, k, v)
    return out, *pull(d_out)


def test_the_mask_is_causal_and_within_segments() -> None:
    np.testing.assert_array_equal(segment_mask(), MASK)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_equals_the_reference(kv_heads: int) -> None:
    given = arrays(kv_heads)
    for got, want in zip(run(*given), reference(*given), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


def test_bfloat16_is_as_close_as_its_rounding() -> None:
    given = arrays(2, jnp.bfloat16)
    for got, want in zip(run(*given), reference(*given), strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.abs(np.asarray(got, np.float64) - want)
        assert error.max() < 2e-2 * np.abs(want).max()
        assert error.mean() < 4e-3 * np.abs(want).max()


def test_equals_the_attention_of_jax() -> None:
    q, k, v, d_out = arrays(2)

    @partial(jax.jit, compiler_options=QUICK)
    def other(q: Any, k: Any, v: Any, d_out: Any) -> tuple[jax.Array, ...]:
        mask = jnp.asarray(MASK)[:, None]
        with jax.numpy_rank_promotion("allow"):
            out, pull = jax.vjp(lambda *x: jax.nn.dot_product_attention(*x, mask=mask), q, k, v)
            return out, *pull(d_out)

    for got, want in zip(run(q, k, v, d_out), other(q, k, v, d_out), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("window", [1, 2, 6, 99])
def test_a_window_shows_the_nearest_keys_of_the_segment(window: int) -> None:
    segments = jnp.asarray([[1, 1, 1, 1, 1, 1], [1, 1, 2, 2, 0, 0]], jnp.int32)
    behind = np.arange(T)[:, None] - np.arange(T)
    expected = MASK & (behind < window)
    np.testing.assert_array_equal(causal_segment_mask(segments, window), expected)


def test_a_soft_cap_comes_behind_the_scale_and_before_the_mask() -> None:
    q, k, v, _ = arrays(2)
    queries = slice(2, 5)  # fewer queries than keys
    given = (q[:, queries], k, v, MASK[:, queries])
    found = attention(*map(jnp.asarray, given), scale=0.7, softcap=1.5)
    scores = np.einsum("bthd,bshd->bhts", q, k.repeat(2, axis=2)) * 0.7
    scores = np.where(MASK[:, None], 1.5 * np.tanh(scores / 1.5), -np.inf)
    weights = np.exp(scores) / np.exp(scores).sum(axis=3, keepdims=True)
    expected = np.einsum("bhts,bshd->bthd", weights, v.repeat(2, axis=2))
    np.testing.assert_allclose(found, expected[:, queries], rtol=1e-4, atol=1e-5)


def test_hidden_keys_have_no_influence() -> None:
    q, k, v, d_out = arrays(2)
    clean = run(q, k, v, d_out)
    # Row 1, segment 2 (tokens 2 and 3) sees nothing of the others.
    k, v = k.copy(), v.copy()
    k[1, [0, 1, 4, 5]] *= 7
    v[1, [0, 1, 4, 5]] -= 3
    again = run(q, k, v, d_out)
    for a, b in zip(clean, again, strict=True):
        np.testing.assert_array_equal(a[1, 2:4], b[1, 2:4])
        np.testing.assert_array_equal(a[0], b[0])


def test_large_scores_do_not_overflow() -> None:
    q, k, v, d_out = arrays(2)
    given = (q * 300, k * 300, v, d_out)
    found = run(*given)
    assert all(np.all(np.isfinite(x)) for x in found)
    np.testing.assert_allclose(found[0], reference(*given)[0], rtol=1e-3, atol=1e-3)
