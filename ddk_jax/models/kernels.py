"""Attention over rows of text, by the best means that a platform has.

A program is made for the devices of a mesh, which need not be those of this process: they decide,
not the default backend. Kernels get segment ids and a window; a mask [B, T, T] exists where there
is no kernel, or where it reads one (cuDNN).

Legend: B rows, T tokens, H query heads, K key/value heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from ddk_jax.models.attention import attention, causal_segment_mask
from ddk_jax.parallel.mesh import HEAD_AXIS, row_axes

Attend: TypeAlias = Callable[..., Array]
"""`attention` with the mask already given: (q, k, v, *, scale, softcap) -> what each head reads."""

RESIDUALS = "attention"
"""Name of what the TPU kernel keeps for its backward pass, for `jax.checkpoint` policies."""

_LANES = 128
_BLOCKS = (1024, 512, 256, 128)
_PADDING = -1
"""Segment id of tokens that only fill a block."""


def text_attention(segment_ids: Int[Array, "B T"], window: int, mesh: Mesh | None) -> Attend:
    """The attention of tokens that see those before them in their segment.

    On a TPU it is the splash kernel of jax; on an NVIDIA GPU cuDNN, for what that computes; else
    `attention`.

    Args:
      segment_ids: tokens see equal ids only.
      window: tokens that a query sees at most, itself among them. 0: all before it.
      mesh: the devices that the program is made for. None: any, so no kernel is used.
    """
    device = None if mesh is None else mesh.devices.flat[0]
    if device is not None and device.platform == "tpu":
        return partial(splash, segment_ids=segment_ids, window=window, mesh=mesh)
    mask = causal_segment_mask(segment_ids, window)
    plain = partial(attention, mask_BTS=mask)
    if device is None or device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return plain

    def on_gpu(q: Array, k: Array, v: Array, *, scale: float, softcap: float) -> Array:
        if softcap or not has_cudnn(q):
            return plain(q, k, v, scale=scale, softcap=softcap)
        return cudnn(q, k, v, mask, scale=scale, mesh=mesh)

    return on_gpu


def splash(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKD: Float[Array, "B T K D"],
    *,
    segment_ids: Int[Array, "B T"],
    window: int,
    mesh: Mesh | None,
    scale: float,
    softcap: float = 0.0,
    interpret: bool = False,
) -> Float[Array, "B T H D"]:
    """`attention` by the splash kernel: no scores outside of the chip's own memory.

    Args:
      q_BTHD: queries, already rotated.
      k_BTKD: keys, already rotated; K divides H.
      v_BTKD: values.
      segment_ids: as for `text_attention`.
      window: likewise.
      mesh: devices that share rows and heads. None: a single one.
      scale: factor of the scores.
      softcap: squeezes the scaled scores. 0: it does not.
      interpret: run on any platform, slowly.
    """
    T, D = q_BTHD.shape[1], q_BTHD.shape[3]
    block = _block(T, D)
    width = -(-T // block) * block

    def local(q: Array, k: Array, v: Array, segments: Array) -> Array:
        kernel = _splash_kernel(width, q.shape[2], window, softcap, block, interpret)
        q, k, v = (_padded(x, width).swapaxes(1, 2) for x in (q, k, v))
        segments = _padded(segments, width, _PADDING)
        out = jax.vmap(kernel)(q, k, v, segments)
        return out.swapaxes(1, 2)[:, :T]

    q_BTHD = q_BTHD * jnp.asarray(scale, q_BTHD.dtype)
    return _on_mesh(local, mesh, q_BTHD, k_BTKD, v_BTKD, segment_ids)


def has_cudnn(q_BTHD: Float[Array, "B T H D"]) -> bool:
    """Whether cuDNN computes attention of these shapes and types, forward and backward."""
    T, D = q_BTHD.shape[1], q_BTHD.shape[3]
    return q_BTHD.dtype in (jnp.bfloat16, jnp.float16) and D % 8 == 0 and D <= 128 and T % 2 == 0


def cudnn(
    q_BTHD: Float[Array, "B T H D"],
    k_BTKD: Float[Array, "B T K D"],
    v_BTKD: Float[Array, "B T K D"],
    mask_BTT: Array,
    *,
    scale: float,
    mesh: Mesh | None,
) -> Float[Array, "B T H D"]:
    """`attention` by cuDNN.

    Args:
      q_BTHD: queries, already rotated; see `has_cudnn`.
      k_BTKD: keys, already rotated; K divides H.
      v_BTKD: values.
      mask_BTT: whether query t may see key s, never one behind it.
      scale: factor of the scores.
      mesh: devices that share rows and heads. None: a single one.
    """

    def local(q: Array, k: Array, v: Array, mask: Array) -> Array:
        # The mask has it all; said of the whole, later keys are not even read.
        causal: Any = {"is_causal": True, "implementation": "cudnn"}
        return jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale, **causal)

    return _on_mesh(local, mesh, q_BTHD, k_BTKD, v_BTKD, mask_BTT)


def _on_mesh(
    local: Callable[..., Array], mesh: Mesh | None, q: Array, k: Array, v: Array, rows: Array
) -> Array:
    """A kernel on every device's own rows and heads: the partitioner cannot cut one.

    Heads that the axis does not divide are computed by all of its devices. Fewer key/value heads
    than devices are repeated first, so that each device has those of its queries.
    """
    if mesh is None or mesh.size == 1:
        return local(q, k, v, rows)
    by_row = row_axes(mesh, q.shape[0]) or None
    H, K, shards = q.shape[2], k.shape[2], mesh.shape[HEAD_AXIS]
    by_head = HEAD_AXIS if shards > 1 and H % shards == 0 else None
    if by_head and K % shards:
        times = next(n for n in range(1, H // K + 1) if H // K % n == 0 and K * n % shards == 0)
        k, v = (jnp.repeat(x, times, axis=2) for x in (k, v))
    heads, others = PartitionSpec(by_row, None, by_head), PartitionSpec(by_row)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(heads, heads, heads, others),
        out_specs=heads,
        check_vma=False,  # a kernel does not say over which axes its result varies
    )(q, k, v, rows)


def _block(length: int, head_width: int) -> int:
    """Tokens of a block: as many as fit, unless padding the rows to whole blocks costs an eighth.

    A block of wide heads has to leave room for others in the memory beside the matrix unit.
    """
    fitting = [block for block in _BLOCKS if block * head_width <= 1024 * _LANES]
    for block in fitting:
        if -(-length // block) * block <= max(length * 9 // 8, _LANES):
            return block
    return _LANES


def _padded(x: Array, width: int, value: int = 0) -> Array:
    """The rows of x, [B, T, ...], filled up to so many tokens."""
    missing = width - x.shape[1]
    if not missing:
        return x
    pad = [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2)
    return jnp.pad(x, pad, constant_values=value)


def _splash_kernel(
    width: int, heads: int, window: int, softcap: float, block: int, interpret: bool
) -> Callable[..., Array]:
    """The kernel for one row: (q [H, T, D], k and v [K, T, D], segment ids [T]) -> [H, T, D]."""
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernel,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    shape = (width, width)
    one = masks.LocalMask(shape, (window - 1, 0), 0) if window else masks.CausalMask(shape)
    # The fused backward kernel writes a copy of the queries' gradient for every block of keys.
    fused = width // block <= 4
    of_queries = None if fused else block
    made: Callable[..., Any] = kernel.make_splash_mha(
        masks.MultiHeadMask([one] * heads),
        block_sizes=kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=of_queries,
            block_kv_dq=of_queries,
            use_fused_bwd_kernel=fused,
        ),
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap or None,
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )

    def of_row(q: Array, k: Array, v: Array, segments: Array) -> Array:
        return made(q, k, v, kernel.SegmentIds(segments, segments))

    return of_row
