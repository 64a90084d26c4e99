from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ddk_jax.errors import UserError
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.generate import generate
from ddk_jax.models.spec import ModelSpec

SPEC = ModelSpec(
    vocab_size=16,
    hidden_size=8,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    ffn_size=8,
    tied_head=False,
    max_positions=256,
)
END = 15
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return Decoder(spec=SPEC)


@pytest.fixture(scope="module")
def params(decoder: Decoder) -> Params:
    """The next token depends on the one before alone, with fixed odds."""
    values = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), decoder.abstract())
    rng = np.random.default_rng(0)
    values["embed"]["table"] = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    values["norm"]["scale"] = jnp.ones(8, jnp.float32)
    values["head"]["kernel"] = jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)
    return values


def next_logits(params: Params, token: int) -> np.ndarray:
    x = np.asarray(params["embed"]["table"], np.float64)[token]
    return x / np.sqrt((x**2).mean() + SPEC.norm_eps) @ np.asarray(params["head"]["kernel"])


def greedy_chain(params: Params, token: int, steps: int) -> list[int]:
    chain = [token]
    for _ in range(steps):
        chain.append(int(next_logits(params, chain[-1]).argmax()))
    return chain[1:]


def sample(decoder: Decoder, params: Params, prompts: list[list[int]], **changes: Any) -> list:
    settings = {"max_new_tokens": 6, "end_id": END, "key": KEY} | changes
    return generate(decoder, params, prompts, **settings)


def test_greedy_follows_the_most_probable_token(decoder: Decoder, params: Params) -> None:
    prompts = [[1], [2, 3, 4], [5] * 9]
    expected = [greedy_chain(params, prompt[-1], 6) for prompt in prompts]
    expected = [c[: c.index(END)] if END in c else c for c in expected]
    assert sample(decoder, params, prompts) == expected
    assert sample(decoder, params, []) == []


def test_the_end_token_ends_a_continuation_and_is_left_out(
    decoder: Decoder, params: Params
) -> None:
    chain = greedy_chain(params, 1, 6)
    end = chain[2]
    assert sample(decoder, params, [[1]], end_id=end) == [chain[: chain.index(end)]]
    # One that is in the prompt does not.
    assert sample(decoder, params, [[end, 1]], end_id=end) == [chain[: chain.index(end)]]


def test_sampling_follows_key_temperature_and_top_k(decoder: Decoder, params: Params) -> None:
    one = sample(decoder, params, [[1], [2]], temperature=1.0)
    assert one == sample(decoder, params, [[1], [2]], temperature=1.0)
    assert one != sample(decoder, params, [[1], [2]], temperature=1.0, key=jax.random.key(4))
    # Equal prompts in one call get numbers of their own; other prompts make no difference.
    twice = sample(decoder, params, [[1], [1]], temperature=1.0)
    assert twice[0] == one[0] != twice[1]
    greedy = sample(decoder, params, [[1], [2]])
    assert sample(decoder, params, [[1], [2]], temperature=5.0, top_k=1) == greedy
    assert sample(decoder, params, [[1], [2]], temperature=1e-4) == greedy


@pytest.mark.parametrize(("temperature", "top_k"), [(1.0, 0), (0.5, 0), (2.0, 3), (1.0, 999)])
def test_sampled_frequencies_are_the_softmax(
    decoder: Decoder, params: Params, temperature: float, top_k: int
) -> None:
    rows = 4096
    drawn = sample(
        decoder, params, [[7]] * rows, max_new_tokens=1, temperature=temperature, top_k=top_k
    )
    counts = np.bincount([tokens[0] if tokens else END for tokens in drawn], minlength=16)
    logits = next_logits(params, 7)
    if 0 < top_k < 16:
        logits[np.argsort(logits)[:-top_k]] = -np.inf
    odds = np.exp((logits - logits.max()) / temperature)
    odds /= odds.sum()
    assert not counts[odds == 0].any()
    # Four standard deviations of a binomial count; the key is fixed.
    assert (np.abs(counts - rows * odds) <= 4 * np.sqrt(rows * odds * (1 - odds)) + 1e-9).all()


@pytest.mark.parametrize(
    ("prompts", "changes", "said"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [16]], {}, "prompt 1 has a token id outside the model's vocabulary of 16"),
        ([[-1]], {}, "outside the model's vocabulary"),
        ([[1] * 252], {}, "more than the model's 256 positions"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
        ([[1]], {"temperature": -1.0}, "temperature = -1.0"),
        ([[1]], {"temperature": float("nan")}, "temperature = nan"),
        ([[1]], {"top_k": -1}, "top_k = -1"),
    ],
)
def test_wrong_arguments_are_refused(
    decoder: Decoder, params: Params, prompts: list, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        sample(decoder, params, prompts, **changes)


def test_all_positions_can_be_used(decoder: Decoder, params: Params) -> None:
    small = dataclasses.replace(decoder, spec=dataclasses.replace(SPEC, max_positions=10))
    assert len(sample(small, params, [[1] * 4], end_id=-1)[0]) == 6


@pytest.mark.torch
def test_greedy_equals_transformers(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import torch_llama

    model = torch_llama.random_llama(tmp_path, **torch_llama.VARIANTS["wide_heads"])
    decoder, values = Decoder(spec=hf.read_spec(tmp_path)), hf.load(tmp_path)
    prompts = [[5, 9, 2], [60], list(range(20))]
    ours = generate(decoder, values, prompts, max_new_tokens=24, end_id=63, key=KEY)
    for prompt, new in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            eos_token_id=63, pad_token_id=63,
        )  # fmt: skip
        theirs = out[0, len(prompt) :].tolist()
        assert new == (theirs[: theirs.index(63)] if 63 in theirs else theirs)
