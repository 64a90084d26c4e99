"""The decoder once more, written for clarity: one document, one head, one pair of dimensions.

Not a test. In float64 with numpy; with jax.numpy it can be differentiated. And small decoders to
compare with it.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from quick import QUICK

from ddk_jax.losses.targets import finish
from ddk_jax.models.collect import Collect, Collected
from ddk_jax.models.decoder import Decoder, Params, segment_positions
from ddk_jax.models.spec import ModelSpec

SPEC = ModelSpec(
    vocab_size=64,
    hidden_size=32,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_size=48,
    rope_theta=300.0,
)


class States(NamedTuple):
    """Of one document."""

    logits: Any
    hidden: list[Any]
    qkv: list[tuple[Any, Any, Any]]


def layers_of(params: Params, spec: ModelSpec) -> list[Params]:
    """Parameters of every layer, out of the stacks and the tail."""
    period, layers = len(spec.pattern), []
    whole = spec.num_layers // period * period
    for i in range(whole):
        stack = params["layers"][str(i % period)]
        layers.append(jax.tree.map(lambda leaf, i=i: leaf[i // period], stack))
    return layers + [params["tail"][str(i)] for i in range(spec.num_layers - whole)]


def regrouped(params: Params, spec: ModelSpec, other: ModelSpec) -> Params:
    """The same layers for a spec with another pattern."""
    period, layers = len(other.pattern), layers_of(params, spec)
    whole = other.num_layers // period * period
    tree = {name: part for name, part in params.items() if name not in ("layers", "tail")}
    tree["layers"] = {
        str(i): jax.tree.map(lambda *leaves: np.stack(leaves), *layers[i:whole:period])
        for i in range(period if whole else 0)
    }
    if whole < other.num_layers:
        tree["tail"] = {str(i): layer for i, layer in enumerate(layers[whole:])}
    return tree


def frequencies(spec: ModelSpec, kind: str, row: int) -> list[float]:
    """Radians per position of every pair.

    Args:
      spec: the model.
      kind: of the layer.
      row: tokens of the row that the document is in.
    """
    plain_local = kind == "local" and spec.local_rope_theta
    theta = spec.local_rope_theta if plain_local else spec.rope_theta
    scaling = None if plain_local else spec.rope_scaling
    width = spec.rotary_width
    found = []
    for i in range(width // 2):
        frequency = theta ** (-2 * i / width)
        if scaling is not None and scaling.kind == "linear":
            frequency /= scaling.factor
        elif scaling is not None and scaling.kind == "llama3":
            wavelength, original = 2 * math.pi / frequency, scaling.original_positions
            if wavelength > original / scaling.low_freq_factor:
                frequency /= scaling.factor
            elif wavelength > original / scaling.high_freq_factor:
                low, high = scaling.low_freq_factor, scaling.high_freq_factor
                smooth = (original / wavelength - low) / (high - low)
                frequency = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        elif scaling is not None and scaling.kind == "yarn":
            turns = (scaling.beta_fast, scaling.beta_slow)
            low, high = (
                width * math.log(scaling.original_positions / (n * 2 * math.pi))
                / (2 * math.log(theta)) for n in turns
            )  # fmt: skip
            if scaling.truncate:
                low, high = math.floor(low), math.ceil(high)
            low, high = max(low, 0), min(high, width - 1)
            share = min(max((i - low) / (high - low if high != low else 0.001), 0), 1)
            frequency = frequency * (1 - share) + frequency / scaling.factor * share
        elif scaling is not None:
            is_long = row > scaling.original_positions
            frequency /= (scaling.long_factor if is_long else scaling.short_factor)[i]
        found.append(frequency)
    return found


def attention_factor(spec: ModelSpec, kind: str) -> float:
    """Of cosine and sine."""
    scaling = spec.rope_scaling
    if scaling is None or (kind == "local" and spec.local_rope_theta):
        return 1
    if scaling.kind in ("yarn", "longrope") and scaling.attention_factor:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        return 1 + 0.1 * math.log(scaling.factor)
    if scaling.kind == "longrope":
        ratio = spec.max_positions / scaling.original_positions
        return math.sqrt(1 + math.log(ratio) / math.log(scaling.original_positions))
    return 1


def activated(name: str, x: Any, xp: Any) -> Any:
    """The nonlinearity of the MLP."""
    if name == "silu":
        return x / (1 + xp.exp(-x))
    if name == "gelu_tanh":
        return x / 2 * (1 + xp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if name == "gelu":
        return x * np.vectorize(lambda value: math.erfc(-value / math.sqrt(2)) / 2)(x)
    return xp.maximum(x, 0)


def normed(spec: ModelSpec, x: Any, part: Params, xp: Any, kind: str = "", axes: int = 1) -> Any:
    """RMS or layer norm over the last axes."""
    over = tuple(range(-axes, 0))
    if (kind or spec.norm) == "layer":
        x = x - x.mean(over, keepdims=True)
    x = x / xp.sqrt((x**2).mean(over, keepdims=True) + spec.norm_eps)
    x = x * (part["scale"] + spec.norm_plus_one)
    return x + part["bias"] if "bias" in part else x


def reference(
    layers: list[Params], params: Params, spec: ModelSpec, tokens: Any, xp: Any, row: int = 0
) -> States:
    """The forward pass of one document; rotations as complex numbers.

    Args:
      layers: parameters of every layer.
      params: embedding, norm and head.
      spec: the model.
      tokens: [T].
      xp: numpy for float64, jax.numpy for gradients.
      row: tokens of the row that the document is in; 0: the document alone.
    """
    T = len(tokens)
    x = params["embed"]["table"][tokens]
    if spec.scaled_embedding:
        x = x * math.sqrt(spec.hidden_size)
    if spec.positions == "learned":
        x = x + params["embed"]["positions"][:T]
    hidden, qkv = [], []
    for number, layer in enumerate(layers):
        kind = spec.pattern[number % len(spec.pattern)]
        hidden.append(x)
        y = normed(spec, x, layer["attn_norm"], xp) if "attn_norm" in layer else x
        read, projected = attended(layer["attn"], spec, kind, y, xp, row or T)
        qkv.append(projected)
        if "attn_post_norm" in layer:
            read = normed(spec, read, layer["attn_post_norm"], xp)
        source = x if spec.parallel_residual else x + read
        y = normed(spec, source, layer["mlp_norm"], xp) if "mlp_norm" in layer else source
        mlp = layer["mlp"]
        up = y @ mlp["up"] + mlp.get("up_bias", 0)
        if spec.gated_mlp:
            gate = y @ mlp["gate"] + mlp.get("gate_bias", 0)
            inner = activated(spec.activation, gate, xp) * up
        else:
            inner = activated(spec.activation, up, xp)
        made = inner @ mlp["down"] + mlp.get("down_bias", 0)
        if "mlp_post_norm" in layer:
            made = normed(spec, made, layer["mlp_post_norm"], xp)
        x = x + read + made
    hidden.append(normed(spec, x, params["norm"], xp))
    kernel = params["embed"]["table"].T if spec.tied_head else params["head"]["kernel"]
    logits = hidden[-1] @ kernel
    if spec.logit_softcap:
        logits = spec.logit_softcap * xp.tanh(logits / spec.logit_softcap)
    return States(logits, hidden, qkv)


def attended(
    part: Params, spec: ModelSpec, kind: str, y: Any, xp: Any, row: int
) -> tuple[Any, tuple[Any, Any, Any]]:
    """What the attention adds, and its queries, keys and values before the rotation."""
    T, half = len(y), spec.rotary_width // 2
    q, k, v = (
        xp.einsum("te,ehd->thd", y, part[name]) + part.get(f"{name}_bias", 0) for name in "qkv"
    )
    if spec.qk_norm != "none":
        axes = {"head": 1, "all": 2}[spec.qk_norm]
        q = normed(spec, q, part["q_norm"], xp, "rms", axes)
        k = normed(spec, k, part["k_norm"], xp, "rms", axes)
    turns = np.exp(1j * np.outer(np.arange(T), frequencies(spec, kind, row)))
    turns = turns * attention_factor(spec, kind)

    def turned(x: Any) -> Any:
        if spec.positions == "learned":
            return x
        z = (x[:, :half] + 1j * x[:, half : 2 * half]) * turns
        return xp.concatenate([z.real, z.imag, x[:, 2 * half :]], -1)

    behind = np.arange(T)[:, None] - np.arange(T)
    visible = (behind >= 0) & ((behind < spec.window) | (kind == "global"))
    scale = spec.attention_scale or 1 / math.sqrt(spec.head_width)
    out = part.get("o_bias", 0)
    for h in range(spec.num_heads):
        group = h // (spec.num_heads // spec.num_kv_heads)
        scores = turned(q[:, h]) @ turned(k[:, group]).T * scale
        if spec.attention_softcap:
            scores = spec.attention_softcap * xp.tanh(scores / spec.attention_softcap)
        scores = xp.where(visible, scores, -np.inf)
        weights = xp.exp(scores - scores.max(-1, keepdims=True))
        weights = weights / weights.sum(-1, keepdims=True)
        out = out + weights @ v[:, group] @ part["o"][h]
    return out, (q, k, v)


def numpy_states(params: Params, spec: ModelSpec, tokens: np.ndarray, row: int = 0) -> States:
    """In float64."""
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    return reference(layers_of(exact, spec), exact, spec, tokens, np, row)


def randomised(decoder: Decoder, seed: int = 0) -> Params:
    """Parameters large enough that attention is far from uniform and norms matter."""
    rng = np.random.default_rng(seed)

    def leaf(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> jax.Array:
        mean, scale = (1.0, 0.3) if path[-1].key == "scale" else (0.0, 0.25)
        return jnp.asarray(rng.normal(mean, scale, shape.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(leaf, decoder.abstract())


def documents(*lengths: int, seed: int = 1) -> list[np.ndarray]:
    """Random tokens."""
    rng = np.random.default_rng(seed)
    return [rng.integers(0, SPEC.vocab_size, length, dtype=np.int32) for length in lengths]


def everything(spec: ModelSpec) -> Collect:
    """All inner states."""
    return Collect(hidden=tuple(range(spec.num_layers + 1)), qkv=tuple(range(spec.num_layers)))


@partial(jax.jit, static_argnums=0, compiler_options=QUICK)
def run(
    decoder: Decoder, params: Params, tokens: jax.Array, segment_ids: jax.Array
) -> tuple[jax.Array, Collected]:
    """Logits, and all inner states."""
    positions = segment_positions(segment_ids)
    hidden, collected = decoder.apply(
        params, tokens, segment_ids, positions, everything(decoder.spec)
    )
    head = decoder.head(params)
    raw = (hidden @ head.kernel).reshape(-1, decoder.spec.vocab_size)
    return finish(raw, head, 0).reshape(*tokens.shape, -1), collected


def logits_of(
    decoder: Decoder, params: Params, tokens: np.ndarray, segment_ids: np.ndarray | None = None
) -> np.ndarray:
    """Of rows that are one document each, unless segments are given."""
    segments = np.ones_like(tokens) if segment_ids is None else segment_ids
    return np.asarray(run(decoder, params, jnp.asarray(tokens), jnp.asarray(segments))[0])
