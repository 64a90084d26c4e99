"""Batches of mixed domains: row numbers to domains (the schedule) to rows, built ahead of the step.

The order of the data is a pure function of (seed, weight log, row number). Row r comes from the
domain that the schedule says. The k-th row of a domain is taken from a permutation of the domain,
another one in each epoch, that depends on (seed, domain, epoch) alone: weights decide how far a
domain gets, never in which order.

grain gives the permutations, the threads and the prefetch. Its `mix` is not used: its weights are
fixed when it is built and not part of its state, and a weight of zero is refused.
"""

from __future__ import annotations

import hashlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import grain
import numpy as np
from jaxtyping import Float64, Int64

from ddk_jax.data import epochs
from ddk_jax.data.rows import DomainRows, HostBatch, empty_batch
from ddk_jax.mixture.schedule import RowSchedule, Weights

_THREADS = 2


class PipelineState(TypedDict):
    """Where a pipeline is, as JSON-able values; the same for any number of processes.

    Attributes:
        next_row: first row that was not delivered.
        seed: seed of the permutations.
        domains: name and number of rows of each domain, which decide the order as much as the seed.
        schedule: `RowSchedule.state(next_row)`: the rows drawn, and the weight log, including
            weights that were given but start later.
    """

    next_row: int
    seed: int
    domains: list[list[Any]]
    schedule: dict[str, Any]


