"""What the compiler makes of the whole train step: collectives, memory, FLOPs, donation, transfers.

Programs for TPU slices are compiled at level O1 and not run; those for the simulated devices are.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from quick import QUICK

from ddk_jax.config import OptimConfig
from ddk_jax.losses.chunked import ChunkPlan
from ddk_jax.losses.objective import Objective, make_term
from ddk_jax.models.decoder import Decoder, num_parameters
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.compiled import Program, compile_program, read_program, topology
from ddk_jax.parallel.mesh import DATA_AXES, make_mesh, param_shardings
from ddk_jax.training.micro import Frozen, MicroLoss, Teachers
from ddk_jax.training.optimizer import make_optimizer
from ddk_jax.training.state import Batch, TrainState, initial_state, state_shardings
from ddk_jax.training.step import TrainStep, make_train_step

GIB = 2**30
DDK: Objective = (make_term("cross_entropy"), make_term("forward_kl", weight=0.2))


class Run(NamedTuple):
    """Shapes of a run."""

    student: ModelSpec
    teacher: ModelSpec | None
    rows: int
    tokens: int
    micro_rows: int
    dtype: Any = jnp.bfloat16
    chunk: int = 2048
    round_logits: bool = False


class Step(NamedTuple):
    """A train step and the shapes of what it is called with."""

    function: TrainStep
    state: TrainState
    frozen: Frozen
    batch: Batch

    @property
    def lowered(self) -> Any:
        # Libraries of kernels promote types and ranks as they please.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return self.function.lower(self.state, self.frozen, self.batch)  # type: ignore[attr-defined]


def placed(shape: Any, sharding: Any, dtype: Any = None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, dtype or shape.dtype, sharding=sharding)


def step_of(run: Run, mesh: Mesh) -> Step:
    """The step of a run with float32 student, teacher in the compute type, and full remat."""
    student = Decoder(spec=run.student, dtype=run.dtype, remat="full", mesh=mesh)
    frozen, teachers = Frozen((), {}), None
    if run.teacher is not None:
        teacher = Decoder(spec=run.teacher, dtype=run.dtype, mesh=mesh)
        places = param_shardings(mesh, teacher.logical_axes(), teacher.abstract())
        params = jax.tree.map(lambda x, s: placed(x, s, run.dtype), teacher.abstract(), places)
        frozen, teachers = Frozen((params,), {}), Teachers((teacher,), np.ones((2, 1)))
    loss = MicroLoss(
        student=student,
        teachers=teachers,
        objective=DDK if teachers else DDK[:1],
        plan=ChunkPlan(tokens=run.chunk, round_logits=run.round_logits),
        mesh=mesh,
    )
    optimizer = make_optimizer(OptimConfig(), 100, student.logical_axes())
    abstract = jax.eval_shape(lambda p: initial_state(p, {}, optimizer), student.abstract())
    shardings = state_shardings(mesh, abstract, student.logical_axes())
    function = make_train_step(
        loss, optimizer, mesh, num_domains=2, seed=0, state_shardings=shardings
    )
    by_row = NamedSharding(mesh, PartitionSpec(None, DATA_AXES))

    def ids(*more: int) -> Any:
        shape = (run.rows // run.micro_rows, run.micro_rows, *more)
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row)

    tokens = ids(run.tokens + 1)
    batch = Batch(tokens, tokens, tokens, ids())
    return Step(function, jax.tree.map(placed, abstract, shardings), frozen, batch)


def state_bytes(state: TrainState) -> int:
    """On one device."""
    leaves = jax.tree.leaves(state)
    shards = ((math.prod(x.sharding.shard_shape(x.shape)), x.dtype.itemsize) for x in leaves)
    return sum(size * itemsize for size, itemsize in shards)


# On simulated devices

V = 2048
OURS = ModelSpec(
    vocab_size=V, hidden_size=16, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=16
)
THEIRS = ModelSpec(
    vocab_size=V,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    num_kv_heads=4,
    ffn_size=32,
    tied_head=False,
)
LITTLE = Run(OURS, THEIRS, rows=32, tokens=256, micro_rows=16, dtype=jnp.float32, chunk=64)


@pytest.fixture(scope="module")
def little() -> Step:
    return step_of(LITTLE, make_mesh(1, 4, 2))


class Compiled(NamedTuple):
    """What came of compiling a step."""

    program: Program
    text: str
    complaints: str
    """What XLA wrote to stderr."""


@pytest.fixture(scope="module")
def compiled(little: Step) -> Compiled:
    lowered, stderr = little.lowered, os.dup(2)
    with TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        try:
            made = lowered.compile(compiler_options=QUICK)
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
        said.seek(0)
        text = made.as_text()
        return Compiled(read_program(made, text), text, said.read().decode())


def gathers_of_columns(program: Program, vocab_size: int) -> int:
    """Executions of all-gathers of arrays with a number for every token of the vocabulary."""
    sizes = program.work.collectives["all-gather"].sizes
    return sum(n for shape, n in sizes.items() if {vocab_size, vocab_size // 2} & set(shape.dims))


@pytest.mark.slow
def test_heads_are_gathered_once_and_the_batch_nowhere(compiled: Compiled) -> None:
    """There are two micro-batches. The third gather is of the gradient of the table, whose columns
    the tensor axis shares as a head, but not as a table."""
    found = compiled.program.work
    assert found.unknown_loops == 0
    assert gathers_of_columns(compiled.program, V) == 3
    of_batch = LITTLE.micro_rows * LITTLE.tokens * OURS.hidden_size
    assert found.collectives["all-gather"].largest.size < of_batch
    assert found.collectives["all-reduce"].largest.size < of_batch


@pytest.mark.slow
def test_the_partitioner_never_gives_up(compiled: Compiled) -> None:
    """It says so where it makes an array whole on all devices, to cut it anew."""
    assert "ematerialization" not in compiled.complaints


@pytest.mark.slow
def test_the_state_takes_the_place_of_the_one_before(little: Step, compiled: Compiled) -> None:
    assert compiled.program.memory.alias_bytes == state_bytes(little.state)


@pytest.mark.slow
def test_nothing_is_sent_to_the_host(compiled: Compiled) -> None:
    for opcode in ("infeed", "outfeed", "send", "recv"):
        assert f" {opcode}(" not in compiled.text
    assert not [name for name in compiled.program.work.custom_calls if "callback" in name]


def test_parameters_and_moments_are_shared_out(little: Step) -> None:
    """Each of four devices of `fsdp` holds a fourth, and where `tensor` shares too, an eighth."""
    whole = 3 * 4 * num_parameters(OURS)
    assert state_bytes(little.state) < 0.26 * whole


@pytest.mark.slow
def test_axes_of_one_device_cost_nothing() -> None:
    alone = step_of(LITTLE, make_mesh(devices=jax.devices()[:1])).lowered
    assert not read_program(alone.compile(compiler_options=QUICK)).work.collectives
    by_rows = step_of(LITTLE, make_mesh(8, 1, 1)).lowered.compile(compiler_options=QUICK)
    found = dict(read_program(by_rows).work.collectives)
    gradients = 4 * (num_parameters(OURS) + V * OURS.hidden_size)  # as a table, and as a head
    assert found.pop("all-reduce").bytes < 2 * 1.01 * gradients
    assert found.pop("all-gather").largest.size == LITTLE.rows  # their domains
    assert not found


@pytest.mark.slow
def test_a_step_is_compiled_once(devices: list[jax.Device]) -> None:
    """The state that comes back has the types and the places of the one that went in."""
    ours, theirs = replace(OURS, vocab_size=32), replace(THEIRS, vocab_size=32)
    run = LITTLE._replace(student=ours, teacher=theirs, rows=4, micro_rows=4, tokens=8)
    made = step_of(run, make_mesh(1, 2, 1, devices=devices[:2]))

    def ones(leaf: Any) -> Any:
        return jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding)

    state, frozen, batch = (jax.tree.map(ones, part) for part in made[1:])
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, _ = made.function(state, frozen, batch)
    assert made.function._cache_size() == 1  # type: ignore[attr-defined]


# On TPUs

SMALL = Run(
    student=ModelSpec(
        vocab_size=8192, hidden_size=256, num_layers=4, num_heads=4, num_kv_heads=2, ffn_size=512
    ),
    teacher=ModelSpec(
        vocab_size=8192,
        hidden_size=512,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        ffn_size=1024,
        tied_head=False,
    ),
    rows=128,
    tokens=512,
    micro_rows=64,
    chunk=1024,
)
SMOLLM2 = Run(
    student=ModelSpec(
        vocab_size=49152, hidden_size=576, num_layers=30, num_heads=9, num_kv_heads=3, ffn_size=1536
    ),
    teacher=ModelSpec(
        vocab_size=49152,
        hidden_size=960,
        num_layers=32,
        num_heads=15,
        num_kv_heads=5,
        ffn_size=2560,
    ),
    rows=8,
    tokens=2048,
    micro_rows=8,
    round_logits=True,
)
"""360M -> 135M."""


def matrices(spec: ModelSpec) -> int:
    """Weights in the matrices of all layers."""
    width = spec.head_width * (2 * spec.num_heads + 2 * spec.num_kv_heads)
    return spec.num_layers * spec.hidden_size * (width + 3 * spec.ffn_size)


def flops(run: Run) -> int:
    """Of all products but the attention's: what the mathematics asks for, and the student's layers
    once more, up to the last product of each, which nothing recomputed depends on."""
    ours, theirs = run.student, run.teacher
    last = ours.num_layers * ours.hidden_size * ours.ffn_size
    a_token = 8 * matrices(ours) - 2 * last + 6 * ours.hidden_size * ours.vocab_size
    if theirs is not None:
        a_token += 2 * matrices(theirs) + 2 * theirs.hidden_size * theirs.vocab_size
    return run.rows * run.tokens * a_token


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("sizes", [(1, 8, 1), (1, 4, 2)], ids=["fsdp", "fsdp and tensor"])
def test_a_slice(sizes: tuple[int, int, int], capfd: pytest.CaptureFixture[str]) -> None:
    """Each chip does its part; heads are gathered once for two micro-batches, the batch nowhere."""
    mesh = make_mesh(*sizes, devices=topology("v5e:2x4"))
    step = step_of(SMALL, mesh)
    program = compile_program(step.lowered)
    assert "ematerialization" not in capfd.readouterr().err
    assert program.work.unknown_loops == 0
    assert program.work.flops * mesh.size <= 1.01 * flops(SMALL)
    assert program.memory.alias_bytes >= state_bytes(step.state)
    ours = SMALL.student
    assert gathers_of_columns(program, ours.vocab_size) == (2 if sizes[2] == 1 else 3)
    of_batch = SMALL.micro_rows * SMALL.tokens * ours.hidden_size
    for kind in ("all-gather", "all-reduce"):
        assert program.work.collectives[kind].largest.size < of_batch


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_a_teacher_costs_its_weights_and_no_activations() -> None:
    """8 x 2,048 tokens on one v5e: at most 4.0 GiB."""
    mesh = make_mesh(devices=topology("v5e:1x1"))
    step = step_of(SMOLLM2, mesh)
    with_teacher = compile_program(step.lowered)
    assert with_teacher.memory.peak_bytes <= 4.0 * GIB
    assert with_teacher.work.flops <= 1.01 * flops(SMOLLM2)
    alone = compile_program(step_of(SMOLLM2._replace(teacher=None), mesh).lowered)
    assert SMOLLM2.teacher is not None
    weights = 2 * num_parameters(SMOLLM2.teacher)
    cost = with_teacher.memory.peak_bytes - alone.memory.peak_bytes - weights
    assert cost <= 0.1 * GIB
