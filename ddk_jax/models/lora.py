"""Low-rank adapters (LoRA, arXiv 2106.09685) as a transform of the parameter tree.

A matrix W of a layer becomes W + scale * a @ b, of which a and b alone are learned. The decoder
adds the two up layer by layer, inside its scan, so that the sum exists for one layer at a time;
nothing else in the model knows of adapters.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ddk_jax.models.initial import normal, parameter_keys

Tree: TypeAlias = dict[str, Any]

MATRICES = ("q", "k", "v", "o", "gate", "up", "down")
"""Names of the matrices of a layer that can have adapters."""

_STACKED = "layers"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """A kernel and its adapter, in the place of the kernel in a parameter tree."""

    kernel: Any
    """[*inputs, *outputs], behind a leading axis where layers are stacked."""
    a: Any
    """[*inputs, rank], likewise."""
    b: Any
    """[rank, *outputs], likewise."""
    scale: float = field(metadata={"static": True})
    """Factor of the product."""

    def added(self) -> Float[Array, "*axes"]:
        """The kernel of one layer with its adapter, in float32."""
        return self.kernel.astype(jnp.float32) + self.scale * jnp.tensordot(self.a, self.b, axes=1)


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Which matrices have adapters, and of what size."""

    rank: int
    """Inner width of an adapter."""
    alpha: float
    """The product of a and b is multiplied by alpha / rank."""
    targets: tuple[str, ...] = MATRICES
    """Names of the matrices that have an adapter, in every layer."""

    def __post_init__(self) -> None:
        if self.rank < 1 or not 0 < self.alpha < math.inf:
            raise ValueError(f"rank = {self.rank}, alpha = {self.alpha}: must be positive")
        unknown = [name for name in self.targets if name not in MATRICES]
        if unknown or not self.targets:
            raise ValueError(f"targets = {self.targets}: needs names out of {', '.join(MATRICES)}")

    def init(self, key: Array, base: Tree, axes: Tree) -> Tree:
        """Adapters that change nothing yet: a is random (variance 1 / inputs), b is 0.

        Args:
          key: of `jax.random`.
          base: the parameter tree of the decoder, or its shapes.
          axes: a tuple of logical axis names in the place of every parameter.

        Returns:
          {"a", "b"} in the place of every chosen matrix, float32; other parameters are left out.
        """

        def adapter(name: str, kernel: Any, names: tuple[str, ...]) -> Tree:
            lead, inputs, outputs = _split(kernel.shape, names)
            keys = parameter_keys(key, name, range(math.prod(lead)))
            a = normal(keys, (*inputs, self.rank)) / math.sqrt(math.prod(inputs))
            b = jnp.zeros((*lead, self.rank, *outputs), jnp.float32)
            return {"a": a.reshape(*lead, *inputs, self.rank), "b": b}

        return self._chosen(adapter, base, axes)

    def logical_axes(self, base: Tree, axes: Tree) -> Tree:
        """A tuple of logical axis names in the place of every array of `init`'s result."""

        def adapter(name: str, kernel: Any, names: tuple[str, ...]) -> Tree:
            lead, inputs, outputs = _split(names, names)
            return {"a": (*lead, *inputs, "rank"), "b": (*lead, "rank", *outputs)}

        return self._chosen(adapter, base, axes)

    def adapted(self, base: Tree, adapters: Tree) -> Tree:
        """The parameter tree of the decoder with a `LowRank` for every matrix with an adapter."""
        scale = self.alpha / self.rank

        def placed(base: Any, adapter: Any) -> Any:
            if adapter is None:
                return base
            if not isinstance(base, dict):
                return LowRank(base, adapter["a"], adapter["b"], scale)
            return {name: placed(node, adapter.get(name)) for name, node in base.items()}

        return placed(base, adapters)

    def merged(self, base: Tree, adapters: Tree) -> Tree:
        """The parameters of a plain decoder that computes the same, in the types of `base`."""

        def plain(stacked: bool, leaf: Any) -> Any:
            if not isinstance(leaf, LowRank):
                return leaf
            added = jax.vmap(LowRank.added)(leaf) if stacked else leaf.added()
            return added.astype(leaf.kernel.dtype)

        return {
            group: jax.tree.map(
                lambda leaf, stacked=group == _STACKED: plain(stacked, leaf),
                tree,
                is_leaf=lambda node: isinstance(node, LowRank),
            )
            for group, tree in self.adapted(base, adapters).items()
        }

    def _chosen(self, make: Any, base: Tree, axes: Tree) -> Tree:
        """`make(name, kernel, axis names)` in the place of every chosen matrix."""

        def walk(path: tuple[str, ...], node: Any, names: Any) -> Any:
            if not isinstance(node, dict):
                return make(".".join(path), node, names) if path[-1] in self.targets else None
            found = {name: walk((*path, name), node[name], names[name]) for name in node}
            return {name: part for name, part in found.items() if part} or None

        groups = [name for name in (_STACKED, "tail") if name in base]
        found = {name: walk((name,), base[name], axes[name]) for name in groups}
        return {name: part for name, part in found.items() if part}


def _split(values: Any, names: tuple[str, ...]) -> tuple[Any, Any, Any]:
    """The values of a kernel's axes: of the stacked layers, of the inputs, of the outputs."""
    start = 1 if names[0] == _STACKED else 0
    # Every matrix of a layer reads from the residual stream or writes to it.
    middle = start + 1 if names[start] == "embed" else len(names) - 1
    return values[:start], values[start:middle], values[middle:]
