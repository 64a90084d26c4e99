"""Checkpoints: the arrays of a run and one JSON tree, saved in the background, verified on restore.

orbax writes each checkpoint under a temporary name and renames it when it is complete, so a killed
save leaves no checkpoint at all. But it does not notice a flipped bit, and it reports a failed save
only at the next one. This module adds a checksum for each array and for the JSON tree,
`Checkpoints.poll` to learn of a failure at once, and the way back to the newest checkpoint that is
still good.

    <directory>/<step>/arrays/       the arrays (orbax)
    <directory>/<step>/host/         the JSON tree and the checksums
    <directory>/<step>.corrupt/      a checkpoint that could not be used, moved out of the way
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array, PyTree, UInt32
from orbax.checkpoint import v1 as ocp

from ddk_jax.errors import StorageError, UserError

_log = logging.getLogger(__name__)

_FORMAT = 1
_ARRAYS = "arrays"
_HOST = "host"
_TEMPORARY = ".orbax-checkpoint-tmp"
_DELETED = ".deleted"
_CORRUPT = ".corrupt"
_GOLDEN_RATIO = 0x9E3779B9
_UNSIGNED = {8: jnp.uint8, 16: jnp.uint16, 32: jnp.uint32, 64: jnp.uint32}


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

    def __init__(self, directory: Path, *, keep: int) -> None:
        """Open `directory`, creating it if it does not exist.

        Args:
            directory: where the checkpoints are; a local path or a mounted file system.
            keep: newest checkpoints that are kept; older ones are deleted after each save.

        Raises:
            UserError: `keep` is under 1.
            StorageError: the directory cannot be created or cleaned.
        """
        if keep < 1:
            raise UserError(f"checkpoint.keep is {keep}: keep at least 1 checkpoint (better 2)")
        self._directory = Path(directory).absolute()
        self._keep = keep
        self._context = _orbax_context()
        # One thread waits for orbax and then deletes old checkpoints, so saves never overlap.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[int, Future[Saved]] | None = None
        self._finished: list[Saved] = []
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                _remove_leftovers(self._directory)
        except OSError as error:
            raise StorageError(
                f"cannot prepare the checkpoint directory {self._directory}: {error}; "
                "check its permissions and the free space"
            ) from error
        multihost_utils.sync_global_devices("checkpoints_opened")

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
        if final.exists():
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
        if jax.process_index() == 0:
            for step in damaged:
                _move_aside(self._directory / str(step))
        multihost_utils.sync_global_devices("checkpoints_restored")
        return restored

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
        if jax.process_index() == 0:
            for old in _steps(self._directory)[self._keep :]:
                _delete(self._directory / str(old))
        return saved

    def _failure(self, step: int, error: Exception) -> StorageError:
        """Free what the failed save wrote, and say what happened and what to do."""
        if jax.process_index() == 0:
            with contextlib.suppress(OSError):
                _remove_leftovers(self._directory)
        steps = _steps(self._directory)
        last = f"checkpoint {steps[0]} is intact" if steps else "there is no earlier checkpoint"
        return StorageError(
            f"saving checkpoint {step} in {self._directory} failed: {_reason(error)}; {last}. "
            "Free some space or repair the storage, then give the same command again"
        )


def read_latest(directory: Path, abstract_state: PyTree[jax.ShapeDtypeStruct]) -> Restored | None:
    """Read the newest checkpoint that is good, changing nothing in `directory`.

    Arguments, result and errors are those of `Checkpoints.restore_latest`.
    """
    return _read_newest(Path(directory).absolute(), abstract_state)[0]


def checksum(array: jax.Array) -> UInt32[Array, ""]:
    """Return a 32-bit checksum of an array's bits and their places.

    It is the sum, modulo 2**32, of a hash of (bits, index in the whole array) over the elements.
    Addition of integers has no order, so the value is the same however the array is sharded, and
    each device reads only its own shards. A change of one element always changes it, since the hash
    is one-to-one in the bits; any other damage escapes with a chance of 2**-32.

    Args:
        array: any shape; floating, integer, boolean or typed PRNG key.

    Raises:
        UserError: the type is complex or narrower than a byte.
    """
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if array.dtype != jnp.bool_ and _bits(array.dtype) not in _UNSIGNED:
        raise UserError(f"a checkpoint cannot hold {array.dtype}: save it as plain numbers")
    return _checksum(array)


@jax.jit
def _checksum(array: jax.Array) -> UInt32[Array, ""]:
    if array.dtype == jnp.bool_:
        array = array.astype(jnp.uint8)
    # An 8-byte element becomes two words, along a new last axis.
    words = jax.lax.bitcast_convert_type(array, _UNSIGNED[_bits(array.dtype)]).astype(jnp.uint32)
    index = jnp.full(words.shape, _GOLDEN_RATIO, jnp.uint32)
    stride = 1
    # The index is made of iotas and not of a flat range: no reshape, so each shard stays in place.
    for axis in reversed(range(words.ndim)):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        index += place * jnp.uint32(stride % 2**32)
        stride *= words.shape[axis]
    return jnp.sum(_mix(words ^ _mix(index)), dtype=jnp.uint32)


def _bits(dtype: jax.typing.DTypeLike) -> int:
    return 0 if jnp.issubdtype(dtype, jnp.complexfloating) else jax.dtypes.itemsize_bits(dtype)


def _mix(value: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Spread every bit of a 32-bit word over the word, one-to-one (MurmurHash3's finaliser)."""
    value = (value ^ (value >> jnp.uint32(16))) * jnp.uint32(0x85EBCA6B)
    value = (value ^ (value >> jnp.uint32(13))) * jnp.uint32(0xC2B2AE35)
    return value ^ (value >> jnp.uint32(16))


