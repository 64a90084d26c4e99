"""The controllers by name, and what to tell the user about weights that have become extreme."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from typing import Any

from ddk_jax.mixture.ado import ADO
from ddk_jax.mixture.baselines import DoReMi, DynamicBatchLoading, OnlineDataMixing
from ddk_jax.mixture.controller import Controller, ControllerState
from ddk_jax.mixture.ddk import DDK, DDKWithoutSmoothing, FollowsGap, Static
from ddk_jax.mixture.elasticity import Elasticity

CONTROLLERS: dict[str, type[Controller]] = {
    controller.name: controller
    for controller in (
        DDK,
        DDKWithoutSmoothing,
        Static,
        DynamicBatchLoading,
        OnlineDataMixing,
        ADO,
        DoReMi,
        Elasticity,
    )
}
"""The controllers by the name that `mixture.controller` gives them."""

SATURATED_GAP = 20.0
"""A larger gap makes equation 1 one-hot: exp(20) is 5e8."""


def settings_of(controller: str) -> dict[str, Any]:
    """The types of a controller's own settings, by name; without what all controllers have."""
    kind = CONTROLLERS[controller]
    shared = {field.name for field in dataclasses.fields(Controller)}
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind) if field.name not in shared]
    return {name: hints[name] for name in names}


def advice(
    controller: Controller,
    state: ControllerState,
    domains: Sequence[str],
    rows_per_interval: int,
) -> str | None:
    """What to tell the user about weights that the gaps have driven to an extreme, if they have.

    Args:
        controller: the one that made the state.
        state: the state after an update.
        domains: [D] their names.
        rows_per_interval: training rows between two updates.

    Returns:
        One line that names the settings to change; None while the prior is in force (static
        mixture, warm-up) and when every domain gets a row in an interval and no gap that weights
        grow with exponentially is over `SATURATED_GAP`.
    """
    prior_holds = isinstance(controller, Static) or state.updates <= controller.warmup_intervals
    if prior_holds:
        return None
    findings = []
    other_gap = ""
    if isinstance(controller, FollowsGap):
        gaps = zip(state.gap or (), domains, strict=False)
        largest, worst = max(((g, name) for g, name in gaps if g is not None), default=(0.0, ""))
        if largest > SATURATED_GAP:
            findings.append(
                f"the largest {controller.gap} is {largest:.3g} (domain {worst}) and weights grow "
                "with its exponential"
            )
        if controller.gap != "loss_difference":
            other_gap = "mixture.gap=loss_difference, or by "
    rows = controller.weights(state) * rows_per_interval
    starved = [name for name, count in zip(domains, rows.tolist(), strict=True) if count < 1.0]
    if starved:
        findings.append(
            f"less than one of the {rows_per_interval} rows of an interval comes from "
            f"{', '.join(starved)}"
        )
    if not findings:
        return None
    return (
        f"The mixture is extreme: {'; '.join(findings)}. A student this far behind is better "
        f"served by {other_gap}mixture.warmup_intervals of 1 or more, which trains on the prior "
        "before the gaps count."
    )
