"""What the compiler says of a program: memory, FLOPs, collectives; also for an absent TPU.

The TPU compiler is in the package `libtpu` and needs no TPU: a program whose arguments lie on the
devices of `topology("v5e:2x4")` compiles on any Linux machine, with the memory, the fusions and the
collectives that it would have there.
"""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, TypeAlias

import jax
from jax.experimental import topologies
from jax.experimental.compilation_cache.compilation_cache import reset_cache
from jax.extend.core import ClosedJaxpr, Jaxpr, jaxprs_in_params

from ddk_jax.parallel.buffers import footprints
from ddk_jax.parallel.work import Work, read_work

Level: TypeAlias = Literal["O0", "O1", "O2", "O3"]
_LEVELS: dict[Level, int] = {"O0": 9, "O1": 19, "O2": 29, "O3": 39}  # XLA's numbers for them

_LIBTPU_ENVIRONMENT = {
    # Several processes of one machine may compile at the same time.
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    # There is no TPU machine to ask for its name and neighbours, ...
    "TPU_SKIP_MDS_QUERY": "1",
    # ... and libtpu complains on stderr unless it is told some.
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int
    """Part of the outputs that takes the place of donated arguments."""
    temporary_bytes: int
    code_bytes: int
    peak_bytes: int
    """The most that is in use at one time, arguments and outputs included, by the compiler's own
    account. Gaps between the temporaries are not in it; on CPU no temporaries are."""

    @property
    def allocated_bytes(self) -> int:
        """What has to be free for the program to run: everything, gaps included."""
        given = self.argument_bytes + self.output_bytes - self.alias_bytes
        return given + self.temporary_bytes + self.code_bytes


@dataclass(frozen=True, kw_only=True)
class Program:
    """What the compiler says of one program, per device."""

    memory: Memory
    work: Work
    scopes: Mapping[str, int] = field(default_factory=dict)
    """Bytes of the temporaries by named scope, as from `buffers.footprints`, where asked for."""


class OutOfMemoryError(Exception):
    """The compiler finds that a program needs more memory than a device has."""

    def __init__(self, message: str, *, temporary_bytes: int | None, total_bytes: int | None):
        super().__init__(message)
        self.temporary_bytes = temporary_bytes
        """That the program needs beside its arguments, where the compiler says that."""
        self.total_bytes = total_bytes
        """That it needs in all, where the compiler says that."""


def topology(name: str) -> list[jax.Device]:
    """The devices of a TPU slice that need not exist, to compile for.

    Call it in a process that does not run on a TPU itself; on a TPU machine, in one that has
    JAX_PLATFORMS=cpu. libtpu reads its environment when it is loaded, and is told here that it is
    alone. Variables that are set already stay as they are.

    Args:
      name: generation and shape, such as `v5e:2x4`, `v5p:2x2x1` or `v6e:4x4`.

    Raises:
      ImportError: libtpu is not installed.
      ValueError: libtpu knows no such slice.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"compiling for {name} needs the TPU compiler, but no TPU: pip install libtpu "
            "(Linux, x86-64)"
        )
    for variable, value in _LIBTPU_ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    # The two cores of a v4 chip are one device, as they are by default in later generations.
    options = {"chip_config_name": "megacore"} if name.startswith("v4:") else {}
    try:
        if ":" not in name:  # libtpu has a default
            raise ValueError("no shape in it")
        return list(topologies.get_topology_desc(name, "tpu", **options).devices)
    except (ValueError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(
            f"libtpu has no topology {name!r}: name a generation and a shape, such as v5e:2x4, "
            f"v5p:2x2x1 or v6e:4x4 ({error})"
        ) from error


def compile_program(
    lowered: jax.stages.Lowered, *, level: Level = "O1", scopes: Sequence[str] = ()
) -> Program:
    """Compile for the devices that the arguments lie on, and read the result.

    Args:
      lowered: `jax.jit(function).lower(arguments)`; the arguments may be `jax.ShapeDtypeStruct`s
        with shardings on a mesh of `topology` devices.
      level: how hard the compiler tries. O1 takes a third to a fourth of the time of O2, with the
        same FLOPs and within about a tenth of the memory.
      scopes: names given with `jax.named_scope`, whose temporaries are told apart. On TPU.

    Raises:
      OutOfMemoryError: the program does not fit into the memory of the device.
      jax.errors.JaxRuntimeError: the compiler refuses for another reason.
    """
    options: dict[str, Any] = {"optimization_level": _LEVELS[level]}
    with TemporaryDirectory() as folder, _no_persistent_cache():
        # The text comes from the compiler's dump: `as_text` fails on some programs for v5p, whose
        # asynchronous instructions it cannot read back.
        options |= {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
        try:
            compiled = lowered.compile(compiler_options=options)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _out_of_memory(str(error)) from error
        text = _dumped(folder, "*after_codegen.txt")
        program = read_program(compiled, text)
        assignment = _dumped(folder, "*after_optimizations-buffer-assignment.txt")
        if not (scopes and text and assignment):
            return program
        return replace(program, scopes=footprints(assignment, text, scopes))


def _dumped(folder: str, pattern: str) -> str | None:
    """What the compiler has written of a program; None: nothing."""
    found = list(Path(folder).glob(pattern))
    return found[0].read_text("utf-8") if found else None


def _out_of_memory(message: str) -> OutOfMemoryError:
    """The sizes in the compiler's message, of which it has several."""

    def size(pattern: str) -> int | None:
        found = re.search(pattern, message)
        units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
        return int(float(found[1]) * units[found[2]]) if found else None

    return OutOfMemoryError(
        message,
        temporary_bytes=size(r"required for HLO temporaries \(([\d.]+)([KMGT]?)"),
        total_bytes=size(r"Used ([\d.]+)([KMGT]?)B? of "),
    )


def read_program(compiled: jax.stages.Compiled, text: str | None = None) -> Program:
    """What a compiled program needs and does.

    Args:
      compiled: of `jax.jit(function).lower(arguments).compile()`, for TPU or CPU.
      text: its HLO, if it is at hand.

    Raises:
      ValueError: the backend tells nothing of the program's memory.
    """
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("this backend tells nothing of a program's memory: compile for TPU or CPU")
    memory = Memory(
        argument_bytes=stats.argument_size_in_bytes,
        output_bytes=stats.output_size_in_bytes,
        alias_bytes=stats.alias_size_in_bytes,
        temporary_bytes=stats.temp_size_in_bytes,
        code_bytes=stats.generated_code_size_in_bytes,
        peak_bytes=stats.peak_memory_in_bytes,
    )
    return Program(memory=memory, work=read_work(text or compiled.as_text() or ""))


def jaxpr_flops(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """FLOPs of the matrix products that a function asks for, on all devices together.

    Before the compiler has removed or repeated anything: a check of `Work.flops` that also sees
    into Pallas kernels. Of a `cond` the costliest branch counts; a `while_loop` counts as one
    iteration, since its trip count is not in the jaxpr.

    Args:
      jaxpr: of `jax.make_jaxpr(function)(arguments)`.
    """
    return _flops(jaxpr, outside_kernels=True)


def kernel_flops(jaxpr: ClosedJaxpr | Jaxpr) -> int:
    """The part of `jaxpr_flops` that is in Pallas kernels, which `Work.flops` does not see.

    Every block of a kernel's grid counts, also those that it skips, as under a causal mask.

    Args:
      jaxpr: as for `jaxpr_flops`.
    """
    return _flops(jaxpr, outside_kernels=False)


def _flops(jaxpr: ClosedJaxpr | Jaxpr, *, outside_kernels: bool) -> int:
    total = 0
    for equation in jaxpr.eqns:
        params, name = equation.params, equation.primitive.name
        counted = outside_kernels or name == "pallas_call"
        inner = [_flops(sub, outside_kernels=counted) for sub in jaxprs_in_params(params)]
        match name:
            case "dot_general":
                if outside_kernels:
                    total += _product_flops(equation)
            case "scan":
                total += params["length"] * sum(inner)
            case "cond":
                total += max(inner)
            case "shard_map":
                shards = (params["mesh"].shape[axis] for axis in params["newly_manual_axes"])
                total += math.prod(shards) * sum(inner)
            case "pallas_call":
                total += math.prod(params["grid_mapping"].grid) * sum(inner)
            case _:
                total += sum(inner)
    return total


def _product_flops(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left, result = (_dims(x) for x in (equation.invars[0], equation.outvars[0]))
    return 2 * math.prod(result) * math.prod(left[axis] for axis in contracted)


def _dims(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


@contextmanager
def _no_persistent_cache() -> Iterator[None]:
    """Compile afresh: a cached program has no dump, and one for absent devices cannot be loaded."""
    enabled = jax.config.values["jax_enable_compilation_cache"]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # which makes jax look at the setting again
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", enabled)
        reset_cache()
