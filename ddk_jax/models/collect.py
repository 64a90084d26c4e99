"""Inner states of a forward pass: which are kept, and how a scan over the layers keeps only those.

Every layer writes its states into a buffer that the scan carries. Its slot there is the number of
chosen layers before it: what a layer that is not chosen writes is overwritten by the next chosen
one, and behind the last of them there is a slot to spare. So memory grows with the number of chosen
layers, not with the depth, and the backward pass needs nothing but the slots.

Legend: B rows, T tokens, E hidden, H query heads, K key/value heads, D head width, L layers,
n chosen hidden states, m layers with chosen projections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ddk_jax.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True)
class Collect:
    """Which inner states a forward pass keeps; both lists increase."""

    hidden: tuple[int, ...] = ()
    """Hidden states, counted as transformers does for every family: 0 the embeddings as the first
    layer reads them (scaled, positions added), l < L the input of layer l before its norm, L the
    normed final ones."""
    qkv: tuple[int, ...] = ()
    """Layers, counted from 0, whose queries, keys and values are kept."""

    def __post_init__(self) -> None:
        for name in ("hidden", "qkv"):
            chosen = getattr(self, name)
            if list(chosen) != sorted(set(chosen)) or min(chosen, default=0) < 0:
                raise ValueError(f"{name} = {chosen}: needs different numbers from 0 on, in order")


NOTHING = Collect()


class Projected(NamedTuple):
    """Queries, keys and values of a layer: biases added, queries and keys normed, not rotated.

    They are what the attention compares, up to the rotation. Relations between tokens (MiniLM,
    arXiv 2002.10957) are taken of these: before a query-key norm, their lengths would say nothing;
    after the rotation, a relation would hold the distance of two tokens, which no model needs to
    be taught.
    """

    q: Float[Array, "B T H D"]
    k: Float[Array, "B T K D"]
    v: Float[Array, "B T K D"]


class Collected(NamedTuple):
    """The states that `Collect` chose, in its order."""

    hidden: Float[Array, "n B T E"]
    q: Float[Array, "m B T H D"]
    k: Float[Array, "m B T K D"]
    v: Float[Array, "m B T K D"]


class Slots(NamedTuple):
    """Where in the buffers one layer writes, or each of several."""

    hidden: Int[Array, "*axes"]
    qkv: Int[Array, "*axes"]


def layer_slots(spec: ModelSpec, collect: Collect) -> Slots:
    """The slots of all layers, int32 [L] each.

    Raises:
      ValueError: a chosen layer is beyond the last.
    """
    L = spec.num_layers
    for name, last in (("hidden", L), ("qkv", L - 1)):
        chosen = getattr(collect, name)
        if chosen and chosen[-1] > last:
            raise ValueError(f"{name} = {chosen}: of {L} layers there are 0 to {last}")
    before = (np.searchsorted(chosen, np.arange(L)) for chosen in (collect.hidden, collect.qkv))
    return Slots(*(jnp.asarray(slots, jnp.int32) for slots in before))


def buffers(spec: ModelSpec, collect: Collect, x_BTE: Float[Array, "B T E"]) -> Collected:
    """Room for the chosen states, and for one more where layers follow the last chosen one."""
    L, (B, T, E) = spec.num_layers, x_BTE.shape
    H, K, D = spec.num_heads, spec.num_kv_heads, spec.head_width
    # The final hidden states are no layer's input: no layer follows their slot.
    n = len(collect.hidden) + bool(collect.hidden and collect.hidden[-1] < L - 1)
    m = len(collect.qkv) + bool(collect.qkv and collect.qkv[-1] < L - 1)
    shapes = (n, B, T, E), (m, B, T, H, D), (m, B, T, K, D), (m, B, T, K, D)
    return Collected(*(jnp.zeros(shape, x_BTE.dtype) for shape in shapes))


def keep(
    kept: Collected, slot: Slots, x_BTE: Float[Array, "B T E"], projected: Projected
) -> Collected:
    """The buffers after a layer, whose input was x, has written."""

    def written(buffer: Array, value: Array, index: Array) -> Array:
        if not buffer.shape[0]:
            return buffer
        return jax.lax.dynamic_update_index_in_dim(buffer, value, index, 0)

    q, k, v = (
        written(buffer, value, slot.qkv) for buffer, value in zip(kept[1:], projected, strict=True)
    )
    return Collected(written(kept.hidden, x_BTE, slot.hidden), q, k, v)


def finish(
    kept: Collected, spec: ModelSpec, collect: Collect, final_BTE: Float[Array, "B T E"]
) -> Collected:
    """The chosen states, out of the buffers behind the last layer and the normed final states."""
    n, m = len(collect.hidden), len(collect.qkv)
    hidden = kept.hidden[:n]
    if spec.num_layers in collect.hidden:
        hidden = hidden.at[n - 1].set(final_BTE)
    return Collected(hidden, kept.q[:m], kept.k[:m], kept.v[:m])
