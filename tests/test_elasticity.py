"""The elasticity controller: its estimates, its rule, and its worth on simulated students."""

from __future__ import annotations

import numpy as np
import pytest
import students
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_jax.mixture.controller import ControllerState, observe
from ddk_jax.mixture.ddk import DDK, Static
from ddk_jax.mixture.elasticity import (
    KEPT,
    MOST,
    START_INTERVALS,
    Elasticity,
    relative_elasticities,
)

STEADY = list(zip(KEPT, START_INTERVALS, strict=True))


def follow(controller: Elasticity, gaps, shares, unit=1e5, scale=1.0) -> ControllerState:
    """Updates on gaps [m, D] while rows were drawn by shares [m - 1, D], whatever it decided."""
    gaps, shares = np.asarray(gaps, np.float64) * scale, np.asarray(shares, np.float64)
    state = controller.init(np.ones(gaps.shape[1]))
    tokens = np.zeros(gaps.shape[1])
    for row, gap in enumerate(gaps):
        seen = observe(2.0 + gap, np.full(gap.shape, 2.0), tokens=tokens, step=row)
        state = controller.update(state, seen)
        tokens = tokens + unit * shares[min(row, len(shares) - 1)]
    return state


def remembered(shares, kept: float, start: float) -> np.ndarray:
    """Tokens remembered at every measurement, in intervals: written as a loop over domains."""
    count = shares.shape[1]
    rows = [[start / count] * count]
    for share in shares:
        rows.append([kept * old + new for old, new in zip(rows[-1], share, strict=True)])
    return np.array(rows)


def shares_of(seed: int, updates: int, domains: int, steadiness: float = 3.0) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(domains, steadiness), updates)


# --- estimates


@pytest.mark.parametrize(("kept", "start"), STEADY)
def test_exact_elasticities_are_found_whatever_the_student_keeps(kept, start):
    """Power laws in the remembered tokens: the elasticity is the exponent, at any level."""
    exponents = np.array([0.1, 0.4, 0.2, 0.8, 0.05])
    shares = shares_of(0, 12, 5, steadiness=30.0)
    tokens = remembered(shares, kept, start)
    gaps = [0.5, 1.0, 0.2, 0.7, 0.9] * tokens**-exponents
    history = np.stack([np.log(remembered(shares, k, s)) for k, s in STEADY], axis=1)
    found = relative_elasticities(gaps[-1], gaps, history)
    # Not exactly: over the range of the history a power law is no straight line.
    np.testing.assert_allclose(found / found.mean(), exponents / exponents.mean(), rtol=0.25)
    order = np.argsort(exponents)
    assert np.all(np.diff(found[order]) > 0)


def test_a_gap_that_does_not_answer_counts_as_little_as_it_may():
    shares = shares_of(1, 12, 4)
    tokens = remembered(shares, 1.0, 10.0)
    gaps = 0.5 * tokens ** -np.array([0.4, 0.4, 0.4, 0.0])
    history = np.stack([np.log(remembered(shares, k, s)) for k, s in STEADY], axis=1)
    found = relative_elasticities(gaps[-1], gaps, history)
    assert found[3] == 1 / MOST and np.all(found[:3] > 0.5)


def test_noise_alone_moves_nothing_as_a_rule():
    """Nothing differs but the noise: the estimates are shrunk to 1, in 19 of 20 histories."""
    moved = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        shares = shares_of(seed, 12, 8)
        history = np.stack([np.log(remembered(shares, k, s)) for k, s in STEADY], axis=1)
        gaps = 0.5 + 0.01 * rng.standard_normal((13, 8))
        found = relative_elasticities(gaps[-1], gaps, history)
        moved += bool(np.ptp(np.log(found)) > 1e-9)
    assert moved <= 3


def test_a_domain_that_was_starved_and_fell_behind_is_productive():
    """Its gap rose while it was drawn less: that speaks for it, not against it."""
    share = np.array([[0.45, 0.45, 0.1]] * 3 + [[0.475, 0.475, 0.05]] * 5)
    world = students.Juggler(
        start=np.full(3, 0.4), limit=np.array([0.0, 0.39, 0.0]), reach=np.array([0.4, 0.01, 0.4])
    )
    gaps = [world.gap()]
    for row in share:
        world.learn(row)
        gaps.append(world.gap())
    gaps = np.array(gaps)
    assert gaps[-1, 2] > gaps[0, 2]
    history = np.stack([np.log(remembered(share, k, s)) for k, s in STEADY], axis=1)
    found = relative_elasticities(gaps[-1], gaps, history)
    assert found[2] > 3 * found[1] and found[2] > 0.7 * found[0]


# --- the rule


