"""DoReMi's proxy run: algorithm 1 in float64, weights that travel as an argument, and resuming."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from ddk_jax.losses.chunked import ChunkPlan
from ddk_jax.losses.objective import make_term
from ddk_jax.losses.targets import Head
from ddk_jax.mixture.baselines import DoReMi
from ddk_jax.models.collect import NOTHING, Collect, Collected
from ddk_jax.parallel.mesh import make_mesh, replicated
from ddk_jax.training.loop import train
from ddk_jax.training.metrics import read_metrics
from ddk_jax.training.micro import Frozen, MicroLoss, Teachers
from ddk_jax.training.state import initial_state, place_batch
from ddk_jax.training.steering import Steering
from ddk_jax.training.step import make_train_step

R, T, V, D = 6, 7, 5, 4
RATE, ETA, UNIFORM = 0.5, 1.0, 1e-2
TERMS = ("cross_entropy", "clipped_excess")


class Bigram:
    """Logits that depend on the last token alone: a table, and a head that passes it on."""

    def apply(
        self,
        params: Any,
        tokens: jax.Array,
        segment_ids: jax.Array,
        positions: jax.Array,
        collect: Collect = NOTHING,
    ) -> tuple[jax.Array, Collected]:
        none = jnp.zeros((0, *tokens.shape, 1))
        return params["table"][tokens], Collected(none, *(none[..., None],) * 3)

    def final_norm(self, params: Any, x_BTE: jax.Array) -> jax.Array:
        return x_BTE

    def head(self, params: Any) -> Head:
        return Head(jnp.eye(V, dtype=jnp.float32))


def rows(seed: int) -> tuple[np.ndarray, ...]:
    """Rows of one segment with uneven padding; batches of an odd seed lack domain 2."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (R, T + 1)).astype(np.int32)
    text = np.arange(T + 1)[None] < rng.integers(2, T + 2, R)[:, None]
    role = text.astype(np.int32)
    domain = np.array([0, 1, 1, 3, 3, 2 if seed % 2 == 0 else 0], np.int32)
    return tokens, role, role, domain


def nats(table: np.ndarray, token: int) -> np.ndarray:
    """-log softmax of a row of the table."""
    z = table[token]
    return np.log(np.sum(np.exp(z - z.max()))) + z.max() - z


