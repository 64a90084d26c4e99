"""A model directory, on a disk or in a bucket: which of its files are read, and if they are intact.

Only safetensors and JSON are read: neither can run code. Names that come from a file never lead out
of the directory, nor do links. Safetensors notice truncation but not a flipped bit, hence
`SHA256SUMS`.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeAlias

from ddk_jax.errors import StorageError, UserError
from ddk_jax.models.tensors import StoredFile, StoredTensor, read_header
from ddk_jax.places import AnyPath, storage_errors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CHECKSUMS = "SHA256SUMS"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
"""What a model directory may have of its tokenizer; we read the first three."""

Progress: TypeAlias = Callable[[str, int, int], None]
"""Takes what is being done (`reading`, ...), the bytes done, and the bytes in all."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_CHUNK_BYTES = 2**23
_SETTLED_NS = 2 * 10**9
"""A file that was changed less than this before it was hashed may change within the same tick."""


def weight_files(directory: AnyPath) -> list[AnyPath]:
    """The safetensors files of the model, checked to be there and to lie in the directory.

    Raises:
      UserError: there are no weights, or pickled ones only.
      StorageError: a file is missing or lies elsewhere, or the index is broken.
    """
    with storage_errors(directory):
        if (directory / WEIGHTS).is_file():
            return [_weights(directory, WEIGHTS)]
        if (directory / INDEX).is_file():
            return [_weights(directory, name) for name in shard_names(directory)]
        names = [path.name for path in directory.iterdir()]
    refuse_pickles(str(directory), names)
    raise UserError(f"{directory}: no weights; expected {WEIGHTS}, or shards and {INDEX}")


def refuse_pickles(origin: str, names: Iterable[str]) -> None:
    """Raise UserError if there are pickled weights among files that are no safetensors."""
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled:
        raise UserError(
            f"{origin}: has weights as pickle files only ({', '.join(pickled[:3])}), which can "
            "run code and are never read. Get the model's safetensors, or, if you trust the "
            "origin, convert it with transformers: from_pretrained(...).save_pretrained(...)"
        )


def open_tensors(directory: AnyPath, stack: ExitStack) -> dict[str, StoredTensor]:
    """Every tensor by its name, to be read when sliced; the files stay open as long as the stack.

    Raises:
      UserError, StorageError: as `weight_files`; also a file that is truncated or corrupt, or that
        lacks what the index says it has, and a tensor that is there twice.
    """
    tensors: dict[str, StoredTensor] = {}
    paths = weight_files(directory)
    listed = {} if paths[0].name == WEIGHTS else _weight_map(directory)
    for path in paths:
        with storage_errors(path):
            file = StoredFile(path)
            stack.callback(file.close)
            try:
                entries = read_header(file)
            except ValueError as error:
                raise StorageError(
                    f"{path}: truncated or corrupt: {error}; copy or download it again"
                ) from error
        promised = {name for name, holder in listed.items() if holder == path.name}
        if absent := sorted(promised - entries.keys()):
            raise StorageError(f"{path}: lacks what {INDEX} says it has: {some(absent)}")
        if twice := sorted(entries.keys() & tensors):
            raise StorageError(f"{path}: has what another file has too: {some(twice)}")
        tensors |= {name: StoredTensor(file, entry) for name, entry in entries.items()}
    return tensors


def verify(directory: AnyPath, names: Iterable[str], progress: Progress | None = None) -> None:
    """Compare files with SHA256SUMS, where there is one and it lists them.

    Raises:
      StorageError: a file differs or cannot be read.
    """
    listed = checksums(directory)
    wanted = [name for name in names if name in listed]
    for name, found in hashes(directory, wanted, "verifying", progress):
        if found != listed[name]:
            raise StorageError(
                f"{directory / name}: differs from its checksum in {CHECKSUMS}; copy or download "
                "it again, or remove the line if you changed the file yourself"
            )


def hashes(
    directory: AnyPath, names: Iterable[str], doing: str, progress: Progress | None = None
) -> Iterator[tuple[str, str]]:
    """Name and SHA-256 as hex of files, one after the other.

    Args:
      directory: where they are.
      names: of the files.
      doing: what the progress is told that is being done.
      progress: told how far it is.

    Raises:
      StorageError: a file cannot be read.
    """
    sizes = {name: file_size(directory / name) for name in names}
    total, done = sum(sizes.values()), 0

    def count(more: int) -> None:
        nonlocal done
        done += more
        if progress is not None:
            progress(doing, done, total)

    for name in sizes:
        yield name, _sha256(directory / name, count)


