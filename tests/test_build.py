"""From a config to the parts of a run; what does not fit together is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ddk_jax.config import TermConfig
from ddk_jax.errors import DataError, StorageError, UserError
from ddk_jax.losses.objective import check_terms, term_factors
from ddk_jax.mixture.baselines import DynamicBatchLoading, OnlineDataMixing
from ddk_jax.mixture.controller import Controller
from ddk_jax.mixture.ddk import DDK, DDKWithoutSmoothing, Static
from ddk_jax.mixture.elasticity import Elasticity
from ddk_jax.models import hf
from ddk_jax.plain import from_plain
from ddk_jax.training.build import Job
from ddk_jax.training.loaded import compute_dtype
from ddk_jax.training.terms import make_objective


@pytest.fixture(autouse=True)
def quick_programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tiny.quick_programs(monkeypatch):
        yield


def job(root: Path, **changes: Any) -> Job:
    return Job(tiny.config(root, root / "unused", **changes))


# Names.


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("objective.terms", [{"loss": "cross_entropi"}], r"unknown loss.*mean cross_entropy\?"),
        ("objective.terms", [{"loss": "cross_entropy", "temperature": 2.0}], "no temperature"),
        ("mixture.controller", "dkd", r"mixture\.controller.*did you mean ddk\?"),
        ("mixture.gap", "perplexity", r"mixture\.gap.*ppl_ratio"),
        ("mixture.alhpa", 0.5, r"mixture: ddk has no 'alhpa': did you mean alpha\?"),
        ("mixture.intervall_steps", 5, "did you mean interval_steps"),
        ("mixture.alpha", 1.5, r"mixture\.alpha = 1\.5: must be from 0 to 1"),
        ("mixture.alpha", "much", r"mixture\.alpha: needs float, got 'much'"),
        ("mixture.alpha", {"words": 1.0}, r"mixture\.alpha: no value for digits, echo"),
        ("mixture.prior", "neutral", r"mixture\.prior = 'neutral': did you mean natural\?"),
        ("mixture.prior_weights", {"words": 1.0, "digit": 2.0}, r"no domain 'digit': did you mean"),
        (
            *("mixture.prior_weights", {"words": 1.0, "digits": 2.0, "echo": 0.0}),
            "prior of the mixture must be positive .*echo 0",
        ),
        ("mixture", {"controller": "odm", "term": "forward_lk"}, "did you mean forward_kl"),
        ("mixture", {"controller": "static", "alpha": 0.5}, "static has no 'alpha'"),
        ("mixture", {"controller": "doremi"}, r"'clipped_excess': not a term of the objective"),
        (
            *("mixture", {"controller": "doremi", "term": "forward_kl", "warmup_intervals": 1}),
            "doremi follows every step, and has no warm-up",
        ),
    ],
)
def test_an_unknown_name_is_refused_with_a_suggestion(
    tiny_root: Path, key: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        job(tiny_root, **{key: value}).check()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, DDK(gap="loss_difference", warmup_intervals=3)),
        ({"alpha": 1}, DDK(gap="loss_difference", alpha=1.0, warmup_intervals=3)),
        (
            {"controller": "ddk_without_smoothing"},
            DDKWithoutSmoothing(gap="loss_difference", warmup_intervals=3),
        ),
        ({"controller": "static"}, Static(gap="loss_difference", warmup_intervals=3)),
    ],
)
def test_controllers_by_name(
    tiny_root: Path, settings: dict[str, Any], expected: Controller
) -> None:
    changes = {f"mixture.{key}": value for key, value in settings.items()}
    assert job(tiny_root, **changes | {"mixture.warmup_intervals": 3}).controller == expected


def test_controllers_with_settings_of_their_own(tiny_root: Path) -> None:
    def made(**settings: Any) -> Controller:
        return job(tiny_root, mixture=settings).controller

    assert made(controller="elasticity", power=3, window=6) == Elasticity(power=3.0, window=6)
    assert made(controller="odm", term="forward_kl") == OnlineDataMixing(term="forward_kl")
    # By name of the domain, in any order.
    targets = {"echo": 1.0, "words": 2.5, "digits": 2}
    assert made(controller="dynamic_batch_loading", targets=targets) == DynamicBatchLoading(
        targets=(2.5, 2.0, 1.0)
    )


def test_a_controller_needs_a_teacher_only_if_it_follows_one(tiny_root: Path) -> None:
    alone = {"teacher.path": "", "objective.terms": [{"loss": "cross_entropy"}]}
    targets = {"echo": 1.0, "words": 2.5, "digits": 2.0}
    for mixture in (
        {"controller": "odm"},
        {"controller": "ado", "prior": "natural"},
        {"controller": "dynamic_batch_loading", "targets": targets},
    ):
        job(tiny_root, mixture=mixture, **alone).check()
    for name in ("ddk", "dynamic_batch_loading", "elasticity"):
        with pytest.raises(UserError, match=rf"'{name}' follows the gap to a teacher"):
            job(tiny_root, mixture={"controller": name}, **alone).check()


def test_priors(tiny_root: Path, tmp_path: Path) -> None:
    def prior(**mixture: Any) -> np.ndarray:
        return job(tiny_root, mixture=mixture).prior

    sizes = np.array([d.train.tokens for d in job(tiny_root).manifest.domains], np.float64)
    np.testing.assert_allclose(prior(), 1 / 3, rtol=1e-15)
    np.testing.assert_allclose(prior(prior="natural"), sizes / sizes.sum(), rtol=1e-14)
    tempered = sizes**0.5 / np.sum(sizes**0.5)
    np.testing.assert_allclose(prior(prior="natural", prior_power=0.5), tempered, rtol=1e-14)
    np.testing.assert_allclose(prior(prior="natural", prior_power=0.0), 1 / 3, rtol=1e-15)
    given = prior(prior_weights={"echo": 1.0, "words": 2.0, "digits": 5.0})
    np.testing.assert_allclose(given, [0.25, 0.625, 0.125], rtol=1e-15)
    # A finished run's average, by name.
    summary = {"domains": ["echo", "words", "digits"], "average_weights": [0.5, 0.375, 0.125]}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    np.testing.assert_allclose(prior(prior=str(tmp_path)), [0.375, 0.125, 0.5], rtol=1e-15)
    with pytest.raises(UserError, match=r"whose summary\.json has average weights"):
        prior(prior=str(tmp_path / "nowhere"))


def test_the_objective_has_the_config_s_terms(tiny_root: Path) -> None:
    terms = job(
        tiny_root,
        **{
            "objective.terms": [
                {"loss": "cross_entropy", "roles": "response"},
                {"loss": "forward_kl", "weight": 0.5, "temperature": 2.0}
                | {"temperature_squared": True},
            ]
        },
    ).config.objective.terms
    objective = make_objective(terms)
    assert [term.name for term in objective] == ["cross_entropy", "forward_kl"]
    assert [term.roles for term in objective] == ["response", "all"]
    assert [term.needs_teacher for term in objective] == [False, True]
    np.testing.assert_allclose(term_factors(objective, jnp.int32(5)), [1.0, 0.5 * 4])


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [2.0, 2.0, 1.5, 0.5, 0.0, 0.0]),
        ("cosine", [2.0, 2.0, 1.707107, 0.292893, 0.0, 0]),
    ],
)
def test_a_schedule_moves_between_its_steps(kind: str, expected: list[float]) -> None:
    weight = {"kind": kind, "start": 2, "end": 0, "first_step": 2, "last_step": 10}
    term = from_plain(TermConfig, {"loss": "forward_kl", "weight": weight})
    steps = (0, 2, 4, 8, 10, 99)
    found = [term_factors(make_objective([term]), jnp.int32(step))[0] for step in steps]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_settings_of_a_loss_stand_beside_its_other_keys() -> None:
    (term,) = make_objective([from_plain(TermConfig, {"loss": "bild", "k": 4, "lead": "teacher"})])
    assert term.loss.keywords == {"k": 4, "lead": "teacher"}  # type: ignore[attr-defined]
    wrong = {"leed": ("both", "did you mean lead"), "k": (1, "k must be at least 3")}
    for key, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            check_terms(make_objective([from_plain(TermConfig, {"loss": "bild", key: value})]))


def test_the_compute_type_on_the_cpu() -> None:
    assert compute_dtype("auto") == jnp.float32
    assert compute_dtype("bfloat16") == jnp.bfloat16


@pytest.mark.parametrize(
    ("compute", "held", "expected"),
    [("bfloat16", "auto", "bfloat16"), ("bfloat16", "float32", "float32")],
)
def test_types_of_the_models(tiny_root: Path, compute: str, held: str, expected: str) -> None:
    made = job(tiny_root, **{"run.compute_dtype": compute, "teacher.dtype": held})
    (teacher,) = made.teachers.loaded
    assert {leaf.dtype.name for leaf in jax.tree.leaves(teacher.params)} == {expected}
    assert teacher.decoder.dtype == made.student.dtype == jnp.dtype(compute)
    abstract = made.abstract_state().params["student"]
    assert {leaf.dtype.name for leaf in jax.tree.leaves(abstract)} == {"float32"}


# Models.


def test_the_student_takes_the_vocabulary_of_teacher_or_tokenizer(tiny_root: Path) -> None:
    assert job(tiny_root).student.spec.vocab_size == tiny.VOCABULARY
    alone = {"teacher.path": "", "objective.terms": [{"loss": "cross_entropy"}]}
    assert job(tiny_root, **alone).student.spec.vocab_size == tiny.VOCABULARY


def test_the_initial_student_is_a_function_of_the_seed(
    tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.use_devices(monkeypatch, 1)
    first, again, other = (
        tiny.state_digest(job(tiny_root, **{"run.seed": seed}).initial_state().params)
        for seed in (0, 0, 1)
    )
    assert first == again != other


def test_a_student_from_a_directory_starts_with_its_values(tiny_root: Path) -> None:
    teacher = tiny_root / "teacher"
    made = job(tiny_root, **{"student.path": str(teacher), "student.spec": {}})
    assert made.student.spec == hf.read_spec(teacher)
    expected = tiny.state_digest(hf.load(teacher))
    assert tiny.state_digest(made.initial_state().params["student"]) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.spec.hidden_size": 0}, r"student\.spec\.hidden_size is missing"),
        (
            {"student.spec.vocab_size": 200},
            r"200 embeddings, the tokenizer 257 tokens: set student\.spec\.vocab_size to 0",
        ),
        (
            {"student.spec.vocab_size": 200, "teacher.path": ""}
            | {"mixture.controller": "static", "objective.terms": [{"loss": "cross_entropy"}]},
            r"200 embeddings, the tokenizer 257 tokens: set student\.spec\.vocab_size to 0",
        ),
        ({"teacher.path": ""}, r"forward_kl needs a teacher: set teacher\.path"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    tiny_root: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        job(tiny_root, **changes).check()


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_model_with_another_tokenizer_is_refused(
    tiny_root: Path, tmp_path: Path, who: str
) -> None:
    """The same number of tokens, two of them exchanged: a mistake that no shape reveals."""
    tokenizer = tiny.write_tokenizer(tmp_path / "tokenizer", swapped=True)
    model = tiny.write_teacher(tmp_path / "model", tokenizer)
    spec = {} if who == "student" else tiny.STUDENT
    with pytest.raises(UserError, match=f"the {who}'s tokenizer .* is not the data's"):
        job(tiny_root, **{f"{who}.path": str(model), "student.spec": spec}).check()


def test_a_model_that_is_too_small_for_the_tokenizer_is_refused(
    tiny_root: Path, tmp_path: Path
) -> None:
    """Where the directory has no tokenizer, the number of embeddings must at least suffice."""
    model = tmp_path / "model"
    shutil.copytree(tiny_root / "teacher", model)
    for name in ("tokenizer.json", "SHA256SUMS"):
        (model / name).unlink()
    config = json.loads((model / "config.json").read_text()) | {"vocab_size": 100}
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="100 embeddings, the data's tokenizer 257 tokens"):
        job(tiny_root, **{"teacher.path": str(model)}).check()


def test_a_teacher_that_is_not_there_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises((UserError, StorageError), match="nowhere"):
        job(tiny_root, **{"teacher.path": str(tmp_path / "nowhere")}).check()


# Devices.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train.rows_per_step": 12}, r"train\.rows_per_step\) = 12: .* multiple of the 8 devices"),
        ({"train.micro_rows": 4}, r"train\.micro_rows .* = 4: .* multiple of the 8 devices"),
        ({"evaluation.batch_rows": 4}, r"evaluation\.batch_rows = 4: .* multiple of the 8"),
        ({"mesh.data": 3}, "does not fit 8 devices"),
    ],
)
def test_rows_that_the_devices_cannot_share_are_refused(
    tiny_root: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        job(tiny_root, **changes).check()


def test_micro_rows_must_divide_the_rows_of_a_step(tiny_root: Path) -> None:
    with pytest.raises(UserError, match=r"train\.micro_rows = 3 must divide"):
        job(tiny_root, **{"train.micro_rows": 3})


def test_a_config_that_fits_passes(tiny_root: Path) -> None:
    job(tiny_root).check()
    job(tiny_root, **{"mesh.fsdp": 2, "mesh.tensor": 2, "train.micro_rows": 4}).check()


# Data.


def test_data_that_is_missing_or_another_is_refused(tiny_root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        job(tiny_root, **{"data.dir": str(tmp_path / "nowhere")}).check()
    domains = [{"name": "words", "sources": [{"path": str(tiny_root / "words.jsonl")}]}]
    with pytest.raises(DataError, match=r"holds the domains words, digits, echo, the config names"):
        job(tiny_root, **{"data.domains": domains}).check()
    assert job(tiny_root, **{"data.domains": []}).domains == tiny.DOMAINS


def test_the_prior_is_uniform_or_by_size(tiny_root: Path) -> None:
    np.testing.assert_allclose(job(tiny_root).prior, 1 / 3)
    made = job(tiny_root, **{"mixture.prior": "natural"})
    sizes = np.array([domain.train.tokens for domain in made.manifest.domains])
    np.testing.assert_allclose(made.prior, sizes / sizes.sum())


def test_the_type_of_the_teacher_and_not_its_name_decides_what_is_measured_again(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.use_devices(monkeypatch, 1)
    shutil.copytree(tiny_root / "data", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "teacher_nats", ignore_errors=True)
    for held, results in (("auto", 1), ("float32", 1), ("bfloat16", 2)):
        changes = {"data.dir": str(tmp_path / "data"), "teacher.dtype": held}
        assert job(tiny_root, **changes).teacher_nats() is not None
        assert len(list((tmp_path / "data" / "teacher_nats").iterdir())) == results
