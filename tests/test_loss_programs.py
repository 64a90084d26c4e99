"""What the TPU compiler makes of the loss: FLOPs, memory and collectives, at the size of a paper.

Heads as in Qwen1.5 14B -> 1.8B, bfloat16, 8,192 tokens in 8 rows. The minimum of FLOPs is that of
the products that the mathematics asks for, none of them twice: logits of both models, and two more
products for the student's gradients. Programs are compiled at level O1 and not run.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddk_jax.losses.chunked import ChunkPlan, LossInputs, sharded_objective
from ddk_jax.losses.objective import LOSSES, METRICS, Objective, make_term, needs_teacher
from ddk_jax.losses.targets import Head, TeacherTargets
from ddk_jax.parallel.compiled import Program, compile_program, topology
from ddk_jax.parallel.hlo import Shape
from ddk_jax.parallel.mesh import DATA_AXES, VOCAB_AXIS, make_mesh

pytestmark = [pytest.mark.slow, pytest.mark.tpu_compiler]

MIB = 2**20
DDK: Objective = (make_term("cross_entropy"), make_term("forward_kl", weight=0.2))


class Sizes(NamedTuple):
    """Of one problem, over all devices."""

    tokens: int
    student: int
    teacher: int
    vocab: int

    @property
    def head_gradient(self) -> int:
        """Bytes of the gradient of the student's head in float32: the accumulator."""
        return self.student * self.vocab * 4


PAPER = Sizes(tokens=8192, student=2048, teacher=5120, vocab=151936)
SMALL = Sizes(tokens=1024, student=256, teacher=256, vocab=16384)
PER_TOKEN = MIB
"""Bytes allowed for labels, sums and other vectors of a number per token."""


