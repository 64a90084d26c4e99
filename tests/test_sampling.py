"""Choosing tokens: the distribution that is drawn from, and the log-probabilities that are said."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from quick import QUICK

from ddk_jax.errors import UserError
from ddk_jax.models.sampling import Choice, Sampling, choose

V = 16


@partial(jax.jit, static_argnums=3, compiler_options=QUICK)
def draw(logits: Any, keys: Any, step: Any, method: Any, numbers: Any) -> Choice:
    return choose(logits, keys, step, method, numbers)


def drawn(logits: np.ndarray, sampling: Sampling, rows: int, step: int = 0) -> Choice:
    """Every row draws from the same logits."""
    keys = jax.random.split(jax.random.key(0), rows)
    tiled = jnp.tile(jnp.asarray(logits, jnp.float32)[None], (rows, 1))
    return draw(tiled, keys, jnp.int32(step), sampling.method, sampling.numbers)


def odds(logits: np.ndarray, sampling: Sampling, step: int = 0) -> np.ndarray:
    """The distribution by its definition, in float64."""
    z = np.asarray(logits, np.float64).copy()
    if step < sampling.min_new_tokens:
        z[list(sampling.stop)] = -np.inf
    z = z / sampling.temperature
    order = np.argsort(-z)
    if sampling.top_k:
        z[order[sampling.top_k :]] = -np.inf
    p = np.exp(z - z.max())
    p /= p.sum()
    before = 0.0
    for token in order:
        if before >= sampling.top_p:
            p[token] = 0
        before += np.exp(z[token] - z.max()) / np.exp(z - z.max()).sum()
    return p / p.sum()


SETTINGS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.5},
    {"temperature": 2.0, "top_k": 3},
    {"top_k": 999},
    {"top_p": 0.6},
    {"top_p": 1e-6},
    {"temperature": 1.5, "top_k": 6, "top_p": 0.7},
    {"min_new_tokens": 1, "stop": (2, 5), "top_p": 0.9},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_draws_and_log_probabilities_follow_the_distribution(settings: dict[str, Any]) -> None:
    logits = np.random.default_rng(1).normal(size=V) * 2
    sampling, rows = Sampling(max_new_tokens=4, **settings), 4096
    found, expected = drawn(logits, sampling, rows), odds(logits, sampling)
    counts = np.bincount(found.token, minlength=V)
    assert not counts[expected == 0].any()
    # Four standard deviations of a binomial count; the key is fixed.
    spread = np.sqrt(rows * expected * (1 - expected))
    assert (np.abs(counts - rows * expected) <= 4 * spread + 1e-9).all()
    tokens = np.asarray(found.token)
    np.testing.assert_allclose(np.exp(found.sampling_log_prob), expected[tokens], rtol=1e-5)
    of_model = logits - np.log(np.exp(logits).sum())
    np.testing.assert_allclose(found.log_prob, of_model[tokens], atol=1e-5)


def test_stop_tokens_are_ruled_out_for_the_first_tokens_only() -> None:
    logits = np.zeros(V)
    logits[3] = 50.0
    sampling = Sampling(max_new_tokens=9, min_new_tokens=2, stop=(3,))
    greedy = Sampling(max_new_tokens=9, min_new_tokens=2, stop=(3,), temperature=0.0)
    for settings in (sampling, greedy):
        assert 3 not in np.asarray(drawn(logits, settings, 64, step=1).token)
        assert set(np.asarray(drawn(logits, settings, 64, step=2).token)) == {3}
    said = drawn(logits, greedy, 1, step=1)
    assert said.sampling_log_prob[0] == 0 and said.log_prob[0] == pytest.approx(-50.0)


def test_equal_scores_at_the_edge_are_kept_together() -> None:
    logits = np.array([2.0, 1.0, 1.0, 0.0])
    for settings in ({"top_k": 2}, {"top_p": 0.7}):
        found = drawn(logits, Sampling(max_new_tokens=1, **settings), 512)
        assert set(np.asarray(found.token)) == {0, 1, 2}


def test_another_step_or_row_draws_other_numbers() -> None:
    sampling = Sampling(max_new_tokens=9)
    one, other = (np.asarray(drawn(np.zeros(V), sampling, 64, step=s).token) for s in (0, 1))
    assert len(set(one)) > 8 and not np.array_equal(one, other)


@given(
    temperature=st.floats(1e-3, 1e3),
    top_p=st.floats(1e-6, 1.0),
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=V, max_size=V),
)
def test_any_settings_draw_a_token_that_has_a_probability(
    temperature: float, top_p: float, logits: list[float]
) -> None:
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_k=4, top_p=top_p)
    found = drawn(np.array(logits), sampling, 2)
    assert np.isfinite(found.sampling_log_prob).all() and np.isfinite(found.log_prob).all()
    assert (np.asarray(found.sampling_log_prob) <= 1e-6).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens = 0: needs at least 1"),
        ({"min_new_tokens": -1}, "min_new_tokens = -1"),
        ({"min_new_tokens": 9}, "min_new_tokens = 9 is more than max_new_tokens = 4"),
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"temperature": float("inf")}, "temperature = inf"),
        ({"top_k": -1}, "top_k = -1"),
        ({"top_p": 0.0}, "top_p = 0.0: needs a share"),
        ({"top_p": 1.1}, "top_p = 1.1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**{"max_new_tokens": 4} | wrong)
