"""Models out of directories and from the hub; and whether their tokens are those of the data."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from ddk_jax.config import (
    Config,
    OtherTeacherConfig,
    StudentConfig,
    TeacherConfig,
    resolve_path,
)
from ddk_jax.data.shards import TOKENIZER, Manifest
from ddk_jax.data.tokenize import Tokenizer, same_tokens
from ddk_jax.errors import UserError
from ddk_jax.losses.objective import crosses_vocabularies
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.hub import Resolved, resolve
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import param_shardings
from ddk_jax.plain import suggest
from ddk_jax.training.micro import Teachers
from ddk_jax.training.terms import make_objective
from ddk_jax.training.transfer import TransferLine


def compute_dtype(name: str) -> Any:
    """The jax type for `auto`, `float32` or `bfloat16`; `auto` is float32 on CPU only."""
    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model with its parameters on the mesh."""

    decoder: Decoder
    params: Any
    origin: Resolved
    """Where it was read from."""

    @cached_property
    def digest(self) -> str:
        """Identifies the files that it was read from."""
        with TransferLine(str(self.origin)) as line:
            return hf.file_digest(self.origin.directory, line.update)


def load_model(
    path: str, mesh: Mesh, *, revision: str = "", dtype: Any, params_dtype: Any
) -> Loaded:
    """Read a Hugging Face model onto the mesh.

    Args:
      path: what `models.hub.resolve` takes.
      mesh: where to.
      revision: commit or tag of a hub repository.
      dtype: type of the activations.
      params_dtype: type that the parameters are held in.
    """
    origin = resolve(path, revision)
    decoder = Decoder(spec=hf.read_spec(origin.directory), dtype=dtype)
    shardings = param_shardings(mesh, decoder.logical_axes(), decoder.abstract())
    params = read_params(origin, decoder.spec, dtype=params_dtype, shardings=shardings)
    return Loaded(decoder=decoder, params=params, origin=origin)


def read_params(origin: Resolved, spec: ModelSpec, *, dtype: Any, shardings: Any) -> Any:
    """Read a model's parameters, and show how far it is where that takes long.

    Args:
      origin: the model.
      spec: as `hf.read_spec` returned it.
      dtype: type of the parameters.
      shardings: a sharding in the place of every one.
    """
    directory = origin.fetch()
    with TransferLine(str(origin)) as line:
        return hf.load(directory, spec=spec, dtype=dtype, shardings=shardings, progress=line.update)


