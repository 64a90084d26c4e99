"""Time and memory of every loss: value, and gradients of the hidden states and the head.

    python benchmarks/losses.py                    # on the CPU, all losses
    python benchmarks/losses.py --losses forward_kl,bild --repeats 15 --markdown
    python benchmarks/losses.py --tpu v5e:1x1      # compiled and not run; needs no TPU

On the CPU three ways are compared in one run: `chunked`, this package's; `dense`, the same loss in
jax with all logits at once and ordinary differentiation; and `torch` (`torch_losses.py`), eager and
on as many threads. They have to agree before any time is taken.

Legend: N tokens, V vocabulary, E and F hidden size of student and teacher.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from ddk_jax.losses.chunked import ChunkPlan, LossInputs, chunked_objective, sharded_objective
from ddk_jax.losses.divergences import ChunkView
from ddk_jax.losses.objective import LOSSES, METRICS, PROMPT, WeightedTerm, make_term
from ddk_jax.losses.targets import Head, TeacherTargets
from ddk_jax.parallel.compiled import Program, compile_program, read_program, topology
from ddk_jax.parallel.mesh import DATA_AXES, VOCAB_AXIS, make_mesh

MIB = 2**20
HAS_TORCH = importlib.util.find_spec("torch") is not None
CAN_RESET_PEAK = Path("/proc/self/clear_refs").exists()


@dataclass(frozen=True, kw_only=True)
class Options:
    """Compare losses on this CPU, or ask the TPU compiler about them."""

    losses: str = ""
    """Names as in the tables, with commas between them; default: all that have a gradient."""
    tokens: int = 2048
    """Tokens of the batch."""
    hidden: int = 256
    """Hidden size of the student."""
    teacher_hidden: int = 512
    """Hidden size of the teacher."""
    vocab: int = 32_000
    """Columns of both heads."""
    chunk: int = 1024
    """Tokens whose logits our machinery makes at one time."""
    repeats: int = 5
    """Timed calls of each way; they take turns."""
    json: Path | None = None
    """Write every single measurement to this file as well."""
    markdown: bool = False
    """Print the tables in Markdown, ratios in the place of times."""
    tpu: str = ""
    """Compile for an absent TPU slice such as v5e:1x1 instead, at the size of DDK's largest pair
    (8,192 tokens, hidden sizes 2,048 and 5,120, 151,936 entries, bfloat16), and run nothing. Of the
    other options only the losses, the chunk and the output are looked at."""


class Sizes(NamedTuple):
    """Of one problem."""

    tokens: int
    student: int
    teacher: int
    vocab: int
    chunk: int


PAPER = Sizes(tokens=8192, student=2048, teacher=5120, vocab=151_936, chunk=1024)


class Case(NamedTuple):
    """A loss, with settings other than its defaults or without."""

    loss: str
    settings: tuple[tuple[str, int], ...] = ()

    @property
    def title(self) -> str:
        """As the tables have it."""
        return " ".join([self.loss, *(f"{key}={value}" for key, value in self.settings)])

    @property
    def term(self) -> WeightedTerm:
        """For an objective."""
        return make_term(self.loss, settings=dict(self.settings))


def cases(names: str) -> list[Case]:
    """What to measure for `--losses`. Losses that sort the vocabulary are there twice.

    Raises:
      ValueError: a name that is none of ours.
    """
    without = (*METRICS, "clipped_excess")  # which have no gradient
    gradients = [name for name in LOSSES if name not in without]
    sorting = [name for name in gradients if "candidates" in LOSSES[name].settings]
    known = [Case(name) for name in gradients]
    known += [Case(name, (("candidates", 64),)) for name in sorting]
    by_title = {case.title: case for case in known}
    wanted = names.split(",") if names else list(by_title)
    for name in wanted:
        if name not in by_title:
            raise ValueError(f"--losses: {name!r} is none of: {', '.join(by_title)}")
    return [by_title[name] for name in wanted]


class Problem(NamedTuple):
    """What a loss is taken of, in float32; logits have a standard deviation of 3."""

    hidden: Float[np.ndarray, "1 N E"]
    kernel: Float[np.ndarray, "E V"]
    teacher_hidden: Float[np.ndarray, "1 N F"]
    teacher_kernel: Float[np.ndarray, "F V"]
    labels: Int[np.ndarray, "1 N"]


def make_problem(sizes: Sizes) -> Problem:
    """The same random numbers every time."""
    rng = np.random.default_rng(0)

    def normal(*shape: int, scale: float = 1.0) -> np.ndarray:
        return scale * rng.standard_normal(shape, np.float32)

    N, E, F, V, _ = sizes
    return Problem(
        hidden=normal(1, N, E),
        kernel=normal(E, V, scale=3 / E**0.5),
        teacher_hidden=normal(1, N, F),
        teacher_kernel=normal(F, V, scale=3 / F**0.5),
        labels=rng.integers(0, V, (1, N), np.int32),
    )


class Answer(NamedTuple):
    """Mean nats per token, and its gradients."""

    value: float
    hidden: Float[np.ndarray, "1 N E"]
    kernel: Float[np.ndarray, "E V"]


class Prepared(NamedTuple):
    """A way that is ready to be timed."""

    run: Callable[[], Any]
    """Returns when the result is there."""
    answer: Callable[[Any], Answer]
    """What the result says."""
    compiled_bytes: int | None = None
    """Temporary memory and results, by the compiler's account."""


