"""From a Config to the parts of a run: mesh, models, objective, optimizer, steps, data, controller.

Names of losses are resolved in `terms.py`, of controllers in `steering.py`, of models in
`loaded.py` and `student.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import Array

from ddk_jax.config import Config, load_config
from ddk_jax.data.pipeline import MixturePipeline
from ddk_jax.data.retokenise import Retokeniser, teacher_length
from ddk_jax.data.rows import DomainRows, HostBatch, open_rows
from ddk_jax.data.shards import Manifest, read_manifest
from ddk_jax.errors import DataError, UserError
from ddk_jax.losses.chunked import ChunkPlan, chunk_tokens
from ddk_jax.losses.objective import (
    Objective,
    WeightedTerm,
    check_terms,
    needs_teacher,
)
from ddk_jax.losses.state_terms import Shape, StateTerm
from ddk_jax.mixture.controller import Controller
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.hub import resolve
from ddk_jax.parallel.mesh import (
    VOCAB_AXIS,
    data_shards,
    make_mesh,
    replicated,
)
from ddk_jax.places import resolve_path, resolve_place
from ddk_jax.training.checkpoint import read_latest
from ddk_jax.training.evaluate import DomainNats, Validation, cached
from ddk_jax.training.loaded import TeacherSet, compute_dtype, data_tokenizer
from ddk_jax.training.micro import Frozen, MicroLoss, Teachers
from ddk_jax.training.optimizer import make_optimizer
from ddk_jax.training.rundir import is_run
from ddk_jax.training.state import (
    Batch,
    TrainState,
    initial_state,
    local_rows,
    place_batch,
    state_shardings,
)
from ddk_jax.training.steering import Steering, make_controller, prior_weights
from ddk_jax.training.step import TrainStep, make_train_step
from ddk_jax.training.student import Student
from ddk_jax.training.terms import make_objective


@contextmanager
def _said_of(field: str) -> Iterator[None]:
    """Errors in values become the user's, with the field that they are in."""
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{field}: {error}") from error


def trained_filters(run_dir: str, layers: tuple[int, ...], mesh: Mesh) -> Array:
    """The filters that a run of `layer_cross_entropy` ended with, [n, width, width'].

    Args:
      run_dir: the run.
      layers: that the filters must be of.
      mesh: where to.

    Raises:
      UserError: the run has no such term, has saved nothing, or filtered other layers.
    """
    directory = resolve_place(run_dir)
    if not is_run(directory):
        raise UserError(f"{run_dir}: not a run directory (no config.yaml)")
    job = Job(load_config(directory / "config.yaml"))
    terms = {t.name: t.loss for t in job.objective if isinstance(t.loss, StateTerm)}
    filters = {name: loss for name, loss in terms.items() if loss.of_labels}
    if len(filters) != 1:
        raise UserError(f"{run_dir}: its objective has no term layer_cross_entropy, or several")
    ((name, loss),) = filters.items()
    assert loss.maps is not None
    if loss.maps.student != layers:
        raise UserError(f"{run_dir} has filters of layers {loss.maps.student}, not of {layers}")
    objective = job.abstract_state().params["objective"]
    restored = read_latest(directory / "checkpoints", objective, under="params/objective")
    if restored is None:
        raise UserError(f"{run_dir}: the run has not saved a checkpoint yet")
    return jax.device_put(restored.state[name]["map"], replicated(mesh))


