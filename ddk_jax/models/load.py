"""Parameters on the devices, out of tensors that are read one by one.

The host holds about one tensor at a time: the part of it that its devices own is read as it lies in
the file, sent to them, and turned into the parameter there; layer by layer where a parameter of
ours stacks the same tensor of many layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from ddk_jax.errors import StorageError, UserError
from ddk_jax.models import families
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.directory import Progress, some
from ddk_jax.models.families import Placement
from ddk_jax.models.layout import Shape, arranged, part_axes, part_shape, read_part, stored_shape
from ddk_jax.models.spec import ModelSpec
from ddk_jax.models.tensors import FLOAT_TYPES, Tensor

SMALL_BYTES = 2**24
"""Parameters up to this size are read whole by every host and made there: nothing to compile."""

Become: TypeAlias = Callable[[tuple[str, ...], jax.Array], Any]
"""Path of a parameter in the tree, and the parameter."""

_READERS = 8
_CHUNK = 2**18


def load_params(
    tensors: Mapping[str, Tensor],
    spec: ModelSpec,
    *,
    origin: str,
    dtype: Any = jnp.float32,
    shardings: Params | None = None,
    progress: Progress | None = None,
    become: Become | None = None,
) -> Params:
    """Read parameters from the tensors of a model, under their Hugging Face names.

    Args:
      tensors: by name; read by slices, by several threads at a time.
      spec: the decoder that they are of.
      origin: what errors call them.
      dtype: floating type of the result.
      shardings: a sharding in the place of every parameter; each host then reads just the parts
        that its devices hold. Default: whole arrays on the default device.
      progress: told how far it is.
      become: makes of every parameter what takes its place, before the next one is read.

    Returns:
      The parameter tree that `Decoder(spec=spec).init` has the shape of.

    Raises:
      UserError: the tensors are not those of the spec (all differences are listed).
      StorageError: one cannot be read, or holds NaN or infinite values.
    """
    abstract, places = Decoder(spec=spec).abstract(), families.placements(spec)
    check_tensors(tensors, spec, origin=origin)
    params = jax.tree.map(lambda _: None, abstract)
    leaves = {path: _Leaf(at(abstract, path).shape, each) for path, each in by_leaf(places).items()}
    loader = _Loader(tensors, origin, np.dtype(dtype), progress)
    loader.total = sum(math.prod(leaf.shape) for leaf in leaves.values())
    # The largest tensor first, while there is little beside it.
    for path, leaf in sorted(leaves.items(), key=lambda item: -math.prod(item[1].one)):
        sharding = None if shardings is None else at(shardings, path)
        value = loader.load(leaf, sharding)
        at(params, path[:-1])[path[-1]] = value if become is None else become(path, value)
        del value  # the next one is read
    return params


def check_tensors(tensors: Mapping[str, Tensor], spec: ModelSpec, *, origin: str) -> None:
    """Compare names, shapes and types of tensors with what a spec needs.

    Raises:
      UserError: they differ; everything that does is listed.
    """
    abstract, expected, problems = Decoder(spec=spec).abstract(), {}, []
    for place in families.placements(spec):
        expected[place.name] = stored_shape(place, layer_shape(place, abstract))
    head, table = families.head_and_table(spec)
    extra = {name for name in tensors.keys() - expected if not families.is_ignored(spec, name)}
    if spec.tied_head and head in extra:
        extra.remove(head)
        if table in tensors and not _equal(tensors[head], tensors[table], expected[table]):
            problems.append(
                f"{head} differs from {table}, though tie_word_embeddings is true: correct the "
                "config or remove the tensor"
            )
    if missing := sorted(expected.keys() - tensors.keys()):
        problems.append(f"missing: {some(missing)}")
    if extra:
        problems.append(f"unexpected: {some(sorted(extra))}")
    present = [name for name in expected if name in tensors]
    shapes = {name: tuple(tensors[name].get_shape()) for name in present}
    if wrong := [name for name in present if shapes[name] != expected[name]]:
        said = [f"{name} {list(shapes[name])} for {list(expected[name])}" for name in wrong]
        problems.append(f"wrong shapes: {some(said)}")
    types = {name: tensors[name].get_dtype() for name in present}
    if wrong := [f"{name} {types[name]}" for name in present if types[name] not in FLOAT_TYPES]:
        problems.append(f"not F64, F32, F16 or BF16 (quantised?): {some(wrong)}")
    if problems:
        raise UserError(f"{origin}: the tensors do not match the config; " + "; ".join(problems))


def by_leaf(places: Iterable[Placement]) -> dict[tuple[str, ...], list[Placement]]:
    """The tensors of each parameter, those of a stacked one in the order of its periods."""
    leaves: dict[tuple[str, ...], list[Placement]] = {}
    for place in places:
        leaves.setdefault(place.path, []).append(place)
    for each in leaves.values():
        assert [place.period for place in each] in ([None], list(range(len(each))))
    return leaves


def at(tree: Params, path: Sequence[str]) -> Any:
    """What a tree has at a path."""
    for name in path:
        tree = tree[name]
    return tree


def layer_shape(place: Placement, abstract: Params) -> Shape:
    """Shape of the parameter of one layer that a tensor is placed in."""
    shape = at(abstract, place.path).shape
    return shape if place.period is None else shape[1:]


class _Leaf(NamedTuple):
    """A parameter to be made, of one tensor or of one for each period."""

    shape: Shape
    places: list[Placement]

    @property
    def is_stacked(self) -> bool:
        return self.places[0].period is not None

    @property
    def one(self) -> Shape:
        """Shape of what one tensor makes."""
        return self.shape[1:] if self.is_stacked else self.shape

    @property
    def part(self) -> Shape:
        """Shape of our part of one tensor."""
        return part_shape(self.places[0], self.one)

    @property
    def layout(self) -> Placement:
        """What all tensors have in common: how a part becomes the parameter."""
        return self.places[0]._replace(name="", path=(), period=None, rows=None)

    def part_sharding(self, sharding: Sharding | None) -> Sharding | None:
        """How a part is cut so that every device makes its own piece of the parameter."""
        if not isinstance(sharding, NamedSharding):
            return sharding
        axes = [*sharding.spec, *[None] * (len(self.shape) - len(sharding.spec))]
        axes = part_axes(self.layout, axes[self.is_stacked :])
        return NamedSharding(sharding.mesh, PartitionSpec(*axes))


class _Loader:
    """Makes parameters one after the other.

    Attributes:
      total: numbers in all parameters, for the progress.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        origin: str,
        dtype: np.dtype,
        progress: Progress | None,
    ) -> None:
        self.tensors, self.origin, self.dtype, self.progress = tensors, origin, dtype, progress
        self.total = self.done = 0

    def load(self, leaf: _Leaf, sharding: Sharding | None) -> Any:
        """One parameter."""
        if math.prod(leaf.shape) * self.dtype.itemsize <= SMALL_BYTES:
            return _placed(leaf.shape, sharding, self._small(leaf).__getitem__)
        if not leaf.is_stacked:
            part = self._part(leaf, leaf.places[0], sharding)
            if part.shape == leaf.shape and part.dtype == self.dtype:
                return part
            return _arrange(sharding)(part, layout=leaf.layout, shape=leaf.one, dtype=self.dtype)
        value = _zeros(sharding)(shape=leaf.shape, dtype=self.dtype)
        for period, place in enumerate(leaf.places):
            part = self._part(leaf, place, sharding)
            # While one tensor is read another one is on its way, and no more than that.
            value.block_until_ready()
            value = _insert(sharding)(value, part, np.int32(period), layout=leaf.layout)
        return value

    def _small(self, leaf: _Leaf) -> np.ndarray:
        """A whole parameter, made on the host."""
        values = np.empty(leaf.shape, self.dtype)
        index = [slice(0, size) for size in leaf.part]
        # Several at a time, since a bucket takes long to answer.
        with ThreadPoolExecutor(_READERS) as pool:
            parts = pool.map(lambda place: self._read(place, index), leaf.places)
            for place, part in zip(leaf.places, parts, strict=True):
                to = () if place.period is None else place.period
                values[to] = arranged(part, leaf.layout, leaf.one).astype(self.dtype)
                self._count(leaf.one)
        return values

    def _part(self, leaf: _Leaf, place: Placement, sharding: Sharding | None) -> Any:
        """Our part of a tensor on the devices, in the file's layout."""
        read: dict[tuple[tuple[int, int], ...], np.ndarray] = {}

        def slice_of(index: tuple[slice, ...]) -> np.ndarray:
            bounds = tuple(s.indices(n)[:2] for s, n in zip(index, leaf.part, strict=True))
            if bounds not in read:  # devices that hold the same slice ask for it one by one
                read[bounds] = self._read(place, [slice(*pair) for pair in bounds])
            return read[bounds]

        part = _placed(leaf.part, leaf.part_sharding(sharding), slice_of)
        self._count(leaf.one)
        return part

    def _read(self, place: Placement, index: Sequence[slice]) -> np.ndarray:
        """A slice of our part of a tensor."""
        try:
            part = read_part(self.tensors[place.name], place, index)
        except OSError as error:
            raise StorageError(f"{self.origin}: {place.name} cannot be read ({error})") from error
        if not _all_finite(part):
            raise StorageError(
                f"{self.origin}: {place.name} holds NaN or infinite values, so the file is damaged "
                "or the model useless; get it again"
            )
        return part.astype(self.dtype) if part.dtype == np.float64 else part  # no devices have it

    def _count(self, shape: Shape) -> None:
        self.done += math.prod(shape)
        if self.progress is not None:
            self.progress("reading", *(self.dtype.itemsize * n for n in (self.done, self.total)))


