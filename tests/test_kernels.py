"""The kernels of TPU and GPU against plain attention, and which of them a program gets."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.interpreters import partial_eval
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from quick import QUICK

from ddk_jax.models.attention import attention, causal_segment_mask
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.kernels import cudnn, has_cudnn, splash, text_attention
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.compiled import compile_program, topology
from ddk_jax.parallel.mesh import DATA_AXES, make_mesh

SCALE = 0.3


class Shape(NamedTuple):
    """Of one call."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int
    width: int
    window: int = 0
    softcap: float = 0.0


def arrays(shape: Shape, dtype: Any = np.float32) -> tuple[Any, ...]:
    """Queries, keys, values, the gradient of the output, and segment ids of uneven runs."""
    rng = np.random.default_rng(0)
    heads = (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
    floats = (rng.normal(size=(shape.rows, shape.tokens, h, shape.width)) for h in heads)
    segments = np.sort(rng.integers(0, 3, (shape.rows, shape.tokens)), axis=1)
    return *(jnp.asarray(x, dtype) for x in floats), jnp.asarray(segments, jnp.int32)


def results(attend: Any, shape: Shape, q: Any, k: Any, v: Any, d_out: Any) -> tuple[Any, ...]:
    """Output and gradients."""
    attend = partial(attend, scale=SCALE, softcap=shape.softcap)
    # The libraries promote types and ranks as they please.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)


def check_splash(shape: Shape, mesh: Mesh | None = None) -> None:
    *given, segments = arrays(shape)
    kernel = partial(splash, segment_ids=segments, window=shape.window, mesh=mesh, interpret=True)
    mask = causal_segment_mask(segments, shape.window)

    @partial(jax.jit, compiler_options=QUICK)
    def both(*given: Any) -> Any:
        plain = partial(attention, mask_BTS=mask)
        return results(kernel, shape, *given), results(plain, shape, *given)

    for got, want in zip(*both(*given), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_tpu_kernel_equals_plain_attention() -> None:
    check_splash(Shape(rows=1, tokens=130, heads=2, kv_heads=1, width=64, window=50))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        Shape(2, 128, 4, 2, 80),
        Shape(1, 128, 2, 2, 96, window=1),
        Shape(1, 256, 2, 1, 128, softcap=5.0),
        Shape(1, 128, 1, 1, 256, window=99, softcap=2.0),
        Shape(1, 700, 2, 1, 64),
    ],
)
def test_the_tpu_kernel_takes_all_shapes(shape: Shape) -> None:
    check_splash(shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "kv_heads", "rows"),
    [(8, 2, 2), (4, 4, 2), (3, 1, 2), (4, 1, 1)],
    ids=["fewer KV heads than shards", "all divide", "heads do not divide", "rows do not divide"],
)
def test_a_kernel_on_a_mesh_equals_plain_attention(heads: int, kv_heads: int, rows: int) -> None:
    check_splash(Shape(rows, 128, heads, kv_heads, 64), make_mesh(1, 2, 4))


def test_the_devices_of_the_program_decide() -> None:
    """Not the default backend, which is a CPU here."""
    segments = jnp.ones((1, 128), jnp.int32)

    def chosen(mesh: Any) -> Any:
        return text_attention(segments, 0, mesh).func  # type: ignore[attr-defined]

    assert chosen(None) is attention
    assert chosen(make_mesh()) is attention


@pytest.mark.tpu_compiler
def test_a_program_for_a_tpu_has_the_kernel() -> None:
    mesh = make_mesh(devices=topology("v5e:1x1"))
    attend: Any = text_attention(jnp.ones((1, 128), jnp.int32), 0, mesh)
    assert attend.func is splash


