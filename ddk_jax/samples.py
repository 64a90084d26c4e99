"""Texts in, texts out: prompts of a user, continued by a model with its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Array

from ddk_jax.data.sources import Turn
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import UserError
from ddk_jax.models.decoder import Decoder
from ddk_jax.models.generate import generate
from ddk_jax.models.sampling import Sampling

GENERATION_CONFIG = "generation_config.json"


def continued_texts(
    decoder: Decoder,
    params: Any,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    sampling: Sampling,
    *,
    key: Array,
    chat: bool = False,
) -> list[str]:
    """What a model adds to each prompt, without the stop token.

    Args:
      decoder: the model.
      params: its parameters.
      tokenizer: the one that it was trained with.
      prompts: texts; with `chat`, what the user says.
      sampling: as from `sampling_of`.
      key: of `jax.random`.
      chat: put each prompt into the tokenizer's chat template, so that the model answers it.

    Raises:
      UserError: as `generate`; or a text without any token.
      DataError: the tokenizer has no chat template.
    """
    encode = _asked if chat else _plain
    ids = [encode(tokenizer, prompt) for prompt in prompts]
    made = generate(decoder, params, ids, sampling, key=key, vocab_size=tokenizer.vocab_size)
    found = made.lists(sampling.stop)
    return [_added_text(tokenizer, *pair) for pair in zip(ids, found, strict=True)]


def stop_tokens(tokenizer: Tokenizer, texts: Iterable[str] = ()) -> tuple[int, ...]:
    """Tokens that end a text: the end token, those of `generation_config.json`, and given ones.

    Args:
      tokenizer: the model's, in the model's directory.
      texts: of further tokens.

    Raises:
      UserError: a text is not one token.
    """
    found = {tokenizer.end_id}
    file = tokenizer.file.parent / GENERATION_CONFIG
    if file.is_file():
        found.update(_ends(file, tokenizer.vocab_size))
    for text in texts:
        ids = _plain(tokenizer, text)
        token = tokenizer.vocabulary.get(text, ids[0] if len(ids) == 1 else None)
        if token is None:
            raise UserError(
                f"{text!r} is {len(ids)} tokens of {tokenizer.file}: name a single token to stop at"
            )
        found.add(token)
    return tuple(sorted(found))


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file, empty ones apart.

    Raises:
      UserError: there is none, or the file is not UTF-8.
    """
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 ({error.reason} at byte {error.start})") from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"{file}: no prompts; write one in a line")
    return prompts


def _plain(tokenizer: Tokenizer, text: str) -> list[int]:
    (ids,) = tokenizer.encode([text])
    return ids.tolist()


def _asked(tokenizer: Tokenizer, text: str) -> list[int]:
    """The text as the message of a user, up to where the answer begins in a training document."""
    template = tokenizer.template
    try:
        whole, contents = template.render([Turn("user", text), Turn("assistant", "Yes")])
    except ValueError as error:
        raise UserError(f"{text!r}: {error}") from error
    # A space before the answer is part of its first token.
    before = whole[: contents[-1][0]].rstrip(" ")
    ids, _, _ = tokenizer.encode_rendered(before, contents[:1])
    return ids.tolist()


def _added_text(tokenizer: Tokenizer, prompt: Sequence[int], new: Sequence[int]) -> str:
    """The text of new tokens, with the space that a decoder leaves out at the start of a text."""
    before, after = tokenizer.decode(prompt), tokenizer.decode([*prompt, *new])
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(new)


def _ends(file: Path, vocab_size: int) -> list[int]:
    """`eos_token_id` of a generation_config.json: a number, a list of them, or nothing."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from error
    given = config.get("eos_token_id") if isinstance(config, dict) else None
    listed = given if isinstance(given, list) else [given]
    return [token for token in listed if type(token) is int and 0 <= token < vocab_size]
