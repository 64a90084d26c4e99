"""Continuations: what is chosen, when it ends, on one device and on many."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_reference import randomised

from ddk_jax.errors import UserError
from ddk_jax.models import generate as module
from ddk_jax.models import hf
from ddk_jax.models.decoder import Decoder, Params
from ddk_jax.models.generate import BUCKET_TOKENS, Continuations, generate
from ddk_jax.models.sampling import Sampling
from ddk_jax.models.spec import ModelSpec
from ddk_jax.parallel.mesh import make_mesh, param_shardings

try:
    import torch_models
    from torch_models import VARIANTS
except pytest.skip.Exception:  # without torch, what needs it is left out
    VARIANTS = {}

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


def continued(
    decoder: Decoder, params: Params, prompts: list[list[int]], **changes: Any
) -> Continuations:
    key = changes.pop("key", KEY)
    vocab_size = changes.pop("vocab_size", 0)
    settings = {"max_new_tokens": 6, "temperature": 0.0, "stop": (END,)} | changes
    return generate(decoder, params, prompts, Sampling(**settings), key=key, vocab_size=vocab_size)


def new_tokens(decoder: Decoder, params: Params, prompts: list[list[int]], **changes: Any) -> list:
    return continued(decoder, params, prompts, **changes).lists(changes.get("stop", (END,)))


# All batches have two prompts, so that the tests share programs.
@pytest.mark.slow
def test_greedy_follows_the_most_probable_token(decoder: Decoder, params: Params) -> None:
    for prompts in ([[1], [2, 3, 4]], [[5] * 9, [6]]):
        expected = [greedy_chain(params, prompt[-1], 6) for prompt in prompts]
        expected = [c[: c.index(END)] if END in c else c for c in expected]
        assert new_tokens(decoder, params, prompts) == expected
    assert new_tokens(decoder, params, []) == []


def test_any_stop_token_ends_a_continuation(decoder: Decoder, params: Params) -> None:
    chain = greedy_chain(params, 1, 6)
    end = chain[2]
    cut = chain[: chain.index(end)]
    other = next(token for token in range(16) if token not in chain)
    # One that is in the prompt does not.
    prompts = [[1], [end, 1]]
    assert new_tokens(decoder, params, prompts, stop=(end,)) == [cut, cut]
    assert new_tokens(decoder, params, prompts, stop=(other, end)) == [cut, cut]
    # The stop token counts as generated; behind it there is nothing.
    found = continued(decoder, params, prompts, stop=(end,))
    length = len(cut) + 1
    assert found.tokens.shape == (2, BUCKET_TOKENS)
    np.testing.assert_array_equal(found.tokens[0, :length], [*cut, end])
    np.testing.assert_array_equal(found.mask[0], np.arange(BUCKET_TOKENS) < length)
    for values in found:
        assert not np.asarray(values)[0, length:].any()


def test_stop_tokens_wait_for_the_least_number_of_tokens(decoder: Decoder, params: Params) -> None:
    end = greedy_chain(params, 1, 1)[0]
    assert new_tokens(decoder, params, [[1], [1]], stop=(end,)) == [[], []]
    found = continued(decoder, params, [[1], [1]], stop=(end,), min_new_tokens=4)
    assert 4 <= int(found.mask[0].sum()) <= 6 and end not in np.asarray(found.tokens)[0, :4]


def test_log_probabilities_are_those_of_the_model(decoder: Decoder, params: Params) -> None:
    found = continued(decoder, params, [[1], [2, 3]], temperature=0.7, top_k=3, stop=())
    for first, tokens, said in zip((1, 3), found.tokens, found.log_probs, strict=True):
        before = first
        for token, log_prob in zip(tokens.tolist()[:6], said.tolist(), strict=False):
            logits = next_logits(params, before)
            expected = logits[token] - np.log(np.exp(logits).sum())
            assert log_prob == pytest.approx(expected, abs=1e-5)
            before = token
    assert (np.asarray(found.sampling_log_probs) != np.asarray(found.log_probs))[:, :6].all()


@pytest.mark.slow
def test_sampling_follows_the_key_and_no_other_prompt(decoder: Decoder, params: Params) -> None:
    free = {"temperature": 1.0}
    one = new_tokens(decoder, params, [[1], [2]], **free)
    assert one == new_tokens(decoder, params, [[1], [2]], **free)
    assert one != new_tokens(decoder, params, [[1], [2]], **free, key=jax.random.key(4))
    # Equal prompts in one call get numbers of their own; other prompts make no difference.
    twice = new_tokens(decoder, params, [[1], [1]], **free)
    assert twice[0] == one[0] != twice[1]
    longer = new_tokens(decoder, params, [[1], [4] * 70, [3]], **free)
    assert longer[0] == one[0]


@pytest.mark.slow
def test_the_narrowest_distributions_are_greedy(decoder: Decoder, params: Params) -> None:
    prompts = [[1], [2]]
    greedy = new_tokens(decoder, params, prompts)
    assert new_tokens(decoder, params, prompts, temperature=1e-4) == greedy
    assert new_tokens(decoder, params, prompts, temperature=1.0, top_p=1e-6) == greedy


def test_padding_of_the_vocabulary_is_never_chosen(decoder: Decoder, params: Params) -> None:
    found = continued(
        decoder, params, [[1], [2]], temperature=9.0, vocab_size=4, stop=(), max_new_tokens=64
    )
    assert set(np.asarray(found.tokens).flat) == set(range(4))
    # The log-probabilities are among the tokens, too.
    assert np.exp(np.asarray(found.log_probs)).mean() > 0.1


def test_batches_of_like_lengths_share_their_programs(decoder: Decoder, params: Params) -> None:
    continued(decoder, params, [[1], [2, 3]], temperature=1.0, top_k=3, stop=(1, 2))
    programs = module.prefill._cache_size(), module.decode._cache_size()
    for prompts, changes in (
        ([[4] * 64, [5]], {"temperature": 0.3, "stop": ()}),
        ([[4] * 20, [5]], {"temperature": 2.0, "max_new_tokens": 64, "stop": (1, 2)}),
        ([[4], [5]], {"temperature": 2.0, "min_new_tokens": 3, "stop": (0, 2, 3)}),
    ):
        continued(decoder, params, prompts, top_k=3, **changes)
    assert (module.prefill._cache_size(), module.decode._cache_size()) == programs


@pytest.mark.parametrize(
    ("prompts", "changes", "said"),
    [
        ([[]], {}, "prompt 0 is empty"),
        ([[1], [16]], {}, "prompt 1 has a token id outside the model's vocabulary of 16"),
        ([[9]], {"vocab_size": 9, "stop": ()}, "outside the model's vocabulary of 9"),
        ([[-1]], {}, "outside the model's vocabulary"),
        ([[1] * 252], {}, "more than the model's 256 positions"),
        ([[1]], {"stop": (16,)}, "stop tokens .16.: outside the model's vocabulary of 16"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens = 0"),
    ],
)
def test_wrong_arguments_are_refused(
    decoder: Decoder, params: Params, prompts: list, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        continued(decoder, params, prompts, **changes)


def test_all_positions_can_be_used(decoder: Decoder, params: Params) -> None:
    small = dataclasses.replace(decoder, spec=dataclasses.replace(SPEC, max_positions=10))
    assert len(new_tokens(small, params, [[1] * 4, [2]], stop=())[0]) == 6


WIDE = dataclasses.replace(
    SPEC, hidden_size=16, num_layers=3, num_heads=4, num_kv_heads=2, pattern=("local", "global"),
    window=5,
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("tensor", [2, 4])
def test_a_mesh_generates_what_one_device_does(tensor: int, devices: list[jax.Device]) -> None:
    decoder = Decoder(spec=WIDE)
    params = randomised(decoder)
    prompts = [[1, 2, 3], [4] * 7, [5]]
    settings = {"temperature": 1.0, "top_p": 0.9, "max_new_tokens": 12}
    alone = continued(decoder, params, prompts, **settings)
    on_mesh = make_mesh(-1, 2, tensor, devices=devices)
    places = param_shardings(on_mesh, decoder.logical_axes(), decoder.abstract())
    together = continued(decoder, jax.device_put(params, places), prompts, **settings)
    np.testing.assert_array_equal(together.tokens, alone.tokens)
    np.testing.assert_allclose(together.log_probs, alone.log_probs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_equals_transformers(name: str, tmp_path: Path) -> None:
    torch = torch_models.torch
    model = torch_models.random_model(tmp_path, VARIANTS[name])
    decoder, values = Decoder(spec=hf.read_spec(tmp_path)), hf.load(tmp_path)
    # One that is longer than every window and original length, all through its continuation.
    prompts = [[5, 9, 2], list(range(30))]
    if name in ("phi3_long", "llama_longrope"):
        prompts = prompts[1:]  # transformers changes the rotation in the middle of the other
    ours = new_tokens(decoder, values, prompts, max_new_tokens=24, stop=(63,))
    for prompt, new in zip(prompts, ours, strict=True):
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False,
            eos_token_id=63, pad_token_id=63,
        )  # fmt: skip
        theirs = out[0, len(prompt) :].tolist()
        assert new == (theirs[: theirs.index(63)] if 63 in theirs else theirs)
