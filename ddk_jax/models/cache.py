"""What the layers remember of the tokens so far: keys and values, for generation.

The rows of a batch end together (shorter ones start later), so all of them write their next token
into one column. A layer with n entries keeps column c in entry c % n, over column c - n: global
layers have an entry for every column, local ones as many as a query sees, which then are exactly
the columns that it sees. Entries lie head by head, as the products over them read them: on CPU,
attention over them takes a third of the time.

Legend: B rows, P columns of the prompts, S entries, K key/value heads, D head width.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int


class KeyValues(NamedTuple):
    """Rotated keys, and values, of one layer, as attention takes them."""

    k: Float[Array, "B S K D"]
    v: Float[Array, "B S K D"]

    def kept(self) -> Kept:
        """As they are kept."""
        return Kept(*(jnp.swapaxes(x, 1, 2) for x in self))


class Kept(NamedTuple):
    """The entries of one layer."""

    k: Float[Array, "B K S D"]
    v: Float[Array, "B K S D"]


Cache: TypeAlias = tuple[Kept, ...]
"""Of every layer; local ones have fewer entries."""


class Rows(NamedTuple):
    """Where the tokens of a batch of rows are."""

    starts: Int[Array, "B"]
    """First column of every row; what is before it has no influence."""
    longest: Int[Array, "B"]
    """Tokens that every row may come to have, prompt included."""


class Past(NamedTuple):
    """What a layer remembers when it reads one more column."""

    kept: Kept
    column: Int[Array, ""]
    """Number of the new column."""

    def and_now(self, new: KeyValues) -> KeyValues:
        """The entries, with the new column, [B, 1, K, D], in its place."""

        def written(kept: Array, new: Array) -> Array:
            entry = self.column % kept.shape[2]
            kept = jax.lax.dynamic_update_slice_in_dim(kept, new, entry, axis=2)
            return jnp.swapaxes(kept, 1, 2)

        return KeyValues(*jax.tree.map(written, self.kept, new.kept()))


def entries(read: KeyValues, size: int) -> Kept:
    """The entries after the prompts.

    Args:
      read: keys and values of all columns of the prompts, [B, P, K, D].
      size: entries that the layer has.
    """

    def placed(x: Array) -> Array:
        columns = x.shape[2]
        if columns <= size:
            return jnp.pad(x, ((0, 0), (0, 0), (0, size - columns), (0, 0)))
        return jnp.roll(x[:, :, columns - size :], columns % size, axis=2)

    return jax.tree.map(placed, read.kept())


def visible_entries(
    column: Int[Array, ""], starts: Int[Array, "B"], size: int
) -> Bool[Array, "B 1 S"]:
    """Which entries hold a column of the row's own, the new one included.

    Args:
      column: number of the new column, which is in its entry already.
      starts: first column of every row.
      size: entries that the layer has.
    """
    entry = jnp.arange(size, dtype=jnp.int32)
    held = column - (column - entry) % size  # negative where nothing was written yet
    return held[None, None, :] >= starts[:, None, None]
