"""A checksum of an array that does not depend on how the array is spread over devices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32

from ddk_jax.errors import UserError

_GOLDEN_RATIO = 0x9E3779B9
_UNSIGNED = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}


def checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    """The checksum of every array; all processes that hold parts of them take part."""
    # One after the other: several independent programs with collectives in flight can lock each
    # other out of the threads of simulated CPU devices, for ever.
    return {name: int(checksum(array)) for name, array in arrays.items()}


def checksum(array: jax.Array) -> UInt32[Array, ""]:
    """Return a 32-bit checksum of an array's bits and their places.

    It is the sum, modulo 2**32, of a hash of (bits, index in the whole array) over the elements.
    Addition of integers has no order, so the value is the same however the array is sharded, and
    each device reads only its own shards. A change of one element always changes it, since the hash
    is one-to-one in the bits; any other damage escapes with a chance of 2**-32.

    Args:
        array: any shape; floating, integer, boolean or typed PRNG key.

    Raises:
        UserError: the type is complex or narrower than a byte.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype != jnp.bool_ and _bits(array.dtype) not in _UNSIGNED:
        raise UserError(f"a checkpoint cannot hold {array.dtype}: save it as plain numbers")
    return _checksum(array)


@jax.jit
def _checksum(array: jax.Array) -> UInt32[Array, ""]:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    # An 8-byte element becomes two words, along a new last axis.
    words = jax.lax.bitcast_convert_type(array, _UNSIGNED[_bits(array.dtype)]).astype(jnp.uint32)
    index = jnp.full(words.shape, _GOLDEN_RATIO, jnp.uint32)
    stride = 1
    # The index is made of iotas and not of a flat range: no reshape, so each shard stays in place.
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += place * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(index)), dtype=jnp.uint32)


def _bits(dtype: jax.typing.DTypeLike) -> int:
    return 0 if jnp.issubdtype(dtype, jnp.complexfloating) else jax.dtypes.itemsize_bits(dtype)


def _mix(value: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Spread every bit of a 32-bit word over the word, one-to-one (MurmurHash3's finaliser)."""
    value = (value ^ (value >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> jnp.uint32(16))
