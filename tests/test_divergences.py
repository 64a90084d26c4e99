"""Every loss on logits against its float64 reference, and the laws that they keep."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import loss_table as table
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from loss_table import CASES, Logits

from ddk_jax.losses.bild import bild
from ddk_jax.losses.divergences import (
    RULED_OUT,
    ChunkView,
    forward_kl,
    generalised_jsd,
    skew_kl,
    skew_reverse_kl,
    spherical_kl,
    symmetric_kl,
)
from ddk_jax.losses.ranked import adaptive_kl, top_k_overlap, uld
from ddk_jax.losses.sparse import sampled_cross_entropy, sampled_kl
from ddk_jax.losses.truncated import bounded_kl, top_k_kl, top_p_kl


def published() -> Logits:
    """The logits that the values below were computed of, with other implementations, in float64."""
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(2, 3, 32)).reshape(6, 32) for _ in range(2))
    return table.at(table.logits(), student=student, teacher=teacher)


# Mean over the six tokens, by temperature. From the code of the papers' authors, TRL, KDFlow,
# DistillKit, verl and ModelOpt; where these disagree on a name, the one with our convention.
PUBLISHED = {
    1.0: {
        "forward_kl": 0.968369196121,
        "reverse_kl": 0.870696327260,
        "jsd 0.1": 0.076623593544,
        "jsd 0.5": 0.186430569135,
        "jsd 0.9": 0.072155002072,
        "skew_kl": 0.633637210428,
        "skew_reverse_kl": 0.614590926737,
        "total_variation": 0.498501814697,
        "adaptive_kl": 0.906207040201,
        "uld": 0.301026898998,
        "top_k_kl": 0.764287889862,
        "top_k_kl head": 1.019839131891,
        "top_k_kl teacher": 2.01650119,
        "top_k_kl both": 0.594468950838,
        "bild teacher": 1.05421090,
        "bild student": 0.79926246,
    },
    2.0: {
        "forward_kl": 0.245101212112,
        "reverse_kl": 0.23101401,
        "total_variation": 0.26676551,
        "top_k_kl teacher": 1.54934406,
        "top_k_kl both": 0.15075745,
    },
    3.0: {
        "bild": 0.243144074620,
        "bild teacher": 0.123046821170,
        "bild student": 0.120097253450,
    },
    4.0: {"spherical_kl 2": 3.953275589201 / 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("temperature", PUBLISHED)
def test_published_values(temperature: float) -> None:
    x = table.at(published(), temperature=temperature)
    found = table.answers(x)
    for name, value in PUBLISHED[temperature].items():
        np.testing.assert_allclose(np.mean(found[name][0]), value, rtol=2e-6, err_msg=name)
        np.testing.assert_allclose(np.mean(table.reference(name, x)), value, rtol=1e-6)


# Against the reference


SETTINGS = [(1, 2.5), (2, 0.4)]


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_the_reference(name: str) -> None:
    for seed, temperature in SETTINGS:
        x = table.logits(seed, temperature=temperature)
        nats, gradient = table.answers(x)[name]
        assert nats.dtype == gradient.dtype == np.float32
        np.testing.assert_allclose(nats, table.reference(name, x), rtol=2e-5, atol=1e-6)
    expected = table.reference_gradient(name, x)
    np.testing.assert_allclose(gradient, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_gradients_are_the_known_formulas() -> None:
    for seed, temperature in SETTINGS:
        x = table.logits(seed, temperature=temperature)
        log_p, log_q = table.softmaxes(x)
        p, q = np.exp(log_p), np.exp(log_q)
        log_m = table.mixed(log_p, log_q, 0.9)
        to_mixture = table.ref_kl(log_q, log_m)[:, None]
        sign = np.sign(q - p)
        formulas = {
            "forward_kl": q - p,
            "reverse_kl": q * (log_q - log_p - table.ref_reverse(x)[:, None]),
            "jsd 0.9": (1 - 0.9) * q * (log_q - log_m - to_mixture),
            "total_variation": 0.5 * q * (sign - np.sum(sign * q, axis=1, keepdims=True)),
        }
        found = table.answers(x)
        for name, formula in formulas.items():
            np.testing.assert_allclose(temperature * found[name][1], formula, rtol=0, atol=2e-6)
        q = np.exp(table.log_softmax(x.student))
        q[np.arange(6), x.labels] -= 1
        np.testing.assert_allclose(found["cross_entropy"][1], q, rtol=0, atol=1e-6)


# Laws


def close(found: table.Answers, name: str, expected: np.ndarray, atol: float = 2e-6) -> None:
    np.testing.assert_allclose(found[name][0], expected, rtol=2e-5, atol=atol, err_msg=name)


def test_student_equal_to_teacher_is_the_minimum() -> None:
    x = table.logits(4)
    found = table.answers(table.at(x, teacher=x.student))
    for name, case in CASES.items():
        if case.zero:
            close(found, name, np.zeros(6))
        if case.zero and case.nonnegative and not case.kink:
            np.testing.assert_allclose(found[name][1], 0, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(found["top_k_overlap"][0], 1)


def test_adding_a_number_to_all_logits_changes_nothing() -> None:
    x, rng = table.logits(5, temperature=1.3), np.random.default_rng(0)
    found = table.answers(x)
    shifts = rng.normal(0, 20, (2, 6, 1))
    moved = table.answers(table.at(x, student=x.student + shifts[0], teacher=x.teacher + shifts[1]))
    for name in CASES:
        close(moved, name, found[name][0], 1e-5)
        np.testing.assert_allclose(moved[name][1], found[name][1], atol=1e-5, err_msg=name)


def test_the_names_of_the_entries_do_not_matter() -> None:
    x, permutation = table.logits(6), np.random.default_rng(1).permutation(32)
    renamed = np.argsort(permutation)[x.labels]
    moved = table.at(
        x, student=x.student[:, permutation], teacher=x.teacher[:, permutation], labels=renamed
    )
    found, again = table.answers(x), table.answers(moved)
    for name, case in CASES.items():
        if not case.named:
            close(again, name, found[name][0])
            expected = found[name][1][:, permutation]
            np.testing.assert_allclose(again[name][1], expected, atol=1e-6, err_msg=name)


def test_renaming_the_entries_of_one_model_changes_all_but_a_comparison_of_shapes() -> None:
    x, permutation = table.logits(6), np.random.default_rng(1).permutation(32)
    found, again = (table.answers(y) for y in (x, table.at(x, teacher=x.teacher[:, permutation])))
    for name in CASES:
        if name in ("uld", "uld 5", "cross_entropy"):
            close(again, name, found[name][0])
        else:
            assert np.abs(again[name][0] - found[name][0]).max() > 0.01, name


def test_the_temperature_is_used() -> None:
    x = table.logits(7)
    warm, cold = (table.answers(table.at(x, temperature=t)) for t in (2.0, 0.5))
    for name, case in CASES.items():
        differs = np.abs(warm[name][0] - cold[name][0]).max() > 1e-3
        assert differs == case.temperature, name


# Values that are not ordinary


def finite(answer: Iterable[np.ndarray]) -> bool:
    return all(np.all(np.isfinite(x)) for x in answer)


def test_entries_that_do_not_exist_have_no_influence() -> None:
    x = table.logits(8, temperature=3.0)
    labels = x.labels % 26
    outside = np.array([3, 11, 20, 29, 30, 31])
    inside = np.setdiff1d(np.arange(32), outside)
    student, teacher = x.student.copy(), x.teacher.copy()
    student[:, outside] = teacher[:, outside] = RULED_OUT
    padded = table.at(x, student=student, teacher=teacher, labels=inside[labels])
    cut = table.at(x, student=x.student[:, inside], teacher=x.teacher[:, inside], labels=labels)
    found = table.answers(padded)
    for name, case in CASES.items():
        assert finite(found[name]), name
        np.testing.assert_array_equal(found[name][1][:, outside], 0, err_msg=name)
        close(found, name, table.reference(name, padded if case.named else cut))


def test_entries_that_the_teacher_rules_out() -> None:
    x = table.logits(9)
    teacher = x.teacher.copy()
    teacher[:, [3, 7, 31]] = -np.inf
    teacher[0, 1:] = -np.inf  # one entry is left
    x = table.at(x, teacher=teacher, labels=np.array([0, 5, 5, 5, 5, 5]))
    found = table.answers(x)
    for name, case in CASES.items():
        if case.infinite:
            np.testing.assert_array_equal(found[name][0], np.inf, err_msg=name)
        else:
            assert finite(found[name]), name
            close(found, name, table.reference(name, x))


def test_entries_that_the_student_rules_out() -> None:
    x = table.logits(10)
    student = x.student.copy()
    favourite = np.argmax(x.teacher, axis=1)
    student[np.arange(6), favourite] = -np.inf
    x = table.at(x, student=student, labels=(favourite + 1) % 32)
    found = table.answers(x)
    infinite = [name for name in CASES if np.any(np.isinf(found[name][0]))]
    assert not any(np.any(np.isnan(found[name][0])) for name in CASES)
    assert {"forward_kl", "symmetric_kl", "top_k_kl", "spherical_kl"} < set(infinite)
    for name in CASES:
        if name not in infinite:
            assert finite(found[name]), name
            close(found, name, table.reference(name, x))
    np.testing.assert_array_equal(found["forward_kl"][0], np.inf)
    assert finite([found["forward_kl"][1]])


@pytest.mark.parametrize("size", [1e4, 1e-30])
def test_huge_and_tiny_logits(size: float) -> None:
    x = table.logits(11)
    x = table.at(
        x,
        student=(x.student * size).astype(np.float32).astype(np.float64),
        teacher=(x.teacher * size).astype(np.float32).astype(np.float64),
    )
    found = table.answers(x)
    for name in CASES:
        assert finite(found[name]), name
        close(found, name, table.reference(name, x), 2e-6 * max(size, 1))


def test_equal_logits() -> None:
    # What masked tokens look like to a loss.
    x = table.at(table.logits(), student=np.zeros((6, 32)), teacher=np.zeros((6, 32)))
    found = table.answers(x)
    for name in CASES:
        assert finite(found[name]), name
        close(found, name, table.reference(name, x))


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_nan_is_seen_where_it_is_and_nowhere_else(whose: str) -> None:
    x = table.logits(12)
    student, teacher = x.student.copy(), x.teacher.copy()
    student[2, 4] = teacher[2, 4] = 3.0  # the favourite of both
    clean = table.answers(table.at(x, student=student, teacher=teacher))
    (student if whose == "student" else teacher)[2, 4] = np.nan
    found = table.answers(table.at(x, student=student, teacher=teacher))
    others = np.arange(6) != 2
    for name, case in CASES.items():
        reads = whose == "student" or name != "cross_entropy"
        assert np.isnan(found[name][0][2]) == (reads and not case.metric), name
        for got, want in zip(found[name], clean[name], strict=True):
            np.testing.assert_array_equal(got[others], want[others], err_msg=name)


ordinary = st.floats(-40, 40, width=32)
rounded = st.integers(-3, 3).map(float)  # ties
extraordinary = st.sampled_from([RULED_OUT, -1e4, 0.0, 1e-30, 1e4])


@given(
    hnp.arrays(np.float64, (2, 6, 8), elements=ordinary | rounded | extraordinary),
    st.sampled_from([0.3, 1.0, 5.0]),
)
@settings(max_examples=25)
def test_any_logits_give_values_that_are_finite_and_not_negative(
    both: np.ndarray, temperature: float
) -> None:
    both = np.concatenate([both, np.random.default_rng(0).normal(size=(2, 6, 24))], axis=2)
    ruled_out = both[0] <= RULED_OUT  # in both, as the padding of the heads is
    both = np.where(ruled_out, RULED_OUT, np.maximum(both, -1e4))
    found = table.answers(table.logits(student=both[0], teacher=both[1], temperature=temperature))
    for name, case in CASES.items():
        assert finite(found[name]), name
        if case.nonnegative:
            assert np.all(found[name][0] >= -1e-4), name
        np.testing.assert_array_equal(found[name][1][ruled_out], 0, err_msg=name)


@pytest.mark.parametrize("seed", range(3))
def test_ties_go_to_the_lowest_id(seed: int) -> None:
    student, teacher = np.random.default_rng(seed).integers(-2, 3, (2, 6, 32)).astype(np.float64)
    x = table.logits(seed, student=student, teacher=teacher)
    found = table.answers(x)
    for name in CASES:
        close(found, name, table.reference(name, x))


@pytest.mark.slow
def test_bfloat16_logits_are_taken_to_float32_first() -> None:
    x = table.logits(13)
    student, teacher = (jnp.asarray(z, jnp.bfloat16) for z in (x.student, x.teacher))

    def values(student: jax.Array, teacher: jax.Array) -> dict[str, jax.Array]:
        labels, one = jnp.asarray(x.labels, jnp.int32), jnp.float32(1)
        view = ChunkView(student, teacher, labels, labels, jnp.asarray(x.draw))
        return {name: table.nats_of(name, view, one) for name in table.PLAIN}

    rounded = (np.asarray(z, np.float64) for z in (student, teacher))
    wide = table.answers(table.at(x, **dict(zip(("student", "teacher"), rounded, strict=True))))
    for name, nats in table.compiled(values, student, teacher).items():
        assert nats.dtype == jnp.float32, name
        np.testing.assert_allclose(nats, wide[name][0], rtol=1e-5, atol=1e-6, err_msg=name)


# What is easily got wrong


def each(losses: Iterable[Any], student: Any, teacher: Any) -> list[np.ndarray]:
    """Nats under several losses, of one token for every row of the logits."""

    def nats(student: jax.Array, teacher: jax.Array) -> list[jax.Array]:
        rows = jnp.zeros(len(student), jnp.int32)
        view = ChunkView(student, teacher, rows, rows, rows.astype(jnp.uint32))
        return [loss(view) for loss in losses]

    both = (np.atleast_2d(z).astype(np.float32) for z in (student, teacher))
    return [np.asarray(x) for x in table.compiled(nats, *both)]


def of(loss: Any, student: Any, teacher: Any, **settings: Any) -> np.ndarray:
    """Nats under one loss."""
    return each([partial(loss, **settings)], student, teacher)[0]


def test_the_teacher_stands_first_in_a_forward_kl() -> None:
    one_sided = np.log([0.5, 0.5, 1e-9]), np.log([1 - 1e-9, 1e-9, 1e-9])
    np.testing.assert_allclose(of(forward_kl, *one_sided), math.log(2), rtol=1e-5)
    halves = np.log([0.5, 0.25, 0.25]), np.log([0.25, 0.25, 0.5])
    np.testing.assert_allclose(of(forward_kl, *halves), 0.25 * math.log(2), rtol=1e-6)


@pytest.mark.parametrize("beta", [1e-3, 1 - 1e-3])
def test_beta_is_the_weight_of_the_teacher(beta: float) -> None:
    # At small beta the mixture is the student: jsd / beta is nearly the forward KL.
    x = table.logits(3)
    jsd = of(generalised_jsd, x.student, x.teacher, beta=beta)
    expected = table.ref_forward(x) if beta < 0.5 else table.ref_reverse(x)
    np.testing.assert_allclose(jsd / min(beta, 1 - beta), expected, rtol=0.02)


def test_a_forward_kl_is_no_cross_entropy_and_no_mean_over_the_vocabulary() -> None:
    x = table.logits(3, tokens=1, vocabulary=1000)
    kl, zero = of(forward_kl, [*x.student, *x.teacher], [*x.teacher, *x.teacher])
    np.testing.assert_allclose(kl, table.ref_forward(x)[0], rtol=1e-5)
    assert kl > 0.5  # a mean over the entries would be a thousandth of it
    assert abs(zero) < 1e-6


def test_a_top_k_kl_sees_a_student_that_is_entirely_wrong() -> None:
    student, teacher = np.zeros((6, 32)), np.zeros((6, 32))
    teacher[:, :8], student[:, 16:] = 12.0, 12.0
    found = {
        name: nats
        for name, (nats, _) in table.answers(table.logits(student=student, teacher=teacher)).items()
    }
    np.testing.assert_allclose(found["top_k_kl"], found["forward_kl"], rtol=1e-3)
    assert np.all(found["top_k_kl"] > 10)
    assert np.all(found["top_k_kl teacher"] > 10)
    # Renormalised on both sides it is blind, as its documentation says.
    np.testing.assert_allclose(found["top_k_kl both"], 0, atol=1e-6)


def test_a_full_top_k_is_the_dense_divergence() -> None:
    x = table.logits(3, tokens=1)
    whole = [
        partial(top_k_kl, k=32, renormalise=r, tail=False) for r in ("none", "teacher", "both")
    ]
    parts = [partial(top_k_kl, k=k) for k in (4, 16, 32)]
    found = np.concatenate(each([*whole, *parts], x.student, x.teacher))
    gaps = np.abs(found - table.ref_forward(x))
    np.testing.assert_allclose(gaps[[0, 1, 2, 5]], 0, atol=2e-6)
    assert gaps[3] > gaps[4] > gaps[5]


def test_a_tail_beside_a_head_with_nearly_all_of_the_mass() -> None:
    # One minus the head would be rounding noise here, and its logarithm anything.
    student, teacher = np.zeros((6, 32)), np.zeros((6, 32))
    student[:, :8], teacher[:, :8] = 33.0, 30.0
    x = table.at(table.logits(), student=student, teacher=teacher)
    p, q = (np.exp(z) for z in table.softmaxes(x))
    nats, gradient = table.answers(x)["top_k_kl"]
    np.testing.assert_allclose(gradient[:, 8:], (q - p)[:, 8:], rtol=1e-4)
    assert np.all(np.abs(nats) < 1e-6)


def test_top_p_keeps_the_entry_that_reaches_the_mass() -> None:
    teacher = np.log([0.15, 0.5, 0.3, 0.05])
    wanted = {0.4: [0.5], 0.6: [0.5, 0.3], 0.9: [0.5, 0.3, 0.15]}
    losses = [partial(top_p_kl, p=p, renormalise="both", tail=False) for p in wanted]
    for kept, found in zip(wanted.values(), each(losses, np.zeros(4), teacher), strict=True):
        share = np.array(kept) / np.sum(kept)
        np.testing.assert_allclose(found, np.sum(share * np.log(share * len(kept))), atol=1e-6)


def test_a_bounded_kl_without_any_entry_is_zero() -> None:
    assert of(bounded_kl, np.arange(4.0), np.zeros(4), lower=0.5, keep_label=False) == 0


@pytest.mark.parametrize("p", [(0.4, 0.3, 0.2, 0.1), (0.7, 0.1, 0.1, 0.1)])
def test_the_head_of_an_adaptive_kl(p: tuple[float, ...]) -> None:
    # 0.4 + 0.3 crosses 0.5: the second entry is tail. An entry that alone holds more is the head.
    q = np.array([0.1, 0.2, 0.3, 0.4])
    gap = np.abs(p - q)
    w = gap[0] / gap.sum()
    forward, reverse = np.sum(p * np.log(p / q)), np.sum(q * np.log(q / p))
    found = of(adaptive_kl, np.log(q), np.log(p))
    np.testing.assert_allclose(found, w * forward + (1 - w) * reverse, rtol=1e-5)


def test_uld_across_vocabularies() -> None:
    teacher, student = np.log([0.1, 0.6, 0.3]), np.log([0.2, 0.1, 0.3, 0.15, 0.25])
    wanted = 0.6 - 0.3 + 0.3 - 0.25 + 0.2 - 0.1 + 0.15 + 0.1
    whole, first_two = each([uld, partial(uld, candidates=2)], student, teacher)
    np.testing.assert_allclose(whole, wanted, rtol=1e-6)
    np.testing.assert_allclose(first_two, 0.35 + 0.35, rtol=1e-6)
    np.testing.assert_allclose(of(uld, teacher, student), wanted, rtol=1e-6)


def test_a_spherical_kl_does_not_see_how_confident_the_student_is() -> None:
    x = table.logits(3, tokens=1)
    confident = 5 * x.teacher, x.teacher
    plain, spherical = each([forward_kl, spherical_kl], *confident)
    assert plain > 0.1 and abs(spherical) < 1e-6
    # With its own scale the teacher's distribution is what it was, and so is a mirrored student.
    mirrored = x.teacher[:, ::-1], x.teacher
    plain, spherical = each([forward_kl, spherical_kl], *mirrored)
    np.testing.assert_allclose(spherical, plain, rtol=1e-5)


# Settings


@pytest.mark.parametrize(
    ("loss", "given", "message"),
    [
        (generalised_jsd, {"beta": 0.0}, "forward_kl"),
        (generalised_jsd, {"beta": 1.0}, "reverse_kl"),
        (generalised_jsd, {"beta": math.nan}, "beta"),
        (skew_kl, {"alpha": 0.0}, "forward_kl"),
        (skew_reverse_kl, {"alpha": 1.0}, "alpha"),
        (symmetric_kl, {"forward_weight": 1.0}, "forward_kl"),
        (spherical_kl, {"scale": 0.0}, "scale"),
        (adaptive_kl, {"mu": 1.0}, "mu"),
        (adaptive_kl, {"candidates": 33}, "33 largest of 32"),
        (bild, {"k": 2}, "at least 3"),
        (bild, {"k": 33}, "33 largest of 32"),
        (top_k_kl, {"k": 0}, "0 largest"),
        (top_k_kl, {"k": 8, "renormalise": "both"}, "tail: false"),
        (top_p_kl, {"p": 1.0}, "forward_kl"),
        (top_p_kl, {"p": 0.5, "renormalise": "teacher"}, "tail: false"),
        (top_p_kl, {"candidates": -1}, "-1 largest"),
        (bounded_kl, {"lower": 0.5, "upper": 0.1}, "lower < upper"),
        (sampled_kl, {"samples": 0}, "samples"),
        (sampled_cross_entropy, {"proposal": 0.0}, "proposal"),
        (uld, {"candidates": 40}, "40 largest"),
        (top_k_overlap, {"k": 0}, "0 largest"),
        (forward_kl, {"temperature": 0.0}, "temperature"),
        (bild, {"temperature": -1.0}, "temperature"),
        (sampled_kl, {"temperature": math.inf}, "temperature"),
    ],
)
def test_settings_that_make_no_sense_are_refused_when_a_loss_is_traced(
    loss: Any, given: dict[str, Any], message: str
) -> None:
    x = table.logits()
    with pytest.raises(ValueError, match=message):
        of(loss, x.student, x.teacher, **given)