def _orbax_context() -> ocp.Context:
    context = ocp.Context()
    registry = ocp.handlers.local_registry(include_global_registry=False)
    # By name, for orbax would take a host tree of numbers for a tree of arrays.
    registry.add(ocp.handlers.JsonHandler, checkpointable_name=_HOST)
    registry.add(ocp.handlers.PyTreeHandler, checkpointable_name=_ARRAYS)
    context.checkpointables.registry = registry
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
        "checksums": _checksums(arrays),
        "host": host,
    }
    try:
        # A copy: orbax writes it later, when the caller may have changed its own.
        body = json.loads(json.dumps(body))
        return {"sha256": _digest(body), "body": body}
    except (TypeError, ValueError) as error:
        raise UserError(f"the host tree of checkpoint {step} is not JSON: {error}") from error


def _checksums(arrays: dict[str, jax.Array]) -> dict[str, int]:
    # One after the other: several independent programs with collectives in flight can lock each
    # other out of the threads of simulated CPU devices, for ever.
    return {name: int(checksum(array)) for name, array in arrays.items()}


def _unseal(envelope: Any) -> dict[str, Any]:
    body = envelope.get("body") if isinstance(envelope, dict) else None
    if not isinstance(body, dict) or envelope.get("sha256") != _digest(body):
        raise _DamagedError("its host tree does not match its digest")
    return body


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _read_newest(
    directory: Path, abstract_state: PyTree[jax.ShapeDtypeStruct]
) -> tuple[Restored | None, list[int]]:
    """Return the newest good checkpoint and the steps of the damaged ones that are newer."""
    steps = _steps(directory)
    damaged: list[int] = []
    for step in steps:
        try:
            return _read(directory / str(step), step, abstract_state), damaged
        except _DamagedError as error:
            damaged.append(step)
            older = steps[len(damaged) :]
            then = f"trying checkpoint {older[0]} instead" if older else "there is no older one"
            _log.warning("checkpoint %d in %s cannot be used: %s; %s", step, directory, error, then)
    aside = sorted(path.name for path in directory.glob(f"*{_CORRUPT}*"))
    found = [str(step) for step in damaged] + aside
    if found:
        raise StorageError(
            f"none of the checkpoints in {directory} can be read ({', '.join(found)}): bring back "
            "a good copy, or delete the run directory to start from scratch"
        )
    return None, []


def _read(path: Path, step: int, abstract_state: PyTree[jax.ShapeDtypeStruct]) -> Restored:
    """Read and verify one checkpoint.

    Raises:
        _DamagedError: it cannot be read, or something in it is not what was saved.
        UserError: it is good, but holds another structure.
    """
    body = _unseal(_load(path, _HOST, None))
    if body["format"] != _FORMAT:
        raise UserError(
            f"checkpoint {path} has format {body['format']}, and this version of ddk_jax reads "
            f"format {_FORMAT}: use the version that wrote it"
        )
    if body["step"] != step:
        raise _DamagedError(f"it was saved as checkpoint {body['step']}")
    targets = {name: _placed(leaf) for name, leaf in _named_leaves(abstract_state).items()}
    _check_structure(path, body["leaves"], targets)
    arrays = _load(path, _ARRAYS, targets)
    found = _checksums({name: arrays[name] for name in targets})
    wrong = [name for name in targets if found[name] != body["checksums"][name]]
    if wrong:
        raise _DamagedError(f"the checksum of {_some(wrong)} does not match")
    treedef = jax.tree.structure(abstract_state)
    return Restored(step, treedef.unflatten(arrays[name] for name in targets), body["host"])


def _load(path: Path, name: str, target: dict[str, jax.ShapeDtypeStruct] | None) -> Any:
    try:
        with _orbax_context():
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
    path: Path, saved: dict[str, str], targets: dict[str, jax.ShapeDtypeStruct]
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


def _steps(directory: Path) -> list[int]:
    """Return the steps of the complete checkpoints, newest first."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir())
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _move_aside(path: Path) -> None:
    number, target = 1, path.with_name(path.name + _CORRUPT)
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}{_CORRUPT}{number}")
    try:
        path.rename(target)
    except OSError as error:
        raise StorageError(f"cannot rename the damaged checkpoint {path}: {error}") from error
    _log.warning("the damaged checkpoint %s is now %s; it may be deleted", path, target.name)


def _delete(path: Path) -> None:
    """Delete a checkpoint so that a kill half way leaves no half of a checkpoint."""
    doomed = path.with_name(path.name + _DELETED)
    try:
        path.rename(doomed)
        shutil.rmtree(doomed)
    except OSError as error:
        _log.warning("the old checkpoint %s could not be deleted: %s", path, error)


def _remove_leftovers(directory: Path) -> None:
    for path in directory.iterdir():
        if _TEMPORARY in path.name or path.name.endswith(_DELETED):
            shutil.rmtree(path)


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
