"""The work in a compiled program, read from its HLO: FLOPs, bytes and collectives.

The compiler's own cost analysis counts the body of a loop once; here it counts as often as it runs.
Matrix products appear as `dot` on CPU and as `convolution` on TPU.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from ddk_jax.parallel.hlo import Computation, Instruction, Module, Shape, parse_hlo, trip_count
from ddk_jax.parallel.traffic import traffic

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True, kw_only=True)
class Collective:
    """All collectives of one kind; bytes are those of one device."""

    count: int
    """Executions. A collective of several arrays at once counts once."""
    bytes: int
    """Of the arrays, over all executions: of a gather what comes out, else what goes in."""
    wire_bytes: int
    """What the device sends, on a ring: of an all-reduce nearly twice the array."""
    sizes: Mapping[Shape, int]
    """Executions by array, the largest array first."""

    @property
    def largest(self) -> Shape:
        """The largest of the arrays."""
        return next(iter(self.sizes))


class Op(NamedTuple):
    """One execution of an instruction that the device carries out as a whole, such as a fusion."""

    flops: int
    bytes: int
    """To and from HBM."""
    cycles: int
    """Of the vector and matrix units, as the compiler estimates them; 0 where it does not."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one device does in one execution of a program."""

    flops: int
    """Of matrix products and convolutions, two per multiply-add. Of a conditional the costliest
    branch; kernels in custom calls are not in it."""
    collectives: Mapping[str, Collective]
    """By kind, one of `COLLECTIVES`."""
    custom_calls: Mapping[str, int]
    """Executions of what HLO does not show, by target."""
    unknown_loops: int
    """Loops whose trip count was not found; they are counted as if they ran once."""
    ops: Mapping[Op, int]
    """Executions of every kind of operation, collectives left out."""

    @property
    def bytes(self) -> int:
        """Bytes to and from HBM, collectives left out."""
        return sum(op.bytes * count for op, count in self.ops.items())


def read_work(text: str) -> Work:
    """The work in a compiled program.

    Args:
      text: HLO as the compiler prints it after optimisation.

    Raises:
      ValueError: the text is no HLO.
    """
    module = parse_hlo(text)
    total = _Costs(module).of(module.entry)
    kinds = {transfer.kind for transfer in total.transfers}
    return Work(
        flops=total.flops,
        collectives={kind: _collective(total.transfers, kind) for kind in sorted(kinds)},
        custom_calls=dict(sorted(total.custom_calls.items())),
        unknown_loops=total.unknown_loops,
        ops=dict(total.ops),
    )


def _collective(transfers: Mapping[_Transfer, int], kind: str) -> Collective:
    found = [(transfer, count) for transfer, count in transfers.items() if transfer.kind == kind]
    sizes: Counter[Shape] = Counter()
    for transfer, count in found:
        for shape in transfer.shapes:
            sizes[shape] += count
    return Collective(
        count=sum(count for _, count in found),
        bytes=sum(transfer.bytes * count for transfer, count in found),
        wire_bytes=sum(transfer.wire_bytes * count for transfer, count in found),
        sizes=dict(sorted(sizes.items(), key=lambda item: -item[0].bytes)),
    )


_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')


class _Transfer(NamedTuple):
    """One execution of a collective on one device."""

    kind: str
    shapes: tuple[Shape, ...]
    group: int
    """Number of devices that take part together."""

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def wire_bytes(self) -> int:
        if self.kind == "collective-permute":
            return self.bytes
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.bytes * (self.group - 1) // self.group


@dataclass
class _Cost:
    """Of one execution of a computation."""

    flops: int = 0
    transfers: Counter[_Transfer] = field(default_factory=Counter)
    custom_calls: Counter[str] = field(default_factory=Counter)
    ops: Counter[Op] = field(default_factory=Counter)
    unknown_loops: int = 0

    def add(self, other: _Cost, times: int = 1, *, as_one: bool = False) -> None:
        """Add executions of another computation; its operations too, unless they are one."""
        self.flops += other.flops * times
        if not as_one:
            for op, count in other.ops.items():
                self.ops[op] += count * times
        for transfer, count in other.transfers.items():
            self.transfers[transfer] += count * times
        for target, count in other.custom_calls.items():
            self.custom_calls[target] += count * times
        self.unknown_loops += other.unknown_loops


