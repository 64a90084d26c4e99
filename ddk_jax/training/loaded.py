"""Models out of directories and from the hub; and whether their tokens are those of the data."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from ddk_jax.config import Config, OtherTeacherConfig, StudentConfig, TeacherConfig
from ddk_jax.data.shards import TOKENIZER, Manifest
from ddk_jax.data.tokenize import Tokenizer, same_tokens
from ddk_jax.errors import UserError
from ddk_jax.losses.objective import crosses_vocabularies
from ddk_jax.models import families, hf
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.hub import Resolved, resolve
from ddk_jax.models.load import Become, at
from ddk_jax.models.quantise import is_quantised, quantised, quantised_shapes
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import param_shardings
from ddk_jax.places import resolve_path
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
      params_dtype: type that the parameters are held in. int8: that of the layers' matrices, which
        are quantised one by one; the others have the type of the activations.
    """
    origin = resolve(path, revision)
    decoder = Decoder(spec=hf.read_spec(origin.directory), dtype=dtype, mesh=mesh)
    axes, shapes = decoder.logical_axes(), decoder.abstract()
    shardings, become = param_shardings(mesh, axes, shapes), None
    if params_dtype == jnp.int8:
        params_dtype, become = dtype, _quantiser(axes, _quantised_shardings(mesh, axes, shapes))
    params = read_params(
        origin, decoder.spec, dtype=params_dtype, shardings=shardings, become=become
    )
    return Loaded(decoder=decoder, params=params, origin=origin)


def abstract_params(decoder: Decoder, mesh: Mesh, params_dtype: Any) -> Any:
    """Shapes, types and shardings of what `load_model` reads."""
    axes, shapes = decoder.logical_axes(), decoder.abstract()
    is_int8 = params_dtype == jnp.int8
    dtype = decoder.dtype if is_int8 else params_dtype
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), shapes)
    if is_int8:
        shapes, axes = quantised_shapes(shapes, axes)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        shapes,
        param_shardings(mesh, axes, shapes),
    )


def _quantised_shardings(mesh: Mesh, axes: Any, shapes: Any) -> Any:
    shapes, axes = quantised_shapes(shapes, axes)
    return param_shardings(mesh, axes, shapes)


def _quantiser(axes: Any, shardings: Any) -> Become:
    """What makes matrices 8-bit ones, each on the devices that hold it."""

    def become(path: tuple[str, ...], value: Array) -> Any:
        if not is_quantised(path):
            return value
        names, places = at(axes, path), at(shardings, path)
        return jax.jit(partial(quantised, names=names), out_shardings=places)(value)

    return become


def read_params(
    origin: Resolved, spec: ModelSpec, *, dtype: Any, shardings: Any, become: Become | None = None
) -> Any:
    """Read a model's parameters, and show how far it is where that takes long.

    Args:
      origin: the model.
      spec: as `hf.read_spec` returned it.
      dtype: type of the parameters.
      shardings: a sharding in the place of every one.
      become: as for `hf.load`.
    """
    directory = origin.fetch()
    with TransferLine(str(origin)) as line:
        return hf.load(
            directory,
            spec=spec,
            dtype=dtype,
            shardings=shardings,
            progress=line.update,
            become=become,
        )


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
            found.append(read_shape(teacher, "teacher"))
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


def read_shape(
    model: TeacherConfig | OtherTeacherConfig | StudentConfig, who: Literal["student", "teacher"]
) -> ModelSpec:
    """The shape of a model, out of its files.

    Raises:
      UserError: the config says that it is another one.
    """
    found = hf.read_spec(resolve(model.path, model.revision).directory)
    if model.spec is None or not model.spec.hidden_size:
        return found
    check_complete(model.spec, f"{who}.spec")
    said = replace(model.spec, vocab_size=model.spec.vocab_size or found.vocab_size)
    ours, theirs = (asdict(families.canonical(spec)) for spec in (said, found))
    if ours != theirs:
        differ = (f"{n} = {v}, not {ours[n]}" for n, v in theirs.items() if v != ours[n])
        raise UserError(
            f"the {who} ({model.path}) has {', '.join(differ)}, which {who}.spec says: correct it"
        )
    return found


def check_complete(spec: ModelSpec, field: str) -> None:
    """Refuse a shape that lacks a size.

    Args:
      spec: the shape.
      field: where the config has it, for the message.
    """
    for name in ("hidden_size", "num_layers", "num_heads", "num_kv_heads", "ffn_size"):
        if not getattr(spec, name):
            raise UserError(
                f"{field}.{name} is missing: describe the model, or set "
                f"{field.removesuffix('spec')}path to a model directory"
            )


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
