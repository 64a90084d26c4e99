"""Texts in, texts out: stop tokens, files of prompts, chat templates."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.errors import DataError, UserError
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.sampling import Sampling
from ddk_jax.models.spec import ModelSpec
from ddk_jax.samples import continued_texts, read_prompts, stop_tokens

CHATML = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture
def tokenizer(tmp_path: Path) -> Tokenizer:
    return Tokenizer(tiny.write_tokenizer(tmp_path))


def follower(after: str, then: str, tokenizer: Tokenizer) -> tuple[Decoder, Params]:
    """A model that continues `after` with the characters of `then`, one by one, and ends there."""
    size = tokenizer.vocab_size
    spec = ModelSpec(
        vocab_size=size, hidden_size=size, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2,
        ffn_size=1, tied_head=False,
    )  # fmt: skip
    decoder = Decoder(spec=spec)
    params = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), decoder.abstract())
    chain = [*(tokenizer.vocabulary[c] for c in after + then), tokenizer.end_id]
    kernel = np.zeros((size, size), np.float32)
    kernel[chain[len(after) - 1 : -1], chain[len(after) :]] = 1
    params["embed"]["table"] = jnp.eye(size)
    params["norm"]["scale"] = jnp.ones(size)
    params["head"]["kernel"] = jnp.asarray(kernel)
    return decoder, params


def continued(prompt: str, model: Any, tokenizer: Tokenizer, **changes: Any) -> str:
    sampling = Sampling(max_new_tokens=9, temperature=0.0, stop=stop_tokens(tokenizer))
    key = jax.random.key(0)
    (text,) = continued_texts(*model, tokenizer, [prompt], sampling, key=key, **changes)
    return text


@pytest.mark.slow
def test_a_text_is_continued_up_to_the_end_token(tokenizer: Tokenizer) -> None:
    assert continued("xa", follower("a", "bcd", tokenizer), tokenizer) == "bcd"


def test_a_chat_is_asked_by_the_template_and_answered(tokenizer: Tokenizer) -> None:
    model = follower(">", "yes", tokenizer)
    with pytest.raises(DataError, match="no chat template"):
        continued("Is it?", model, tokenizer, chat=True)
    (tokenizer.file.parent / "chat_template.jinja").write_text(CHATML)
    assert continued("Is it?", model, Tokenizer(tokenizer.file.parent), chat=True) == "yes"


@pytest.mark.parametrize("template", [CHATML, INST])
def test_a_question_has_the_tokens_that_transformers_gives_it(
    tokenizer: Tokenizer, template: str
) -> None:
    from transformers import AutoTokenizer

    from ddk_jax.samples import _asked

    folder = tokenizer.file.parent
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template}
    config["eos_token"] = tokenizer.end_token
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": "Is it?"}], add_generation_prompt=True, return_dict=False
    )
    assert _asked(Tokenizer(folder), "Is it?") == theirs


def test_stop_tokens_are_the_models_own_and_the_users(tokenizer: Tokenizer) -> None:
    own, file = tokenizer.end_id, tokenizer.file.parent / "generation_config.json"
    assert stop_tokens(tokenizer) == (own,)
    assert set(stop_tokens(tokenizer, ["a", tokenizer.end_token])) == {
        own,
        tokenizer.vocabulary["a"],
    }
    for given, more in ((3, {3}), ([4, 5, 9999], {4, 5}), (None, set()), ("x", set())):
        file.write_text(json.dumps({"eos_token_id": given}))
        assert set(stop_tokens(tokenizer)) == {own} | more
    for text, count in (("ab", 2), ("", 0)):
        with pytest.raises(UserError, match=f"'{text}' is {count} tokens of .*: name a single"):
            stop_tokens(tokenizer, [text])
    file.write_text("{")
    with pytest.raises(UserError, match=r"generation_config\.json: cannot be read as JSON"):
        stop_tokens(tokenizer)


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\n  two \n\u00fc\n", encoding="utf-8")
    assert read_prompts(file) == ["one", "  two ", "\u00fc"]
    for content, message in ((b" \n", "no prompts"), (b"\xff", "not UTF-8")):
        file.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_prompts(file)