@pytest.mark.slow
@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("chip", "shape"),
    [
        ("v5e", Shape(8, 2048, 15, 5, 64)),
        ("v6e", Shape(8, 2048, 15, 5, 64)),
        ("v5e", Shape(4, 2048, 8, 2, 80)),
        ("v5e", Shape(2, 4096, 8, 4, 256, window=1024, softcap=50.0)),
        ("v6e", Shape(2, 8192, 4, 4, 128)),
    ],
)
def test_on_a_tpu_no_scores_are_in_memory(chip: str, shape: Shape) -> None:
    """All temporaries together, forward and backward, take a fraction of what scores would."""
    mesh = make_mesh(devices=topology(f"{chip}:1x1"))
    whole = NamedSharding(mesh, PartitionSpec())
    *given, segments = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole) for x in arrays(shape, jnp.bfloat16)
    )

    def run(segments: Any, *given: Any) -> Any:
        return results(text_attention(segments, shape.window, mesh), shape, *given)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = compile_program(jax.jit(run).lower(segments, *given))
    scores = 4 * shape.rows * shape.heads * shape.tokens**2
    assert program.memory.temporary_bytes < scores / 4
    assert program.work.custom_calls["tpu_custom_call"] >= 2


@pytest.mark.slow
@pytest.mark.tpu_compiler
def test_a_tpu_with_fewer_kv_heads_than_shards_moves_keys_and_values_only() -> None:
    mesh, shape = make_mesh(1, 2, 4, devices=topology("v5e:2x4")), Shape(4, 1024, 16, 2, 128)
    rows = NamedSharding(mesh, PartitionSpec(DATA_AXES, None, "tensor"))
    some = NamedSharding(mesh, PartitionSpec(DATA_AXES))
    *given, segments = (
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
        for x, s in zip(arrays(shape, jnp.bfloat16), (rows, some, some, rows, some), strict=True)
    )

    def run(segments: Any, *given: Any) -> Any:
        return results(text_attention(segments, 0, mesh), shape, *given)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        program = compile_program(jax.jit(run).lower(segments, *given))
    keys = shape.rows * shape.tokens * shape.kv_heads * shape.width
    assert all(c.largest.size <= keys for c in program.work.collectives.values())


@pytest.mark.parametrize(
    ("dtype", "width", "tokens", "can"),
    [
        (jnp.bfloat16, 64, 128, True),
        (jnp.float16, 128, 64, True),
        (jnp.float32, 64, 128, False),
        (jnp.bfloat16, 256, 128, False),
        (jnp.bfloat16, 60, 128, False),
        (jnp.bfloat16, 64, 127, False),
    ],
)
def test_what_cudnn_computes(dtype: Any, width: int, tokens: int, can: bool) -> None:
    assert has_cudnn(jnp.zeros((1, tokens, 1, width), dtype)) == can


def test_a_program_for_a_gpu_calls_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lowered only: there is no compiler for GPUs without one."""
    library = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(library, "check_cudnn_version", lambda: 91000)
    shape = Shape(2, 64, 4, 2, 64)
    q, k, v, d_out, segments = arrays(shape, jnp.bfloat16)
    mask = causal_segment_mask(segments, 8)

    def run(q: Any, k: Any, v: Any, d_out: Any) -> Any:
        def attend(q: Any, k: Any, v: Any, *, scale: float, softcap: float) -> Any:
            return cudnn(q, k, v, mask, scale=scale, mesh=None)

        return results(attend, shape, q, k, v, d_out)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        traced = jax.jit(run).trace(q, k, v, d_out)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward" in text


@pytest.mark.tpu_compiler
@pytest.mark.parametrize(
    ("remat", "runs"), [("none", 2), ("attention", 2), ("dots", 2), ("full", 3)]
)
def test_a_kept_kernel_is_not_run_again(remat: Any, runs: int) -> None:
    """Kernels of a layer, forward and backward, without those whose results are not used."""
    spec = ModelSpec(
        vocab_size=32, hidden_size=64, num_layers=2, num_heads=4, num_kv_heads=2, ffn_size=64
    )
    mesh = make_mesh(2, 2, 2, devices=topology("v5e:2x4"))
    decoder, ids = Decoder(spec=spec, remat=remat, mesh=mesh), jnp.ones((8, 128), jnp.int32)

    def total(params: Any) -> Any:
        return jnp.sum(decoder.apply(params, ids, ids, ids)[0])

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        traced = jax.make_jaxpr(jax.grad(total))(decoder.abstract()).jaxpr
    used, _ = partial_eval.dce_jaxpr(traced, [True] * len(traced.outvars))
    assert str(used).count("pallas_call[") == runs
