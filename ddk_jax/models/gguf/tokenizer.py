"""The tokenizer of a GGUF file, rebuilt as a `tokenizer.json` that gives the same ids.

A file holds the vocabulary and, for byte-level BPE, the merges; but of the rule that cuts text into
words before the merges it holds only a name. Where that name or another part is not known to be
reproduced exactly, the file is refused: a tokenizer that is nearly right is worse than none.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from ddk_jax.errors import UserError
from ddk_jax.models.directory import some, write_json
from ddk_jax.models.gguf.file import TOKENS

_REMEDY = "get the model's own tokenizer.json and name its directory with --tokenizer"

# Token types of the format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED = 1, 2, 3, 4, 5

_LONGEST_PIECE = 512  # every cut of a piece is tried
SPACE = "\u2581"
"""What SentencePiece writes for a space."""


class _Words(NamedTuple):
    """How text is cut into words, which are then merged on their own."""

    cuts: tuple[str, ...]
    """Patterns; each in turn cuts the pieces left by those before into matches and the rest."""
    composed: bool = False
    """Whether characters are composed first (Unicode's NFC)."""
    whole: bool = False
    """Whether a word that is a token stays whole, whatever the merges say."""
    starts: bool = False
    """Whether the start token comes first where the file does not say."""


_DIGIT = r"\p{N}"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|"
    r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ASIAN = r"[\x{4e00}-\x{9fa5}\x{800}-\x{4e00}\x{ac00}-\x{d7ff}]+"

_WORDS = {
    "gpt-2": _Words((_GPT2,)),
    "phi-2": _Words((_GPT2,)),
    "smollm": _Words((_DIGIT, _GPT2)),
    "starcoder": _Words((_DIGIT, _GPT2)),
    "refact": _Words((_DIGIT, _GPT2)),
    "llama3": _Words((_LLAMA3,), whole=True, starts=True),
    "llama-v3": _Words((_LLAMA3,), whole=True, starts=True),
    "llama-bpe": _Words((_LLAMA3,), whole=True, starts=True),
    "qwen2": _Words((_LLAMA3.replace(r"\p{N}{1,3}", _DIGIT),), composed=True),
    "tekken": _Words((_TEKKEN,), whole=True, starts=True),
    "deepseek-coder": _Words((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _ASIAN, _DIGIT)),
}
"""By the value of `tokenizer.ggml.pre`. The names are llama.cpp's; what they stand for are the
models' own tokenizer.json files, where llama.cpp is an approximation (tekken, composition)."""


@dataclass(frozen=True)
class _Vocabulary:
    """The tokens of a file."""

    tokens: list[str]
    """Texts, by id."""
    kinds: list[int]
    """Types, by id."""
    special: dict[str, int]
    """Ids of the tokens with a role: bos, eos, unknown, padding, eot, ..."""

    @property
    def ids(self) -> dict[str, int]:
        """Id by text, without what only pads the embedding table."""
        pairs = enumerate(zip(self.tokens, self.kinds, strict=True))
        return {token: i for i, (token, kind) in pairs if kind != _UNUSED}

    def is_special(self, i: int) -> bool:
        """Whether text never becomes this token."""
        return self.kinds[i] in (_UNKNOWN, _CONTROL) or i in self.special.values()

    def text(self, role: str) -> str | None:
        """The token that has a role."""
        return self.tokens[self.special[role]] if role in self.special else None


def write_tokenizer(
    metadata: Mapping[str, Any], directory: Path, *, end_token: str = ""
) -> dict[str, int]:
    """Write tokenizer.json and tokenizer_config.json, with the chat template if there is one.

    Args:
      metadata: of the GGUF file.
      directory: where to; it exists.
      end_token: text of the token that ends a document; empty: the file's end token.

    Returns:
      Ids of the tokens with a role, by the role's name in the file: bos, eos, ...

    Raises:
      UserError: there is no tokenizer, or none that can be rebuilt exactly; no such end token.
    """
    vocabulary = _read_vocabulary(metadata)
    ids = vocabulary.ids
    end_token = end_token or vocabulary.text("eos") or ""
    controls = [token for token, i in ids.items() if vocabulary.is_special(i)]
    if end_token not in controls:
        raise UserError(
            f"end token {end_token!r}: choose a control token of the file with --end-token: "
            f"{some(controls)}"
        )
    model = metadata.get(_key("model"))
    if model == "gpt2":
        tokenizer, starts = _byte_level(metadata, ids)
    elif model == "llama":
        tokenizer, starts = _sentencepiece(metadata, vocabulary), True
    else:
        raise UserError(
            f"{_key('model')} = {model!r} is not supported, only 'gpt2' and 'llama'; {_REMEDY}"
        )
    _add_special(tokenizer, vocabulary)
    tokenizer.post_processor = _frame(metadata, vocabulary, starts)
    tokenizer.save(str(directory / "tokenizer.json"))
    template = metadata.get("tokenizer.chat_template")
    roles = {"bos": "bos", "unknown": "unk", "padding": "pad"}
    named = {f"{short}_token": vocabulary.text(role) for role, short in roles.items()}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "eos_token": end_token,
        "chat_template": template if isinstance(template, str) else None,
        "model_max_length": metadata.get("llama.context_length"),
        "clean_up_tokenization_spaces": False,
    }
    write_json(
        directory / "tokenizer_config.json",
        {key: value for key, value in config.items() if value is not None},
    )
    return vocabulary.special


