"""HLO, the language of compiled programs: from text to instructions, and loops to trip counts.

Only what `work` needs is parsed: shapes, operands, and attributes by name. A loop is counted by
following its counter from the initial value through the body until the condition is false; TPU
programs do not say how often their loops run.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, TypeAlias

Path: TypeAlias = tuple[int, ...]
"""Where a value lies in nested tuples."""
Arguments: TypeAlias = Callable[[int, Path], int | None]
"""The integers that a computation is called with, by number and path; None where not known."""

MAX_TRIPS = 100_000
"""The trip count of a loop that runs longer is not found."""


class Shape(NamedTuple):
    """An array on one device."""

    dtype: str
    """XLA's name of it, such as `bf16`."""
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes of the elements, without the padding of a memory layout."""
        bits = re.search(r"\d+", self.dtype)  # the first number of f8e4m3fn is its width too
        return self.size if bits is None else -(-self.size * int(bits[0]) // 8)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]
    """Of the result; of a tuple, those of its arrays from left to right."""
    operands: tuple[str, ...]
    literal: str
    """What stands in the parentheses: a constant's value, a parameter's number, or the operands."""
    attributes: str
    on_chip: tuple[bool, ...] = ()
    """Which of the arrays of the result lie in the chip's own memory, not in HBM."""

    def attribute(self, name: str) -> str:
        """The text of one attribute without its outer braces; empty where it is absent."""
        braces, word = r"\{((?:[^{}]|\{[^{}]*\})*)\}", r"([^\s,]+)"
        found = re.search(rf"(?:^|, ){name}=(?:{braces}|{word})", self.attributes)
        return "" if found is None else found[1] or found[2] or ""

    def numbers(self, name: str) -> tuple[int, ...]:
        """An attribute that is a list of integers."""
        return tuple(map(int, re.findall(r"\d+", self.attribute(name))))

    def calls(self, *names: str) -> tuple[str, ...]:
        """The computations that attributes name."""
        return tuple(
            found for name in names for found in re.findall(r"%([^\s,]+)", self.attribute(name))
        )


class Computation(NamedTuple):
    """A function of the program."""

    name: str
    instructions: Mapping[str, Instruction]
    root: Instruction

    def operand(self, instruction: Instruction, number: int) -> Instruction:
        """An operand of one of the instructions."""
        return self.instructions[instruction.operands[number]]


class Module(NamedTuple):
    """A program."""

    computations: Mapping[str, Computation]
    entry: str
    devices: int
    """That run it together."""


# --- Text to instructions.

_HEADER = re.compile(r"(ENTRY )?%(\S+) \(.*\{$")
# The type of the result may be a tuple and holds layouts such as {1,0:T(8,128)(2,1)}, but never a
# blank, a word and an opening parenthesis.
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%(?P<name>\S+) = (?P<type>.*?) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<literal>.*?)\)(?:, (?P<attributes>[a-z][\w-]*=.*))?$"
)
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](\{[^{}]*\})?")


def parse_hlo(text: str) -> Module:
    """The computations of a program.

    Raises:
      ValueError: the text is no HLO.
    """
    # Kernels carry settings of their own, on lines of their own.
    text = re.sub(r"kernel_metadata=\{\n.*?\n\}", "kernel_metadata={}", text)
    lines = iter(re.sub(r"/\*.*?\*/", "", text).splitlines())
    title = next(lines, "")
    computations: dict[str, Computation] = {}
    entry = ""
    for line in lines:
        if header := _HEADER.match(line):
            computations[header[2]] = _computation(header[2], lines)
            entry = header[2] if header[1] else entry
    if not entry:
        raise ValueError(f"this is not HLO text, it has no entry computation: {title[:80]!r}")
    counts = re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", title)
    return Module(computations, entry, math.prod(map(int, counts)))


def _computation(name: str, lines: Iterator[str]) -> Computation:
    """Reads on to the closing brace."""
    instructions: dict[str, Instruction] = {}
    root = ""
    for line in lines:
        if line.startswith("}"):
            break
        found = _INSTRUCTION.match(line)
        if not found:
            raise ValueError(f"this is not an HLO instruction: {line[:200]!r}")
        shapes, on_chip = _shapes(found["type"])
        instructions[found["name"]] = Instruction(
            name=found["name"],
            opcode=found["opcode"],
            shapes=shapes,
            operands=tuple(re.findall(r"%([^\s,()]+)", found["literal"])),
            literal=found["literal"],
            attributes=found["attributes"] or "",
            on_chip=on_chip,
        )
        root = found["name"] if found["root"] else root
    return Computation(name, instructions, instructions[root])


