"""FLOPs, collectives and memory of compiled programs, against counting by hand.

The TPU compiler runs without a TPU; what it compiles is not run.
"""

from __future__ import annotations

import importlib.util
import itertools
import math
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import pallas as pl
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ddk_jax.parallel.buffers import REST, footprints
from ddk_jax.parallel.compiled import (
    OutOfMemoryError,
    compile_program,
    jaxpr_flops,
    kernel_flops,
    read_program,
    topology,
)
from ddk_jax.parallel.hlo import Shape, parse_hlo, trip_count
from ddk_jax.parallel.mesh import DATA_AXES, make_mesh
from ddk_jax.parallel.work import Op, read_work

ROWS, WIDTH = 256, 128
PRODUCT = 2 * ROWS * WIDTH**2
"""FLOPs of `x @ w`."""


def layer(x: jax.Array, w: jax.Array) -> jax.Array:
    return jnp.tanh(x @ w)


def scanned(body: Callable[..., jax.Array], x: jax.Array, w: jax.Array, times: int) -> jax.Array:
    return jax.lax.scan(lambda x, _: (body(x, w), None), x, None, length=times)[0]


def summed(x: jax.Array) -> jax.Array:
    return jnp.sum(x.astype(jnp.float32))


def in_a_scan(x: jax.Array, w: jax.Array) -> jax.Array:
    return summed(scanned(layer, x, w, 8))


def unrolled(x: jax.Array, w: jax.Array) -> jax.Array:
    for _ in range(8):
        x = layer(x, w)
    return summed(x)


def recomputed(x: jax.Array, w: jax.Array) -> jax.Array:
    return summed(scanned(jax.checkpoint(layer), x, w, 8))


def nested(x: jax.Array, w: jax.Array) -> jax.Array:
    return summed(scanned(lambda x, w: scanned(layer, x, w, 3), x, w, 5))


def conditional(x: jax.Array, w: jax.Array) -> jax.Array:
    """Of two products or one."""
    return summed(jax.lax.cond(x[0, 0] > 0, lambda: layer(layer(x, w), w), lambda: layer(x, w)))


