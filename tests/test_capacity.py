"""Two laws on teachers and students: published numbers, and what the laws are made of."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from ddk_jax.advice import advice_text, advise, parse_count, spec_size
from ddk_jax.analysis import capacity
from ddk_jax.config import save_config
from ddk_jax.errors import UserError
from ddk_jax.models import hf
from ddk_jax.models.spec import ModelSpec

SIZES = st.floats(1e6, 1e11)
TOKENS = st.floats(1e7, 1e13)


# --- the law of capacity gap ---


def test_the_law_of_capacity_gap_is_that_of_the_paper():
    # Of the paper: 3 B from 7 B.
    assert capacity.capacity_gap_teacher(3e9) == pytest.approx(7482.502e6)
    assert capacity.capacity_gap_student(7482.502e6) == pytest.approx(3e9)


@given(SIZES)
def test_the_student_of_the_best_teacher_is_the_student(size):
    teacher = capacity.capacity_gap_teacher(size)
    if teacher > 0:
        assert capacity.capacity_gap_student(teacher) == pytest.approx(size)


# --- the distillation scaling law ---


@pytest.mark.parametrize(
    ("parameters", "tokens", "labels", "distilled"),
    [
        (1e9, 2e10, 2.374692, (2.255101, 2.276811, 2.316953, 2.504816)),
        (1e8, 2e9, 3.006271, (2.682466, 2.663445, 2.697158, 2.788472)),
    ],
)
def test_the_scaling_law_has_its_golden_numbers(parameters, tokens, labels, distilled):
    assert capacity.supervised_loss(parameters, tokens) == pytest.approx(labels, abs=5e-7)
    for teacher, expected in zip((1.8, 2.0, 2.2, 2.5), distilled, strict=True):
        found = capacity.distilled_loss(parameters, tokens, teacher)
        assert found == pytest.approx(expected, abs=5e-7)


@given(SIZES, TOKENS)
def test_more_tokens_and_parameters_teach_more(size, tokens):
    loss = capacity.supervised_loss(size, tokens)
    assert capacity.supervised_loss(2 * size, tokens) < loss
    assert capacity.supervised_loss(size, 2 * tokens) < loss
    assert 1.220 < loss


@given(SIZES, TOKENS, st.floats(1.0, 20.0))
def test_a_student_is_behind_its_teacher(size, tokens, teacher):
    loss = capacity.distilled_loss(size, tokens, teacher)
    assert teacher <= loss < math.inf


@given(st.floats(3e7, 1e10), st.floats(1.0, 500.0))
def test_no_teacher_is_better_than_the_best(size, per_parameter):
    tokens = per_parameter * size
    best = capacity.best_teacher_loss(size, tokens)
    others = np.linspace(1.22, capacity.supervised_loss(size, tokens), 97)
    losses = [capacity.distilled_loss(size, tokens, teacher) for teacher in others]
    assert best.student_nats <= min(losses) + 1e-7
    at_best = capacity.distilled_loss(size, tokens, best.teacher_nats)
    assert at_best == pytest.approx(best.student_nats, rel=1e-12)
    assert best.weakest_nats >= best.teacher_nats
    weakest = capacity.distilled_loss(size, tokens, best.weakest_nats)
    assert weakest <= 1.01 * best.student_nats * (1 + 1e-12)
    assert all(
        loss > 1.01 * best.student_nats
        for teacher, loss in zip(others, losses, strict=True)
        if teacher > best.weakest_nats + 1e-4
    )


def test_the_capacity_gap_is_in_the_scaling_law():
    """At 1e8 parameters and 2e9 tokens the best teacher has about 2.0 nats, not the fewest."""
    best = capacity.best_teacher_loss(1e8, 2e9)
    assert 1.9 < best.teacher_nats < 2.1
    assert capacity.distilled_loss(1e8, 2e9, 1.3) > best.student_nats + 0.02


@given(st.floats(1e6, 1e12), st.floats(1.0, 1000.0))
def test_the_size_of_a_loss_is_the_inverse_of_the_loss(size, per_parameter):
    loss = capacity.supervised_loss(size, per_parameter * size)
    assert capacity.parameters_of_loss(loss, per_parameter) == pytest.approx(size, rel=1e-6)


def test_no_model_has_less_than_the_least_loss():
    assert capacity.parameters_of_loss(1.2) == math.inf


def test_a_teacher_adds_its_passes_to_the_flops():
    own = capacity.training_flops(1e9, 2e10)
    assert own == 6 * 1e9 * 2e10
    assert capacity.distillation_flops(1e9, 2e10, 3e9) == own + 2 * 3e9 * 2e10
    with_training = capacity.distillation_flops(1e9, 2e10, 3e9, 6e10)
    assert with_training == own + 2 * 3e9 * 2e10 + capacity.training_flops(3e9, 6e10)


@given(st.sampled_from([0.0, -1.0, math.inf, math.nan]))
def test_sizes_tokens_and_losses_are_positive_and_finite(bad):
    calls = [
        lambda: capacity.capacity_gap_teacher(bad),
        lambda: capacity.capacity_gap_student(bad),
        lambda: capacity.supervised_loss(bad, 1e9),
        lambda: capacity.supervised_loss(1e9, bad),
        lambda: capacity.distilled_loss(bad, 1e9, 2.0),
        lambda: capacity.distilled_loss(1e9, bad, 2.0),
        lambda: capacity.distilled_loss(1e9, 1e9, bad),
        lambda: capacity.best_teacher_loss(bad, 1e9),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="must be positive and finite"):
            call()


# --- advice ---


@given(st.floats(1e-3, 999.0), st.sampled_from("kmbtKMBT"))
def test_sizes_are_read_as_they_are_written(value, unit):
    written = f"{value:.3f}{unit}"
    if float(written[:-1]):
        size = float(written[:-1]) * 1e3 ** ("kmbt".index(unit.lower()) + 1)
        assert parse_count(written, "x") == pytest.approx(size)


@pytest.mark.parametrize("text", ["", "0", "-3B", "B", "1.5 Q", "nan", "inf", "1e999", "1,000M"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UserError, match="--tokens = "):
        parse_count(text, "--tokens")


def test_embeddings_do_not_count_in_the_scaling_law():
    shape = {"hidden_size": 8, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_size": 16}
    spec = ModelSpec(vocab_size=100, **shape)
    tied = spec_size("x", spec)
    assert tied.parameters - tied.inner == 100 * 8
    untied = spec_size("x", dataclasses.replace(spec, tied_head=False))
    assert untied.parameters - untied.inner == 2 * 100 * 8 and untied.inner == tied.inner
    learned = spec_size("x", dataclasses.replace(spec, positions="learned", max_positions=50))
    assert learned.parameters - learned.inner == 150 * 8 and learned.inner == tied.inner


def test_teachers_are_ranked_by_the_law_of_capacity_gap():
    advice = advise(student="1.8B", tokens="15B", teachers=["70B", "1B", "14B", "7B"])
    assert advice.best_teacher == capacity.capacity_gap_teacher(1.8e9)
    assert [c.teacher.name for c in advice.candidates] == ["7B", "14B", "1B", "70B"]
    warned = {c.teacher.name: c.warning for c in advice.candidates}
    assert warned["7B"] == "" and "past 5 x" in warned["14B"] and "past 5 x" in warned["70B"]
    assert warned["1B"] == "no larger than the student"
    text = advice_text(advice)
    assert "nearest to the law of capacity gap: 7B; lowest loss by the scaling law: 70B" in text
    assert "warning: 14B: past 5 x" in text and "2311.07052" in text and "2502.08606" in text
    assert max(map(len, text.splitlines())) <= 100


def test_a_prediction_is_that_of_the_scaling_law():
    known = {"student": "1B", "tokens": "20B", "teachers": ["3B"]}
    (candidate,) = advise(**known, teacher_nats=[2.0]).candidates
    assert candidate.prediction is not None
    assert candidate.prediction.student_nats == pytest.approx(2.276811, abs=5e-7)
    assert candidate.prediction.cost == pytest.approx(2)
    labels = capacity.supervised_loss(1e9, 4e10)
    assert candidate.prediction.labels_nats == pytest.approx(labels)
    (candidate,) = advise(**known, teacher_tokens="600B").candidates
    assert candidate.prediction is not None
    assert candidate.prediction.teacher_nats == capacity.supervised_loss(3e9, 6e11)
    (candidate,) = advise(**known).candidates
    assert candidate.prediction is not None
    assert candidate.prediction.teacher_nats == capacity.supervised_loss(3e9, 6e10)


@pytest.mark.parametrize("teacher", ["7B", "400M", "4M"])
def test_a_teacher_alone_gets_the_student_that_it_is_best_for(teacher):
    advice = advise(teachers=[teacher])
    assert advice.best_teacher == pytest.approx(parse_count(teacher, "x"))
    assert advice.outlook is None and advice.candidates[0].prediction is None
    assert 2.4 < advice.candidates[0].ratio <= 2.5
    assert advice.extrapolated == (teacher != "400M")


def test_small_students_have_teachers_of_a_multiple_of_their_size():
    advice = advise(student="1M")
    assert advice.best_teacher == pytest.approx(2.498e6) and advice.extrapolated
    assert "outside of the sizes" in advice_text(advice)


def test_a_config_says_student_teacher_and_tokens(tiny_root, tmp_path):
    config = tiny.config(tiny_root, tmp_path / "run")
    save_config(config, tmp_path / "x.yaml")
    advice = advise(tmp_path / "x.yaml")
    teacher = spec_size("", hf.read_spec(tiny_root / "teacher"))
    (candidate,) = advice.candidates
    assert candidate.teacher == dataclasses.replace(teacher, name=str(tiny_root / "teacher"))
    student = ModelSpec(vocab_size=tiny.VOCABULARY, **tiny.STUDENT)
    assert advice.student == spec_size("student.spec", student)
    assert advice.outlook is not None
    assert advice.outlook.tokens == tiny.STEPS * tiny.ROWS * tiny.SEQ_LEN
    assert advice.outlook.extrapolated
    other = advise(tmp_path / "x.yaml", student="350M", teachers=["1B"], tokens="7B")
    assert (other.student.name, other.candidates[0].teacher.name) == ("350M", "1B")
    assert other.outlook is not None and other.outlook.tokens == 7e9
    # The teacher is not at hand: the vocabulary is that of the tokenizer.
    alone = dataclasses.replace(
        config, teacher=dataclasses.replace(config.teacher, path=str(tmp_path / "nowhere"))
    )
    save_config(alone, tmp_path / "x.yaml")
    assert advise(tmp_path / "x.yaml", teachers=["4M"]).student == advice.student
    with pytest.raises(UserError, match="Or give a size, such as 350M"):
        advise(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name a student or a teacher"),
        ({"teachers": ["1B", "2B"]}, "name it with --student"),
        ({"student": "some/models/none"}, "some/models/none: no such directory.* Or give a size"),
        ({"student": "0M"}, "size of a model = 0M"),
        ({"student": "1B", "tokens": "many"}, "--tokens = many"),
        ({"student": "1B", "teachers": ["2B"], "teacher_tokens": "0"}, "--teacher-tokens = 0"),
        ({"student": "1B", "teachers": ["2B"], "teacher_nats": [2.0, 1.9]}, "2 losses for 1"),
        ({"student": "1B", "teachers": ["2B"], "teacher_nats": [-1.0]}, "must be positive"),
    ],
)
def test_a_question_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        advise(**options)
