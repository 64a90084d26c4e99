"""From examples to tokens: which tokens a model has to predict, and after which.

Context and continuation are encoded as one text, as a reader would write it, and nothing is put
before it: no begin token, as in training. What the encodings of the context alone and of the whole
text begin with alike is the context; every token after it is predicted. So a tokenizer that merges
characters across the border moves the border, and no token is given that the text does not have.

The options of a question have one context: the shortest that this gives. Their scores then are
log-probabilities of whole texts less that of one and the same beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ddk_jax.data.sources import MultipleChoice
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import DataError
from ddk_jax.tasks.examples import LastWord, Passage


class Request(NamedTuple):
    """Tokens, those from `start` on to be predicted.

    Attributes:
        tokens: ids, int32 [n].
        start: tokens of the context, at least 1.
    """

    tokens: np.ndarray
    start: int


def choice_requests(
    tokenizer: Tokenizer, examples: Sequence[MultipleChoice]
) -> list[list[Request]]:
    """A request for every option of every question.

    Raises:
        DataError: the tokenizer makes no token of an option.
    """
    parts = [e.parts(choice) for e in examples for choice in range(len(e.choices))]
    requests = iter(_continuations(tokenizer, parts))
    found = []
    for example in examples:
        options = [next(requests) for _ in example.choices]
        if not example.suffix:
            start = min(option.start for option in options)
            options = [option._replace(start=start) for option in options]
        found.append(options)
    return found


def word_requests(tokenizer: Tokenizer, examples: Sequence[LastWord]) -> list[Request]:
    """The last word of every text, with the space before it.

    Raises:
        DataError: the tokenizer makes no token of a word.
    """
    return _continuations(tokenizer, [(e.context, " " + e.word) for e in examples])


def text_requests(tokenizer: Tokenizer, examples: Sequence[Passage]) -> list[Request]:
    """Every token of each text but the first, which has no context."""
    encoded = tokenizer.encode([example.text for example in examples])
    return [Request(ids.astype(np.int32), 1) for ids in encoded]


def _continuations(tokenizer: Tokenizer, parts: Sequence[tuple[str, str]]) -> list[Request]:
    contexts = tokenizer.encode([context for context, _ in parts])
    wholes = tokenizer.encode([context + continuation for context, continuation in parts])
    requests = []
    for context, whole, (_, continuation) in zip(contexts, wholes, parts, strict=True):
        start = max(1, _common_prefix(context, whole))
        if start >= whole.size:
            raise DataError(f"the tokenizer makes no token of {continuation!r}")
        requests.append(Request(whole.astype(np.int32), start))
    return requests


def _common_prefix(one: np.ndarray, other: np.ndarray) -> int:
    size = min(one.size, other.size)
    different = np.flatnonzero(one[:size] != other[:size])
    return int(different[0]) if different.size else size
