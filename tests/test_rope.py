"""Rotary positions: frequencies of every kind, and the rotation."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import attention_factor as attention_factor_again
from decoder_reference import frequencies as frequencies_again

from ddk_jax.models.rope import (
    attention_factor,
    frequencies,
    is_long,
    rope_table,
    rotate,
)
from ddk_jax.models.spec import ModelSpec, RopeScaling

SPEC = ModelSpec(
    vocab_size=8,
    hidden_size=64,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=64,
    ffn_size=8,
    rope_theta=500_000.0,
    max_positions=131_072,
)
PAIRS = 32
SHORT = tuple(1 + 0.05 * i for i in range(PAIRS))
LONG = tuple(1 + 0.9 * i for i in range(PAIRS))
LLAMA3: dict[str, Any] = {"kind": "llama3", "factor": 32.0, "original_positions": 8192}
YARN: dict[str, Any] = {"kind": "yarn", "factor": 16.0, "original_positions": 4096}
LONGROPE: dict[str, Any] = {
    "kind": "longrope",
    "original_positions": 4096,
    "short_factor": SHORT,
    "long_factor": LONG,
}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "linear": {"kind": "linear", "factor": 8.0},
    "llama3": LLAMA3,
    "llama3_narrow": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 3.0},
    "yarn": YARN,
    "yarn_exact_ends": YARN | {"truncate": False, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn_step": YARN | {"beta_fast": 8.0, "beta_slow": 8.0, "truncate": False},
    "yarn_attention": YARN | {"attention_factor": 0.7},
    "longrope": LONGROPE,
    "longrope_attention": LONGROPE | {"attention_factor": 1.25},
}


def spec_of(name: str, fraction: float = 1.0) -> ModelSpec:
    given = SCALINGS[name]
    scaling = None if given is None else RopeScaling(**given)
    return dataclasses.replace(
        SPEC, rope_scaling=scaling, rope_fraction=fraction, head_dim=int(64 / fraction)
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"kind": "linear", "factor": 0.0}, "factor = 0.0: must be positive"),
        (YARN | {"beta_fast": float("inf")}, "beta_fast = inf"),
        (YARN | {"original_positions": 0}, "yarn needs original_positions"),
        (LLAMA3 | {"low_freq_factor": 4.0, "high_freq_factor": 4.0}, "must be larger than"),
        (LONGROPE | {"long_factor": ()}, "needs positive short_factor and long_factor"),
        (LONGROPE | {"short_factor": (1.0, 0.0)}, "needs positive short_factor and long_factor"),
    ],
)
def test_a_scaling_that_cannot_be_meant_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RopeScaling(**given)


@pytest.mark.parametrize("row", [4096, 4097])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", SCALINGS)
def test_frequencies_equal_a_reference(name: str, fraction: float, row: int) -> None:
    spec = spec_of(name, fraction)
    found = frequencies(spec, "global", long=is_long(spec, row))
    np.testing.assert_allclose(found, frequencies_again(spec, "global", row), rtol=1e-12)
    ours, theirs = attention_factor(spec, "global"), attention_factor_again(spec, "global")
    assert ours == pytest.approx(theirs, rel=1e-14)


@pytest.mark.torch
@pytest.mark.parametrize("row", [4096, 4097])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
@pytest.mark.parametrize("name", sorted(set(SCALINGS) - {"none"}))
def test_frequencies_equal_transformers(name: str, fraction: float, row: int) -> None:
    pytest.importorskip("torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    spec, given = spec_of(name, fraction), dict(SCALINGS[name] or {})
    renamed: dict[str, Any] = {
        "rope_type": given.pop("kind"),
        "rope_theta": spec.rope_theta,
        "partial_rotary_factor": fraction,
        # The defaults of ours are those of the papers; transformers wants llama3's spelled out.
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    } | given
    if "original_positions" in renamed:
        renamed["original_max_position_embeddings"] = renamed.pop("original_positions")
    for key in ("short_factor", "long_factor"):
        if key in renamed:
            renamed[key] = list(renamed[key])
    if renamed["rope_type"] != "llama3":
        del renamed["low_freq_factor"], renamed["high_freq_factor"]
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=2,
        head_dim=spec.head_width,
        max_position_embeddings=spec.max_positions,
        rope_parameters=renamed,
    )
    theirs, factor = ROPE_INIT_FUNCTIONS[renamed["rope_type"]](config, "cpu", seq_len=row)
    ours = frequencies(spec, "global", long=is_long(spec, row))
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=2e-6)
    assert attention_factor(spec, "global") == pytest.approx(factor)


def test_local_layers_turn_plainly_with_a_base_of_their_own() -> None:
    spec = dataclasses.replace(spec_of("yarn"), local_rope_theta=100.0)
    expected = frequencies(dataclasses.replace(SPEC, rope_theta=100.0), "global")
    np.testing.assert_array_equal(frequencies(spec, "local"), expected)
    assert attention_factor(spec, "local") == 1 < attention_factor(spec, "global")
    same = spec_of("yarn")
    np.testing.assert_array_equal(frequencies(same, "local"), frequencies(same, "global"))


def test_scores_depend_on_the_distance_alone_and_the_rest_of_a_head_stays() -> None:
    spec = spec_of("none", fraction=0.5)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 128)), jnp.float32) for _ in "qk")
    positions = jnp.asarray([[0], [3], [40], [43]], jnp.int32)
    rope = rope_table(spec, "global", positions)
    q, k = (np.asarray(rotate(jnp.tile(x, (4, 1, 1, 1)), rope))[:, 0, 0] for x in (q, k))
    np.testing.assert_array_equal(q[0, 64:], q[3, 64:])
    assert np.abs(q[0, :64] - q[3, :64]).max() > 0.1
    np.testing.assert_allclose(q[1] @ k[0], q[3] @ k[2], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(q, axis=1), np.linalg.norm(q[0]), rtol=1e-6)


def test_each_row_can_be_long_or_short() -> None:
    spec = spec_of("longrope")
    positions = jnp.asarray([[5], [5]], jnp.int32)
    both = rope_table(spec, "global", positions, long=jnp.asarray([False, True]))
    for row, long in enumerate((False, True)):
        alone = rope_table(spec, "global", positions[:1], long=long)
        for found, expected in zip(both, alone, strict=True):
            np.testing.assert_array_equal(found[row], expected[0])


def test_factors_of_another_width_are_refused() -> None:
    spec = dataclasses.replace(spec_of("longrope"), head_dim=32)
    with pytest.raises(ValueError, match="32 short factors for 16 pairs"):
        frequencies(spec, "global")
