"""The parts of the decoder as Flax NNX modules: each parameter is described once, where it is used.

A module without values says what a parameter is: shape, initial distribution and logical axes are
held by its `nnx.Param`. Kernels are [*inputs, *outputs].

Legend: B rows, T tokens, V vocabulary, E hidden, F inner MLP, H query heads, K key/value heads,
D head width, P positions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ddk_jax.models.cache import KeyValues, Past
from ddk_jax.models.collect import Projected
from ddk_jax.models.kernels import Attend
from ddk_jax.models.rope import Rope, rotate
from ddk_jax.models.spec import ModelSpec

INIT_STDDEV = 0.02

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


class View(NamedTuple):
    """What the tokens of a call know of each other, in the layers of one kind."""

    attend: Attend
    """What each head reads of the tokens that it sees."""
    rope: Rope | None
    """The rotation by position; None: queries and keys are not rotated."""


class Inner(NamedTuple):
    """What a layer computes on its way."""

    attn_input: Float[Array, "B T E"]
    """What the attention reads of the residual stream, normed."""
    heads: Float[Array, "B T H D"]
    """What each head has read."""
    mlp_input: Float[Array, "B T E"]
    """What the MLP reads, normed."""
    neurons: Float[Array, "B T F"]
    """What the MLP's last matrix reads."""


def _matrix(shape: tuple[int, ...], axes: tuple[str, ...], gain: float = 1.0) -> Any:
    """A matrix without values yet: its shape, its distribution, a logical name for each axis."""
    abstract = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(abstract, axes=axes, mean=0.0, stddev=INIT_STDDEV * gain)


def _vector(shape: tuple[int, ...], axes: tuple[str, ...], value: float = 0.0) -> Any:
    """Likewise for what starts with equal values: a bias, or the scale of a norm."""
    abstract = jax.ShapeDtypeStruct(shape, jnp.float32)
    return nnx.Param(abstract, axes=axes, mean=value, stddev=0.0)


def linear(
    x: Float[Array, "B T *in"],
    kernel: Float[Array, "*in_and_out"],
    bias: Any = None,
    contracted: int = 1,
) -> Float[Array, "B T *out"]:
    """Contract the last `contracted` axes of x with the first ones of the kernel; add the bias.

    Done as one product of two matrices: XLA's CPU backend computes the gradients of the
    three-dimensional form about half as fast.
    """
    lead, out = x.shape[: x.ndim - contracted], kernel.shape[contracted:]
    size = math.prod(kernel.shape[:contracted])
    made = x.reshape(-1, size) @ kernel.reshape(size, -1)
    if bias is not None:
        made = made + bias.reshape(1, -1)
    return made.reshape(*lead, *out)


class Norm(nnx.Module):
    """RMS or layer norm over the last axes; computed in float32."""

    def __init__(
        self,
        spec: ModelSpec,
        shape: tuple[int, ...],
        axes: tuple[str, ...] = ("norm",),
        kind: str = "",
    ) -> None:
        self.plus_one, self.eps = spec.norm_plus_one, spec.norm_eps
        self.centred = (kind or spec.norm) == "layer"
        self.scale = _vector(shape, axes, 0.0 if self.plus_one else 1.0)
        self.bias = _vector(shape, axes) if self.centred else None

    def __call__(self, x: Float[Array, "B T *axes"]) -> Float[Array, "B T *axes"]:
        """The normed input, in its own type."""
        scale = self.scale[...].astype(jnp.float32)
        over = tuple(range(-scale.ndim, 0))
        normed = x.astype(jnp.float32)
        if self.centred:
            normed = normed - jnp.mean(normed, axis=over, keepdims=True)
        variance = jnp.mean(jnp.square(normed), axis=over, keepdims=True)
        normed = normed * jax.lax.rsqrt(variance + self.eps)
        lead = (None,) * (x.ndim - scale.ndim)
        normed = normed * (1 + scale if self.plus_one else scale)[lead]
        if self.bias is not None:
            normed = normed + self.bias[...].astype(jnp.float32)[lead]
        return normed.astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention."""

    def __init__(self, spec: ModelSpec) -> None:
        E, H, K, D = spec.hidden_size, spec.num_heads, spec.num_kv_heads, spec.head_width
        residual_gain = 1 / math.sqrt(2 * spec.num_layers)
        heads, kv_heads = ("heads", "head_width"), ("kv_heads", "head_width")
        self.q = _matrix((E, H, D), ("embed", *heads))
        self.k = _matrix((E, K, D), ("embed", *kv_heads))
        self.v = _matrix((E, K, D), ("embed", *kv_heads))
        self.o = _matrix((H, D, E), (*heads, "embed"), residual_gain)
        self.q_bias = _vector((H, D), heads) if spec.qkv_bias else None
        self.k_bias = _vector((K, D), kv_heads) if spec.qkv_bias else None
        self.v_bias = _vector((K, D), kv_heads) if spec.qkv_bias else None
        self.o_bias = _vector((E,), ("norm",)) if spec.out_bias else None
        alone = spec.qk_norm == "head"
        self.q_norm, self.k_norm = (
            None
            if spec.qk_norm == "none"
            else Norm(spec, (D,) if alone else (size, D), axes[1:] if alone else axes, "rms")
            for size, axes in ((H, heads), (K, kv_heads))
        )
        self.scale = spec.attention_scale or D**-0.5
        self.softcap = spec.attention_softcap

    def heads(
        self, x_BTE: Float[Array, "B T E"], view: View, past: Past | None
    ) -> tuple[Float[Array, "B T H D"], Projected, KeyValues]:
        """What each head has read; what they compared; and the keys and values that there were."""
        q_BTHD = linear(x_BTE, self.q[...], _value(self.q_bias))
        k_BTKD = linear(x_BTE, self.k[...], _value(self.k_bias))
        v_BTKD = linear(x_BTE, self.v[...], _value(self.v_bias))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHD, k_BTKD = self.q_norm(q_BTHD), self.k_norm(k_BTKD)
        projected = Projected(q_BTHD, k_BTKD, v_BTKD)
        if view.rope is not None:
            q_BTHD, k_BTKD = rotate(q_BTHD, view.rope), rotate(k_BTKD, view.rope)
        read = KeyValues(k_BTKD, v_BTKD)
        if past is not None:
            read = past.and_now(read)
        out_BTHD = view.attend(q_BTHD, *read, scale=self.scale, softcap=self.softcap)
        return out_BTHD, projected, read

    def joined(self, heads_BTHD: Float[Array, "B T H D"]) -> Float[Array, "B T E"]:
        """What the heads have read, projected back."""
        return linear(heads_BTHD, self.o[...], _value(self.o_bias), contracted=2)


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) without a gate."""

    def __init__(self, spec: ModelSpec) -> None:
        E, F = spec.hidden_size, spec.ffn_size
        inner, bias = ("embed", "ffn"), spec.mlp_bias
        self.gate = _matrix((E, F), inner) if spec.gated_mlp else None
        self.up = _matrix((E, F), inner)
        self.down = _matrix((F, E), ("ffn", "embed"), 1 / math.sqrt(2 * spec.num_layers))
        self.gate_bias = _vector((F,), ("ffn",)) if bias and spec.gated_mlp else None
        self.up_bias = _vector((F,), ("ffn",)) if bias else None
        self.down_bias = _vector((E,), ("norm",)) if bias else None
        self.activation = spec.activation

    def neurons(self, x_BTE: Float[Array, "B T E"]) -> Float[Array, "B T F"]:
        """What the last matrix reads, token by token."""
        activation = ACTIVATIONS[self.activation]
        up_BTF = linear(x_BTE, self.up[...], _value(self.up_bias))
        if self.gate is None:
            return activation(up_BTF)
        return activation(linear(x_BTE, self.gate[...], _value(self.gate_bias))) * up_BTF

    def joined(self, neurons_BTF: Float[Array, "B T F"]) -> Float[Array, "B T E"]:
        """The MLP's output."""
        return linear(neurons_BTF, self.down[...], _value(self.down_bias))


