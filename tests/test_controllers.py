"""DDK's equations against a reference and by hand, the laws of every controller, and bad input."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ddk_jax.mixture.controllers import (
    CONTROLLERS,
    DDK,
    Controller,
    ControllerState,
    DDKWithoutSmoothing,
    Static,
    advice,
    equation_1,
    equation_2,
)
from ddk_jax.mixture.gaps import GAPS, discrepancy, measure

# A student that is behind by 0.2, 0.6 and 0.1 nats, and level at last.
STUDENT = np.array([3.0, 2.5, 2.9, 1.7])
TEACHER = np.array([2.8, 1.9, 2.8, 1.7])

nats = st.floats(0.0, 12.0)
any_nats = st.one_of(nats, st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 0.0]))
controller_names = st.sampled_from(sorted(CONTROLLERS))
gap_names = st.sampled_from(sorted(GAPS))


def uniform(count: int) -> np.ndarray:
    return np.full(count, 1.0 / count)


def reference(student, teacher, weights=None, alpha=None):
    """The equations as the paper writes them, in linear space; equation 1 without weights."""
    rho = np.exp(student) / np.exp(teacher)
    if weights is None:
        return np.exp(rho) / np.exp(rho).sum()
    psi = weights * np.exp(rho)
    return alpha * psi / psi.sum() + (1 - alpha) / len(rho)


@st.composite
def measurements(draw, values=nats):
    """Losses of student and teacher at a few updates: [updates, 2, domains]."""
    domains = draw(st.integers(1, 6))
    updates = draw(st.integers(1, 4))
    row = st.lists(values, min_size=domains, max_size=domains)
    return np.array(draw(st.lists(st.tuples(row, row), min_size=updates, max_size=updates)))


def run(controller: Controller, losses, prior=None) -> ControllerState:
    state = controller.init(uniform(losses.shape[-1]) if prior is None else prior)
    for student, teacher in losses:
        state = controller.update(state, student, teacher)
    return state


# --- gaps


def test_gaps_by_hand():
    np.testing.assert_allclose(measure("ppl_ratio", STUDENT, TEACHER), np.exp([0.2, 0.6, 0.1, 0]))
    np.testing.assert_allclose(
        measure("loss_difference", STUDENT, TEACHER), [0.2, 0.6, 0.1, 0.0], atol=1e-15
    )
    np.testing.assert_allclose(measure("loss_ratio", STUDENT, TEACHER), STUDENT / TEACHER)


def test_a_gap_of_unknown_losses_is_nan_and_of_known_ones_saturates():
    student = [math.nan, 1.0, math.inf, 900.0, 1.0, 0.0]
    teacher = [1.0, math.nan, 1.0, 1.0, 0.0, 0.0]
    np.testing.assert_array_equal(
        measure("ppl_ratio", student, teacher), [math.nan] * 3 + [1e100, math.e, 1.0]
    )
    np.testing.assert_array_equal(
        measure("loss_ratio", student, teacher), [math.nan] * 3 + [900.0, 1e100, math.nan]
    )


def test_losses_of_different_domains_are_refused():
    with pytest.raises(ValueError, match=r"\(2,\) and teacher_nats \(3,\)"):
        measure("ppl_ratio", [1.0, 2.0], [1.0, 2.0, 3.0])


def test_discrepancy_is_the_mean_over_measured_domains():
    assert discrepancy(STUDENT, TEACHER) == pytest.approx(0.225)
    assert discrepancy([3.0, math.nan, 1.0], [1.0, 1.0, 2.0]) == pytest.approx(0.5)
    unknown = discrepancy([math.nan], [1.0])
    assert math.isnan(unknown) and not unknown < 1e9


# --- the equations


def test_equations_by_hand():
    """Gaps chosen so that exp(gap) is 1, 2, 5: every weight is a fraction."""
    gap = np.log([1.0, 2.0, 5.0])
    np.testing.assert_allclose(np.exp(equation_1(gap)), [1 / 8, 2 / 8, 5 / 8], rtol=1e-15)

    weights = [Fraction(1, 8), Fraction(2, 8), Fraction(5, 8)]
    psi = [r * factor for r, factor in zip(weights, (1, 2, 5), strict=True)]
    expected = [Fraction(1, 4) * p / sum(psi) + Fraction(3, 4) / 3 for p in psi]
    assert expected == [Fraction(31, 120), Fraction(17, 60), Fraction(11, 24)]
    updated = equation_2(np.log(np.array(weights, np.float64)), gap, 0.25)
    np.testing.assert_allclose(np.exp(updated), [31 / 120, 17 / 60, 11 / 24], rtol=1e-14)


@given(losses=measurements(st.floats(0.0, 2.0)), alpha=st.floats(0.0, 1.0))
def test_ddk_is_the_papers_algorithm(losses, alpha):
    controller = DDK(alpha=alpha)
    state = controller.init(uniform(losses.shape[-1]))
    expected = None
    for student, teacher in losses:
        state = controller.update(state, student, teacher)
        expected = reference(student, teacher, expected, alpha)
        np.testing.assert_allclose(controller.weights(state), expected, rtol=1e-11)


@given(losses=measurements(st.floats(0.0, 2.0)))
def test_without_smoothing_is_equation_1_of_the_last_measurement(losses):
    weights = DDKWithoutSmoothing().weights(run(DDKWithoutSmoothing(), losses))
    np.testing.assert_allclose(weights, reference(*losses[-1]), rtol=1e-11)


@pytest.mark.parametrize("prior", [[1.0, 1.0, 1.0, 1.0], [4e6, 1e6, 2e6, 1e6]])
def test_static_is_the_prior_and_records_the_gap(prior):
    start = Static().init(prior)
    state = run(Static(), np.array([(STUDENT, TEACHER)] * 3), prior)
    assert state.log_weights == start.log_weights
    np.testing.assert_allclose(Static().weights(state), np.array(prior) / np.sum(prior), rtol=1e-15)
    assert state.gap == tuple(measure("ppl_ratio", STUDENT, TEACHER).tolist())


@pytest.mark.parametrize("name", ["ddk", "ddk_without_smoothing"])
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_warmup_keeps_the_prior_and_ends_with_equation_1(name, warmup):
    """The measurement before the first step counts: with a warm-up of 1 it changes nothing."""
    controller = CONTROLLERS[name](warmup_intervals=warmup)
    prior = np.array([0.1, 0.2, 0.3, 0.4])
    state = controller.init(prior)
    for _ in range(warmup):
        state = controller.update(state, STUDENT, TEACHER)
        np.testing.assert_allclose(controller.weights(state), prior, rtol=1e-15)
    state = controller.update(state, STUDENT, TEACHER)
    first = reference(STUDENT, TEACHER)
    np.testing.assert_allclose(controller.weights(state), first, rtol=1e-13)
    state = controller.update(state, STUDENT, TEACHER)
    second = reference(STUDENT, TEACHER, first, 0.5) if name == "ddk" else first
    np.testing.assert_allclose(controller.weights(state), second, rtol=1e-13)


# --- far behind


def test_a_weight_that_underflows_survives_the_next_update():
    """Equation 1 gives domain 1 exp(-2000), 0 in linear space; a larger gap must bring it back."""
    controller = DDK(gap="loss_difference", alpha=1.0)
    state = controller.update(controller.init([1.0, 1.0]), [2000.0, 0.0], [0.0, 0.0])
    assert controller.weights(state).tolist() == [1.0, 0.0]
    assert state.log_weights == (0.0, -2000.0)
    state = controller.update(state, [0.0, 2001.0], [0.0, 0.0])
    np.testing.assert_allclose(
        controller.weights(state), np.array([1.0, math.e]) / (1.0 + math.e), rtol=1e-12
    )


def test_a_ratio_of_exp_100_does_not_overflow():
    controller = DDK()
    state = controller.update(controller.init([1.0] * 3), [102.0, 4.0, 3.0], [2.0, 2.0, 2.0])
    assert controller.weights(state).tolist() == [1.0, 0.0, 0.0]
    state = controller.update(state, [102.0, 4.0, 3.0], [2.0, 2.0, 2.0])
    np.testing.assert_allclose(controller.weights(state), [4 / 6, 1 / 6, 1 / 6], rtol=1e-15)


# --- laws of every controller


@given(
    name=controller_names,
    gap=gap_names,
    losses=measurements(any_nats),
    alpha=st.floats(0.0, 1.0),
    warmup=st.integers(0, 2),
)
def test_weights_are_a_distribution_whatever_was_measured(name, gap, losses, alpha, warmup):
    controller = CONTROLLERS[name](gap=gap, alpha=alpha, warmup_intervals=warmup)
    state = run(controller, losses)
    weights = controller.weights(state)
    assert abs(weights.sum() - 1.0) <= 1e-12
    assert np.all(weights >= 0.0) and np.all(np.isfinite(state.log_weights))
    expected_unmeasured = np.isnan(measure(gap, *losses[-1]))
    assert state.unmeasured == tuple(np.flatnonzero(expected_unmeasured).tolist())


@given(name=controller_names, gap=gap_names, losses=measurements(any_nats))
def test_the_state_survives_json_bit_by_bit(name, gap, losses):
    controller = CONTROLLERS[name](gap=gap)
    state = run(controller, losses)
    restored = ControllerState.from_json(
        json.loads(json.dumps(state.to_json(), allow_nan=False))  # neither NaN nor infinity
    )
    assert restored == state
    assert controller.update(restored, *losses[0]) == controller.update(state, *losses[0])


@given(gap=gap_names, losses=measurements(), alpha=st.floats(0.0, 1.0))
def test_no_domain_falls_under_the_floor_of_equation_2(gap, losses, alpha):
    controller = DDK(gap=gap, alpha=alpha)
    losses = np.concatenate([losses[:1], losses]) + 0.1  # a teacher of 0 nats has no loss_ratio
    floor = (1.0 - alpha) / losses.shape[-1]
    assert np.all(controller.weights(run(controller, losses)) >= floor * (1.0 - 1e-12))


@given(
    name=controller_names,
    gap=gap_names,
    losses=measurements(any_nats),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_order_of_the_domains_does_not_matter(name, gap, losses, seed):
    controller = CONTROLLERS[name](gap=gap)
    order = np.random.default_rng(seed).permutation(losses.shape[-1])
    prior = np.arange(1.0, losses.shape[-1] + 1.0)
    np.testing.assert_allclose(
        controller.weights(run(controller, losses[..., order], prior[order])),
        controller.weights(run(controller, losses, prior))[order],
        rtol=1e-9,
        atol=1e-12,
    )


@given(
    name=controller_names,
    gap=gap_names,
    losses=measurements(),
    more=st.floats(0.0, 3.0),
    data=st.data(),
)
def test_a_larger_gap_never_lowers_the_weight(name, gap, losses, more, data):
    controller = CONTROLLERS[name](gap=gap)
    losses = losses + 0.1
    domain = data.draw(st.integers(0, losses.shape[-1] - 1))
    further = losses.copy()
    further[-1, 0, domain] += more
    before = controller.weights(run(controller, losses))[domain]
    assert controller.weights(run(controller, further))[domain] >= before * (1.0 - 1e-12)


@given(name=controller_names, gap=gap_names, domains=st.integers(1, 6), student=nats, teacher=nats)
def test_equal_gaps_from_uniform_stay_uniform(name, gap, domains, student, teacher):
    losses = np.broadcast_to(np.array([student, teacher + 0.1])[:, None], (3, 2, domains))
    controller = CONTROLLERS[name](gap=gap)
    np.testing.assert_allclose(
        controller.weights(run(controller, losses)), uniform(domains), rtol=1e-14
    )


def test_a_student_better_than_its_teacher_gets_less_of_that_domain():
    controller = DDK()
    state = controller.update(controller.init([1.0, 1.0]), [1.0, 3.0], [2.0, 2.0])
    np.testing.assert_allclose(
        controller.weights(state), reference(np.array([1.0, 3.0]), np.array([2.0, 2.0])), rtol=1e-14
    )
    assert controller.weights(state)[0] < 0.5


# --- domains that could not be measured


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["student", "teacher"])
@pytest.mark.parametrize("name", ["ddk", "ddk_without_smoothing"])
def test_an_unmeasured_domain_keeps_its_weight_and_the_others_share_the_rest(name, side, bad):
    controller = CONTROLLERS[name]()
    state = controller.update(controller.init([1.0] * 4), STUDENT, TEACHER)
    before = controller.weights(state)
    student, teacher = STUDENT.copy(), TEACHER.copy()
    (student if side == "student" else teacher)[1] = bad
    state = controller.update(state, student, teacher)
    after = controller.weights(state)

    assert state.unmeasured == (1,) and state.gap is not None and state.gap[1] is None
    assert after[1] == pytest.approx(before[1], rel=1e-14)
    others = [0, 2, 3]
    share = before[others].sum()
    expected = reference(
        STUDENT[others],
        TEACHER[others],
        None if name == "ddk_without_smoothing" else before[others] / share,
        0.5,
    )
    np.testing.assert_allclose(after[others], share * expected, rtol=1e-13)


@pytest.mark.parametrize("name", sorted(CONTROLLERS))
def test_nothing_changes_when_nothing_was_measured(name):
    controller = CONTROLLERS[name]()
    state = controller.update(controller.init([1.0] * 4), STUDENT, TEACHER)
    unknown = controller.update(state, [math.nan] * 4, TEACHER)
    assert unknown.log_weights == state.log_weights
    assert unknown.unmeasured == (0, 1, 2, 3)


def test_nothing_is_unmeasured_before_the_first_update():
    assert DDK().init([1.0, 2.0]).unmeasured == ()


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gap": "ppl"}, "mixture.gap = 'ppl': must be one of ppl_ratio"),
        ({"alpha": 1.5}, "mixture.alpha = 1.5"),
        ({"alpha": math.nan}, "mixture.alpha = nan"),
        ({"warmup_intervals": -1}, "mixture.warmup_intervals = -1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        DDK(**settings)


@pytest.mark.parametrize("prior", [[], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [[1.0]]])
def test_a_prior_without_a_weight_for_every_domain_is_refused(prior):
    with pytest.raises(ValueError, match="prior"):
        DDK().init(prior)


def test_losses_for_other_domains_are_refused():
    controller = DDK()
    with pytest.raises(ValueError, match="3 losses were measured for 2 domains"):
        controller.update(controller.init([1.0, 1.0]), [1.0] * 3, [1.0] * 3)


@pytest.mark.parametrize(
    "change",
    [
        {"log_weights": []},
        {"log_weights": [0.0, -math.inf]},
        {"gap": [1.0]},
        {"extra": 1},
    ],
)
def test_a_damaged_state_is_refused(change):
    values = DDK().init([1.0, 1.0]).to_json() | change
    with pytest.raises(ValueError, match="controller state"):
        ControllerState.from_json(values)


# --- advice


def advised(controller: Controller, student, teacher, rows: int, updates: int = 1) -> str | None:
    state = controller.init([1.0] * len(student))
    for _ in range(updates):
        state = controller.update(state, student, teacher)
    return advice(controller, state, ["code", "books", "speech"], rows)


def test_a_large_ratio_is_advised_against_by_name():
    text = advised(DDK(), [6.0, 5.99, 5.98], [2.0] * 3, rows=10**9)
    assert text is not None and "\n" not in text
    assert "largest ppl_ratio is 54.6 (domain code)" in text
    assert "less than one" not in text
    assert "mixture.gap=loss_difference" in text and "mixture.warmup_intervals" in text


def test_a_domain_without_a_row_in_an_interval_is_advised_against():
    """A ratio of 12.2 beside two of 1 leaves them 1.4e-5 of the rows."""
    text = advised(DDK(), [4.5, 2.0, 2.0], [2.0] * 3, rows=1000)
    assert text is not None and "largest" not in text
    assert "less than one of the 1000 rows of an interval comes from books, speech" in text
    assert "mixture.gap=loss_difference" in text and "mixture.warmup_intervals" in text
    assert advised(DDK(), [4.5, 2.0, 2.0], [2.0] * 3, rows=100_000) is None


def test_advice_names_no_gap_that_is_already_chosen():
    text = advised(DDK(gap="loss_difference"), [12.0, 2.0, 2.0], [2.0] * 3, rows=1000)
    assert text is not None and "mixture.warmup_intervals" in text
    assert "mixture.gap" not in text


def test_the_papers_ratios_need_no_advice():
    assert advised(DDK(), [2.6, 2.3, 2.2], [2.0] * 3, rows=64_000) is None


def test_the_prior_needs_no_advice():
    far = ([9.0, 5.0, 5.0], [2.0] * 3)
    assert advised(DDK(), *far, rows=1000, updates=0) is None
    assert advised(DDK(warmup_intervals=1), *far, rows=1000) is None
    assert advised(DDK(warmup_intervals=1), *far, rows=1000, updates=2) is not None
    assert advised(Static(), *far, rows=1000) is None


def test_advice_copes_with_unmeasured_domains():
    assert advised(DDK(), [math.nan] * 3, [2.0] * 3, rows=1000) is None
    assert advised(DDK(), [math.nan, 9.0, 2.0], [2.0] * 3, rows=1000) is not None
