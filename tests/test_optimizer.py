"""AdamW and its schedule against a float64 reference."""

from __future__ import annotations

import dataclasses
import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from quick import QUICK

from ddk_jax.config import OptimConfig
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.spec import ModelSpec
from ddk_jax.training.optimizer import learning_rate, make_optimizer

STEPS, WARMUP = 12, 3
CONFIG = OptimConfig(
    learning_rate=3e-3,
    final_learning_rate=3e-4,
    warmup_steps=WARMUP,
    beta1=0.8,
    beta2=0.9,
    eps=1e-6,
    weight_decay=0.5,
    clip_norm=2.0,
)
AXES = {"matrix": ("layers", "embed", "ffn"), "scale": ("layers", "norm")}
DECAYED = {"matrix": True, "scale": False, "extra": True}


def rate(count: int) -> float:
    """Learning rate of update number count + 1."""
    peak, final, update = CONFIG.learning_rate, CONFIG.final_learning_rate, count + 1
    if update <= WARMUP:
        return peak * update / WARMUP
    progress = min((update - WARMUP) / (STEPS - WARMUP), 1)
    return final + (peak - final) * (1 + math.cos(math.pi * progress)) / 2


def adamw(
    params: dict[str, np.ndarray], gradients: list[dict[str, np.ndarray]], config: OptimConfig
) -> dict[str, np.ndarray]:
    """Loshchilov and Hutter's AdamW in float64; decay and step scaled by the learning rate."""
    params = dict(params)
    mean = {name: np.zeros_like(x) for name, x in params.items()}
    square = {name: np.zeros_like(x) for name, x in params.items()}
    for count, gradient in enumerate(gradients):
        norm = math.sqrt(sum(np.sum(g**2) for g in gradient.values()))
        clip = min(1.0, config.clip_norm / norm) if config.clip_norm else 1.0
        for name, value in params.items():
            g = clip * gradient[name]
            mean[name] = config.beta1 * mean[name] + (1 - config.beta1) * g
            square[name] = config.beta2 * square[name] + (1 - config.beta2) * g**2
            m = mean[name] / (1 - config.beta1 ** (count + 1))
            v = square[name] / (1 - config.beta2 ** (count + 1))
            decay = config.weight_decay * value if DECAYED[name] else 0.0
            params[name] = value - rate(count) * (m / (np.sqrt(v) + config.eps) + decay)
    return params


def tree(flat: dict[str, np.ndarray]) -> dict[str, Any]:
    leaves = {name: jnp.asarray(x.astype(np.float32)) for name, x in flat.items()}
    return {"objective": {"extra": leaves.pop("extra")}, "student": leaves}


@pytest.mark.parametrize("clip_norm", [2.0, 0.0])
def test_updates_equal_the_reference(clip_norm: float) -> None:
    config = dataclasses.replace(CONFIG, clip_norm=clip_norm)
    rng = np.random.default_rng(0)
    shapes = {"matrix": (2, 3, 4), "scale": (2, 3), "extra": (5,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    # Norms on both sides of the limit.
    gradients = [
        {name: size * rng.normal(size=shape) for name, shape in shapes.items()}
        for size in (0.05, 3.0, 0.2, 100.0, 1.0)
    ]
    optimizer = make_optimizer(config, STEPS, AXES)

    @partial(jax.jit, compiler_options=QUICK)
    def apply(params: Any, state: Any, gradient: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    found, state = tree(params), optimizer.init(tree(params))
    for gradient in gradients:
        found, state = apply(found, state, tree(gradient))
    expected = adamw(params, gradients, config)
    for name, value in {**found["student"], **found["objective"]}.items():
        np.testing.assert_allclose(value, expected[name], rtol=2e-6, atol=1e-7)


def test_the_schedule_at_its_corners() -> None:
    schedule = learning_rate(CONFIG, STEPS)
    found = np.asarray(schedule(np.arange(STEPS + 5)))
    np.testing.assert_allclose(found, [rate(count) for count in range(STEPS + 5)], rtol=1e-6)
    np.testing.assert_allclose(found[0], CONFIG.learning_rate / WARMUP, rtol=1e-6)
    np.testing.assert_allclose(found[WARMUP - 1], CONFIG.learning_rate, rtol=1e-6)
    np.testing.assert_allclose(found[STEPS - 1], CONFIG.final_learning_rate, rtol=1e-6)
    np.testing.assert_allclose(found[STEPS:], CONFIG.final_learning_rate, rtol=1e-6)
    assert np.all(np.diff(found[WARMUP - 1 : STEPS]) < 0)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 4), (4, 4), (1, 1), (0, 1)])
def test_degenerate_schedules(warmup: int, steps: int) -> None:
    config = OptimConfig(learning_rate=1.0, final_learning_rate=0.5, warmup_steps=warmup)
    found = np.asarray(learning_rate(config, steps)(np.arange(steps)))
    assert np.all((found > 0) & (found <= 1))
    assert found[-1] == (1.0 if warmup == steps else 0.5)


def test_exactly_the_norms_of_a_decoder_are_not_decayed() -> None:
    spec = ModelSpec(
        vocab_size=8,
        hidden_size=4,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        ffn_size=6,
        tied_head=False,
    )
    decoder = Decoder(spec=spec)
    optimizer = make_optimizer(
        OptimConfig(learning_rate=1.0, final_learning_rate=1.0, warmup_steps=0, weight_decay=0.25),
        1,
        decoder.logical_axes(),
    )
    abstract = decoder.abstract()

    @partial(jax.jit, compiler_options=QUICK)
    def updates_of(params: Any) -> Any:
        zeros = jax.tree.map(jnp.zeros_like, params)
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(zeros, optimizer.init(params), params)[0]

    ones = jax.tree.map(lambda x: np.ones(x.shape, np.float32), abstract)
    updates = updates_of({"student": ones, "objective": {}})
    found = jax.tree_util.tree_leaves_with_path(updates["student"])
    norms = [path for path, _ in found if "norm" in jax.tree_util.keystr(path)]
    assert len(norms) == 3
    for path, update in found:
        np.testing.assert_array_equal(update, 0.0 if path in norms else -0.25)
