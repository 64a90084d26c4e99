"""Where things are: paths on this machine, in a bucket, or among the files that we ship."""

from __future__ import annotations

import importlib.resources
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TypeAlias

from etils import epath

from ddk_jax.errors import StorageError, UserError

ASSETS = "assets:"
_SCHEMES = ("gs://", "s3://", "az://")

AnyPath: TypeAlias = Path | epath.Path
"""A path on this machine, or in a bucket."""


def resolve_path(path: str) -> Path:
    """`assets:NAME` as the path of a file shipped in the package; any other path as it is."""
    if not path.startswith(ASSETS):
        return Path(path).expanduser()
    root = Path(str(importlib.resources.files("ddk_jax"))) / "assets"
    resolved = (root / path.removeprefix(ASSETS)).resolve()
    if not resolved.is_relative_to(root.resolve()):
        raise UserError(f"{path}: leaves the package's assets")
    return resolved


def resolve_place(path: str | os.PathLike[str]) -> AnyPath:
    """The same, or a place in a bucket where the path begins like `gs://`.

    Raises:
      UserError: an address of another kind.
    """
    text = os.fspath(path)
    if "://" not in text:
        return resolve_path(text)
    if not text.startswith(_SCHEMES):
        raise UserError(
            f"{text}: neither a path nor a place in a bucket ({', '.join(_SCHEMES)}); a model may "
            "also be the id of one on the hub, owner/name"
        )
    return epath.Path(text)


def whole_path(place: AnyPath) -> AnyPath:
    """The path from the root, without links, or from the bucket."""
    return place.resolve() if isinstance(place, Path) else place


@contextmanager
def storage_errors(place: AnyPath, doing: str = "read") -> Iterator[None]:
    """Turns what goes wrong at a place into errors that name it.

    Raises:
      UserError: the package that reaches the bucket is not installed.
      StorageError: anything else; buckets have errors of many kinds.
    """
    try:
        yield
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"{place}: needs a package that is not installed ({error}); for gs:// it is gcsfs: "
            "pip install 'ddk_jax[gcs]'"
        ) from error
    except Exception as error:
        if not isinstance(place, Path):
            said = " ".join(f"{type(error).__name__}: {error}".split())
            advice = "; is the bucket there, and may you use it?"
            raise StorageError(f"{place}: cannot be {doing} ({said}){advice}") from error
        if isinstance(error, OSError):
            said = error.strerror or error
            raise StorageError(f"{place}: cannot be {doing} ({said})") from error
        raise


def bucket_errors(place: AnyPath, doing: str = "written") -> AbstractContextManager[None]:
    """The same in a bucket; what goes wrong on a disk is left as it is."""
    return nullcontext() if isinstance(place, Path) else storage_errors(place, doing)
