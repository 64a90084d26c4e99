"""The laws of every controller, DDK's equations against a reference and by hand, and bad input."""

from __future__ import annotations

import json
import math
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_jax.mixture.controller import Controller, ControllerState, FollowsTraining, observe
from ddk_jax.mixture.controllers import CONTROLLERS, advice, settings_of
from ddk_jax.mixture.ddk import (
    DDK,
    DDKWithoutSmoothing,
    Static,
    equation_1,
    equation_2,
)
from ddk_jax.mixture.elasticity import Elasticity
from ddk_jax.mixture.gaps import GAPS, discrepancy, measure

# A student that is behind by 0.2, 0.6 and 0.1 nats, and level at last.
STUDENT = np.array([3.0, 2.5, 2.9, 1.7])
TEACHER = np.array([2.8, 1.9, 2.8, 1.7])


class Law(NamedTuple):
    """What holds of a controller beyond the laws of all; D domains."""

    monotone: bool
    """A larger signal in the last observation never lowers the weight of its domain."""
    floor: float = 0.0
    """Every weight is at least floor / D from the second update after the warm-up on."""
    settings: dict[str, Any] | None = None
    """Other settings than the defaults, to be held to the same laws."""
    other_floor: float = 0.0
    """The floor that they have."""


LAWS = {
    "ddk": Law(True, 0.5, {"alpha": 0.8, "gap": "loss_ratio"}, 0.2),
    "ddk_without_smoothing": Law(True, settings={"gap": "loss_difference"}),
    "static": Law(True, settings={"gap": "loss_ratio"}),
    "dynamic_batch_loading": Law(True, 1e-4, {"rate": 0.1, "clip": True}, 1e-4),
    "odm": Law(True, settings={"smoothing": 0.0}),
    "ado": Law(False, settings={"skip_intervals": 0}),
    "doremi": Law(True, 1e-3, {"rate": 10.0, "uniform": 0.1}, 0.1),
    "elasticity": Law(False, 0.2, {"power": 1.0, "rate": 1.0, "floor": 0.0, "window": 3}),
}
NAMES = sorted(CONTROLLERS)
MONOTONE = [name for name in NAMES if LAWS[name].monotone]

nats = st.floats(0.0, 12.0)
any_nats = st.one_of(nats, st.sampled_from([math.nan, math.inf, -math.inf, 1e308, 0.0]))
controller_names = st.sampled_from(NAMES)
gap_names = st.sampled_from(sorted(GAPS))


few = settings(max_examples=24)
"""Each example is a run of two controllers."""


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
def measurements(draw, values=nats, updates=4):
    """Losses of student, teacher and training batches at a few updates: [updates, 3, domains]."""
    domains = draw(st.integers(1, 6))
    updates = draw(st.integers(1, updates))
    row = st.lists(values, min_size=domains, max_size=domains)
    return np.array(draw(st.lists(st.tuples(row, row, row), min_size=updates, max_size=updates)))


def see(controller: Controller, state: ControllerState, losses, step=0, **others):
    """An update with losses of student, teacher and training batches; the last may be missing."""
    student, teacher, *training = losses
    training = training[0] if training else None
    seen = observe(student, teacher, training_nats=training, step=step, **others)
    return controller.update(state, seen)


def run(controller: Controller, losses, prior=None, start=None) -> ControllerState:
    """A run over the losses [updates, 2 or 3, domains], 10 steps of 1000 tokens an interval."""
    domains = losses.shape[-1]
    state = start or controller.init(uniform(domains) if prior is None else prior)
    for each in losses:
        # An interval's tokens are those of its weights.
        tokens = 1e4 * state.updates * np.array(state.average)
        state = see(controller, state, each, 10 * state.updates, tokens=tokens)
    return state


def signal(controller: Controller, losses) -> np.ndarray:
    """What the controller follows."""
    if isinstance(controller, FollowsTraining):
        return losses[2]
    if isinstance(controller, Static):
        return np.zeros(losses.shape[-1])
    return measure(controller.gap_kind, losses[0], losses[1])


def both(name: str) -> list[tuple[Controller, float]]:
    """The controller with its default and with other settings, and their floors."""
    law, kind = LAWS[name], CONTROLLERS[name]
    return [(kind(), law.floor), (kind(**law.settings or {}), law.other_floor)]


