"""The one decoder: its parameters as Flax NNX modules, its forward pass as a pure function.

Legend: B rows, T tokens, V vocabulary, E hidden, F inner MLP, H query heads, K key/value heads,
D head width, L layers.

Parameters are a plain nested dict. The layers at one position of `spec.pattern` are stacked on a
leading axis and scanned, so a deep model compiles as fast as a shallow one; layers that do not fill
a whole period are unrolled (`tail`). Each parameter is described once, where its module declares
it: shape, initialiser and logical axes are held by its `nnx.Param`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ddk_jax.models.attention import attention
from ddk_jax.models.spec import ModelSpec

Params: TypeAlias = dict[str, Any]
Rope: TypeAlias = tuple[Float[Array, "B T half"], Float[Array, "B T half"]]

INIT_STDDEV = 0.02


def _normal(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], gain: float = 1.0
) -> Any:
    """A matrix with normally distributed float32 values and the logical name of each axis."""
    values = INIT_STDDEV * gain * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(values, axes=axes)


class RMSNorm(nnx.Module):
    """Root-mean-square norm with a learned scale; computed in float32."""

    def __init__(self, size: int, eps: float) -> None:
        self.scale = nnx.Param(jnp.ones((size,), jnp.float32), axes=("norm",))
        self.eps = eps

    def __call__(self, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The normed input, in its own type."""
        x = x_BTE.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.eps)
        return (x * self.scale[...].astype(jnp.float32)[None, None, :]).astype(x_BTE.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary positions, within segments."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        E, H, K, D = spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_width
        residual_gain = 1 / math.sqrt(2 * spec.num_layers)
        self.q = _normal(rngs, (E, H, D), ("embed", "heads", "head_width"))
        self.k = _normal(rngs, (E, K, D), ("embed", "kv_heads", "head_width"))
        self.v = _normal(rngs, (E, K, D), ("embed", "kv_heads", "head_width"))
        self.o = _normal(rngs, (H, D, E), ("heads", "head_width", "embed"), residual_gain)

    def __call__(
        self, x_BTE: Float[Array, "B T E"], rope: Rope, mask_BTT: Bool[Array, "B T T"]
    ) -> Float[Array, "B T E"]:
        """What the heads read together, projected back."""
        q_BTHD = rotate(linear(x_BTE, self.q[...]), rope)
        k_BTKD = rotate(linear(x_BTE, self.k[...]), rope)
        v_BTKD = linear(x_BTE, self.v[...])
        out_BTHD = attention(q_BTHD, k_BTKD, v_BTKD, mask_BTT)
        return linear(out_BTHD, self.o[...], contracted=2)


class GatedMLP(nnx.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        E, F = spec.hidden_size, spec.ffn_size
        self.gate = _normal(rngs, (E, F), ("embed", "ffn"))
        self.up = _normal(rngs, (E, F), ("embed", "ffn"))
        self.down = _normal(rngs, (F, E), ("ffn", "embed"), 1 / math.sqrt(2 * spec.num_layers))

    def __call__(self, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
        """The MLP's output, token by token."""
        gate_BTF, up_BTF = linear(x_BTE, self.gate[...]), linear(x_BTE, self.up[...])
        return linear(jax.nn.silu(gate_BTF) * up_BTF, self.down[...])


class Layer(nnx.Module):
    """Pre-norm decoder layer of one kind (see `spec.pattern`)."""

    def __init__(self, spec: ModelSpec, kind: str, rngs: nnx.Rngs) -> None:
        assert kind == "global", kind
        self.attn_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.attn = Attention(spec, rngs)
        self.mlp_norm = RMSNorm(spec.hidden_size, spec.norm_eps)
        self.mlp = GatedMLP(spec, rngs)

    def __call__(
        self, x_BTE: Float[Array, "B T E"], rope: Rope, mask_BTT: Bool[Array, "B T T"]
    ) -> Float[Array, "B T E"]:
        """The residual stream after attention and MLP."""
        with jax.named_scope("attention"):
            x_BTE = x_BTE + self.attn(self.attn_norm(x_BTE), rope, mask_BTT)
        with jax.named_scope("mlp"):
            return x_BTE + self.mlp(self.mlp_norm(x_BTE))


class Embedding(nnx.Module):
    """Token embedding table; also the LM head of a tied model."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.table = _normal(rngs, (spec.vocab_size, spec.hidden_size), ("vocab_in", "embed"))


class Head(nnx.Module):
    """LM head of an untied model."""

    def __init__(self, spec: ModelSpec, rngs: nnx.Rngs) -> None:
        self.kernel = _normal(rngs, (spec.hidden_size, spec.vocab_size), ("embed", "vocab"))


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
        """Random float32 parameters."""
        return self._build(key)[0]

    def abstract(self) -> Params:
        """Shapes and types of `init`'s result, without computing it."""
        return jax.eval_shape(self.init, jax.random.key(0))

    def logical_axes(self) -> Params:
        """A tuple of logical axis names in the place of every parameter."""
        axes: Params = {}

        def record(key: Array) -> Params:
            params, found = self._build(key)
            axes.update(found)
            return params

        jax.eval_shape(record, jax.random.key(0))
        return axes

    def _build(self, key: Array) -> tuple[Params, Params]:
        """Parameters and their logical axes, both in the shape of the parameter tree."""
        spec, period = self.spec, len(self.spec.pattern)
        periods, rest = divmod(spec.num_layers, period)
        keys = jax.random.split(key, spec.num_layers + 2)
        stacked = keys[: periods * period].reshape(periods, period)

        parts = {"embed": _split(Embedding(spec, nnx.Rngs(params=keys[-1])))}
        if not spec.tied_head:
            parts["head"] = _split(Head(spec, nnx.Rngs(params=keys[-2])))
        parts["norm"] = _split(RMSNorm(spec.hidden_size, spec.norm_eps))
        params = {name: values for name, (values, _) in parts.items()}
        axes = {name: names for name, (_, names) in parts.items()}

        def layer(kind: str, layer_key: Array) -> tuple[Params, Params]:
            return _split(Layer(spec, kind, nnx.Rngs(params=layer_key)))

        def layer_values(kind: str, layer_key: Array) -> Params:
            return layer(kind, layer_key)[0]

        params["layers"], axes["layers"] = {}, {}
        for i, kind in enumerate(spec.pattern if periods else ()):
            names = layer(kind, stacked[0, i])[1]
            params["layers"][str(i)] = jax.vmap(partial(layer_values, kind))(stacked[:, i])
            axes["layers"][str(i)] = jax.tree.map(
                lambda n: ("layers", *n), names, is_leaf=lambda n: isinstance(n, tuple)
            )
        if rest:
            tail = [layer(spec.pattern[i], keys[periods * period + i]) for i in range(rest)]
            params["tail"] = {str(i): values for i, (values, _) in enumerate(tail)}
            axes["tail"] = {str(i): names for i, (_, names) in enumerate(tail)}
        return params, axes

    def apply(
        self,
        params: Params,
        tokens: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        collect: bool = False,
    ) -> tuple[Float[Array, "B T E"], Float[Array, "L B T E"] | None]:
        """Final hidden states, and on request those between the layers.

        Args:
          params: as from `init`; cast to `dtype` where they are used.
          tokens: token ids below `spec.vocab_size`.
          segment_ids: tokens attend within equal ids only; 0 is padding.
          positions: position of each token in its segment.
          collect: also return the input of every layer, stacked, [L, B, T, E].

        Returns:
          The normed hidden states that `head` turns into logits, and the collected ones.
        """
        spec = self.spec
        rope = rope_table(spec, positions)
        mask = causal_segment_mask(segment_ids)
        x = params["embed"]["table"][tokens].astype(self.dtype)

        def layer(kind: str, x: Array, layer_params: Params) -> Array:
            return _merged(spec, kind, self._cast(layer_params))(x, rope, mask)

        run = {kind: self._rematerialised(partial(layer, kind)) for kind in set(spec.pattern)}

        def one_period(x: Array, period_params: Params) -> tuple[Array, Array | None]:
            inputs = []
            for i, kind in enumerate(spec.pattern):
                inputs.append(x)
                x = run[kind](x, period_params[str(i)])
            return x, jnp.stack(inputs) if collect else None

        collected: list[Array] = []
        if params["layers"]:
            x, inputs = jax.lax.scan(one_period, x, params["layers"])
            if inputs is not None:
                collected.append(inputs.reshape(-1, *x.shape))
        for i in range(spec.num_layers % len(spec.pattern)):
            collected.append(x[None])
            x = run[spec.pattern[i]](x, params["tail"][str(i)])
        hidden = _merged_norm(spec, params["norm"])(x)
        return hidden, jnp.concatenate(collected) if collect else None

    def head(self, params: Params) -> Float[Array, "E V"]:
        """The matrix that turns hidden states into logits."""
        kernel = params["embed"]["table"].T if self.spec.tied_head else params["head"]["kernel"]
        return kernel.astype(self.dtype)

    def _cast(self, params: Params) -> Params:
        return jax.tree.map(lambda leaf: leaf.astype(self.dtype), params)

    def _rematerialised(self, function: Callable[..., Array]) -> Callable[..., Array]:
        if self.remat == "none":
            return function
        policy = None
        if self.remat == "dots":
            policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        return jax.checkpoint(function, policy=policy)


def _split(module: nnx.Module) -> tuple[Params, Params]:
    """Values and logical axes of a module, as plain dicts."""
    state = nnx.state(module, nnx.Param)
    axes: Params = {}
    for path, param in nnx.to_flat_state(state):
        *parents, last = map(str, path)
        node = axes
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = param.axes
    return nnx.to_pure_dict(state), axes


def _merged(spec: ModelSpec, kind: str, params: Params) -> Layer:
    """A layer module around given values."""
    abstract = nnx.eval_shape(lambda: Layer(spec, kind, nnx.Rngs(params=0)))
    return nnx.merge(nnx.graphdef(abstract), params)


def _merged_norm(spec: ModelSpec, params: Params) -> RMSNorm:
    abstract = nnx.eval_shape(lambda: RMSNorm(spec.hidden_size, spec.norm_eps))
    return nnx.merge(nnx.graphdef(abstract), params)
