"""What a run costs in FLOPs, counted from the shapes of its models: the paper's table 12.

A multiply-add is two FLOPs; norms, softmaxes and element-wise work are left out. Attention counts
the whole square of a row, as a dense program computes it. A backward pass costs two forward passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ddk_jax.config import Config
from ddk_jax.losses.objective import needs_teacher
from ddk_jax.losses.state_terms import StateTerm
from ddk_jax.models.spec import ModelSpec
from ddk_jax.training.build import Job


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """FLOPs of a run, by what they are for."""

    student: float
    """Forward and backward passes of the student over its training rows."""
    teacher: float
    """Forward passes of the teacher over the same rows."""
    evaluation: float
    """The student's measurements that the controller asks for."""
    teacher_evaluation: float
    """The teacher's, once: it is frozen, and the result is kept."""
    uncached: float
    """What the teacher's measurements would cost beside that, were they made each time."""
    stages: float = 0.0
    """Runs that the method needs before."""

    @property
    def total(self) -> float:
        """All that the method costs."""
        return self.student + self.teacher + self.evaluation + self.teacher_evaluation + self.stages

    @property
    def overhead(self) -> float:
        """The controller's share, as the cost over that of training."""
        return (self.evaluation + self.teacher_evaluation) / (self.student + self.teacher)

    @property
    def uncached_overhead(self) -> float:
        """The same with a teacher that is measured each time."""
        whole = self.evaluation + self.teacher_evaluation + self.uncached
        return whole / (self.student + self.teacher)


def forward_flops(spec: ModelSpec, seq_len: int) -> float:
    """FLOPs of a forward pass, head included, for one token of a row of `seq_len` tokens."""
    E, H, K, W = spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_width
    projections = 2 * E * W * (2 * H + 2 * K)
    mlp = 2 * E * spec.ffn_size * (3 if spec.gated_mlp else 2)
    total = float(spec.num_layers * (projections + mlp))
    for layer in range(spec.num_layers):
        is_local = spec.pattern[layer % len(spec.pattern)] == "local"
        seen = min(spec.window, seq_len) if is_local else seq_len
        total += 4 * H * W * seen
    return total + 2 * E * spec.vocab_size


def training_cost(
    student: float,
    teacher: float,
    *,
    tokens: float,
    measurements: int,
    measured_tokens: float,
    taught: bool = True,
) -> RunCost:
    """The cost of a run of DDK's kind.

    Args:
      student: FLOPs of a forward pass for one token.
      teacher: likewise; 0 without one.
      tokens: that the student is trained on.
      measurements: number of times that the controller measures.
      measured_tokens: tokens of one measurement, of all domains.
      taught: whether the objective asks for the teacher; the controller may do so alone.
    """
    return RunCost(
        student=3 * student * tokens,
        teacher=teacher * tokens if taught else 0.0,
        evaluation=student * measured_tokens * measurements,
        teacher_evaluation=teacher * measured_tokens * min(measurements, 1),
        uncached=teacher * measured_tokens * max(measurements - 1, 0),
    )


def run_cost(config: Config, stages: float = 0.0) -> RunCost:
    """The cost of the run that a config describes; its models must be there.

    Args:
      config: of the run.
      stages: FLOPs of the runs before.
    """
    job = Job(config)
    train, length = config.train, config.data.seq_len
    tokens = float(train.steps * train.rows_per_step * length)
    student = forward_flops(job.student.spec, length)
    teachers = sum(forward_flops(spec, length) for spec in job.teachers.specs)
    # Before the first step and after every interval but the last.
    measurements = -(-train.steps // config.mixture.interval_steps)
    if "student_nats" not in job.controller.needs:
        measurements = 0
    wanted = config.evaluation.rows_per_domain
    rows = sum(min(wanted or len(rows), len(rows)) for rows in job.validation.rows)
    cost = training_cost(
        student,
        teachers,
        tokens=tokens,
        measurements=measurements,
        measured_tokens=float(rows * length),
        taught=needs_teacher(job.objective),
    )
    heads = sum(_layer_heads(job, term.loss) for term in job.objective)
    # A frozen student has no backward pass; what is read from its layers has.
    passes = cost.student / 3 if config.student.frozen else cost.student
    return replace(cost, student=passes + 3 * heads * tokens, stages=stages)


def _layer_heads(job: Job, loss: object) -> float:
    """FLOPs for one token of predicting the labels from inner layers (TED's first stage)."""
    if not isinstance(loss, StateTerm) or not loss.of_labels or loss.maps is None:
        return 0.0
    spec = job.student.spec if loss.through == "own" else job.teachers.specs[0]
    width = spec.hidden_size
    each = 2 * width * spec.vocab_size + 2 * job.student.spec.hidden_size * width
    return float(len(loss.maps.student) * each)
