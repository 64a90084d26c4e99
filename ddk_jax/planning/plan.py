"""What a config needs and does on a slice, by compiling its steps for it.

The bytes and FLOPs are the compiler's own. Seconds are an estimate (`estimate.py`).
"""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax

from ddk_jax.config import Config
from ddk_jax.losses.objective import needs_teacher
from ddk_jax.models.decoder import num_parameters
from ddk_jax.parallel.chips import Chip
from ddk_jax.parallel.compiled import (
    Level,
    OutOfMemoryError,
    Program,
    compile_program,
    kernel_flops,
)
from ddk_jax.parallel.work import Collective
from ddk_jax.planning.estimate import Estimate, estimate
from ddk_jax.planning.job import PlannedJob, Step
from ddk_jax.planning.minimum import minimum_flops, visible_share
from ddk_jax.planning.slices import open_slice

_log = logging.getLogger(__name__)

SCOPES = ("loss", "teacher")
"""Named scopes of the train step whose temporaries are told apart."""
NOT_MEASURED = "estimate, not measured on a TPU"


class Resident(NamedTuple):
    """Bytes on one chip that lie there throughout the run."""

    student: int
    """Parameters, in float32; of adapters and their student, both."""
    optimizer: int
    """Both moments, in float32."""
    teacher: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self)


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """One jitted function of the run, on one chip."""

    name: str
    fits: bool
    allocated_bytes: int
    """What has to be free for it, with everything that stays on the chip meanwhile; of a program
    that the compiler refused, what it said, at least."""
    peak_bytes: int
    """The most that is in use at one time; without gaps between temporaries."""
    temporary_bytes: int
    code_bytes: int
    scopes: Mapping[str, int]
    """Bytes of the temporaries that parts of the step use, taking turns: `student`, `teacher`,
    `loss`."""
    compile_seconds: float
    """Tracing included."""


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Of the train step."""

    flops_per_step: int
    """Of all chips together: what is compiled, recomputation included, and what kernels compute."""
    flops_ratio: float
    """Against the minimum."""
    hbm_traffic_bytes: int
    """To and from the HBM of one chip, in one step."""
    collectives: Mapping[str, Collective]
    """By kind, of one chip in one step."""
    estimated_seconds: Estimate
    tokens_per_second: float
    mfu: float
    """The minimum of FLOPs in that time, as a share of the chips' peak."""
    days: float
    """For all steps, or `train.max_tokens`; without evaluations and checkpoints."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a config needs and does on a slice."""

    topology: str
    chips: int
    level: Level
    mesh: Mapping[str, int]
    rows: Mapping[str, int]
    """`per_step`, `per_micro_batch`, `per_chip` (of a micro-batch), `length`."""
    parameters: Mapping[str, int]
    """Of `student` and `teacher`, embeddings included."""
    hbm_bytes: int
    """Of a chip, as far as programs may use it."""
    resident: Resident
    minimum_flops: int
    """Of a step, on all chips."""
    steps: tuple[StepPlan, ...]
    """`train`, `evaluation` and, with a teacher, `teacher evaluation`, as far as compiled."""
    speed: Speed | None
    """None: the train step was not compiled to the end."""
    host_bytes: int
    """The most memory that the planning process has had."""
    assumptions: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether every step does."""
        return all(step.fits for step in self.steps)

    @property
    def allocated_bytes(self) -> int:
        """Of the step that needs most."""
        return max(step.allocated_bytes for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """Of the step that needs most."""
        return max(step.peak_bytes for step in self.steps)

    @property
    def spare(self) -> float:
        """Share of the HBM that is never allocated; negative if the config does not fit."""
        return 1 - self.allocated_bytes / self.hbm_bytes


def make_plan(
    config: Config, topology: str, *, level: Level = "O1", train_only: bool = False
) -> Plan:
    """Compile the steps of a config for a slice.

    A step that does not fit ends it: the others are not compiled.

    Args:
      config: the run.
      topology: the slice, such as `v5e:4x4`.
      level: how hard the compiler tries.
      train_only: leave out the evaluations.

    Raises:
      UserError: the config, or a shape in it, is wrong; there is no such slice, or no compiler.
    """
    chip, devices = open_slice(topology)
    job, train = PlannedJob(config, devices), config.train
    resident = _resident(job)
    steps, speed = _compiled_steps(job, chip, resident, level, train_only)
    return Plan(
        topology=topology,
        chips=len(devices),
        level=level,
        mesh=dict(job.mesh.shape),
        rows={
            "per_step": train.rows_per_step,
            "per_micro_batch": job.micro_rows,
            "per_chip": -(-job.micro_rows // job.row_shards),
            "length": config.data.seq_len,
        },
        parameters={
            "student": num_parameters(job.student.spec),
            "teacher": sum(map(num_parameters, job.teachers.specs)),
        },
        hbm_bytes=chip.hbm_bytes,
        resident=resident,
        minimum_flops=_minimum(job),
        steps=tuple(steps),
        speed=speed,
        host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        assumptions=_assumptions(job, chip, level),
    )


def _compiled_steps(
    job: PlannedJob, chip: Chip, resident: Resident, level: Level, train_only: bool
) -> tuple[list[StepPlan], Speed | None]:
    """The steps up to the first that does not fit, and the speed of the train step."""
    if resident.total > chip.hbm_bytes:
        return [_refused("train", resident.total, 0.0)], None
    found: list[StepPlan] = []
    speed = None
    started = time.monotonic()
    for step in job.steps():
        if not train_only:
            _log.info("compiling: %s", step.name)
        planned, program = _compiled(step, resident, chip, level, started)
        found.append(planned)
        if step.name == "train" and program is not None:
            speed = _speed(job, chip, program, kernel_flops(step.traced.jaxpr), level)
        if train_only or not planned.fits:
            break
        started = time.monotonic()
    return found, speed


def _compiled(
    step: Step, resident: Resident, chip: Chip, level: Level, started: float
) -> tuple[StepPlan, Program | None]:
    """A step as the compiler sees it; no program if it does not fit."""
    scopes = SCOPES if step.name == "train" else ()
    try:
        program = compile_program(step.traced.lower(), level=level, scopes=scopes)
    except OutOfMemoryError as error:
        needed = error.total_bytes or resident.total + (error.temporary_bytes or 0)
        needed = max(needed, chip.hbm_bytes + 1)
        return _refused(step.name, needed, time.monotonic() - started), None
    memory = program.memory
    # What the step does not read lies on the chip all the same.
    others = max(0, resident.total - memory.argument_bytes) if step.name != "train" else 0
    allocated = memory.allocated_bytes + others
    return StepPlan(
        name=step.name,
        fits=allocated <= chip.hbm_bytes,
        allocated_bytes=allocated,
        peak_bytes=memory.peak_bytes + others,
        temporary_bytes=memory.temporary_bytes,
        code_bytes=memory.code_bytes,
        scopes={name or "student": size for name, size in program.scopes.items()},
        compile_seconds=time.monotonic() - started,
    ), program


def _refused(name: str, needed: int, seconds: float) -> StepPlan:
    return StepPlan(
        name=name,
        fits=False,
        allocated_bytes=needed,
        peak_bytes=needed,
        temporary_bytes=0,
        code_bytes=0,
        scopes={},
        compile_seconds=seconds,
    )


def _resident(job: PlannedJob) -> Resident:
    """From the shardings, to the byte."""
    state, frozen = job.abstract_state(), job.frozen
    student = _bytes((state.params, frozen.student))
    return Resident(student, _bytes(state.opt_state), _bytes(frozen.teachers))


def _bytes(tree: Any) -> int:
    """Bytes of shapes with shardings, on one device."""
    total = 0
    for leaf in jax.tree.leaves(tree):
        size = leaf.dtype.itemsize
        for length in leaf.sharding.shard_shape(leaf.shape):
            size *= length
        total += size
    return total


def _minimum(job: PlannedJob) -> int:
    config = job.config
    passes = 1 if config.student.frozen else 2 if job.start.lora else 3
    return minimum_flops(
        job.student.spec,
        job.teachers.specs if needs_teacher(job.objective) else (),
        rows=config.train.rows_per_step,
        length=config.data.seq_len,
        student_passes=passes,
    )


def _speed(job: PlannedJob, chip: Chip, program: Program, in_kernels: int, level: Level) -> Speed:
    """What the train step does, and about how long that takes.

    Args:
      job: the run.
      chip: of the slice.
      program: the step.
      in_kernels: FLOPs of kernels, on all chips, as if they skipped nothing.
      level: that the program was compiled at.
    """
    config, chips = job.config, job.mesh.size
    specs = (job.student.spec, *job.teachers.specs)
    kernels = in_kernels * visible_share(specs, config.data.seq_len)
    expected = estimate(
        program.work,
        chip,
        kernel_flops=kernels / chips,
        head_width=min(spec.head_width for spec in specs),
        with_cycles=level in ("O2", "O3"),
    )
    flops = program.work.flops * chips + int(kernels)
    minimum, seconds = _minimum(job), expected.total
    tokens = config.train.rows_per_step * config.data.seq_len
    budget = min(
        config.train.max_tokens or tokens * config.train.steps, tokens * config.train.steps
    )
    return Speed(
        flops_per_step=flops,
        flops_ratio=flops / minimum,
        hbm_traffic_bytes=program.work.bytes,
        collectives=program.work.collectives,
        estimated_seconds=expected,
        tokens_per_second=tokens / seconds,
        mfu=minimum / (seconds * chips * chip.bf16_flops),
        days=budget / tokens * seconds / 86400,
    )


def _assumptions(job: PlannedJob, chip: Chip, level: Level) -> tuple[str, ...]:
    """What the estimate of the time rests on."""
    e = chip.efficiency
    found = [
        f"{chip.name}: {chip.bf16_flops / 1e12:.0f} TFLOP/s, {chip.hbm_bandwidth / 1e9:.0f} GB/s "
        f"of HBM, {chip.link_bandwidth / 1e9:.0f} GB/s over all links of a chip",
        f"programs get {e.matrix:.0%} of the FLOP/s ({e.kernel:.0%} in attention kernels), "
        f"{e.hbm:.0%} of the HBM's and {e.links:.0%} of the links' bandwidth",
        "an operation takes as long as its FLOPs or its HBM traffic, whichever is longer"
        + (", or the compiler's cycles" if level in ("O2", "O3") else ""),
        "collectives overlap with nothing; the host, evaluations and checkpoints take no time",
        "rows hold one document; rows of several are quicker by the attention between them",
    ]
    if job.dtype.itemsize > 2:
        found.append("the peak is that of bfloat16: float32 matrices take several times as long")
    return tuple(found)
