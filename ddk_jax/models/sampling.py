"""Choosing the next token: settings, and one draw for every row.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from ddk_jax.errors import UserError
from ddk_jax.losses.top_k import top_k

_STOP_TOKENS = 8
"""Their number is padded to a multiple of this, so that programs are shared."""
_NO_TOKEN = 2**31 - 1
_SIGN = np.uint32(2**31)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How prompts are continued."""

    max_new_tokens: int
    """Tokens to add at most."""
    min_new_tokens: int = 0
    """Before this many tokens, no stop token is chosen."""
    temperature: float = 1.0
    """Logits are divided by it; 0 takes the most probable token."""
    top_k: int = 0
    """Choose among this many most probable tokens (and those that equal the last). 0: all."""
    top_p: float = 1.0
    """Choose among the fewest most probable tokens that together have this probability."""
    stop: tuple[int, ...] = ()
    """Tokens that end a continuation."""

    def __post_init__(self) -> None:
        for name, least in {"max_new_tokens": 1, "min_new_tokens": 0, "top_k": 0}.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: needs at least {least}")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature = {self.temperature}: needs a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: needs a share in (0, 1]")
        if self.min_new_tokens > self.max_new_tokens:
            raise UserError(
                f"min_new_tokens = {self.min_new_tokens} is more than max_new_tokens = "
                f"{self.max_new_tokens}"
            )

    @property
    def method(self) -> Method:
        """What a program is compiled for."""
        if self.temperature == 0:
            return Method(greedy=True, top_k=0, nucleus=False)
        return Method(greedy=False, top_k=self.top_k, nucleus=self.top_p < 1)

    @property
    def numbers(self) -> Numbers:
        """What a program reads."""
        return Numbers(
            jnp.int32(self.max_new_tokens),
            jnp.int32(self.min_new_tokens),
            jnp.float32(self.temperature or 1),
            jnp.float32(self.top_p),
            jnp.asarray(self.stop + (_NO_TOKEN,) * (-len(self.stop) % _STOP_TOKENS), jnp.int32),
        )


class Method(NamedTuple):
    """The part of `Sampling` that decides what is computed; static."""

    greedy: bool
    top_k: int
    nucleus: bool


class Numbers(NamedTuple):
    """The part of `Sampling` that can change without another program."""

    max_new_tokens: Int[Array, ""]
    min_new_tokens: Int[Array, ""]
    temperature: Float[Array, ""]
    top_p: Float[Array, ""]
    stop: Int[Array, "n"]


class Choice(NamedTuple):
    """The next token of every row."""

    token: Int[Array, "B"]
    log_prob: Float[Array, "B"]
    """Log-probability under the model, in nats: at temperature 1, among all tokens."""
    sampling_log_prob: Float[Array, "B"]
    """Log-probability of being chosen, in nats: after temperature, top-k, top-p and ruling out stop
    tokens; 0 for a greedy choice."""


def choose(
    logits: Float[Array, "B V"],
    keys: Array,
    step: Int[Array, ""],
    method: Method,
    numbers: Numbers,
) -> Choice:
    """One token for every row.

    Args:
      logits: float32.
      keys: one of `jax.random` for every row.
      step: number of the new token, from 0 on.
      method: what to compute.
      numbers: temperature and so on.
    """
    log_p = jax.nn.log_softmax(logits)
    is_stop = jnp.zeros(logits.shape[1], bool).at[numbers.stop].set(True, mode="drop")
    ruled_out = is_stop & (step < numbers.min_new_tokens)
    allowed = jnp.where(ruled_out[None, :], -jnp.inf, logits)
    if method.greedy:
        token = jnp.argmax(allowed, axis=1).astype(jnp.int32)
        chosen = _of_token(log_p, token)
        return Choice(token, chosen, jnp.zeros_like(chosen))
    scores = allowed / numbers.temperature
    if method.top_k:
        least = top_k(scores, min(method.top_k, scores.shape[1]))[0][:, -1:]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    if method.nucleus:
        scores = jnp.where(_nucleus(scores, numbers.top_p), scores, -jnp.inf)
    draws = jax.vmap(partial(jax.random.fold_in, data=step))(keys)
    token = jax.vmap(jax.random.categorical)(draws, scores).astype(jnp.int32)
    return Choice(token, _of_token(log_p, token), _of_token(jax.nn.log_softmax(scores), token))


def _nucleus(scores: Float[Array, "B V"], top_p: Float[Array, ""]) -> Bool[Array, "B V"]:
    """The fewest most probable tokens that together have `top_p`; equal scores are kept together.

    The least score among them is found bit by bit, which is exact, takes as many sums as a score
    has bits, and on CPU a fifteenth of the time of a sort.
    """
    p = jax.nn.softmax(scores)
    bits = jax.lax.bitcast_convert_type(scores, jnp.uint32)
    # Whole numbers in the order of the scores: those of negative ones grow with their size.
    ordered = jnp.where(bits >> jnp.uint32(31) == 1, ~bits, bits | _SIGN)

    def with_bit(i: Int[Array, ""], least: UInt32[Array, "B"]) -> UInt32[Array, "B"]:
        higher = least | (_SIGN >> i.astype(jnp.uint32))
        share = jnp.sum(jnp.where(ordered >= higher[:, None], p, jnp.float32(0)), axis=1)
        return jnp.where(share >= top_p, higher, least)

    least = jax.lax.fori_loop(0, 32, with_bit, jnp.zeros_like(ordered[:, 0]))
    return ordered >= least[:, None]


def _of_token(values: Float[Array, "B V"], token: Int[Array, "B"]) -> Float[Array, "B"]:
    return jnp.take_along_axis(values, token[:, None], axis=1)[:, 0]
