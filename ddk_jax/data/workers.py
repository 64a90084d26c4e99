"""The same function over many things, in one process or in several, saying how far it is."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from tqdm import tqdm

from ddk_jax.errors import StorageError

Progress = Callable[[str], None]
"""Takes one line of text for the user."""

_SECONDS = 10.0
_AHEAD = 4
T = TypeVar("T")
R = TypeVar("R")


class Meter:
    """Says how far a piece of work is: a bar on a terminal, otherwise a line every few seconds."""

    def __init__(self, what: str, total: int, unit: str, progress: Progress) -> None:
        """Args are a word for the work, its size and unit, and where lines go."""
        self._bar = tqdm(total=total, desc=what, unit=unit, unit_scale=True, disable=None)
        self._what, self._total, self._unit, self._progress = what, total, unit, progress
        self._done = 0
        self._start = self._said = time.monotonic()

    def add(self, amount: int) -> None:
        """So much more is done."""
        self._bar.update(amount)
        self._done += amount
        now = time.monotonic()
        if not self._bar.disable or now - self._said < _SECONDS or not self._done:
            return
        self._said = now
        seconds = now - self._start
        left = seconds / self._done * (self._total - self._done)
        self._progress(
            f"{self._what}: {self._done / max(1, self._total):.0%}, "
            f"{tqdm.format_sizeof(self._done / seconds)}{self._unit}/s, "
            f"about {tqdm.format_interval(left)} left"
        )

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()


@contextlib.contextmanager
def metered(what: str, total: int, unit: str, progress: Progress) -> Iterator[Meter]:
    """A meter that is closed in the end."""
    meter = Meter(what, total, unit, progress)
    try:
        yield meter
    finally:
        meter.close()


class Pool:
    """Processes that import nothing but what they work with, and end with the one that made them.

    One worker means this process itself.
    """

    def __init__(self, workers: int) -> None:
        """Start lazily: processes are made when there is work.

        Args:
            workers: how many; 0: as many as there are cores.
        """
        self.workers = workers or os.cpu_count() or 1
        self._executor: ProcessPoolExecutor | None = None

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def run(
        self, function: Callable[[T], R], items: Sequence[T], done: Callable[[T], None]
    ) -> Iterator[tuple[int, R]]:
        """Apply a function to every item; number of the item and result, in any order.

        Raises:
            StorageError: a worker was killed. Besides, what the function raises.
        """
        if self.workers == 1 or len(items) < 2:
            for number, item in enumerate(items):
                yield number, function(item)
                done(item)
            return
        executor = self._started()
        waiting = iter(enumerate(items))
        running: dict[Any, int] = {}
        try:
            while True:
                for number, item in waiting:
                    running[executor.submit(function, item)] = number
                    if len(running) >= _AHEAD * self.workers:
                        break
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    number = running.pop(future)
                    yield number, future.result()
                    done(items[number])
        except BrokenProcessPool as error:
            raise StorageError(
                "a worker was killed, perhaps for lack of memory: the same command goes on where "
                "it was; give it fewer --workers"
            ) from error

    def _started(self) -> ProcessPoolExecutor:
        if self._executor is None:
            # Not fork: other threads may hold locks, and an accelerator must not be shared.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(self.workers, context, initializer=_begin)
        return self._executor


def _begin() -> None:
    """First thing in a worker."""
    # An interrupt is the parent's to handle, and the workers are the parallelism.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed does not tell its workers: they would wait for work for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
