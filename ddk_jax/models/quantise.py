"""Matrices of 8-bit integers with a scale for every output: half the memory of bfloat16.

For teachers, whose weights are read only. The matrices of the layers are quantised; embeddings,
norms, biases and the head stay as they are. The decoder restores a matrix where it is used, inside
its scan, so that one layer's matrices exist as floats at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddk_jax.models.lora import MATRICES

Tree: TypeAlias = dict[str, Any]

LARGEST = 127
"""Of the integers that are used: as far below 0 as above."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantised:
    """A kernel in the place of the float one, or anything that has the same two parts."""

    values: Any
    """int8 [*inputs, *outputs], behind a leading axis where layers are stacked."""
    scale: Any
    """float32 of the same rank, with 1 in place of the inputs: largest |w| of an output / 127."""

    def restored(self) -> Float[Array, "*axes"]:
        """The kernel in float32; no weight is off by more than half a scale."""
        return self.values.astype(jnp.float32) * self.scale


def quantised(kernel: Float[Array, "*axes"], names: tuple[str, ...]) -> Quantised:
    """A kernel in 8 bits.

    Args:
      kernel: the weights.
      names: logical names of its axes.
    """
    kernel = kernel.astype(jnp.float32)
    largest = jnp.max(jnp.abs(kernel), axis=_inputs(names), keepdims=True)
    scale = jnp.where(largest > 0, largest / LARGEST, jnp.float32(1))
    return Quantised(jnp.round(kernel / scale).astype(jnp.int8), scale)


def is_quantised(path: tuple[str, ...]) -> bool:
    """Whether the parameter at a path of the tree is one of those that are quantised."""
    return path[0] in ("layers", "tail") and path[-1] in MATRICES


def quantised_shapes(abstract: Tree, axes: Tree) -> tuple[Tree, Tree]:
    """Shapes and logical axes of a parameter tree whose matrices are quantised.

    Args:
      abstract: shapes of the parameters.
      axes: a tuple of logical axis names in the place of each.
    """

    def walk(path: tuple[str, ...], node: Any, names: Any) -> tuple[Any, Any]:
        if isinstance(node, dict):
            pairs = {name: walk((*path, name), node[name], names[name]) for name in node}
            shapes, axes = ({n: pair[i] for n, pair in pairs.items()} for i in (0, 1))
            return shapes, axes
        if not is_quantised(path):
            return node, names
        made = jax.eval_shape(partial(quantised, names=names), node)
        return made, Quantised(names, names)

    return walk((), abstract, axes)


def _inputs(names: tuple[str, ...]) -> tuple[int, ...]:
    """The axes that a product sums over."""
    first = 1 if names[0] == "layers" else 0
    # Every matrix of a layer reads from the residual stream or writes to it.
    return (first,) if names[first] == "embed" else tuple(range(first, len(names) - 1))
