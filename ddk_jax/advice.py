"""Which teacher for which student, before anything is trained: what two published laws say."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from ddk_jax.analysis import capacity
from ddk_jax.analysis.tables import aligned_table
from ddk_jax.config import Config, load_config
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import UserError
from ddk_jax.models import hf
from ddk_jax.models.decoder import num_parameters
from ddk_jax.models.hub import resolve
from ddk_jax.models.spec import ModelSpec
from ddk_jax.places import resolve_path

LIMITS = """\
The law of capacity gap (arXiv 2311.07052) was fitted to GPT-2 and Pythia, 70 M to 2.8 B, teachers
pruned to their students, and checked beyond by 3 B from 7 B. The scaling law (arXiv 2502.08606) was
fitted to C4, 143 M to 12.6 B, within 1 %; its published coefficients are rounded, and its nats do
not compare with those of other text. Take both as advice."""

_OUTSIDE = " (outside of the sizes that it was fitted to)"
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
_COUNT = re.compile(r"(\d+(?:\.\d+)?(?:e\+?\d+)?) ?([kmbt]?)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Size:
    """How large a model is."""

    name: str
    """As the user named it."""
    parameters: float
    """All of them."""
    inner: float
    """Without embeddings and head; all of them where nothing but a size is known."""


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What the distillation scaling law says of a student, whoever its teacher is."""

    tokens: float
    """That the student is trained on."""
    labels_nats: float
    """Its loss from labels alone, nats per token on C4."""
    best: capacity.BestTeacher
    """The loss of the teacher that would be best."""
    extrapolated: bool
    """The student is not among the sizes that the law was fitted to."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the distillation scaling law says of a student and a teacher; nats per token on C4."""

    teacher_nats: float
    """Given, or by the supervised law."""
    student_nats: float
    """After distillation."""
    cost: float
    """FLOPs, with the teacher's forward pass, by those of training on the same labels alone."""
    labels_nats: float
    """The student's loss from labels alone, on more tokens for the same FLOPs."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A teacher that the student may have."""

    teacher: Size
    ratio: float
    """Its parameters by the student's."""
    warning: str
    """What its size speaks against it; may be empty."""
    prediction: Prediction | None
    """None: the student's tokens are not known."""


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What the laws say of a student and of its possible teachers."""

    student: Size
    """Given; or else the one that the law of capacity gap finds for the teacher."""
    best_teacher: float
    """Parameters of the best teacher by the law of capacity gap."""
    extrapolated: bool
    """Student and best teacher are not among the sizes that the law was fitted to."""
    outlook: Outlook | None
    """None: the student's tokens are not known."""
    candidates: tuple[Candidate, ...]
    """The teachers, nearest to the best one first, by the logarithm of the size."""


def advise(
    config: Path | None = None,
    *,
    student: str = "",
    teachers: Sequence[str] = (),
    tokens: str = "",
    teacher_tokens: str = "",
    teacher_nats: Sequence[float] = (),
) -> Advice:
    """Ask both laws.

    Args:
      config: YAML file; its student, teachers and tokens are taken where no others are given.
      student: model directory, or a size such as "350M".
      teachers: likewise.
      tokens: that the student is trained on, such as "15B".
      teacher_tokens: that every teacher was trained on; default: 20 a parameter.
      teacher_nats: the losses of the teachers where they are known, one for each.

    Raises:
      UserError: nothing to ask about, or something that is neither a size nor a model.
    """
    run = load_config(config) if config else None
    found = [_size(name) for name in teachers]
    if run is not None and not found:
        named = (run.teacher, *run.teacher.others)
        found = [_size(model.path, model.revision) for model in named if model.path]
    if student:
        learner = _size(student)
    elif run is not None and (run.student.path or run.student.spec.hidden_size):
        learner = _config_student(run)
    elif len(found) == 1:
        learner = _student_for(found[0])
    elif found:
        raise UserError("several teachers are compared for one student: name it with --student")
    else:
        raise UserError(
            "name a student or a teacher, by a model directory or a size: --student 350M"
        )
    count = parse_count(tokens, "--tokens") if tokens else None
    if run is not None and count is None:
        count = _config_tokens(run)
    losses = _teacher_losses(found, teacher_tokens, teacher_nats)
    best, extrapolated = _best_teacher(learner.parameters)
    candidates = [
        _candidate(learner, teacher, count, nats)
        for teacher, nats in zip(found, losses, strict=True)
    ]
    candidates.sort(key=lambda c: abs(math.log(c.teacher.parameters / best)))
    return Advice(
        student=learner,
        best_teacher=best,
        extrapolated=extrapolated,
        outlook=_outlook(learner, count) if count else None,
        candidates=tuple(candidates),
    )


