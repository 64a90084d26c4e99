"""What BiLD's formula is easily mistaken for; its values and laws are in `test_divergences`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import loss_table as table
import numpy as np
import pytest
from loss_table import Logits

from ddk_jax.losses.bild import bild
from ddk_jax.losses.divergences import ChunkView


def nats_of(name: str, x: Logits) -> np.ndarray:
    return table.answers(x)[name][0]


@pytest.mark.parametrize(
    ("name", "temperature", "value"),
    [
        ("bild teacher", 3.0, 0.035764361350),
        ("bild student", 3.0, 0.010606567214),
        ("bild 4", 1.0, 0.046035273170 + 0.053425981370),
    ],
)
def test_ties_of_the_teacher_go_to_the_lowest_id(
    name: str, temperature: float, value: float
) -> None:
    # Values of the official code, but for the order of ties, which is that of a stable sort.
    rng = np.random.default_rng(0)
    rng.normal(size=(2, 2, 3, 32))
    student = np.tile(rng.normal(size=(1, 32)), (6, 1))
    x = table.logits(student=student, teacher=np.zeros((6, 32)), temperature=temperature)
    np.testing.assert_allclose(nats_of(name, x), value, rtol=3e-5)


def test_the_parts_add_up() -> None:
    x = table.logits(1, temperature=2.0)
    teacher, student = (nats_of(f"bild {lead}", x) for lead in ("teacher", "student"))
    np.testing.assert_allclose(nats_of("bild", x), teacher + student, rtol=1e-6)


def test_a_temperature_divides_the_differences_and_nothing_multiplies_the_sum() -> None:
    x = table.logits(1, temperature=3.0)
    cooled = table.at(x, student=x.student / 3, teacher=x.teacher / 3, temperature=1.0)
    np.testing.assert_allclose(nats_of("bild", x), nats_of("bild", cooled), rtol=2e-5)


def test_the_leader_decides_which_entry_of_a_pair_comes_first() -> None:
    # The student ranks the teacher's first two the other way round: its difference is negative.
    teacher, student = (np.array([z], np.float32) for z in ([3, 2, 1, -9], [2, 3, 1, -9]))

    def led_by_teacher(student: jax.Array, teacher: jax.Array) -> jax.Array:
        row = jnp.zeros(1, jnp.int32)
        view = ChunkView(student, teacher, row, row, row.astype(jnp.uint32))
        return bild(view, k=3, lead="teacher", temperature=3.0)

    p = np.exp(np.array([1, 2, 1]) / 3.0)
    q = np.exp(np.array([-1, 1, 2]) / 3.0)
    p, q = p / p.sum(), q / q.sum()
    found = table.compiled(led_by_teacher, student, teacher)
    np.testing.assert_allclose(found[0], np.sum(p * np.log(p / q)), rtol=1e-6)


def test_logits_beyond_the_leaders_choice_do_not_matter() -> None:
    x = table.logits(2)
    student = x.student.copy()
    student[~(table.among_first(x.teacher, 8) | table.among_first(x.student, 8))] -= 3.0
    moved = table.at(x, student=student)
    np.testing.assert_allclose(nats_of("bild", moved), nats_of("bild", x), rtol=1e-6)
