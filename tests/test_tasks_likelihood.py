"""Log-probabilities: equal to a float64 reference, however requests are cut, padded and batched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh

from ddk_jax.data.sources import MultipleChoice
from ddk_jax.data.tokenize import Tokenizer
from ddk_jax.losses.targets import Head
from ddk_jax.models import hf
from ddk_jax.models.attention import causal_segment_mask
from ddk_jax.models.decoder import Decoder
from ddk_jax.parallel.mesh import make_mesh
from ddk_jax.places import resolve_path
from ddk_jax.tasks import likelihood
from ddk_jax.tasks.likelihood import Likelihood, likelihoods
from ddk_jax.tasks.requests import Request, choice_requests

VOCABULARY = 19
SOFTCAP = 3.0


@dataclass(frozen=True)
class Bag:
    """A model whose state is a sum over all tokens that it sees, the nearer the heavier."""

    def apply(self, params: Any, tokens: Any, segment_ids: Any, positions: Any) -> tuple[Any, None]:
        distance = positions[:, :, None] - positions[:, None, :]
        weight = 1 / (1 + jnp.abs(distance).astype(jnp.float32))
        weight = jnp.where(causal_segment_mask(segment_ids), weight, 0.0)
        return weight @ params["table"][tokens], None

    def head(self, params: Any) -> Head:
        return Head(params["head"], softcap=jnp.float32(SOFTCAP))


def bag_params(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {"table": (VOCABULARY, 6), "head": (6, VOCABULARY)}
    return {name: random.standard_normal(s).astype(np.float32) for name, s in shapes.items()}


def expected(request: Request, max_tokens: int) -> tuple[np.ndarray, np.ndarray, bool]:
    """The definition, token by token, in float64."""
    table, head = (bag_params()[name].astype(np.float64) for name in ("table", "head"))
    log_probs, greedy, truncated = [], [], False
    tokens, size = request.tokens, request.tokens.size
    for i in range(request.start, size):
        # The window that predicts token i; it begins with as much context as it can hold.
        window = (i - request.start) // max_tokens
        end = min(request.start + (window + 1) * max_tokens, size)
        begin = max(0, end - 1 - max_tokens)
        truncated |= window == 0 and begin > 0
        seen = tokens[begin:i]
        weight = 1 / np.arange(seen.size, 0, -1)
        logits = SOFTCAP * np.tanh((weight @ table[seen]) @ head / SOFTCAP)
        normalised = logits - logits.max()
        normalised -= np.log(np.sum(np.exp(normalised)))
        log_probs.append(normalised[tokens[i]])
        greedy.append(np.argmax(logits) == tokens[i])
    return np.array(log_probs), np.array(greedy, bool), truncated


def score(
    requests: list[Request], *, max_tokens: int = 40, mesh: Mesh | None = None, batch: int = 64
) -> list[Likelihood]:
    mesh = mesh or make_mesh(devices=jax.devices()[:1])
    params = jax.tree.map(jnp.asarray, bag_params())
    return likelihoods(
        Bag(), params, requests, mesh=mesh, max_tokens=max_tokens, batch_tokens=batch
    )


def random_requests(count: int, longest: int, seed: int = 0) -> list[Request]:
    random = np.random.default_rng(seed)
    sizes = random.integers(2, longest, count)
    return [
        Request(random.integers(0, VOCABULARY, n).astype(np.int32), int(random.integers(1, n)))
        for n in sizes
    ]


@pytest.mark.slow
@pytest.mark.parametrize("max_tokens", [5, 70])
@settings(max_examples=15)
@given(data=st.data())
def test_every_token_is_predicted_once_from_what_fits_before_it(
    max_tokens: int, data: st.DataObject
) -> None:
    sizes = data.draw(st.lists(st.integers(2, 180), min_size=1, max_size=6))
    requests = [
        Request(
            np.random.default_rng(n).integers(0, VOCABULARY, n).astype(np.int32),
            data.draw(st.integers(1, n)),  # n: nothing to predict
        )
        for n in sizes
    ]
    for request, found in zip(requests, score(requests, max_tokens=max_tokens), strict=True):
        log_probs, greedy, truncated = expected(request, max_tokens)
        np.testing.assert_allclose(found.log_probs, log_probs, atol=1e-5)
        np.testing.assert_array_equal(found.greedy, greedy)
        assert found.truncated == truncated


@pytest.mark.slow
def test_nothing_depends_on_order_batches_or_devices(devices: list[jax.Device]) -> None:
    requests = random_requests(40, 25)
    reference = score(requests)
    shuffled = np.random.default_rng(1).permutation(len(requests))
    others = {
        "order": score([requests[i] for i in shuffled]),
        "batch": score(requests, batch=1),
        "large batch": score(requests, batch=1000),
        "data": score(requests, mesh=make_mesh(devices=devices)),
        "fsdp": score(requests, mesh=make_mesh(2, 4, devices=devices)),
    }
    others["order"] = [others["order"][i] for i in np.argsort(shuffled)]
    for name, found in others.items():
        for one, other in zip(reference, found, strict=True):
            np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-5, err_msg=name)
            np.testing.assert_array_equal(one.greedy, other.greedy, err_msg=name)
            assert one.truncated == other.truncated


def test_few_programs_serve_many_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()

    def watched(model: Any, mesh: Any, params: Any, *arrays: jax.Array) -> tuple[Any, Any]:
        tokens, _, labels = arrays
        shapes.add((tokens.shape, labels.shape))
        return np.zeros(labels.shape, np.float32), np.zeros(labels.shape, bool)

    monkeypatch.setattr(likelihood, "_score", watched)
    score(random_requests(500, 100), max_tokens=100, batch=100)
    assert shapes == {
        ((4, 24), (4, 24)),
        ((3, 32), (3, 32)),
        ((2, 48), (2, 48)),
        ((1, 64), (1, 64)),
        ((1, 96), (1, 64)),
        ((1, 96), (1, 96)),
        ((1, 100), (1, 64)),
        ((1, 100), (1, 100)),
    }


def test_no_requests_need_no_model() -> None:
    assert score([]) == []


@pytest.mark.torch
@pytest.mark.slow
def test_log_probabilities_of_the_shipped_teacher_equal_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    directory = resolve_path("assets:teacher")
    tokenizer = Tokenizer(directory)
    questions = [
        MultipleChoice("The girl found a bug in her cereal therefore", ("she ate.", "no."), 1, ""),
        MultipleChoice("Sarah was a better surgeon than Maria so ", ("Sarah", "Maria"), 1, "did."),
        MultipleChoice("The pipe leaked. " * 60, ("It was old.", "It was bought new."), 0, ""),
        MultipleChoice("Briefly:", ("no", "at length " * 150), 0, ""),
    ]
    groups = choice_requests(tokenizer, questions)
    requests = [request for group in groups for request in group]
    spec = hf.read_spec(directory)
    mesh = make_mesh(devices=jax.devices()[:1])
    found = likelihoods(
        Decoder(spec=spec), hf.load(directory, spec=spec), requests, mesh=mesh, max_tokens=256
    )
    assert [one.truncated for one in found] == [False] * 4 + [True] * 2 + [False, True]

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    for request, ours in zip(requests[:7], found, strict=False):
        ids = torch.from_numpy(request.tokens.astype(np.int64))[None]
        with torch.no_grad():
            log_probs = reference(ids[:, :-1][:, -256:]).logits.log_softmax(-1)[0]
        labels = ids[0, request.start :]
        wanted = log_probs[-labels.numel() :].gather(1, labels[:, None])[:, 0].numpy()
        np.testing.assert_allclose(ours.log_probs, wanted, atol=1e-4)
        greedy = (log_probs[-labels.numel() :].argmax(-1) == labels).numpy()
        np.testing.assert_array_equal(ours.greedy, greedy)