def parse_count(text: str, what: str) -> float:
    """A number such as "1.5B", "350M" or "2e9".

    Raises:
      UserError: it is none, or not positive.
    """
    match = _COUNT.fullmatch(text.strip())
    value = float(match[1]) * _UNITS[match[2].lower()] if match else 0.0
    if not 0 < value < math.inf:
        raise UserError(f"{what} = {text}: needs a positive number, such as 350M, 1.5B or 2e9")
    return value


def spec_size(name: str, spec: ModelSpec) -> Size:
    """The size of a model that is described."""
    total = num_parameters(spec)
    rows = spec.vocab_size * (1 if spec.tied_head else 2)
    if spec.positions == "learned":
        rows += spec.max_positions
    inner = total - rows * spec.hidden_size
    return Size(name=name, parameters=float(total), inner=float(inner))


def _size(name: str, revision: str = "") -> Size:
    """The size that a name says, or that of the model in a directory or on the hub."""
    if _COUNT.fullmatch(name.strip()) and not Path(name).exists():
        count = parse_count(name, "size of a model")
        return Size(name=name, parameters=count, inner=count)
    try:
        directory = resolve(name, revision).directory
    except UserError as error:
        raise type(error)(f"{error}. Or give a size, such as 350M or 1.5B") from error
    return spec_size(name, hf.read_spec(directory))


def _config_student(run: Config) -> Size:
    if run.student.path:
        return _size(run.student.path, run.student.revision)
    spec = run.student.spec
    if not spec.vocab_size:
        spec = replace(spec, vocab_size=_vocabulary(run))
    return spec_size("student.spec", spec)


def _vocabulary(run: Config) -> int:
    """Rows of the teacher's table; where the teacher is not at hand, tokens of the tokenizer."""
    if run.teacher.path:
        with suppress(UserError):
            directory = resolve(run.teacher.path, run.teacher.revision).directory
            return hf.read_spec(directory).vocab_size
    return Tokenizer(resolve_path(run.data.tokenizer)).vocab_size


def _config_tokens(run: Config) -> float:
    tokens = run.train.steps * run.train.rows_per_step * run.data.seq_len
    return float(min(tokens, run.train.max_tokens or tokens))


def _best_teacher(student: float) -> tuple[float, bool]:
    """Parameters by the law of capacity gap, and whether it says so where it was not fitted.

    Under the sizes that it was fitted to its offset, which is of the order of the student, would
    decide; there the slope alone is taken.
    """
    smallest, largest = capacity.CAPACITY_GAP_FITTED
    if student < smallest:
        return capacity.SLOPE * student, True
    best = capacity.capacity_gap_teacher(student)
    return best, best > largest


def _student_for(teacher: Size) -> Size:
    """The student that `_best_teacher` has this teacher for."""
    share = capacity.capacity_gap_student(teacher.parameters) / teacher.parameters
    if share * teacher.parameters < capacity.CAPACITY_GAP_FITTED[0]:
        share = 1 / capacity.SLOPE
    return Size(
        name=f"for {teacher.name}",
        parameters=share * teacher.parameters,
        inner=share * teacher.inner,
    )


def _teacher_losses(
    teachers: Sequence[Size], tokens: str, nats: Sequence[float]
) -> Sequence[float]:
    """Given losses; or those of the supervised law, for the given tokens or 20 a parameter."""
    if nats:
        if len(nats) != len(teachers):
            raise UserError(f"--teacher-nats: {len(nats)} losses for {len(teachers)} teachers")
        if bad := [loss for loss in nats if not 0 < loss < math.inf]:
            raise UserError(f"--teacher-nats = {bad[0]}: must be positive")
        return nats
    count = parse_count(tokens, "--teacher-tokens") if tokens else None
    return [
        capacity.supervised_loss(size.inner, count or capacity.TOKENS_PER_PARAMETER * size.inner)
        for size in teachers
    ]


