"""SIGTERM as a request: finish the step, save, and exit with 0."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from ddk_jax.parallel import processes


class Preemption:
    """Context manager; `requested()` turns true when the process is told to stop.

    Of several processes, when any of them is: then it is jax that handles the signal. Outside of
    the main thread, where Python installs no signal handlers, it stays false.
    """

    def __init__(self) -> None:
        self._requested = False
        self._several = processes.count() > 1
        self._previous: Any = None

    def requested(self) -> bool:
        """Whether to save and end now. To be asked once a step."""
        return processes.told_to_stop() if self._several else self._requested

    def __enter__(self) -> Preemption:
        """Install the handler."""
        if not self._several and threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGTERM, self._request)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Put the old handler back."""
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