@dataclass(frozen=True)
class TeacherSet:
    """The teachers of a run: shapes first, weights when they are asked for."""

    config: Config
    mesh: Mesh
    manifest: Manifest
    student_dtype: Any
    """Type of the activations."""

    @property
    def _configs(self) -> tuple[TeacherConfig | OtherTeacherConfig, ...]:
        teacher = self.config.teacher
        return (teacher, *teacher.others) if teacher.path else ()

    @cached_property
    def dtype(self) -> Any:
        """Type that the parameters are held in."""
        name = self.config.teacher.dtype
        return self.student_dtype if name == "auto" else compute_dtype(name)

    @cached_property
    def specs(self) -> tuple[ModelSpec, ...]:
        """Shapes; cheap, for the weights are not read."""
        found = []
        for teacher in self._configs:
            found.append(hf.read_spec(resolve(teacher.path, teacher.revision).directory))
            check_tokens(self.config, self.manifest, teacher, "teacher", found[-1])
        return tuple(found)

    @cached_property
    def loaded(self) -> tuple[Loaded, ...]:
        """The models."""
        _ = self.specs  # refuse a wrong one before reading the weights of the others
        types = {"dtype": self.student_dtype, "params_dtype": self.dtype}
        return tuple(
            load_model(teacher.path, self.mesh, revision=teacher.revision, **types)
            for teacher in self._configs
        )

    @property
    def origins(self) -> tuple[Resolved, ...]:
        """Where the teachers are; of hub repositories, with the commit."""
        return tuple(resolve(teacher.path, teacher.revision) for teacher in self._configs)

    @cached_property
    def tokenizer(self) -> Tokenizer | None:
        """The teacher's, if its tokens are not the data's."""
        if not self.specs or not may_differ(self.config):
            return None
        directory = self.origins[0].tokenizer_dir()
        if not (directory / "tokenizer.json").is_file():
            return None
        theirs = Tokenizer(directory)
        return theirs if same_tokens(theirs, data_tokenizer(self.config)) else None

    @cached_property
    def weights(self) -> np.ndarray:
        """Weight of every teacher in every domain, float64 [D, M]."""
        teachers, domains = self._configs, self.manifest.names
        for teacher in teachers:
            for name in teacher.domains.keys() - set(domains):
                raise UserError(
                    f"teacher {teacher.path}: unknown domain {name}: {suggest(name, domains)}"
                )
        weights = np.array([[t.domains.get(d, t.weight) for t in teachers] for d in domains])
        for domain, total in zip(domains, weights.sum(axis=1), strict=True):
            if teachers and not total > 0:
                raise UserError(f"domain {domain}: no teacher has a weight there")
        return weights

    @property
    def models(self) -> Teachers:
        """The teachers without their parameters."""
        return Teachers(tuple(teacher.decoder for teacher in self.loaded), self.weights)

    @property
    def params(self) -> tuple[Any, ...]:
        """Their parameters, as the train step takes them."""
        return tuple(teacher.params for teacher in self.loaded)

    @property
    def digest(self) -> str:
        """Identifies the teachers' files and how they are mixed."""
        if len(self.loaded) == 1:
            return self.loaded[0].digest
        mixed = [[teacher.digest for teacher in self.loaded], self.weights.tolist()]
        mixed.append([self.config.teacher.by_confidence])
        return hashlib.sha256(repr(mixed).encode()).hexdigest()


def data_tokenizer(config: Config) -> Tokenizer:
    """What made the ids of the prepared data."""
    return Tokenizer(resolve_path(config.data.dir) / TOKENIZER)


def may_differ(config: Config) -> bool:
    """Whether the objective takes a teacher with another vocabulary."""
    objective = make_objective(config.objective.terms)
    return crosses_vocabularies(objective) and not config.teacher.others


def check_tokens(
    config: Config,
    manifest: Manifest,
    model: TeacherConfig | OtherTeacherConfig | StudentConfig,
    who: Literal["student", "teacher"],
    spec: ModelSpec,
) -> None:
    """Refuse a model whose tokenizer gives other ids than the data's.

    A teacher may have another one if all terms that need it compare across vocabularies.
    """
    path, tokens = model.path, manifest.tokenizer.vocab_size  # first of all: is there any data?
    directory = resolve(path, model.revision).tokenizer_dir()
    if (directory / "tokenizer.json").is_file():
        data = data_tokenizer(config)
        if differences := same_tokens(Tokenizer(directory), data):
            if who == "teacher" and may_differ(config):
                return
            hint = "; `uld` alone compares across vocabularies" if who == "teacher" else ""
            raise UserError(
                f"the {who}'s tokenizer ({path}) is not the data's "
                f"({config.data.dir}/tokenizer): {'; '.join(differences)}{hint}"
            )
    elif spec.vocab_size > tokens:
        raise UserError(
            f"the {who} ({path}) has {spec.vocab_size} embeddings and no tokenizer.json, the "
            f"data's tokenizer has {tokens} tokens: put the {who}'s tokenizer.json beside its "
            "weights, so that the two can be compared"
        )
    if spec.vocab_size < tokens:
        raise UserError(
            f"the {who} ({path}) has {spec.vocab_size} embeddings, the data's tokenizer "
            f"{tokens} tokens: prepare the data with its tokenizer"
        )