def chunked_loss(
    hidden: Array,
    kernel: Array,
    teacher_hidden: Array,
    teacher_kernel: Array,
    labels: Array,
    *,
    term: WeightedTerm,
    chunk: int,
) -> Float[Array, ""]:
    """Mean nats per token, by the package's machinery."""
    teacher = TeacherTargets((teacher_hidden,), (Head(teacher_kernel),))
    inputs = LossInputs(
        teacher=teacher if term.needs_teacher else None,
        labels=labels,
        role=jnp.full_like(labels, PROMPT),
        draw=jnp.arange(labels.size, dtype=jnp.uint32).reshape(labels.shape),
        scale=jnp.full((1, *labels.shape), 1 / labels.size, jnp.float32),
        temperature=jnp.ones(1, jnp.float32),
    )
    return chunked_objective(hidden, Head(kernel), inputs, (term,), ChunkPlan(tokens=chunk))[0]


def dense_loss(
    hidden: Array,
    kernel: Array,
    teacher_hidden: Array,
    teacher_kernel: Array,
    labels: Array,
    *,
    term: WeightedTerm,
) -> Float[Array, ""]:
    """The same of all logits at once, for jax to differentiate."""
    teacher = jax.lax.stop_gradient(teacher_hidden[0] @ teacher_kernel)
    view = ChunkView(
        student_logits=hidden[0] @ kernel,
        teacher_logits=teacher if term.needs_teacher else None,
        labels=labels[0],
        role=jnp.full_like(labels[0], PROMPT),
        draw=jnp.arange(labels.size, dtype=jnp.uint32),
    )
    return jnp.mean(term.nats(view, jnp.float32(1)))


def prepare_jax(way: str, case: Case, problem: Problem, chunk: int) -> Prepared:
    """Compile `chunked` or `dense`."""
    function: Callable[..., Array] = partial(dense_loss, term=case.term)
    if way == "chunked":
        function = partial(chunked_loss, term=case.term, chunk=chunk)
    arrays = jax.device_put(problem)
    compiled = jax.jit(jax.value_and_grad(function, (0, 1))).lower(*arrays).compile()
    memory = read_program(compiled).memory

    def answer(result: Any) -> Answer:
        value, (d_hidden, d_kernel) = result
        return Answer(float(value), np.asarray(d_hidden), np.asarray(d_kernel))

    return Prepared(
        run=lambda: jax.block_until_ready(compiled(*arrays)),
        answer=answer,
        compiled_bytes=memory.temporary_bytes + memory.output_bytes,
    )


def prepare_torch(case: Case, problem: Problem) -> Prepared:
    """Weights as `torch.nn.Linear` has them, the teacher without gradients."""
    import torch
    import torch_losses

    torch.set_num_threads(num_threads())
    nats = torch_losses.LOSSES[case.loss]
    hidden, teacher_hidden = (
        torch.from_numpy(x[0].copy()) for x in (problem.hidden, problem.teacher_hidden)
    )
    weight, teacher_weight = (
        torch.from_numpy(x.T.copy()) for x in (problem.kernel, problem.teacher_kernel)
    )
    labels = torch.from_numpy(problem.labels[0].astype(np.int64))
    learned = [hidden.requires_grad_(), weight.requires_grad_()]

    def run() -> Any:
        with torch.no_grad():
            teacher = None
            if case.term.needs_teacher:
                teacher = torch.nn.functional.linear(teacher_hidden, teacher_weight)
        student = torch.nn.functional.linear(hidden, weight)
        value = nats(student, teacher, labels).mean()
        return value.detach(), torch.autograd.grad(value, learned)

    def answer(result: Any) -> Answer:
        value, (d_hidden, d_weight) = result
        return Answer(float(value), d_hidden.numpy()[None], d_weight.numpy().T)

    return Prepared(run, answer)