def _shapes(text: str) -> tuple[tuple[Shape, ...], tuple[bool, ...]]:
    """The arrays of a type, and whether each is in a memory of its own, such as {1,0:S(1)}."""
    found = _SHAPE.findall(text)
    shapes = tuple(
        Shape(dtype, tuple(int(dim.lstrip("<=")) for dim in dims.split(",") if dim))
        for dtype, dims, _ in found
    )
    return shapes, tuple("S(" in layout for _, _, layout in found)


# --- Loops: as much of an interpreter as it takes to count.

_BINARY: dict[str, Callable[[int, int], int]] = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "minimum": min,
    "maximum": max,
    "and": operator.and_,
    "or": operator.or_,
}
_COMPARE: dict[str, Callable[[int, int], bool]] = {
    "LT": operator.lt,
    "LE": operator.le,
    "GT": operator.gt,
    "GE": operator.ge,
    "EQ": operator.eq,
    "NE": operator.ne,
}
_SAME = ("copy", "copy-done", "copy-start", "bitcast", "convert", "reshape", "optimization-barrier")
"""What changes no integer, or rather: none that a loop counts with."""


class _Scope(NamedTuple):
    """A computation that is called with arguments, as far as they are known."""

    module: Module
    computation: Computation
    arguments: Arguments

    def root(self, path: Path = ()) -> int | None:
        """What it returns at a path."""
        return self.value(self.computation.root, path)

    def operand(self, instruction: Instruction, number: int, path: Path) -> int | None:
        """The value of an operand."""
        return self.value(self.computation.operand(instruction, number), path)

    def value(self, instruction: Instruction, path: Path) -> int | None:
        """An integer or truth value, where it follows from constants."""
        match instruction.opcode:
            case "constant":
                literal = instruction.literal
                number = re.fullmatch(r"-?\d+", literal)
                return int(literal) if number else {"false": 0, "true": 1}.get(literal)
            case "parameter":
                return self.arguments(int(instruction.literal), path)
            case "tuple":
                return self.operand(instruction, path[0], path[1:])
            case "get-tuple-element":
                return self.operand(instruction, 0, (*instruction.numbers("index"), *path))
            case "fusion" | "call":
                (name,) = instruction.calls("calls", "to_apply")
                inner = self.module.computations[name]
                return _Scope(self.module, inner, partial(self.operand, instruction)).root(path)
            case opcode if opcode in _SAME:
                return self.operand(instruction, 0, path)
        function = _BINARY.get(instruction.opcode) or _COMPARE.get(
            instruction.attribute("direction")
        )
        if function is None:
            return None
        left, right = (self.operand(instruction, number, ()) for number in (0, 1))
        return None if left is None or right is None else int(function(left, right))


def trip_count(module: Module, where: Computation, loop: Instruction) -> int | None:
    """How often the body of a `while` runs; None where that does not follow from constants."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(known[1])
    outside = _Scope(module, where, _unknown)
    (condition,), (body,) = loop.calls("condition"), loop.calls("body")
    carried: dict[tuple[int, Path], int | None] = {}

    def carry(iteration: int, number: int, path: Path) -> int | None:
        """What the carry holds at a path before an iteration; asked for from the first on."""
        if (iteration, path) not in carried:
            before = partial(carry, iteration - 1)
            carried[iteration, path] = (
                _Scope(module, module.computations[body], before).root(path)
                if iteration
                else outside.operand(loop, 0, path)
            )
        return carried[iteration, path]

    for iteration in range(MAX_TRIPS):
        test = _Scope(module, module.computations[condition], partial(carry, iteration))
        goes_on = test.root()
        if not goes_on:
            return None if goes_on is None else iteration
    return None


def _unknown(number: int, path: Path) -> None:
    """The arguments of a computation that may be called from anywhere."""
    return None
