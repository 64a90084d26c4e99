"""Text samples: continue prompts, greedily or at random.

The whole buffer goes through the model for every new token, which is simple, compiles once for a
length, and is quick enough for short samples of small models.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from ddk_jax.errors import UserError
from ddk_jax.models.decoder import Decoder, Params

BUCKET_TOKENS = 64
"""Buffers are a multiple of this long, so that similar lengths share one compiled program."""


def generate(
    decoder: Decoder,
    params: Params,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    end_id: int,
    key: Array,
) -> list[list[int]]:
    """Continue every prompt until the end token or the limit.

    The same key gives the same tokens. A prompt's random numbers do not depend on the other
    prompts.

    Args:
      decoder: the model.
      params: its parameters.
      prompts: token ids, at least one each. They may differ in length.
      max_new_tokens: tokens to add at most to each.
      temperature: of the softmax; 0 takes the most probable token.
      top_k: choose among this many most probable tokens; 0 means all. Unused at temperature 0.
      end_id: token that ends a continuation.
      key: of `jax.random`.

    Returns:
      The new tokens of each prompt, without the end token.

    Raises:
      UserError: an empty prompt, an id outside the vocabulary, an argument out of range, or more
        tokens than the model has positions.
    """
    _check(decoder, prompts, max_new_tokens, temperature, top_k)
    if not prompts:
        return []
    lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    buffer_length = -(-(int(lengths.max()) + max_new_tokens) // BUCKET_TOKENS) * BUCKET_TOKENS
    buffer = np.full((len(prompts), buffer_length), end_id, np.int32)
    for row, prompt in zip(buffer, prompts, strict=True):
        row[: len(prompt)] = prompt
    vocab_size = decoder.spec.vocab_size
    tokens = _fill(
        decoder,
        1 if temperature == 0 else min(top_k or vocab_size, vocab_size),
        params,
        jnp.asarray(buffer),
        jnp.asarray(lengths),
        jnp.int32(max_new_tokens),
        jnp.float32(temperature or 1.0),
        jnp.int32(end_id),
        key,
    )
    found = []
    for row, length in zip(np.asarray(tokens), lengths, strict=True):
        new = row[length : length + max_new_tokens].tolist()
        found.append(new[: new.index(end_id)] if end_id in new else new)
    return found


def _check(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
) -> None:
    spec = decoder.spec
    if max_new_tokens < 1 or top_k < 0 or not 0 <= temperature < float("inf"):
        raise UserError(
            f"max_new_tokens = {max_new_tokens}, temperature = {temperature}, top_k = {top_k}: "
            "expected at least 1, at least 0, at least 0"
        )
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {i} is empty: give at least one token to continue from")
        if min(prompt) < 0 or max(prompt) >= spec.vocab_size:
            raise UserError(
                f"prompt {i} has a token id outside the model's vocabulary of {spec.vocab_size}: "
                "encode it with the model's own tokenizer"
            )
        if len(prompt) + max_new_tokens > spec.max_positions:
            raise UserError(
                f"prompt {i} has {len(prompt)} tokens; with {max_new_tokens} new ones that is more "
                f"than the model's {spec.max_positions} positions: shorten it or generate fewer"
            )


@partial(jax.jit, static_argnums=(0, 1))
def _fill(
    decoder: Decoder,
    candidates: int,
    params: Params,
    buffer: Int[Array, "B T"],
    lengths: Int[Array, "B"],
    max_new_tokens: Int[Array, ""],
    temperature: Float[Array, ""],
    end_id: Int[Array, ""],
    key: Array,
) -> Int[Array, "B T"]:
    """The buffer with the new tokens behind every prompt; end tokens after the first one."""
    # What lies behind a token is causally hidden from it, so the rest of the buffer needs no mask.
    segment_ids = jnp.ones_like(buffer)
    positions = jnp.broadcast_to(jnp.arange(buffer.shape[1])[None], buffer.shape)
    rows = jnp.arange(buffer.shape[0])
    row_keys = jax.vmap(partial(jax.random.fold_in, key))(rows)
    head = decoder.head(params)

    def choose(row_key: Array, logits: Float[Array, "V"]) -> Int[Array, ""]:
        best, ids = jax.lax.top_k(logits, candidates)
        return ids[jax.random.categorical(row_key, best / temperature)]

    State = tuple[Int[Array, ""], Int[Array, "B T"], Bool[Array, "B"]]

    def unfinished(state: State) -> Bool[Array, ""]:
        step, _, done = state
        return (step < max_new_tokens) & ~jnp.all(done)

    def add_token(state: State) -> State:
        step, tokens, done = state
        hidden, _ = decoder.apply(params, tokens, segment_ids, positions)
        last = hidden[rows, lengths + step - 1]
        logits = (last @ head).astype(jnp.float32)
        keys = jax.vmap(partial(jax.random.fold_in, data=step))(row_keys)
        chosen = jnp.where(done, end_id, jax.vmap(choose)(keys, logits))
        tokens = tokens.at[rows, lengths + step].set(chosen)
        return step + 1, tokens, done | (chosen == end_id)

    start = (jnp.int32(0), buffer, jnp.zeros(buffer.shape[:1], bool))
    return jax.lax.while_loop(unfinished, add_token, start)[1]