def prepare(way: str, case: Case, problem: Problem, chunk: int) -> Prepared:
    """One of the three ways, ready to run."""
    if way == "torch":
        return prepare_torch(case, problem)
    return prepare_jax(way, case, problem, chunk)


def ways_of(case: Case) -> list[str]:
    """The ways that there are; torch has the default settings only, and nothing random."""
    natural = not case.settings and not case.loss.startswith("sampled")
    return ["chunked", "dense", *(["torch"] if HAS_TORCH and natural else [])]


def num_threads() -> int:
    """As many as XLA takes for itself."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def on_cpu() -> None:
    """Whatever else there is; call it before the first array."""
    jax.config.update("jax_platforms", "cpu")


# Measurements


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One loss; everything by way."""

    case: Case
    seconds: dict[str, list[float]] = field(default_factory=dict)
    """Of every repetition; the n-th ones of all ways were taken one after another."""
    compiled_bytes: dict[str, int] = field(default_factory=dict)
    """Temporary memory and results, by the compiler's account; of jax."""
    peak_bytes: dict[str, int] = field(default_factory=dict)
    """By how much a process of its own grows in one call, at the most."""

    def ratio(self, other: str) -> tuple[float, float, float]:
        """Time of `chunked` over that of another way: median, and first and third quartile."""
        pairs = zip(self.seconds["chunked"], self.seconds[other], strict=True)
        low, middle, high = np.percentile([a / b for a, b in pairs], [25, 50, 75])
        return float(middle), float(low), float(high)


def check(case: Case, answers: dict[str, Answer]) -> None:
    """That all ways agree with the first one.

    A gradient may be further off: two entries at the border of a top-p may change places, and what
    is drawn at random may be another entry, when a logit is rounded otherwise.

    Raises:
      ValueError: values differ by more than 1e-4, absolute or relative, or gradients by more than
        1e-2 of their norm.
    """
    (first, ours), *others = answers.items()
    for way, theirs in others:
        if not abs(ours.value - theirs.value) <= 1e-4 * max(1.0, abs(ours.value)):
            raise ValueError(
                f"{case.title}: {first} gives {ours.value}, {way} gives {theirs.value}"
            )
        for which in ("hidden", "kernel"):
            a, b = getattr(ours, which), getattr(theirs, which)
            gap = float(np.linalg.norm(a - b) / np.linalg.norm(a))
            if not gap <= 1e-2:
                raise ValueError(
                    f"{case.title}: gradients ({which}) of {first} and {way} differ by {gap:.1e}"
                )


def measure(case: Case, problem: Problem, chunk: int, repeats: int) -> Measured:
    """Check all ways against each other, then time them in turn.

    Raises:
      ValueError: they do not agree.
    """
    ways = ways_of(case)
    prepared = {way: prepare(way, case, problem, chunk) for way in ways}
    check(case, {way: p.answer(p.run()) for way, p in prepared.items()})
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(repeats):
        first = turn % len(ways)
        for way in ways[first:] + ways[:first]:
            start = time.perf_counter()
            result = prepared[way].run()
            seconds[way].append(time.perf_counter() - start)
            del result  # before the next one begins
    compiled = {way: p.compiled_bytes for way, p in prepared.items()}
    return Measured(
        case=case,
        seconds=seconds,
        compiled_bytes={way: size for way, size in compiled.items() if size is not None},
    )


def peak_growth(way: str, case: Case, sizes: Sizes) -> int:
    """Bytes that this process grows by in one call, at the most. For a fresh process, on Linux.

    The inputs, the program and what libraries set up in their first call are there before. The peak
    is the kernel's, set back first. It is read from /proc: `getrusage` has the same figure, but
    begins with the peak of the process that started this one.
    """
    on_cpu()
    small = sizes._replace(tokens=8, chunk=8)
    warm = prepare(way, case, make_problem(small), small.chunk)
    warm.run()
    run = prepare(way, case, make_problem(sizes), sizes.chunk).run
    del warm
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    before = resident_bytes("VmRSS")
    result = run()
    peak = resident_bytes("VmHWM")
    del result
    return peak - before


