"""What the TPU compiler says of a step; runs in Tunix's environment too, so it imports little."""

from __future__ import annotations

from typing import Any, NamedTuple

from ddk_jax.parallel.chips import CHIPS
from ddk_jax.parallel.compiled import Level, compile_program, kernel_flops
from ddk_jax.planning.estimate import estimate


class Figures(NamedTuple):
    """Of one program on one chip."""

    peak_bytes: int
    """The most that is in use at one time."""
    flops: float
    """Without the blocks that attention kernels skip."""
    hbm_bytes: int
    """To and from HBM, by the operations that the compiler shows; not by kernels."""
    seconds: float
    """An estimate, not a measurement."""


def figures(traced: Any, chip: str, level: Level, *, visible: float, head_width: int) -> Figures:
    """Compile a step and read the result.

    Args:
      traced: the step, for one absent chip.
      chip: its generation, such as `v5e`.
      level: how hard the compiler tries.
      visible: the part of their blocks that attention kernels do not skip.
      head_width: of the attention.

    Raises:
      OutOfMemoryError: the step does not fit.
    """
    program = compile_program(traced.lower(), level=level)
    kernels = kernel_flops(traced.jaxpr) * visible
    expected = estimate(
        program.work,
        CHIPS[chip],
        kernel_flops=kernels,
        head_width=head_width,
        with_cycles=level in ("O2", "O3"),
    )
    return Figures(
        program.memory.peak_bytes,
        program.work.flops + kernels,
        program.work.bytes,
        expected.total,
    )
