"""From the name of a slice to its chip and its devices."""

from __future__ import annotations

import difflib
import re

import jax

from ddk_jax.errors import UserError
from ddk_jax.parallel.chips import CHIPS, Chip, Slice, known_slices
from ddk_jax.parallel.compiled import topology

_NAME = re.compile(r"(\w+):(\d+(?:x\d+){1,2})")


def find_slice(name: str) -> Slice:
    """The slice of that name.

    Args:
      name: generation and shape, such as `v5e:4x4`.

    Raises:
      UserError: there is no such generation, or the name has no shape.
    """
    found = _NAME.fullmatch(name)
    if found is None or found[1] not in CHIPS:
        raise UserError(f"--topology {name}: {_advice(name)}")
    return Slice(CHIPS[found[1]], tuple(map(int, found[2].split("x"))))


def open_slice(name: str) -> tuple[Chip, tuple[jax.Device, ...]]:
    """The chip of a slice, and devices to compile for. No accelerator is touched.

    Raises:
      UserError: there is no such slice, or libtpu is not installed.
    """
    found = find_slice(name)
    jax.config.update("jax_platforms", "cpu")  # whatever this machine has: it stays free
    try:
        return found.chip, tuple(topology(found.name))
    except ImportError as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        raise UserError(f"--topology {name}: {_advice(name)} ({error})") from error


def _advice(name: str) -> str:
    names = [known.name for known in known_slices()]
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    return f"no such slice: {hint}`ddk plan --list` lists them"


def slice_table() -> str:
    """Every slice that is sold: chips, memory, peak."""
    lines = [f"{'topology':<12}{'chips':>6}{'HBM per chip':>16}{'HBM in all':>14}{'bf16 peak':>16}"]
    for known in known_slices():
        memory = known.chip.hbm_bytes / 2**30
        peak = known.chips * known.chip.bf16_flops / 1e15
        lines.append(
            f"{known.name:<12}{known.chips:>6}{memory:>12.2f} GiB{known.chips * memory:>10.0f} GiB"
            f"{peak:>10.2f} PFLOP/s"
        )
    lines += [
        "",
        "Memory is what libtpu lets a program have. Other shapes that it knows can be named too.",
    ]
    return "\n".join(lines)
