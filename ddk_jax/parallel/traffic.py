"""Bytes that one instruction of a compiled program moves to and from a chip's HBM.

A fusion reads its operands and writes its result; what stays between the instructions inside it
costs nothing. Of an operand that it only slices, it reads the slices; a slice that it updates in
place, it writes alone: the stacked layers of a model are read and written one by one.
"""

from __future__ import annotations

from collections.abc import Iterator

from ddk_jax.parallel.hlo import Computation, Instruction, Module

_FREE = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "iota",
    "after-all",
    "partition-id",
    "replica-id",
    "optimization-barrier",
    "opt-barrier",
    # What they do is counted inside them, or where they begin.
    "while",
    "conditional",
    "call",
    "async-start",
    "async-update",
)
_KERNEL = '"tpu_custom_call"'
"""Of custom calls, those that compute: others reserve memory, or promise something."""
_RENAMED = ("bitcast", "reshape", "optimization-barrier")
"""What gives the same bytes another name, inside a fusion."""
_SLICES = ("dynamic-slice", "slice", "gather")


def traffic(module: Module, where: Computation, instruction: Instruction) -> int:
    """Bytes to and from HBM in one execution.

    Args:
      module: the program.
      where: the computation that the instruction is in.
      instruction: any; of one that calls others, other than a fusion, those are counted instead.
    """
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and instruction.attribute("custom_call_target") != _KERNEL:
        return 0
    operands = [where.instructions[name] for name in instruction.operands]
    if opcode in _SLICES:
        return 2 * _bytes(instruction)
    if opcode in ("dynamic-update-slice", "scatter"):
        return 2 * _bytes(operands[-1])
    if opcode == "copy-start":  # its result holds source and destination
        source = operands[0]
        return _bytes(source) + _bytes(instruction, 0)
    if opcode.endswith("-start"):
        return 2 * sum(map(_bytes, operands))
    if opcode != "fusion":
        return sum(map(_bytes, operands)) + _bytes(instruction)
    (name,) = instruction.calls("calls")
    inside = module.computations[name]
    read = sum(
        min(_bytes(operand), _read(module, inside, number))
        for number, operand in enumerate(operands)
    )
    written = _written(module, inside, inside.root)
    return read + sum(
        size for size, on_chip in zip(written, instruction.on_chip, strict=True) if not on_chip
    )


def _bytes(instruction: Instruction, number: int | None = None) -> int:
    """Bytes in HBM of a result, or of one of its arrays."""
    pairs = list(zip(instruction.shapes, instruction.on_chip, strict=True))
    chosen = pairs if number is None else pairs[number : number + 1]
    return sum(shape.bytes for shape, on_chip in chosen if not on_chip)


def _read(module: Module, inside: Computation, number: int) -> int:
    """Bytes that a fused computation reads of one of its parameters."""
    (parameter,) = (
        found
        for found in inside.instructions.values()
        if found.opcode == "parameter" and int(found.literal) == number
    )
    return _read_of(module, inside, parameter)


def _read_of(module: Module, inside: Computation, value: Instruction) -> int:
    """Bytes that are read of a value, at most all of them."""
    whole = sum(shape.bytes for shape in value.shapes)
    total = 0
    for user, place in _users(inside, value.name):
        if user.opcode in _SLICES and place == 0:
            total += sum(shape.bytes for shape in user.shapes)
        elif user.opcode == "dynamic-update-slice" and place == 0:
            continue  # in place
        elif user.opcode in _RENAMED:
            total += _read_of(module, inside, user)
        elif user.opcode == "fusion":
            (name,) = user.calls("calls")
            total += _read(module, module.computations[name], place)
        else:
            return whole
    return min(total, whole)


def _users(inside: Computation, name: str) -> Iterator[tuple[Instruction, int]]:
    """Who takes a value, and as which operand."""
    for instruction in inside.instructions.values():
        for place, operand in enumerate(instruction.operands):
            if operand == name:
                yield instruction, place


def _written(module: Module, inside: Computation, root: Instruction) -> list[int]:
    """Bytes that a fused computation writes, for every array of its result."""
    if root.opcode == "tuple":
        parts = (inside.instructions[name] for name in root.operands)
        return [size for part in parts for size in _written(module, inside, part)]
    if root.opcode == "dynamic-update-slice":
        update = inside.operand(root, 1)
        return [sum(shape.bytes for shape in update.shapes)]
    if root.opcode in _RENAMED:
        return _written(module, inside, inside.operand(root, 0))
    if root.opcode == "fusion":
        (name,) = root.calls("calls")
        nested = module.computations[name]
        return _written(module, nested, nested.root)
    return [shape.bytes for shape in root.shapes]
