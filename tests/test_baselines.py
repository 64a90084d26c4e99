"""Controllers of other papers against references in linear space, and the power law of ADO."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_jax.mixture.ado import ADO
from ddk_jax.mixture.baselines import DoReMi, DynamicBatchLoading, OnlineDataMixing
from ddk_jax.mixture.controller import observe
from ddk_jax.mixture.power_law import fit_power_law

nats = st.floats(0.1, 5.0)
curves = st.lists(st.tuples(nats, nats, nats), min_size=1, max_size=5)
STEPS = 100
TOKENS = 1e6


def follow(controller, training, step=STEPS, tokens=TOKENS):
    """A run that sees these losses of the training batches [m, D]; the first is before step 1."""
    training = np.asarray(training, np.float64)
    count = training.shape[1]
    states = [controller.init(np.ones(count))]
    drawn = np.zeros(count)
    for update, losses in enumerate(training):
        unknown = np.full(count, math.nan)
        seen = observe(unknown, training_nats=losses, tokens=drawn, step=update * step)
        states.append(controller.update(states[-1], seen))
        drawn = drawn + tokens * controller.weights(states[-1])
    return states[1:]


# --- Sheared LLaMA


@given(curve=curves, rate=st.floats(0.1, 2.0), clip=st.booleans())
def test_dynamic_batch_loading_is_the_authors_update(curve, rate, clip):
    controller = DynamicBatchLoading(rate=rate, clip=clip)
    target = np.array([2.0, 1.0, 3.0])
    state, weights = controller.init([1.0, 2.0, 1.0]), np.array([0.25, 0.5, 0.25])
    for losses in np.array(curve):
        state = controller.update(state, observe(losses, target))
        behind = np.maximum(losses - target, 0) if clip else losses - target
        weights = weights * np.exp(rate * behind)
        weights = (1 - 1e-4) * weights / weights.sum() + 1e-4 / 3
        np.testing.assert_allclose(controller.weights(state), weights, rtol=1e-9)


def test_targets_take_the_place_of_the_teacher():
    given_targets = DynamicBatchLoading(targets=(2.0, 1.0))
    seen = observe([2.5, 2.0], [2.0, 1.0])
    by_teacher = DynamicBatchLoading().update(given_targets.init([1.0, 1.0]), seen)
    alone = given_targets.update(given_targets.init([1.0, 1.0]), observe([2.5, 2.0]))
    assert alone.log_weights == by_teacher.log_weights
    assert given_targets.needs == {"student_nats"}
    with pytest.raises(ValueError, match="2 values for 3 domains"):
        given_targets.update(given_targets.init([1.0] * 3), observe([1.0] * 3))


# --- DoReMi


@given(curve=curves, rate=st.floats(0.1, 2.0), uniform=st.floats(0.0, 1.0))
def test_doremi_is_the_papers_update_and_its_average(curve, rate, uniform):
    controller = DoReMi(rate=rate, uniform=uniform)
    weights, history = np.full(3, 1 / 3), []
    for excess, state in zip(np.array(curve), follow(controller, curve), strict=True):
        weights = weights * np.exp(rate * excess)
        weights = (1 - uniform) * weights / weights.sum() + uniform / 3
        history.append(weights)
        np.testing.assert_allclose(controller.weights(state), weights, rtol=1e-9)
        np.testing.assert_allclose(state.average, np.mean(history, axis=0), rtol=1e-9)


def test_doremi_steers_the_loss_and_follows_a_term_of_its_own():
    assert DoReMi.steers == "loss" and DoReMi().term == "clipped_excess"
    assert DoReMi().needs == {"training_nats"}


# --- online data mixing


@given(curve=curves, smoothing=st.floats(0.0, 0.99))
def test_odm_is_the_authors_update_for_mixed_batches(curve, smoothing):
    controller = OnlineDataMixing(smoothing=smoothing)
    reward = np.exp(curve[0])
    for update, state in enumerate(follow(controller, curve)):
        if update:
            reward = smoothing * reward + (1 - smoothing) * np.exp(curve[update])
        floor = min(1 / 3, math.sqrt(math.log(3) / (3 * max(update * STEPS, 1))))
        expected = (1 - 3 * floor) * reward / reward.sum() + floor
        np.testing.assert_allclose(controller.weights(state), expected, rtol=1e-9)


def test_odm_is_uniform_for_d_log_d_steps():
    states = follow(OnlineDataMixing(), [[1.0, 2.0, 3.0, 4.0]] * 4, step=3)
    for state, uniform in zip(states, (True, True, False, False), strict=True):
        assert np.allclose(np.exp(state.log_weights), 0.25) == uniform  # 4 log 4 is 5.5


def test_a_domain_that_was_not_drawn_keeps_its_reward_and_its_weight():
    smooth = OnlineDataMixing(smoothing=0.5)
    curve = [[2.0, 1.0, 3.0], [2.0, math.nan, 3.0], [2.0, 1.0, 3.0]]
    states = follow(smooth, curve)
    assert states[1].unmeasured == (1,)
    assert states[1].log_weights[1] == pytest.approx(states[0].log_weights[1], rel=1e-12)
    whole = follow(smooth, [[2.0, 1.0, 3.0]] * 3)
    np.testing.assert_allclose(states[2].log_weights, whole[2].log_weights, rtol=1e-12)


# --- ADO


LAWS = ((1.5, 2.0, 0.5), (2.5, 1.0, 0.3), (0.5, 3.0, 0.7))
"""Limit, reducible nats at one interval, exponent."""


def losses_at(intervals: float) -> list[float]:
    return [limit + left * intervals**-power for limit, left, power in LAWS]


def test_ado_prefers_what_its_law_says_falls_fastest():
    """Losses that follow the laws exactly, in the middle of every interval."""
    controller = ADO(skip_intervals=0)
    curve = [[math.nan] * 3, *(losses_at(m + 0.5) for m in range(9))]
    states = follow(controller, curve)
    average, weights = np.full(3, 1 / 3), np.full(3, 1 / 3)
    for update, state in enumerate(states):
        share = weights  # of the interval that has ended
        now = update - 0.5
        if update >= 4:
            slopes = [power * left * now ** (-power - 1) for _, left, power in LAWS]
            preference = np.sqrt(share) * np.array(slopes) / 3
            preference = preference / preference.sum()
            assert preference.min() > 0.01  # where it would be cut
            weights = 0.9 * average + 0.1 * preference
            average = average + (preference - average) / (update + 1)
        np.testing.assert_allclose(controller.weights(state), weights, rtol=1e-3)
    assert states[3].log_weights == states[0].log_weights


def test_ado_leaves_the_first_intervals_out():
    """A wild start makes no difference, but for the wait."""
    wild = [[math.nan] * 3, [9.0, 8.0, 7.0], *(losses_at(m + 1.5) for m in range(9))]
    calm = [[math.nan] * 3, losses_at(0.5), *(losses_at(m + 1.5) for m in range(9))]
    for state, expected in zip(follow(ADO(), wild), follow(ADO(), calm), strict=True):
        np.testing.assert_allclose(state.log_weights, expected.log_weights, rtol=1e-12)


def test_a_domain_that_learns_nothing_keeps_a_floor():
    flat = [[math.nan] * 2, *([2.0, 1.0 + (m + 0.5) ** -0.5] for m in range(60))]
    state = follow(ADO(), flat)[-1]
    weights = np.exp(state.log_weights)
    assert 0.9 * np.array(state.memory["average"])[0] + 0.0009 < weights[0] < 0.1


# --- the power law


@pytest.mark.parametrize(
    ("limit", "reducible", "exponent"),
    [
        *((2.0, 3.0, 0.4), (0.0, 3.0, 0.2), (3.0, 1.0, 0.8), (1.0, 5.0, 0.05)),
        *((2.5, 0.5, 0.6), (0.0, 4.0, 0.8), (6.0, 1e-3, 0.5)),
    ],
)
@pytest.mark.parametrize("points", [4, 30])
def test_a_known_law_is_recovered(limit, reducible, exponent, points):
    tokens = 1e6 * np.arange(1.0, points + 1)
    found = fit_power_law(tokens, limit + reducible * (tokens / 1e6) ** -exponent)
    assert found.exponent == pytest.approx(exponent, abs=1e-3)
    assert found.limit == pytest.approx(limit, abs=0.02)
    slope = exponent * reducible * points ** (-exponent - 1) * 1e-6
    assert found.slope(tokens[-1]) == pytest.approx(slope, rel=1e-2)


def test_a_few_outliers_do_no_harm():
    tokens = np.arange(1.0, 31.0)
    nats_ = 2 + 3 * tokens**-0.4
    nats_[[4, 17]] *= 1.2
    found = fit_power_law(tokens, nats_)
    assert found.limit == pytest.approx(2.0, abs=0.02)
    assert found.exponent == pytest.approx(0.4, abs=0.01)


def test_noise_leaves_the_slope():
    rng = np.random.default_rng(0)
    tokens = np.arange(1.0, 41.0)
    exact = 0.4 * 3 * 40.0**-1.4
    noisy = (2 + 3 * tokens**-0.4) * (1 + 0.005 * rng.standard_normal((20, 40)))
    slopes = [fit_power_law(tokens, curve).slope(40.0) for curve in noisy]
    assert np.median(slopes) == pytest.approx(exact, rel=0.1)


@given(
    tokens=st.lists(st.floats(1.0, 1e12), min_size=3, max_size=8),
    data=st.data(),
)
def test_any_curve_has_a_law(tokens, data):
    """Also one that rises, or jumps: then nothing is left to learn."""
    values = data.draw(st.lists(st.floats(1e-9, 1e6), min_size=len(tokens), max_size=len(tokens)))
    found = fit_power_law(np.array(tokens), np.array(values))
    assert all(map(math.isfinite, found)) and found.slope(max(tokens)) >= 0.0
    assert found.limit >= 0.0 and found.reducible >= 0.0 and 0.0 <= found.exponent <= 0.8


def test_a_rising_loss_has_no_slope():
    found = fit_power_law(np.arange(1.0, 9.0), np.arange(1.0, 9.0))
    assert found.slope(8.0) == 0.0


@pytest.mark.parametrize(
    ("tokens", "values"),
    [
        ([1.0, 2.0], [1.0, 1.0]),
        ([1.0, 2.0, 0.0], [1.0] * 3),
        ([1.0, 2.0, 3.0], [1.0, -1.0, 1.0]),
        ([1.0, 2.0, 3.0], [1.0, math.nan, 1.0]),
    ],
)
def test_points_that_no_law_goes_through_are_refused(tokens, values):
    with pytest.raises(ValueError, match="power law"):
        fit_power_law(np.array(tokens), np.array(values))
