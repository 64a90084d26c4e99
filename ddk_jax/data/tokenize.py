"""The tokenizer of the teacher: text to token ids, and whether two tokenizers are the same.

Text never becomes a control token: a document that spells out a special token gets the ids of its
characters. Only what a chat template writes itself is control. The end token is appended by us,
once, after each document.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers.decoders import DecodeStream

from ddk_jax.data.chat import TEMPLATE_FILE, ChatTemplate, read_template
from ddk_jax.data.sources import Document, Turn
from ddk_jax.errors import DataError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
"""What is copied beside the data; only the first must exist."""

_END_NAMES = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>", "[EOS]", "<|im_end|>")


class Tokenizer:
    """A `tokenizers` file with its end token, encoding text as text.

    Attributes:
        digest: SHA-256 of the content of tokenizer.json and the end token's id; key order and
            white space of the file make no difference.
        vocab_size: largest id plus one.
        end_id: id of the token that ends every document.
        end_token: its text.
    """

    def __init__(self, path: Path) -> None:
        """Load a directory with a `tokenizer.json`, or that file.

        Raises:
            DataError: the file is missing or not a tokenizer, or it has no end token.
        """
        self.file = path / "tokenizer.json" if path.is_dir() else path
        content = _read_json(self.file)
        self.end_token = _end_token(content, self.file)
        for added in content.get("added_tokens") or ():
            # One that is not marked special would be matched in text.
            if added["content"] == self.end_token:
                added["special"] = True
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
        except Exception as error:  # tokenizers raises nothing more specific
            raise DataError(f"{self.file}: not a tokenizer ({error})") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        self.vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        if self.end_token not in self.vocabulary:
            raise DataError(
                f"{self.file}: the end token {self.end_token!r} is not in the vocabulary"
            )
        self.end_id = self.vocabulary[self.end_token]
        self.vocab_size = max(self.vocabulary.values()) + 1
        canonical = json.dumps([content, self.end_id], sort_keys=True, separators=(",", ":"))
        self.digest = hashlib.sha256(canonical.encode()).hexdigest()

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of each text, uint32 [tokens], without any special token. One call per batch.

        Raises:
            DataError: the tokenizer gives an id outside its vocabulary.
        """
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        ids = [np.asarray(encoding.ids, dtype=np.uint32) for encoding in encodings]
        largest = max((int(one.max()) for one in ids if one.size), default=0)
        if largest >= self.vocab_size:
            raise DataError(
                f"{self.file}: gives id {largest}, its vocabulary ends at {self.vocab_size}"
            )
        return ids

    def encode_with_ends(
        self, texts: Sequence[str]
    ) -> list[tuple[np.ndarray, Int32[np.ndarray, " tokens"]]]:
        """Token ids of each text as `encode` gives them, and the characters read after each token.

        Tokens that are parts of one character all end behind it.
        """
        encodings = self._tokenizer.encode_batch(list(texts), add_special_tokens=False)
        return [
            (
                np.asarray(encoding.ids, dtype=np.uint32),
                np.asarray([end for _, end in encoding.offsets], dtype=np.int32),
            )
            for encoding in encodings
        ]

    @functools.cached_property
    def template(self) -> ChatTemplate:
        """The chat template.

        Raises:
            DataError: the tokenizer has none.
        """
        return read_template(self.file)

    def encode_rendered(
        self, text: str, contents: Sequence[tuple[int, int]]
    ) -> tuple[np.ndarray, Int32[np.ndarray, " tokens"], Int32[np.ndarray, " tokens"]]:
        """Token ids of what a chat template wrote, and the characters where each begins and ends.

        The special tokens of the template are control tokens; the same characters within a message
        (`contents`: start and end of each) are text.
        """
        marks = [match.span() for match in self._specials.finditer(text)]
        own = [
            (start, stop)
            for start, stop in marks
            if all(stop <= first or start >= last for first, last in contents)
        ]
        if len(own) == len(marks):
            pieces = [(0, self._with_specials.encode(text, add_special_tokens=False))]
        else:
            pieces = []
            edges = [0, *(edge for mark in own for edge in mark), len(text)]
            for number, (start, stop) in enumerate(pairwise(edges)):
                encoder = self._with_specials if number % 2 else self._tokenizer
                pieces.append((start, encoder.encode(text[start:stop], add_special_tokens=False)))
        ids = [token for _, piece in pieces for token in piece.ids]
        spans = [(first + a, first + b) for first, piece in pieces for a, b in piece.offsets]
        starts, stops = np.asarray(spans, np.int32).reshape(-1, 2).T
        return np.asarray(ids, np.uint32), starts, stops

    def after_special(self, text: str, start: int) -> int:
        """Where the special token ends that stands at `start`, or after spaces; else `start`."""
        found = self._specials.match(text, len(text) - len(text[start:].lstrip(" ")))
        return found.end() if found else start

    @functools.cached_property
    def _with_specials(self) -> tokenizers.Tokenizer:
        """The same tokenizer, which takes the text of a special token for it."""
        other = tokenizers.Tokenizer.from_str(self._tokenizer.to_str())
        other.encode_special_tokens = False
        return other

    @functools.cached_property
    def _specials(self) -> re.Pattern[str]:
        added = self._tokenizer.get_added_tokens_decoder().values()
        texts = sorted((one.content for one in added if one.special), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)))

    def ends(self, ids: Sequence[int] | np.ndarray) -> tuple[str, Int32[np.ndarray, " tokens"]]:
        """The text of token ids without special tokens, and its characters after each token.

        -1 where a token ends within a character, and after a special token.
        """
        stream, text = DecodeStream(skip_special_tokens=True), []
        ends, length = np.full(len(ids), -1, np.int32), 0
        for i, token in enumerate(ids):
            if (more := stream.step(self._tokenizer, int(token))) is not None:
                text.append(more)
                length += len(more)
                ends[i] = length
        return "".join(text), ends

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, special tokens included."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def copy_to(self, directory: Path) -> None:
        """Copy the tokenizer's files into a new directory."""
        directory.mkdir()
        shutil.copyfile(self.file, directory / "tokenizer.json")
        for name in (*TOKENIZER_FILES[1:], TEMPLATE_FILE):
            if (self.file.parent / name).is_file():
                shutil.copyfile(self.file.parent / name, directory / name)


