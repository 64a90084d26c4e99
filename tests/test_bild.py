"""BiLD against values of its official code, and what its formula is easily mistaken for."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import loss_table as table
import numpy as np
import pytest

from ddk_jax.losses.bild import bild
from ddk_jax.losses.divergences import ChunkView


def nats_of(student: np.ndarray, teacher: np.ndarray, **settings: Any) -> np.ndarray:
    """BiLD of one token for every row of the logits."""

    def nats(student: jax.Array, teacher: jax.Array) -> jax.Array:
        rows = jnp.zeros(len(student), jnp.int32)
        view = ChunkView(student, teacher, rows, rows, rows.astype(jnp.uint32))
        return bild(view, **settings)

    both = (z.astype(np.float32) for z in (student, teacher))
    return np.asarray(table.compiled(nats, *both))


@pytest.mark.parametrize(
    ("temperature", "teacher_led", "student_led"),
    [(3.0, 0.123046821170, 0.120097253450), (1.0, 1.05421090, 0.79926246)],
)
def test_both_parts_are_those_of_the_official_code(
    temperature: float, teacher_led: float, student_led: float
) -> None:
    rng = np.random.default_rng(0)
    student, teacher = (rng.normal(size=(2, 3, 32)).reshape(6, 32) for _ in range(2))
    found = {
        lead: nats_of(student, teacher, lead=lead, temperature=temperature)
        for lead in ("teacher", "student", "both")
    }
    np.testing.assert_allclose(np.mean(found["teacher"]), teacher_led, rtol=2e-6)
    np.testing.assert_allclose(np.mean(found["student"]), student_led, rtol=2e-6)
    np.testing.assert_allclose(found["both"], found["teacher"] + found["student"], rtol=1e-6)


@pytest.mark.parametrize(
    ("k", "temperature", "teacher_led", "student_led"),
    [(8, 3.0, 0.035764361350, 0.010606567214), (4, 1.0, 0.046035273170, 0.053425981370)],
)
def test_ties_of_the_teacher_go_to_the_lowest_id(
    k: int, temperature: float, teacher_led: float, student_led: float
) -> None:
    rng = np.random.default_rng(0)
    rng.normal(size=(2, 2, 3, 32))
    student = rng.normal(size=(1, 32))
    for lead, value in (("teacher", teacher_led), ("student", student_led)):
        found = nats_of(student, np.zeros((1, 32)), k=k, lead=lead, temperature=temperature)
        np.testing.assert_allclose(found[0], value, rtol=2e-5)


def test_a_temperature_divides_the_differences_and_nothing_multiplies_the_sum() -> None:
    x = table.logits(1)
    warm = nats_of(x.student, x.teacher, temperature=3.0)
    cooled = nats_of(x.student / 3, x.teacher / 3, temperature=1.0)
    np.testing.assert_allclose(warm, cooled, rtol=2e-5)


def test_only_the_order_of_a_pair_counts() -> None:
    # The student ranks the teacher's first two the other way round: its difference is negative.
    teacher = np.array([[3.0, 2.0, 1.0, -9.0]])
    swapped = np.array([[2.0, 3.0, 1.0, -9.0]])
    assert nats_of(teacher, teacher, k=3)[0] == 0
    p = np.exp(np.array([1, 2, 1]) / 3.0)
    q = np.exp(np.array([-1, 1, 2]) / 3.0)
    p, q = p / p.sum(), q / q.sum()
    found = nats_of(swapped, teacher, k=3, lead="teacher")
    np.testing.assert_allclose(found[0], np.sum(p * np.log(p / q)), rtol=1e-6)


def test_logits_beyond_the_leaders_choice_do_not_matter() -> None:
    x = table.logits(2)
    student = x.student.copy()
    outside = ~(table.among_first(x.teacher, 8) | table.among_first(x.student, 8))
    student[outside] -= 3.0
    again, found = (nats_of(z, x.teacher) for z in (student, x.student))
    np.testing.assert_allclose(again, found, rtol=1e-6)
