"""Hugging Face model directories: read into parameters, and written so that others can load them.

Weights are streamed tensor by tensor into their place, so the host holds one stacked parameter at a
time, or one device's part of it. A parameter of ours stacks the same tensor of many layers;
`families.py` says which.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file

from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import StorageError, UserError
from ddk_jax.models import families
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.directory import (
    CHECKSUMS,
    CONFIG,
    INDEX,
    WEIGHTS,
    checksum_lines,
    open_tensors,
    read_json,
    some,
    verify,
    weight_files,
    write_json,
)
from ddk_jax.models.families import Placement
from ddk_jax.models.spec import ModelSpec

MAX_SHARD_BYTES = 4 * 2**30

_FLOAT_TYPES = ("F64", "F32", "F16", "BF16")
_TOKENIZER_FILES = (
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)


def read_spec(directory: str | Path) -> ModelSpec:
    """The decoder that a model directory holds.

    Raises:
      UserError: no such directory, an unsupported architecture or setting, or code of its own.
      StorageError: config.json is missing, not JSON, or differs from SHA256SUMS.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(
            f"{directory}: no such directory; a model is one with {CONFIG} and {WEIGHTS}"
        )
    verify(directory, [CONFIG])
    config = read_json(directory / CONFIG)
    if "auto_map" in config:
        raise UserError(
            f"{directory / CONFIG}: has auto_map, so the model needs Python code that comes with "
            "it; code from a model directory is never run"
        )
    try:
        return families.spec_from_config(config)
    except UserError as error:
        raise UserError(f"{directory / CONFIG}: {error}") from error


def file_digest(directory: str | Path) -> str:
    """SHA-256 over the names and contents of config.json and the weight files, as hex.

    Raises:
      UserError: there are no weights in safetensors.
      StorageError: a file is missing or cannot be read.
    """
    directory = Path(directory)
    names = sorted([CONFIG, *(path.name for path in weight_files(directory))])
    return hashlib.sha256(checksum_lines(directory, names).encode()).hexdigest()


def load(
    directory: str | Path,
    *,
    spec: ModelSpec | None = None,
    dtype: Any = jnp.float32,
    shardings: Params | None = None,
) -> Params:
    """Read the parameters of a model directory.

    Args:
      directory: config.json and model.safetensors, or shards with their index. Files that
        SHA256SUMS lists, where there is one, are verified.
      spec: as `read_spec` returned it; read again when absent.
      dtype: floating type of the result.
      shardings: a sharding in the place of every parameter; each host then reads just the parts
        that its devices hold. Default: whole arrays on the default device.

    Returns:
      The parameter tree that `Decoder(spec=spec).init` has the shape of.

    Raises:
      UserError: unsupported or pickled model, or tensors that do not match the config (listed).
      StorageError: files that are missing, truncated, corrupt or outside of the directory.
    """
    directory = Path(directory)
    spec = read_spec(directory) if spec is None else spec
    verify(directory, [INDEX, *(path.name for path in weight_files(directory))])
    abstract = Decoder(spec=spec).abstract()
    places = families.placements(spec)
    params = jax.tree.map(lambda _: None, abstract)
    with ExitStack() as stack:
        tensors = open_tensors(directory, stack)
        _check_tensors(directory, spec, places, tensors, abstract)
        for path, leaf_places in _by_leaf(places).items():
            leaf = _at(abstract, path)
            read = _LeafReader(leaf_places, tensors, leaf.shape, np.dtype(dtype))
            if shardings is None:
                value = jnp.asarray(read(None))
            else:
                value = jax.make_array_from_callback(
                    leaf.shape, _at(shardings, path), read, dtype=np.dtype(dtype)
                )
            _at(params, path[:-1])[path[-1]] = value
    return params