def test_the_first_update_is_the_power_of_the_gap_by_hand():
    """Without a history all elasticities are the same. Half way, in logarithms, from uniform."""
    gap = np.array([0.1, 0.2, 0.4])
    target = np.array([1.0, 2.0, 4.0])  # the gap to the power 2 * 0.5
    state = follow(Elasticity(floor=0.3), [gap], np.full((1, 3), 1 / 3))
    np.testing.assert_allclose(
        np.exp(state.log_weights), 0.7 * target / target.sum() + 0.1, rtol=1e-13
    )
    state = follow(Elasticity(floor=0.0, rate=1.0, power=3.0), [gap], np.full((1, 3), 1 / 3))
    np.testing.assert_allclose(np.exp(state.log_weights), target**3 / 73, rtol=1e-13)


def test_at_rest_the_marginal_gains_are_equal():
    """The derivation: at the best shares gap^(power - 1) dgap / dshare is the same everywhere.

    Nearly: what no longer moves can no longer be measured.
    """
    limit, reach, power = np.array([0.3, 0.0, 0.1]), np.array([0.2, 0.3, 0.6]), 0.5
    controller = Elasticity(floor=0.0)
    world = students.Juggler(start=limit + reach, limit=limit, reach=reach, power=power, pace=1.0)
    found = students.distil(world, controller, updates=60, noise=0.0)
    shares = found.weights[-20:].mean(axis=0)
    gap = limit + reach * (3 * shares) ** -power
    marginal = gap * power * reach * (3 * shares) ** -power / shares
    assert marginal.max() / marginal.min() < 2.0
    start = (limit + reach) * power * reach * 3
    assert start.max() / start.min() > 4.0


@given(scale=st.floats(1e-3, 1e3), unit=st.floats(1.0, 1e12), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_neither_the_unit_of_the_gap_nor_that_of_the_tokens_matters(scale, unit, seed):
    gaps = np.random.default_rng(seed).uniform(0.2, 1.0, (8, 4))
    shares = shares_of(seed, 8, 4)
    expected = follow(Elasticity(), gaps, shares)
    state = follow(Elasticity(), gaps, shares, unit=unit, scale=scale)
    np.testing.assert_allclose(state.log_weights, expected.log_weights, rtol=1e-6, atol=1e-9)


def test_a_student_that_is_level_with_its_teacher_keeps_the_weights():
    state = follow(Elasticity(), [[0.5, 0.2], [0.0, -0.1]], [[0.5, 0.5]])
    assert state.log_weights == follow(Elasticity(), [[0.5, 0.2]], [[0.5, 0.5]]).log_weights


# --- what it is worth


def outcomes(world: str, controller, seeds: int = 2, **options) -> np.ndarray:
    """Mean and worst gap at the end, [seeds, 2]."""
    make = students.WORLDS[world]
    return np.array(
        [students.distil(make(s), controller, seed=s, **options)[:2] for s in range(seeds)]
    )


def test_it_beats_ddk_and_equal_sampling_where_some_gaps_never_close():
    """In the mean and in the worst gap, for every seed."""
    ours = outcomes("slow_and_stuck", Elasticity())
    for other in (DDK(), DDK(gap="loss_difference"), Static()):
        assert np.all(ours < outcomes("slow_and_stuck", other))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "mean", "worst"),
    [
        ("all_alike", 0.0, 0.01),  # DDK's own ground: no loss, within a hundredth of a nat
        ("worst_is_stuck", -0.04, 0.025),  # gives the hopeless domain up, and gains elsewhere
        ("full", -0.003, 0.02),
        ("full_and_alike", 0.003, 0.01),
    ],
)
def test_what_it_may_lose_to_ddk(world, mean, worst):
    """Bounds in nats on the difference to DDK at the end, mean over the seeds."""
    difference = (outcomes(world, Elasticity()) - outcomes(world, DDK())).mean(axis=0)
    assert difference[0] < mean and difference[1] < worst


@pytest.mark.slow
@pytest.mark.parametrize("world", ["random_learner", "random_juggler"])
def test_it_has_the_smallest_mean_gap_over_random_students(world):
    ours = outcomes(world, Elasticity(), seeds=5)[:, 0]
    for other in (DDK(), Static()):
        theirs = outcomes(world, other, seeds=5)[:, 0]
        assert ours.mean() < theirs.mean() - 0.005 and np.sum(ours < theirs) >= 4


def test_a_larger_power_serves_the_worst_domain():
    worst = [outcomes("slow_and_stuck", Elasticity(power=p))[:, 1].mean() for p in (1.0, 2.0, 4.0)]
    assert worst[0] > worst[1] > worst[2]


def test_it_stays_calm_under_noise_that_drowns_the_learning():
    ours = outcomes("all_alike", Elasticity(), noise=0.05).mean(axis=0)
    assert np.all(ours < outcomes("all_alike", Static(), noise=0.05).mean(axis=0))