class _Costs:
    """The costs of all computations of a module, each worked out once."""

    def __init__(self, module: Module) -> None:
        self._module = module
        self._known: dict[str, _Cost] = {}

    def of(self, name: str) -> _Cost:
        """The cost of the computation with this name."""
        if name not in self._known:
            where = self._module.computations[name]
            total = _Cost()
            for instruction in where.instructions.values():
                self._add(total, where, instruction)
            self._known[name] = total
        return self._known[name]

    def _add(self, total: _Cost, where: Computation, instruction: Instruction) -> None:
        before = total.flops
        match instruction.opcode:
            case "dot":
                total.flops += _dot_flops(where, instruction)
            case "convolution":
                total.flops += _convolution_flops(where, instruction)
            case "fusion":
                total.add(self.of(instruction.calls("calls")[0]), as_one=True)
            case "call" | "async-start":
                total.add(self.of(instruction.calls("calls", "to_apply")[0]))
            case "while":
                trips = trip_count(self._module, where, instruction)
                total.unknown_loops += trips is None
                total.add(self.of(instruction.calls("body")[0]), 1 if trips is None else trips)
            case "conditional":
                names = ("branch_computations", "true_computation", "false_computation")
                branches = map(self.of, instruction.calls(*names))
                total.add(max(branches, key=lambda cost: cost.flops))
            case "custom-call":
                total.custom_calls[instruction.attribute("custom_call_target").strip('"')] += 1
            case opcode if opcode.removesuffix("-start") in COLLECTIVES:
                total.transfers[_transfer(self._module, where, instruction)] += 1
                return
        moved = traffic(self._module, where, instruction)
        if moved or instruction.opcode in ("dot", "convolution", "fusion"):
            cycles = _CYCLES.search(instruction.attributes)
            op = Op(total.flops - before, moved, int(cycles[1]) if cycles else 0)
            total.ops[op] += 1


def _dot_flops(where: Computation, dot: Instruction) -> int:
    left = where.operand(dot, 0).shapes[0].dims
    contracted = math.prod(left[axis] for axis in dot.numbers("lhs_contracting_dims"))
    return 2 * dot.shapes[0].size * contracted


def _convolution_flops(where: Computation, convolution: Instruction) -> int:
    """Two per tap that lies on an element of the input, not on padding or between elements."""
    labels = re.split("_|->", convolution.attribute("dim_labels"))
    arrays = (where.operand(convolution, 0), where.operand(convolution, 1), convolution)
    # By what the axis means: b batch, i and o features, 0 1 2 ... the axes of the window.
    image, kernel, result = (
        dict(zip(label, array.shapes[0].dims, strict=True))
        for label, array in zip(labels, arrays, strict=True)
    )
    window = dict(item.split("=") for item in convolution.attribute("window").split())
    taps = 1
    for axis in filter(str.isdigit, kernel):
        of_axis = {name: values.split("x")[int(axis)] for name, values in window.items()}
        taps *= _taps(
            image[axis],
            kernel[axis],
            result[axis],
            before=int(of_axis.get("pad", "0_0").split("_")[0]),
            stride=int(of_axis.get("stride", 1)),
            image_step=int(of_axis.get("lhs_dilate", 1)),
            kernel_step=int(of_axis.get("rhs_dilate", 1)),
        )
    (groups,) = convolution.numbers("batch_group_count") or (1,)
    return 2 * (image["b"] // groups) * kernel["i"] * kernel["o"] * taps


def _taps(
    image: int,
    kernel: int,
    result: int,
    *,
    before: int,
    stride: int,
    image_step: int,
    kernel_step: int,
) -> int:
    """How many pairs of a result and a kernel element meet an element of the image, on one axis.

    The image has one element in `image_step` places, after `before` places of padding.
    """
    on_elements = range(0, image * image_step, image_step)
    taps = 0
    for tap in range(kernel):
        start = tap * kernel_step - before
        taps += _common(range(start, start + result * stride, stride), on_elements)
    return taps


def _common(places: range, elements: range) -> int:
    """Number of members that two ranges share; the second starts at 0."""
    step = math.lcm(places.step, elements.step)
    candidates = places[: step // places.step]
    first = next((place for place in candidates if place % elements.step == 0), None)
    if first is None:
        return 0
    stop = min(places.stop, elements.stop)
    return len(range(first if first >= 0 else first % step, stop, step))


def _transfer(module: Module, where: Computation, instruction: Instruction) -> _Transfer:
    kind = instruction.opcode.removesuffix("-start")
    if where.name.startswith("all-reduce-scatter"):  # what a TPU makes of a reduce-scatter
        kind = "reduce-scatter"
    group = _group_size(module, instruction)
    shapes = tuple(
        shape for name in instruction.operands for shape in where.instructions[name].shapes
    )
    if kind == "all-gather":
        (axis,) = instruction.numbers("dimensions")
        shapes = tuple(
            shape._replace(
                dims=(*shape.dims[:axis], shape.dims[axis] * group, *shape.dims[axis + 1 :])
            )
            for shape in shapes
        )
    return _Transfer(kind, shapes, group)


def _group_size(module: Module, instruction: Instruction) -> int:
    """Number of devices in a group: given as lists, as a reshaped iota, or as axes of a mesh."""
    if found := re.search(r"replica_groups=mesh\[(.*?)\].*? \{(.*?)\}", instruction.attributes):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])  # 'a', or 2 of a's 4: 'a':(2)2
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]<=", instruction.attributes):
        return int(found[1])
    first = instruction.attribute("replica_groups").split("}")[0]
    return first.count(",") + 1 if first else module.devices
