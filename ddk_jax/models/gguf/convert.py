"""The one step from a GGUF file to a Hugging Face model directory."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from ddk_jax import __version__
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import StorageError, UserError
from ddk_jax.models import families, hf
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.directory import Progress, some
from ddk_jax.models.families import Placement
from ddk_jax.models.gguf.file import TOKENS, GGUFFile, read
from ddk_jax.models.gguf.llama import hf_tensors, read_spec
from ddk_jax.models.gguf.tokenizer import SPACE, write_tokenizer
from ddk_jax.models.layout import arranged, part_shape, read_part
from ddk_jax.models.load import at, by_leaf, check_tensors
from ddk_jax.models.spec import ModelSpec
from ddk_jax.models.tensors import Tensor

_log = logging.getLogger(__name__)

_STARTS = {"bos": "bos", "padding": "pad"}


def import_gguf(
    path: Path,
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    tokenizer: Path | None = None,
    end_token: str = "",
    progress: Progress | None = None,
) -> None:
    """Write the model of a GGUF file as a Hugging Face model directory, dequantised.

    The directory appears whole or not at all; an earlier one in its place is replaced. Tensors are
    converted one by one, so that host memory holds about one of them.

    Args:
      path: the file, of llama.cpp's architecture `llama`.
      directory: where to, as for `hf.export`.
      dtype: type of the written weights, `float32` or `bfloat16`.
      tokenizer: directory with a tokenizer.json, for a file whose own cannot be rebuilt exactly.
      end_token: control token that ends a document in training; empty: the one that the file names
        as its end, which in a chat model may be the end of a turn.
      progress: told how far it is.

    Raises:
      UserError: the file holds something that is not supported; the message lists what.
      StorageError: the file is truncated or corrupt, or something cannot be read or written.
    """
    if tokenizer and end_token:
        raise UserError(
            f"--tokenizer and --end-token: name the end token as eos_token in the "
            f"tokenizer_config.json of {tokenizer} instead"
        )
    file = read(path)
    spec = read_spec(file)
    tensors = hf_tensors(file, spec)
    check_tensors(tensors, spec, origin=str(path))
    with tempfile.TemporaryDirectory() as folder:
        source, files = tokenizer or Path(folder), {}
        roles = {} if tokenizer else _rebuild(file, source, end_token)
        loaded = Tokenizer(source)
        if tokenizer:
            _check_vocabulary(file, loaded)
        else:
            files = {"generation_config.json": _generation_config(loaded.end_id, roles)}
        hf.export(
            _lazy_params(tensors, spec),
            spec,
            directory,
            tokenizer_dir=source,
            dtype=jnp.dtype(dtype),
            card=_card(file, dtype, loaded.end_token),
            files=files,
            progress=progress,
        )
    _log.info("event=import file=%s dir=%s end_token=%s", path.name, directory, loaded.end_token)


def _rebuild(file: GGUFFile, directory: Path, end_token: str) -> dict[str, int]:
    try:
        return write_tokenizer(file.metadata, directory, end_token=end_token)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from error


class _Lazy:
    """A parameter of ours that is read from the file when the writer asks for it, layer by layer.

    Attributes:
      shape: of the parameter.
      dtype: of what is read.
    """

    def __init__(
        self, tensors: Mapping[str, Tensor], places: Sequence[Placement], shape: tuple[int, ...]
    ) -> None:
        self.tensors, self.places, self.shape = tensors, places, shape
        self.dtype = np.dtype(np.float32)

    def __getitem__(self, period: int) -> np.ndarray:
        """The values of one layer of a stacked parameter."""
        return self._read(self.places[period], self.shape[1:])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All values."""
        if self.places[0].period is None:
            return np.asarray(self._read(self.places[0], self.shape), dtype)
        return np.asarray([self[period] for period in range(len(self.places))], dtype)

    def _read(self, place: Placement, shape: tuple[int, ...]) -> np.ndarray:
        index = [slice(0, n) for n in part_shape(place, shape)]
        values = read_part(self.tensors[place.name], place, index)
        if not np.isfinite(values).all():
            raise StorageError(
                f"{place.name} holds NaN or infinite values; copy or download the file again"
            )
        return arranged(values, place, shape)


def _lazy_params(tensors: Mapping[str, Tensor], spec: ModelSpec) -> Params:
    abstract = Decoder(spec=spec).abstract()
    params = jax.tree.map(lambda _: None, abstract)
    for path, places in by_leaf(families.placements(spec)).items():
        at(params, path[:-1])[path[-1]] = _Lazy(tensors, places, at(abstract, path).shape)
    return params


def _check_vocabulary(file: GGUFFile, tokenizer: Tokenizer) -> None:
    """Raise UserError if a tokenizer has another text for one of the file's tokens."""
    tokens = file.metadata.get(TOKENS)
    if not isinstance(tokens, list):
        return
    theirs = {i: token for token, i in tokenizer.vocabulary.items()}
    wrong = [
        f"{i} is {theirs[i]!r}, in the file {token!r}"
        for i, token in enumerate(tokens)
        # llama.cpp's converter writes added tokens with plain spaces.
        if i in theirs and theirs[i].replace(SPACE, " ") != token.replace(SPACE, " ")
    ]
    if wrong:
        raise UserError(f"{tokenizer.file}: not the tokenizer of this model: {some(wrong, 3)}")


def _generation_config(end_id: int, roles: Mapping[str, int]) -> bytes:
    """The file that says where generation starts and stops, which may be at several tokens."""
    stops = {end_id, *(roles[name] for name in ("eos", "eot", "eom") if name in roles)}
    known = {f"{name}_token_id": roles[role] for role, name in _STARTS.items() if role in roles}
    content = known | {"eos_token_id": sorted(stops) if len(stops) > 1 else end_id}
    return (json.dumps(content, indent=2) + "\n").encode()


def _card(file: GGUFFile, dtype: str, end_token: str) -> str:
    """The text of README.md: what the file says of its origin, and how it was converted."""

    def said(key: str) -> str:
        value = file.metadata.get(f"general.{key}")
        return " ".join(value.replace("|", "/").split()) if isinstance(value, str) else ""

    front: dict[str, Any] = {"license": said("license")} if said("license") else {}
    front |= {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["ddk_jax", "gguf"],
    }
    origin = {
        "File": f"`{file.path.name}`",
        "SHA-256": f"`{_sha256(file.path)}`",
        "Made by": said("organization") or said("author"),
        "Source": said("source.url") or said("url") or said("repo_url"),
        "Made from": said("base_model.0.repo_url") or said("base_model.0.name"),
        "Licence": said("license") or "not stated in the file",
    }
    sizes = Counter[str]()
    for tensor in file.tensors.values():
        sizes[tensor.kind] += math.prod(tensor.shape)
    kinds = ", ".join(f"{size:,} in {kind}" for kind, size in sizes.most_common())
    rows = "\n".join(f"| {key} | {value} |" for key, value in origin.items() if value)
    return f"""---
{yaml.safe_dump(front, sort_keys=False)}---

# {said("name") or file.path.stem}

Converted from a GGUF file by ddk_jax {__version__}.

| | |
| --- | --- |
{rows}
| Values | {kinds} |

The weights are those of the file as {dtype}: where it is quantised, the model is a little worse
than the one that it was made from. A document ends with `{end_token}`.
"""


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror})") from error
