"""Which mesh, micro-batch and rematerialisation are fastest; and what to change where none fits.

Every answer was compiled. What is not compiled cannot be the answer: it has to need more memory
than something that does not fit, or its FLOPs alone take longer than the best that was found.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from ddk_jax.config import Config
from ddk_jax.parallel.chips import Chip, next_larger
from ddk_jax.planning.job import with_settings
from ddk_jax.planning.plan import Plan
from ddk_jax.planning.slices import find_slice

ROWS_PER_CHIP = (1, 2, 4, 8)
REMAT = ("full", "attention")
"""From the least memory to more of it and fewer FLOPs."""
_MOST_TENSOR = 8
_MOST_TRIES = 5
_ENOUGH = 2

Planner: TypeAlias = Callable[[Config, str], Plan]
"""Compiles a config for a slice, at least its train step."""
Report: TypeAlias = Callable[[str], Any]
Settings: TypeAlias = dict[str, dict[str, Any]]
"""Changed fields of a config, by section."""


class Candidate(NamedTuple):
    """One way to lay a run out on a slice."""

    data: int
    fsdp: int
    tensor: int
    rows_per_chip: int
    remat: str

    @property
    def shards(self) -> int:
        """Chips that share the rows."""
        return self.data * self.fsdp

    @property
    def mesh(self) -> tuple[int, int, int]:
        """Sizes of the axes."""
        return self.data, self.fsdp, self.tensor

    def settings(self) -> Settings:
        """What it sets in a config; evaluation has the same rows on a chip at a time."""
        micro = self.shards * self.rows_per_chip
        return {
            "mesh": {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor},
            "train": {"micro_rows": micro},
            "student": {"remat": self.remat},
            "evaluation": {"batch_rows": micro},
        }


@dataclass(frozen=True)
class Tried:
    """What became of a candidate."""

    candidate: Candidate
    plan: Plan | None
    """None: it was not compiled."""
    skipped: str = ""
    """Why not."""

    @property
    def seconds(self) -> float:
        """Estimate of a step; infinite if it does not fit or was not compiled."""
        if self.plan is None or self.plan.speed is None or not self.plan.fits:
            return math.inf
        return self.plan.speed.estimated_seconds.total


class Found(NamedTuple):
    """The outcome of a search."""

    best: Tried | None
    """The fastest that fits, by the estimate; None: nothing fits."""
    tried: tuple[Tried, ...]


def candidates(config: Config, chips: int, heads: Sequence[int]) -> Iterator[Candidate]:
    """All layouts that the rows of a step and the heads of the models can be shared out in.

    Args:
      config: the run.
      chips: of the slice.
      heads: numbers of query heads, which a tensor axis must divide.
    """
    sizes = [size for size in range(1, chips + 1) if chips % size == 0]
    for tensor, fsdp in itertools.product(sizes, reversed(sizes)):
        data, left = divmod(chips, tensor * fsdp)
        if data == 0 or left or tensor > _MOST_TENSOR or any(n % tensor for n in heads):
            continue
        for remat, rows in itertools.product(REMAT, ROWS_PER_CHIP):
            found = Candidate(data, fsdp, tensor, rows, remat)
            if config.train.rows_per_step % (found.shards * rows) == 0:
                yield found


def search(
    config: Config,
    topology: str,
    chip: Chip,
    options: Sequence[Candidate],
    planner: Planner,
    report: Report,
) -> Found:
    """The fastest of some layouts, by the estimate.

    Args:
      config: the run.
      topology: the slice.
      chip: of it.
      options: in the order in which they are tried.
      planner: compiles one.
      report: called with a line on each.
    """
    tried: list[Tried] = []
    for number, option in enumerate(options, 1):
        reason = _hopeless(option, tried, chip)
        plan = None if reason else planner(with_settings(config, **option.settings()), topology)
        tried.append(Tried(option, plan, reason))
        report(f"{number}/{len(options)}  {describe(tried[-1])}")
    best = min(tried, key=lambda each: each.seconds, default=None)
    return Found(best if best and best.seconds < math.inf else None, tuple(tried))


def _hopeless(option: Candidate, tried: Sequence[Tried], chip: Chip) -> str:
    """Why it need not be compiled; empty: it must be."""
    for seen, plan in ((other.candidate, other.plan) for other in tried):
        if plan is None or plan.fits or seen.mesh != option.mesh:
            continue
        if plan.resident.total > plan.hbm_bytes:
            return "models and optimizer alone do not fit"
        more_kept = REMAT.index(option.remat) >= REMAT.index(seen.remat)
        if option.rows_per_chip >= seen.rows_per_chip and more_kept:
            return f"needs no less than {seen.rows_per_chip} rows, {seen.remat}, which do not fit"
    best = min(tried, key=lambda each: each.seconds, default=None)
    if best is not None and best.plan is not None:
        # Every layout has these FLOPs at least, and no chip has more of them in a second.
        rate = chip.efficiency.matrix * chip.bf16_flops * best.plan.chips
        if best.plan.minimum_flops / rate >= best.seconds:
            return "the best one takes no longer than the products alone"
    return ""


def describe(tried: Tried) -> str:
    """A line on what became of a candidate."""
    c, plan = tried.candidate, tried.plan
    mesh = f"data {c.data} x fsdp {c.fsdp} x tensor {c.tensor}"
    layout = f"{mesh}, {c.rows_per_chip} rows per chip, remat {c.remat}: "
    if plan is None:
        return f"{layout}not compiled: {tried.skipped}"
    needed = f"{plan.allocated_bytes / 2**30:.2f} GiB"
    if not plan.fits or plan.speed is None:
        return f"{layout}does not fit ({needed})"
    tokens = plan.speed.tokens_per_second
    return f"{layout}{needed}, {tried.seconds:.2f} s a step, {tokens / 1e3:.1f} k tokens/s"


class Remedy(NamedTuple):
    """A change under which a config fits."""

    words: str
    """As on the command line."""
    plan: Plan


def remedies(config: Config, plan: Plan, planner: Planner, report: Report) -> list[Remedy]:
    """Changes to a config that does not fit; each was compiled and fits.

    Args:
      config: the run.
      plan: of it.
      planner: compiles all steps of a changed config.
      report: called with a line on each.
    """
    found: list[Remedy] = []
    for topology, settings in itertools.islice(_changes(config, plan), _MOST_TRIES):
        words = as_options(settings)
        if topology != plan.topology:
            words = f"--topology {topology} {words}"
        report(f"trying {words}")
        attempt = planner(with_settings(config, **settings), topology)
        if attempt.fits:
            found.append(Remedy(words, attempt))
        if len(found) == _ENOUGH:
            break
    return found


def as_options(settings: Settings) -> str:
    """Settings as options of the command line."""
    return " ".join(
        f"--{section}.{name.replace('_', '-')} {value}"
        for section, fields in settings.items()
        for name, value in fields.items()
    )


def _changes(config: Config, plan: Plan) -> Iterator[tuple[str, Settings]]:
    """Changes worth a try, those that cost least first, each on top of those before."""
    shards = plan.mesh["data"] * plan.mesh["fsdp"]
    settings: Settings = {}
    if config.student.remat == "none":
        settings = {"student": {"remat": "full"}}
        yield plan.topology, settings
    if config.evaluation.batch_rows > shards:
        settings = settings | {"evaluation": {"batch_rows": shards}}
    if plan.rows["per_chip"] > 1:
        settings = settings | {"train": {"micro_rows": shards}}
    if "evaluation" in settings or "train" in settings:
        yield plan.topology, settings
    if plan.mesh["data"] > 1:
        settings = settings | {"mesh": {"data": 1, "fsdp": shards}}
        yield plan.topology, settings
    if config.teacher.path and config.teacher.dtype != "int8":
        yield plan.topology, settings | {"teacher": {"dtype": "int8"}}
    topology = next_larger(plan.topology)
    while topology is not None:
        shards = find_slice(topology).chips // plan.mesh["tensor"]
        if config.train.rows_per_step % shards == 0:
            rows = {"train": {"micro_rows": shards}, "evaluation": {"batch_rows": shards}}
            yield topology, settings | rows | {"mesh": {"data": 1, "fsdp": shards}}
        topology = next_larger(topology)
