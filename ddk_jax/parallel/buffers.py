"""Which parts of a program its temporaries belong to, from the compiler's buffer assignment.

Temporaries share one block of memory: what is not needed at the same time may lie at the same
place. So parts are not added up; of each it is said how many of the block's bytes it uses at some
time, and two parts that take turns may both use nearly all of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

REST = ""
"""Name of what is in none of the parts."""

_ALLOCATION = re.compile(r"allocation \d+: .*")
_VALUE = re.compile(
    r" value: <\d+ (\S+?)(?:\{[\d,]*\})?(?: \(\w+\))? @\d+> \(size=(\d+),offset=(\d+)\)"
)
_INSTRUCTION = re.compile(r'\s+(?:ROOT )?%(\S+) = .*metadata=\{.*?op_name="([^"]*)"')


def footprints(assignment: str, hlo: str, scopes: Sequence[str]) -> dict[str, int]:
    """Bytes of the temporaries that each scope uses at some time, and `REST` for all others.

    Args:
      assignment: the dump `*-buffer-assignment.txt`.
      hlo: the program; says which operation an instruction comes from.
      scopes: names given with `jax.named_scope`; the first that an operation is in counts.
    """
    named = filter(None, map(_INSTRUCTION.match, hlo.splitlines()))
    origin = {found[1]: found[2] for found in named}
    pieces: dict[str, list[tuple[int, int]]] = {scope: [] for scope in (*scopes, REST)}
    temporary = False
    for line in assignment.splitlines():
        if _ALLOCATION.match(line):
            temporary = "preallocated-temp" in line and "color" not in line
        elif temporary and (found := _VALUE.match(line)) and found[1] in origin:
            start, size = int(found[3]), int(found[2])
            pieces[_scope(origin[found[1]], scopes)].append((start, start + size))
    return {scope: _covered(ranges) for scope, ranges in pieces.items()}


def _scope(operation: str, scopes: Sequence[str]) -> str:
    """The first scope that is in a path such as `jit(step)/while/body/jvp(loss)/add`."""
    return next((s for s in scopes if re.search(rf"[(/]{s}[)/]", f"{operation}/")), REST)


def _covered(ranges: Iterable[tuple[int, int]]) -> int:
    """Size of the union of ranges."""
    total, end = 0, 0
    for start, stop in sorted(ranges):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
