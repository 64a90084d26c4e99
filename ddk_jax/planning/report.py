"""A plan as text, and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from ddk_jax.planning.plan import NOT_MEASURED, Plan, Speed
from ddk_jax.planning.search import Found, Remedy, Tried, as_options, describe

_GIB = 2**30
_SIZES = 8
"""Arrays of a kind of collective that JSON lists."""
_PARTS = {
    "student": "gradients, gathered parameters, student",
    "teacher": "activations of the teacher",
    "loss": "loss",
}


def plan_text(name: str, plan: Plan, remedies: Sequence[Remedy] = ()) -> str:
    """Everything that a plan says, and what helps if it does not fit.

    Args:
      name: of the config.
      plan: of it.
      remedies: changes under which it fits.
    """
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    rows, millions = plan.rows, {k: v / 1e6 for k, v in plan.parameters.items()}
    micro = rows["per_step"] // rows["per_micro_batch"]
    lines = [
        f"{name} on {plan.topology}: {plan.chips} chips, {mesh}",
        f"teacher {millions['teacher']:,.0f} M -> student {millions['student']:,.0f} M; "
        f"{rows['per_step']} rows of {rows['length']} tokens a step, in {micro} micro-batches of "
        f"{rows['per_micro_batch']} ({rows['per_chip']} per chip)",
        "",
        *_memory(plan),
        "",
        *(_speed(plan, plan.speed) if plan.speed is not None else ()),
        *_verdict(plan, remedies),
        f"compiled at level {plan.level} in {sum(s.compile_seconds for s in plan.steps):.0f} s; "
        f"this took {plan.host_bytes / _GIB:.1f} GiB of memory",
    ]
    return "\n".join(lines)


def _memory(plan: Plan) -> Iterator[str]:
    yield f"{'HBM per chip':<46}{'GiB':>8}"
    resident, train = plan.resident, plan.steps[0]
    yield _line("student", resident.student)
    yield _line("optimizer", resident.optimizer)
    yield _line("teacher", resident.teacher)
    if plan.speed is not None:
        yield _line("temporaries of the train step, taking turns:", train.temporary_bytes)
        for scope, words in _PARTS.items():
            if scope in train.scopes:
                yield _line(f"    {words}", train.scopes[scope])
    for step in plan.steps:
        peak = f"{step.peak_bytes / _GIB:.2f} in use, " if step.fits else ""
        seconds = f"({peak}compiled in {step.compile_seconds:.0f} s)"
        yield f"{_line(f'needed for {step.name}', step.allocated_bytes)}  {seconds}"
    yield _line("a chip has", plan.hbm_bytes)


def _line(words: str, size: int) -> str:
    return f"  {words:<44}{size / _GIB:>8.2f}"


def _speed(plan: Plan, speed: Speed) -> Iterator[str]:
    yield "Train step, all chips"
    yield (
        f"  FLOPs                {speed.flops_per_step:.3e}, {speed.flops_ratio:.3f} of the minimum"
    )
    yield f"  HBM traffic          {speed.hbm_traffic_bytes / 1e9:,.0f} GB on each chip"
    for kind, found in speed.collectives.items():
        yield (
            f"  {kind:<21}{found.count} times, {found.wire_bytes / 1e9:,.2f} GB sent by each chip; "
            f"largest {found.largest} ({found.sizes[found.largest]} times)"
        )
    seconds = speed.estimated_seconds
    yield ""
    yield f"Time: {NOT_MEASURED}"
    yield (
        f"  step                 {seconds.total:.2f} s: operations {seconds.operations:.2f}, "
        f"attention kernels {seconds.kernels:.2f}, collectives {seconds.links:.2f}"
    )
    yield (
        f"  speed                {speed.tokens_per_second:,.0f} tokens/s, MFU {speed.mfu:.0%}, "
        f"{speed.days:.1f} days for the run"
    )
    yield from (f"  - {assumption}" for assumption in plan.assumptions)
    yield ""


def _verdict(plan: Plan, remedies: Sequence[Remedy]) -> Iterator[str]:
    if plan.fits:
        yield f"fits, with {plan.spare:.0%} of the HBM to spare"
        return
    over = (plan.allocated_bytes - plan.hbm_bytes) / _GIB
    worst = max(plan.steps, key=lambda step: step.allocated_bytes)
    yield f"does not fit, over by {over:.2f} GiB ({worst.name})" + (": try" if remedies else "")
    for words, found in remedies:
        yield f"  {words}   # compiled: fits, with {found.spare:.0%} to spare"
    if not remedies:
        yield "  of the changes that were tried, none fits"


def search_text(found: Found) -> str:
    """The fastest layout, as options and as YAML."""
    if found.best is None:
        return "nothing of this fits"
    settings = found.best.candidate.settings()
    options = yaml.safe_dump(settings, sort_keys=False, default_flow_style=None)
    return (
        f"fastest of those that fit ({NOT_MEASURED}):\n  {describe(found.best)}\n\n"
        f"  {as_options(settings)}\n\n{options}"
    )


def plan_json(plan: Plan, remedies: Sequence[Remedy] = ()) -> dict[str, Any]:
    """A plan as plain data; docs/plan.md says what the keys mean."""
    speed, train = plan.speed, plan.steps[0]
    return {
        "fits": plan.fits,
        "topology": plan.topology,
        "chips": plan.chips,
        "level": plan.level,
        "mesh": dict(plan.mesh),
        "rows": dict(plan.rows),
        "parameters": dict(plan.parameters),
        "hbm_bytes_per_chip": plan.hbm_bytes,
        "peak_bytes_per_chip": plan.peak_bytes,
        "allocated_bytes_per_chip": plan.allocated_bytes,
        "spare": plan.spare,
        "memory_per_chip": {
            **plan.resident._asdict(),
            "temporaries": train.temporary_bytes,
            "student_activations": train.scopes.get("student", 0),
            "teacher_activations": train.scopes.get("teacher", 0),
            "loss": train.scopes.get("loss", 0),
        },
        "steps": {
            step.name: {
                "fits": step.fits,
                "allocated_bytes": step.allocated_bytes,
                "peak_bytes": step.peak_bytes,
                "compile_seconds": step.compile_seconds,
            }
            for step in plan.steps
        },
        "minimum_flops_per_step": plan.minimum_flops,
        **_speed_json(speed),
        "compile_seconds": sum(step.compile_seconds for step in plan.steps),
        "host_bytes": plan.host_bytes,
        "note": NOT_MEASURED,
        "assumptions": list(plan.assumptions),
        "suggestions": [{"options": r.words, "spare": r.plan.spare} for r in remedies],
    }


def _speed_json(speed: Speed | None) -> dict[str, Any]:
    """What follows from the program of the train step; null where there is none."""
    if speed is None:
        names = (
            "flops_per_step", "flops_ratio", "hbm_traffic_bytes_per_chip", "collectives",
            "estimated_step_seconds", "estimated_parts", "tokens_per_second", "mfu", "days",
        )  # fmt: skip
        return dict.fromkeys(names)
    seconds = speed.estimated_seconds
    return {
        "flops_per_step": speed.flops_per_step,
        "flops_ratio": speed.flops_ratio,
        "hbm_traffic_bytes_per_chip": speed.hbm_traffic_bytes,
        "collectives": {
            kind: {
                "count": found.count,
                "bytes": found.bytes,
                "wire_bytes": found.wire_bytes,
                "sizes": {str(shape): n for shape, n in list(found.sizes.items())[:_SIZES]},
            }
            for kind, found in speed.collectives.items()
        },
        "estimated_step_seconds": seconds.total,
        "estimated_parts": {
            "operations": seconds.operations,
            "kernels": seconds.kernels,
            "collectives": seconds.links,
        },
        "tokens_per_second": speed.tokens_per_second,
        "mfu": speed.mfu,
        "days": speed.days,
    }


def search_json(found: Found) -> dict[str, Any]:
    """A search as plain data."""

    def one(tried: Tried) -> dict[str, Any]:
        plan = tried.plan
        outcome: dict[str, Any] = {"skipped": tried.skipped}
        if plan is not None:
            seconds = plan.speed.estimated_seconds.total if plan.speed else None
            outcome = {
                "fits": plan.fits,
                "allocated_bytes_per_chip": plan.allocated_bytes,
                "estimated_step_seconds": seconds,
            }
        return {**tried.candidate._asdict(), **outcome}

    best = None if found.best is None else found.best.candidate
    return {
        "best": None
        if best is None
        else {**best._asdict(), "options": as_options(best.settings())},
        "tried": [one(tried) for tried in found.tried],
        "note": NOT_MEASURED,
    }
