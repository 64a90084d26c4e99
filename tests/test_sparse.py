"""Targets of a few entries: equal to the dense loss where that can be, else unbiased."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import loss_table as table
import numpy as np
import pytest
from loss_table import Logits, compiled
from quick import QUICK

from ddk_jax.losses.sparse import (
    SampledTargets,
    SparseTargets,
    draw_targets,
    sparse_cross_entropy,
    sparse_kl,
    top_k_targets,
)

CONVENTIONS = [("none", True), ("none", False), ("teacher", False), ("both", False)]


def single(x: np.ndarray) -> jax.Array:
    return jnp.asarray(x, jnp.float32)


# The most probable entries


def by_convention(
    student: jax.Array, targets: SparseTargets, temperature: jax.Array, shards: int
) -> list[tuple[jax.Array, jax.Array]]:
    """Nats, and the gradient of their sum."""
    found = []
    for renormalise, tail in CONVENTIONS:

        def total(student: jax.Array, renormalise: Any = renormalise, tail: bool = tail) -> Any:
            given = {"renormalise": renormalise, "tail": tail, "shards": shards}
            nats = sparse_kl(student, targets, temperature=temperature, **given)
            return jnp.sum(nats), nats

        gradient, nats = jax.grad(total, has_aux=True)(student)
        found.append((nats, gradient))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("shards", "temperature"), [(1, 1.0), (4, 2.5)])
def test_targets_of_the_top_k_give_the_loss_of_a_live_teacher(
    shards: int, temperature: float
) -> None:
    x = table.logits(1, temperature=temperature)
    live = table.answers(x)

    def of_top_8(student: jax.Array, teacher: jax.Array) -> Any:
        targets = top_k_targets(teacher, 8, temperature=temperature, shards=shards)
        return by_convention(student, targets, jnp.float32(temperature), shards)

    found = compiled(of_top_8, single(x.student), single(x.teacher))
    names = ("top_k_kl", "top_k_kl head", "top_k_kl teacher", "top_k_kl both")
    for name, (nats, gradient) in zip(names, found, strict=True):
        np.testing.assert_allclose(nats, live[name][0], rtol=1e-5, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(gradient, live[name][1], atol=1e-6, err_msg=name)


def test_the_tail_is_the_tempered_mass_of_its_entries() -> None:
    x = table.logits(2, temperature=4.0)
    targets = compiled(top_k_targets, single(x.teacher), k=5, temperature=4.0)
    p = np.exp(table.log_softmax(x.teacher / 4))
    listed = table.among_first(x.teacher, 5)
    np.testing.assert_allclose(np.exp(targets.log_tail), np.sum(p, 1, where=~listed), rtol=1e-5)
    cold = np.exp(table.log_softmax(x.teacher))
    tempered = np.sum(cold, 1, where=~listed) ** 0.25  # what others take it for
    assert np.abs(np.exp(targets.log_tail) - tempered).min() > 0.02


def test_slots_that_are_not_used_have_no_influence() -> None:
    x = table.logits(3)
    favourite = np.argmax(x.student, axis=1).astype(np.int32)[:, None]

    def padded_and_not(student: jax.Array, teacher: jax.Array) -> list[Any]:
        targets = top_k_targets(teacher, 4)
        unused = jnp.tile(jnp.array([[-jnp.inf, -1e30]], jnp.float32), (6, 1))
        padded = SparseTargets(
            jnp.concatenate([targets.ids, favourite, targets.ids[:, :1]], axis=1),
            jnp.concatenate([targets.log_probs, unused], axis=1),
            targets.log_tail,
        )
        return [
            sparse_kl(student, t, renormalise=renormalise, tail=tail)
            for renormalise, tail in CONVENTIONS
            for t in (padded, targets)
        ]

    found = compiled(padded_and_not, single(x.student), single(x.teacher))
    np.testing.assert_allclose(found[::2], found[1::2], rtol=1e-5)


# Entries drawn at random


@partial(jax.jit, static_argnums=(3, 4), compiler_options=QUICK)
def estimates(
    student: jax.Array, teacher: jax.Array, draw: jax.Array, samples: int, proposal: float
) -> tuple[jax.Array, jax.Array, SampledTargets]:
    """Cross-entropies, the gradient of their sum, and what was drawn."""
    targets = draw_targets(teacher, draw, samples=samples, proposal=proposal)

    def total(student: jax.Array) -> tuple[jax.Array, jax.Array]:
        nats = sparse_cross_entropy(student, targets)
        return jnp.sum(nats), nats

    gradient, nats = jax.grad(total, has_aux=True)(student)
    return nats, gradient, targets


DRAWS = 4096


def many(samples: int, proposal: float) -> tuple[Logits, np.ndarray, np.ndarray, SampledTargets]:
    """One token, again and again."""
    x = table.logits(4, tokens=1)
    tiled = (jnp.tile(single(z), (DRAWS, 1)) for z in (x.student, x.teacher))
    nats, gradient, targets = estimates(
        *tiled, jnp.arange(DRAWS, dtype=jnp.uint32), samples, proposal
    )
    return x, np.asarray(nats, np.float64), np.asarray(gradient, np.float64), targets


@pytest.mark.parametrize(("samples", "proposal"), [(8, 1.0), (8, 0.6)])
def test_estimates_are_unbiased(samples: int, proposal: float) -> None:
    x, nats, gradient, _ = many(samples, proposal)
    log_p, log_q = (z[0] for z in table.softmaxes(x))
    for found, wanted in (
        (nats, -np.sum(np.exp(log_p) * log_q)),
        (gradient, np.exp(log_q) - np.exp(log_p)),
    ):
        error = np.std(found, axis=0) / np.sqrt(DRAWS)
        assert np.all(np.abs(np.mean(found, axis=0) - wanted) < 5 * error)


def test_the_error_falls_with_the_root_of_the_samples() -> None:
    errors = {}
    for samples in (8, 128):
        x, _, gradient, targets = many(samples, 1.0)
        log_p, log_q = (z[0] for z in table.softmaxes(x))
        p = np.exp(log_p)
        errors[samples] = np.sqrt(np.mean((gradient - (np.exp(log_q) - p)) ** 2, axis=0))
        # Draws from the teacher itself weigh the same, and the variance is that of their counts.
        np.testing.assert_allclose(targets.weights, 1 / samples, rtol=1e-5)
        np.testing.assert_allclose(errors[samples], np.sqrt(p * (1 - p) / samples), rtol=0.15)
    np.testing.assert_allclose(errors[8] / errors[128], 4, rtol=0.2)


def test_the_weights_are_the_ratio_of_teacher_and_proposal() -> None:
    x, _, _, targets = many(8, 0.6)
    log_p = np.broadcast_to(table.softmaxes(x)[0], (DRAWS, 32))
    log_r = table.log_softmax(0.6 * log_p)
    wanted = np.take_along_axis(np.exp(log_p - log_r) / 8, np.asarray(targets.ids), axis=1)
    np.testing.assert_allclose(targets.weights, wanted, rtol=1e-5)


def test_what_is_drawn_does_not_depend_on_the_other_tokens_or_on_the_sharding() -> None:
    x, order = table.logits(5), np.array([3, 0, 5, 1, 4, 2])

    def ids(teacher: jax.Array, draw: jax.Array, shards: int) -> jax.Array:
        return draw_targets(teacher, draw, samples=64, shards=shards).ids

    whole = np.asarray(compiled(ids, single(x.teacher), x.draw, shards=1))
    moved = compiled(ids, single(x.teacher[order]), x.draw[order], shards=4)
    np.testing.assert_array_equal(moved, whole[order])
    # Equal logits, but another draw.
    others = np.asarray(compiled(ids, single(x.teacher[[0] * 6]), x.draw, shards=1))
    assert (others[1:] != others[0]).mean() > 0.5


def test_every_entry_of_a_large_vocabulary_is_within_reach() -> None:
    # One entry holds all but 10^-5, which 2^15 others share: 3 * 10^-10 each. A float32
    # cumulative sum stands still at such steps.
    V = 2**15
    teacher = np.full((1, V), -22.0, np.float32)
    teacher[0, 0] = 0.0
    logits = jnp.tile(jnp.asarray(teacher), (16, 1))
    draw = jnp.arange(16, dtype=jnp.uint32)
    targets = compiled(draw_targets, logits, draw, samples=2048, proposal=0.5)
    rare = np.asarray(targets.ids)[np.asarray(targets.ids) > 0]
    # At the exponent 1/2 the others hold half of the draws, evenly.
    share = V * np.exp(-11.0) / (1 + V * np.exp(-11.0))
    np.testing.assert_allclose(rare.size / targets.ids.size, share, rtol=0.02)
    counts = np.histogram(rare, bins=8, range=(1, V))[0]
    np.testing.assert_allclose(counts, rare.size / 8, rtol=0.1)
    np.testing.assert_allclose(np.mean(np.sum(targets.weights, axis=1)), 1, rtol=0.02)


def test_entries_that_are_ruled_out_are_never_drawn() -> None:
    x = table.logits(6)
    teacher = x.teacher.copy()
    teacher[:, ::2] = -np.inf
    teacher[:, 1] = -1e30
    made = compiled(draw_targets, single(teacher), x.draw, samples=500, temperature=3.0)
    ids = np.asarray(made.ids)
    assert np.all(ids % 2 == 1) and np.all(ids > 1)
