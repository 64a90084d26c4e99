"""Hugging Face model directories: read into parameters, and written so that others can load them.

A directory is on a disk or in a bucket (`gs://...`). What is read of it `directory.py` says, and
`families` which tensor is which parameter.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import UserError
from ddk_jax.models import families
from ddk_jax.models.decoder import Params
from ddk_jax.models.directory import (
    CHECKSUMS,
    CONFIG,
    INDEX,
    TOKENIZER_FILES,
    Progress,
    checksum_lines,
    checksums,
    file_size,
    hashes,
    inside,
    open_tensors,
    read_json,
    some,
    verify,
    weight_files,
    write_json,
)
from ddk_jax.models.load import Become, load_params
from ddk_jax.models.save import write_weights
from ddk_jax.models.spec import ModelSpec
from ddk_jax.models.tensors import Tensor
from ddk_jax.places import AnyPath, resolve_place, storage_errors

MAX_SHARD_BYTES = 4 * 2**30

_CHUNK_BYTES = 2**24


def read_spec(directory: str | os.PathLike[str]) -> ModelSpec:
    """The decoder that a model directory holds.

    Raises:
      UserError: no such directory, an unsupported architecture or setting, quantised weights, or
        code of its own.
      StorageError: config.json is missing, not JSON, or differs from SHA256SUMS.
    """
    directory = resolve_place(directory)
    with storage_errors(directory):
        if directory.is_file():
            raise UserError(
                f"{directory}: is a file; a model is a directory (`ddk import` makes one)"
            )
        if not directory.is_dir():
            raise UserError(
                f"{directory}: no such directory; a model is one with {CONFIG} and safetensors"
            )
    verify(directory, [CONFIG])
    file = directory / CONFIG
    config = read_json(file)
    if (quantised := config.get("quantization_config")) is not None:
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise UserError(
            f"{file}: the weights are quantised ({method}), which is not supported; use the model "
            "that they were made from"
        )
    if code := _own_code(config):
        raise UserError(
            f"{file}: has auto_map, so the model needs Python code that comes with it ({code}); "
            "code from a model directory is never run"
        )
    try:
        return families.spec_from_config(config)
    except UserError as error:
        more = "" if "auto_map" not in config else "; the code that auto_map names is never run"
        raise UserError(f"{file}: {error}{more}") from error


def file_digest(directory: str | os.PathLike[str], progress: Progress | None = None) -> str:
    """SHA-256 over the names and contents of config.json and the weight files, as hex.

    Of files in a bucket that SHA256SUMS lists, it is what is said there: `load` verifies it.

    Raises:
      UserError: there are no weights in safetensors.
      StorageError: a file is missing or cannot be read.
    """
    directory = resolve_place(directory)
    names = sorted([CONFIG, *(path.name for path in weight_files(directory))])
    listed = {} if isinstance(directory, Path) else checksums(directory)
    digests = {name: listed[name] for name in names if name in listed}
    unknown = [name for name in names if name not in listed]
    digests |= hashes(directory, unknown, "hashing", progress)
    lines = checksum_lines({name: digests[name] for name in names})
    return hashlib.sha256(lines.encode()).hexdigest()


def load(
    directory: str | os.PathLike[str],
    *,
    spec: ModelSpec | None = None,
    dtype: Any = jnp.float32,
    shardings: Params | None = None,
    progress: Progress | None = None,
    become: Become | None = None,
) -> Params:
    """Read the parameters of a model directory.

    Files that SHA256SUMS lists, where there is one, are verified first, so they are read twice.
    Those in a bucket are divided among the hosts of a run; each host sees its own disk and verifies
    all that lies there. Without SHA256SUMS, the headers of the files must match their lengths.

    Args:
      directory: config.json and model.safetensors, or shards with their index.
      spec: as `read_spec` returned it; read again when absent.
      dtype: floating type of the result.
      shardings: a sharding in the place of every parameter; each host then reads just the parts
        that its devices hold. Default: whole arrays on the default device.
      progress: told how far it is.
      become: makes of every parameter what takes its place, before the next one is read.

    Returns:
      The parameter tree that `Decoder(spec=spec).init` has the shape of.

    Raises:
      UserError: unsupported or pickled model, or tensors that do not match the config (listed).
      StorageError: files that are missing, truncated, corrupt or outside of the directory, and
        NaN or infinite numbers.
    """
    directory = resolve_place(directory)
    spec = read_spec(directory) if spec is None else spec
    names = [INDEX, *(path.name for path in weight_files(directory))]
    if not isinstance(directory, Path):
        names = names[jax.process_index() :: jax.process_count()]
    verify(directory, names, progress)
    with ExitStack() as stack:
        return load_params(
            _named(open_tensors(directory, stack), spec, directory),
            spec,
            origin=str(directory),
            dtype=dtype,
            shardings=shardings,
            progress=progress,
            become=become,
        )


def export(
    params: Params,
    spec: ModelSpec,
    directory: str | os.PathLike[str],
    *,
    tokenizer_dir: str | Path,
    dtype: Any = jnp.float32,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    card: str,
    files: Mapping[str, bytes] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model directory that transformers, vLLM and `load` read.

    On a disk it appears complete or not at all. In a bucket, files appear one by one, `SHA256SUMS`
    last: without it, the export is not complete. An earlier export in its place is replaced.

    Args:
      params: the parameters; sharded ones are gathered one by one.
      spec: the decoder's shape, with the vocabulary size filled in.
      directory: where to; its parents are created.
      tokenizer_dir: directory with a tokenizer.json, or that file.
      dtype: floating type of the written weights.
      max_shard_bytes: a larger model is split into files of at most this size, except where one
        tensor alone is larger.
      card: text of README.md, the model card.
      files: content of further files, such as the figures of the card, by name.
      progress: told how far it is.

    Raises:
      UserError: the tokenizer does not fit the model, or something else is at `directory`.
      StorageError: the directory cannot be written.
    """
    directory, tokenizer = resolve_place(directory), Tokenizer(Path(tokenizer_dir))
    if tokenizer.vocab_size > spec.vocab_size:
        raise UserError(
            f"{tokenizer.file}: gives ids up to {tokenizer.vocab_size - 1}, the model has "
            f"{spec.vocab_size} embeddings: export with the tokenizer it was trained with"
        )
    with storage_errors(directory, "written"):
        if directory.exists() and not (directory / CHECKSUMS).is_file() and _holds_any(directory):
            raise UserError(
                f"{directory}: exists and is not an earlier export; choose another place"
            )
        with ExitStack() as stack:
            if isinstance(directory, Path):
                # In the same folder, so that the rename stays on one file system. What a killed
                # export left there is overwritten.
                partial = directory.with_name(f".{directory.name}.partial")
                stack.callback(shutil.rmtree, partial, ignore_errors=True)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir(parents=True)
            else:
                partial = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            digests = write_weights(
                params,
                spec,
                partial,
                dtype=np.dtype(dtype),
                max_shard_bytes=max_shard_bytes,
                progress=progress,
            )
            _write_rest(spec, partial, tokenizer, np.dtype(dtype).name, card, files or {})
            names = sorted(path.name for path in partial.iterdir())
            small = [name for name in names if name not in digests]
            digests |= hashes(partial, small, "hashing")
            lines = checksum_lines({name: digests[name] for name in names})
            (partial / CHECKSUMS).write_text(lines, encoding="utf-8")
            if isinstance(directory, Path):
                _move_into_place(partial, directory)
            else:
                _upload(partial, [*names, CHECKSUMS], directory, progress)


