"""Simulated students for the controllers: gaps that close, or do not, with the tokens drawn.

Two kinds, since nobody knows which one a real student is. A `Learner` gets better at a domain with
all the tokens that it has ever seen of it; a `Juggler` has no room left, and moves within a few
intervals to what it can hold of a domain at its present share. Neither is the model that the
elasticity controller assumes. `python tests/students.py` prints the table of `docs/mixture.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from ddk_jax.mixture.controller import Controller, observe
from ddk_jax.mixture.controllers import CONTROLLERS
from ddk_jax.mixture.ddk import DDK, DDKWithoutSmoothing, Static
from ddk_jax.mixture.elasticity import Elasticity

INTERVAL = 1e5
"""Tokens between two updates."""


class Student(Protocol):
    """What the simulation needs of a student."""

    def gap(self) -> np.ndarray:
        """Nats behind the teacher, by domain."""
        ...

    def learn(self, share: np.ndarray) -> None:
        """Train for an interval."""
        ...


@dataclass
class Learner:
    """gap = limit + (start - limit) (1 + seen / scale)^-power; `scale` in tokens."""

    start: np.ndarray
    limit: np.ndarray
    scale: np.ndarray
    power: np.ndarray
    transfer: float = 0.0
    """How much a token of any domain counts for every other."""
    seen: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def gap(self) -> np.ndarray:
        counted = (1 - self.transfer) * self.seen + self.transfer * self.seen.sum()
        return self.limit + (self.start - self.limit) * (1 + counted / self.scale) ** -self.power

    def learn(self, share: np.ndarray) -> None:
        self.seen = self.seen + INTERVAL * share


@dataclass
class Juggler:
    """The gap goes to limit + reach (D share)^-power, a fraction of the way in each interval."""

    start: np.ndarray
    limit: np.ndarray
    reach: np.ndarray
    power: float = 0.4
    pace: float = 0.15

    def gap(self) -> np.ndarray:
        return self.start

    def learn(self, share: np.ndarray) -> None:
        goal = self.limit + self.reach * (len(share) * np.maximum(share, 1e-3)) ** -self.power
        self.start = self.start + self.pace * (goal - self.start)


class Outcome(NamedTuple):
    """How a run ended."""

    mean: float
    """Mean gap over the domains, nats per token."""
    worst: float
    """Largest gap."""
    weights: np.ndarray
    """[updates, D]."""


def distil(
    student: Student,
    controller: Controller,
    *,
    updates: int = 40,
    noise: float = 0.005,
    seed: int = 0,
) -> Outcome:
    """A run of so many intervals.

    Args:
        student: at its start; is trained.
        controller: follows the noisy losses.
        updates: intervals.
        noise: standard deviation in nats of what a measurement has of its own in every domain, and
            of what it has in common in all of them.
        seed: of the noise and of the teacher.
    """
    rng = np.random.default_rng(seed)
    count = len(student.gap())
    teacher = rng.uniform(1.5, 3.5, count)
    state = controller.init(np.ones(count))
    tokens, training, history = np.zeros(count), None, []
    for update in range(updates):
        measured = student.gap() + noise * (rng.standard_normal(count) + rng.standard_normal())
        seen = observe(
            teacher + measured,
            teacher,
            training_nats=training,
            tokens=tokens,
            step=100 * update,
        )
        state = controller.update(state, seen)
        weights = controller.weights(state)
        before = student.gap()
        student.learn(weights)
        tokens = tokens + INTERVAL * weights
        training = teacher + (before + student.gap()) / 2 + noise * rng.standard_normal(count)
        history.append(weights)
    gap = student.gap()
    return Outcome(float(gap.mean()), float(gap.max()), np.array(history))


def learner(*rows: Sequence[float], transfer: float = 0.0) -> Learner:
    """A learner from rows of start, limit, scale in intervals, and power."""
    start, limit, scale, power = np.array(rows).T
    seen = np.zeros(len(rows))
    return Learner(start, limit, scale * INTERVAL, power, transfer, seen)


def slow_and_stuck() -> Learner:
    """The worst domain closes slowly; two others are nearly as bad, and never will."""
    quick = ((0.6, 0.05), (0.5, 0.05), (0.4, 0.05), (0.3, 0.05), (0.2, 0.05))
    return learner(
        (1.2, 0.1, 5.0, 0.6),
        (0.9, 0.6, 0.3, 1.0),
        (0.8, 0.5, 0.3, 1.0),
        *((start, limit, 2.0, 0.5) for start, limit in quick),
    )


def all_alike() -> Learner:
    """Every gap closes to 0, all at the same rate: what DDK takes for granted."""
    return learner(*((start, 0.0, 2.0, 0.5) for start in (1.2, 1.0, 0.8, 0.6, 0.5, 0.4, 0.3, 0.2)))


def worst_is_stuck() -> Learner:
    """The largest gap by far cannot be closed."""
    rest = ((0.9, 0.1), (0.8, 0.1), (0.6, 0.05), (0.5, 0.05), (0.4, 0.05), (0.3, 0.05), (0.2, 0.05))
    return learner((2.0, 1.8, 1.0, 1.0), *((start, limit, 3.0, 0.6) for start, limit in rest))


def full() -> Juggler:
    """No room left, and two domains on which tokens are wasted."""
    return Juggler(
        start=np.array([0.5, 0.45, 0.4, 0.4, 0.35, 0.3, 0.3, 0.2]),
        limit=np.array([0.45, 0.4, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1]),
        reach=np.array([0.05, 0.05, 0.3, 0.3, 0.2, 0.2, 0.1, 0.1]),
    )


def full_and_alike() -> Juggler:
    """No room left; every domain answers to its tokens."""
    return Juggler(
        start=np.array([0.6, 0.5, 0.4, 0.4, 0.3, 0.3, 0.3, 0.2]),
        limit=np.full(8, 0.1),
        reach=np.array([0.4, 0.3, 0.3, 0.2, 0.2, 0.2, 0.1, 0.1]),
    )


def random_learner(seed: int) -> Learner:
    """Ten domains; every third or so is nearly stuck."""
    rng = np.random.default_rng(seed)
    start = rng.uniform(0.2, 1.2, 10)
    part = np.where(rng.random(10) < 0.3, rng.uniform(0.6, 0.95, 10), rng.uniform(0, 0.3, 10))
    scale, power = rng.uniform(0.4, 4.0, 10), rng.uniform(0.3, 1.0, 10)
    return learner(*zip(start, start * part, scale, power, strict=True), transfer=0.1)


def random_juggler(seed: int) -> Juggler:
    """Likewise."""
    like = random_learner(seed)
    return Juggler(start=like.start, limit=like.limit, reach=0.7 * (like.start - like.limit))


WORLDS: dict[str, Callable[[int], Student]] = {
    "slow_and_stuck": lambda seed: slow_and_stuck(),
    "all_alike": lambda seed: all_alike(),
    "worst_is_stuck": lambda seed: worst_is_stuck(),
    "random_learner": random_learner,
    "full": lambda seed: full(),
    "full_and_alike": lambda seed: full_and_alike(),
    "random_juggler": random_juggler,
}
"""Students by name, from a seed."""


def _print_table() -> None:
    controllers: dict[str, Controller] = {
        "static (ES)": Static(),
        "ddk": DDK(),
        "ddk, loss_difference": DDK(gap="loss_difference"),
        "ddk_without_smoothing": DDKWithoutSmoothing(),
    }
    others = ("dynamic_batch_loading", "odm", "ado", "elasticity")
    controllers |= {name: CONTROLLERS[name]() for name in others}
    controllers["elasticity, power 4"] = Elasticity(power=4.0)
    print("| | " + " | ".join(WORLDS) + " |\n|" + "---|" * (len(WORLDS) + 1))
    for name, controller in controllers.items():
        cells = []
        for make in WORLDS.values():
            found = [distil(make(seed), controller, seed=seed)[:2] for seed in range(20)]
            cells.append("{:.3f} / {:.3f}".format(*np.mean(found, axis=0)))
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    _print_table()
