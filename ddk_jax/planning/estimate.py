"""How long a compiled step would take on a chip, by a roofline: an estimate, not a measurement."""

from __future__ import annotations

from dataclasses import dataclass

from ddk_jax.parallel.chips import Chip
from ddk_jax.parallel.work import Op, Work

CYCLES_TOO_MANY = 2.4
"""libtpu's `estimated_cycles` of an element-wise operation against the time that HBM takes for it
(6.4 ms against 2.6 ms for the addition of two arrays of 1 GB)."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Seconds of one step on one chip; the parts are taken to follow each other."""

    operations: float
    """Every operation takes what its FLOPs or its HBM traffic take, whichever is longer."""
    kernels: float
    """FLOPs of attention kernels, which the compiler does not show."""
    links: float
    """Collectives."""

    @property
    def total(self) -> float:
        """The step: as if nothing went on at the same time."""
        return self.operations + self.kernels + self.links


def estimate(
    work: Work, chip: Chip, *, kernel_flops: float, head_width: int, with_cycles: bool
) -> Estimate:
    """The time of a program on a chip.

    Args:
      work: of the program, on one chip.
      chip: what it runs on.
      kernel_flops: FLOPs of attention kernels on one chip, without the blocks that they skip.
      head_width: of the attention; a matrix unit is 128 wide.
      with_cycles: also count with the compiler's cycles, which mean something at level O2 only.
    """
    efficiency = chip.efficiency
    matrix_rate = efficiency.matrix * chip.bf16_flops
    byte_rate = efficiency.hbm * chip.hbm_bandwidth
    kernel_rate = efficiency.kernel * chip.bf16_flops * min(1.0, head_width / 128)
    cycle_rate = CYCLES_TOO_MANY * chip.clock

    def seconds(op: Op) -> float:
        cycles = op.cycles / cycle_rate if with_cycles else 0.0
        return max(op.flops / matrix_rate, op.bytes / byte_rate, cycles)

    sent = sum(collective.wire_bytes for collective in work.collectives.values())
    return Estimate(
        operations=sum(seconds(op) * count for op, count in work.ops.items()),
        kernels=kernel_flops / kernel_rate,
        links=sent / (efficiency.links * chip.link_bandwidth),
    )
