"""Random initial values whose program is quick to compile and needs no memory but for its result.

Every number is a function of the key, of the parameter's name and layer, and of its place in that
layer's matrix. So it depends neither on the number of devices nor on how layers are stacked, and
every device makes its own part.
"""

from __future__ import annotations

import math
import zlib
from functools import partial
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

Words: TypeAlias = tuple[UInt32[Array, "..."], UInt32[Array, "..."]]

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def threefry(key: Words, counter: Words) -> Words:
    """The counter-based generator Threefry-2x32 with 20 rounds, which `jax.random` uses too.

    Salmon et al. (2011), "Parallel random numbers: as easy as 1, 2, 3". jax's own is a loop on CPU,
    which takes several times as long to compile as the same rounds written out.

    Args:
      key: two words.
      counter: two words for every result; of the key's rank.
    """
    words = (*key, key[0] ^ key[1] ^ jnp.uint32(0x1BD11BDA))
    x, y = counter[0] + words[0], counter[1] + words[1]
    for i in range(5):
        for distance in _ROTATIONS[i % 2]:
            x = x + y
            y = x ^ ((y << jnp.uint32(distance)) | (y >> jnp.uint32(32 - distance)))
        x, y = x + words[(i + 1) % 3], y + words[(i + 2) % 3] + jnp.uint32(i + 1)
    return x, y


@partial(jax.jit, static_argnums=(1, 2))
def parameter_keys(key: Array, name: str, layers: range) -> Words:
    """A key of its own for the parameter `name` of every layer, two words of [len(layers)]."""
    first, second = (word[None] for word in jax.random.key_data(key)[:2])
    number = jnp.arange(layers.start, layers.stop, layers.step, dtype=jnp.uint32)
    named = jnp.full_like(number, zlib.crc32(name.encode()))
    # Kept apart from what follows: fused with it, the keys would be made anew for every number.
    return jax.lax.optimization_barrier(threefry((first, second), (named, number)))


@partial(jax.jit, static_argnums=1)
def normal(keys: Words, shape: tuple[int, ...]) -> Float[Array, "layers *shape"]:
    """Standard normal float32 values, `shape` of them for every key.

    Args:
      keys: from `parameter_keys`.
      shape: of one layer's matrix, fewer than 2^32 numbers.
    """
    assert math.prod(shape) < 2**32, shape
    place = jnp.zeros((1, *shape), jnp.uint32)
    for axis in range(1, place.ndim):
        index = jax.lax.broadcasted_iota(jnp.uint32, place.shape, axis)
        place = place + index * jnp.uint32(math.prod(place.shape[axis + 1 :]))
    words = tuple(word.reshape(-1, *(1 for _ in shape)) for word in keys)
    x, y = threefry((words[0], words[1]), (jnp.zeros_like(place), place))
    # The middle of one of 2^23 equal parts of (-1, 1), exact in float32.
    part = ((x ^ y) >> jnp.uint32(9)).astype(jnp.float32)
    uniform = (part + jnp.float32(0.5)) * jnp.float32(2.0**-22) - 1
    return jnp.float32(math.sqrt(2)) * jax.lax.erf_inv(uniform)
