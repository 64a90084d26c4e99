"""SIGTERM as a request: finish the step, save, and exit with 0."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Preemption:
    """Context manager; `requested` turns true when the process is told to stop.

    Outside of the main thread, where Python installs no signal handlers, it stays false.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: Any = None

    def __enter__(self) -> Preemption:
        """Install the handler."""
        if threading.current_thread() is threading.main_thread():
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
        self.requested = True
