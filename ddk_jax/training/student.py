"""The student of a run: where it comes from, and what of it learns."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from ddk_jax.config import Config
from ddk_jax.data.shards import Manifest
from ddk_jax.errors import UserError
from ddk_jax.models import families
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.hub import resolve
from ddk_jax.models.lora import LoRA
from ddk_jax.models.spec import ModelSpec
from ddk_jax.training.loaded import (
    Loaded,
    TeacherSet,
    check_complete,
    check_tokens,
    load_model,
    read_params,
    read_shape,
)


@dataclass(frozen=True)
class Student:
    """The student before the first step; nothing is read or made until it is asked for."""

    config: Config
    mesh: Mesh
    manifest: Manifest
    teachers: TeacherSet
    dtype: Any
    """Type of the activations."""

    @cached_property
    def decoder(self) -> Decoder:
        """The model.

        Raises:
          UserError: it is not described, cannot be exported, or has other tokens than the data.
        """
        config, tokens = self.config.student, self.manifest.tokenizer.vocab_size
        if config.path:
            spec = self._read_shape()
        else:
            spec = config.spec
            check_complete(spec, "student.spec")
            size = tokens
            if self.teachers.specs and self.teachers.tokenizer is None:
                size = self.teachers.specs[0].vocab_size
            spec = replace(spec, vocab_size=spec.vocab_size or size)
            families.config_from_spec(spec)  # refuse now what could not be exported later
        if spec.vocab_size < tokens:
            raise UserError(
                f"the student has {spec.vocab_size} embeddings, the tokenizer {tokens} tokens: set "
                "student.spec.vocab_size to 0"
            )
        return Decoder(spec=spec, dtype=self.dtype, remat=config.remat, mesh=self.mesh)

    def _read_shape(self) -> ModelSpec:
        spec = read_shape(self.config.student, "student")
        check_tokens(self.config, self.manifest, self.config.student, "student", spec)
        return spec

    @cached_property
    def lora(self) -> LoRA | None:
        """The adapters that learn in place of the student, if the config asks for them.

        Raises:
          UserError: impossible settings, or no student to adapt.
        """
        config = self.config.student
        if config.lora is None:
            return None
        if not config.path:
            raise UserError("student.lora adapts a trained student: set student.path")
        if config.frozen:
            raise UserError("student.lora and student.frozen: choose one of them")
        alpha = config.lora.alpha or 2.0 * config.lora.rank
        try:
            return LoRA(rank=config.lora.rank, alpha=alpha, targets=config.lora.targets)
        except ValueError as error:
            raise UserError(f"student.lora: {error}") from error

    @cached_property
    def _loaded(self) -> Loaded:
        config, types = self.config.student, {"dtype": self.dtype, "params_dtype": self.dtype}
        return load_model(config.path, self.mesh, revision=config.revision, **types)

    @property
    def base(self) -> Any:
        """Parameters below the adapters, which stay as they are, in the type of the activations."""
        return None if self.lora is None else self._loaded.params

    @property
    def base_digest(self) -> str:
        """Identifies the files that `base` was read from."""
        return self._loaded.digest

    def logical_axes(self) -> Any:
        """A tuple of logical axis names in the place of every learned parameter."""
        axes = self.decoder.logical_axes()
        return axes if self.lora is None else self.lora.logical_axes(self.decoder.abstract(), axes)

    def init(self, key: Array) -> Any:
        """Learned parameters at random."""
        if self.lora is None:
            return self.decoder.init(key)
        return self.lora.init(key, self.decoder.abstract(), self.decoder.logical_axes())

    def given(self, shardings: Any) -> Any:
        """Learned parameters out of the model directory; None: they are random ones."""
        config = self.config.student
        if not config.path or self.lora is not None:
            return None
        origin = resolve(config.path, config.revision)
        return read_params(origin, self.decoder.spec, dtype=jnp.float32, shardings=shardings)

    def whole(self, learned: Any) -> Any:
        """The parameters that `decoder` reads, out of those that learn."""
        return learned if self.lora is None else self.lora.adapted(self.base, learned)

    def merged(self, learned: Any) -> Any:
        """Likewise, with adapters added to their matrices for good."""
        return learned if self.lora is None else jax.jit(self.lora.merged)(self.base, learned)