def resident_bytes(key: str) -> int:
    """VmRSS, resident now, or VmHWM, at the most."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    (found,) = (line for line in lines if line.startswith(f"{key}:"))
    return int(found.split()[1]) * 1024


def measure_all(wanted: Sequence[Case], sizes: Sizes, repeats: int) -> Iterator[Measured]:
    """Every loss in turn; memory in processes of their own, while nothing is timed."""
    problem = make_problem(sizes)
    fresh = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=fresh, max_tasks_per_child=1) as processes:
        for case in wanted:
            found = measure(case, problem, sizes.chunk, repeats)
            if CAN_RESET_PEAK:
                for way in ways_of(case):
                    grown = processes.submit(peak_growth, way, case, sizes)
                    found.peak_bytes[way] = grown.result()
            yield found


# The TPU compiler


class Compiled(NamedTuple):
    """What the compiler says of one loss, with logits kept in float32 and in bfloat16."""

    case: Case
    temporary_bytes: dict[str, int | None]
    """On one chip; None: the program does not fit."""
    flops: dict[str, float | None]
    """Of all chips, over those of the products that the mathematics asks for."""


def compile_loss(case: Case, slice_name: str, sizes: Sizes) -> Compiled:
    """Compile value and gradients at level O1; the chips share the tokens."""
    temporary: dict[str, int | None] = {}
    flops: dict[str, float | None] = {}
    # Both models' logits, and for the student's gradients two products more.
    widths = (sizes.teacher if case.term.needs_teacher else 0) + 3 * sizes.student
    needed = 2 * sizes.tokens * sizes.vocab * widths
    mesh = make_mesh(devices=topology(slice_name))
    for kept in ("float32", "bfloat16"):
        plan = ChunkPlan(tokens=sizes.chunk, round_logits=kept == "bfloat16")
        try:
            program = tpu_program(case.term, mesh, plan, sizes)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            temporary[kept] = flops[kept] = None
        else:
            temporary[kept] = program.memory.temporary_bytes
            flops[kept] = program.work.flops * mesh.size / needed
    return Compiled(case, temporary, flops)


def tpu_program(
    term: WeightedTerm, mesh: jax.sharding.Mesh, plan: ChunkPlan, sizes: Sizes
) -> Program:
    """Value and gradients in bfloat16, of at least 8 rows."""
    B = max(8, mesh.size)
    T = sizes.tokens // B
    rows, by_row = PartitionSpec(DATA_AXES), PartitionSpec(None, DATA_AXES)
    everywhere = PartitionSpec()

    def array(spec: PartitionSpec, dtype: Any, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    teacher = TeacherTargets(
        hidden=(array(rows, jnp.bfloat16, B, T, sizes.teacher),),
        heads=(Head(array(everywhere, jnp.bfloat16, sizes.teacher, sizes.vocab)),),
    )
    inputs = LossInputs(
        teacher=teacher if term.needs_teacher else None,
        labels=array(rows, jnp.int32, B, T),
        role=array(rows, jnp.int32, B, T),
        draw=array(rows, jnp.uint32, B, T),
        scale=array(by_row, jnp.float32, 1, B, T),
        temperature=array(everywhere, jnp.float32, 1),
    )

    def loss(hidden: Array, kernel: Array, inputs: LossInputs) -> Any:
        axes: Any = {"mesh": mesh, "data_axes": DATA_AXES, "vocab_axis": VOCAB_AXIS}
        return sharded_objective(hidden, Head(kernel), inputs, (term,), plan, **axes)

    out = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), ((everywhere, by_row), (rows, everywhere))
    )
    function = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True), out_shardings=out)
    hidden = array(rows, jnp.bfloat16, B, T, sizes.student)
    kernel = array(everywhere, jnp.bfloat16, sizes.student, sizes.vocab)
    return compile_program(function.lower(hidden, kernel, inputs))


# What is printed


def cpu_table(rows: Sequence[Measured], *, times: bool) -> list[list[str]]:
    """Head and rows. Ratios are `chunked` over the other way: below 1 we are better."""
    ways = ["chunked", "dense", *(["torch"] if any("torch" in r.seconds for r in rows) else [])]
    peaks = ways if any(row.peak_bytes for row in rows) else []
    head = ["loss"]
    head += [f"{way} ms" for way in ways] if times else []
    head += [f"time / {way}" for way in ways[1:]]
    head += [f"compiled MiB, {way}" for way in ways[:2]]
    head += [f"peak MiB, {way}" for way in peaks]
    table = [head]
    for row in rows:
        cells = [row.case.title]
        if times:
            cells += [number(np.median(row.seconds.get(w, np.nan)) * 1e3) for w in ways]
        for way in ways[1:]:
            middle, low, high = row.ratio(way) if way in row.seconds else (np.nan,) * 3
            cells.append(f"{middle:.2f} ({low:.2f}-{high:.2f})" if middle == middle else "")
        cells += [number(row.compiled_bytes.get(way, np.nan) / MIB) for way in ways[:2]]
        cells += [number(row.peak_bytes.get(way, np.nan) / MIB) for way in peaks]
        table.append(cells)
    return table


def number(value: float) -> str:
    """Without decimals; nothing where there is none."""
    return "" if np.isnan(value) else f"{value:.0f}"


def tpu_table(rows: Sequence[Compiled]) -> list[list[str]]:
    """Head and rows."""
    kinds = ("float32", "bfloat16")
    table = [["loss", *(f"{what}, {k}" for k in kinds for what in ("MiB", "FLOPs / minimum"))]]
    for row in rows:
        cells = [row.case.title]
        for kind in kinds:
            size, flops = row.temporary_bytes[kind], row.flops[kind]
            cells.append("does not fit" if size is None else f"{size / MIB:.0f}")
            cells.append("" if flops is None else f"{flops:.3f}")
        table.append(cells)
    return table


def rendered(table: Sequence[Sequence[str]], *, markdown: bool) -> str:
    """The table as text; numbers to the right."""
    if markdown:
        rule = ["---", *("---:" for _ in table[0][1:])]
        return "\n".join(f"| {' | '.join(row)} |" for row in [table[0], rule, *table[1:]])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in table
    )


def setting(options: Options) -> dict[str, Any]:
    """What the figures depend on."""
    import jaxlib

    found = {"python": platform.python_version(), "jax": jax.__version__}
    found |= {"jaxlib": jaxlib.__version__}
    if hasattr(os, "getloadavg"):  # a machine that others use gives ratios that are less sure
        found |= {"load": round(os.getloadavg()[0], 1)}
    if HAS_TORCH and not options.tpu:
        import torch

        found |= {"torch": torch.__version__}
    return found | {"machine": platform.machine(), "threads": num_threads()}


def save(options: Options, found: dict[str, Any], rows: Sequence[Any]) -> None:
    """Everything that was measured, as JSON, if it was asked for."""
    if options.json is None:
        return
    asked = {key: value for key, value in vars(options).items() if key not in ("json", "markdown")}
    losses = {row.case.title: {k: v for k, v in fields(row).items() if k != "case"} for row in rows}
    text = json.dumps({"options": asked, "setting": found, "losses": losses}, indent=1)
    options.json.write_text(text + "\n", encoding="utf-8")


def fields(row: Measured | Compiled) -> dict[str, Any]:
    """The values of a row, by name."""
    return row._asdict() if isinstance(row, Compiled) else dict(vars(row))


def collected(rows: Iterator[Any], count: int) -> list[Any]:
    """All rows, with a word about each on stderr as it comes."""
    done = []
    for row in rows:
        done.append(row)
        print(f"{len(done)} of {count}: {row.case.title}", file=sys.stderr)
    return done


def main(options: Options) -> None:
    """Measure, print, save.

    Raises:
      ValueError: an option that cannot be meant; or the ways do not agree.
      ImportError: libtpu is needed and not installed.
    """
    on_cpu()
    wanted, found = cases(options.losses), setting(options)
    if options.tpu:
        made = (compile_loss(c, options.tpu, PAPER._replace(chunk=options.chunk)) for c in wanted)
        compiled = collected(made, len(wanted))
        print(rendered(tpu_table(compiled), markdown=options.markdown))
        save(options, found, compiled)
        return
    if not HAS_TORCH:
        print("torch is not installed (it is in the extra `test`): no columns for it")
    if not CAN_RESET_PEAK:
        print("the peak of a process can be read on Linux only: no columns for it")
    sizes = Sizes(
        options.tokens, options.hidden, options.teacher_hidden, options.vocab, options.chunk
    )
    rows = collected(measure_all(wanted, sizes, options.repeats), len(wanted))
    print(", ".join(f"{key} {value}" for key, value in found.items()))
    print("Ratios: chunked over the other way, median of repetitions (first to third quartile).")
    print(rendered(cpu_table(rows, times=not options.markdown), markdown=options.markdown))
    save(options, found, rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except (ValueError, ImportError) as error:
        sys.exit(str(error))
