"""Reading a text column by column, with what the layers remember, is reading it at once."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import randomised
from quick import QUICK
from test_decoder_switches import VARIANTS, spec_of

from ddk_jax.models.cache import Cache, KeyValues, Past, Rows, entries, visible_entries
from ddk_jax.models.decoder import Decoder, Params

P, N = 8, 10
STARTS = np.array([0, 5, 7], np.int32)
"""Prompts of 8, 3 and 1 tokens."""


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def hidden_states(decoder: Decoder, params: Params, tokens: jax.Array) -> tuple[jax.Array, ...]:
    """Of the last prompt token and all behind it, [B, N + 1, E]: at once, and column by column."""
    column = jnp.arange(P + N, dtype=jnp.int32)[None]
    starts = jnp.asarray(STARTS)
    segments = (column >= starts[:, None]).astype(jnp.int32)
    positions = jnp.maximum(column - starts[:, None], 0)
    whole, _ = decoder.apply(params, tokens, segments, positions)

    rows = Rows(starts, jnp.full(len(STARTS), P + N, jnp.int32))
    first, cache = decoder.prefill(params, tokens[:, :P], rows, P + N)
    layers = decoder.unstacked(params)

    def extended(cache: Cache, column: jax.Array) -> tuple[Cache, jax.Array]:
        hidden, cache = decoder.extend(params, layers, tokens[:, column], column, rows, cache)
        return cache, hidden

    _, later = jax.lax.scan(extended, cache, jnp.arange(P, P + N, dtype=jnp.int32))
    return whole[:, P - 1 :], jnp.concatenate([first[:, None], jnp.moveaxis(later, 0, 1)], axis=1)


# What is at stake is how positions, rotations and windows are found again.
AT_STAKE = ("gemma", "gpt2", "gemma3", "half_parallel", "longrope")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=[] if name in AT_STAKE else [pytest.mark.slow]) for name in VARIANTS],
)
def test_column_by_column_equals_at_once(variant: str) -> None:
    decoder = Decoder(spec=spec_of(variant))
    tokens = np.random.default_rng(3).integers(0, 64, (len(STARTS), P + N), dtype=np.int32)
    whole, by_column = hidden_states(decoder, randomised(decoder), jnp.asarray(tokens))
    np.testing.assert_allclose(by_column, whole, atol=2e-5 * np.abs(whole).max())


@pytest.mark.parametrize("columns", [2, 5, 6])
@pytest.mark.parametrize("size", [1, 3, 5, 12])
def test_entries_hold_the_last_columns(columns: int, size: int) -> None:
    """Whatever the number of columns before the first new one, entry c % size holds column c."""
    starts = np.array([0, 1, 4], np.int32)
    numbers = jnp.arange(columns, dtype=jnp.float32)[None, :, None, None]
    read = jnp.broadcast_to(numbers, (3, columns, 1, 1))
    kept = entries(KeyValues(read, -read), size)
    for column in range(columns, 12):
        new = jnp.full((3, 1, 1, 1), column, jnp.float32)
        kept = Past(kept, jnp.int32(column)).and_now(KeyValues(new, -new)).kept()
        seen = np.asarray(visible_entries(jnp.int32(column), jnp.asarray(starts), size))
        for row, start in enumerate(starts):
            found = np.asarray(kept.k)[row, 0, seen[row, 0], 0]
            expected = range(max(start, column + 1 - size), column + 1)
            assert sorted(found) == list(expected)
    np.testing.assert_array_equal(kept.k, -kept.v)
