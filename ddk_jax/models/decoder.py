"""The one decoder: parameters and forward pass as pure functions of a ModelSpec.

Legend: B rows, T tokens, V vocabulary, E hidden, H query heads, K key/value heads, D head width,
L layers.

Parameters are a plain nested dict. The layers at one position of `spec.pattern` are stacked on a
leading axis and scanned, so a deep model compiles as fast as a shallow one; layers that do not fill
a whole period are unrolled (`tail`). What a layer is, `layers.py` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from ddk_jax.losses.targets import Head
from ddk_jax.models.attention import attention, causal_segment_mask
from ddk_jax.models.cache import Cache, Kept, KeyValues, Past, Rows, entries, visible_entries
from ddk_jax.models.collect import (
    NOTHING,
    Collect,
    Collected,
    Projected,
    Slots,
    buffers,
    finish,
    keep,
    layer_slots,
)
from ddk_jax.models.kernels import RESIDUALS, Attend, text_attention
from ddk_jax.models.layers import Inner, Layer, Norm, View
from ddk_jax.models.lookup import look_up, share_rows
from ddk_jax.models.lora import LowRank
from ddk_jax.models.quantise import Quantised
from ddk_jax.models.rope import is_long, rope_table
from ddk_jax.models.spec import ModelSpec
from ddk_jax.models.tree import Params, leaves

State = TypeVar("State")


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that start at 0 in every run of equal segment ids."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, jnp.int32(0)), axis=1)


def num_parameters(spec: ModelSpec) -> int:
    """Parameters of the whole model, embeddings included, tied ones counted once."""
    return sum(math.prod(leaf.abstract.shape) for leaf in jax.tree.leaves(leaves(spec)))


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model as pure functions of its parameters.

    Anything with this `apply` and `head` can be a teacher or a student.
    """

    spec: ModelSpec
    dtype: Any = jnp.float32
    """Type of the activations, and of the weights as they are used."""
    remat: Literal["none", "full", "attention", "dots"] = "none"
    """What the backward pass recomputes."""
    mesh: Mesh | None = None
    """The devices that rows of text are read on. None: any, all of them alike."""

    def init(self, key: Array) -> Params:
        """Random float32 parameters: a function of the key and the spec, on any number of devices.

        A layer's values do not depend on the pattern, and those of a matrix not on the others.
        """
        return jax.tree.map(lambda leaf: leaf.draw(key), leaves(self.spec))

    def abstract(self) -> Params:
        """Shapes and types of `init`'s result."""
        return jax.tree.map(lambda leaf: leaf.abstract, leaves(self.spec))

    def logical_axes(self) -> Params:
        """A tuple of logical axis names in the place of every parameter."""
        return jax.tree.map(lambda leaf: leaf.axes, leaves(self.spec))

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        collect: Collect = NOTHING,
    ) -> tuple[Float[Array, "B T E"], Collected]:
        """Final hidden states, and chosen inner ones.

        Args:
          params: as from `init`; cast to `dtype` where they are used.
          tokens: token ids below `spec.vocab_size`.
          segment_ids: tokens attend within equal ids only; 0 is padding.
          positions: position of each token in its segment.
          collect: which inner states to keep; static.

        Returns:
          The normed hidden states that `head` turns into logits, and the collected states.

        Raises:
          ValueError: `collect` chooses a layer beyond the last, or a row is longer than the model's
            table of learned positions.
        """
        spec = self.spec
        length = tokens.shape[1]
        if spec.positions == "learned" and length > spec.max_positions:
            raise ValueError(
                f"rows of {length} tokens for a model with {spec.max_positions} learned positions: "
                "shorten the rows"
            )
        views = self._views(positions, self._of_text(segment_ids), long=is_long(spec, length))
        x = self._embedded(params, tokens, positions)
        slots, kept = layer_slots(spec, collect), buffers(spec, collect, x)
        run = {
            kind: self._rematerialised(partial(self._layer, view)) for kind, view in views.items()
        }

        def step(
            kind: str, layer_params: Params, number: Array, state: tuple[Array, Collected]
        ) -> tuple[Array, Collected]:
            x, kept = state
            out, projected = run[kind](layer_params, x)
            slot = Slots(slots.hidden[number], slots.qkv[number])
            return share_rows(out, self.mesh), keep(kept, slot, x, projected)

        x, kept = self._through_layers(params, (x, kept), step)
        hidden = self.final_norm(params, x)
        return hidden, finish(kept, spec, collect, hidden)

    def fold(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        state: State,
        visit: Callable[[State, Array, Array, Array, Inner], State],
    ) -> State:
        """What `visit(state, number, x, out, inner)` makes of all layers in turn.

        Args:
          params: as for `apply`.
          tokens: likewise.
          segment_ids: likewise.
          positions: likewise.
          state: where it begins.
          visit: gets a layer's number, its input, its output, and what it computed in between.
        """
        long = is_long(self.spec, tokens.shape[1])
        views = self._views(positions, self._of_text(segment_ids), long=long)

        def step(
            kind: str, layer_params: Params, number: Array, so_far: tuple[Array, State]
        ) -> tuple[Array, State]:
            layer = nnx.merge(_layer_graph(self.spec), self._cast(layer_params))
            x, state = so_far
            out, _, _, inner = layer.watched(x, views[kind])
            out = share_rows(out, self.mesh)
            return out, visit(state, number, x, out, inner)

        x = self._embedded(params, tokens, positions)
        return self._through_layers(params, (x, state), step)[1]

    def prefill(
        self, params: Params, tokens: Int[Array, "B P"], rows: Rows, columns: int
    ) -> tuple[Float[Array, "B E"], Cache]:
        """Read prompts that end together.

        Args:
          params: as for `apply`.
          tokens: the prompts, in the last columns.
          rows: where the prompts start, and how long they may become.
          columns: room for these and those to come.

        Returns:
          The final hidden states of the last column, and what the layers remember.
        """
        spec, (B, P) = self.spec, tokens.shape
        column = jnp.arange(P, dtype=jnp.int32)[None, :]
        positions = column - rows.starts[:, None]
        segment_ids = (positions >= 0).astype(jnp.int32)
        positions = jnp.maximum(positions, 0)

        def visible(window: int) -> Attend:
            return partial(attention, mask_BTS=causal_segment_mask(segment_ids, window))

        views = self._views(positions, visible, long=is_long(spec, rows.longest))
        x = self._embedded(params, tokens, positions)
        shape = (spec.num_layers, B, P, spec.num_kv_heads, spec.head_width)
        nothing = jnp.zeros(shape, self.dtype)

        def step(
            kind: str, layer_params: Params, number: Array, state: tuple[Array, KeyValues]
        ) -> tuple[Array, KeyValues]:
            layer = nnx.merge(_layer_graph(spec), self._cast(layer_params))
            x, _, read = layer(state[0], views[kind])
            return x, jax.tree.map(lambda kept, new: kept.at[number].set(new), state[1], read)

        x, read = self._through_layers(params, (x, KeyValues(nothing, nothing)), step)

        def remembered(layer: int) -> Kept:
            size = min(columns, spec.window) if self._kind(layer) == "local" else columns
            return entries(jax.tree.map(lambda x: x[layer], read), size)

        cache = tuple(remembered(i) for i in range(spec.num_layers))
        return self.final_norm(params, x[:, -1:])[:, 0], cache

    def extend(
        self,
        params: Params,
        layers: Sequence[Params],
        tokens: Int[Array, "B"],
        column: Int[Array, ""],
        rows: Rows,
        cache: Cache,
    ) -> tuple[Float[Array, "B E"], Cache]:
        """Read one more column.

        Args:
          params: as for `prefill`.
          layers: as from `unstacked`.
          tokens: of the column.
          column: its number.
          rows: as for `prefill`.
          cache: what the layers remember.

        Returns:
          As `prefill` does.
        """
        positions = (column - rows.starts)[:, None]
        sizes = {self._kind(i): kept.k.shape[2] for i, kept in enumerate(cache)}

        def visible(window: int) -> Attend:
            size = sizes["local" if window else "global"]
            return partial(attention, mask_BTS=visible_entries(column, rows.starts, size))

        views = self._views(positions, visible, long=is_long(self.spec, rows.longest))
        x = self._embedded(params, tokens[:, None], positions)
        remembered = []
        for i, (layer_params, kept) in enumerate(zip(layers, cache, strict=True)):
            layer = nnx.merge(_layer_graph(self.spec), layer_params)
            x, _, read = layer(x, views[self._kind(i)], Past(kept, column))
            remembered.append(read.kept())
        return self.final_norm(params, x)[:, 0], tuple(remembered)

    def unstacked(self, params: Params) -> list[Params]:
        """The parameters of every layer, in the type that they are used in.

        A loop over new tokens reads all of them for each. Cutting them out of the stack there would
        copy them first: on CPU, a new token would take 1.4 to 1.7 times as long.
        """
        period = len(self.spec.pattern)
        whole = self.spec.num_layers // period * period
        found = []
        for i in range(self.spec.num_layers):
            if i < whole:
                stack = params["layers"][str(i % period)]
                one = jax.tree.map(lambda leaf, i=i: leaf[i // period], stack)
            else:
                one = params["tail"][str(i - whole)]
            found.append(self._cast(one))
        return found

    def _kind(self, layer: int) -> str:
        return self.spec.pattern[layer % len(self.spec.pattern)]

    def final_norm(self, params: Params, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The norm behind the last layer: what it gives is what `head` reads."""
        return nnx.merge(_norm_graph(self.spec), params["norm"])(x_BTE)

    def head(self, params: Params) -> Head:
        """What turns hidden states into logits; `targets.finish` does it."""
        tied = self.spec.tied_head
        kernel = params["embed"]["table"].T if tied else params["head"]["kernel"]
        cap = self.spec.logit_softcap
        return Head(kernel.astype(self.dtype), softcap=jnp.float32(cap) if cap else None)

    def _embedded(
        self, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T E"]:
        """The input of the first layer."""
        spec, tables = self.spec, params["embed"]
        x = look_up(tables["table"], tokens, self.dtype, self.mesh)
        if spec.scaled_embedding:
            x = x * jnp.asarray(math.sqrt(spec.hidden_size), self.dtype)
        if spec.positions == "learned":
            x = x + look_up(tables["positions"], positions, self.dtype, self.mesh)
        return x

    def _views(
        self,
        positions: Int[Array, "B T"],
        attend: Callable[[int], Attend],
        *,
        long: bool | Bool[Array, "B"],
    ) -> dict[str, View]:
        """What tokens know of each other, for the kinds of layers that the model has.

        Args:
          positions: of the tokens.
          attend: from the window of a kind, 0 for none, to its attention.
          long: as in `rope_table`.
        """
        spec = self.spec

        def view(kind: str) -> View:
            seen = attend(spec.window if kind == "local" else 0)
            if spec.positions == "learned":
                return View(seen, None)
            return View(seen, rope_table(spec, kind, positions, long=long))

        return {kind: view(kind) for kind in sorted(set(spec.pattern[: spec.num_layers]))}

    def _of_text(self, segment_ids: Int[Array, "B T"]) -> Callable[[int], Attend]:
        return partial(text_attention, segment_ids, mesh=self.mesh)

    def _layer(
        self, view: View, layer_params: Params, x: Float[Array, "B T E"]
    ) -> tuple[Float[Array, "B T E"], Projected]:
        out, projected, _ = nnx.merge(_layer_graph(self.spec), self._cast(layer_params))(x, view)
        return out, projected

    def _through_layers(
        self,
        params: Params,
        state: State,
        step: Callable[[str, Params, Array, State], State],
    ) -> State:
        """The state after `step(kind, parameters, number, state)` of every layer in turn."""
        spec, period = self.spec, len(self.spec.pattern)
        whole = spec.num_layers // period * period

        def one_period(state: State, part: tuple[Params, Array]) -> tuple[State, None]:
            for i, kind in enumerate(spec.pattern):
                state = step(kind, part[0][str(i)], part[1] + i, state)
            return state, None

        if whole:
            first = jnp.arange(0, whole, period, dtype=jnp.int32)
            state, _ = jax.lax.scan(one_period, state, (params["layers"], first))
        for i in range(spec.num_layers - whole):
            state = step(spec.pattern[i], params["tail"][str(i)], jnp.int32(whole + i), state)
        return state

    def _cast(self, params: Params) -> Params:
        def is_leaf(node: Any) -> bool:
            return isinstance(node, LowRank | Quantised)

        def ready(leaf: Array | LowRank | Quantised) -> Array:
            if isinstance(leaf, LowRank):
                leaf = leaf.added()
            elif isinstance(leaf, Quantised):
                leaf = leaf.restored()
            return leaf.astype(self.dtype)

        return jax.tree.map(ready, params, is_leaf=is_leaf)

    def _rematerialised(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.remat == "none":
            return function
        return jax.checkpoint(function, policy=_kept(self.remat))


def _kept(remat: str) -> Callable[..., bool] | None:
    """What is not recomputed of a layer, as a policy of `jax.checkpoint`; None: all of it is."""
    policies = jax.checkpoint_policies
    attention = policies.save_only_these_names(RESIDUALS)
    if remat == "attention":
        return attention
    if remat == "dots":
        products = policies.dots_with_no_batch_dims_saveable
        return policies.save_from_both_policies(products, attention)
    return None


@cache
def _layer_graph(spec: ModelSpec) -> Any:
    return nnx.graphdef(Layer(spec))


@cache
def _norm_graph(spec: ModelSpec) -> Any:
    return nnx.graphdef(Norm(spec, (spec.hidden_size,)))
