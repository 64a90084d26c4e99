"""From a Config to the parts of a run: mesh, models, objective, optimizer, steps, data, controller.

The names in the config (losses, controllers, types) are resolved here and nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from ddk_jax.config import Config, TermConfig, resolve_path, suggest
from ddk_jax.data.pipeline import MixturePipeline
from ddk_jax.data.rows import DomainRows, open_rows, validation_batches
from ddk_jax.data.shards import Manifest, read_manifest
from ddk_jax.data.tokenize import Tokenizer, same_tokens
from ddk_jax.errors import DataError, UserError
from ddk_jax.losses.objective import (
    LOSSES,
    Objective,
    WeightedTerm,
    make_term,
    needs_teacher,
)
from ddk_jax.mixture.controllers import CONTROLLERS, Controller, Static
from ddk_jax.mixture.gaps import GAPS
from ddk_jax.models import families, hf
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import data_shards, make_mesh, param_shardings
from ddk_jax.training.evaluate import DomainNats, cached, measure
from ddk_jax.training.optimizer import make_optimizer
from ddk_jax.training.state import (
    Batch,
    TrainState,
    initial_state,
    place_batch,
    state_shardings,
)
from ddk_jax.training.step import TrainStep, make_eval_step, make_train_step


def compute_dtype(name: str) -> Any:
    """The jax type for `auto`, `float32` or `bfloat16`; `auto` is float32 on CPU only."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def make_objective(terms: Sequence[TermConfig]) -> Objective:
    """The weighted terms that the config names.

    Raises:
      UserError: an unknown loss, with a suggestion.
    """
    return tuple(_make_term(term) for term in terms)


def _make_term(term: TermConfig) -> WeightedTerm:
    if term.loss not in LOSSES:
        raise UserError(
            f"objective.terms: unknown loss {term.loss!r}: {suggest(term.loss, list(LOSSES))}"
        )
    try:
        return make_term(
            term.loss,
            weight=term.weight,
            temperature=term.temperature,
            temperature_squared=term.temperature_squared,
            roles=term.roles,
        )
    except ValueError as error:
        raise UserError(f"objective.terms: {error}") from error


