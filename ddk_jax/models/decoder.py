"""The one decoder: its parameters as Flax NNX modules, its forward pass as a pure function.

Legend: B rows, T tokens, V vocabulary, E hidden, F inner MLP, H query heads, K key/value heads,
D head width, L layers.

Parameters are a plain nested dict. The layers at one position of `spec.pattern` are stacked on a
leading axis and scanned, so a deep model compiles as fast as a shallow one; layers that do not fill
a whole period are unrolled (`tail`). Each parameter is described once, where its module declares
it: shape, initial distribution and logical axes are held by its `nnx.Param`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ddk_jax.models.attention import attention
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
from ddk_jax.models.initial import normal, parameter_keys
from ddk_jax.models.spec import ModelSpec

Params: TypeAlias = dict[str, Any]
Rope: TypeAlias = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]

INIT_STDDEV = 0.02


def _matrix(shape: tuple[int, ...], axes: tuple[str, ...], gain: float = 1.0) -> Any:
    """A matrix without values yet: its shape, its distribution, a logical name for each axis."""
    abstract = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(abstract, axes=axes, mean=0.0, stddev=INIT_STDDEV * gain)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale; computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        abstract = jax.ShapeDtypeStruct((size,), jnp.float32)
        self.scale = nnx.Param(abstract, axes=("norm",), mean=1.0, stddev=0.0)
        self.eps = eps

    def __call__(self, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The normed input, in its own type."""
        x = x_BTE.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(jnp.float32)[None, None, :]).astype(x_BTE.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions, within segments."""

    def __init__(self, spec: ModelSpec) -> None:
        E, H, K, D = spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_width
        residual_gain = 1 / math.sqrt(2 * spec.num_layers)
        self.q = _matrix((E, H, D), ("embed", "heads", "head_width"))
        self.k = _matrix((E, K, D), ("embed", "kv_heads", "head_width"))
        self.v = _matrix((E, K, D), ("embed", "kv_heads", "head_width"))
        self.o = _matrix((H, D, E), ("heads", "head_width", "embed"), residual_gain)

    def __call__(
        self, x_BTE: Float[Array, "B T E"], rope: Rope, mask_BTT: Bool[Array, "B T T"]
    ) -> tuple[Float[Array, "B T E"], Projected]:
        """What the heads read together, projected back; and what they compared and read."""
        q_BTHD, k_BTKD = linear(x_BTE, self.q[...]), linear(x_BTE, self.k[...])
        v_BTKD = linear(x_BTE, self.v[...])
        out_BTHD = attention(rotate(q_BTHD, rope), rotate(k_BTKD, rope), v_BTKD, mask_BTT)
        projected = Projected(q_BTHD, k_BTKD, v_BTKD)
        return linear(out_BTHD, self.o[...], contracted=2), projected


class GatedMLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec) -> None:
        E, F = spec.hidden_size, spec.ffn_size
        self.gate = _matrix((E, F), ("embed", "ffn"))
        self.up = _matrix((E, F), ("embed", "ffn"))
        self.down = _matrix((F, E), ("ffn", "embed"), 1 / math.sqrt(2 * spec.num_layers))

    def __call__(self, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The MLP's output, token by token."""
        gate_BTF, up_BTF = linear(x_BTE, self.gate[...]), linear(x_BTE, self.up[...])
        return linear(jax.nn.silu(gate_BTF) * up_BTF, self.down[...])


class Layer(nnx.Module):
    """Pre-norm decoder layer of one kind (see `spec.pattern`)."""

    def __init__(self, spec: ModelSpec, kind: str) -> None:
        assert kind == "global", kind
        self.attn_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.attn = Attention(spec)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(spec)

    def __call__(
        self, x_BTE: Float[Array, "B T E"], rope: Rope, mask_BTT: Bool[Array, "B T T"]
    ) -> tuple[Float[Array, "B T E"], Projected]:
        """The residual stream after attention and MLP; and the attention's projections."""
        with jax.named_scope("attention"):
            read_BTE, projected = self.attn(self.attn_norm(x_BTE), rope, mask_BTT)
            x_BTE = x_BTE + read_BTE
        with jax.named_scope("mlp"):
            return x_BTE + self.mlp(self.mlp_norm(x_BTE)), projected


class Embedding(nnx.Module):
    """Token embedding table; also the LM head of a tied model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.table = _matrix((spec.vocab_size, spec.hidden_size), ("vocab_in", "embed"))


class Head(nnx.Module):
    """LM head of an untied model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.kernel = _matrix((spec.hidden_size, spec.vocab_size), ("embed", "vocab"))


def linear(
    x: Float[Array, "B T *in"], kernel: Float[Array, "*in_and_out"], contracted: int = 1
) -> Float[Array, "B T *out"]:
    """Contract the last `contracted` axes of x with the first ones of the kernel.

    Done as one product of two matrices: XLA's CPU backend computes the gradients of the
    three-dimensional form about half as fast.
    """
    lead, out = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    size = math.prod(kernel.shape[:contracted])
    return (x.reshape(-1, size) @ kernel.reshape(size, -1)).reshape(*lead, *out)


def rotate(x_BTHD: Float[Array, "B T H D"], rope: Rope) -> Float[Array, "B T H D"]:
    """Rotary position embedding; pairs are (i, i + D/2), as in Hugging Face's Llama."""
    cos, sin = (t[:, :, None, :].astype(x_BTHD.dtype) for t in rope)
    a, b = jnp.split(x_BTHD, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def rope_table(spec: ModelSpec, positions: Int[Array, "B T"]) -> Rope:
    """Cosine and sine of the rotation angles, [B, T, D/2] each, float32."""
    exponents = jnp.arange(0, spec.head_width, 2, dtype=jnp.float32) / spec.head_width
    frequencies = jnp.float32(spec.rope_theta) ** -exponents
    angles = positions.astype(jnp.float32)[:, :, None] * frequencies[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def segment_positions(segment_ids: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """Positions that start at 0 in every run of equal segment ids."""
    index = jnp.arange(segment_ids.shape[1], dtype=jnp.int32)[None, :]
    starts = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(starts, index, jnp.int32(0)), axis=1)


def causal_segment_mask(segment_ids: Int[Array, "B T"]) -> Bool[Array, "B T T"]:
    """True where query t may see key s: s <= t, same segment."""
    index = jnp.arange(segment_ids.shape[1])
    causal = index[None, :, None] >= index[None, None, :]
    return causal & (segment_ids[:, :, None] == segment_ids[:, None, :])


@dataclass(frozen=True, kw_only=True)
class Decoder:
    """A model as pure functions of its parameters.

    Anything with this `apply` and `head` can be a teacher or a student.
    """

    spec: ModelSpec
    dtype: Any = jnp.float32
    """Type of the activations, and of the weights as they are used."""
    remat: Literal["none", "full", "dots"] = "none"
    """What the backward pass recomputes."""

    def init(self, key: Array) -> Params:
        """Random float32 parameters: a function of the key and the spec, on any number of devices.

        A layer's values do not depend on the pattern, and those of a matrix not on the others.
        """
        return jax.tree.map(lambda leaf: leaf.draw(key), _leaves(self.spec))

    def abstract(self) -> Params:
        """Shapes and types of `init`'s result."""
        return jax.tree.map(lambda leaf: leaf.abstract, _leaves(self.spec))

    def logical_axes(self) -> Params:
        """A tuple of logical axis names in the place of every parameter."""
        return jax.tree.map(lambda leaf: leaf.axes, _leaves(self.spec))

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
          ValueError: `collect` chooses a layer beyond the last.
        """
        spec, period = self.spec, len(self.spec.pattern)
        rope = rope_table(spec, positions)
        mask = causal_segment_mask(segment_ids)
        x = params["embed"]["table"][tokens].astype(self.dtype)
        slots, kept = layer_slots(spec, collect), buffers(spec, collect, x)

        def layer(kind: str, x: Array, layer_params: Params) -> tuple[Array, Projected]:
            return nnx.merge(_layer_graph(spec, kind), self._cast(layer_params))(x, rope, mask)

        run = {kind: self._rematerialised(partial(layer, kind)) for kind in set(spec.pattern)}
        State = tuple[Array, Collected]

        def one_layer(kind: str, state: State, layer_params: Params, slot: Slots) -> State:
            x, kept = state
            out, projected = run[kind](x, layer_params)
            return out, keep(kept, slot, x, projected)

        def one_period(state: State, part: tuple[Params, Slots]) -> tuple[State, None]:
            for i, kind in enumerate(spec.pattern):
                slot = Slots(part[1].hidden[i], part[1].qkv[i])
                state = one_layer(kind, state, part[0][str(i)], slot)
            return state, None

        state, whole = (x, kept), spec.num_layers // period * period
        if whole:
            by_period = jax.tree.map(lambda s: s[:whole].reshape(-1, period), slots)
            state, _ = jax.lax.scan(one_period, state, (params["layers"], by_period))
        for i in range(spec.num_layers - whole):
            slot = jax.tree.map(lambda s, i=i: s[whole + i], slots)
            state = one_layer(spec.pattern[i], state, params["tail"][str(i)], slot)
        hidden = self.final_norm(params, state[0])
        return hidden, finish(state[1], spec, collect, hidden)

    def final_norm(self, params: Params, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The norm behind the last layer: what it gives is what `head` reads."""
        return nnx.merge(_norm_graph(self.spec), params["norm"])(x_BTE)

    def head(self, params: Params) -> Float[Array, "E V"]:
        """The matrix that turns hidden states into logits."""
        kernel = params["embed"]["table"].T if self.spec.tied_head else params["head"]["kernel"]
        return kernel.astype(self.dtype)

    def _cast(self, params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)

    def _rematerialised(self, function: Callable[..., Any]) -> Callable[..., Any]:
        if self.remat == "none":
            return function
        policy = None
        if self.remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(function, policy=policy)


@dataclass(frozen=True)
class _Leaf:
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
def _leaves(spec: ModelSpec) -> Params:
    """The parameter tree with descriptions as its leaves. Not to be changed: it is shared."""
    period = len(spec.pattern)
    whole = spec.num_layers // period * period
    one = range(1)

    tree: Params = {"embed": _described(Embedding(spec), "embed", one)}
    if not spec.tied_head:
        tree["head"] = _described(Head(spec), "head", one)
    tree["norm"] = _described(RMSNorm(spec.hidden_size, spec.norm_eps), "norm", one)
    tree["layers"] = {
        str(i): _described(Layer(spec, kind), "layer", range(i, whole, period), stacked=True)
        for i, kind in enumerate(spec.pattern if whole else ())
    }
    if whole < spec.num_layers:
        tree["tail"] = {
            str(i): _described(
                Layer(spec, spec.pattern[i]), "layer", range(whole + i, whole + i + 1)
            )
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
        node[last] = _Leaf(
            name=".".join([name, *parents, last]),
            shape=param.get_value().shape,
            axes=("layers", *param.axes) if stacked else param.axes,
            mean=param.mean,
            stddev=param.stddev,
            layers=layers,
        )
    return tree


@cache
def _layer_graph(spec: ModelSpec, kind: str) -> Any:
    return nnx.graphdef(Layer(spec, kind))


@cache
def _norm_graph(spec: ModelSpec) -> Any:
    return nnx.graphdef(RMSNorm(spec.hidden_size, spec.norm_eps))