def test_every_controller_has_its_laws():
    assert set(LAWS) == set(CONTROLLERS)
    for name, kind in CONTROLLERS.items():
        assert kind.name == name and set(LAWS[name].settings or {}) <= set(settings_of(name))


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
    for student, teacher, _ in losses:
        state = controller.update(state, observe(student, teacher))
        expected = reference(student, teacher, expected, alpha)
        np.testing.assert_allclose(controller.weights(state), expected, rtol=1e-11)


@given(losses=measurements(st.floats(0.0, 2.0)))
def test_without_smoothing_is_equation_1_of_the_last_measurement(losses):
    weights = DDKWithoutSmoothing().weights(run(DDKWithoutSmoothing(), losses))
    np.testing.assert_allclose(weights, reference(*losses[-1][:2]), rtol=1e-11)


@pytest.mark.parametrize("prior", [[1.0, 1.0, 1.0, 1.0], [4e6, 1e6, 2e6, 1e6]])
def test_static_is_the_prior_and_records_the_gap(prior):
    start = Static().init(prior)
    state = run(Static(), np.array([(STUDENT, TEACHER)] * 3), prior)
    assert state.log_weights == start.log_weights and state.average == start.average
    unknown = see(Static(), state, ([math.nan, 1.0, 2.0, math.inf], TEACHER))
    assert unknown.log_weights == start.log_weights and not unknown.unmeasured
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
        state = controller.update(state, observe(STUDENT, TEACHER))
        np.testing.assert_allclose(controller.weights(state), prior, rtol=1e-15)
    state = controller.update(state, observe(STUDENT, TEACHER))
    first = reference(STUDENT, TEACHER)
    np.testing.assert_allclose(controller.weights(state), first, rtol=1e-13)
    state = controller.update(state, observe(STUDENT, TEACHER))
    second = reference(STUDENT, TEACHER, first, 0.5) if name == "ddk" else first
    np.testing.assert_allclose(controller.weights(state), second, rtol=1e-13)


# --- far behind


def test_a_weight_that_underflows_survives_the_next_update():
    """Equation 1 gives domain 1 exp(-2000), 0 in linear space; a larger gap must bring it back."""
    controller = DDK(gap="loss_difference", alpha=1.0)
    state = see(controller, controller.init([1.0, 1.0]), ([2000.0, 0.0], [0.0, 0.0]))
    assert controller.weights(state).tolist() == [1.0, 0.0]
    assert state.log_weights == (0.0, -2000.0)
    state = see(controller, state, ([0.0, 2001.0], [0.0, 0.0]))
    np.testing.assert_allclose(
        controller.weights(state), np.array([1.0, math.e]) / (1.0 + math.e), rtol=1e-12
    )


def test_a_ratio_of_exp_100_does_not_overflow():
    controller = DDK()
    far = ([102.0, 4.0, 3.0], [2.0, 2.0, 2.0])
    state = see(controller, controller.init([1.0] * 3), far)
    assert controller.weights(state).tolist() == [1.0, 0.0, 0.0]
    state = see(controller, state, far)
    np.testing.assert_allclose(controller.weights(state), [4 / 6, 1 / 6, 1 / 6], rtol=1e-15)


# --- laws of every controller


@few
@given(name=controller_names, losses=measurements(any_nats, 6), warmup=st.integers(0, 2))
def test_weights_are_a_distribution_whatever_was_measured(name, losses, warmup):
    for controller, _ in both(name):
        controller = type(controller)(**vars(controller) | {"warmup_intervals": warmup})
        state = run(controller, losses)
        weights = controller.weights(state)
        assert abs(weights.sum() - 1.0) <= 1e-12 and abs(sum(state.average) - 1.0) <= 1e-9
        assert np.all(weights >= 0.0) and np.all(np.isfinite(state.log_weights))
        missing = ~np.isfinite(signal(controller, losses[-1]))
        assert state.unmeasured == tuple(np.flatnonzero(missing).tolist())


@few
@given(name=controller_names, losses=measurements(any_nats, 6))
def test_a_run_that_is_stored_after_every_update_goes_on_bit_by_bit(name, losses):
    for controller, _ in both(name):
        state = controller.init(uniform(losses.shape[-1]))
        for each in losses:
            text = json.dumps(state.to_json(), allow_nan=False)  # neither NaN nor infinity
            restored = ControllerState.from_json(json.loads(text))
            assert restored == state
            state = run(controller, each[None], start=restored)
        assert state == run(controller, losses)


