"""A run's parts for devices, data and model files that need not exist: shapes in place of arrays.

The steps are those of `training.build.Job`; what it reads from disks is replaced here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddk_jax.config import Config, OtherTeacherConfig, StudentConfig, TeacherConfig
from ddk_jax.data.shards import (
    MANIFEST,
    DomainInfo,
    LeftOut,
    Manifest,
    SplitInfo,
    TokenizerInfo,
)
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import StorageError, UserError
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.hub import Resolved
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import DATA_AXES, data_shards, make_mesh
from ddk_jax.places import resolve_path
from ddk_jax.training.build import Job
from ddk_jax.training.loaded import (
    Loaded,
    TeacherSet,
    abstract_params,
    check_complete,
    compute_dtype,
    read_shape,
)
from ddk_jax.training.micro import Teachers
from ddk_jax.training.state import Batch
from ddk_jax.training.step import make_eval_step
from ddk_jax.training.student import Student


class Step(NamedTuple):
    """A jitted function of the run, and what it would be called with."""

    name: str
    traced: Any
    """`jax.stages.Traced`."""


@dataclass(frozen=True)
class PlannedTeachers(TeacherSet):
    """Teachers whose parameters are shapes; their tokens are taken for the data's."""

    @cached_property
    def specs(self) -> tuple[ModelSpec, ...]:
        """Shapes, from the config or the files."""
        return tuple(shape_of(teacher, "teacher") for teacher in self._configs)

    @cached_property
    def loaded(self) -> tuple[Loaded, ...]:
        """The models, with shapes as parameters."""
        return tuple(
            _abstract_model(spec, self.mesh, self.student_dtype, self.dtype) for spec in self.specs
        )

    @cached_property
    def tokenizer(self) -> None:
        """None: the teacher's rows are taken to be as long as the student's."""
        return None


@dataclass(frozen=True)
class PlannedStudent(Student):
    """A student whose parameters are shapes."""

    def _read_shape(self) -> ModelSpec:
        return shape_of(self.config.student, "student")

    @cached_property
    def _loaded(self) -> Loaded:
        return _abstract_model(self.decoder.spec, self.mesh, self.dtype, self.dtype)


@dataclass(frozen=True)
class PlannedJob(Job):
    """A run's parts on `devices`, without prepared data and without model files."""

    devices: tuple[jax.Device, ...] = ()

    @cached_property
    def mesh(self) -> Mesh:
        """The device mesh."""
        mesh = self.config.mesh
        try:
            return make_mesh(mesh.data, mesh.fsdp, mesh.tensor, devices=self.devices)
        except ValueError as error:
            raise UserError(str(error)) from error

    @cached_property
    def dtype(self) -> Any:
        """Type of the activations; `auto` is what it is on a TPU."""
        name = self.config.run.compute_dtype
        return compute_dtype("bfloat16" if name == "auto" else name)

    @cached_property
    def manifest(self) -> Manifest:
        """That of the prepared data, or what stands in for it: names of domains, a vocabulary."""
        data = self.config.data
        if (resolve_path(data.dir) / MANIFEST).is_file():
            return super().manifest
        names = [domain.name for domain in data.domains] or ["data"]
        tokenizer = TokenizerInfo(digest="", vocab_size=_vocabulary(self.config), end_id=0)
        return Manifest(
            inputs_digest="",
            tokenizer=tokenizer,
            validation_fraction=data.validation_fraction,
            domains=tuple(map(_empty_domain, names)),
        )

    @cached_property
    def teachers(self) -> PlannedTeachers:
        """The teachers that the config names."""
        return PlannedTeachers(self.config, self.mesh, self.manifest, self.dtype)

    @cached_property
    def start(self) -> PlannedStudent:
        """The student."""
        return PlannedStudent(self.config, self.mesh, self.manifest, self.teachers, self.dtype)

    @property
    def row_shards(self) -> int:
        """Chips that share the rows of a batch."""
        return data_shards(self.mesh)

    def steps(self) -> Iterator[Step]:
        """The train step and the evaluations of student and teachers, traced one by one.

        Raises:
          UserError: settings that contradict each other, the models or the devices.
        """
        config = self.config
        self._check_divides(config.evaluation.batch_rows, "evaluation.batch_rows")
        train = config.train.rows_per_step // self.micro_rows, self.micro_rows
        state, frozen = self.abstract_state(), self.frozen
        step: Any = self.train_step()
        yield Step("train", step.trace(state, frozen, self._rows(*train)))
        rows = self._rows(1, config.evaluation.batch_rows)
        alone = Teachers((self.student,), np.ones((len(self.domains), 1)))
        whole = self.start.whole(state.params["student"])
        yield Step("evaluation", self._evaluation(alone, (whole,), rows))
        if self.teachers.loaded:
            models, params = self.teachers.models, self.teachers.params
            yield Step("teacher evaluation", self._evaluation(models, params, rows))

    def _evaluation(self, models: Teachers, params: tuple[Any, ...], rows: Batch) -> Any:
        columns = max(cast(Decoder, model).spec.vocab_size for model in models.models)
        plan, domains = self._plan(columns), len(self.domains)
        step: Any = make_eval_step(models, self.mesh, num_domains=domains, plan=plan)
        return step.trace(params, rows)

    def _rows(self, cuts: int, rows: int) -> Batch:
        """Shapes of a batch."""
        length = self.config.data.seq_len + 1
        sharding = NamedSharding(self.mesh, PartitionSpec(None, DATA_AXES))

        def array(*shape: int) -> Any:
            return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)

        whole = array(cuts, rows, length)
        return Batch(whole, whole, whole, array(cuts, rows))


