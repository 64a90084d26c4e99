"""Rotary positions: how fast each pair of dimensions turns, and the rotation itself.

A head's first `spec.rotary_width` dimensions are pairs (i, i + rotary_width / 2); pair i of a token
at position p is turned by p * frequency[i]. The formulas of the stretched kinds are those of
transformers' `rope_parameters`, in float64; `RopeScaling` names their papers.

Legend: B rows, T tokens, H heads, D head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float64, Int

from ddk_jax.models.spec import ModelSpec, RopeScaling


class Rope(NamedTuple):
    """The rotation of every token."""

    cos: Float[Array, "B T half"]
    sin: Float[Array, "B T half"]


def rotate(x_BTHD: Float[Array, "B T H D"], rope: Rope) -> Float[Array, "B T H D"]:
    """Turn the first dimensions of every head, twice as many as the table has; the rest stays."""
    cos, sin = (table[:, :, None, :].astype(x_BTHD.dtype) for table in rope)
    half = cos.shape[-1]
    a, b, rest = jnp.split(x_BTHD, (half, 2 * half), axis=-1)
    turned = [a * cos - b * sin, b * cos + a * sin]
    return jnp.concatenate([*turned, rest] if rest.shape[-1] else turned, axis=-1)


def rope_table(
    spec: ModelSpec,
    kind: str,
    positions: Int[Array, "B T"],
    *,
    long: bool | Bool[Array, "B"] = False,
) -> Rope:
    """Cosine and sine of the rotation angles of a kind of layers, float32.

    Args:
      spec: the model.
      kind: `global` or `local`.
      positions: of every token in its segment.
      long: whether a row is longer than `original_positions` (see `is_long`); for `longrope`.
    """
    if isinstance(long, bool):
        frequency = jnp.asarray(frequencies(spec, kind, long=long), jnp.float32)[None]
    else:
        short_one, long_one = (
            jnp.asarray(frequencies(spec, kind, long=which), jnp.float32)[None]
            for which in (False, True)
        )
        frequency = jnp.where(long[:, None], long_one, short_one)
    angles = positions.astype(jnp.float32)[:, :, None] * frequency[:, None, :]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    factor = attention_factor(spec, kind)
    return Rope(cos, sin) if factor == 1 else Rope(factor * cos, factor * sin)


def is_long(spec: ModelSpec, length: int | Int[Array, "B"]) -> bool | Bool[Array, "B"]:
    """Whether `longrope` uses its long divisors in a row of this many tokens, or in each of many.

    In training, that is the length of all rows, not of the segments in them: the rows of one
    program rotate alike. In generation it is the length that a row may come to have, so that keys
    which are kept stay right. transformers decides by the largest position so far in its batch: it
    agrees on documents that fill a row, and on continuations that do not cross the limit.
    """
    scaling = spec.rope_scaling
    if scaling is None or scaling.kind != "longrope":
        return False
    return length > scaling.original_positions


def frequencies(spec: ModelSpec, kind: str, *, long: bool = False) -> Float64[np.ndarray, "half"]:
    """Radians per position of every pair of dimensions.

    Args:
      spec: the model.
      kind: of the layers.
      long: choose the long divisors of `longrope`.
    """
    theta, scaling = _base(spec, kind)
    width = spec.rotary_width
    plain = theta ** -(np.arange(0, width, 2) / width)
    if scaling is None:
        return plain
    if scaling.kind == "linear":
        return plain / scaling.factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    if scaling.kind == "yarn":
        return _yarn(plain, theta, scaling)
    divisors = np.asarray(scaling.long_factor if long else scaling.short_factor, np.float64)
    if divisors.shape != plain.shape:
        raise ValueError(
            f"rope_scaling: longrope has {divisors.size} {'long' if long else 'short'} factors for "
            f"{plain.size} pairs of rotated dimensions"
        )
    return plain / divisors


def attention_factor(spec: ModelSpec, kind: str) -> float:
    """What cosine and sine are multiplied by."""
    _, scaling = _base(spec, kind)
    if scaling is None or scaling.kind in ("linear", "llama3"):
        return 1.0
    if scaling.attention_factor:
        return scaling.attention_factor
    if scaling.kind == "yarn":
        return 0.1 * math.log(scaling.factor) + 1 if scaling.factor > 1 else 1.0
    ratio = spec.max_positions / scaling.original_positions
    return math.sqrt(1 + math.log(ratio) / math.log(scaling.original_positions)) if ratio > 1 else 1


def _base(spec: ModelSpec, kind: str) -> tuple[float, RopeScaling | None]:
    """Base of the rotation, and how it is stretched."""
    if kind == "local" and spec.local_rope_theta:
        return spec.local_rope_theta, None
    return spec.rope_theta, spec.rope_scaling


def _llama3(plain: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Long wavelengths are stretched, short ones are not, and those between are in part."""
    turns = scaling.original_positions * plain / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept * plain + (1 - kept) * plain / scaling.factor


def _yarn(plain: np.ndarray, theta: float, scaling: RopeScaling) -> np.ndarray:
    """Fast pairs stay, slow ones are stretched; a linear ramp over the dimensions between them."""
    width = 2 * plain.size

    def dimension(turns: float) -> float:
        """Where a pair makes this many turns in the original length."""
        length = scaling.original_positions / (turns * 2 * math.pi)
        return width * math.log(length) / (2 * math.log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    # Where both ends are one, the ramp is a step.
    stretched = np.clip((np.arange(plain.size) - low) / (high - low or 1e-3), 0, 1)
    return (1 - stretched) * plain + stretched * plain / scaling.factor
