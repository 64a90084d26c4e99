"""Log-probabilities of given tokens after given contexts, in few compiled programs.

A request that is longer than the model is cut into windows: each predicted token is predicted once,
after as much of the text before it as fits. Windows are padded to few lengths (24, 32, 48, 64, 96,
...) and batched, so a dozen programs serve any number of tasks. Padding is on the left: the
predicted tokens of all rows then are the last columns, and the head works on these alone.

Legend: B rows, T tokens of a window, S predicted tokens, E hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Float32, Int

from ddk_jax.losses.targets import Head, finish
from ddk_jax.models.decoder import segment_positions
from ddk_jax.parallel.mesh import DATA_AXES, data_shards, replicated
from ddk_jax.tasks.requests import Request

BATCH_TOKENS = 2048
"""Tokens of a batch on one device, padding included."""

_SHORTEST = 24
_FEW_PREDICTED = 64
_HEAD_TOKENS = 512


@runtime_checkable
class Model(Protocol):
    """What is needed of a model; hashable."""

    def apply(
        self, params: Any, tokens: Array, segment_ids: Array, positions: Array
    ) -> tuple[Array, Any]:
        """Normed final hidden states [B, T, E]."""
        ...

    def head(self, params: Any) -> Head:
        """LM head."""
        ...


class Likelihood(NamedTuple):
    """What a model says of the predicted tokens of one request.

    Attributes:
        log_probs: log-probability of each, in nats.
        greedy: whether each is the most probable token.
        truncated: whether context was left out for want of positions.
    """

    log_probs: Float32[np.ndarray, " n"]
    greedy: Bool[np.ndarray, " n"]
    truncated: bool


class _Window(NamedTuple):
    """Input tokens [begin, end - 1) of a request, of which [first, end) are predicted."""

    request: int
    begin: int
    first: int
    end: int


def likelihoods(
    model: Model,
    params: Any,
    requests: Sequence[Request],
    *,
    mesh: Mesh,
    max_tokens: int,
    batch_tokens: int = BATCH_TOKENS,
) -> list[Likelihood]:
    """Score requests.

    Args:
        model: the model.
        params: its parameters, on the mesh.
        requests: what to score, in any order and number.
        mesh: its data axes share the rows of a batch.
        max_tokens: longest input of the model.
        batch_tokens: tokens of a batch on one device.

    Returns:
        One result for each request.
    """
    log_probs = [np.zeros(r.tokens.size - r.start, np.float32) for r in requests]
    greedy = [np.zeros(r.tokens.size - r.start, bool) for r in requests]
    truncated = [False] * len(requests)
    groups: dict[tuple[int, int], list[_Window]] = {}
    for number, request in enumerate(requests):
        for window in _windows(number, request, max_tokens):
            groups.setdefault(_shape(window, max_tokens), []).append(window)
            truncated[number] |= window.first == request.start and window.begin > 0
    for shape, windows in sorted(groups.items()):
        rows = data_shards(mesh) * max(1, batch_tokens // shape[0])
        for at in range(0, len(windows), rows):
            batch = windows[at : at + rows]
            arrays = _rows(requests, batch, rows, *shape)
            placed = jax.device_put(arrays, NamedSharding(mesh, PartitionSpec(DATA_AXES)))
            found = jax.device_get(_score(model, mesh, params, *placed))
            for window, row_log_probs, row_greedy in zip(batch, *found, strict=False):
                start, count = requests[window.request].start, window.end - window.first
                part = slice(window.first - start, window.end - start)
                log_probs[window.request][part] = row_log_probs[-count:]
                greedy[window.request][part] = row_greedy[-count:]
    return [Likelihood(*parts) for parts in zip(log_probs, greedy, truncated, strict=True)]


def _windows(number: int, request: Request, max_tokens: int) -> Iterator[_Window]:
    size = request.tokens.size
    for first in range(request.start, size, max_tokens):
        end = min(first + max_tokens, size)
        yield _Window(number, max(0, end - 1 - max_tokens), first, end)


def _shape(window: _Window, max_tokens: int) -> tuple[int, int]:
    """Columns of the batch that a window goes into: input tokens, and predicted ones."""
    length, predicted = window.end - 1 - window.begin, window.end - window.first
    power = 1 << (length - 1).bit_length()
    size = power * 3 // 4 if length <= power * 3 // 4 else power
    columns = min(max(_SHORTEST, size), max_tokens)
    return columns, min(_FEW_PREDICTED, columns) if predicted <= _FEW_PREDICTED else columns


def _rows(
    requests: Sequence[Request], windows: Sequence[_Window], rows: int, columns: int, predicted: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens [B, T], the number of tokens in each row [B], and labels [B, S]."""
    tokens = np.zeros((rows, columns), np.int32)
    lengths = np.zeros(rows, np.int32)
    labels = np.zeros((rows, predicted), np.int32)
    for row, window in enumerate(windows):
        ids = requests[window.request].tokens
        lengths[row] = window.end - 1 - window.begin
        tokens[row, columns - lengths[row] :] = ids[window.begin : window.end - 1]
        labels[row, predicted - (window.end - window.first) :] = ids[window.first : window.end]
    return tokens, lengths, labels


@partial(jax.jit, static_argnums=(0, 1))
def _score(
    model: Model,
    mesh: Mesh,
    params: Any,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    labels: Int[Array, "B S"],
) -> tuple[Float[Array, "B S"], Bool[Array, "B S"]]:
    """Log-probability of every label, and whether it is the most probable token.

    What stands where a row is padded means nothing.
    """
    columns = jnp.arange(tokens.shape[1], dtype=jnp.int32)
    segment_ids = (columns[None, :] >= tokens.shape[1] - lengths[:, None]).astype(jnp.int32)
    hidden, _ = model.apply(params, tokens, segment_ids, segment_positions(segment_ids))
    head = model.head(params)

    def score_columns(part: tuple[Array, Array]) -> tuple[Array, Array]:
        hidden_BSE, labels_BS = part
        raw = jnp.matmul(hidden_BSE, head.kernel, preferred_element_type=jnp.float32)
        logits = finish(raw.reshape(-1, raw.shape[2]), head, 0).reshape(raw.shape)
        chosen = jnp.take_along_axis(logits, labels_BS[:, :, None], axis=2)[:, :, 0]
        log_probs = chosen - jax.nn.logsumexp(logits, axis=2)
        return log_probs, jnp.argmax(logits, axis=2) == labels_BS

    # A few columns of all rows at a time: the logits of all would be larger than the model.
    B, S = labels.shape
    width = max(1, _HEAD_TOKENS * data_shards(mesh) // B)
    parts = -(-S // width)
    missing = parts * width - S

    def cut(x: Array) -> Array:
        x = jnp.pad(x[:, x.shape[1] - S :], [(0, 0), (missing, 0), *[(0, 0)] * (x.ndim - 2)])
        return jnp.moveaxis(x.reshape(B, parts, width, *x.shape[2:]), 1, 0)

    found = jax.lax.map(score_columns, (cut(hidden), cut(labels)))
    joined = [jnp.moveaxis(x, 0, 1).reshape(B, -1)[:, missing:] for x in found]
    log_probs, greedy = (jax.lax.with_sharding_constraint(x, replicated(mesh)) for x in joined)
    return log_probs, greedy