def shape_of(
    model: TeacherConfig | OtherTeacherConfig | StudentConfig, who: Literal["student", "teacher"]
) -> ModelSpec:
    """The shape of a model: that of its files where they are on a disk, else what the config says.

    Raises:
      UserError: the two differ, or the config says nothing and the files cannot be read either.
    """
    said = model.spec
    told = said is not None and said.hidden_size > 0
    here = "://" not in model.path and resolve_path(model.path).exists()
    if told and not here:
        check_complete(said, f"{who}.spec")
        if not said.vocab_size:
            raise UserError(f"{who}.spec.vocab_size is missing: the plan depends on it")
        return said
    try:
        return read_shape(model, who)
    except UserError as error:
        if here:
            raise
        kind = StorageError if isinstance(error, StorageError) else UserError
        raise kind(f"{error}; or say the {who}'s shape in {who}.spec") from error


def _vocabulary(config: Config) -> int:
    """Tokens of the data: of the tokenizer where it is on a disk, else as many as all models have.

    Raises:
      UserError: nothing says how many there are.
    """
    tokenizer = config.data.tokenizer
    if tokenizer and resolve_path(tokenizer).exists():
        return Tokenizer(resolve_path(tokenizer)).vocab_size
    teachers = (config.teacher, *config.teacher.others) if config.teacher.path else ()
    sizes = [shape_of(teacher, "teacher").vocab_size for teacher in teachers]
    if config.student.path:
        sizes.append(shape_of(config.student, "student").vocab_size)
    elif config.student.spec.vocab_size:
        sizes.append(config.student.spec.vocab_size)
    if not sizes:
        raise UserError(
            "nothing says how large the vocabulary is: set student.spec.vocab_size, or "
            "data.tokenizer to a directory that is there"
        )
    return min(sizes)


def _empty_domain(name: str) -> DomainInfo:
    nothing = SplitInfo(shards=())
    return DomainInfo(name=name, train=nothing, validation=nothing, sources=(), left_out=LeftOut())


def _abstract_model(spec: ModelSpec, mesh: Mesh, dtype: Any, params_dtype: Any) -> Loaded:
    """What `loaded.load_model` returns, with shapes in place of parameters."""
    decoder = Decoder(spec=spec, dtype=dtype, mesh=mesh)
    params = abstract_params(decoder, mesh, params_dtype)
    return Loaded(decoder=decoder, params=params, origin=Resolved(resolve_path("")))


def with_settings(config: Config, **changes: dict[str, Any]) -> Config:
    """The config with some fields of some sections changed: `train={"micro_rows": 4}`."""
    sections = {name: replace(getattr(config, name), **fields) for name, fields in changes.items()}
    return replace(config, **sections)