@few
@given(name=controller_names, losses=measurements(updates=6))
def test_no_domain_falls_under_its_floor(name, losses):
    losses = np.concatenate([losses[:1], losses]) + 0.1  # a teacher of 0 nats has no loss_ratio
    for controller, floor in both(name):
        weights = controller.weights(run(controller, losses))
        assert np.all(weights >= floor / losses.shape[-1] * (1.0 - 1e-12))


@few
@given(name=controller_names, losses=measurements(any_nats, 6), seed=st.integers(0, 2**32 - 1))
def test_the_order_of_the_domains_does_not_matter(name, losses, seed):
    order = np.random.default_rng(seed).permutation(losses.shape[-1])
    prior = np.arange(1.0, losses.shape[-1] + 1.0)
    for controller, _ in both(name):
        np.testing.assert_allclose(
            controller.weights(run(controller, losses[..., order], prior[order])),
            controller.weights(run(controller, losses, prior))[order],
            rtol=1e-6,
            atol=1e-9,
        )


@few
@given(
    name=st.sampled_from(MONOTONE), losses=measurements(), more=st.floats(0.0, 3.0), data=st.data()
)
def test_a_larger_signal_never_lowers_the_weight(name, losses, more, data):
    losses = losses + 0.1
    domain = data.draw(st.integers(0, losses.shape[-1] - 1))
    further = losses.copy()
    further[-1, [0, 2], domain] += more
    for controller, _ in both(name):
        before = controller.weights(run(controller, losses))[domain]
        assert controller.weights(run(controller, further))[domain] >= before * (1.0 - 1e-12)


@few
@given(
    name=controller_names,
    domains=st.integers(1, 6),
    curve=st.lists(st.tuples(nats, nats, nats), min_size=1, max_size=6),
)
def test_domains_that_are_alike_stay_alike(name, domains, curve):
    losses = np.repeat(np.array(curve)[:, :, None] + 0.1, domains, axis=2)
    for controller, _ in both(name):
        weights = controller.weights(run(controller, losses))
        np.testing.assert_allclose(weights, uniform(domains), rtol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_the_warm_up_keeps_the_prior_of_every_controller(name):
    losses = np.random.default_rng(0).uniform(1.0, 3.0, (8, 3, 4))
    prior = np.array([0.1, 0.2, 0.3, 0.4])
    for warmup in (0, 2):
        controller = CONTROLLERS[name](warmup_intervals=warmup)
        state = run(controller, losses[:warmup], prior)
        np.testing.assert_allclose(controller.weights(state), prior, rtol=1e-15)
        state = run(controller, losses[warmup:], start=state)
        moved = not np.allclose(controller.weights(state), prior, rtol=1e-3)
        assert moved == (name != "static")


@pytest.mark.parametrize("name", NAMES)
def test_the_average_is_that_of_the_weights_of_all_updates(name):
    losses = np.random.default_rng(1).uniform(1.0, 3.0, (5, 3, 4))
    controller = CONTROLLERS[name]()
    states = [run(controller, losses[: n + 1]) for n in range(5)]
    expected = np.mean([controller.weights(state) for state in states], axis=0)
    np.testing.assert_allclose(states[-1].average, expected, rtol=1e-12)
    assert controller.init([3.0, 1.0]).average == pytest.approx((0.75, 0.25), rel=1e-14)


def test_a_student_better_than_its_teacher_gets_less_of_that_domain():
    controller = DDK()
    state = see(controller, controller.init([1.0, 1.0]), ([1.0, 3.0], [2.0, 2.0]))
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
    state = see(controller, controller.init([1.0] * 4), (STUDENT, TEACHER))
    before = controller.weights(state)
    student, teacher = STUDENT.copy(), TEACHER.copy()
    (student if side == "student" else teacher)[1] = bad
    state = see(controller, state, (student, teacher))
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


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_domain_without_a_signal_keeps_its_weight_under_every_controller(name, bad):
    losses = np.random.default_rng(2).uniform(1.0, 3.0, (7, 3, 4))
    for controller, _ in both(name):
        state = run(controller, losses)
        bad_losses = losses[:1].copy()
        bad_losses[:, [0, 2], 1] = bad
        after = run(controller, bad_losses, start=state)
        assert after.unmeasured == (() if name == "static" else (1,))
        before, weights = controller.weights(state), controller.weights(after)
        assert weights[1] == pytest.approx(before[1], rel=1e-13)
        # Seen again, it takes part again.
        again = run(controller, losses[:3], start=after)
        assert not again.unmeasured


@pytest.mark.parametrize("name", NAMES)
def test_nothing_changes_when_nothing_was_measured(name):
    controller = CONTROLLERS[name]()
    losses = np.random.default_rng(3).uniform(1.0, 3.0, (6, 3, 4))
    state = run(controller, losses)
    unknown = see(controller, state, np.full((3, 4), math.nan))
    assert unknown.log_weights == state.log_weights
    assert unknown.unmeasured == (() if name == "static" else (0, 1, 2, 3))


@pytest.mark.parametrize("name", NAMES)
def test_what_a_controller_needs_moves_it_and_nothing_else_does(name):
    """A field of the observation that is not in `needs` may be unknown."""
    controller = CONTROLLERS[name]()
    losses = np.random.default_rng(4).uniform(1.0, 3.0, (8, 3, 4))
    fields = ("student_nats", "teacher_nats", "training_nats")
    needed = losses.copy()
    for index, field in enumerate(fields):
        if field not in controller.needs:
            needed[:, index] = math.nan
    whole, part = run(controller, losses), run(controller, needed)
    assert part.log_weights == whole.log_weights
    for index, field in enumerate(fields):
        if field in controller.needs:
            lacking = losses.copy()
            lacking[:, index] = math.nan
            assert run(controller, lacking).unmeasured == (0, 1, 2, 3)


def test_nothing_is_unmeasured_before_the_first_update():
    assert DDK().init([1.0, 2.0]).unmeasured == ()


# --- refusals


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ddk", {"gap": "ppl"}, "mixture.gap = 'ppl': must be one of ppl_ratio"),
        ("ddk", {"alpha": 1.5}, "mixture.alpha = 1.5"),
        ("ddk", {"alpha": math.nan}, "mixture.alpha = nan"),
        ("static", {"warmup_intervals": -1}, "mixture.warmup_intervals = -1"),
        ("dynamic_batch_loading", {"rate": 0.0}, "mixture.rate = 0.0"),
        ("dynamic_batch_loading", {"targets": (1.0, math.nan)}, "mixture.targets"),
        ("doremi", {"rate": math.inf}, "mixture.rate = inf"),
        ("doremi", {"uniform": -0.1}, "mixture.uniform = -0.1"),
        ("odm", {"smoothing": 1.0}, "mixture.smoothing = 1.0"),
        ("ado", {"skip_intervals": -1}, "mixture.skip_intervals = -1"),
        ("elasticity", {"power": 0.5}, "mixture.power = 0.5"),
        ("elasticity", {"rate": 0.0}, "mixture.rate = 0.0"),
        ("elasticity", {"floor": 1.5}, "mixture.floor = 1.5"),
        ("elasticity", {"window": 2}, "mixture.window = 2"),
    ],
)
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(ValueError, match=message):
        CONTROLLERS[name](**settings)


