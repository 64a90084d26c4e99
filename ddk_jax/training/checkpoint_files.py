"""The directories of checkpoints: which are complete, and how they come to their end.

On a disk a checkpoint appears under its name when it is complete, by a rename. In a bucket there is
no rename: orbax writes it under its name, and a marker last. Without the marker it is none.
"""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from ddk_jax.errors import StorageError
from ddk_jax.places import AnyPath, bucket_errors

_log = logging.getLogger(__name__)

_TEMPORARY = ".orbax-checkpoint-tmp"
_DELETED = ".deleted"
_CORRUPT = ".corrupt"
_MARKER = "commit_success.txt"


def saved_steps(directory: AnyPath) -> list[int]:
    """The steps of the complete checkpoints, newest first."""
    with bucket_errors(directory, "read"):
        if not directory.is_dir():
            return []
        found = [path for path in directory.iterdir() if path.name.isdecimal()]
        return sorted((int(path.name) for path in found if _is_complete(path)), reverse=True)


def remove_leftovers(directory: AnyPath) -> None:
    """Delete what killed or failed saves, or deletions, have left behind."""
    with bucket_errors(directory):
        for path in list(directory.iterdir()) if directory.is_dir() else []:
            unfinished = path.name.isdecimal() and not _is_complete(path)
            if unfinished or _TEMPORARY in path.name or path.name.endswith(_DELETED):
                _remove(path)


def delete(path: AnyPath) -> None:
    """Delete a checkpoint so that a kill half way leaves no half of a checkpoint."""
    try:
        with bucket_errors(path):
            if isinstance(path, Path):
                path = path.rename(path.with_name(path.name + _DELETED))
            else:
                (path / _MARKER).unlink()
            _remove(path)
    except (OSError, StorageError) as error:
        _log.warning("the old checkpoint %s could not be deleted: %s", path, error)


def move_aside(path: AnyPath) -> None:
    """Rename a damaged checkpoint.

    Raises:
      StorageError: it cannot be renamed.
    """
    number, target = 1, path.with_name(path.name + _CORRUPT)
    try:
        with bucket_errors(path):
            while target.exists():
                number += 1
                target = path.with_name(f"{path.name}{_CORRUPT}{number}")
            path.rename(target)
    except OSError as error:
        raise StorageError(f"cannot rename the damaged checkpoint {path}: {error}") from error
    _log.warning("the damaged checkpoint %s is now %s; it may be deleted", path, target.name)


def set_aside(directory: AnyPath) -> list[str]:
    """Names of the damaged checkpoints that were renamed."""
    with bucket_errors(directory, "read"):
        if not directory.is_dir():
            return []
        return sorted(path.name for path in directory.iterdir() if _CORRUPT in path.name)


def _is_complete(path: AnyPath) -> bool:
    return isinstance(path, Path) or (path / _MARKER).exists()


def _remove(path: AnyPath) -> None:
    if isinstance(path, Path):
        shutil.rmtree(path)
    else:
        path.rmtree()
