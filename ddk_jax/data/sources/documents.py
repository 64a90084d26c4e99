"""Documents out of rows, and why others are refused.

A row is what a source holds for one document: the columns of JSONL or Parquet, or one column with
the text of a file. It becomes a text, a prompt with its response, a conversation, or a
multiple-choice question, which is read as the prompt and the response that spell out the right
option. CRLF becomes LF, so that the same text is the same document on every system. Whatever else
cannot be used is reported as a `Reject`; nothing is repaired.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ddk_jax.config import SourceConfig
from ddk_jax.data.sources.fields import MISSING, kind_of, value_at

MAX_DOCUMENT_CHARS = 2**24
"""A text that is longer is cut into several documents."""

ROLES = ("system", "user", "assistant")
"""Who speaks in a conversation; the student learns what the assistant says."""


class Turn(NamedTuple):
    """What one side of a conversation says."""

    role: str
    content: str


class Document(NamedTuple):
    """One accepted document.

    Attributes:
        text: the whole text, or the prompt when there is a response. Not blank, but empty for a
            conversation.
        response: the response to the prompt; empty otherwise.
        file: where it comes from, as the user would write it.
        line: its line or row in `file`, from 1; 1 for a text file.
        turns: the conversation, if it is one.
        whole: digest of the text that this is a piece of; empty if it is no piece.
    """

    text: str
    response: str
    file: str
    line: int
    turns: tuple[Turn, ...] = ()
    whole: bytes = b""

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text. Equal for equal documents, wherever they come from."""
        if self.turns:
            # NUL separates without ambiguity: no document holds one.
            content = "\0\0" + json.dumps(self.turns, ensure_ascii=False)
        else:
            content = "\0".join((self.text, self.response) if self.response else (self.text,))
        return hashlib.sha256(content.encode("utf-8")).digest()

    @property
    def num_bytes(self) -> int:
        """Bytes of all its text in UTF-8."""
        texts = (self.text, self.response, *(turn.content for turn in self.turns))
        return sum(len(text.encode("utf-8")) for text in texts)


class MultipleChoice(NamedTuple):
    """A question with its options.

    Attributes:
        query: what stands before an option; blank only where there is a suffix.
        choices: the options, at least two.
        gold: number of the right option, from 0.
        suffix: what follows each of the options; empty where nothing does.
    """

    query: str
    choices: tuple[str, ...]
    gold: int
    suffix: str

    def parts(self, choice: int) -> tuple[str, str]:
        """Context, and the text that a model predicts after it if it takes this option.

        That text is the option, with a space before it. Where there is a suffix, the option is
        filled in after the query and the suffix is predicted, with a space before it.
        """
        option = self.choices[choice]
        if self.suffix:
            return self.query + option, " " + self.suffix
        return self.query, " " + option


class Row(NamedTuple):
    """The columns of one row. `line` counts from 1."""

    line: int
    columns: dict[str, Any]


class Reject(NamedTuple):
    """One row or file that cannot be used. `line` counts from 1."""

    file: str
    line: int
    reason: str


def documents_of(row: Row, file: str, source: SourceConfig) -> Iterator[Document | Reject]:
    """The document in a row, as the source says where it is; pieces of it if it is very long.

    A row without the column `source.text` that has `query` and `choices` is a multiple-choice
    question; its document is the context and the right continuation (`MultipleChoice.parts`).
    """
    try:
        document = _document(row, file, source)
        if len(document.text) <= MAX_DOCUMENT_CHARS and not document.response:
            yield document
        elif document.response or document.turns:
            if len(document.text) + len(document.response) > MAX_DOCUMENT_CHARS:
                raise ValueError(f"prompt and response: over {MAX_DOCUMENT_CHARS} characters")
            yield document
        else:
            yield from _pieces(document)
    except ValueError as error:
        yield Reject(file, row.line, str(error))


def _document(row: Row, file: str, source: SourceConfig) -> Document:
    columns = row.columns
    response = ""
    if source.messages:
        return Document("", "", file, row.line, turns_of(columns, source.messages))
    if source.prompt:
        text = text_of(columns, source.prompt)
        response = text_of(columns, source.response)
    elif is_multiple_choice(columns) and value_at(columns, source.text) is MISSING:
        question = multiple_choice(columns)
        text, response = question.parts(question.gold)
    else:
        text = text_of(columns, source.text)
    return Document(text, response, file, row.line)