@pytest.mark.parametrize("prior", [[], [1.0, 0.0], [1.0, -1.0], [1.0, math.nan], [[1.0]]])
def test_a_prior_without_a_weight_for_every_domain_is_refused(prior):
    with pytest.raises(ValueError, match="prior"):
        DDK().init(prior)


def test_losses_for_other_domains_are_refused():
    controller = DDK()
    with pytest.raises(ValueError, match="3 losses were measured for 2 domains"):
        see(controller, controller.init([1.0, 1.0]), ([1.0] * 3, [1.0] * 3))
    with pytest.raises(ValueError, match=r"shape \(2,\) and training_nats \(1,\)"):
        observe([1.0, 2.0], training_nats=[1.0])


@pytest.mark.parametrize(
    "change",
    [
        {"log_weights": []},
        {"log_weights": [0.0, -math.inf]},
        {"gap": [1.0]},
        {"average": [1.0]},
        {"memory": {"gap": [[1.0], [2.0]]}},
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
        state = see(controller, state, (student, teacher))
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


def test_a_starved_domain_is_advised_against_whoever_starves_it():
    losses = np.array([([5.0, 2.0, 2.0], [2.0] * 3)] * 12)
    controller = CONTROLLERS["dynamic_batch_loading"]()
    text = advice(controller, run(controller, losses), ["code", "books", "speech"], 100)
    assert text is not None and "comes from books, speech" in text and "mixture.gap" not in text
    floored = Elasticity()
    assert advice(floored, run(floored, losses), ["code", "books", "speech"], 100) is None
