"""How much a model needs its layers, hidden dimensions, heads and neurons: measured on rows.

Legend: B rows, T tokens, L layers, E hidden, H query heads, K key/value heads, F inner MLP, D head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from ddk_jax.data.rows import DomainRows, HostBatch, empty_batch
from ddk_jax.losses.chunked import ChunkPlan
from ddk_jax.models.decoder import Decoder, segment_positions
from ddk_jax.models.layers import Inner
from ddk_jax.models.prune import Importance, Masks, masked, ones
from ddk_jax.training.micro import LABELS, Frozen, MicroLoss, label_inputs
from ddk_jax.training.state import Batch
from ddk_jax.training.step import predicted

Method: TypeAlias = Literal["gradient", "activation"]


def sampled_batches(
    rows: Sequence[DomainRows], count: int, batch_rows: int, seed: int
) -> Iterator[HostBatch]:
    """Rows drawn at random from every domain, in batches of one shape and one domain each.

    Args:
      rows: of every domain.
      count: rows of each domain; all of them if there are fewer.
      batch_rows: rows of a batch. The last one of a domain is filled up with padding.
      seed: the same one draws the same rows.
    """
    for domain in rows:
        random = np.random.default_rng([seed, domain.domain])
        drawn = random.choice(len(domain), size=min(count, len(domain)), replace=False)
        for start in range(0, len(drawn), batch_rows):
            part = np.sort(drawn[start : start + batch_rows])
            batch = empty_batch(batch_rows, domain.length, domain.domain)
            domain.fill(batch, np.arange(part.size, dtype=np.int64), part)
            yield batch


def measure_importance(
    decoder: Decoder,
    params: Any,
    batches: Iterable[Batch],
    *,
    method: Method,
    mesh: Mesh,
    plan: ChunkPlan,
) -> Importance:
    """How much a model needs its parts.

    Args:
      decoder: the model.
      params: its parameters.
      batches: rows, in single micro-batches.
      method: `gradient`: mean over batches of |dL/dm|, where L are the mean nats of a batch and m
        is the mask of the part (MiniMA, arXiv 2311.07052). `activation`: mean square over tokens of
        what a part passes on (after Minitron, arXiv 2407.14679). For layers both take the block
        influence: mean over tokens of 1 - cos(input, output) (ShortGPT, arXiv 2403.03853).
      mesh: where the parameters are.
      plan: how the loss is computed.
    """
    activation = _activation_step(decoder)
    gradient = _gradient_step(decoder, mesh, plan)
    total = Importance(*(np.zeros(()) for _ in Importance._fields))
    for batch in batches:
        layers, parts = activation(params, batch)
        if method == "gradient":
            parts = gradient(params, batch)
        found = Importance(*(np.asarray(x, np.float64) for x in (layers, *parts)))
        total = jax.tree.map(np.add, total, found)
    return total


def _gradient_step(decoder: Decoder, mesh: Mesh, plan: ChunkPlan) -> Callable[[Any, Batch], Masks]:
    """Jit `(params, batch) -> |dL/dm|` of the masks of all parts."""
    spec = decoder.spec
    loss = MicroLoss(
        student=replace(decoder, remat="full"),
        teachers=None,
        objective=LABELS,
        plan=replace(plan, head_gradient=False),
        mesh=mesh,
    )

    def mean_nats(masks: Masks, params: Any, micro: Batch) -> Float[Array, ""]:
        weights = predicted(micro)
        scale = weights / jnp.maximum(jnp.sum(weights), 1)
        student = {"student": masked(params, spec, masks), "objective": {}}
        return loss(student, Frozen(), micro, label_inputs(micro, scale[None]))[0]

    def step(params: Any, batch: Batch) -> Masks:
        micro = jax.tree.map(lambda x: x[0], batch)
        return jax.tree.map(jnp.abs, jax.grad(mean_nats)(ones(spec), params, micro))

    return jax.jit(step)


def _activation_step(decoder: Decoder) -> Callable[[Any, Batch], tuple[Array, Masks]]:
    """Jit `(params, batch) -> (block influence [L], mean squares of what the parts pass on)`."""
    spec = decoder.spec

    def step(params: Any, batch: Batch) -> tuple[Array, Masks]:
        tokens, segments = batch.tokens[0, :, :-1], batch.segment_ids[0, :, :-1]
        is_text = (segments > 0).astype(jnp.float32)[..., None]
        count = jnp.maximum(jnp.sum(is_text), 1)

        def mean(x: Array) -> Array:
            """Over tokens: [B, T, n] to [n]."""
            return jnp.sum(x * is_text, axis=(0, 1)) / count

        def visit(
            found: tuple[Array, Masks], number: Array, x: Array, out: Array, inner: Inner
        ) -> tuple[Array, Masks]:
            x, out, *inside = (value.astype(jnp.float32) for value in (x, out, *inner))
            attn_input, heads, mlp_input, neurons = map(jnp.square, inside)
            read = jnp.sum(heads.reshape(*heads.shape[:2], spec.num_kv_heads, -1), axis=-1)
            layers, (hidden, groups, per_neuron) = found
            return layers.at[number].set(mean(1 - _cosine(x, out))[0]), Masks(
                hidden + mean(attn_input) + mean(mlp_input),
                groups.at[number].set(mean(read)),
                per_neuron.at[number].set(mean(neurons)),
            )

        nothing = jax.tree.map(jnp.zeros_like, ones(spec))
        start = nothing.groups[:, 0], nothing
        return decoder.fold(params, tokens, segments, segment_positions(segments), start, visit)

    return jax.jit(step)


def _cosine(a_BTE: Float[Array, "B T E"], b_BTE: Float[Array, "B T E"]) -> Float[Array, "B T 1"]:
    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, axis=-1, keepdims=True)

    lengths = jnp.sqrt(dot(a_BTE, a_BTE) * dot(b_BTE, b_BTE))
    return dot(a_BTE, b_BTE) / jnp.maximum(lengths, jnp.float32(1e-30))
