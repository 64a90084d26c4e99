"""Continuations of prompts, token by token, with a cache of keys and values.

All shapes are fixed: prompts are padded on the left and new tokens on the right to a multiple of
`BUCKET_TOKENS`, so that batches of like lengths share two compiled programs, one that reads the
prompts (`prefill`) and one that adds the tokens (`decode`). Prompts of different lengths do not see
their padding, and every row has random numbers of its own: what a prompt becomes does not depend on
the others of its batch.

Legend: B rows, P columns of the prompts, N of the new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from ddk_jax.errors import UserError
from ddk_jax.losses.targets import finish
from ddk_jax.models.cache import Cache, Rows
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.sampling import Choice, Method, Numbers, Sampling, choose
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import DATA_AXES, MESH_AXES, VOCAB_AXIS, data_shards

BUCKET_TOKENS = 64
"""Prompts and continuations are padded to a multiple of this."""


class Continuations(NamedTuple):
    """What was added to every prompt; behind a stop token there is padding."""

    tokens: Int[Array, "B N"]
    """New tokens, the stop token included; 0 in the padding."""
    mask: Bool[Array, "B N"]
    """Whether there is a token."""
    log_probs: Float[Array, "B N"]
    """Log-probability of each under the model, in nats: at temperature 1, among all tokens. 0 in
    the padding."""
    sampling_log_probs: Float[Array, "B N"]
    """Log-probability of each in the distribution that it was drawn from (temperature, top-k,
    top-p, no stop token too early); 0 for greedy choices and in the padding."""

    def lists(self, stop: Sequence[int] = ()) -> list[list[int]]:
        """The new tokens of every prompt, without the given ones at the end."""
        found = []
        for row, there in zip(np.asarray(self.tokens), np.asarray(self.mask), strict=True):
            new = row[there].tolist()
            found.append(new[:-1] if new and new[-1] in stop else new)
        return found


class State(NamedTuple):
    """Prompts that were read."""

    hidden: Float[Array, "B E"]
    """Final hidden states of their last tokens."""
    rows: Rows
    column: Int[Array, ""]
    """The next one."""


def generate(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    key: Array,
    vocab_size: int = 0,
) -> Continuations:
    """Continue every prompt until a stop token or the limit.

    The same key gives the same tokens. On a mesh, rows lie on its data axes and heads on its tensor
    axis, as in training.

    Args:
      decoder: the model.
      params: its parameters, on one device or on a mesh.
      prompts: token ids, at least one each. They may differ in length.
      sampling: how tokens are chosen, and when to stop.
      key: of `jax.random`.
      vocab_size: tokens of the vocabulary; columns of the head from there on are padding, which is
        never chosen. 0: all are tokens.

    Returns:
      A row for every prompt, in their order, of `sampling.max_new_tokens` columns or some more.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, or more tokens than the model has
        positions.
    """
    _check(decoder.spec, prompts, sampling, vocab_size)
    mesh = _mesh_of(params)
    share = data_shards(mesh) if mesh else 1
    count = max(share, -(-len(prompts) // share) * share)
    lengths = np.ones(count, np.int32)
    lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
    columns = _bucket(int(lengths.max()))
    tokens = np.zeros((count, columns), np.int32)
    for row, prompt in zip(tokens, prompts, strict=False):
        row[columns - len(prompt) :] = prompt
    new_columns = _bucket(sampling.max_new_tokens)
    is_row = np.arange(count) < len(prompts)
    given = tokens, columns - lengths, lengths + sampling.max_new_tokens, is_row
    if mesh:
        given = jax.device_put(given, NamedSharding(mesh, PartitionSpec(DATA_AXES)))
    placed, starts, longest, is_real = (jnp.asarray(x) for x in given)
    room, rows = columns + new_columns, Rows(starts, longest)
    state, cache = prefill(decoder, params, placed, rows, columns=room, mesh=mesh)
    found, _ = decode(
        decoder,
        params,
        state,
        cache,
        is_real,
        sampling.numbers,
        key,
        new_columns=new_columns,
        method=sampling.method,
        vocab_size=vocab_size,
        mesh=mesh,
    )
    return jax.tree.map(lambda x: x[: len(prompts)], found)


@partial(jax.jit, static_argnames=("decoder", "columns", "mesh"))
def prefill(
    decoder: Decoder,
    params: Params,
    tokens: Int[Array, "B P"],
    rows: Rows,
    *,
    columns: int,
    mesh: Mesh | None = None,
) -> tuple[State, Cache]:
    """Read prompts that end in the last column.

    Args:
      decoder: the model; static.
      params: its parameters.
      tokens: the prompts.
      rows: where each starts, and how long it may become.
      columns: room for prompts and new tokens; static.
      mesh: where the parameters lie. None: on one device.
    """
    hidden, cache = decoder.prefill(params, tokens, rows, columns)
    if mesh is not None:
        heads = VOCAB_AXIS if decoder.spec.num_kv_heads % mesh.shape[VOCAB_AXIS] == 0 else None
        placed = NamedSharding(mesh, PartitionSpec(DATA_AXES, heads, None, None))
        cache = jax.lax.with_sharding_constraint(cache, placed)
    return State(hidden, rows, jnp.int32(tokens.shape[1])), cache


class _Loop(NamedTuple):
    """Between two tokens."""

    step: Int[Array, ""]
    """Tokens chosen so far."""
    last: Int[Array, "B"]
    done: Bool[Array, "B"]
    cache: Cache
    found: Continuations

    def and_then(self, choice: Choice, stop: Int[Array, "n"]) -> _Loop:
        """With one more token in every row that is not done."""
        there = ~self.done
        values = (choice.token, there, choice.log_prob, choice.sampling_log_prob)
        columns = (
            column.at[:, self.step].set(jnp.where(there, value, jnp.zeros_like(value)))
            for column, value in zip(self.found, values, strict=True)
        )
        stopped = jnp.any(choice.token[:, None] == stop[None, :], axis=1)
        return _Loop(
            self.step + 1, choice.token, self.done | stopped, self.cache, Continuations(*columns)
        )


@partial(
    jax.jit,
    static_argnames=("decoder", "new_columns", "method", "vocab_size", "mesh"),
    donate_argnames=("cache",),
)
def decode(
    decoder: Decoder,
    params: Params,
    state: State,
    cache: Cache,
    is_row: Bool[Array, "B"],
    numbers: Numbers,
    key: Array,
    *,
    new_columns: int,
    method: Method,
    vocab_size: int = 0,
    mesh: Mesh | None = None,
) -> tuple[Continuations, Cache]:
    """Add tokens to prompts that were read; the arguments that are not arrays are static.

    Args:
      decoder: as for `prefill`.
      params: likewise.
      state: from `prefill`.
      cache: likewise; it is donated, and comes back changed.
      is_row: whether there is a prompt; where not, nothing is added.
      numbers: limits, temperature and so on.
      key: of `jax.random`. Row i draws token j with a key made of this, i and j.
      new_columns: N, at least the tokens that are asked for; prompts and these have room in
        the cache.
      method: how tokens are chosen.
      vocab_size: as for `generate`.
      mesh: as for `prefill`.
    """
    layers = decoder.unstacked(params)
    B = is_row.shape[0]
    keys = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(B))

    def chosen(hidden: Float[Array, "B E"], step: Int[Array, ""]) -> Choice:
        head = decoder.head(params)
        raw = jnp.matmul(hidden, head.kernel, preferred_element_type=jnp.float32)
        logits = finish(raw, head, vocab_size)
        if mesh is not None:
            # Only here does a device look at the whole vocabulary, for its own rows.
            placed = NamedSharding(mesh, PartitionSpec(DATA_AXES, None))
            logits = jax.lax.with_sharding_constraint(logits, placed)
        return choose(logits, keys, step, method, numbers)

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return (loop.step < numbers.max_new_tokens) & ~jnp.all(loop.done)

    def add_token(loop: _Loop) -> _Loop:
        hidden, cache = decoder.extend(
            params, layers, loop.last, state.column + loop.step - 1, state.rows, loop.cache
        )
        loop = loop._replace(cache=cache)
        return loop.and_then(chosen(hidden, loop.step), numbers.stop)

    types = (jnp.int32, bool, jnp.float32, jnp.float32)
    nothing = Continuations(*(jnp.zeros((B, new_columns), dtype) for dtype in types))
    loop = _Loop(jnp.int32(0), jnp.zeros(B, jnp.int32), ~is_row, cache, nothing)
    loop = loop.and_then(chosen(state.hidden, loop.step), numbers.stop)
    loop = jax.lax.while_loop(unfinished, add_token, loop)
    return loop.found, loop.cache


def _bucket(tokens: int) -> int:
    return -(-tokens // BUCKET_TOKENS) * BUCKET_TOKENS


def _mesh_of(params: Params) -> Mesh | None:
    """The mesh that the parameters lie on."""
    placed = getattr(jax.tree.leaves(params)[0], "sharding", None)
    mesh = placed.mesh if isinstance(placed, NamedSharding) else None
    return mesh if isinstance(mesh, Mesh) and mesh.axis_names == MESH_AXES else None


def _check(
    spec: ModelSpec, prompts: Sequence[Sequence[int]], sampling: Sampling, vocab_size: int
) -> None:
    size = vocab_size or spec.vocab_size
    wrong = [token for token in sampling.stop if not 0 <= token < size]
    if wrong:
        raise UserError(f"stop tokens {wrong}: outside the model's vocabulary of {size}")
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: give at least one token to continue from")
        if min(prompt) < 0 or max(prompt) >= size:
            raise UserError(
                f"prompt {i} has a token id outside the model's vocabulary of {size}: "
                "encode it with the model's own tokenizer"
            )
        new = sampling.max_new_tokens
        if len(prompt) + new > spec.max_positions:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with {new} new ones that is more than the "
                f"model's {spec.max_positions} positions: shorten it or generate fewer"
            )
