"""Tasks from JSONL files: what is asked of a model, example by example.

The columns of a file say what kind of task it is:

- `query`, `choices`, `gold` and, optionally, `suffix`: multiple choice.
- `text` in a file whose name starts with `lambada`: the last word of every text.
- `text` in any other file: the whole text.

Other columns are passed over. Unlike training data, a task must be whole: a line that cannot be
used is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from ddk_jax.config import SourceConfig
from ddk_jax.data.sources import (
    MultipleChoice,
    Reject,
    Row,
    SourceFile,
    is_jsonl,
    is_multiple_choice,
    multiple_choice,
    read_rows,
    source_files,
    text_of,
)
from ddk_jax.errors import DataError, UserError

_LAST_WORD = "lambada"


class LastWord(NamedTuple):
    """A text whose last word is to be predicted.

    Attributes:
        context: the text before the last space.
        word: what follows it.
    """

    context: str
    word: str


class Passage(NamedTuple):
    """A text that is predicted from its beginning to its end."""

    text: str


Examples: TypeAlias = tuple[MultipleChoice, ...] | tuple[LastWord, ...] | tuple[Passage, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """The examples of one file, or a sample of them."""

    name: str
    """Name of the file without its suffixes: `copa.validation`."""
    examples: Examples
    """All of one type; at least one."""
    available: int
    """Examples of the whole file."""
    baselines: dict[str, float]
    """Accuracies that need no model, over the whole file; empty where there are none. `majority`:
    the most frequent number of the right option, always. `chance`: a random option."""

    def sample(self, limit: int, seed: int) -> Task:
        """At most `limit` examples, drawn without replacement, in the order of the file.

        The same seed draws the same examples for every model, and more of them under a larger
        limit. 0 takes all.

        Raises:
            UserError: the limit is negative.
        """
        if limit < 0:
            raise UserError(f"a limit of {limit} examples: expected a number, or 0 for all")
        if not 0 < limit < len(self.examples):
            return self
        order = np.random.default_rng(seed).permutation(len(self.examples))
        chosen: Any = tuple(self.examples[i] for i in sorted(order[:limit].tolist()))
        return replace(self, examples=chosen)


def read_tasks(paths: Sequence[str]) -> tuple[Task, ...]:
    """The tasks in files, in the order of `paths`; of a folder or glob, every JSONL file.

    Raises:
        DataError: nothing is there, or a file is no task; the message names file, line and reason.
        StorageError: a file cannot be read.
    """
    tasks = []
    for path in paths:
        files = [file for file in source_files(SourceConfig(path=path)) if is_jsonl(file.path)]
        if not files:
            raise DataError(f"{path}: holds no task, which is a .jsonl file (also .gz and .xz)")
        tasks += [_read_task(file) for file in files]
    return tuple(tasks)


def _read_task(file: SourceFile) -> Task:
    parse: Callable[[Mapping[str, Any]], Any] | None = None
    examples: list[Any] = []
    for item in read_rows(file):
        if isinstance(item, Reject):
            raise DataError(f"{file.name}, line {item.line}: {item.reason}")
        try:
            parse = parse or _parser(file, item)
            examples.append(parse(item.columns))
        except ValueError as error:
            raise DataError(f"{file.name}, line {item.line}: {error}") from error
    if not examples:
        raise DataError(f"{file.name}: holds no example")
    return Task(
        name=_name(file),
        examples=tuple(examples),
        available=len(examples),
        baselines=_baselines(examples) if isinstance(examples[0], MultipleChoice) else {},
    )


def _name(file: SourceFile) -> str:
    name = file.path.name
    return name[: name.lower().rindex(file.path.suffix.lower())].removesuffix(".jsonl")


def _parser(file: SourceFile, first: Row) -> Callable[[Mapping[str, Any]], Any]:
    """How rows of a file are read whose first row is this."""
    columns = first.columns
    if is_multiple_choice(columns):
        return multiple_choice
    if "text" in columns:
        return _last_word if file.path.name.startswith(_LAST_WORD) else _passage
    found = ", ".join(map(repr, columns)) or "nothing"
    generation = {"prompt", "answer"} <= columns.keys()
    raise ValueError(
        f"a task has the columns query, choices, gold, or text; found {found}"
        + (" (tasks that a model answers freely are not scored)" if generation else "")
    )


def _last_word(columns: Mapping[str, Any]) -> LastWord:
    text = text_of(columns, "text")
    context, space, word = text.rpartition(" ")
    if not space or not context.strip() or not word:
        raise ValueError("text: needs a word, a space and a last word")
    return LastWord(context, word)


def _passage(columns: Mapping[str, Any]) -> Passage:
    return Passage(text_of(columns, "text"))


def _baselines(examples: Sequence[MultipleChoice]) -> dict[str, float]:
    counts = np.bincount([example.gold for example in examples])
    chance = np.mean([1 / len(example.choices) for example in examples])
    return {"majority": float(counts.max() / len(examples)), "chance": float(chance)}
