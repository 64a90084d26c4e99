"""How large, and how good, the teacher of a student should be: two laws from the literature.

- The law of capacity gap (arXiv 2311.07052): the size of the teacher that gives the best student.
- The distillation scaling law (arXiv 2502.08606): the student's loss, from the teacher's loss.

Numbers of parameters and tokens are plain counts, losses are nats per token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

SLOPE, OFFSET = 2.498, -11.498e6
"""Of the line through (student, best teacher) in parameters; R^2 = 0.9957."""
CAPACITY_GAP_FITTED = (70e6, 2.8e9)
"""Smallest and largest of the models that the line was fitted to: all parameters."""
SCALING_FITTED = (143e6, 12.6e9)
"""Of those that the distillation scaling law was fitted to: without embeddings."""
LARGEST_RATIO = 5.0
"""Twice the slope: teachers further beyond their student are warned of."""
TOKENS_PER_PARAMETER = 20.0
"""Training tokens of a teacher of which nothing is known: compute-optimal (arXiv 2203.15556)."""
LAW_ERROR = 0.01
"""Relative error of the distillation scaling law on the runs that it was fitted to."""


def capacity_gap_teacher(student_parameters: float) -> float:
    """Parameters of the teacher whose distillation gives the best student of this size.

    T = 2.498 S - 11.498 in millions, all parameters counted. The line was fitted to GPT-2 and
    Pythia, 70 M to 2.8 B, teachers pruned to their students; 7 B for 3 B was checked once. Under
    some 8 million parameters it falls below the student itself, and means nothing.

    Raises:
      ValueError: not a positive finite number.
    """
    return SLOPE * _positive(student_parameters, "student_parameters") + OFFSET


def capacity_gap_student(teacher_parameters: float) -> float:
    """The inverse of `capacity_gap_teacher`: the student that a teacher is best for."""
    return (_positive(teacher_parameters, "teacher_parameters") - OFFSET) / SLOPE


class _Supervised:
    """Coefficients of the supervised law (table 6)."""

    A, B, E = 3355.0, 18186.0, 1.220
    alpha, beta, gamma = 0.408, 0.431, 0.452


class _Distilled:
    """Coefficients of the distillation law (table 6)."""

    A, B = 2243.0, 24181.0
    alpha, beta, gamma = 0.321, 0.637, 0.764
    c0, c1, f1, d1 = 2.549, 522.6, 0.090, 1.315


def supervised_loss(parameters: float, tokens: float) -> float:
    """Loss of a model trained on labels: L(N, D) = E + (A / N^a + B / D^b)^g.

    Args:
      parameters: N, without embeddings and head.
      tokens: D, that it is trained on.

    Returns:
      Nats per token on the paper's text (C4), which nats of other text do not compare with.

    Raises:
      ValueError: not positive finite numbers.
    """
    N, D = _positive(parameters, "parameters"), _positive(tokens, "tokens")
    c = _Supervised
    return c.E + (c.A / N**c.alpha + c.B / D**c.beta) ** c.gamma


def distilled_loss(student_parameters: float, tokens: float, teacher_loss: float) -> float:
    """Loss of a distilled student, with the coefficients of table 6 in arXiv 2502.08606.

    L_S = L_T + L_T^-c0 (1 + (L_T / (L d1))^(1/f1))^(-c1 f1) (A / N^a + B / D^b)^g, where L is the
    supervised loss of the same N and D. Fitted to models of 143 M to 12.6 B within about 1 %; the
    exponent c1 f1 = 47 makes it sensitive to the rounding of the published coefficients.

    Args:
      student_parameters: N, without embeddings and head.
      tokens: D, that the student is distilled on.
      teacher_loss: L_T, nats per token on the same text.

    Raises:
      ValueError: not positive finite numbers.
    """
    losses = np.array([_positive(teacher_loss, "teacher_loss")])
    return float(_distilled(student_parameters, tokens, losses)[0])


class BestTeacher(NamedTuple):
    """What the scaling law says of the teacher that is best for a student; nats per token."""

    teacher_nats: float
    student_nats: float
    weakest_nats: float
    """Loss of the weakest teacher whose student is within `LAW_ERROR` of the best one."""


def best_teacher_loss(student_parameters: float, tokens: float) -> BestTeacher:
    """Minimise `distilled_loss` over the teacher's loss.

    From the least loss that the supervised law admits to that of the student trained on labels. The
    function may have two minima, so all of this range is looked at, in steps of 1e-4 nats or less.
    """
    highest = supervised_loss(student_parameters, tokens)
    count = math.ceil((highest - _Supervised.E) / 1e-4) + 1
    teacher = np.linspace(_Supervised.E, highest, count)
    student = _distilled(student_parameters, tokens, teacher)
    best = int(np.argmin(student))
    near = np.flatnonzero(student <= (1 + LAW_ERROR) * student[best])
    return BestTeacher(float(teacher[best]), float(student[best]), float(teacher[near[-1]]))


def parameters_of_loss(loss: float, tokens_per_parameter: float = TOKENS_PER_PARAMETER) -> float:
    """Size of a model, trained on labels, that has a given loss by `supervised_loss`.

    Args:
      loss: nats per token.
      tokens_per_parameter: training tokens, by parameters of the model.

    Returns:
      Parameters without embeddings and head; infinity for a loss that no model has.
    """
    low, high = 1.0, 1e20
    if supervised_loss(high, tokens_per_parameter * high) >= loss:
        return math.inf
    while high / low > 1 + 1e-9:
        middle = math.sqrt(low * high)
        too_small = supervised_loss(middle, tokens_per_parameter * middle) > loss
        low, high = (middle, high) if too_small else (low, middle)
    return high


def training_flops(parameters: float, tokens: float) -> float:
    """FLOPs of training: three forward passes' worth, 2 a parameter and token each."""
    return 6 * parameters * tokens


def distillation_flops(
    student_parameters: float, tokens: float, teacher_parameters: float, teacher_tokens: float = 0.0
) -> float:
    """FLOPs of distilling, with the teacher's forward pass over every token of the student.

    3 F(N_S) D_S + F(N_T) (D_S + 3 D_T), as in arXiv 2502.08606, with F(N) = 2 N: the products of
    the attention over the context and of the head are left out.

    Args:
      student_parameters: N_S, without embeddings and head.
      tokens: D_S.
      teacher_parameters: N_T, likewise.
      teacher_tokens: D_T, for a teacher that has to be trained first; 0: it exists.
    """
    forward = 2 * teacher_parameters * tokens
    own = training_flops(student_parameters, tokens)
    return own + forward + training_flops(teacher_parameters, teacher_tokens)


def _distilled(
    student_parameters: float, tokens: float, teacher_loss: Float64[np.ndarray, "n"]
) -> Float64[np.ndarray, "n"]:
    N, D = _positive(student_parameters, "student_parameters"), _positive(tokens, "tokens")
    c = _Distilled
    ratio = np.log(teacher_loss / (supervised_loss(N, D) * c.d1)) / c.f1
    power = np.exp(-c.c1 * c.f1 * np.logaddexp(0.0, ratio))
    capacity = (c.A / N**c.alpha + c.B / D**c.beta) ** c.gamma
    return teacher_loss + teacher_loss**-c.c0 * power * capacity


def _positive(value: float, name: str) -> float:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} = {value}: must be positive and finite")
    return float(value)