def loss_program(
    mesh: Mesh,
    plan: ChunkPlan,
    *,
    sizes: Sizes = PAPER,
    objective: Objective = DDK,
    gradient: bool = True,
    head_rows: str | None = None,
) -> Program:
    """The loss over rows that the data axes share and heads whose columns the tensor axis shares.

    With `gradient` also its gradients, each where its argument lies. `head_rows` is the axis that
    shares the rows of the heads.
    """
    B, T, K = 8, sizes.tokens // 8, len(objective)
    rows, columns = PartitionSpec(DATA_AXES), PartitionSpec(head_rows, VOCAB_AXIS)
    by_row, everywhere = PartitionSpec(None, DATA_AXES), PartitionSpec()

    def array(spec: PartitionSpec, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    hidden = array(rows, jnp.bfloat16, B, T, sizes.student)
    kernel = array(columns, jnp.bfloat16, sizes.student, sizes.vocab)
    teacher = TeacherTargets(
        hidden=(array(rows, jnp.bfloat16, B, T, sizes.teacher),),
        heads=(Head(array(columns, jnp.bfloat16, sizes.teacher, sizes.vocab)),),
    )
    inputs = LossInputs(
        teacher=teacher if needs_teacher(objective) else None,
        labels=array(rows, jnp.int32, B, T),
        role=array(rows, jnp.int32, B, T),
        draw=array(rows, jnp.uint32, B, T),
        scale=array(by_row, jnp.float32, K, B, T),
        temperature=array(everywhere, jnp.float32, K),
    )

    def loss(hidden: Any, kernel: Any, inputs: LossInputs) -> Any:
        axes = {"mesh": mesh, "data_axes": DATA_AXES, "vocab_axis": VOCAB_AXIS}
        return sharded_objective(hidden, Head(kernel), inputs, objective, plan, **axes)

    out: Any = (everywhere, by_row)
    if gradient:
        out = (out, (rows, columns))
    out = jax.tree.map(lambda spec: NamedSharding(mesh, spec), out)
    function = jax.value_and_grad(loss, (0, 1), has_aux=True) if gradient else loss
    return compile_program(jax.jit(function, out_shardings=out).lower(hidden, kernel, inputs))


def products(program: Program, mesh: Mesh, sizes: Sizes = PAPER) -> float:
    """FLOPs of all devices, in units of 2 x tokens x vocabulary."""
    assert program.work.unknown_loops == 0
    return program.work.flops * mesh.size / (2 * sizes.tokens * sizes.vocab)


def chip() -> Mesh:
    return make_mesh(devices=topology("v5e:1x1"))


@pytest.mark.parametrize(("chunk", "mebibytes"), [(2048, 1187), (512, 297)])
def test_one_chip(chunk: int, mebibytes: int) -> None:
    """No product twice; beside the accumulator, both models' logits of one chunk in bfloat16."""
    mesh = chip()
    program = loss_program(mesh, ChunkPlan(tokens=chunk, round_logits=True))
    assert products(program, mesh) <= 1.01 * (PAPER.teacher + 3 * PAPER.student)
    beyond = program.memory.temporary_bytes - PAPER.head_gradient
    assert beyond <= mebibytes * MIB + PER_TOKEN
    assert not program.work.collectives


@pytest.mark.parametrize(
    ("shape", "mebibytes", "largest"),
    [
        ((1, 1, 4), 477, Shape("bf16", (1024, 2048))),
        ((2, 1, 2), 907, Shape("bf16", (2048, 151936 // 2))),
    ],
)
def test_a_vocabulary_on_several_chips(
    shape: tuple[int, int, int], mebibytes: int, largest: Shape
) -> None:
    """Nothing is gathered: hidden gradients are summed over the columns, a head's over the rows.

    The latter once, and in bfloat16.
    """
    mesh = make_mesh(*shape, devices=topology("v5p:2x2x1"))
    program = loss_program(mesh, ChunkPlan(tokens=1024, round_logits=True))
    assert products(program, mesh) <= 1.01 * (PAPER.teacher + 3 * PAPER.student)
    assert program.memory.temporary_bytes <= mebibytes * MIB
    assert set(program.work.collectives) == {"all-reduce"}
    found = program.work.collectives["all-reduce"]
    assert (found.largest.dtype, found.largest.size) == (largest.dtype, largest.size)
    hidden_gradient = PAPER.tokens // mesh.shape["data"] * PAPER.student * 2
    head_gradient = largest.bytes if mesh.shape["data"] > 1 else 0
    assert found.bytes <= 1.01 * (hidden_gradient + head_gradient)


def test_rows_on_several_chips() -> None:
    """Every chip does its part of the work, and the head's gradient is summed once."""
    mesh = make_mesh(devices=topology("v5e:2x4"))
    program = loss_program(mesh, ChunkPlan(tokens=2048))
    assert products(program, mesh) <= 1.01 * (PAPER.teacher + 3 * PAPER.student)
    assert set(program.work.collectives) == {"all-reduce"}
    found = program.work.collectives["all-reduce"]
    assert found.largest == Shape("bf16", (PAPER.student, PAPER.vocab))
    assert found.bytes <= 1.01 * found.largest.bytes


def test_heads_that_the_chips_share_are_gathered_once() -> None:
    """Not in every chunk: there are 4 of them."""
    mesh = make_mesh(1, -1, 1, devices=topology("v5e:2x4"))
    program = loss_program(mesh, ChunkPlan(tokens=256), head_rows="fsdp")
    assert products(program, mesh) <= 1.01 * (PAPER.teacher + 3 * PAPER.student)
    found = program.work.collectives["all-gather"]
    assert found.bytes <= 1.01 * (PAPER.teacher + PAPER.student) * PAPER.vocab * 2


@pytest.mark.parametrize(("slice_name", "tensor"), [("v5e:1x1", 1), ("v5p:2x2x1", 4)])
def test_a_value_alone_does_no_gradient_work(slice_name: str, tensor: int) -> None:
    mesh = make_mesh(1, 1, tensor, devices=topology(slice_name))
    chunk = 1024
    program = loss_program(mesh, ChunkPlan(tokens=chunk), gradient=False)
    assert products(program, mesh) <= 1.01 * (PAPER.teacher + PAPER.student)
    logits = chunk * PAPER.vocab // tensor * 4
    assert program.memory.temporary_bytes <= 2 * logits + PER_TOKEN


def test_a_frozen_head_costs_no_gradient() -> None:
    mesh = chip()
    program = loss_program(mesh, ChunkPlan(tokens=2048, head_gradient=False))
    assert products(program, mesh) <= 1.01 * (PAPER.teacher + 2 * PAPER.student)


def test_without_a_teacher_its_work_is_not_done() -> None:
    mesh = chip()
    program = loss_program(mesh, ChunkPlan(tokens=2048), objective=DDK[:1])
    assert products(program, mesh) <= 1.01 * 3 * PAPER.student


SORTING = ("adaptive_kl", "top_p_kl", "uld")
"""Losses that sort the vocabulary, unless they look at a number of candidates."""
CANDIDATES = 64


@pytest.mark.parametrize("loss", LOSSES)
def test_no_loss_moves_the_vocabulary(loss: str) -> None:
    """On 2 x 2 chips: they exchange candidates, and sum numbers per token and gradients."""
    mesh, chunk = make_mesh(2, 1, 2, devices=topology("v5p:2x2x1")), 128
    term = make_term(loss, settings={"candidates": CANDIDATES} if loss in SORTING else {})
    program = loss_program(
        mesh,
        ChunkPlan(tokens=chunk),
        sizes=SMALL,
        objective=(term,),
        gradient=loss not in METRICS,
    )
    assert program.work.unknown_loops == 0
    found = dict(program.work.collectives)
    gradients = (SMALL.student * SMALL.vocab + SMALL.tokens * SMALL.student) // 2 * 2
    logits = (SMALL.tokens // 2) * (SMALL.vocab // 2) * 2
    assert found.pop("all-reduce").bytes < gradients + logits / 16
    for kind, collective in found.items():
        assert collective.largest.size <= 2 * chunk * CANDIDATES, kind