class Layer(nnx.Module):
    """Attention and MLP, with the norms and the residual stream around them."""

    def __init__(self, spec: ModelSpec) -> None:
        before, behind = spec.norm_placement != "post", spec.norm_placement != "pre"
        width = (spec.hidden_size,)
        self.attn_norm = Norm(spec, width) if before else None
        self.attn = Attention(spec)
        self.attn_post_norm = Norm(spec, width) if behind else None
        self.mlp_norm = Norm(spec, width) if before else None
        self.mlp = MLP(spec)
        self.mlp_post_norm = Norm(spec, width) if behind else None
        self.parallel = spec.parallel_residual

    def __call__(
        self, x_BTE: Float[Array, "B T E"], view: View, past: Past | None = None
    ) -> tuple[Float[Array, "B T E"], Projected, KeyValues]:
        """One step of the residual stream.

        Args:
          x_BTE: the residual stream.
          view: what the tokens know of each other; with a past, of its entries.
          past: what the layer remembers, when the tokens are one new column. None: nothing but
            these tokens.

        Returns:
          The residual stream after attention and MLP; the attention's projections; the keys and
          values that its queries have read.
        """
        out_BTE, projected, read, _ = self.watched(x_BTE, view, past)
        return out_BTE, projected, read

    def watched(
        self, x_BTE: Float[Array, "B T E"], view: View, past: Past | None = None
    ) -> tuple[Float[Array, "B T E"], Projected, KeyValues, Inner]:
        """The same, and what was computed on the way."""
        with jax.named_scope("attention"):
            attn_input_BTE = _normed(self.attn_norm, x_BTE)
            heads_BTHD, projected, read = self.attn.heads(attn_input_BTE, view, past)
            after_BTE = x_BTE + _normed(self.attn_post_norm, self.attn.joined(heads_BTHD))
        with jax.named_scope("mlp"):
            mlp_input_BTE = _normed(self.mlp_norm, x_BTE if self.parallel else after_BTE)
            neurons_BTF = self.mlp.neurons(mlp_input_BTE)
            out_BTE = after_BTE + _normed(self.mlp_post_norm, self.mlp.joined(neurons_BTF))
        return (
            out_BTE,
            projected,
            read,
            Inner(attn_input_BTE, heads_BTHD, mlp_input_BTE, neurons_BTF),
        )


class Embedding(nnx.Module):
    """Table of the tokens, which is also the LM head of a tied model; and that of the positions."""

    def __init__(self, spec: ModelSpec) -> None:
        self.table = _matrix((spec.vocab_size, spec.hidden_size), ("vocab_in", "embed"))
        shape = (spec.max_positions, spec.hidden_size)
        learned = spec.positions == "learned"
        self.positions = _matrix(shape, ("positions", "embed")) if learned else None


class Head(nnx.Module):
    """LM head of an untied model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.kernel = _matrix((spec.hidden_size, spec.vocab_size), ("embed", "vocab"))


def _value(param: Any) -> Any:
    return None if param is None else param[...]


def _normed(norm: Norm | None, x_BTE: Array) -> Array:
    return x_BTE if norm is None else norm(x_BTE)