def _pieces(document: Document) -> Iterator[Document]:
    """Pieces of a very long document, cut after a line, or a word, where there is one."""
    text, whole = document.text, document.digest
    start = 0
    while start < len(text):
        stop = start + MAX_DOCUMENT_CHARS
        if stop < len(text):
            half = start + MAX_DOCUMENT_CHARS // 2
            line, word = text.rfind("\n", half, stop), text.rfind(" ", half, stop)
            stop = (line if line >= 0 else word) + 1 or stop
        piece = text[start:stop]
        if piece.strip():
            yield document._replace(text=piece, whole=whole)
        start = stop


def is_multiple_choice(columns: Mapping[str, Any]) -> bool:
    """Whether a row is meant as a multiple-choice question."""
    return "query" in columns and "choices" in columns


def multiple_choice(columns: Mapping[str, Any]) -> MultipleChoice:
    """The question in the columns `query`, `choices`, `gold` and, optionally, `suffix` of a row.

    Raises:
        ValueError: the reason why there is none.
    """
    suffix = text_of(columns, "suffix") if "suffix" in columns else ""
    query = text_of(columns, "query", may_be_blank=bool(suffix))
    for column in ("choices", "gold"):
        if column not in columns:
            raise ValueError(f"column {column!r} is missing")
    choices, gold = columns["choices"], columns["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        found = f"{len(choices)} texts" if isinstance(choices, list) else kind_of(choices)
        raise ValueError(f"column 'choices' must be a list of two texts or more, found {found}")
    named = {f"choices[{i}]": choice for i, choice in enumerate(choices)}
    options = tuple(text_of(named, name) for name in named)
    if not isinstance(gold, int) or isinstance(gold, bool):
        raise ValueError(f"column 'gold' must be the number of a choice, found {kind_of(gold)}")
    if not 0 <= gold < len(options):
        raise ValueError(f"gold is {gold}, but the {len(options)} choices are numbered from 0")
    return MultipleChoice(query, options, gold, suffix)


def turns_of(columns: Mapping[str, Any], column: str) -> tuple[Turn, ...]:
    """The conversation in a column of a row.

    Raises:
        ValueError: the reason why there is none that can be used.
    """
    value = value_at(columns, column)
    if value is MISSING:
        raise ValueError(f"column {column!r} is missing")
    if isinstance(value, Mapping) and {"role", "content"} <= value.keys():
        # TFDS gives a sequence of objects as an object of sequences.
        pairs = zip(value["role"], value["content"], strict=True)
        value = [{"role": role, "content": content} for role, content in pairs]
    if not isinstance(value, list) or not value:
        raise ValueError(f"column {column!r} must be a list of messages, found {kind_of(value)}")
    turns = []
    for i, message in enumerate(value):
        name = f"{column}[{i}]"
        if not isinstance(message, Mapping):
            raise ValueError(f"{name} must have role and content, found {kind_of(message)}")
        role = message.get("role")
        role = role.decode("utf-8", "replace") if isinstance(role, bytes) else role
        if role not in ROLES:
            raise ValueError(f"{name}: role {role!r} is not one of {', '.join(ROLES)}")
        named = {f"{name}.content": message["content"]} if "content" in message else {}
        text = text_of(named, f"{name}.content", may_be_blank=role == "system")
        turns.append(Turn(str(role), text))
    if not any(turn.role == "assistant" for turn in turns):
        raise ValueError(f"column {column!r}: the assistant says nothing")
    return tuple(turns)


def text_of(columns: Mapping[str, Any], column: str, *, may_be_blank: bool = False) -> str:
    """The text in a column of a row, with LF line ends. Bytes are taken as UTF-8.

    Raises:
        ValueError: the reason why there is none that can be used.
    """
    value = value_at(columns, column)
    if value is MISSING:
        raise ValueError(f"column {column!r} is missing")
    if isinstance(value, bytes):
        try:
            value = value.decode("utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{column}: invalid UTF-8 at byte {error.start}") from error
    if not isinstance(value, str):
        raise ValueError(f"column {column!r} must be text, found {kind_of(value)}")
    value = value.replace("\r\n", "\n")
    problem = _problem(value)
    if problem and not (may_be_blank and not value.strip()):
        raise ValueError(f"{column}: {problem}")
    return value


def _problem(text: str) -> str:
    """Why the text cannot be a document; empty if it can."""
    if not text.strip():
        return "empty or blank"
    if "\0" in text:
        return f"NUL at character {text.index(chr(0))}"
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        return f"lone surrogate at character {error.start}"
    return ""
