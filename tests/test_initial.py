"""The random numbers of initial values: Threefry's published results, and a normal distribution."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import QUICK

from ddk_jax.models.initial import normal, parameter_keys, threefry


def words(*values: int) -> tuple[jax.Array, jax.Array]:
    first, second = (jnp.asarray([value], jnp.uint32) for value in values)
    return first, second


@pytest.mark.parametrize(
    ("key", "counter", "expected"),
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 2, (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_threefry_gives_the_known_answers_of_random123(
    key: tuple[int, int], counter: tuple[int, int], expected: tuple[int, int]
) -> None:
    found = jax.jit(threefry, compiler_options=QUICK)(words(*key), words(*counter))
    assert tuple(int(word[0]) for word in found) == expected


def test_bits_are_those_of_jax_random() -> None:
    """With the high word of its counter 0, which is what `normal` counts with as well."""
    key = jax.random.key(3)
    first, second = (word[None] for word in jax.random.key_data(key))
    place = jnp.arange(40, dtype=jnp.uint32)
    x, y = threefry((first, second), (jnp.zeros_like(place), place))
    np.testing.assert_array_equal(x ^ y, jax.random.bits(key, (40,), jnp.uint32))


def test_values_are_normal_and_differ_between_layers_and_names() -> None:
    key = jax.random.key(0)
    draws = [
        np.asarray(normal(parameter_keys(key, name, range(1, 6, 2)), (300, 111)), np.float64)
        for name in ("one", "other")
    ]
    flat = np.concatenate([draw.reshape(3, -1) for draw in draws])
    size = flat.shape[1]
    assert np.abs(np.corrcoef(flat) - np.eye(6)).max() < 5 / np.sqrt(size)
    everything = np.sort(flat.reshape(-1))
    for power, moment in enumerate((0, 1, 0, 3), 1):
        assert abs((everything**power).mean() - moment) < 0.05, power
    # Kolmogorov-Smirnov: the largest distance from the normal distribution function.
    cdf = 0.5 * (1 + np.asarray(jax.lax.erf(jnp.asarray(everything / np.sqrt(2), jnp.float32))))
    ranks = (np.arange(everything.size) + 0.5) / everything.size
    assert np.abs(cdf - ranks).max() < 1.6 / np.sqrt(everything.size)


def test_a_layer_has_its_values_whichever_layers_it_is_drawn_with() -> None:
    key = jax.random.key(1)
    whole = normal(parameter_keys(key, "name", range(6)), (5, 7))
    some = normal(parameter_keys(key, "name", range(1, 6, 3)), (5, 7))
    np.testing.assert_array_equal(some, whole[1::3])