def batched(x: jax.Array, w: jax.Array) -> jax.Array:
    """One product, in 4 independent parts of the rows, then one as large with a batch axis."""
    heads = x.reshape(4, ROWS // 4, WIDTH)
    return summed(jnp.einsum("btd,bsd->bts", heads, heads @ w))


BATCHED = PRODUCT + 2 * 4 * (ROWS // 4) ** 2 * WIDTH

# The products of the value, and of the value and both gradients: each product has two more, and
# rematerialisation repeats it.
COUNTS: list[tuple[Callable[..., jax.Array], int, int]] = [
    (in_a_scan, 8 * PRODUCT, 24 * PRODUCT),
    (unrolled, 8 * PRODUCT, 24 * PRODUCT),
    (recomputed, 8 * PRODUCT, 32 * PRODUCT),
    (nested, 15 * PRODUCT, 45 * PRODUCT),
    (conditional, 2 * PRODUCT, 6 * PRODUCT),
    (batched, BATCHED, 3 * BATCHED),
]


def arguments(mesh: Mesh, dtype: Any = jnp.float32) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Rows that the data axes share, and a matrix that every device has."""
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*a)) for a in ((DATA_AXES,), ()))
    return (
        jax.ShapeDtypeStruct((ROWS, WIDTH), dtype, sharding=rows),
        jax.ShapeDtypeStruct((WIDTH, WIDTH), dtype, sharding=everywhere),
    )


def both(function: Callable[..., jax.Array]) -> list[Callable[..., Any]]:
    return [function, jax.value_and_grad(function, argnums=(0, 1))]


@pytest.mark.parametrize(("function", "value", "gradient"), COUNTS)
def test_products_are_counted_as_often_as_they_run(
    function: Callable[..., jax.Array], value: int, gradient: int
) -> None:
    given = arguments(make_mesh(devices=jax.devices()[:1]))
    for program, expected in zip(both(function), (value, gradient), strict=True):
        compiled = jax.jit(program).lower(*given).compile()
        assert read_program(compiled).work.flops == expected
        assert jaxpr_flops(jax.make_jaxpr(program)(*given)) == expected
        # CPU programs say how often their loops run, TPU programs do not.
        text = re.sub(r'"known_trip_count":\{"n":"\d+"\}', "", compiled.as_text() or "")
        assert (read_work(text).flops, read_work(text).unknown_loops) == (expected, 0)


def test_devices_share_the_products(devices: list[jax.Device]) -> None:
    """The gradient of the matrix is summed over the devices."""
    given = arguments(make_mesh())
    program = jax.value_and_grad(lambda x, w: summed(layer(x, w)), argnums=(0, 1))
    work = read_program(jax.jit(program).lower(*given).compile()).work
    assert work.flops * len(devices) == 3 * PRODUCT == jaxpr_flops(jax.make_jaxpr(program)(*given))
    found = work.collectives["all-reduce"]
    assert found.largest == Shape("f32", (WIDTH, WIDTH))
    assert WIDTH**2 * 4 < found.bytes < WIDTH**2 * 4 + 100
    assert found.wire_bytes == pytest.approx(2 * 7 / 8 * found.bytes, abs=10)


def test_a_loop_of_unknown_length_is_reported() -> None:
    def until(x: jax.Array, w: jax.Array) -> jax.Array:
        return jax.lax.while_loop(lambda x: summed(x) > 1, lambda x: layer(x, w), x)

    given = arguments(make_mesh(devices=jax.devices()[:1]))
    work = read_program(jax.jit(until).lower(*given).compile()).work
    assert (work.flops, work.unknown_loops) == (PRODUCT, 1)
    assert jaxpr_flops(jax.make_jaxpr(until)(*given)) == PRODUCT


def test_products_inside_kernels_and_shards_are_in_the_jaxpr() -> None:
    pallas = pytest.importorskip("jax.experimental.pallas")

    def kernel(x: Any, w: Any, out: Any) -> None:
        out[...] = x[...] @ w[...]

    block = pallas.BlockSpec((ROWS // 4, WIDTH), lambda i: (i, 0))
    whole = pallas.BlockSpec((WIDTH, WIDTH), lambda i: (0, 0))
    in_parts = pallas.pallas_call(
        kernel,
        out_shape=jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32),
        grid=(4,),
        in_specs=[block, whole],
        out_specs=block,
    )
    x, w = jnp.zeros((ROWS, WIDTH)), jnp.zeros((WIDTH, WIDTH))
    assert jaxpr_flops(jax.make_jaxpr(in_parts)(x, w)) == PRODUCT

    rows, all_axes = PartitionSpec(DATA_AXES), PartitionSpec()
    shared = jax.shard_map(layer, mesh=make_mesh(), in_specs=(rows, all_axes), out_specs=rows)
    assert jaxpr_flops(jax.make_jaxpr(shared)(x, w)) == PRODUCT


def gather(x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, "fsdp", axis=1, tiled=True)


def reduce(x: jax.Array) -> jax.Array:
    return jax.lax.psum(x, ("data", "fsdp"))


def scatter(x: jax.Array) -> jax.Array:
    return jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)


def exchange(x: jax.Array) -> jax.Array:
    return jax.lax.all_to_all(x, "fsdp", 0, 1, tiled=True)


def pass_on(x: jax.Array) -> jax.Array:
    return jax.lax.ppermute(x, "tensor", [(0, 1), (1, 0)])


SHARD = 16 * 32 * 4
"""Bytes of the part of a float32 [128, 32] that one of 8 devices has."""


@pytest.mark.parametrize(
    ("move", "kind", "largest", "moved", "wire"),
    [
        (gather, "all-gather", (16, 64), 2 * SHARD, SHARD),
        (reduce, "all-reduce", (16, 32), SHARD, SHARD * 2 * 3 // 4),
        (scatter, "reduce-scatter", (16, 32), SHARD, SHARD // 2),
        (exchange, "all-to-all", None, SHARD, SHARD // 2),
        (pass_on, "collective-permute", (16, 32), SHARD, SHARD),
    ],
)
def test_collectives_are_counted_as_often_as_they_run(
    move: Callable[[jax.Array], jax.Array],
    kind: str,
    largest: tuple[int, ...] | None,
    moved: int,
    wire: int,
) -> None:
    """Five times in a loop, on a mesh of 2 x 2 x 2."""

    def local(x: jax.Array) -> jax.Array:
        def body(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return x + jnp.sum(move(jnp.cos(x))), None

        return jax.lax.scan(body, x, None, length=5)[0]

    mesh, rows = make_mesh(2, 2, 2), PartitionSpec(("data", "fsdp", "tensor"))
    program = jax.shard_map(local, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)
    x = jax.ShapeDtypeStruct((128, 32), jnp.float32, sharding=NamedSharding(mesh, rows))
    (found,) = read_program(jax.jit(program).lower(x).compile()).work.collectives.items()
    assert found[0] == kind
    collective = found[1]
    assert (collective.count, collective.bytes, collective.wire_bytes) == (5, 5 * moved, 5 * wire)
    assert largest is None or collective.largest == Shape("f32", largest)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", 4),
        ("{{0,4},{1,5},{2,6},{3,7}}", 2),
        ("{}", 8),
        ("[2,4]<=[8]", 4),
        ("[4,2]<=[2,4]T(1,0)", 2),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", 2),
        ("mesh['axis_0'=2,'axis_1'=4], device_ids=([2,2,2]T(0,2,1)) {'axis_1':(2)2}", 2),
    ],
)
def test_groups_of_devices_in_every_notation(groups: str, size: int) -> None:
    text = f"""HloModule example, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: bf16[16,256]) -> (bf16[16,256], bf16[{16 * size},256]) {{
  %x = bf16[16,256]{{1,0:T(8,128)(2,1)}} parameter(0)
  %r = bf16[16,256]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, to_apply=%add
  %g = (bf16[16,256]{{1,0}}, bf16[{16 * size},256]{{1,0}}) all-gather-start(%x), channel_id=2, \
replica_groups={groups}, dimensions={{0}}, use_global_device_ids=true
  %d = bf16[{16 * size},256]{{1,0}} all-gather-done(%g)
  ROOT %t = (bf16[16,256]{{1,0}}, bf16[{16 * size},256]{{1,0}}) tuple(%r, %d)
}}
"""
    found = read_work(text).collectives
    assert found["all-gather"].largest == Shape("bf16", (16 * size, 256))
    assert [found[kind].count for kind in ("all-gather", "all-reduce")] == [1, 1]
    assert found["all-gather"].wire_bytes == 16 * 256 * 2 * (size - 1)
    assert found["all-reduce"].wire_bytes == 2 * 16 * 256 * 2 * (size - 1) // size


def test_what_a_tpu_makes_of_a_reduce_scatter() -> None:
    """A fusion of this name, in which the reduction is written as a whole."""
    text = """HloModule example, num_partitions=4

%all-reduce-scatter.1 (input: f32[64]) -> f32[16] {
  %input = f32[64]{0} parameter(0)
  %all = f32[64]{0} all-reduce(%input), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %part = f32[16]{0} slice(%all), slice={[0:16]}
}

ENTRY %main (x: f32[64]) -> f32[16] {
  %x = f32[64]{0} parameter(0)
  ROOT %mine = f32[16]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    ((kind, found),) = read_work(text).collectives.items()
    assert (kind, found.bytes, found.wire_bytes) == ("reduce-scatter", 256, 192)


def test_what_happens_at_the_same_time_counts_once() -> None:
    """The wrapped computation is named at the start, and again where it is waited for."""
    text = """HloModule example, num_partitions=2

%wrapped (a: f32[4,8], b: f32[8,2]) -> f32[4,2] {
  %a = f32[4,8]{1,0} parameter(0)
  %b = f32[8,2]{1,0} parameter(1)
  %d = f32[4,2]{1,0} dot(%a, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %c = f32[4,2]{1,0} custom-call(%d), custom_call_target="tpu_custom_call"
}

ENTRY %main (x: f32[4,8], y: f32[8,2]) -> f32[4,2] {
  %x = f32[4,8]{1,0} parameter(0)
  %y = f32[8,2]{1,0} parameter(1)
  %s = ((f32[4,8], f32[8,2]), f32[4,2], s32[]) async-start(%x, %y), calls=%wrapped
  %u = ((f32[4,8], f32[8,2]), f32[4,2], s32[]) async-update(%s, %x, %y), calls=%wrapped
  ROOT %r = f32[4,2]{1,0} async-done(%u), calls=%wrapped
}
"""
    work = read_work(text)
    assert (work.flops, work.custom_calls) == (2 * 4 * 8 * 2, {"tpu_custom_call": 1})


TRAFFIC = """HloModule example

%slice (stack: f32[12,8,128], i: s32[]) -> f32[8,128] {
  %stack = f32[12,8,128]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %one = f32[1,8,128]{2,1,0} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,128}
  ROOT %flat = f32[8,128]{1,0} bitcast(%one)
}

%layer (stack.1: f32[12,8,128], sums: f32[12,8,128], x: bf16[8,128], j: s32[]) -> f32[12,8,128] {
  %stack.1 = f32[12,8,128]{2,1,0} parameter(0)
  %sums = f32[12,8,128]{2,1,0} parameter(1)
  %x = bf16[8,128]{1,0} parameter(2)
  %j = s32[] parameter(3)
  %w = f32[8,128]{1,0} fusion(%stack.1, %j), kind=kLoop, calls=%slice
  %wide = f32[8,128]{1,0} convert(%x)
  %both = f32[8,128]{1,0} add(%w, %wide)
  %row = f32[1,8,128]{2,1,0} bitcast(%both)
  %none = s32[] constant(0)
  ROOT %put = f32[12,8,128]{2,1,0} dynamic-update-slice(%sums, %row, %j, %none, %none)
}

ENTRY %main (a: f32[12,8,128], b: f32[12,8,128], c: bf16[8,128], k: s32[]) -> f32[12,8,128] {
  %a = f32[12,8,128]{2,1,0} parameter(0)
  %b = f32[12,8,128]{2,1,0} parameter(1)
  %c = bf16[8,128]{1,0} parameter(2)
  %k = s32[] parameter(3)
  %near = bf16[8,128]{1,0:T(8,128)(2,1)S(1)} copy(%c)
  ROOT %f = f32[12,8,128]{2,1,0} fusion(%a, %b, %near, %k), kind=kLoop, calls=%layer, \
backend_config={"window_config":{"estimated_cycles":"77"}}
}
"""


def test_a_fusion_moves_the_slices_that_it_reads_and_writes() -> None:
    """Of two stacks one layer each; not what lies on the chip already. The counter is 4 bytes."""
    work = read_work(TRAFFIC)
    layer = 8 * 128 * 4
    assert work.ops == {Op(0, layer // 2, 0): 1, Op(0, 2 * layer + 4, 77): 1}
    assert work.bytes == 2 * layer + layer // 2 + 4


def test_a_fusion_that_reads_all_of_a_stack_moves_it() -> None:
    text = TRAFFIC.replace(
        "  %wide = f32[8,128]{1,0} convert(%x)",
        "  %all = f32[12,8,128]{2,1,0} negate(%stack.1)\n  %wide = f32[8,128]{1,0} convert(%x)",
    )
    stack = 12 * 8 * 128 * 4
    assert Op(0, stack + 8 * 128 * 4 + 4, 77) in read_work(text).ops


def test_parts_of_the_temporaries_take_turns() -> None:
    """A union of places for each scope: values that lie in one place count once."""
    hlo = """
  %a = f32[4] add(%x, %y), metadata={op_name="jit(step)/while/body/jvp(loss)/add"}
  %b.1 = f32[4] add(%x, %y), metadata={op_name="jit(step)/transpose(jvp(loss))/mul" line=1}
  ROOT %c = f32[4] add(%x, %y), metadata={op_name="jit(step)/teacher/dot"}
  %d = f32[4] add(%x, %y), metadata={op_name="jit(step)/lossless/dot"}
  %p = f32[4] parameter(0), metadata={op_name="loss"}
"""
    assignment = """BufferAssignment:
allocation 0: size 64, page 0, parameter 0, shape |f32[4]| at ShapeIndex {}:
 value: <1 p @0> (size=64,offset=0): f32[4]{0}
allocation 1: size 16, color 6, page 0, preallocated-temp:
 value: <2 a @0> (size=16,offset=0): f32[4]{0}
allocation 2: size 900, page 0, preallocated-temp:
 value: <3 a @0> (size=100,offset=0): f32[4]{0}
 value: <4 b.1{1,0} @0> (size=100,offset=50): f32[4]{0}
 value: <5 c (phi) @0> (size=300,offset=0): f32[4]{0}
 value: <6 d{} @0> (size=10,offset=500): f32[4]{0}
 value: <7 unknown @0> (size=400,offset=500): f32[4]{0}
"""
    found = footprints(assignment, hlo, ("loss", "teacher"))
    assert found == {"loss": 150, "teacher": 300, REST: 10}


def test_products_in_kernels_are_told_apart() -> None:
    """A grid of 3 x 2 blocks, in a loop of 5; and one product outside."""

    def kernel(x: Any, w: Any, out: Any) -> None:
        out[...] = x[...] @ w[...]

    def product(x: jax.Array, w: jax.Array) -> jax.Array:
        return pl.pallas_call(
            kernel,
            grid=(3, 2),
            in_specs=[
                pl.BlockSpec((8, 16), lambda i, j: (i, 0)),
                pl.BlockSpec((16, 32), lambda i, j: (0, j)),
            ],
            out_specs=pl.BlockSpec((8, 32), lambda i, j: (i, j)),
            out_shape=jax.ShapeDtypeStruct((24, 64), x.dtype),
        )(x, w)

    def program(x: jax.Array, w: jax.Array) -> jax.Array:
        body = lambda total, _: (total + product(x, w), None)  # noqa: E731
        return jax.lax.scan(body, x @ w, None, length=5)[0]

    one = 2 * 24 * 16 * 64
    jaxpr = jax.make_jaxpr(program)(jnp.zeros((24, 16)), jnp.zeros((16, 64)))
    assert (jaxpr_flops(jaxpr), kernel_flops(jaxpr)) == (6 * one, 5 * one)


@pytest.mark.parametrize(
    ("message", "temporary", "total"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total "
            "memory required for HLO temporaries (16.66G) exceeds available HBM (15.75G).",
            int(16.66 * 2**30),
            None,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 21.36G of 15.75G hbm. "
            "Exceeds hbm capacity by 5.61G.",
            None,
            int(21.36 * 2**30),
        ),
        ("RESOURCE_EXHAUSTED: something else", None, None),
    ],
)
def test_what_the_compiler_says_of_too_much_memory(
    message: str, temporary: int | None, total: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = jax.jit(jnp.sin).lower(jnp.zeros(3))

    def refuse(self: jax.stages.Lowered, **_: Any) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(jax.stages.Lowered, "compile", refuse)
    with pytest.raises(OutOfMemoryError, match="RESOURCE_EXHAUSTED") as error:
        compile_program(lowered)
    assert (error.value.temporary_bytes, error.value.total_bytes) == (temporary, total)


@pytest.mark.tpu_compiler
def test_a_program_that_no_chip_has_room_for() -> None:
    mesh = make_mesh(devices=topology("v5e:1x1"))
    x = jax.ShapeDtypeStruct(
        (2**17, 2**15), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec())
    )
    with pytest.raises(OutOfMemoryError) as error:
        compile_program(jax.jit(lambda x: jnp.sort(x, axis=0) @ x.T).lower(x), level="O0")
    needed = error.value.total_bytes or error.value.temporary_bytes
    assert needed is not None and needed > 15.75 * 2**30


def loop(condition: str, step: str, start: int = 0, prelude: str = "") -> int | None:
    """Trip count of a loop with the given condition and step on `%i`."""
    module = parse_hlo(f"""HloModule loops

%plus (a: s32[], b: s32[]) -> s32[] {{
  %a = s32[]{{:T(128)}} parameter(0)
  %b = s32[]{{:T(128)}} parameter(1)
  ROOT %s = s32[]{{:T(128)}} add(%a, %b)
}}

%body (carry: (s32[], f32[8], /*index=2*/s32[])) -> (s32[], f32[8], s32[]) {{
  %carry = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, /*index=2*/s32[]{{:T(128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%carry), index=0
  %x = f32[8]{{0:T(128)}} get-tuple-element(%carry), index=1
  %two = s32[]{{:T(128)}} get-tuple-element(%carry), index=2
  %one = s32[]{{:T(128)}} constant(1)
  %next = {step}
  ROOT %t = (s32[], f32[8]{{0}}, s32[]) tuple(%next, %x, %two), control-predecessors={{%x, %one}}
}}

%condition (carry.1: (s32[], f32[8], s32[])) -> pred[] {{
  %carry.1 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}, s32[]{{:T(128)}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%carry.1), index=0
  %x.1 = f32[8]{{0:T(128)}} get-tuple-element(%carry.1), index=1
  %ten = s32[]{{:T(128)S(6)}} constant(10)
  ROOT %goes_on = {condition}
}}

ENTRY %main (x.2: f32[8], n: s32[]) -> (s32[], f32[8], s32[]) {{
  %x.2 = f32[8]{{0}} parameter(0)
  %n = s32[] parameter(1)
  %start = s32[] constant({start})
  %start.1 = s32[] copy(%start)
  %two.1 = s32[] constant(2)
  %t.1 = (s32[], f32[8]{{0}}, s32[]) tuple(%start.1, %x.2, %two.1)
  ROOT %w = (s32[], f32[8]{{0}}, s32[]) while(%t.1), condition=%condition, body=%body
}}
""")
    entry = module.computations[module.entry]
    return trip_count(module, entry, entry.root)


LESS = "pred[] compare(%i.1, %ten), direction=LT"


@pytest.mark.parametrize(
    ("condition", "step", "start", "trips"),
    [
        (LESS, "s32[] add(%i, %one)", 0, 10),
        (LESS, "s32[] add(%i, %one)", -3, 13),
        (LESS, "s32[] add(%i, %two)", 3, 4),
        (LESS, "s32[] fusion(%i, %two), kind=kLoop, calls=%plus", 0, 5),
        (LESS, "s32[] multiply(%i, %two)", 1, 4),
        (LESS, "s32[] add(%i, %one)", 10, 0),
        ("pred[] compare(%i.1, %ten), direction=LE", "s32[] add(%i, %one)", 0, 11),
        ("pred[] compare(%i.1, %ten), direction=NE", "s32[] add(%i, %two)", 0, 5),
        ("pred[] compare(%ten, %i.1), direction=LE", "s32[] subtract(%i, %one)", 12, 3),
        # What it depends on is not constant, or it never ends.
        (LESS, "s32[] get-tuple-element(%carry), index=1", 0, None),
        (LESS, "s32[] subtract(%i, %one)", 0, None),
        ("pred[] is-finite(%x.1)", "s32[] add(%i, %one)", 0, None),
    ],
)
def test_loops_are_followed_to_their_end(
    condition: str, step: str, start: int, trips: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ddk_jax.parallel.hlo.MAX_TRIPS", 100)
    assert loop(condition, step, start) == trips


def convolution(image: int, kernel: int, result: int, window: str, groups: int = 1) -> int:
    """FLOPs of a convolution on one axis: 3 images of 5 features, to 7 features."""
    text = f"""HloModule example

%fused (x: f32[{3 * groups},{image},5], w: f32[{kernel},5,7]) -> f32[3,{result},7] {{
  %x = f32[{3 * groups},{image},5]{{2,1,0:T(8,128)}} parameter(0)
  %w = f32[{kernel},5,7]{{2,1,0:T(8,128)}} parameter(1)
  ROOT %c = f32[3,{result},7]{{2,1,0:T(8,128)}} convolution(%x, %w), window={{{window}}}, \
dim_labels=b0f_0io->b0f, batch_group_count={groups}, metadata={{op_name="a/b" stack_frame_id=1}}
}}

ENTRY %main (x.1: f32[{3 * groups},{image},5], w.1: f32[{kernel},5,7]) -> f32[3,{result},7] {{
  %x.1 = f32[{3 * groups},{image},5]{{2,1,0}} parameter(0)
  %w.1 = f32[{kernel},5,7]{{2,1,0}} parameter(1)
  ROOT %f = f32[3,{result},7]{{2,1,0}} fusion(%x.1, %w.1), kind=kOutput, calls=%fused
}}
"""
    return read_work(text).flops


SIZE = st.integers(1, 6)


@given(SIZE, SIZE, SIZE, st.integers(-3, 6), SIZE, SIZE, SIZE)
def test_a_convolution_is_counted_where_it_meets_its_input(
    image: int, kernel: int, result: int, before: int, stride: int, dilation: int, spread: int
) -> None:
    """Products as the TPU compiler writes some: padding, and places between elements, are free."""
    window = (
        f"size={kernel} stride={stride} pad={before}_0 lhs_dilate={spread} rhs_dilate={dilation}"
    )
    taps = 0
    for out, tap in itertools.product(range(result), range(kernel)):
        place = out * stride + tap * dilation - before
        taps += place % spread == 0 and 0 <= place // spread < image
    assert convolution(image, kernel, result, window) == 2 * 3 * 5 * 7 * taps


def test_a_convolution_without_a_window_and_in_groups() -> None:
    assert convolution(4, 1, 4, "size=1") == 2 * 3 * 5 * 7 * 4
    assert convolution(4, 1, 4, "size=1", groups=2) == 2 * 3 * 5 * 7 * 4


def test_text_that_is_no_program_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not HLO text.*'Hello'"):
        read_work("Hello\nworld")
    with pytest.raises(ValueError, match="not HLO text"):
        read_work("")
    with pytest.raises(ValueError, match="not an HLO instruction: '  ROOT hello'"):
        read_work("HloModule x\n\nENTRY %main () -> f32[] {\n  ROOT hello\n}\n")


@pytest.mark.parametrize(
    ("shape", "size"),
    [
        (Shape("bf16", (3, 5)), 30),
        (Shape("pred", (7,)), 7),
        (Shape("s4", (3,)), 2),
        (Shape("f8e4m3fn", (3,)), 3),
        (Shape("c64", ()), 8),
    ],
)
def test_bytes_of_a_shape(shape: Shape, size: int) -> None:
    assert shape.bytes == size


def test_bytes_of_arguments_outputs_and_temporaries() -> None:
    given = arguments(make_mesh())
    x_bytes, w_bytes = ROWS * WIDTH * 4 // 8, WIDTH**2 * 4
    memory = compile_program(jax.jit(layer).lower(*given)).memory
    assert (memory.argument_bytes, memory.output_bytes) == (x_bytes + w_bytes, x_bytes)
    assert memory.alias_bytes == 0
    donating = jax.jit(lambda x, w: (layer(x, w), w + 1), donate_argnums=1)
    assert compile_program(donating.lower(*given)).memory.alias_bytes == w_bytes

    def sorted_twice(x: jax.Array) -> jax.Array:
        return summed(jnp.sort(jnp.sort(x, axis=0), axis=1))

    memory = compile_program(jax.jit(sorted_twice).lower(given[1])).memory
    assert w_bytes <= memory.temporary_bytes <= 3 * w_bytes


def test_a_program_is_read_whatever_is_cached(tmp_path: Any) -> None:
    """Twice: the second time it is in jax's cache, without its text; and the cache still works."""
    cache, enabled = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    given = arguments(make_mesh())
    first = compile_program(jax.jit(layer).lower(*given))
    jax.jit(layer).lower(*given).compile()
    assert compile_program(jax.jit(layer).lower(*given)) == first
    assert jax.config.jax_compilation_cache_dir == cache
    assert jax.config.jax_enable_compilation_cache is enabled is True


def test_without_libtpu_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"compiling for v5e:2x4 .* pip install libtpu"):
        topology("v5e:2x4")


@pytest.mark.tpu_compiler
@pytest.mark.parametrize("name", ["", "v5e", "v9:2x2", "v5e:3x5", "v5e:2by2"])
def test_a_slice_that_does_not_exist_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"no topology {name!r}: name a generation and a shape"):
        topology(name)


@pytest.mark.tpu_compiler
def test_slices_that_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "true")
    for name, kind in {
        "v5e:4x4": "TPU v5 lite",
        "v5p:2x2x4": "TPU v5",
        "v4:2x2x4": "TPU v4",
    }.items():
        found = topology(name)
        assert len(found) == 16
        assert {device.device_kind for device in found} == {kind}
        assert make_mesh(2, -1, 2, devices=found).devices.shape == (2, 4, 2)
    assert os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] == "true"  # the user's setting stays


