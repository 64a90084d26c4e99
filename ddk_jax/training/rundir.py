"""The run directory: resolved config, versions, log; and whether a config may continue a run."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ddk_jax import __version__
from ddk_jax.config import Config, load_config, save_config
from ddk_jax.errors import StorageError, UserError
from ddk_jax.places import AnyPath, bucket_errors
from ddk_jax.plain import to_plain
from ddk_jax.training.checkpoint_files import saved_steps, set_aside

_log = logging.getLogger(__name__)

SUMMARY = "summary.json"
"""Written when a run is finished, never before."""
_PARTIAL = ".partial"

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

FIXED = (
    "run.seed",
    "run.compute_dtype",
    "data.seq_len",
    "data.packing",
    "teacher",
    "student",
    "objective.terms",
    "mixture",
    "train.rows_per_step",
)
"""What must not change within a run: the meaning of its state, its data order, its metrics."""


def is_run(directory: AnyPath) -> bool:
    """Whether a directory is that of a run."""
    with bucket_errors(directory, "read"):
        return (directory / "config.yaml").is_file()


def open_run(
    config: Config,
    directory: Path,
    models: Mapping[str, str] | None = None,
    place: AnyPath | None = None,
) -> None:
    """Write the config and the versions of a new run, or check that a config continues the old one.

    Settings that decide what the state and the rows mean must be as they were (`FIXED`); others may
    change between two starts, and are logged. A run without a checkpoint has nothing to continue:
    it starts from scratch with any config.

    Args:
      config: of the run.
      directory: of the run.
      models: commits of the hub repositories that the config names, by their ids; recorded.
      place: of the run and its checkpoints, if that is in a bucket.

    Raises:
      UserError: the directory belongs to a run that this config does not continue.
      StorageError: the directory cannot be written.
    """
    path, place = directory / "config.yaml", place or directory
    checkpoints = place / "checkpoints"
    if path.is_file() and (saved_steps(checkpoints) or set_aside(checkpoints)):
        _check_continues(to_plain(load_config(path)), to_plain(config), place)
    record: dict[str, Any] = {"config_digest": config.digest(), "ddk_jax": __version__}
    record["python"] = platform.python_version()
    record["packages"] = {name: metadata.version(name) for name in PACKAGES}
    record["devices"] = [device.device_kind for device in jax.devices()]
    record["models"] = dict(models or {})
    try:
        partial = path.with_suffix(_PARTIAL)
        save_config(config, partial)
        partial.replace(path)
        (directory / SUMMARY).unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error
    write_whole(directory / "run.json", json.dumps(record, indent=1) + "\n")
    _log.info("event=start run=%s digest=%s", place, record["config_digest"])


def write_whole(path: Path, text: str) -> None:
    """Write a file so that, killed at any moment, it is there with all its text or as it was.

    Raises:
      StorageError: it cannot be written.
    """
    partial = path.with_suffix(_PARTIAL)
    try:
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _unwritable(path: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot write {path}: {error}; check its permissions and the free space")


def _check_continues(old: dict[str, Any], new: dict[str, Any], directory: AnyPath) -> None:
    changed = sorted(
        key
        for key in _flat(old).keys() | _flat(new).keys()
        if _flat(old).get(key) != _flat(new).get(key)
    )
    refused = [k for k in changed if any(k == f or k.startswith(f"{f}.") for f in FIXED)]
    if refused:
        changes = ", ".join(f"{k}: {_flat(old).get(k)} -> {_flat(new).get(k)}" for k in refused)
        raise UserError(
            f"{directory} holds a run with other settings ({changes}): choose another run.dir, or "
            "set them back to continue it"
        )
    for key in changed:
        _log.warning("%s changes: %s -> %s", key, _flat(old).get(key), _flat(new).get(key))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@contextmanager
def log_file(path: Path | None) -> Iterator[None]:
    """Copy the package's log records, from INFO up, to a file.

    None is for the other processes of a run: they say what went wrong, and nothing else.
    """
    handler: logging.Handler = logging.NullHandler()
    if path is not None:
        handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("ddk_jax")
    level = logger.level
    logger.setLevel(
        max(level, logging.WARNING) if path is None else min(level or logging.INFO, logging.INFO)
    )
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
