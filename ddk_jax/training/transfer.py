"""How far the reading of a big model is, for whoever waits for it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from types import TracebackType

from tqdm.auto import tqdm

from ddk_jax.training.metrics import is_watched

_log = logging.getLogger(__name__)

_NOTICEABLE_SECONDS = 3.0
_SECONDS_BETWEEN_LINES = 15.0


class TransferLine:
    """Shows bytes read or written of bytes in all, once it takes noticeable time.

    A bar on standard error where that is a terminal, and in a notebook; elsewhere a log line every
    now and then, and one at the end.
    """

    def __init__(self, what: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Start the clock.

        Args:
          what: name of the model.
          clock: seconds from an arbitrary start.
        """
        self._what, self._clock = what, clock
        self._start = self._last_line = clock()
        self._doing = ""
        self._total = 0
        self._bar: tqdm | None = None

    def update(self, doing: str, done: int, total: int) -> None:
        """Show how far it is.

        Args:
          doing: what is being done (`reading`); its numbers begin anew when that changes.
          done: bytes.
          total: bytes in all.
        """
        now, changed = self._clock(), doing != self._doing
        self._doing, self._total = doing, total
        if now - self._start < _NOTICEABLE_SECONDS:
            return
        if is_watched():
            if self._bar is None or changed:
                self._close_bar()
                self._bar = tqdm(
                    desc=f"{doing} {self._what}",
                    total=total,
                    unit="B",
                    unit_scale=True,
                    unit_divisor=1024,
                    dynamic_ncols=True,
                    leave=False,
                )
            self._bar.update(done - self._bar.n)
        elif now - self._last_line >= _SECONDS_BETWEEN_LINES:
            self._last_line = now
            _log.info("%s %s: %.1f of %.1f GiB", doing, self._what, done / 2**30, total / 2**30)

    def close(self) -> None:
        """Remove the bar, and say how long it took if that was noticeable."""
        self._close_bar()
        seconds = self._clock() - self._start
        if self._total and seconds >= _NOTICEABLE_SECONDS:
            _log.info(
                "%s %s: %.1f GiB in %.0f s", self._doing, self._what, self._total / 2**30, seconds
            )

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def __enter__(self) -> TransferLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self._close_bar()
