"""AdamW with linear warm-up and cosine decay, from the config."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from ddk_jax.config import OptimConfig


def learning_rate(config: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate of the update that follows `count` updates.

    Rises linearly to the peak at update `warmup_steps`, then falls as a cosine to
    `final_learning_rate` at update `steps`.
    """
    peak, final, warmup = config.learning_rate, config.final_learning_rate, config.warmup_steps

    def schedule(count: Any) -> Array:
        update = jnp.asarray(count, jnp.float32) + 1
        rising = peak * update / max(warmup, 1)
        progress = jnp.clip((update - warmup) / max(steps - warmup, 1), 0, 1)
        falling = final + (peak - final) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(update <= warmup, rising, falling)

    return schedule


def make_optimizer(
    config: OptimConfig, steps: int, student_axes: Any, *, freeze_student: bool = False
) -> optax.GradientTransformation:
    """The optimizer of `{"student": ..., "objective": ...}` parameters.

    Args:
      config: learning rates, decay, clipping.
      steps: length of the schedule.
      student_axes: logical axis names in the shape of the student's parameters; what has the axis
        `embed` is a matrix; scales and biases (however many are stacked) have not, and are not
        decayed.
      freeze_student: update the parameters of the objective alone.
    """

    def decayed(params: Any) -> Any:
        is_names = lambda node: isinstance(node, tuple)  # noqa: E731
        student = jax.tree.map(lambda names: "embed" in names, student_axes, is_leaf=is_names)
        return {"student": student, "objective": jax.tree.map(lambda _: True, params["objective"])}

    frozen = {"student": freeze_student, "objective": False}
    clip = optax.clip_by_global_norm(config.clip_norm) if config.clip_norm else optax.identity()
    return optax.chain(
        clip,
        optax.scale_by_adam(b1=config.beta1, b2=config.beta2, eps=config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(learning_rate(config, steps)),
        optax.masked(optax.set_to_zero(), frozen) if freeze_student else optax.identity(),
    )