def export(
    params: Params,
    spec: ModelSpec,
    directory: str | Path,
    *,
    tokenizer_dir: str | Path,
    dtype: Any = jnp.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: str,
    figures: Mapping[str, bytes] | None = None,
) -> None:
    """Write a model directory that transformers, vLLM and `load` read.

    The directory appears complete or not at all. An earlier export in its place is replaced.

    Args:
      params: the parameters; sharded ones are gathered one by one.
      spec: the decoder's shape, with the vocabulary size filled in.
      directory: where to; its parents are created.
      tokenizer_dir: directory with a tokenizer.json, or that file.
      dtype: floating type of the written weights.
      max_shard_bytes: a larger model is split into files of at most this size, except where one
        tensor alone is larger.
      card: text of README.md, the model card.
      figures: content of files that the card shows, by name.

    Raises:
      UserError: the tokenizer does not fit the model, or something else is at `directory`.
      StorageError: the directory cannot be written.
    """
    directory, tokenizer_dir = Path(directory), Path(tokenizer_dir)
    tokenizer = Tokenizer(tokenizer_dir)
    if tokenizer.vocab_size > spec.vocab_size:
        raise UserError(
            f"{tokenizer.file}: gives ids up to {tokenizer.vocab_size - 1}, the model has "
            f"{spec.vocab_size} embeddings: export with the tokenizer it was trained with"
        )
    if directory.exists() and not _is_empty(directory) and not (directory / CHECKSUMS).is_file():
        raise UserError(f"{directory}: exists and is not an earlier export; choose another place")
    # In the same folder, so that the rename stays on one file system. What a killed export left
    # there is overwritten.
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_weights(params, spec, partial, np.dtype(dtype), max_shard_bytes)
        token_ids = _write_tokenizer(tokenizer, partial)
        name = np.dtype(dtype).name
        config = families.config_from_spec(spec) | token_ids | {"dtype": name, "torch_dtype": name}
        write_json(partial / CONFIG, config)
        known = {key: value for key, value in token_ids.items() if value is not None}
        write_json(partial / "generation_config.json", known)
        (partial / "README.md").write_text(card, encoding="utf-8")
        for name, content in (figures or {}).items():
            (partial / name).write_bytes(content)
        names = sorted(path.name for path in partial.iterdir())
        (partial / CHECKSUMS).write_text(checksum_lines(partial, names), encoding="utf-8")
        _move_into_place(partial, directory)
    except (OSError, SafetensorError) as error:
        raise StorageError(f"{directory}: cannot be written ({error})") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


class _LeafReader:
    """Reads any part of one parameter from the tensors that it is made of."""

    def __init__(
        self,
        places: Sequence[Placement],
        tensors: Mapping[str, Any],
        shape: tuple[int, ...],
        dtype: np.dtype,
    ) -> None:
        self.places, self.tensors, self.shape, self.dtype = places, tensors, shape, dtype
        # Devices that hold the same part ask for it one by one.
        self.parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

    def __call__(self, index: tuple[slice, ...] | None) -> np.ndarray:
        """The values at a slice of every axis of the parameter, or all of them."""
        index = (slice(None),) * len(self.shape) if index is None else index
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, self.shape, strict=True))
        if bounds not in self.parts:
            self.parts[bounds] = self._read([slice(*pair) for pair in bounds])
        return self.parts[bounds]

    def _read(self, index: list[slice]) -> np.ndarray:
        if self.places[0].period is None:
            return self._layer(self.places[0], self.shape, index).astype(self.dtype)
        periods, index = range(len(self.places))[index[0]], index[1:]
        values = np.empty((len(periods), *(part.stop - part.start for part in index)), self.dtype)
        for row, period in enumerate(periods):
            assert self.places[period].period == period
            values[row] = self._layer(self.places[period], self.shape[1:], index).astype(self.dtype)
        return values

    def _layer(
        self, place: Placement, shape: tuple[int, ...], index: Sequence[slice]
    ) -> np.ndarray:
        """A part of one tensor, in our layout and the file's type."""
        tensor, inputs = self.tensors[place.name], place.inputs
        if not inputs:
            return tensor[tuple(index)]
        # A cut of the first axis of the inputs or outputs is a range of columns or rows of the
        # stored matrix; only these are read. Cuts of other axes are made afterwards.
        first = {0: index[0], inputs: index[inputs]}
        columns = _scaled(index[0], math.prod(shape[1:inputs]))
        rows = _scaled(index[inputs], math.prod(shape[inputs + 1 :]))
        read = [first[i].stop - first[i].start if i in first else n for i, n in enumerate(shape)]
        values = tensor[rows, columns].T.reshape(read)
        return values[tuple(slice(None) if i in first else part for i, part in enumerate(index))]


def _scaled(part: slice, factor: int) -> slice:
    return slice(part.start * factor, part.stop * factor)


def _by_leaf(places: Iterable[Placement]) -> dict[tuple[str, ...], list[Placement]]:
    """The tensors of each parameter, those of a stacked one in the order of its periods."""
    leaves: dict[tuple[str, ...], list[Placement]] = {}
    for place in places:
        leaves.setdefault(place.path, []).append(place)
    return leaves


def _at(tree: Params, path: Sequence[str]) -> Any:
    for name in path:
        tree = tree[name]
    return tree