def algorithm_1(
    start: np.ndarray, reference: np.ndarray, batches: list[tuple[np.ndarray, ...]]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The parameters after all steps, and the weights after each; gradient descent in float64.

    As in the paper, but that a step's gradient has the weights that follow from the batch before.
    """
    theta, alpha, history = start.astype(np.float64), np.full(D, 1 / D), []
    for tokens, role, _, domain in batches:
        excess, gradient = np.full(D, math.nan), np.zeros_like(theta)
        for d in range(D):
            pairs = [
                (tokens[r, t], tokens[r, t + 1])
                for r in np.flatnonzero(domain == d)
                for t in range(T)
                if role[r, t + 1]
            ]
            if not pairs:
                continue
            over = [nats(theta, x)[y] - nats(reference.astype(np.float64), x)[y] for x, y in pairs]
            excess[d] = np.mean(np.maximum(over, 0))
            for x, y in pairs:
                q = np.exp(-nats(theta, x)) - np.eye(V)[y]
                gradient[x] += alpha[d] * q / len(pairs)
        theta = theta - RATE * gradient
        seen = ~np.isnan(excess)  # a domain without tokens keeps its weight
        share = alpha[seen].sum()
        grown = alpha[seen] * np.exp(ETA * excess[seen])
        smooth = (1 - UNIFORM) * grown / grown.sum() + UNIFORM / seen.sum()
        alpha = alpha.copy()
        alpha[seen] = share * smooth
        history.append(alpha)
    return theta, history


def test_a_proxy_run_is_algorithm_1() -> None:
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    rng = np.random.default_rng(0)
    start, reference = (rng.normal(size=(V, V)).astype(np.float32) for _ in range(2))
    model, whole = Bigram(), replicated(mesh)
    loss = MicroLoss(
        student=model,
        teachers=Teachers((model,), np.ones((D, 1))),
        objective=tuple(make_term(name) for name in TERMS),
        plan=ChunkPlan(tokens=8),
        mesh=mesh,
    )
    optimizer = optax.sgd(RATE)
    state = initial_state({"table": jnp.asarray(start)}, {}, optimizer)
    shardings = jax.tree.map(lambda _: whole, state)
    step: Any = make_train_step(
        loss, optimizer, mesh, num_domains=D, seed=0, state_shardings=shardings
    )
    steering = Steering(
        DoReMi(rate=ETA, uniform=UNIFORM),
        np.full(D, 1 / D),
        domains=list("abcd"),
        terms=TERMS,
        teacher_nats=None,
        rows_per_step=R,
        rows_per_interval=R,
    )
    state = jax.device_put(state, shardings)
    frozen = Frozen((jax.device_put({"table": reference}, whole),))
    batches = [rows(seed) for seed in range(6)]
    found: list[Any] = []
    for batch in batches:
        weights = steering.loss_weights
        assert weights is not None
        weighed = frozen._replace(domain_weights=jax.device_put(weights.astype(np.float32), whole))
        # Cut into micro-batches, which hold a part of a domain's rows each.
        state, sums = step(state, weighed, place_batch(mesh, 2, *batch))
        steering.count(jax.device_get(sums))
        found.append(steering.loss_weights)
    expected, history = algorithm_1(start, reference, batches)
    np.testing.assert_allclose(state.params["student"]["table"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found, history, rtol=1e-5)
    np.testing.assert_allclose(steering.average, np.mean(history, axis=0), rtol=1e-5)
    assert np.ptp(history[-1]) > 0.1  # the weights have moved
    assert step._cache_size() == 1
    # What is drawn stays what it was.
    np.testing.assert_array_equal(steering.weights, np.full(D, 1 / D))


def test_equal_weights_are_a_mean_over_domains_and_none_a_mean_over_tokens() -> None:
    tokens, role, _, domain = rows(0)
    mask = role[:, 1:].sum(axis=1)
    counts = np.array([mask[domain == d].sum() for d in range(D)])
    assert len(set(counts.tolist())) > 1
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    table = np.random.default_rng(1).normal(size=(V, V)).astype(np.float32)
    loss = MicroLoss(
        student=Bigram(),
        teachers=None,
        objective=(make_term("cross_entropy"),),
        plan=ChunkPlan(tokens=8),
        mesh=mesh,
    )
    state = initial_state({"table": jnp.asarray(table)}, {}, optax.sgd(RATE))
    shardings = jax.tree.map(lambda _: replicated(mesh), state)
    step = make_train_step(
        loss, optax.sgd(RATE), mesh, num_domains=D, seed=0, state_shardings=shardings
    )
    placed = place_batch(mesh, R, tokens, role, role, domain)
    for weights, by_token in ((None, True), (np.full(D, 1 / D, np.float32), False)):
        _, sums = step(
            jax.device_put(state, shardings, may_alias=False),
            Frozen(domain_weights=None if weights is None else jnp.asarray(weights)),
            placed,
        )
        total, count = sums.term_total[0], sums.term_count[0]
        mean = total.sum() / count.sum() if by_token else np.mean(total / count)
        np.testing.assert_allclose(sums.loss, mean, rtol=1e-6)
        np.testing.assert_array_equal(count, counts)


# --- in the loop

PROXY = {
    "mixture": {"controller": "doremi", "interval_steps": tiny.INTERVAL},
    "objective.terms": [{"loss": name} for name in TERMS],
}


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tiny.use_devices(monkeypatch, 1)
    with tiny.quick_programs(monkeypatch):
        yield


@pytest.mark.slow
def test_a_proxy_run_weighs_the_loss_and_resumes(
    tiny_root: Path, tmp_path: Path, quick: None
) -> None:
    whole = tiny.config(tiny_root, tmp_path / "whole", **PROXY)
    summary = train(whole)
    lines = [x for x in read_metrics(tmp_path / "whole/metrics.jsonl") if x["event"] == "mixture"]
    third = [1 / 3] * 3
    for line in lines:  # rows are drawn equally, the loss is not weighed so
        np.testing.assert_allclose(line["weights"], third)
    assert lines[0]["loss_weights"] == pytest.approx(third)
    assert np.ptp(lines[-1]["loss_weights"]) > 1e-3
    assert summary.average_weights != pytest.approx(third, abs=1e-4)

    parts = tiny.config(tiny_root, tmp_path / "parts", **PROXY, **{"train.max_intervals": 1})
    assert train(parts).steps == tiny.INTERVAL
    train(tiny.config(tiny_root, tmp_path / "parts", **PROXY))
    assert tiny.outcome(whole)["arrays"] == tiny.outcome(parts)["arrays"]
    averages = [
        json.loads((tmp_path / name / "summary.json").read_text())["average_weights"]
        for name in ("whole", "parts")
    ]
    assert averages[0] == averages[1]

    # The main run draws its rows by them.
    main = tiny.config(
        tiny_root,
        tmp_path / "main",
        **{"mixture": {"controller": "static", "prior": str(tmp_path / "whole")}},
    )
    assert train(main).weights == pytest.approx(summary.average_weights)
