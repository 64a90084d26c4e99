"""The Hugging Face hub: what a path in a config means, and the files of a repository.

Nothing is fetched that is not read: configs and the tokenizer when a model is named, safetensors
when its weights are loaded. The commit that was found holds for the whole process.
"""

from __future__ import annotations

import atexit
import glob
import logging
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ddk_jax.errors import StorageError, UserError
from ddk_jax.models.directory import (
    CHECKSUMS,
    CONFIG,
    INDEX,
    TOKENIZER_FILES,
    WEIGHTS,
    refuse_pickles,
    shard_names,
)
from ddk_jax.places import ASSETS, AnyPath, resolve_place, storage_errors

_log = logging.getLogger(__name__)

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_FILES = (CONFIG, "generation_config.json", INDEX, CHECKSUMS, *TOKENIZER_FILES)


@dataclass(frozen=True)
class Resolved:
    """Where a model is, and what it is known as."""

    directory: AnyPath
    """The model directory; of a repository, its snapshot in the hub's cache."""
    repo: str = ""
    """Hub id, `owner/name`; empty for a directory."""
    commit: str = ""
    """The commit of the repository, 40 hex digits; empty for a directory."""

    def __str__(self) -> str:
        return f"{self.repo} (commit {self.commit})" if self.repo else str(self.directory)

    def fetch(self) -> AnyPath:
        """The directory with the weights in it; those of a repository are downloaded if need be.

        Raises:
          UserError: the repository has no safetensors.
          StorageError: the hub cannot be reached, or the download fails.
        """
        if self.repo:
            _fetch_weights(self)
        return self.directory

    def tokenizer_dir(self) -> Path:
        """A directory on this machine with what files the model's tokenizer has.

        Raises:
          StorageError: they are in a bucket and cannot be read.
        """
        directory = self.directory
        return directory if isinstance(directory, Path) else _local_tokenizer(str(directory))


def resolve(path: str, revision: str = "") -> Resolved:
    """Find the model that a config or a command names. Its weights are left where they are.

    Args:
      path: a directory, `assets:NAME`, a place in a bucket such as `gs://bucket/model`, or, where
        there is no such directory, the id of a repository on the Hugging Face hub, `owner/name`.
      revision: commit or tag of the repository; unused for anything else. Without one it is the
        newest commit, and a warning says which, for the config.

    Raises:
      UserError: there is no such directory, repository or revision, or no access to it.
      StorageError: the repository is not in the cache, and the hub cannot be reached.
    """
    directory = resolve_place(path)
    if not isinstance(directory, Path) or path.startswith(ASSETS) or directory.exists():
        return Resolved(directory)
    if not _ID.fullmatch(path):
        raise UserError(
            f"{path}: no such directory; nor is it the id of a model on the Hugging Face hub, "
            "which is owner/name"
        )
    return _snapshot(path, revision)


@cache
def _snapshot(repo: str, revision: str) -> Resolved:
    from huggingface_hub import snapshot_download

    with _hub_errors(repo, revision):
        found = snapshot_download(repo, revision=revision or None, allow_patterns=list(_FILES))
    model = Resolved(Path(found), repo, Path(found).name)
    if revision in ("", "main"):
        _log.warning(
            "%s: no revision is named, so this is the newest commit, which may be another one "
            "tomorrow. To pin it, set revision to %s",
            repo,
            model.commit,
        )
    return model


@cache
def _fetch_weights(model: Resolved) -> None:
    from huggingface_hub import HfApi, snapshot_download

    directory, revision = model.directory, model.commit
    names = shard_names(directory) if (directory / INDEX).is_file() else [WEIGHTS]
    with _hub_errors(model.repo, revision):
        patterns = [glob.escape(name) for name in names]
        snapshot_download(model.repo, revision=revision, allow_patterns=patterns)
    if names == [WEIGHTS] and not (directory / WEIGHTS).is_file():
        there: list[str] = []
        with suppress(Exception):  # it only makes the message better
            there = HfApi().list_repo_files(model.repo, revision=revision)
        refuse_pickles(str(model), there)
        raise UserError(f"{model}: has no safetensors: neither {WEIGHTS} nor {INDEX}")


@cache
def _local_tokenizer(directory: str) -> Path:
    """A copy of the tokenizer in a bucket, for as long as the process lives."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    source = resolve_place(directory)
    with storage_errors(source):
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                (folder / name).write_bytes((source / name).read_bytes())
    return folder


@contextmanager
def _hub_errors(repo: str, revision: str) -> Iterator[None]:
    """Turns the client's errors into one line that says what to do."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{repo}: is gated: accept its terms at https://huggingface.co/{repo}, then {login}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{repo}: no such directory here, and no such repository on the Hugging Face hub, or a "
            f"private one: correct the name; for a private one, {login}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(
            f"{repo}: has no revision {revision!r}: name a commit or a tag of the repository"
        ) from error
    except errors.HFValidationError as error:
        raise UserError(f"{repo}: no such directory, and not the id of a repository") from error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        at = f" --revision {revision}" if revision else ""
        raise StorageError(
            f"{repo}: no such directory here; and of a repository on the Hugging Face hub, not all "
            f"is in the cache, and the hub cannot be reached ({_first_line(error.__cause__)}). "
            f"Where there is a network, `hf download {repo}{at}` fills the cache"
        ) from error
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise UserError(
                f"{repo}: the hub refuses the token that it was sent: {login}"
            ) from error
        raise StorageError(f"{repo}: the hub answers {_first_line(error)}") from error
    except Exception as error:
        # The client and what it uses have errors of many kinds.
        said = f"{type(error).__name__}: {_first_line(error)}"
        raise StorageError(f"{repo}: cannot be fetched from the hub ({said})") from error


def _first_line(error: BaseException | None) -> str:
    lines = (line.strip() for line in str(error or "offline").splitlines())
    return next(filter(None, lines), type(error).__name__)