def _read_vocabulary(metadata: Mapping[str, Any]) -> _Vocabulary:
    tokens = metadata.get(TOKENS)
    if not isinstance(tokens, list) or not tokens:
        raise UserError(f"the file has no tokens ({TOKENS}); {_REMEDY}")
    kinds = _numbers(metadata, "token_type", tokens)
    defaults = {"bos": 1, "eos": 2, "unknown": 0} if metadata.get(_key("model")) == "llama" else {}
    pattern = re.compile(re.escape(_key("")) + r"(\w+)_token_id")
    given = {match[1]: metadata[key] for key in metadata if (match := pattern.fullmatch(key))}
    special = {
        role: i
        for role, i in (defaults | given).items()
        # Other values mean that there is none.
        if isinstance(i, int) and 0 <= i < len(tokens) and kinds[i] != _UNUSED
    }
    found = _Vocabulary(tokens, kinds.tolist(), special)
    if len(found.ids) < sum(kind != _UNUSED for kind in found.kinds):
        raise UserError(f"some tokens are in the file twice; {_REMEDY}")
    return found


def _byte_level(
    metadata: Mapping[str, Any], ids: dict[str, int]
) -> tuple[tokenizers.Tokenizer, bool]:
    """BPE on bytes that are written as characters; and whether a start token is usual."""
    name = metadata.get(_key("pre"))
    words = _WORDS.get(name) if isinstance(name, str) else None
    if words is None:
        raise UserError(
            f"{_key('pre')} = {name!r}: how this tokenizer cuts text into words is not known, only "
            f"for {', '.join(_WORDS)}; {_REMEDY}"
        )
    merges = metadata.get(_key("merges"))
    if not isinstance(merges, list):
        raise UserError(f"the file has no merges ({_key('merges')}); {_REMEDY}")
    pairs = [tuple(merge.split(" ")) for merge in merges]
    try:
        model = models.BPE(vocab=ids, merges=pairs, ignore_merges=words.whole)
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"{_key('merges')} do not fit the tokens ({error}); {_REMEDY}") from error
    tokenizer = tokenizers.Tokenizer(model)
    if words.composed:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(tokenizers.Regex(cut), "isolated") for cut in words.cuts]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, words.starts