def _named(tensors: Mapping[str, Tensor], spec: ModelSpec, origin: AnyPath) -> dict[str, Tensor]:
    """Tensors by the names that the family's table has; some files have others."""
    names = families.canonical_names(spec, tensors)
    by_name = {names[name]: tensor for name, tensor in tensors.items()}
    if len(by_name) != len(tensors):
        twice = sorted(name for name, count in Counter(names.values()).items() if count > 1)
        raise UserError(f"{origin}: has a tensor under two names: {some(twice)}")
    return by_name


def _own_code(config: Mapping[str, Any]) -> str:
    """The class that must be run to have this model; empty if its architecture says it all.

    Some models that transformers has a class for still bring the code that this class came from.
    """
    code = config.get("auto_map", {})
    code = code.get("AutoModelForCausalLM", code) if isinstance(code, Mapping) else code
    architectures = config.get("architectures") or []
    if not code or (isinstance(code, str) and [code.rpartition(".")[2]] == architectures):
        return ""
    return str(code)


def _write_rest(
    spec: ModelSpec,
    directory: Path,
    tokenizer: Tokenizer,
    dtype: str,
    card: str,
    files: Mapping[str, bytes],
) -> None:
    """Write everything but the weights."""
    token_ids = _write_tokenizer(tokenizer, directory)
    config = families.config_from_spec(spec) | token_ids | {"dtype": dtype, "torch_dtype": dtype}
    write_json(directory / CONFIG, config)
    known = {key: value for key, value in token_ids.items() if value is not None}
    write_json(directory / "generation_config.json", known)
    (directory / "README.md").write_text(card, encoding="utf-8")
    for name, content in files.items():
        (directory / name).write_bytes(content)


def _write_tokenizer(tokenizer: Tokenizer, directory: Path) -> dict[str, int | None]:
    """Copy the tokenizer's files; return the ids of its control tokens for the configs."""
    source = tokenizer.file.parent
    shutil.copyfile(tokenizer.file, directory / "tokenizer.json")
    for name in TOKENIZER_FILES[2:]:
        if (source / name).is_file():
            # An export is made to be published: a link must not bring other files into it.
            shutil.copyfile(inside(source, name), directory / name)
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


def _upload(
    partial: Path, names: Sequence[str], directory: AnyPath, progress: Progress | None
) -> None:
    """Copy the finished directory into a bucket, replacing an earlier one."""
    earlier, done = checksums(directory), 0
    total = sum(file_size(partial / name) for name in names)
    (directory / CHECKSUMS).unlink(missing_ok=True)  # from now on it is not complete
    for name in earlier:
        # What it listed itself; a name that leads elsewhere is not one of ours.
        if name not in names and name == Path(name).name and (directory / name).is_file():
            (directory / name).unlink()
    for name in names:
        with (partial / name).open("rb") as source, (directory / name).open("wb") as target:
            while content := source.read(_CHUNK_BYTES):
                target.write(content)  # pyrefly: ignore[bad-argument-type]
                done += len(content)
                if progress is not None:
                    progress("copying", done, total)


def _holds_any(directory: AnyPath) -> bool:
    return not directory.is_dir() or next(iter(directory.iterdir()), None) is not None
