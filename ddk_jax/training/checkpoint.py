"""Checkpoints: the arrays of a run and one JSON tree, saved in the background, verified on restore.

orbax writes each checkpoint so that a killed save leaves none at all. But it does not notice a
flipped bit, and it reports a failed save only at the next one. This module adds a checksum for each
array and for the JSON tree, `Checkpoints.poll` to learn of a failure at once, and the way back to
the newest checkpoint that is still good.

    <directory>/<step>/arrays/       the arrays (orbax)
    <directory>/<step>/host/         the JSON tree and the checksums
    <directory>/<step>.corrupt/      a checkpoint that could not be used, moved out of the way
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import jax
from jaxtyping import PyTree
from orbax.checkpoint import v1 as ocp

from ddk_jax.errors import StorageError, UserError
from ddk_jax.parallel import processes
from ddk_jax.places import AnyPath, whole_path
from ddk_jax.training.checkpoint_files import (
    delete,
    move_aside,
    remove_leftovers,
    saved_steps,
    set_aside,
)
from ddk_jax.training.checksums import checksums

_log = logging.getLogger(__name__)

T = TypeVar("T")

_FORMAT = 1
_ARRAYS = "arrays"
_HOST = "host"


class Restored(NamedTuple):
    """A checkpoint that was read back, every checksum verified."""

    step: int
    """Step under which it was saved."""
    state: PyTree[jax.Array]
    """The arrays, in the structure and with the shardings that were asked for."""
    host: dict[str, Any]
    """The JSON tree."""


class Saved(NamedTuple):
    """A checkpoint that is complete on disk."""

    step: int
    """Step under which it was saved."""
    seconds: float
    """From the call of `save` to the last byte."""


class _DamagedError(Exception):
    """A checkpoint cannot be read, or is not what was saved."""


class Checkpoints:
    """The checkpoints of one run, for the process (or processes) that may write them.

    A context manager. Opening it removes what killed saves left behind, so only the holder of the
    run's lease may open it; readers use `read_latest`. Methods are for one thread, and in a
    multi-process run every process calls them in the same order.
    """

    def __init__(self, directory: AnyPath, *, keep: int) -> None:
        """Open `directory`, creating it if it does not exist.

        Args:
            directory: where the checkpoints are: on a disk, a mounted file system, or in a bucket.
            keep: newest checkpoints that are kept; older ones are deleted after each save.

        Raises:
            UserError: `keep` is under 1.
            StorageError: the directory cannot be created or cleaned.
        """
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}: keep at least 1 checkpoint (better 2)")
        self._directory = whole_path(directory)
        self._keep = keep
        self._context = _orbax_context()
        # One thread waits for orbax and then deletes old checkpoints, so saves never overlap.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[Saved]] | None = None
        self._finished: list[Saved] = []
        processes.from_first(self._prepare)

    def _prepare(self) -> None:
        try:
            if isinstance(self._directory, Path):  # a bucket has no directories
                self._directory.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self._directory)
        except OSError as error:
            raise StorageError(
                f"cannot prepare the checkpoint directory {self._directory}: {error}; "
                "check its permissions and the free space"
            ) from error

    def save(self, step: int, state: PyTree[jax.Array], host: dict[str, Any]) -> None:
        """Save a checkpoint in the background.

        Returns once the arrays are copied off the devices: `state` may be donated at once. Waits
        for the previous save if that is still running.

        Args:
            step: name of the checkpoint; larger than that of any other one here.
            state: tree of arrays, typed PRNG keys included; none of them empty.
            host: what else a resumed run must know, copied before the call returns. JSON with
                string keys; tuples become lists.

        Raises:
            UserError: `host` is not JSON, or `step` is saved already.
            StorageError: this save could not start, or the previous one failed.
        """
        start = time.monotonic()
        self._collect(wait=True)
        final = self._directory / str(step)
        if processes.from_first(final.exists):
            raise UserError(f"{final} exists already: a step is saved once")
        arrays = _named_leaves(state)
        envelope = _seal(step, arrays, host)
        try:
            with self._context:
                response = ocp.save_checkpointables_async(
                    str(final), {_ARRAYS: arrays, _HOST: envelope}
                )
        except Exception as error:
            raise self._failure(step, error) from error
        self._pending = step, self._thread.submit(self._finish, response.result, step, start)

    def poll(self) -> list[Saved]:
        """Report the saves that were completed since the last call. Cheap: for every step.

        Raises:
            StorageError: a save failed in the background; the checkpoints before it are intact.
        """
        self._collect(wait=False)
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> list[Saved]:
        """Wait for the running save, then do as `poll`."""
        self._collect(wait=True)
        return self.poll()

    def restore_latest(self, abstract_state: PyTree[jax.ShapeDtypeStruct]) -> Restored | None:
        """Read the newest checkpoint that is good, and move damaged newer ones out of the way.

        A damaged checkpoint is reported as a warning and renamed to `<step>.corrupt`, but only
        after an older one has been read: when none is left, nothing is touched.

        Args:
            abstract_state: shapes, types and shardings of the state, in its structure.

        Returns:
            The checkpoint, or None where no checkpoint was ever saved.

        Raises:
            UserError: the newest readable checkpoint holds a different structure.
            StorageError: there are checkpoints, and none of them can be read.
        """
        restored, damaged = _read_newest(self._directory, abstract_state)
        processes.from_first(lambda: self._move_aside(damaged))
        return restored

    def _move_aside(self, steps: Sequence[int]) -> None:
        for step in steps:
            move_aside(self._directory / str(step))

    def close(self) -> None:
        """Wait for the running save and end the background thread.

        Raises:
            StorageError: that save failed.
        """
        try:
            self._collect(wait=True)
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Checkpoints:
        """Return the object itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close; a failed save is only logged when an exception is on its way out already."""
        try:
            self.close()
        except StorageError as failure:
            if error is None:
                raise
            _log.error("%s", failure)

    def _collect(self, *, wait: bool) -> None:
        """Take the outcome of the running save, if there is one."""
        if self._pending is None:
            return
        step, future = self._pending
        if not wait and not future.done():
            return
        self._pending = None
        try:
            self._finished.append(future.result())
        except Exception as error:
            raise self._failure(step, error) from error

    def _finish(self, result: Callable[[], object], step: int, start: float) -> Saved:
        """Background thread: wait for the save, then delete the checkpoints that are too old."""
        result()
        saved = Saved(step, time.monotonic() - start)
        if processes.is_first():
            for old in saved_steps(self._directory)[self._keep :]:
                delete(self._directory / str(old))
        return saved

    def _failure(self, step: int, error: Exception) -> StorageError:
        """Free what the failed save wrote, and say what happened and what to do."""
        with contextlib.suppress(OSError, StorageError):
            if processes.is_first():
                remove_leftovers(self._directory)
        steps = saved_steps(self._directory)
        last = f"checkpoint {steps[0]} is intact" if steps else "there is no earlier checkpoint"
        return StorageError(
            f"saving checkpoint {step} in {self._directory} failed: {_reason(error)}; {last}. "
            "Free some space or repair the storage, then give the same command again"
        )


def read_latest(
    directory: AnyPath, abstract_state: PyTree[jax.ShapeDtypeStruct], *, under: str = ""
) -> Restored | None:
    """Read the newest checkpoint that is good, changing nothing in `directory`.

    Args:
        directory: where the checkpoints are.
        abstract_state: shapes, types and shardings of what is read, in its structure.
        under: path of the part that is read, as `params/student`; nothing else is then read or
            verified. Empty: the whole state.

    Result and errors are those of `Checkpoints.restore_latest`.
    """
    return _read_newest(whole_path(directory), abstract_state, under)[0]


def _orbax_context() -> ocp.Context:
    context = ocp.Context()
    registry = ocp.handlers.local_registry(include_global_registry=False)
    # By name, for orbax would take a host tree of numbers for a tree of arrays.
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_HOST)
    registry.add(ocp.handlers.PyTreeHandler, checkpointable_name=_ARRAYS)
    context.checkpointables.registry = registry
    return context


def _reading_context(*, partial: bool) -> ocp.Context:
    """Without orbax's own barriers: where one process fails, the others would wait in them."""
    context = _orbax_context()
    context.pytree.loading.partial_load = partial
    if processes.count() > 1:
        context.multiprocessing.primary_host = processes.index()
        context.multiprocessing.active_processes = {processes.index()}
    return context