def _outlook(student: Size, tokens: float) -> Outlook:
    smallest, largest = capacity.SCALING_FITTED
    return Outlook(
        tokens=tokens,
        labels_nats=capacity.supervised_loss(student.inner, tokens),
        best=capacity.best_teacher_loss(student.inner, tokens),
        extrapolated=not smallest <= student.inner <= largest,
    )


def _candidate(student: Size, teacher: Size, tokens: float | None, nats: float) -> Candidate:
    ratio = teacher.parameters / student.parameters
    warning = ""
    if ratio <= 1:
        warning = "no larger than the student"
    elif ratio > capacity.LARGEST_RATIO:
        warning = f"past {capacity.LARGEST_RATIO:g} x: a smaller one may teach better"
    prediction = None
    if tokens is not None:
        flops = capacity.distillation_flops(student.inner, tokens, teacher.inner)
        cost = flops / capacity.training_flops(student.inner, tokens)
        prediction = Prediction(
            teacher_nats=nats,
            student_nats=capacity.distilled_loss(student.inner, tokens, nats),
            cost=cost,
            labels_nats=capacity.supervised_loss(student.inner, cost * tokens),
        )
    return Candidate(teacher=teacher, ratio=ratio, warning=warning, prediction=prediction)


def advice_text(advice: Advice) -> str:
    """Advice for the terminal: a line for each law, a table of the teachers, the limits."""
    student = advice.student
    ratio = advice.best_teacher / student.parameters
    lines = [
        f"student       {student.name}: {_short(student.parameters)} parameters",
        f"capacity gap  the best teacher has about {_short(advice.best_teacher)}, {ratio:.1f} x"
        + _OUTSIDE * advice.extrapolated,
    ]
    if advice.outlook is None:
        lines.append("scaling law   needs the tokens that the student is trained on: --tokens 15B")
    else:
        lines += _outlook_lines(advice.outlook)
    if advice.candidates:
        lines += ["", _candidate_table(advice.candidates)]
    return "\n".join([*lines, "", LIMITS])


def _outlook_lines(outlook: Outlook) -> list[str]:
    best = outlook.best
    weakest = capacity.parameters_of_loss(best.weakest_nats)
    return [
        f"scaling law   {_short(outlook.tokens)} tokens: {outlook.labels_nats:.3f} nats from labels"
        " alone" + _OUTSIDE * outlook.extrapolated,
        f"              {best.student_nats:.3f} nats from the best teacher, which has "
        f"{best.teacher_nats:.3f} itself; as good within 1 %:",
        f"              any of up to {best.weakest_nats:.3f} nats, such as {_short(weakest)} "
        "parameters trained on 20 tokens each",
    ]


def _candidate_table(candidates: Sequence[Candidate]) -> str:
    header = ["teacher", "parameters", "ratio"]
    predicted = [c.prediction for c in candidates if c.prediction is not None]
    if predicted:
        header += ["its nats", "student's", "FLOPs", "labels, same FLOPs"]
    rows = []
    for candidate in candidates:
        row = [candidate.teacher.name, _short(candidate.teacher.parameters)]
        row.append(f"{candidate.ratio:.1f} x")
        if (p := candidate.prediction) is not None:
            row += [f"{p.teacher_nats:.3f}", f"{p.student_nats:.3f}", f"{p.cost:.1f} x"]
            row.append(f"{p.labels_nats:.3f}")
        rows.append(row)
    lines = [aligned_table(header, rows)]
    for candidate in candidates:
        if candidate.warning:
            lines.append(f"warning: {candidate.teacher.name}: {candidate.warning}")
    if len(candidates) > 1:
        said = f"nearest to the law of capacity gap: {candidates[0].teacher.name}"
        if predicted:
            least = min(predicted, key=lambda p: p.student_nats)
            name = next(c.teacher.name for c in candidates if c.prediction is least)
            said += f"; lowest loss by the scaling law: {name}"
        lines.append(said)
    return "\n".join(lines)


def _short(value: float) -> str:
    """A count for people: 4.5 B, 350 M."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= 0.9995 * size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"