@pytest.mark.tpu_compiler
def test_a_program_that_cannot_be_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As some for v5p: "async-update instruction should have 1 operands but sees 3"."""

    def broken(self: jax.stages.Compiled) -> str:
        raise ValueError("async-update")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", broken)
    on_tpu(recomputed, 32 * PRODUCT, make_mesh(4, 1, 2, devices=topology("v5e:2x4")))


def on_tpu(function: Callable[..., jax.Array], flops: int, mesh: Mesh) -> None:
    """Value and gradients on a slice whose data axes share the rows."""
    given = arguments(mesh, jnp.bfloat16)
    program = jax.value_and_grad(function, argnums=(0, 1))
    found = compile_program(jax.jit(program).lower(*given))
    assert found.work.flops * mesh.shape["data"] == flops
    assert jaxpr_flops(jax.make_jaxpr(program)(*given)) == flops
    assert found.work.unknown_loops == 0
    assert found.memory.argument_bytes == sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * 2 for leaf in given
    )
    memory = found.memory
    assert memory.peak_bytes >= memory.argument_bytes + memory.output_bytes
    assert found.work.collectives["all-reduce"].largest == Shape("bf16", (WIDTH, WIDTH))


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize("slice_name", ["v5e:2x4", "v5p:2x2x2", "v6e:2x4"])
@pytest.mark.parametrize(("function", "value", "gradient"), COUNTS)
def test_products_on_every_tpu(
    function: Callable[..., jax.Array], value: int, gradient: int, slice_name: str
) -> None:
    on_tpu(function, gradient, make_mesh(devices=topology(slice_name)))