def _sentencepiece(metadata: Mapping[str, Any], vocabulary: _Vocabulary) -> tokenizers.Tokenizer:
    """BPE on characters by the scores of the tokens that result, bytes for unknown characters."""
    ids, prefixed = vocabulary.ids, metadata.get(_key("add_space_prefix"), True)
    if absent := [byte for i in range(256) if (byte := f"<0x{i:02X}>") not in ids]:
        raise UserError(f"the tokenizer lacks byte tokens ({some(absent)}); {_REMEDY}")
    model = models.BPE(
        vocab=ids,
        merges=_merges_by_score(vocabulary, _numbers(metadata, "scores", vocabulary.tokens)),
        unk_token=vocabulary.text("unknown"),
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = tokenizers.Tokenizer(model)
    prefix = [normalizers.Prepend(SPACE)] if prefixed else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", SPACE)])
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    strip = [decoders.Strip(" ", left=1)] if prefixed else []
    tokenizer.decoder = decoders.Sequence([*steps, *strip])
    return tokenizer


def _merges_by_score(vocabulary: _Vocabulary, scores: np.ndarray) -> list[tuple[str, str]]:
    """The pairs that may be merged, first those whose result has the highest score.

    SentencePiece merges the best-scored token first and, of equal ones, the leftmost; here every
    pair has a rank of its own. The order of equal ones is that of transformers' converter, which
    grows a run of one character (of spaces, mostly: these are what shares a score) from its left.
    """
    parts = {
        token: float(scores[i])
        for i, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True))
        if kind == _NORMAL
    }
    found: list[tuple[float, str, str]] = []
    sharing: dict[float, str] = {}
    for token, score in parts.items():
        if len(token) > _LONGEST_PIECE:
            raise UserError(f"token {token[:20]!r}... has {len(token)} characters; {_REMEDY}")
        if not all(character in parts for character in token):
            raise UserError(f"token {token!r} has characters that are no tokens; {_REMEDY}")
        cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
        usable = [(score, *pair) for pair in cuts if pair[0] in parts and pair[1] in parts]
        other = sharing.setdefault(score, token) if usable else token
        if set(other) != set(token) or (other != token and len(set(token)) > 1):
            raise UserError(
                f"tokens {other!r} and {token!r} have the same score, so that it is not known "
                f"which is merged first; {_REMEDY}"
            )
        found += usable
    found.sort(key=lambda item: (item[0], len(item[1]), len(item[2])), reverse=True)
    return [(left, right) for _, left, right in found]


def _add_special(tokenizer: tokenizers.Tokenizer, vocabulary: _Vocabulary) -> None:
    """Declare the tokens that are matched before text is cut."""
    special, ordinary = [], []
    for token, i in vocabulary.ids.items():
        if vocabulary.is_special(i):
            special.append(AddedToken(token, normalized=False))
        elif vocabulary.kinds[i] == _USER_DEFINED:
            ordinary.append(AddedToken(token, normalized=False))
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(ordinary)


def _frame(
    metadata: Mapping[str, Any], vocabulary: _Vocabulary, starts: bool
) -> processors.TemplateProcessing | None:
    """What is put around a text when special tokens are asked for."""
    start = vocabulary.text("bos") if metadata.get(_key("add_bos_token"), starts) else None
    end = vocabulary.text("eos") if metadata.get(_key("add_eos_token"), False) else None
    if start is None and end is None:
        return None
    single, second = [start, "$A", end], [start, "$B:1", end]
    return processors.TemplateProcessing(
        single=[part for part in single if part is not None],
        pair=[part for part in (*single, *second) if part is not None],
        special_tokens=[(text, vocabulary.ids[text]) for text in (start, end) if text is not None],
    )


def _numbers(metadata: Mapping[str, Any], name: str, tokens: list[str]) -> np.ndarray:
    """One number for each token."""
    found = metadata.get(_key(name))
    if not isinstance(found, np.ndarray) or found.shape != (len(tokens),):
        raise UserError(f"{_key(name)}: expected a number for each of {len(tokens)} tokens")
    return found


def _key(name: str) -> str:
    return f"tokenizer.ggml.{name}"