class MixturePipeline(Iterator[tuple[HostBatch, PipelineState]]):
    """Endless batches of rows, mixed by weights that may change while it runs.

    Each batch comes with the state *after* it: batches that are built ahead of the step cannot put
    a checkpoint out of step with what was trained on. Not to be shared between threads.
    """

    def __init__(
        self,
        domains: Sequence[DomainRows],
        weights: Weights,
        *,
        rows_per_step: int,
        seed: int,
        prefetch: int,
        finish: Callable[[HostBatch], HostBatch] | None = None,
        places: Int64[np.ndarray, " local"] | None = None,
    ) -> None:
        """Start at row 0.

        Args:
            domains: training rows; all of one length.
            weights: share of each domain from row 0 on.
            rows_per_step: rows of a batch.
            seed: of the permutations, any non-negative number.
            prefetch: batches built ahead, in threads. 0: each is built when asked for.
            finish: done to every batch where it is built; pure.
            places: those rows of every batch that are read, the other ones are padding: what this
                process needs of a batch that several share. Default: all.

        Raises:
            ValueError: a number is out of range, or domains and weights do not fit.
        """
        if rows_per_step < 1 or prefetch < 0 or seed < 0:
            raise ValueError(
                f"rows_per_step {rows_per_step}, prefetch {prefetch}, seed {seed}: must be at "
                "least 1, 0 and 0"
            )
        lengths = {rows.length for rows in domains}
        if len(lengths) != 1:
            raise ValueError(f"expected domains with one row length, got {sorted(lengths)}")
        self._rows_per_step = rows_per_step
        schedule = RowSchedule(weights)
        self._builder = _BatchBuilder(domains, schedule, rows_per_step, seed, finish, places)
        if self._builder.schedule.num_domains != len(domains):
            raise ValueError(f"{len(weights)} weights given for {len(domains)} domains")
        options = grain.ReadOptions(
            num_threads=min(_THREADS, prefetch), prefetch_buffer_size=prefetch
        )
        self._batches = iter(grain.MapDataset.source(self._builder).to_iter_dataset(options))
        self._state = self._builder.state(0)

    @property
    def state(self) -> PipelineState:
        """The state after the last batch that was delivered."""
        return self._state

    def __next__(self) -> tuple[HostBatch, PipelineState]:
        """The next batch and the state after it."""
        batch: HostBatch = next(self._batches)
        self._state = self._builder.state(self._state["next_row"] + self._rows_per_step)
        return batch, self._state

    def set_weights(self, weights: Weights, start_row: int) -> None:
        """Let `weights` command the rows from `start_row` on.

        Batches that were built ahead are discarded and built again. `state` knows the new weights
        from now on; the state that came with the last batch does not.

        Raises:
            ValueError: bad weights, or `start_row` is not the start of a batch that is still to
            come.
        """
        if start_row % self._rows_per_step or start_row < self._state["next_row"]:
            raise ValueError(
                f"weights from row {start_row}: must be a multiple of {self._rows_per_step} rows "
                f"and not before row {self._state['next_row']}, the next one"
            )
        self._builder.extend(start_row, weights)
        self._state = self._builder.state(self._state["next_row"])
        self._go_to(self._state["next_row"])

    def set_state(self, state: PipelineState | Mapping[str, Any]) -> None:
        """Go on where a pipeline over the same domains was.

        Raises:
            ValueError: the state is of other domains, another seed or another size of batches.
        """
        if missing := PipelineState.__required_keys__ - state.keys():
            raise ValueError(f"not the state of a pipeline: without {', '.join(sorted(missing))}")
        mine = self._builder.state(0)
        if state["seed"] != mine["seed"] or state["domains"] != mine["domains"]:
            raise ValueError(
                f"the pipeline's state is of seed {state['seed']} and domains {state['domains']}; "
                f"here are {mine['seed']} and {mine['domains']}"
            )
        row = int(state["next_row"])
        if row % self._rows_per_step:
            raise ValueError(
                f"the pipeline's state is at row {row}, which does not start a batch of "
                f"{self._rows_per_step} rows"
            )
        self._builder.schedule = RowSchedule.from_state(state["schedule"])
        self._go_to(row)
        self._state = self._builder.state(row)

    def epochs(self) -> Float64[np.ndarray, " domains"]:
        """How often each domain was gone through, in the batches delivered so far."""
        return np.asarray(self._state["schedule"]["drawn"]) / self._builder.sizes

    def shortages(self, weights: Weights, rows: int) -> list[str]:
        """One sentence for each domain that is too small for its share of a run of `rows` rows."""
        names = [name for name, _ in self._state["domains"]]
        return epochs.shortages(names, np.asarray(weights, np.float64), self._builder.sizes, rows)

    def within_epochs(
        self, weights: Weights, start_row: int, rows: int, max_epochs: Sequence[float]
    ) -> Float64[np.ndarray, " domains"]:
        """Weights for `rows` rows from `start_row` on that take no domain past its limit.

        See `ddk_jax.data.epochs.within_limits`; `max_epochs` is by domain, 0 means no limit.

        Raises:
            DataError: no domain with weight may give so many rows.
        """
        return epochs.within_limits(
            np.asarray(weights, np.float64),
            np.asarray(self._builder.counts(start_row), np.int64),
            self._builder.sizes,
            np.asarray(max_epochs, np.float64),
            rows,
        )

    def close(self) -> None:
        """Stop the threads, each after the batch that it is making. Not to be used after this."""
        self._batches.close()

    def _go_to(self, row: int) -> None:
        self._batches.set_state({"next_index": row // self._rows_per_step})


class _BatchBuilder:
    """Random access to the batches of a schedule, from any thread."""

    def __init__(
        self,
        domains: Sequence[DomainRows],
        schedule: RowSchedule,
        rows_per_step: int,
        seed: int,
        finish: Callable[[HostBatch], HostBatch] | None,
        places: Int64[np.ndarray, " local"] | None,
    ) -> None:
        self._finish = finish
        everywhere = np.arange(rows_per_step, dtype=np.int64)
        self._is_read = np.isin(everywhere, everywhere if places is None else places)
        self.schedule = schedule
        self.sizes = np.asarray([len(rows) for rows in domains], np.int64)
        self._domains = domains
        self._rows_per_step = rows_per_step
        self._seed = seed
        self._lock = threading.Lock()
        self._orders = [
            grain.MapDataset.range(len(rows)).shuffle(_seed(seed, rows.name)).repeat()
            for rows in domains
        ]

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> HostBatch:
        """Batch number `index`."""
        first = index * self._rows_per_step
        with self._lock:
            domain, number_in_domain = self.schedule.rows(first, self._rows_per_step)
        batch = empty_batch(self._rows_per_step, self._domains[0].length)
        for number in np.unique(domain):
            places = np.flatnonzero((domain == number) & self._is_read)
            order = self._orders[number]
            indices = np.asarray([order[k] for k in number_in_domain[places].tolist()], np.int64)
            self._domains[number].fill(batch, places, indices)
        return batch if self._finish is None else self._finish(batch)

    def extend(self, start_row: int, weights: Weights) -> None:
        """Append to the weight log. A batch in the making past `start_row` may be of either."""
        with self._lock:
            self.schedule.extend(start_row, weights)

    def counts(self, row: int) -> Sequence[int] | np.ndarray:
        """Rows of each domain before `row`."""
        with self._lock:
            return self.schedule.counts(row)

    def state(self, row: int) -> PipelineState:
        """The state of a pipeline whose next row is `row`."""
        with self._lock:
            schedule = self.schedule.state(row)
        domains = [[rows.name, len(rows)] for rows in self._domains]
        return PipelineState(next_row=row, seed=self._seed, domains=domains, schedule=schedule)


def _seed(seed: int, name: str) -> int:
    """A 32-bit seed for a domain. By name, so that one more domain leaves the others' order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")