def checksums(directory: AnyPath) -> dict[str, str]:
    """What SHA256SUMS lists: hash by file name; empty when there is none."""
    with storage_errors(directory / CHECKSUMS):
        if not (directory / CHECKSUMS).is_file():
            return {}
        lines = (directory / CHECKSUMS).read_bytes().decode(errors="replace").splitlines()
    matches = (re.fullmatch(r"([0-9a-fA-F]{64}) [ *](?:\./)?(.+)", line) for line in lines)
    return {match[2]: match[1].lower() for match in matches if match}


def checksum_lines(digests: Mapping[str, str]) -> str:
    """A line `<sha256>  <name>` for each file, as sha256sum prints it."""
    return "".join(f"{digest}  {name}\n" for name, digest in digests.items())


def file_size(file: AnyPath) -> int:
    """Bytes of a file.

    Raises:
      StorageError: it cannot be read.
    """
    with storage_errors(file):
        return file.stat().st_size if isinstance(file, Path) else file.stat().length


def read_json(file: AnyPath) -> dict[str, Any]:
    """A JSON object.

    Raises:
      StorageError: the file is missing, leads out of its directory, or holds something else.
    """
    with storage_errors(file):
        text = inside(file.parent, file.name).read_bytes()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
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


def inside(directory: AnyPath, name: str) -> AnyPath:
    """A file that lies in the directory, or is linked into it from the hub cache it is part of.

    Raises:
      StorageError: it lies elsewhere, or is missing.
    """
    file = directory / name
    if isinstance(file, Path):  # buckets have no links
        roots = [file.parent.resolve()]
        if roots[0].parent.name == "snapshots" and roots[0].parent.parent.name.startswith(
            "models--"
        ):
            roots.append(roots[0].parent.parent / "blobs")
        if not any(file.resolve().is_relative_to(root) for root in roots):
            raise StorageError(
                f"{file}: is a link that leads out of the directory, which is not followed; put "
                "the file itself there"
            )
    if not file.is_file():
        raise StorageError(f"{file}: no such file; is this a model directory, and complete?")
    return file


def shard_names(directory: AnyPath) -> list[str]:
    """Names of the files that the index of a sharded model lists: plain ones, in order.

    Raises:
      StorageError: the index is broken, or names something else than a file beside it.
    """
    names = sorted(set(_weight_map(directory).values()))
    for name in names:
        if not re.fullmatch(r"[^/\\:\0]+\.safetensors", name):
            raise StorageError(
                f"{directory / INDEX}: names the weight file {name!r}, which is not a safetensors "
                "file in this directory; paths that lead out of it are not followed"
            )
    return names


_known: dict[tuple[int, int, int, int], str] = {}


def _sha256(file: AnyPath, count: Callable[[int], None]) -> str:
    """SHA-256 of a file; one on a disk is read once by this process, unless it changes."""
    key = None
    with storage_errors(file):
        if isinstance(file, Path):
            state = file.stat()
            key = state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns
            if key in _known:
                count(state.st_size)
                return _known[key]
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while content := handle.read(_CHUNK_BYTES):
                digest.update(content)  # pyrefly: ignore[bad-argument-type]
                count(len(content))
    if key is not None and time.time_ns() - key[3] > _SETTLED_NS:
        _known[key] = digest.hexdigest()
    return digest.hexdigest()


def _weights(directory: AnyPath, name: str) -> AnyPath:
    if not (directory / name).is_file():
        raise StorageError(f"{directory / name}: named in {INDEX}, but missing; get it again")
    return inside(directory, name)


def _weight_map(directory: AnyPath) -> dict[str, str]:
    """File name of every tensor, from the index of a sharded model."""
    found = read_json(directory / INDEX).get("weight_map")
    if not isinstance(found, dict) or not all(isinstance(name, str) for name in found.values()):
        raise StorageError(f"{directory / INDEX}: weight_map is not a map from tensor to file name")
    if not found:
        raise StorageError(f"{directory / INDEX}: weight_map is empty")
    return found
