"""TPU chips and slices: what a chip has, and how much of it programs get.

Every figure with its source. Peak rates and link speeds are those of Google's system architecture
pages (https://cloud.google.com/tpu/docs/v4, .../v5e, .../v5p, .../v6e; bandwidths in decimal
bytes; the speed of the links is that of all links of a chip together). The memory that a program
may have is the one that libtpu 0.0.52 names when a program does not fit. Nothing was measured on a
TPU; what `Efficiency` says is how libtpu's own estimates compare with the peak.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The share of the peak that the estimate of a step's time counts on."""

    matrix: float
    """Of large matrix products, against the bf16 peak: what libtpu's `optimal_seconds` implies for
    a product of two large matrices in a program without loops."""
    hbm: float = 0.9
    """Of the HBM's bandwidth: likewise, for the addition of two large arrays; 0.9 at most."""
    links: float = 0.9
    """Of the speed of all links of a chip. An assumption: the share of what a ring can use."""
    kernel: float = 0.5
    """Of attention kernels, against the bf16 peak, for heads of at least 128. An assumption: about
    what is reported for flash attention on TPUs. Narrower heads fill the matrix unit in part."""


@dataclass(frozen=True, kw_only=True)
class Chip:
    """What one device of a generation has. v4 and v5p: both cores of a chip together."""

    name: str
    hbm_bytes: int
    """That programs may use."""
    bf16_flops: float
    """Peak, per second."""
    hbm_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """Bytes per second that a chip sends over all its links together."""
    clock: float
    """Cycles per second with which libtpu's `estimated_cycles` of a large matrix product take its
    `optimal_seconds`."""
    efficiency: Efficiency
    slices: tuple[tuple[int, ...], ...]
    """Shapes of the slices that are sold, from the smallest; every one is a name for libtpu."""
    kind: str
    """What jax calls such a device."""


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip(
            name="v4",
            hbm_bytes=int(30.75 * GIB),
            bf16_flops=275e12,
            hbm_bandwidth=1228e9,
            link_bandwidth=300e9,
            clock=1.05e9,
            efficiency=Efficiency(matrix=0.88, hbm=0.8),
            slices=(
                (2, 2, 1),
                (2, 2, 2),
                (2, 2, 4),
                (2, 4, 4),
                (4, 4, 4),
                (4, 4, 8),
                (4, 8, 8),
                (8, 8, 8),
            ),
            kind="TPU v4",
        ),
        Chip(
            name="v5e",
            hbm_bytes=int(15.75 * GIB),
            bf16_flops=197e12,
            hbm_bandwidth=819e9,
            link_bandwidth=200e9,
            clock=1.5e9,
            efficiency=Efficiency(matrix=0.97),
            slices=((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
            kind="TPU v5 lite",
        ),
        Chip(
            name="v5p",
            hbm_bytes=int(95.73 * GIB),
            bf16_flops=459e12,
            hbm_bandwidth=2765e9,
            link_bandwidth=600e9,
            clock=1.75e9,
            efficiency=Efficiency(matrix=0.86, hbm=0.85),
            slices=(
                (2, 2, 1),
                (2, 2, 2),
                (2, 2, 4),
                (2, 4, 4),
                (4, 4, 4),
                (4, 4, 8),
                (4, 8, 8),
                (8, 8, 8),
            ),
            kind="TPU v5",
        ),
        Chip(
            name="v6e",
            hbm_bytes=int(31.24 * GIB),
            bf16_flops=918e12,
            hbm_bandwidth=1640e9,
            link_bandwidth=400e9,
            clock=1.75e9,
            efficiency=Efficiency(matrix=0.935),
            slices=((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16)),
            kind="TPU v6 lite",
        ),
    )
}
"""By the name that topologies begin with."""


@dataclass(frozen=True)
class Slice:
    """A topology: chips in a grid."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """As libtpu spells it, such as `v5e:4x4`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)


def known_slices() -> list[Slice]:
    """The slices that are sold, by generation and size."""
    return [Slice(chip, shape) for chip in CHIPS.values() for shape in chip.slices]


def next_larger(name: str) -> str | None:
    """The smallest slice of the same generation with more chips; None: there is none.

    Args:
      name: of a slice, such as `v5e:2x4`.
    """
    chip, _, shape = name.partition(":")
    size = math.prod(map(int, shape.split("x")))
    larger = [s for s in known_slices() if s.chip.name == chip and s.chips > size]
    return larger[0].name if larger else None