class Encoded(NamedTuple):
    """A document in tokens.

    Attributes:
        ids: token ids, with the end token.
        turns: where the role changes from prompt to response and back, as positions in `ids`; the
            first token is of the prompt unless the first turn is at 0. An even number of turns.
    """

    ids: np.ndarray
    turns: tuple[int, ...]


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[Document]
) -> Iterator[Encoded | str]:
    """Each document in tokens, or the reason why it cannot be.

    The prompt of plain text is the whole document, end token included. Prompt and response are
    encoded apart, so that the same prompt has the same tokens whatever follows.
    """
    texts = [text for document in documents for text in (document.text, document.response)]
    encoded = tokenizer.encode(texts)
    end = np.asarray([tokenizer.end_id], dtype=np.uint32)
    for i, document in enumerate(documents):
        if document.turns:
            yield _encode_chat(tokenizer, document.turns)
            continue
        prompt, response = encoded[2 * i], encoded[2 * i + 1]
        ids = np.concatenate([prompt, response, end])
        if not prompt.size or (document.response and not response.size):
            yield "the tokenizer makes no token of it"
        elif np.any(ids[:-1] == tokenizer.end_id):
            yield "the tokenizer takes a part of it for the end token"
        else:
            yield Encoded(ids, (prompt.size, ids.size) if document.response else ())


def _encode_chat(tokenizer: Tokenizer, turns: Sequence[Turn]) -> Encoded | str:
    """A conversation, tokenised as a whole.

    What the assistant says, up to the special token that ends it, is the response. A token with any
    character of it counts to it.
    """
    try:
        text, contents = tokenizer.template.render(turns)
    except ValueError as error:
        return str(error)
    said = text.rstrip()
    if said.endswith(tokenizer.end_token) and len(said) >= contents[-1][1]:
        text = said  # what the template writes after the end token is never predicted
    ids, starts, stops = tokenizer.encode_rendered(text, contents)
    in_response = np.zeros(ids.size, bool)
    for turn, (start, stop) in zip(turns, contents, strict=True):
        if turn.role == "assistant":
            stop = tokenizer.after_special(text, stop)
            in_response |= (starts < stop) & (stops > start)
    if not in_response.any():
        return "the tokenizer makes no token of what the assistant says"
    if ids[-1] != tokenizer.end_id:
        ids = np.append(ids, np.uint32(tokenizer.end_id))
        in_response = np.append(in_response, turns[-1].role == "assistant")
    changes = np.flatnonzero(np.diff(in_response, prepend=False, append=False))
    return Encoded(ids, tuple(changes.tolist()))


def same_tokens(ours: Tokenizer, theirs: Tokenizer, limit: int = 5) -> list[str]:
    """The first differences between two tokenizers; empty if they give the same ids.

    Vocabulary and end token are compared first, then how text is cut into tokens.

    Returns:
        At most `limit` sentences.
    """
    if ours.digest == theirs.digest:
        return []
    found = []
    if ours.end_token != theirs.end_token or ours.end_id != theirs.end_id:
        found.append(
            f"end token {ours.end_token!r} (id {ours.end_id}) against {theirs.end_token!r} "
            f"(id {theirs.end_id})"
        )
    if ours.vocab_size != theirs.vocab_size:
        found.append(f"vocabulary of {ours.vocab_size} against {theirs.vocab_size}")
    for token in sorted(ours.vocabulary.keys() | theirs.vocabulary.keys()):
        if len(found) >= limit:
            break
        one, other = ours.vocabulary.get(token), theirs.vocabulary.get(token)
        if one != other:
            found.append(f"token {token!r} has id {one} against {other}")
    for text in () if found else _PROBES:
        one_ids, other_ids = ours.encode([text])[0], theirs.encode([text])[0]
        if not np.array_equal(one_ids, other_ids):
            found.append(f"{text!r} becomes {one_ids.tolist()} against {other_ids.tolist()}")
    return found[:limit]


_PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "x = 12345\n    y\t= [0.5, -1e9]  # 3 % 2",
    "  two leading spaces, two trailing  ",
    "Gr\u00fc\u00dfe, na\u00efve \u4f60\u597d \U0001f600",
    "I'M don't CamelCase snake_case\r\n\r\n\n",
)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise DataError(
            f"{path}: no such file; a tokenizer is a folder with a tokenizer.json"
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a JSON object")
    return content


def _end_token(content: dict[str, Any], file: Path) -> str:
    """What the files beside the tokenizer name as `eos_token`, or a special token known as one."""
    for name in TOKENIZER_FILES[1:]:
        if (file.parent / name).is_file():
            value = _read_json(file.parent / name).get("eos_token")
            # Either the text or the description of an added token.
            token = value.get("content") if isinstance(value, dict) else value
            if isinstance(token, str) and token:
                return token
    special = {
        str(token["content"]) for token in content.get("added_tokens") or () if token["special"]
    }
    for token in _END_NAMES:
        if token in special:
            return token
    raise DataError(
        f"{file}: no end token; name it as eos_token in a tokenizer_config.json beside the file"
    )
