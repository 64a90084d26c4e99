"""Which domain each training row comes from: exact quotas, with the error carried over.

The schedule is a pure function of an append-only log of (start row, weights): random access, the
same however the calls are chunked, so that a prefetched, resumed or re-sharded run sees the same
rows.

A domain is *owed* the sum of its commanded weights minus the rows drawn from it. Each row goes to
the domain that is owed most, unless some deadline would then be missed: under the current weights,
at most k draws fall due within k rows, where a draw is due before its domain is owed more than 1 -
1/(2D - 2) rows. If the draw of the most owed domain breaks that, the earliest deadline is served
instead, among the domains that are owed at least 1/(2D - 2). Those two numbers, and the proof that
constant weights can be held to within 1 - 1/(2D - 2) rows, are from Tijdeman, "The chairman
assignment problem", Discrete Mathematics 32 (1980). The first rule keeps the errors small, so that
little is outstanding when weights change; the second keeps every domain within one row for as long
as they do not.

No rule that does not know the coming weights can promise 1 across changes: with 2m domains and
equal weights, m of them are undrawn after m rows; if the weights then move to these alone, one of
them must come to be owed 3/2 - 1/m rows. See `tests/test_schedule.py` for what is reached.
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int32, Int64

_SUM_TOLERANCE = 1e-9
_TIE = 1e-9
_DENSE_ROWS = 256
_MEMO_ROWS = 256

Weights = Sequence[float] | Float64[np.ndarray, " domains"]


class LogEntry(NamedTuple):
    """The weights from one row on.

    Attributes:
        start_row: first row that these weights command.
        weights: share of each domain; they sum to 1.
        drawn: rows of each domain before `start_row`.
        carried: rows commanded minus rows drawn, of each domain, before `start_row`.
    """

    start_row: int
    weights: tuple[float, ...]
    drawn: tuple[int, ...]
    carried: tuple[float, ...]


def checked_weights(weights: Weights) -> Float64[np.ndarray, " domains"]:
    """The weights as float64 that sum to 1 to the last bits.

    Raises:
        ValueError: not a vector of finite numbers >= 0 that sum to 1 within 1e-9.
    """
    array = np.asarray(weights, dtype=np.float64)
    if array.ndim != 1 or array.size == 0:
        raise ValueError(f"mixture weights: expected one number per domain, got {weights!r}")
    if not np.all(np.isfinite(array)) or np.any(array < 0):
        raise ValueError(f"mixture weights must be finite and at least 0, got {array.tolist()}")
    total = float(array.sum())
    if abs(total - 1.0) > _SUM_TOLERANCE:
        raise ValueError(f"mixture weights must sum to 1, got {array.tolist()} (sum {total!r})")
    return array / total


class RowSchedule:
    """Assigns every row number a domain and the number of that domain's rows before it.

    Not thread-safe: reading advances a memo of recent positions.
    """

    def __init__(self, weights: Weights) -> None:
        """Start a log whose first entry commands every row from 0 on."""
        first = checked_weights(weights)
        zeros = (0,) * first.size
        self._log = [LogEntry(0, tuple(first.tolist()), zeros, (0.0,) * first.size)]
        self._plain_log: list[dict[str, Any]] = []
        self._memo_rows: list[int] = []
        self._memo: dict[int, Int64[np.ndarray, " domains"]] = {}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> RowSchedule:
        """Rebuild the schedule that `state()` described.

        Raises:
            ValueError: the state is not one of a schedule.
        """
        try:
            log = [
                LogEntry(
                    int(entry["start_row"]),
                    tuple(float(w) for w in entry["weights"]),
                    tuple(int(n) for n in entry["drawn"]),
                    tuple(float(e) for e in entry["carried"]),
                )
                for entry in state["log"]
            ]
            row = int(state["row"])
            drawn = np.asarray(state["drawn"], dtype=np.int64)
            schedule = cls(log[0].weights)
        except (KeyError, TypeError, IndexError) as error:
            raise ValueError(f"not the state of a row schedule: {error!r}") from error
        if any(len(part) != drawn.size for entry in log for part in entry[1:]):
            raise ValueError(
                "row schedule: the entries of the log differ in their number of domains"
            )
        starts = [entry.start_row for entry in log]
        if starts != sorted(starts) or starts[0] != 0 or int(drawn.sum()) != row:
            raise ValueError("row schedule: the log is out of order or its counts do not add up")
        # The stored weights are taken bit for bit: normalising again could change the last one.
        schedule._log = log
        schedule._remember(row, drawn)
        return schedule

    @property
    def num_domains(self) -> int:
        """Number of domains D."""
        return len(self._log[0].weights)

    @property
    def log(self) -> tuple[LogEntry, ...]:
        """The weights so far, oldest first."""
        return tuple(self._log)

    def state(self, row: int) -> dict[str, Any]:
        """What a schedule needs to go on from `row`, as JSON-able values.

        The rows drawn before `row` are included, so that a resumed run does not replay them.
        """
        for entry in self._log[len(self._plain_log) :]:
            columns = entry._asdict().items()
            self._plain_log.append({k: list(v) if isinstance(v, tuple) else v for k, v in columns})
        return {"log": list(self._plain_log), "row": row, "drawn": self.counts(row).tolist()}

    def extend(self, start_row: int, weights: Weights) -> None:
        """Append weights that command the rows from `start_row` on.

        Raises:
            ValueError: bad weights, another number of domains, or a start before the last entry's.
        """
        new = checked_weights(weights)
        last = self._log[-1]
        if new.size != self.num_domains:
            raise ValueError(f"mixture weights: {new.size} given for {self.num_domains} domains")
        if start_row < last.start_row:
            raise ValueError(
                f"mixture weights from row {start_row}: later weights already start at row "
                f"{last.start_row}, and the log is only appended to"
            )
        drawn = self.counts(start_row)
        carried = _commanded(last, start_row) - (drawn - np.asarray(last.drawn))
        self._log.append(
            LogEntry(start_row, tuple(new.tolist()), tuple(drawn.tolist()), tuple(carried.tolist()))
        )
        for row in [row for row in self._memo_rows if row > start_row]:
            self._memo_rows.remove(row)
            del self._memo[row]

    def counts(self, row: int) -> Int64[np.ndarray, " domains"]:
        """Rows of each domain among the rows before `row`."""
        start, drawn = self._nearest(row)
        domain, _ = self._walk(start, row - start, drawn)
        return drawn + np.bincount(domain, minlength=self.num_domains)

    def commanded(self, row: int) -> Float64[np.ndarray, " domains"]:
        """Sum of the commanded weights of the rows before `row`, in rows."""
        entry = self._log[self._entry_index(row)]
        return _commanded(entry, row) + np.asarray(entry.drawn)

    def rows(
        self, start: int, count: int
    ) -> tuple[Int32[np.ndarray, " count"], Int64[np.ndarray, " count"]]:
        """The rows `start` to `start + count - 1`.

        Returns:
            The domain of each row, and how many rows of that domain came before it.
        """
        if start < 0 or count < 0:
            raise ValueError(f"rows({start}, {count}): neither may be negative")
        drawn = self.counts(start)
        self._remember(start, drawn)
        domain, index = self._walk(start, count, drawn)
        self._remember(start + count, drawn + np.bincount(domain, minlength=self.num_domains))
        return domain, index

    def _entry_index(self, row: int) -> int:
        return bisect.bisect_right(self._log, row, key=lambda entry: entry.start_row) - 1

    def _nearest(self, row: int) -> tuple[int, Int64[np.ndarray, " domains"]]:
        """The last known position at or before `row`: of the memo or of the log."""
        if row < 0:
            raise ValueError(f"row {row} is negative")
        entry = self._log[self._entry_index(row)]
        at = bisect.bisect_right(self._memo_rows, row) - 1
        if at >= 0 and self._memo_rows[at] >= entry.start_row:
            return self._memo_rows[at], self._memo[self._memo_rows[at]]
        return entry.start_row, np.asarray(entry.drawn, dtype=np.int64)

    def _remember(self, row: int, drawn: Int64[np.ndarray, " domains"]) -> None:
        if row not in self._memo:
            bisect.insort(self._memo_rows, row)
        self._memo[row] = drawn
        if len(self._memo_rows) > _MEMO_ROWS:
            del self._memo[self._memo_rows.pop(0)]

    def _walk(
        self, start: int, count: int, drawn: Int64[np.ndarray, " domains"]
    ) -> tuple[Int32[np.ndarray, " count"], Int64[np.ndarray, " count"]]:
        """Draw `count` rows from `start` on, given the rows drawn before it; split at the log."""
        domain = np.empty(count, np.int32)
        index = np.empty(count, np.int64)
        drawn = drawn.copy()
        done = 0
        while done < count:
            at = self._entry_index(start + done)
            size = count - done
            if at + 1 < len(self._log):
                size = min(size, self._log[at + 1].start_row - (start + done))
            part = slice(done, done + size)
            _draw(self._log[at], start + done, drawn, domain[part], index[part])
            done += size
        return domain, index


def _commanded(
    entry: LogEntry, row: int | Int64[np.ndarray, "rows 1"]
) -> Float64[np.ndarray, "..."]:
    """Rows commanded before `row`, less those drawn before the entry: computed, not accumulated."""
    return np.asarray(entry.carried) + (row - entry.start_row) * np.asarray(entry.weights)


def _horizon(weights: Float64[np.ndarray, " domains"]) -> Int64[np.ndarray, " offsets"]:
    """Row offsets at which the draws that fall due are counted: every near row, then ever sparser.

    The far ones reach the second deadline of the domain with the smallest weight, up to a million
    rows.
    """
    farthest = min(2.0 / float(weights.min()), 1e6)
    offsets = list(range(_DENSE_ROWS + 1))
    while offsets[-1] < farthest:
        offsets.append(offsets[-1] + offsets[-1] // 4)
    return np.asarray(offsets, np.int64)


def _draw(
    entry: LogEntry,
    start: int,
    drawn: Int64[np.ndarray, " domains"],
    domain: Int32[np.ndarray, " rows"],
    index: Int64[np.ndarray, " rows"],
) -> None:
    """Fill `domain` and `index` for rows from `start` on, all under one entry; advances `drawn`."""
    active = np.flatnonzero(np.asarray(entry.weights) > 0)
    if active.size == 1:
        domain[:] = active[0]
        index[:] = drawn[active[0]] + np.arange(domain.size)
        drawn[active[0]] += domain.size
        return
    weights = np.asarray(entry.weights)[active]
    margin = 1.0 / (2 * active.size - 2)
    most = 1.0 - margin
    offsets = _horizon(weights)
    growth = offsets[:, None] * weights - (most + _TIE)
    since = (drawn - np.asarray(entry.drawn))[active].astype(np.float64)
    rows = np.arange(start + 1, start + 1 + domain.size, dtype=np.int64)[:, None]
    commanded = _commanded(entry, rows)[:, active]
    # A weight that has all but underflowed has its deadline beyond any run, not beyond float64.
    slope = 1.0 / np.maximum(weights, 1e-300)
    for i in range(domain.size):
        owed = commanded[i] - since
        choice = int(owed.argmax())
        deadline = np.where(owed >= margin - _TIE, (most - owed) * slope, np.inf)
        earliest = int(deadline.argmin())
        if earliest != choice and deadline[earliest] < np.inf:
            owed[choice] -= 1.0
            due = np.maximum(np.ceil(growth + owed), 0.0).sum(axis=1)
            if np.any(due > offsets):
                choice = earliest
        since[choice] += 1.0
        domain[i] = active[choice]
        index[i] = drawn[active[choice]]
        drawn[active[choice]] += 1
