"""Structured pruning: a smaller model of the same family out of the parts of a larger one.

Layers, hidden dimensions, key/value heads with the query heads that read them, and neurons of the
MLPs are taken out as whole slices of matrices. Which of them matter is measured elsewhere; here are
the masks that a measurement differentiates by, the choice, and the cut.

Legend: L layers, E hidden, H query heads, K key/value heads (groups), F neurons of an MLP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float64, Int

from ddk_jax.errors import UserError
from ddk_jax.models import families
from ddk_jax.models.families.windows import kinds_of
from ddk_jax.models.spec import ModelSpec
from ddk_jax.models.tree import Params, leaves


class Masks(NamedTuple):
    """Factors of the parts of a model, 1 where nothing is changed."""

    hidden: Float[Array, "E"]
    """Of what attention, MLP and head read of the residual stream, in all layers alike."""
    groups: Float[Array, "L K"]
    """Of what the query heads of every group read together."""
    neurons: Float[Array, "L F"]
    """Of the inner activations of the MLPs."""


class Importance(NamedTuple):
    """How much a model needs its parts; larger is more, and only the order counts."""

    layers: Float64[np.ndarray, "L"]
    hidden: Float64[np.ndarray, "E"]
    groups: Float64[np.ndarray, "L K"]
    neurons: Float64[np.ndarray, "L F"]


class Kept(NamedTuple):
    """The parts that stay: numbers from 0, increasing."""

    layers: Int[np.ndarray, "l"]
    hidden: Int[np.ndarray, "e"]
    groups: Int[np.ndarray, "L k"]
    """Of every layer of the whole model."""
    neurons: Int[np.ndarray, "L f"]
    """Likewise."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """What is to be left of a model; 0: all of it."""

    layers: int = 0
    hidden: int = 0
    groups: int = 0
    """Key/value heads of every layer; every one keeps its query heads."""
    neurons: int = 0
    """Of every layer."""


def ones(spec: ModelSpec) -> Masks:
    """The masks that change nothing, float32."""
    layers = spec.num_layers
    shapes = (spec.hidden_size,), (layers, spec.num_kv_heads), (layers, spec.ffn_size)
    return Masks(*(jnp.ones(shape, jnp.float32) for shape in shapes))


def masked(params: Params, spec: ModelSpec, masks: Masks) -> Params:
    """The model whose parts are multiplied by masks: parameters of the same shapes.

    What reads the residual stream is multiplied by `hidden` along its inputs; the head is, by the
    norm before it, because a tied head is also the embedding.
    """
    whole, period = _whole(spec), len(spec.pattern)
    out = dict(params)
    out["norm"] = _norm_scaled(params["norm"], spec, masks.hidden, masks.hidden)
    out["layers"] = {
        name: _layer_masked(layer, spec, masks, slice(int(name), whole, period))
        for name, layer in params["layers"].items()
    }
    if "tail" in params:
        out["tail"] = {
            name: _layer_masked(layer, spec, masks, whole + int(name))
            for name, layer in params["tail"].items()
        }
    return out


def _layer_masked(layer: Params, spec: ModelSpec, masks: Masks, which: slice | int) -> Params:
    """One layer, or a stack of them.

    Args:
      layer: its parameters.
      spec: the model's.
      masks: of the whole model.
      which: the layers, as an index of the masks.
    """
    attn, mlp = dict(layer["attn"]), dict(layer["mlp"])
    lead = masks.groups[which].ndim - 1  # axes before those of one layer
    heads = jnp.repeat(masks.groups[which], spec.num_heads // spec.num_kv_heads, axis=-1)

    def read(kernel: Array) -> Array:
        return _times(kernel, masks.hidden, lead)

    attn |= {name: read(attn[name]) for name in ("q", "k", "v")}
    mlp |= {name: read(mlp[name]) for name in ("gate", "up") if name in mlp}
    attn["o"] = _times(attn["o"], heads, 0)
    mlp["down"] = _times(mlp["down"], masks.neurons[which], 0)
    return layer | {"attn": attn, "mlp": mlp}


def _times(kernel: Array, mask: Array, axis: int) -> Array:
    """The kernel times a mask of its axes from `axis` on."""
    shape = (1,) * axis + mask.shape
    return kernel * mask.reshape(shape + (1,) * (kernel.ndim - len(shape))).astype(kernel.dtype)


def first(spec: ModelSpec) -> Importance:
    """The importance by which the first parts of everything stay."""

    def falling(*shape: int) -> np.ndarray:
        return np.broadcast_to(-np.arange(shape[-1], dtype=np.float64), shape)

    L = spec.num_layers
    widths = falling(L, spec.num_kv_heads), falling(L, spec.ffn_size)
    return Importance(falling(L), falling(spec.hidden_size), *widths)


def choose(importance: Importance, size: Size) -> Kept:
    """The most important parts, the first ones among equals, in the order of the model.

    Heads and neurons are chosen layer by layer, so that all layers keep one shape.

    Raises:
      UserError: the model has fewer of something than shall be left.
    """
    kept = []
    for name, values in importance._asdict().items():
        wanted, there = getattr(size, name) or values.shape[-1], values.shape[-1]
        if not 0 < wanted <= there:
            raise UserError(f"{wanted} {name} cannot be left: the model has {there}")
        best = np.argsort(-values, axis=-1, kind="stable")[..., :wanted]
        kept.append(np.sort(best, axis=-1))
    return Kept(*kept)


def pruned_spec(spec: ModelSpec, kept: Kept) -> ModelSpec:
    """The shape that is left. Heads keep their width, and layers their kind."""
    groups, kinds = kept.groups.shape[1], kinds_of(spec)
    return families.canonical(
        replace(
            spec,
            num_layers=len(kept.layers),
            hidden_size=len(kept.hidden),
            num_heads=groups * (spec.num_heads // spec.num_kv_heads),
            num_kv_heads=groups,
            head_dim=spec.head_width,
            ffn_size=kept.neurons.shape[1],
            pattern=tuple(kinds[layer] for layer in kept.layers),
        )
    )


def nearest_size(spec: ModelSpec, size: Size) -> Size:
    """The size with the nearest hidden width that files of the family can express.

    Raises:
      UserError: no width would do; what stands in the way is said.
    """
    made = pruned_spec(spec, choose(first(spec), size))
    reason: UserError | None = None
    widths = range(1, spec.hidden_size + 1)
    for hidden in sorted(widths, key=lambda e: (abs(e - made.hidden_size), e)):
        try:
            families.config_from_spec(replace(made, hidden_size=hidden))
            return replace(size, hidden=hidden)
        except UserError as error:
            reason = reason or error
    assert reason is not None
    raise reason


def prune(params: Params, spec: ModelSpec, kept: Kept) -> tuple[Params, ModelSpec]:
    """Cut a model down to some of its parts.

    A cut is exact where what goes is dead: neurons and heads whose outputs are not read, hidden
    dimensions that are always 0. Since norms then divide by the root of a mean over fewer numbers,
    their scales are multiplied by sqrt(E_before / E_after): what they give keeps its length. Layer
    norms, and norms over all heads at once, still change with what is taken from under them.

    Args:
      params: the model.
      spec: its shape.
      kept: the parts that stay.

    Returns:
      Parameters on the host, and their shape; bitwise those of the model where nothing is cut.
    """
    described, params = leaves(spec), jax.tree.map(np.asarray, params)
    made = pruned_spec(spec, kept)
    stream = {"embed": kept.hidden, "norm": kept.hidden}
    top = {
        name: jax.tree.map(
            lambda leaf, d: _cut(leaf, d.axes, stream), params[name], described[name]
        )
        for name in params.keys() - {"layers", "tail"}
    }
    share = spec.num_heads // spec.num_kv_heads
    layers = []
    for number in map(int, kept.layers):
        groups = kept.groups[number]
        parts = stream | {
            "kv_heads": groups,
            "heads": (groups[:, None] * share + np.arange(share)).reshape(-1),
            "ffn": kept.neurons[number],
        }
        layer, of = _layer(params, spec, number), _stack_of(described, spec, number)
        layers.append(jax.tree.map(lambda leaf, d, p=parts: _cut(leaf, d.axes, p), layer, of))
    if made.hidden_size < spec.hidden_size:
        top, layers = _rescaled(top, layers, spec, made)
    return top | _stacked(layers, made), made


def _whole(spec: ModelSpec) -> int:
    """Layers that are stacked, in whole periods of the pattern."""
    return spec.num_layers // len(spec.pattern) * len(spec.pattern)


def _stack_of(tree: Params, spec: ModelSpec, layer: int) -> Params:
    """The part of a tree that a layer is in."""
    group = "layers" if layer < _whole(spec) else "tail"
    return tree[group][str(layer % len(spec.pattern))]


def _layer(params: Params, spec: ModelSpec, number: int) -> Params:
    """The parameters of one layer."""
    found = _stack_of(params, spec, number)
    if number >= _whole(spec):
        return found
    return jax.tree.map(lambda leaf: leaf[number // len(spec.pattern)], found)


def _stacked(layers: Sequence[Params], spec: ModelSpec) -> Params:
    """The layers in the form that the decoder has them in."""
    whole, period = _whole(spec), len(spec.pattern)
    stacks = {
        str(i): jax.tree.map(lambda *leaves: np.stack(leaves), *layers[i:whole:period])
        for i in range(period if whole else 0)
    }
    tail = {str(i): layer for i, layer in enumerate(layers[whole:])}
    return {"layers": stacks} | ({"tail": tail} if tail else {})


def _cut(leaf: np.ndarray, axes: Sequence[str], parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """The parts that stay of one parameter; of a stacked one, in one layer."""
    for axis, name in enumerate(axes[len(axes) - leaf.ndim :]):
        if name in parts:
            leaf = np.take(leaf, parts[name], axis=axis)
    return leaf


def _rescaled(
    top: Params, layers: Sequence[Params], spec: ModelSpec, made: ModelSpec
) -> tuple[Params, list[Params]]:
    """What a narrower residual stream asks for: see `prune`.

    Where embeddings are multiplied by sqrt(E), all else that is written into the stream shrinks
    with them, which the norms that read it do not see.
    """
    longer = math.sqrt(spec.hidden_size / made.hidden_size)
    written = 1 / longer if spec.scaled_embedding else 1.0
    top = top | {"norm": _norm_scaled(top["norm"], spec, longer)}
    if "positions" in top["embed"]:
        top["embed"] = top["embed"] | {"positions": top["embed"]["positions"] * written}
    found = []
    for layer in layers:
        layer = dict(layer)
        for name in ("attn_norm", "mlp_norm"):
            if name in layer:
                layer[name] = _norm_scaled(layer[name], spec, longer)
        for name, behind, writes in (
            ("attn", "attn_post_norm", ("o", "o_bias")),
            ("mlp", "mlp_post_norm", ("down", "down_bias")),
        ):
            if behind in layer:
                factor = longer * written
                layer[behind] = _norm_scaled(layer[behind], spec, factor, of_bias=written)
            else:
                part = layer[name]
                layer[name] = part | {w: part[w] * written for w in writes if w in part}
        found.append(layer)
    return top, found


def _norm_scaled(norm: Params, spec: ModelSpec, factor: Any, of_bias: Any = 1.0) -> Params:
    """A norm whose result is multiplied by factors, of the normed values and of the bias."""
    scale = norm["scale"]
    scaled = (1 + scale) * factor - 1 if spec.norm_plus_one else scale * factor
    return norm | {"scale": scaled} | ({"bias": norm["bias"] * of_bias} if "bias" in norm else {})