def make_controller(config: Config) -> Controller:
    """The controller that the config names.

    Raises:
      UserError: an unknown controller or gap, with a suggestion; or no teacher to measure a gap to.
    """
    mixture = config.mixture
    if mixture.controller not in CONTROLLERS:
        raise UserError(
            f"mixture.controller = {mixture.controller!r}: "
            f"{suggest(mixture.controller, list(CONTROLLERS))}"
        )
    if mixture.gap not in GAPS:
        raise UserError(f"mixture.gap = {mixture.gap!r}: {suggest(mixture.gap, list(GAPS))}")
    if not config.teacher.path and mixture.controller != Static.name:
        raise UserError(
            f"mixture.controller = {mixture.controller!r} follows the gap to a teacher: set "
            f"teacher.path, or mixture.controller to {Static.name}"
        )
    return CONTROLLERS[mixture.controller](
        gap=mixture.gap, alpha=mixture.alpha, warmup_intervals=mixture.warmup_intervals
    )


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its parameters on the mesh."""

    decoder: Decoder
    params: Any
    digest: str
    """Identifies the files that it was read from."""


def load_model(path: str, mesh: Mesh, *, dtype: Any, params_dtype: Any) -> Loaded:
    """Read a Hugging Face model directory onto the mesh.

    Args:
      path: the directory; `assets:NAME` is one shipped in the package.
      mesh: where to.
      dtype: type of the activations.
      params_dtype: type that the parameters are held in.
    """
    directory = resolve_path(path)
    spec = hf.read_spec(directory)
    decoder = Decoder(spec=spec, dtype=dtype)
    shardings = param_shardings(mesh, decoder.logical_axes(), decoder.abstract())
    params = hf.load(directory, spec=spec, dtype=params_dtype, shardings=shardings)
    return Loaded(decoder=decoder, params=params, digest=hf.file_digest(directory))


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
        return open_rows(resolve_path(self.config.data.dir), "train", self.config.data.seq_len)

    @cached_property
    def teacher(self) -> Loaded | None:
        """The teacher, if the config names one; its tokenizer must be the data's."""
        config = self.config
        if self.teacher_spec is None:
            return None
        return load_model(
            config.teacher.path, self.mesh, dtype=self.dtype, params_dtype=self.teacher_dtype
        )

    @cached_property
    def teacher_dtype(self) -> Any:
        """Type that the teacher's parameters are held in."""
        name = self.config.teacher.dtype
        return self.dtype if name == "auto" else compute_dtype(name)

    @cached_property
    def teacher_spec(self) -> ModelSpec | None:
        """The teacher's shape, if the config names one; cheap, for its weights are not read."""
        path = self.config.teacher.path
        if not path:
            return None
        spec = hf.read_spec(resolve_path(path))
        self._check_tokens(path, "teacher", spec)
        return spec

    @cached_property
    def student(self) -> Decoder:
        """The student's decoder."""
        config, teacher = self.config.student, self.teacher_spec
        if config.path:
            spec = hf.read_spec(resolve_path(config.path))
            self._check_tokens(config.path, "student", spec)
        else:
            spec = config.spec
            for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size"):
                if not getattr(spec, name):
                    raise UserError(
                        f"student.spec.{name} is missing: describe the student, or set "
                        "student.path to a model directory"
                    )
            size = teacher.vocab_size if teacher else self.manifest.tokenizer.vocab_size
            spec = replace(spec, vocab_size=spec.vocab_size or size)
            families.config_from_spec(spec)  # refuse now what could not be exported later
        if teacher and spec.vocab_size != teacher.vocab_size:
            raise UserError(
                f"the student has {spec.vocab_size} embeddings, the teacher "
                f"{teacher.vocab_size}: they must share one vocabulary"
            )
        if spec.vocab_size < self.manifest.tokenizer.vocab_size:
            raise UserError(
                f"the student has {spec.vocab_size} embeddings, the tokenizer "
                f"{self.manifest.tokenizer.vocab_size} tokens: set student.spec.vocab_size to 0"
            )
        return Decoder(spec=spec, dtype=self.dtype, remat=config.remat)

    @cached_property
    def objective(self) -> Objective:
        """The terms of the loss."""
        objective = make_objective(self.config.objective.terms)
        if needs_teacher(objective) and not self.config.teacher.path:
            names = [term.name for term in objective if term.needs_teacher]
            raise UserError(
                f"objective.terms: {', '.join(names)} needs a teacher: set teacher.path"
            )
        return objective

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The optimizer."""
        return make_optimizer(
            self.config.optim, self.config.train.steps, self.student.logical_axes()
        )

    @cached_property
    def micro_rows(self) -> int:
        """Rows of one forward and backward pass."""
        rows = self.config.train.micro_rows or self.config.train.rows_per_step
        self._check_divides(rows, "train.micro_rows (or train.rows_per_step)")
        return rows

    @cached_property
    def controller(self) -> Controller:
        """What turns gaps into weights."""
        return make_controller(self.config)

    @cached_property
    def prior(self) -> np.ndarray:
        """Weights before any measurement, float64 [D]."""
        sizes = [
            1.0 if self.config.mixture.prior == "uniform" else float(domain.train.tokens)
            for domain in self.manifest.domains
        ]
        return np.array(sizes) / sum(sizes)

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
        _ = self.objective, self.controller, self.micro_rows, self.student, self.train_rows

    def initial_state(self) -> TrainState:
        """The state before the first step, in its shardings."""
        student, config = self.student, self.config
        if config.student.path:
            shardings = self.state_shardings.params["student"]
            params = hf.load(
                resolve_path(config.student.path), spec=student.spec, shardings=shardings
            )
            return jax.jit(
                lambda p: initial_state(p, {}, self.optimizer), out_shardings=self.state_shardings
            )(params)
        return jax.jit(
            lambda key: initial_state(student.init(key), {}, self.optimizer),
            out_shardings=self.state_shardings,
        )(jax.random.key(config.run.seed))

    @cached_property
    def state_shardings(self) -> TrainState:
        """Shardings of the train state."""
        return state_shardings(self.mesh, self._abstract_state, self.student.logical_axes())

    def abstract_state(self) -> TrainState:
        """Shapes, types and shardings of the train state, for restoring a checkpoint."""
        return jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            self._abstract_state,
            self.state_shardings,
        )

    @cached_property
    def _abstract_state(self) -> TrainState:
        return jax.eval_shape(
            lambda key: initial_state(self.student.init(key), {}, self.optimizer),
            jax.random.key(0),
        )

    def train_step(self) -> TrainStep:
        """The jitted train step."""
        teacher = self.teacher
        return make_train_step(
            self.student,
            teacher.decoder if teacher else None,
            self.objective,
            self.optimizer,
            self.mesh,
            num_domains=len(self.domains),
            chunk_tokens=self.config.objective.chunk_tokens,
            state_shardings=self.state_shardings,
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
        )

    def place(self, tokens: Any, segment_ids: Any, role: Any, domain: Any) -> Batch:
        """A host batch on the devices, cut into micro-batches."""
        return place_batch(self.mesh, self.micro_rows, tokens, segment_ids, role, domain)

    def measure(self, decoder: Decoder, params: Any) -> DomainNats:
        """Nats per token of a model on the validation rows of every domain."""
        step = self._eval_steps.get(decoder)
        if step is None:
            step = self._eval_steps[decoder] = make_eval_step(
                decoder,
                self.mesh,
                num_domains=len(self.domains),
                chunk_tokens=self.config.objective.chunk_tokens,
            )
        return measure(step, params, self._validation_batches(), len(self.domains))

    @cached_property
    def _eval_steps(self) -> dict[Decoder, Any]:
        return {}

    def teacher_nats(self) -> DomainNats | None:
        """The teacher's, measured once for all runs over the same data."""
        teacher, config = self.teacher, self.config
        if teacher is None:
            return None
        validation = [domain.validation.files for domain in self.manifest.domains]
        key = {
            "teacher": teacher.digest,
            "validation": hashlib.sha256(
                repr([sorted(f.items()) for f in validation]).encode()
            ).hexdigest(),
            "seq_len": config.data.seq_len,
            "rows_per_domain": config.evaluation.rows_per_domain,
            "dtype": [str(self.dtype), str(self.teacher_dtype)],
        }
        directory = resolve_path(config.data.dir) / "teacher_nats"
        return cached(directory, key, lambda: self.measure(teacher.decoder, teacher.params))

    def _validation_batches(self) -> Iterator[Batch]:
        config = self.config
        rows = open_rows(resolve_path(config.data.dir), "validation", config.data.seq_len)
        for domain_rows in rows:
            for host in validation_batches(
                domain_rows, config.evaluation.rows_per_domain, config.evaluation.batch_rows
            ):
                yield place_batch(self.mesh, config.evaluation.batch_rows, *host)

    def _check_divides(self, rows: int, field: str) -> None:
        shards = data_shards(self.mesh)
        if rows % shards:
            raise UserError(
                f"{field} = {rows}: must be a multiple of the {shards} devices that share the rows"
            )

    def _check_tokens(self, path: str, who: str, spec: ModelSpec) -> None:
        """Refuse a model whose tokenizer gives other ids than the data's."""
        tokens = self.manifest.tokenizer.vocab_size  # first of all: is there any data?
        directory = resolve_path(path)
        if (directory / "tokenizer.json").is_file():
            data = Tokenizer(resolve_path(self.config.data.dir) / "tokenizer")
            if differences := same_tokens(Tokenizer(directory), data):
                raise UserError(
                    f"the {who}'s tokenizer ({path}) is not the data's "
                    f"({self.config.data.dir}/tokenizer): {'; '.join(differences)}"
                )
        if spec.vocab_size < tokens:
            raise UserError(
                f"the {who} ({path}) has {spec.vocab_size} embeddings, the data's tokenizer "
                f"{tokens} tokens: prepare the data with its tokenizer"
            )
