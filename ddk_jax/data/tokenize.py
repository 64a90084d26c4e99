"""The tokenizer of the teacher: text to token ids, and whether two tokenizers are the same.

Text never becomes a control token: a document that spells out a special token gets the ids of its
characters. The end token is appended by us, once, after each document.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int32
from tokenizers.decoders import DecodeStream

from ddk_jax.data.sources import Document
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
        for name in TOKENIZER_FILES[1:]:
            if (self.file.parent / name).is_file():
                shutil.copyfile(self.file.parent / name, directory / name)


def encode_documents(
    tokenizer: Tokenizer, documents: Sequence[Document]
) -> Iterator[tuple[np.ndarray, int]]:
    """Token ids of each document with the end token, uint32, and the number of its prompt tokens.

    The prompt of plain text is the whole document, end token included. Prompt and response are
    encoded apart, so that the same prompt has the same tokens whatever follows.
    """
    texts = [text for document in documents for text in (document.text, document.response)]
    encoded = tokenizer.encode(texts)
    end = np.asarray([tokenizer.end_id], dtype=np.uint32)
    for i, document in enumerate(documents):
        prompt, response = encoded[2 * i], encoded[2 * i + 1]
        ids = np.concatenate([prompt, response, end])
        yield ids, prompt.size if document.response else ids.size


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
