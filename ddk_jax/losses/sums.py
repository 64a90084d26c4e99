"""The only reducer: a loss is a sum and a count until somebody reports it.

Sums and counts of micro-batches, devices and hosts add up, so no result depends on how a batch was
split. Legend: B rows, T tokens, D domains.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class DomainSums(NamedTuple):
    """A total and a count for every domain."""

    total: Float[Array, "D"]
    count: Float[Array, "D"]


def domain_sums(
    nats: Float[Array, "B T"],
    weights: Float[Array, "B T"],
    domain: Int[Array, "B"],
    num_domains: int,
) -> DomainSums:
    """Weighted totals by the domain of the row.

    Args:
      nats: loss of every token.
      weights: 0 where a token does not count; its nats then have no effect.
      domain: domain of each row, in [0, num_domains).
      num_domains: static number of domains.
    """
    kept = jnp.where(weights > 0, nats.astype(jnp.float32), jnp.float32(0))
    per_row = jnp.sum(kept * weights, axis=1), jnp.sum(weights, axis=1)
    total, count = (jax.ops.segment_sum(x, domain, num_domains) for x in per_row)
    return DomainSums(total, count)
