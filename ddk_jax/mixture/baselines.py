"""Controllers of other papers that follow a loss or an excess loss.

Where a paper updates at every step, ours updates once in an interval, from the mean over the
interval's batches; `mixture.interval_steps: 1` is the paper's. DoReMi updates at every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from ddk_jax.mixture.controller import (
    Controller,
    FollowsTraining,
    Memory,
    Moment,
    Observation,
    bounded,
    check,
    normalised,
    with_uniform,
)
from ddk_jax.mixture.ddk import equation_2
from ddk_jax.mixture.gaps import Values


@dataclass(frozen=True, kw_only=True)
class DynamicBatchLoading(Controller):
    """Sheared LLaMA: weights times exp(loss - target), and 1e-4 of the uniform distribution.

    The targets are the teacher's losses, or numbers of the user's: the paper takes losses that a
    scaling law predicts. The paper updates every 50 steps while it prunes and every 400 while it
    goes on training.

    Source: arXiv 2310.06694, algorithm 1, and the authors' code, in which the difference is not
    clipped.
    """

    name: ClassVar[str] = "dynamic_batch_loading"
    UNIFORM: ClassVar[float] = 1e-4

    rate: float = 1.0
    """Factor of the difference in the exponent."""
    clip: bool = False
    """Count a loss under its target as 0, as in the paper's algorithm; the code does not."""
    targets: tuple[float, ...] = ()
    """[D] losses in nats per token, in place of the teacher's. In YAML: by name of the domain."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0.0 < self.rate < math.inf, self, "rate", "must be positive and finite")
        finite = all(map(math.isfinite, self.targets))
        check(finite, self, "targets", "must be finite")

    @property
    def needs(self) -> frozenset[str]:
        """The student's losses, and the teacher's unless there are targets."""
        return frozenset({"student_nats"} if self.targets else {"student_nats", "teacher_nats"})

    def signal(self, seen: Observation) -> Values:
        """The loss minus its target."""
        if not self.targets:
            behind = super().signal(seen)
        elif len(self.targets) != seen.student_nats.size:
            raise ValueError(
                f"mixture.targets has {len(self.targets)} values for {seen.student_nats.size} "
                "domains"
            )
        else:
            behind = seen.student_nats - np.array(self.targets)
        return np.maximum(behind, 0.0) if self.clip else behind

    def redistribute(
        self, log_weights: Values, signal: Values, memory: Memory, moment: Moment
    ) -> tuple[Values, Memory]:
        """One step of exponentiated gradient; cumulative."""
        return equation_2(log_weights, self.rate * signal, 1.0 - self.UNIFORM), {}


@dataclass(frozen=True, kw_only=True)
class DoReMi(FollowsTraining):
    """DoReMi's proxy run: weights of the *loss* that rise where the excess over a reference is.

    The signal is max(student - reference, 0) of every token, clipped before the mean is taken; the
    term `clipped_excess` of the objective measures it, with the reference as the teacher. Rows are
    drawn by the (uniform) prior. The result is the average of the weights over the run, by which
    the main run draws its rows. See `docs/mixture.md` for the whole recipe.

    Source: arXiv 2305.10429, algorithm 1: rate 1, uniform share 1e-3 (1e-4 in the authors' code).
    """

    name: ClassVar[str] = "doremi"
    steers: ClassVar = "loss"

    term: str = "clipped_excess"
    """Name of the term of the objective that measures the excess."""
    rate: float = 1.0
    """Factor of the excess in the exponent (eta)."""
    uniform: float = 1e-3
    """Share of the uniform distribution (c)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0.0 < self.rate < math.inf, self, "rate", "must be positive and finite")
        check(0.0 <= self.uniform <= 1.0, self, "uniform", "must be from 0 to 1")

    def redistribute(
        self, log_weights: Values, signal: Values, memory: Memory, moment: Moment
    ) -> tuple[Values, Memory]:
        """One step of exponentiated gradient; cumulative."""
        return equation_2(log_weights, self.rate * signal, 1.0 - self.uniform), {}


@dataclass(frozen=True, kw_only=True)
class OnlineDataMixing(FollowsTraining):
    """ODM: shares proportional to the smoothed perplexity of the training batches, plus a floor.

    With D domains, after t steps, the reward R and the weight w of a domain are

        R = smoothing * R + (1 - smoothing) * exp(nats)
        w = (1 - D e) R / sum(R) + e,   e = min(1 / D, sqrt(log(D) / (D t)))

    so that the weights are uniform for the first D log D steps. The floor e, which shrinks, is that
    of the bandit algorithm EXP3; since our batches hold rows of all domains, as theirs do in the
    end, the rewards need no importance weights.

    Source: arXiv 2312.02406, and what the authors' code does for mixed batches.
    """

    name: ClassVar[str] = "odm"

    smoothing: float = 0.5
    """Share of the old reward that is kept, from 0 to 1; 0.5 in the authors' runs of 1 B."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check(0.0 <= self.smoothing < 1.0, self, "smoothing", "must be from 0 to 1, without 1")

    def remember(self, memory: Memory, seen: Observation, weights: Values) -> Memory:
        """The logarithm of the reward; a domain without tokens keeps its own."""
        new = bounded(seen.training_nats)
        old = memory.get("log_reward", np.full(new.shape, np.nan))
        with np.errstate(divide="ignore"):  # log 0 where nothing is kept
            kept, taken = np.log(self.smoothing), np.log1p(-self.smoothing)
        start = np.where(np.isnan(old), new, old)
        seen_now, reward = ~np.isnan(new), old.copy()
        np.logaddexp(kept + start, taken + new, out=reward, where=seen_now)
        return {"log_reward": reward}

    def redistribute(
        self, log_weights: Values, signal: Values, memory: Memory, moment: Moment
    ) -> tuple[Values, Memory]:
        """Shares of the rewards; what the weights were does not matter."""
        count = signal.size
        explored = math.sqrt(count * math.log(count) / max(moment.step, 1))
        return with_uniform(normalised(memory["log_reward"]), min(1.0, explored)), {}
