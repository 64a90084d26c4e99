"""The parameter tree of a decoder: for every leaf its shape, its initial values, its axes.

The layers at one position of `spec.pattern` are stacked on a leading axis (`layers.<position>`);
those that do not fill a whole period stand alone behind them (`tail.<position>`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from ddk_jax.models.initial import normal, parameter_keys
from ddk_jax.models.layers import Embedding, Head, Layer, Norm
from ddk_jax.models.spec import ModelSpec

Params: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Leaf:
    """One parameter, without values: of the model, or of the layers at one position."""

    name: str
    """Within its layer: the same for all of them."""
    shape: tuple[int, ...]
    """Of one layer's matrix."""
    axes: tuple[str, ...]
    """Logical names of all axes, that of the stacked layers included."""
    mean: float
    stddev: float
    layers: range
    """The layers that it belongs to; what belongs to none counts as layer 0."""

    @property
    def abstract(self) -> jax.ShapeDtypeStruct:
        """Shape and type."""
        stacked = len(self.axes) > len(self.shape)
        shape = (len(self.layers), *self.shape) if stacked else self.shape
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def draw(self, key: Array) -> Array:
        """Random values."""
        shape = self.abstract.shape
        if not self.stddev:
            return jnp.full(shape, self.mean, jnp.float32)
        values = normal(parameter_keys(key, self.name, self.layers), self.shape)
        return (self.mean + self.stddev * values).reshape(shape)


@cache
def leaves(spec: ModelSpec) -> Params:
    """The parameter tree with descriptions as its leaves. Not to be changed: it is shared."""
    period = len(spec.pattern)
    whole = spec.num_layers // period * period
    one = range(1)

    tree: Params = {"embed": _described(Embedding(spec), "embed", one)}
    if not spec.tied_head:
        tree["head"] = _described(Head(spec), "head", one)
    tree["norm"] = _described(Norm(spec, (spec.hidden_size,)), "norm", one)
    tree["layers"] = {
        str(i): _described(Layer(spec), "layer", range(i, whole, period), stacked=True)
        for i in range(period if whole else 0)
    }
    if whole < spec.num_layers:
        tree["tail"] = {
            str(i): _described(Layer(spec), "layer", range(whole + i, whole + i + 1))
            for i in range(spec.num_layers - whole)
        }
    return tree


def _described(module: nnx.Module, name: str, layers: range, *, stacked: bool = False) -> Params:
    """The parameters of a module."""
    tree: Params = {}
    for path, param in nnx.to_flat_state(nnx.state(module, nnx.Param)):
        *parents, last = map(str, path)
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = Leaf(
            name=".".join([name, *parents, last]),
            shape=param.get_value().shape,
            axes=("layers", *param.axes) if stacked else param.axes,
            mean=param.mean,
            stddev=param.stddev,
            layers=layers,
        )
    return tree