def _placed(
    shape: Shape, sharding: Sharding | None, values: Callable[[Any], np.ndarray]
) -> jax.Array:
    """An array on the devices, from what gives its values at a tuple of slices."""
    if sharding is None:
        return jax.device_put(values((slice(None),) * len(shape)))
    return jax.make_array_from_callback(shape, sharding, values)


def _jitted(function: Callable[..., Any], sharding: Sharding | None, **settings: Any) -> Any:
    if sharding is not None:
        settings["out_shardings"] = sharding
    return jax.jit(function, **settings)


# Cached, so that parameters of equal shape share what is compiled.


@cache
def _zeros(sharding: Sharding | None) -> Any:
    return _jitted(jnp.zeros, sharding, static_argnames=("shape", "dtype"))


@cache
def _arrange(sharding: Sharding | None) -> Any:
    def arrange(part: jax.Array, *, layout: Placement, shape: Shape, dtype: np.dtype) -> jax.Array:
        return arranged(part, layout, shape).astype(dtype)

    return _jitted(arrange, sharding, static_argnames=("layout", "shape", "dtype"))


@cache
def _insert(sharding: Sharding | None) -> Any:
    def insert(
        value: jax.Array, part: jax.Array, period: jax.Array, *, layout: Placement
    ) -> jax.Array:
        one = arranged(part, layout, value.shape[1:]).astype(value.dtype)
        # Fused with the update, transposing would be several times slower on a CPU.
        one = jax.lax.optimization_barrier(one)
        return jax.lax.dynamic_update_index_in_dim(value, one, period, 0)

    return _jitted(insert, sharding, static_argnames="layout", donate_argnames="value")


def _all_finite(values: np.ndarray) -> bool:
    """Whether no number has the exponent of NaN and infinity."""
    info = ml_dtypes.finfo(values.dtype)
    bits = values.reshape(-1).view(f"u{values.itemsize}")
    exponent = bits.dtype.type(((1 << info.nexp) - 1) << info.nmant)
    chunks = (bits[i : i + _CHUNK] for i in range(0, bits.size, _CHUNK))  # that stay in the cache
    return all((chunk & exponent).max() != exponent for chunk in chunks)


def _equal(one: Tensor, other: Tensor, shape: Shape) -> bool:
    """Whether two tensors of this shape hold the same numbers; compared block by block."""
    for tensor in (one, other):
        if tuple(tensor.get_shape()) != shape or tensor.get_dtype() not in FLOAT_TYPES:
            return False
    rows = max(1, _CHUNK // math.prod(shape[1:]))
    blocks = (slice(i, min(i + rows, shape[0])) for i in range(0, shape[0], rows))
    indices = ((block, *(slice(0, n) for n in shape[1:])) for block in blocks)
    return all(np.array_equal(one[index], other[index]) for index in indices)