def _named_leaves(tree: PyTree) -> dict[str, Any]:
    """Flatten a tree to {path: leaf}: what is stored does not depend on the containers' types."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves have one path: a key contains a slash"
    return named


def _describe(leaf: jax.Array | jax.ShapeDtypeStruct) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _seal(step: int, arrays: dict[str, jax.Array], host: dict[str, Any]) -> dict[str, Any]:
    """Wrap the host tree with all that is needed to trust a checkpoint, under one digest."""
    body = {
        "format": _FORMAT,
        "step": step,
        "leaves": {name: _describe(array) for name, array in arrays.items()},
        "checksums": checksums(arrays),
        "host": host,
    }
    try:
        # A copy: orbax writes it later, when the caller may have changed its own.
        body = json.loads(json.dumps(body))
        return {"sha256": _digest(body), "body": body}
    except (TypeError, ValueError) as error:
        raise UserError(f"the host tree of checkpoint {step} is not JSON: {error}") from error


def _unseal(envelope: Any) -> dict[str, Any]:
    body = envelope.get("body") if isinstance(envelope, dict) else None
    if not isinstance(body, dict) or envelope.get("sha256") != _digest(body):
        raise _DamagedError("its host tree does not match its digest")
    return body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_newest(
    directory: AnyPath, abstract_state: PyTree[jax.ShapeDtypeStruct], under: str = ""
) -> tuple[Restored | None, list[int]]:
    """Return the newest good checkpoint and the steps of the damaged ones that are newer."""
    steps = processes.from_first(lambda: saved_steps(directory))
    damaged: list[int] = []
    for step in steps:
        try:
            return _read(directory / str(step), step, abstract_state, under), damaged
        except _DamagedError as error:
            damaged.append(step)
            older = steps[len(damaged) :]
            then = f"trying checkpoint {older[0]} instead" if older else "there is no older one"
            _log.warning("checkpoint %d in %s cannot be used: %s; %s", step, directory, error, then)
    aside = processes.from_first(lambda: set_aside(directory))
    found = [str(step) for step in damaged] + aside
    if found:
        raise StorageError(
            f"none of the checkpoints in {directory} can be read ({', '.join(found)}): bring back "
            "a good copy, or delete the run directory to start from scratch"
        )
    return None, []


def _read(
    path: AnyPath, step: int, abstract_state: PyTree[jax.ShapeDtypeStruct], under: str
) -> Restored:
    """Read and verify one checkpoint.

    Raises:
        _DamagedError: it cannot be read, or something in it is not what was saved.
        UserError: it is good, but holds another structure.
    """
    body = _found_by_all(lambda: _unseal(_load(path, _HOST)))
    if body["format"] != _FORMAT:
        raise UserError(
            f"checkpoint {path} has format {body['format']}, and this version of ddk_jax reads "
            f"format {_FORMAT}: use the version that wrote it"
        )
    if body["step"] != step:
        raise _DamagedError(f"it was saved as checkpoint {body['step']}")
    prefix = f"{under}/" if under else ""
    leaves = _named_leaves(abstract_state)
    targets = {prefix + name: _placed(leaf) for name, leaf in leaves.items()}
    saved = {name: leaf for name, leaf in body["leaves"].items() if name.startswith(prefix)}
    _check_structure(path, saved, targets)
    partial = len(saved) < len(body["leaves"])
    arrays = _found_by_all(lambda: _load(path, _ARRAYS, targets, partial=partial))
    found = checksums({name: arrays[name] for name in targets})
    wrong = [name for name in targets if found[name] != body["checksums"][name]]
    if wrong:
        raise _DamagedError(f"the checksum of {_some(wrong)} does not match")
    treedef = jax.tree.structure(abstract_state)
    return Restored(step, treedef.unflatten(arrays[name] for name in targets), body["host"])


def _found_by_all(read: Callable[[], T]) -> T:
    """What `read` gives, in every process; damage that one of them meets stops all.

    A process reads the part of its own devices only. One load at a time: orbax counts them, and the
    processes of a later save must agree on its number.
    """
    made: list[T] = []
    damage = ""
    try:
        made.append(read())
    except _DamagedError as error:
        damage = str(error) or "it cannot be read"
    if found := [each for each in processes.gather(damage) if each]:
        raise _DamagedError(found[0])
    return made[0]


def _load(
    path: AnyPath,
    name: str,
    target: dict[str, jax.ShapeDtypeStruct] | None = None,
    *,
    partial: bool = False,
) -> Any:
    try:
        with _reading_context(partial=partial):
            return ocp.load_checkpointables(str(path), {name: target})[name]
    # Damaged files surface as almost any exception, from several libraries.
    except Exception as error:
        if isinstance(_root(error), KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise _DamagedError(_reason(error)) from error


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Give a leaf without a sharding a device, lest orbax looks for the saving run's devices."""
    if leaf.sharding is not None:
        return leaf
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place)


def _check_structure(
    path: AnyPath, saved: dict[str, str], targets: dict[str, jax.ShapeDtypeStruct]
) -> None:
    expected = {name: _describe(leaf) for name, leaf in targets.items()}
    differences = [
        f"{name} is {saved.get(name, 'missing')} in the checkpoint and "
        f"{expected.get(name, 'unknown')} here"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if differences:
        raise UserError(
            f"checkpoint {path} does not fit this configuration: {_some(differences, '; ')}. "
            "Use the models and the optimiser that it was saved with, or another run directory"
        )


def _root(error: BaseException) -> BaseException:
    """Return what orbax wrapped: its own wording is that no handler was compatible."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: Exception) -> str:
    """Return one line of the exception at the root, whose text may have hundreds."""
    root = _root(error)
    line = (str(root).strip().splitlines() or [""])[0].split(" [tensorstore_spec")[0]
    return f"{type(root).__name__}: {line[:400]}"


def _some(items: Sequence[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - 5} more" if len(items) > 5 else ""
    return separator.join(items[:5]) + more