@dataclass(frozen=True)
class Job:
    """A run's parts, made from its config; expensive ones are made when first asked for."""

    config: Config

    @cached_property
    def mesh(self) -> Mesh:
        """The device mesh."""
        mesh = self.config.mesh
        try:
            return make_mesh(mesh.data, mesh.fsdp, mesh.tensor)
        except ValueError as error:
            raise UserError(str(error)) from error

    @cached_property
    def dtype(self) -> Any:
        """Type of the activations."""
        return compute_dtype(self.config.run.compute_dtype)

    @cached_property
    def manifest(self) -> Manifest:
        """The prepared data's manifest; it must list the config's domains, if that names any."""
        config = self.config.data
        manifest = read_manifest(resolve_path(config.dir))
        wanted = tuple(domain.name for domain in config.domains)
        if wanted and wanted != manifest.names:
            raise DataError(
                f"{config.dir} holds the domains {', '.join(manifest.names)}, the config names "
                f"{', '.join(wanted)}: run `ddk prepare`, or choose another data.dir"
            )
        return manifest

    @property
    def domains(self) -> tuple[str, ...]:
        """Names of the domains, in order."""
        return self.manifest.names

    @cached_property
    def train_rows(self) -> list[DomainRows]:
        """Training rows of every domain."""
        data = self.config.data
        return open_rows(resolve_path(data.dir), "train", data.seq_len, data.packing)

    @cached_property
    def teachers(self) -> TeacherSet:
        """The teachers that the config names."""
        return TeacherSet(self.config, self.mesh, self.manifest, self.dtype)

    @cached_property
    def retokeniser(self) -> Retokeniser | None:
        """What cuts the rows into the teacher's tokens, if those are not the data's."""
        ours, theirs = data_tokenizer(self.config), self.teachers.tokenizer
        if theirs is None:
            return None
        return Retokeniser(ours, theirs, teacher_length(self.train_rows, ours, theirs))

    @cached_property
    def start(self) -> Student:
        """Where the student comes from, and what of it learns."""
        return Student(self.config, self.mesh, self.manifest, self.teachers, self.dtype)

    @property
    def student(self) -> Decoder:
        """The student's decoder."""
        return self.start.decoder

    @cached_property
    def objective(self) -> Objective:
        """The terms of the loss, bound to the models."""
        objective = make_objective(self.config.objective.terms)
        if needs_teacher(objective) and not self.config.teacher.path:
            names = [term.name for term in objective if term.needs_teacher]
            raise UserError(
                f"objective.terms: {', '.join(names)} needs a teacher: set teacher.path"
            )
        with _said_of("objective.terms"):
            check_terms(objective)
            return tuple(self._bound(term) for term in objective)

    def _bound(self, term: WeightedTerm) -> WeightedTerm:
        if not isinstance(term.loss, StateTerm):
            return term
        return replace(term, loss=term.loss.bound(*self._shapes))

    @property
    def _shapes(self) -> tuple[Shape, Shape]:
        """Of the student and of the (first) teacher, as terms on inner states see them."""
        ours = self.student.spec
        first, *others = self.teachers.specs or (ours,)
        if others:
            raise UserError("objective.terms: inner states are compared with one teacher only")
        student, teacher = (Shape(s.num_layers, s.hidden_size) for s in (ours, first))
        return student, teacher

    def _objective_params(self, key: Array) -> dict[str, Any]:
        """Learned parameters of the terms, at the start."""
        params = {}
        for index, term in enumerate(self.objective):
            if isinstance(term.loss, StateTerm):
                learned = term.loss.initial(jax.random.fold_in(key, index), *self._shapes)
                params[term.name] = learned | self._student_filters[term.name]
        return {name: learned for name, learned in params.items() if learned}

    @cached_property
    def frozen_objective(self) -> dict[str, Any]:
        """What terms read and do not learn."""
        return {name: found for name, found in self._filters("teacher").items() if found}

    @cached_property
    def _student_filters(self) -> dict[str, dict[str, Any]]:
        return self._filters("student")

    def _filters(self, whose: str) -> dict[str, dict[str, Any]]:
        """The filters that the terms take from earlier runs, by the name of the term."""
        found: dict[str, dict[str, Any]] = {}
        for config, term in zip(self.config.objective.terms, self.objective, strict=True):
            path = config.settings.get(f"{whose}_filters")
            found[term.name] = {}
            if path is not None and isinstance(term.loss, StateTerm):
                wanted = getattr(term.loss.maps, whose)
                name = "map" if whose == "student" else "teacher_map"
                filters = trained_filters(path, wanted, self.mesh)
                width = self._shapes[1].width
                if filters.shape[2] != width:
                    raise UserError(
                        f"{path} has filters to {filters.shape[2]} features, the teacher's are to "
                        f"{width}: train the student's with `through: teacher`"
                    )
                found[term.name] = {name: filters}
        return found

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer."""
        return make_optimizer(
            self.config.optim,
            self.config.train.steps,
            self.start.logical_axes(),
            freeze_student=self.config.student.frozen,
        )

    @cached_property
    def micro_rows(self) -> int:
        """Rows of one forward and backward pass."""
        rows = self.config.train.micro_rows or self.config.train.rows_per_step
        self._check_divides(rows, "train.micro_rows (or train.rows_per_step)")
        return rows

    @cached_property
    def controller(self) -> Controller:
        """What turns observations into weights."""
        named = tuple(domain.name for domain in self.config.data.domains)
        return make_controller(self.config, named or self.domains)

    @property
    def prior(self) -> np.ndarray:
        """Weights before any measurement, float64 [D]."""
        tokens = [domain.train.tokens for domain in self.manifest.domains]
        return prior_weights(self.config.mixture, self.domains, tokens)

    def steering(self, teacher_nats: DomainNats | None) -> Steering:
        """The mixture of a run that is about to start."""
        rows = self.config.train.rows_per_step
        return Steering(
            self.controller,
            self.prior,
            domains=self.domains,
            terms=[term.name for term in self.objective],
            teacher_nats=None if teacher_nats is None else teacher_nats.nats,
            rows_per_step=rows,
            rows_per_interval=rows * self.config.mixture.interval_steps,
        )

    def check(self) -> None:
        """Refuse a config that cannot be run, before any long work.

        Raises:
          UserError: settings that contradict each other, the models or the devices.
          DataError: the prepared data is missing, broken or another than the config's.
        """
        config = self.config
        self._check_divides(config.evaluation.batch_rows, "evaluation.batch_rows")
        if config.train.stop_discrepancy and not config.teacher.path:
            raise UserError("train.stop_discrepancy compares with a teacher: set teacher.path")
        _ = self.objective, self.controller, self.prior, self.micro_rows, self.train_rows
        _ = self.student, self.start.lora
        _ = self.teachers.weights
        with _said_of("objective.terms"):
            check_terms(self.objective, self.manifest.tokenizer.vocab_size)

    def commits(self) -> dict[str, str]:
        """Commit of every hub repository that the config names as a model, by its id."""
        named = (self.config.student, self.config.teacher, *self.config.teacher.others)
        found = {model.path: resolve(model.path, model.revision) for model in named if model.path}
        return {path: model.commit for path, model in found.items() if model.repo}

    def initial_state(self) -> TrainState:
        """The state before the first step, in its shardings."""
        keys = jax.random.split(jax.random.key(self.config.run.seed))
        objective = self._objective_params(keys[1])
        given = self.start.given(self.state_shardings.params["student"])

        def start(key: Array, given: Any, objective: Any) -> TrainState:
            made = self.start.init(key) if given is None else given
            return initial_state(made, objective, self.optimizer)

        return jax.jit(start, out_shardings=self.state_shardings)(keys[0], given, objective)

    @cached_property
    def state_shardings(self) -> TrainState:
        """Shardings of the train state."""
        return state_shardings(self.mesh, self._abstract_state, self.start.logical_axes())

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the train state, for restoring a checkpoint."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._abstract_state,
            self.state_shardings,
        )

    @cached_property
    def _abstract_state(self) -> TrainState:
        _ = self._student_filters  # are read, not traced
        objective = jax.eval_shape(self._objective_params, jax.random.key(0))
        return jax.eval_shape(
            lambda o: initial_state(self.start.init(jax.random.key(0)), o, self.optimizer),
            objective,
        )

    def train_step(self) -> TrainStep:
        """The jitted train step."""
        loss = MicroLoss(
            student=self.student,
            teachers=self.teachers.models if self.teachers.loaded else None,
            objective=self.objective,
            plan=self.plan,
            mesh=self.mesh,
            freeze_student=self.config.student.frozen,
            lora=self.start.lora,
        )
        return make_train_step(
            loss,
            self.optimizer,
            self.mesh,
            num_domains=len(self.domains),
            seed=self.config.run.seed,
            state_shardings=self.state_shardings,
        )

    @property
    def frozen(self) -> Frozen:
        """What the train step reads and does not change."""
        return Frozen(self.teachers.params, self.frozen_objective, self.start.base)

    def weighed(self, domain_weights: np.ndarray | None) -> Frozen:
        """The same, with weights [D] of the domains in the loss, if there are any."""
        if domain_weights is None:
            return self.frozen
        rounded = domain_weights.astype(np.float32)
        whole = replicated(self.mesh)
        weights = jax.make_array_from_process_local_data(whole, rounded, rounded.shape)
        return self.frozen._replace(domain_weights=weights)

    @cached_property
    def plan(self) -> ChunkPlan:
        """How the train step computes heads and losses."""
        specs = (self.student.spec, *self.teachers.specs)
        return self._plan(max(spec.vocab_size for spec in specs))

    def _plan(self, columns: int) -> ChunkPlan:
        """How heads of so many columns, and the losses, are computed."""
        budget, theirs = self.config.objective.logits_mib, self.teachers.tokenizer
        return ChunkPlan(
            tokens=chunk_tokens(budget, columns, self.mesh.shape[VOCAB_AXIS]),
            vocab_size=self.manifest.tokenizer.vocab_size,
            teacher_vocab_size=theirs.vocab_size if theirs else 0,
            by_confidence=self.config.teacher.by_confidence,
            round_logits=self.config.objective.round_logits,
            head_gradient=not self.config.student.frozen and self.start.lora is None,
        )

    def pipeline(self, weights: np.ndarray) -> MixturePipeline:
        """Training batches from row 0 on, mixed by `weights`."""
        train = self.config.train
        return MixturePipeline(
            self.train_rows,
            weights,
            rows_per_step=train.rows_per_step,
            seed=self.config.run.seed,
            prefetch=train.prefetch_steps,
            finish=self.retokeniser,
            places=local_rows(self.mesh, train.rows_per_step, self.micro_rows),
        )

    def place(self, host: HostBatch) -> Batch:
        """A host batch on the devices, cut into micro-batches."""
        return place_batch(self.mesh, self.micro_rows, *host)

    @cached_property
    def validation(self) -> Validation:
        """What models are measured on."""
        config = self.config
        return Validation(
            rows=open_rows(resolve_path(config.data.dir), "validation", config.data.seq_len),
            rows_per_domain=config.evaluation.rows_per_domain,
            batch_rows=config.evaluation.batch_rows,
            mesh=self.mesh,
            plan=self._plan,
        )

    def measure(self, decoder: Decoder, params: Any) -> DomainNats:
        """Nats per token of a model on the validation rows of every domain."""
        alone = Teachers((decoder,), np.ones((len(self.domains), 1)))
        return self.validation.nats(alone, (params,))

    def teacher_nats(self) -> DomainNats | None:
        """The teachers' (of their mixture), measured once for all runs over the same data."""
        config = self.config
        if not self.teachers.loaded:
            return None
        validation = [domain.validation.files for domain in self.manifest.domains]
        key = {
            "teacher": self.teachers.digest,
            "validation": hashlib.sha256(
                repr([sorted(f.items()) for f in validation]).encode()
            ).hexdigest(),
            "seq_len": config.data.seq_len,
            "rows_per_domain": config.evaluation.rows_per_domain,
            "dtype": [str(self.dtype), str(self.teachers.dtype)],
        }
        directory = resolve_path(config.data.dir) / "teacher_nats"
        return cached(directory, key, self._measured_teachers)

    def _measured_teachers(self) -> DomainNats:
        models, params = self.teachers.models, self.teachers.params
        return self.validation.nats(models, params, tokens=self.retokeniser)

    def _check_divides(self, rows: int, field: str) -> None:
        shards = data_shards(self.mesh)
        if rows % shards:
            raise UserError(
                f"{field} = {rows}: must be a multiple of the {shards} devices that share the rows"
            )
