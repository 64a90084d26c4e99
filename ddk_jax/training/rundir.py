"""The run directory: resolved config, versions, log; and whether a config may continue a run."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from ddk_jax import __version__
from ddk_jax.config import Config, load_config, save_config, to_plain
from ddk_jax.errors import StorageError, UserError

_log = logging.getLogger(__name__)

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

FIXED = (
    "run.seed",
    "run.compute_dtype",
    "data.seq_len",
    "teacher.path",
    "student",
    "objective.terms",
    "mixture",
    "train.rows_per_step",
)
"""What must not change within a run: the meaning of its state, of its data order, of its metrics."""


def open_run(config: Config, directory: Path) -> None:
    """Write the config and the versions of a new run, or check that a config continues the old one.

    Settings that decide what the state and the rows mean must be as they were (`FIXED`); others may
    change between two starts, and are logged.

    Raises:
      UserError: the directory belongs to a run that this config does not continue.
      StorageError: the directory cannot be written.
    """
    path = directory / "config.yaml"
    if path.is_file():
        _check_continues(to_plain(load_config(path)), to_plain(config), directory)
    record: dict[str, Any] = {"config_digest": config.digest(), "ddk_jax": __version__}
    record["python"] = platform.python_version()
    record["packages"] = {name: metadata.version(name) for name in PACKAGES}
    record["devices"] = [device.device_kind for device in jax.devices()]
    try:
        save_config(config, path)
        (directory / "run.json").write_text(json.dumps(record, indent=1) + "\n")
    except OSError as error:
        raise StorageError(f"{directory}: cannot be written ({error.strerror})") from error
    _log.info("event=start run=%s digest=%s", directory, record["config_digest"])


def _check_continues(old: dict[str, Any], new: dict[str, Any], directory: Path) -> None:
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
def log_file(path: Path) -> Iterator[None]:
    """Copy the package's log records, from INFO up, to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("ddk_jax")
    level = logger.level
    logger.setLevel(min(level or logging.INFO, logging.INFO))
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()
