"""One run on several processes, as a rule one on each host: how they find and hear each other.

`join` comes before the first use of jax. From then on every process sees the devices of all, and
runs the same program; what depends on more than the program (a clock, a file, a signal) is decided
by the first process and told to the others (`from_first`), or is asked of all (`gather`).

All of it goes through the coordination service of `jax.distributed`, which the first process has,
and not through the devices: a decision does not wait behind a step that is still computing, and no
second program with collectives is in flight beside it. A single process pays nothing.

    DDK_COORDINATOR     host:port of the first process; the port must be free there
    DDK_NUM_PROCESSES   how many processes take part
    DDK_PROCESS_ID      number of this one, from 0

On Cloud TPU with several workers the variables are not needed.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import jax
from jax.experimental import multihost_utils

from ddk_jax.errors import UserError

_log = logging.getLogger(__name__)

COORDINATOR = "DDK_COORDINATOR"
NUM_PROCESSES = "DDK_NUM_PROCESSES"
PROCESS_ID = "DDK_PROCESS_ID"

HEARTBEAT_SECONDS = 20
"""A process that has not been heard of for so long is dead, and ends the run of the others."""
JOIN_SECONDS = 300
"""All processes have to be there after this time."""

_LEAVE_SECONDS = 60
_TELL_SECONDS = 10
_LOOK_SECONDS = 1.0
_WAIT_MILLISECONDS = 5_000

T = TypeVar("T")


class Place(NamedTuple):
    """What the variables say of this process."""

    coordinator: str
    count: int
    index: int


def join() -> None:
    """Find the other processes of this run, if there are any. Does nothing when called again.

    They are those of the three variables above, or the other workers of a Cloud TPU.

    Raises:
      UserError: the variables contradict each other, jax was used before, or the first process
        cannot be had. Where the others do not come in time, jax ends this process (SIGABRT).
    """
    place = place_of(os.environ)
    if jax.distributed.is_initialized() or (place is None and not _on_several_tpu_workers()):
        return
    missing = (
        f"did not find the other processes of this run. Start all of them within {JOIN_SECONDS} "
        f"seconds, and see that they reach {place.coordinator if place else 'the first one'}"
    )
    try:
        with _LastWords(missing):
            jax.distributed.initialize(
                coordinator_address=place.coordinator if place else None,
                num_processes=place.count if place else None,
                process_id=place.index if place else None,
                # Not SLURM's: of all GPUs of a node it would leave us one.
                cluster_detection_method="deactivate" if place else None,
                initialization_timeout=JOIN_SECONDS,
                heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
                shutdown_timeout_seconds=_LEAVE_SECONDS,
            )
    except (RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())
        if "must be called before" in said:
            raise UserError(
                "this run has several processes, which have to find each other before jax is used "
                "for the first time: start the training first, or, for one process alone, unset "
                f"{COORDINATOR}"
            ) from error
        raise UserError(f"{missing}: {said}") from error
    # All processes have to be there for this as well; later they may go one after the other.
    jax.devices()
    _log.info("event=join process=%d of=%d", index(), count())


def place_of(environment: Any) -> Place | None:
    """What the variables say; None if they are not set, or name one process.

    Args:
      environment: a mapping such as `os.environ`.

    Raises:
      UserError: some are missing, or make no sense.
    """
    names = (COORDINATOR, NUM_PROCESSES, PROCESS_ID)
    values = {name: environment.get(name, "") for name in names}
    if not any(values.values()):
        return None
    if missing := [name for name, value in values.items() if not value]:
        raise UserError(f"several processes: set {', '.join(missing)} too (see docs/gpu.md)")
    host, _, port = values[COORDINATOR].rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"{COORDINATOR}={values[COORDINATOR]}: must be like node0:8482")
    if not (values[NUM_PROCESSES].isdecimal() and values[PROCESS_ID].isdecimal()):
        raise UserError(f"{NUM_PROCESSES} and {PROCESS_ID}: must be numbers")
    place = Place(values[COORDINATOR], int(values[NUM_PROCESSES]), int(values[PROCESS_ID]))
    if place.index >= place.count:
        raise UserError(
            f"{PROCESS_ID}={place.index}: must be less than {NUM_PROCESSES}={place.count}; the "
            "first process is 0"
        )
    return place if place.count > 1 else None


def _on_several_tpu_workers() -> bool:
    """Whether this is one of several workers of a Cloud TPU, as jax itself will find."""
    # There are no public names for this, and `initialize` asks the same ones.
    from jax._src import cloud_tpu_init
    from jax._src.clusters import GceTpuCluster, GkeTpuCluster

    platforms = jax.config.jax_platforms or "tpu"  # pyrefly: ignore[missing-attribute]
    if "tpu" not in platforms.split(",") or not cloud_tpu_init.running_in_cloud_tpu_vm:
        return False
    clusters: tuple[Any, ...] = (GkeTpuCluster, GceTpuCluster)
    try:
        found = next((cluster for cluster in clusters if cluster.is_env_present()), None)
        return found is not None and found.get_process_count() > 1
    except (OSError, RuntimeError, ValueError) as error:  # no metadata server: Colab, a workstation
        _log.debug("no Cloud TPU cluster: %s", error)
        return False


def count() -> int:
    """Processes of this run. One that is alone does not start jax for the answer."""
    return jax.process_count() if jax.distributed.is_initialized() else 1


def index() -> int:
    """Number of this process."""
    return jax.process_index() if jax.distributed.is_initialized() else 0


def is_first() -> bool:
    """Whether this process decides and writes for all."""
    return index() == 0


def from_first(make: Callable[[], T]) -> T:
    """What `make` returns in the first process, in every process. Others do not call it.

    All processes call this in the same order. The value is JSON: what it has as tuples comes to the
    others as lists.
    """
    if count() == 1:
        return make()
    key = f"ddk/said/{next(_numbers)}"
    if not is_first():
        return json.loads(_wait_for(key))
    value = make()
    _client().key_value_set(key, json.dumps(value))
    return value


def gather(value: T) -> list[T]:
    """The values of all processes, in their order; returns when all have called. JSON, as above."""
    if count() == 1:
        return [value]
    key = f"ddk/said/{next(_numbers)}"
    _client().key_value_set(f"{key}/{index()}", json.dumps(value))
    return [json.loads(_wait_for(f"{key}/{number}")) for number in range(count())]


@contextmanager
def first_goes_first() -> Iterator[None]:
    """What is done within is done by the first process alone, and then by all others.

    For what leaves files behind that the others find, where they share a disk. No computation on
    the devices. No process goes on before all have done it: where one fails, none has gone further.
    """
    if not is_first():
        from_first(lambda: None)
    yield
    if is_first():
        from_first(lambda: None)
    gather(None)


def told_to_stop() -> bool:
    """Whether a process was told to stop (SIGTERM): true in all of them after the same call.

    For several processes, which call it once a step: jax's own handler passes the signal on, and
    names a call that none of them has made yet.
    """
    return multihost_utils.reached_preemption_sync_point(next(_calls))


@contextmanager
def together() -> Iterator[None]:
    """Within, an error of one process ends all, with its message and its exit code.

    Others may wait for ever for a process that has left, so they are ended where they are. So they
    are, by jax's runtime, when a process dies without a word; then they say what that means.
    """
    if count() == 1:
        yield
        return
    with _Watch() as watch:
        try:
            yield
            gather(None)  # the first one has the service, so that it leaves last
        except BaseException as error:
            watch.tell(error)
            raise


_numbers = itertools.count()
_calls = itertools.count(1)
_blocks = itertools.count()


def _client() -> Any:
    # What checkpointing libraries use as well; jax has no public name for it.
    from jax._src import distributed

    return distributed.global_state.client


def _wait_for(key: str) -> str:
    """Wait for the value of a key, however long: in pieces, so that Ctrl-C is heard."""
    while True:
        try:
            return _client().blocking_key_value_get(key, _WAIT_MILLISECONDS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):
                raise


class _Watch:
    """Looks whether another process has failed, and ends this one if so."""

    def __init__(self) -> None:
        self._key = f"ddk/failed/{next(_blocks)}"
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, name="processes", daemon=True)
        self._last_words = _LastWords(
            "has ended without finishing: it was killed, or another one was, without which it "
            "cannot go on. Start all of them again with the same command; the run continues from "
            "its newest checkpoint"
        )

    def __enter__(self) -> _Watch:
        self._last_words.__enter__()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._last_words.__exit__()

    def tell(self, error: BaseException) -> None:
        """Let the others end, and wait until they are about to."""
        self._stop.set()
        self._thread.join()
        code = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        said = f"{'' if isinstance(error, UserError) else f'{type(error).__name__}: '}{error}"
        note = {"process": index(), "code": code, "said": " ".join(said.split())}
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the service may be gone
            try:
                _client().key_value_set(self._key, json.dumps(note))
            except jax.errors.JaxRuntimeError:  # another one was faster
                self._leave()
                return
            end = time.monotonic() + _TELL_SECONDS
            while time.monotonic() < end and self._left() < count() - 1:
                time.sleep(_LOOK_SECONDS / 5)

    def _leave(self) -> None:
        _client().key_value_set(f"{self._key}-leaving/{index()}", "", allow_overwrite=True)

    def _left(self) -> int:
        return len(_client().key_value_dir_get(f"{self._key}-leaving"))

    def _look(self) -> None:
        while not self._stop.wait(_LOOK_SECONDS):
            try:
                note = json.loads(_client().key_value_try_get(self._key))
            except jax.errors.JaxRuntimeError:
                continue  # nothing; or the service is gone, which the runtime sees as well
            self._end(note)

    def _end(self, note: dict[str, Any]) -> None:
        _log.error("process %d failed: %s", note["process"], note["said"])
        self._last_words.__exit__()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._leave()
            jax.distributed.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        # The main thread may be in a computation that never ends.
        os._exit(note["code"])


class _LastWords:
    """A sentence on standard error if this process dies within and cannot say it any more.

    When a process of a run is gone or does not come, jax's runtime aborts the others from a thread
    of its own, after a page of its own, and no Python runs any more. So another program waits for
    our end.
    """

    _PROGRAM = "import sys; sys.stdin.read(1) or print(sys.argv[1], file=sys.stderr)"

    def __init__(self, said: str) -> None:
        place = place_of(os.environ)
        who = f"process {place.index} of {place.count}" if place else "a process of the run"
        self._said = f"ddk: error: {who} on {socket.gethostname()} {said}"

    def __enter__(self) -> None:
        # In a session of its own: what ends our group must not end it before it has spoken.
        self._program = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", "-c", self._PROGRAM, self._said],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            self._program.communicate(b".")
