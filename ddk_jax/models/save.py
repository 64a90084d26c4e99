"""Parameters written as safetensors, tensor by tensor, in files of limited size."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from ddk_jax.errors import UserError
from ddk_jax.models import families
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.directory import INDEX, WEIGHTS, Progress, write_json
from ddk_jax.models.families import Placement
from ddk_jax.models.layout import Shape, stored_part, stored_shape, write_part
from ddk_jax.models.load import at, layer_shape
from ddk_jax.models.spec import ModelSpec
from ddk_jax.models.tensors import FLOAT_TYPES, header_bytes

_TYPE_NAMES = {dtype: name for name, dtype in FLOAT_TYPES.items()}


def write_weights(
    params: Params,
    spec: ModelSpec,
    directory: Path,
    *,
    dtype: np.dtype,
    max_shard_bytes: int,
    progress: Progress | None = None,
) -> dict[str, str]:
    """Write the safetensors files of a model and, for more than one, their index.

    The host holds about one tensor at a time.

    Args:
      params: the parameters; sharded ones are gathered one by one.
      spec: the decoder that they are of.
      directory: where to.
      dtype: floating type of the written numbers.
      max_shard_bytes: of the tensors in one file, except where one alone is larger.
      progress: told how far it is.

    Returns:
      SHA-256 of every safetensors file, as hex, by its name.

    Raises:
      UserError: the parameters are not those of the spec, or of no type that files have.
      OSError: a file cannot be written.
    """
    if dtype not in _TYPE_NAMES:
        raise UserError(f"{dtype}: weights are written as {', '.join(map(str, _TYPE_NAMES))}")
    abstract = Decoder(spec=spec).abstract()
    given, wanted = (
        jax.tree.map(lambda leaf: leaf.shape, tree, is_leaf=lambda leaf: not isinstance(leaf, dict))
        for tree in (params, abstract)
    )
    if given != wanted:
        raise UserError(f"parameters do not have the shape of the model: {given} for {wanted}")
    tensors = _by_tensor(families.placements(spec))
    shapes = {
        name: stored_shape(each[0], layer_shape(each[0], abstract))
        for name, each in tensors.items()
    }
    shards = _plan_shards(shapes, dtype.itemsize, max_shard_bytes)
    total = dtype.itemsize * sum(map(math.prod, shapes.values()))
    done, hashes, weight_map = 0, {}, {}
    for i, names in enumerate(shards):
        file = WEIGHTS
        if len(shards) > 1:
            file = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(names, file)
        with _HashedFile(directory / file) as output:
            output.write(header_bytes({n: (_TYPE_NAMES[dtype], shapes[n]) for n in names}))
            for name in names:
                tensor = _stored(params, tensors[name], shapes[name], dtype)
                output.write(tensor.reshape(-1).view(np.uint8).data)
                done += tensor.nbytes
                if progress is not None:
                    progress("writing", done, total)
        hashes[file] = output.digest.hexdigest()
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        write_json(directory / INDEX, index)
    return hashes


class _HashedFile:
    """A new file, hashed as it is written."""

    def __init__(self, path: Path) -> None:
        self.digest = hashlib.sha256()
        self._handle = path.open("wb")

    def write(self, content: bytes | memoryview) -> None:
        self.digest.update(content)
        self._handle.write(content)

    def __enter__(self) -> _HashedFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.close()


def _by_tensor(places: Iterable[Placement]) -> dict[str, list[Placement]]:
    """Our parts of each tensor, in the order in which the tensors are written."""
    tensors: dict[str, list[Placement]] = {}
    for place in places:
        tensors.setdefault(place.name, []).append(place)
    return tensors


def _plan_shards(
    shapes: Mapping[str, Shape], itemsize: int, max_shard_bytes: int
) -> list[list[str]]:
    """Cut the tensors, in their order, into files of at most the given size."""
    shards: list[list[str]] = []
    room = 0
    for name, shape in shapes.items():
        size = itemsize * math.prod(shape)
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _stored(
    params: Params, places: Sequence[Placement], shape: Shape, dtype: np.dtype
) -> np.ndarray:
    """One tensor as it is stored, put together from our parameters."""
    tensor = np.empty(shape, dtype)
    for place in places:
        leaf = at(params, place.path)
        value = np.asarray(leaf if place.period is None else leaf[place.period])
        write_part(tensor, place, stored_part(value, place))
    return tensor
