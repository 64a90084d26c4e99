"""A model directory on disk: which of its files are read, and whether they are safe and intact.

Only safetensors and JSON are read: neither can run code. Names that come from a file never lead out
of the directory. Safetensors notice truncation but not a flipped bit, hence `SHA256SUMS`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ddk_jax.errors import StorageError, UserError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "SHA256SUMS"

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of the model, checked to be there and to lie in the directory.

    Raises:
      UserError: there are no weights, or pickled ones only.
      StorageError: a file is missing or lies elsewhere, or the index is broken.
    """
    if (directory / WEIGHTS).is_file():
        return [_inside(directory, WEIGHTS)]
    if (directory / INDEX).is_file():
        return [_inside(directory, name) for name in sorted(set(_weight_map(directory).values()))]
    pickled = sorted(path.name for path in directory.glob("*") if path.suffix in _PICKLED)
    if pickled:
        raise UserError(
            f"{directory}: has weights as pickle files only ({', '.join(pickled[:3])}), which can "
            "run code and are never read. Get the model's safetensors, or, if you trust the "
            "origin, convert it with transformers: from_pretrained(...).save_pretrained(...)"
        )
    raise UserError(f"{directory}: no weights; expected {WEIGHTS}, or shards and {INDEX}")


def open_tensors(directory: Path, stack: ExitStack) -> dict[str, Any]:
    """A lazily read tensor for every name; the files stay open until the stack is closed.

    Raises:
      UserError, StorageError: as `weight_files`; also a file that is truncated or corrupt, or that
        lacks what the index says it has.
    """
    tensors: dict[str, Any] = {}
    files = weight_files(directory)
    listed = {} if files[0].name == WEIGHTS else _weight_map(directory)
    for file in files:
        try:
            # Checks the header against the length of the file.
            handle = stack.enter_context(safe_open(file, framework="numpy"))
            names = set(handle.keys())
            tensors |= {name: handle.get_slice(name) for name in names}
        except (OSError, SafetensorError) as error:
            raise StorageError(
                f"{file}: truncated or corrupt ({error}); copy or download it again"
            ) from error
        promised = {name for name, holder in listed.items() if holder == file.name}
        if absent := sorted(promised - names):
            raise StorageError(f"{file}: lacks what {INDEX} says it has: {some(absent)}")
    return tensors


def verify(directory: Path, names: Iterable[str]) -> None:
    """Compare files with SHA256SUMS, where there is one and it lists them.

    Raises:
      StorageError: a file differs or cannot be read.
    """
    if not (directory / CHECKSUMS).is_file():
        return
    listed = dict(_checksums(directory / CHECKSUMS))
    for name in names:
        if name in listed and listed[name] != _sha256(directory / name):
            raise StorageError(
                f"{directory / name}: differs from its checksum in {CHECKSUMS}; copy or download "
                "it again, or remove the line if you changed the file yourself"
            )


def checksum_lines(directory: Path, names: Iterable[str]) -> str:
    """A line `<sha256>  <name>` for each file, as sha256sum prints it."""
    return "".join(f"{_sha256(directory / name)}  {name}\n" for name in names)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
      StorageError: the file is missing, or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StorageError(f"{file}: no such file; this is not a model directory") from error
    except (OSError, ValueError, RecursionError) as error:
        raise StorageError(f"{file}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise StorageError(f"{file}: expected a JSON object")
    return content


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def some(names: Sequence[str], limit: int = 8) -> str:
    """The first names of a list, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _weight_map(directory: Path) -> dict[str, str]:
    """File name of every tensor, from the index of a sharded model."""
    found = read_json(directory / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise StorageError(f"{directory / INDEX}: weight_map is not a map from tensor to file name")
    if not found:
        raise StorageError(f"{directory / INDEX}: weight_map is empty")
    return found


def _inside(directory: Path, name: str) -> Path:
    """A weight file that lies in the directory, or in the hub cache that the directory is part of.

    Raises:
      StorageError: it lies elsewhere, or is missing.
    """
    root = directory.resolve()
    if root.parent.name == "snapshots":  # the hub cache: links to ../../blobs
        root = root.parent.parent
    plain = re.fullmatch(r"[^/\\:\0]+\.safetensors", name) is not None
    if not plain or not (directory / name).resolve().is_relative_to(root):
        raise StorageError(
            f"{directory}: the weight file {name!r} is not a safetensors file in this directory; "
            "links and paths that lead out of it are not followed"
        )
    if not (directory / name).is_file():
        raise StorageError(f"{directory / name}: named in {INDEX}, but missing; get it again")
    return directory / name


def _checksums(file: Path) -> Iterator[tuple[str, str]]:
    """Name and hash of every line that sha256sum wrote."""
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        if match := re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line):
            yield match[2], match[1].lower()


def _sha256(file: Path) -> str:
    try:
        with file.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:
        raise StorageError(f"{file}: cannot be read ({error.strerror})") from error