def _check_tensors(
    directory: Path,
    spec: ModelSpec,
    places: Sequence[Placement],
    tensors: Mapping[str, Any],
    abstract: Params,
) -> None:
    """Raise UserError with a list of everything in which the tensors differ from the config."""
    expected = {}
    for place in places:
        shape = _at(abstract, place.path).shape
        shape = shape if place.period is None else shape[1:]
        expected[place.name] = families.hf_shape(shape, place.inputs)
    problems = []
    head, table = families.head_and_table(spec)
    extra = {name for name in tensors.keys() - expected if not families.is_ignored(spec, name)}
    if spec.tied_head and head in extra:
        extra.remove(head)
        if table in tensors and not _equal(tensors[head], tensors[table], expected[table]):
            problems.append(
                f"{head} differs from {table}, though tie_word_embeddings is true: correct the "
                "config or remove the tensor"
            )
    if missing := sorted(expected.keys() - tensors):
        problems.append(f"missing: {some(missing)}")
    if extra:
        problems.append(f"unexpected: {some(sorted(extra))}")
    present = [name for name in expected if name in tensors]
    shapes = {name: tuple(tensors[name].get_shape()) for name in present}
    if wrong := [name for name in present if shapes[name] != expected[name]]:
        said = [f"{name} {list(shapes[name])} for {list(expected[name])}" for name in wrong]
        problems.append(f"wrong shapes: {some(said)}")
    types = {name: tensors[name].get_dtype() for name in present}
    if wrong := [f"{name} {types[name]}" for name in present if types[name] not in _FLOAT_TYPES]:
        problems.append(f"not floating point (quantised?): {some(wrong)}")
    if problems:
        raise UserError(f"{directory}: the tensors do not match {CONFIG}; " + "; ".join(problems))


def _equal(one: Any, other: Any, shape: tuple[int, ...]) -> bool:
    """Whether two tensors of this shape hold the same numbers; compared block by block."""
    for tensor in (one, other):
        if tuple(tensor.get_shape()) != shape or tensor.get_dtype() not in _FLOAT_TYPES:
            return False
    blocks = (slice(start, min(start + 4096, shape[0])) for start in range(0, shape[0], 4096))
    return all(np.array_equal(one[block], other[block]) for block in blocks)


def _write_weights(
    params: Params, spec: ModelSpec, directory: Path, dtype: np.dtype, max_shard_bytes: int
) -> None:
    """Write the safetensors files and, for more than one, their index."""
    abstract = Decoder(spec=spec).abstract()
    given = jax.tree.map(jnp.shape, params, is_leaf=lambda leaf: not isinstance(leaf, dict))
    wanted = jax.tree.map(jnp.shape, abstract)
    if given != wanted:
        raise UserError(f"parameters do not have the shape of the model: {given} for {wanted}")
    shards = _plan_shards(families.placements(spec), abstract, dtype.itemsize, max_shard_bytes)
    weight_map = {}
    for i, shard in enumerate(shards):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        tensors = {place.name: _to_hf(params, place, dtype) for place in shard}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        (directory / file).chmod(0o644)  # safetensors lets the owner alone read
        weight_map |= dict.fromkeys(tensors, file)
    if len(shards) > 1:
        total = spec.num_parameters * dtype.itemsize
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, index)


def _plan_shards(
    places: Iterable[Placement], abstract: Params, itemsize: int, max_shard_bytes: int
) -> list[list[Placement]]:
    """Cut the tensors, in their order, into files of at most the given size."""
    shards: list[list[Placement]] = []
    room = 0
    for place in places:
        shape = _at(abstract, place.path).shape
        size = itemsize * math.prod(shape if place.period is None else shape[1:])
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(place)
        room -= size
    return shards


def _to_hf(params: Params, place: Placement, dtype: np.dtype) -> np.ndarray:
    """One tensor as it is stored."""
    leaf = _at(params, place.path)
    value = np.asarray(leaf if place.period is None else leaf[place.period]).astype(dtype)
    if place.inputs:
        value = value.reshape(math.prod(value.shape[: place.inputs]), -1).T
    # safetensors writes the memory as it lies.
    return np.ascontiguousarray(value)


def _write_tokenizer(tokenizer: Tokenizer, directory: Path) -> dict[str, int | None]:
    """Copy the tokenizer's files; return the ids of its control tokens for the configs."""
    source = tokenizer.file.parent
    shutil.copyfile(tokenizer.file, directory / "tokenizer.json")
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)
    config_file = source / "tokenizer_config.json"
    config = read_json(config_file) if config_file.is_file() else {}
    # Without a class, AutoTokenizer takes the model family's, which may cut text in another way
    # than tokenizer.json says.
    defaults = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": tokenizer.end_token}
    config = defaults | config
    write_json(directory / "tokenizer_config.json", config)
    start = config.get("bos_token")
    start = start.get("content") if isinstance(start, dict) else start
    # An absent key would mean the id in transformers' defaults, so there is a null.
    start_id = tokenizer.vocabulary.get(start) if isinstance(start, str) else None
    return {"bos_token_id": start_id, "eos_token_id": tokenizer.end_id}


def _move_into_place(partial: Path, directory: Path) -> None:
    """Rename the finished directory, replacing an earlier one."""
    for file in partial.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    previous = directory.with_name(f".{directory.name}.previous")
    shutil.rmtree(previous, ignore_errors=True)
    if directory.exists():
        directory.rename(previous)
    partial.rename(directory)
    shutil.rmtree(previous, ignore_errors=True)


def _is_empty(directory: Path) -> bool:
    return directory.is_dir() and next(directory.iterdir(), None) is None
