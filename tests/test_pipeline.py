"""The mixture pipeline: order, state, live weights, prefetch."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ddk_jax.data.packing import best_fit
from ddk_jax.data.pipeline import MixturePipeline, PipelineState
from ddk_jax.data.rows import DomainRows, HostBatch
from ddk_jax.data.shards import Shard

LENGTH = 4
SIZES = (60, 25, 90)
"""Rows of each domain. Few, so that they wrap around; a permutation of fewer takes much longer."""


def make_domains(sizes: tuple[int, ...] = SIZES) -> list[DomainRows]:
    """Domains whose token ids say domain and place: 1000 * domain + place."""
    domains = []
    for number, rows in enumerate(sizes):
        size = rows * LENGTH + 1
        shard = Shard(
            (1000 * number + np.arange(size)).astype(np.uint16),
            np.asarray([0, size], np.int64),
            np.zeros(0, np.int64),
        )
        domains.append(DomainRows([shard], name=f"d{number}", domain=number, length=LENGTH))
    return domains


def pipeline(weights: list[float], prefetch: int = 2, **options: int) -> MixturePipeline:
    options = {"rows_per_step": 4, "seed": 0, **options}
    return MixturePipeline(make_domains(), weights, prefetch=prefetch, **options)


def take(source: Iterator[tuple[HostBatch, PipelineState]], count: int) -> np.ndarray:
    """(domain, row of the domain) of the next rows: int [count * rows_per_step, 2]."""
    rows = []
    for _ in range(count):
        batch, _ = next(source)
        np.testing.assert_array_equal(batch.tokens[:, 0] // 1000, batch.domain)
        rows.append(np.stack([batch.domain, batch.tokens[:, 0] % 1000 // LENGTH], axis=1))
    return np.concatenate(rows)


WEIGHTS = [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.9, 0.0, 0.1], [1 / 3, 1 / 3, 1 / 3]]


@st.composite
def plans(draw: st.DrawFn) -> list[tuple[int, list[float]]]:
    """Weights of step 0, and of later steps at which they change."""
    steps = sorted(draw(st.lists(st.integers(1, 19), max_size=4, unique=True)))
    return [(step, draw(st.sampled_from(WEIGHTS))) for step in [0, *steps]]


def run(plan: list[tuple[int, list[float]]], prefetch: int, early: int = 0) -> np.ndarray:
    """20 steps; each change is announced `early` steps before it."""
    changes = dict(plan[1:])
    with closing(pipeline(plan[0][1], prefetch)) as source:
        rows = []
        for step in range(20):
            for start in sorted(changes):
                if start - early <= step and start >= step:
                    source.set_weights(changes.pop(start), 4 * start)
            rows.append(take(source, 1))
    return np.concatenate(rows)


@settings(max_examples=10)
@given(plans(), st.integers(0, 3), st.integers(0, 3))
def test_order_depends_on_seed_log_and_row_only(
    plan: list[tuple[int, list[float]]], prefetch: int, early: int
) -> None:
    np.testing.assert_array_equal(run(plan, prefetch, early), run(plan, 0))


@settings(max_examples=10)
@given(plans(), st.integers(0, 3))
def test_mixture_is_the_commanded_one_at_every_row(
    plan: list[tuple[int, list[float]]], prefetch: int
) -> None:
    """Within 1.1 rows; and the weights count from the announced row on, prefetched or not."""
    domain = run(plan, prefetch)[:, 0]
    commanded = np.empty((80, 3))
    for step, weights in plan:
        commanded[4 * step :] = weights
    drawn = np.cumsum(np.eye(3)[domain], axis=0)
    assert np.abs(drawn - np.cumsum(commanded, axis=0)).max() <= 1.1
    assert not commanded[np.arange(80), domain].min() == 0


def documents_of(sizes: list[list[int]]) -> list[list[Shard]]:
    """Shards of documents of these sizes; a token says domain and place: 4000 * domain + place."""
    found = []
    for number, lengths in enumerate(sizes):
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        tokens = (4000 * number + np.arange(offsets[-1])).astype(np.uint16)
        middle = len(lengths) // 2
        cut = int(offsets[middle])
        found.append(
            [
                Shard(tokens[:cut], offsets[: middle + 1], np.zeros(0, np.int64)),
                Shard(tokens[cut:], offsets[middle:] - cut, np.zeros(0, np.int64)),
            ]
        )
    return found


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_mixture_of_any_domains_goes_through_every_document(data: st.DataObject) -> None:
    """Whatever the domains, weights, sizes, packing, prefetch and changes: nothing is lost."""
    lengths = st.lists(st.integers(2, 40), min_size=2, max_size=25)
    shards = documents_of(data.draw(st.lists(lengths, min_size=1, max_size=4)))
    length, rows_per_step = data.draw(st.integers(1, 24)), data.draw(st.integers(1, 7))
    packed = data.draw(st.booleans())
    domains = [
        DomainRows(
            each,
            name=f"d{number}",
            domain=number,
            length=length,
            packing=best_fit(each, length) if packed else None,
        )
        for number, each in enumerate(shards)
    ]
    weights = st.lists(st.integers(0, 5), min_size=len(shards), max_size=len(shards)).filter(any)
    first, second = (np.asarray(data.draw(weights), float) for _ in range(2))
    change, ahead = data.draw(st.integers(1, 8)), data.draw(st.integers(0, 3))

    def batches(prefetch: int, steps: int) -> list[HostBatch]:
        made = MixturePipeline(
            domains,
            first / first.sum(),
            rows_per_step=rows_per_step,
            seed=3,
            prefetch=prefetch,
        )
        with closing(made):
            found = []
            for step in range(steps):
                if step == change:
                    made.set_weights(second / second.sum(), step * rows_per_step)
                found.append(next(made)[0])
        return found

    steps = 12
    seen = batches(ahead, steps)
    for one, other in zip(seen, batches(0, steps), strict=True):
        for array, again in zip(one[:4], other[:4], strict=True):
            np.testing.assert_array_equal(array, again)
    row_domains = np.concatenate([batch.domain for batch in seen])
    commanded = np.empty((row_domains.size, len(shards)))
    commanded[: change * rows_per_step] = first / first.sum()
    commanded[change * rows_per_step :] = second / second.sum()
    drawn = np.cumsum(np.eye(len(shards))[row_domains], axis=0)
    # Two weights that know nothing of each other: see the bound in `docs/data.md`.
    assert np.abs(drawn - np.cumsum(commanded, axis=0)).max() <= 1.5
    for number, rows in enumerate(domains):
        every = [rows[i] for i in range(len(rows))]
        same = [row.segment_ids[1:] == row.segment_ids[:-1] for row in every]
        used = [row.role[1:] > 0 for row in every]
        predicted = sorted(
            token
            for row, one, two in zip(every, same, used, strict=True)
            for token in row.tokens[1:][one & two].tolist()
        )
        offsets = np.concatenate(
            [
                shards[number][0].offsets[:-1],
                shards[number][1].offsets + shards[number][0].tokens.size,
            ]
        )
        expected = np.delete(4000 * number + np.arange(offsets[-1]), offsets[:-1])
        assert predicted == expected.tolist()


def test_threads_leave_the_shared_random_generator_alone() -> None:
    """Neither the pipeline nor the checks of its types: hypothesis draws in another thread."""
    before = random.getstate()
    with closing(pipeline([0.5, 0.3, 0.2])) as source:
        source.shortages([0.5, 0.3, 0.2], 100)
        take(source, 4)
    assert random.getstate() == before


def test_each_epoch_is_another_permutation_whatever_the_weights() -> None:
    orders = []
    for weights in ([0.5, 0.3, 0.2], [0.2, 0.1, 0.7]):
        with closing(pipeline(weights, rows_per_step=40)) as source:
            rows = take(source, 24)
        orders.append([rows[rows[:, 0] == number, 1] for number in range(3)])
        for number, size in enumerate(SIZES):
            order = orders[-1][number]
            epochs = order[: order.size // size * size].reshape(-1, size)
            assert len(epochs) >= 2
            assert (np.sort(epochs, axis=1) == np.arange(size)).all()
            assert len(np.unique(epochs, axis=0)) == len(epochs)
    for one, other in zip(*orders, strict=True):
        shared = min(one.size, other.size)
        np.testing.assert_array_equal(one[:shared], other[:shared])


def test_another_seed_is_another_order_of_the_same_mixture() -> None:
    with closing(pipeline(WEIGHTS[0])) as one, closing(pipeline(WEIGHTS[0], seed=1)) as other:
        rows, others = take(one, 20), take(other, 20)
    np.testing.assert_array_equal(rows[:, 0], others[:, 0])
    assert (rows[:, 1] != others[:, 1]).any()


@pytest.mark.parametrize("prefetch", [0, 2])
def test_state_of_every_batch_resumes_exactly(prefetch: int) -> None:
    states, batches = [], []
    with closing(pipeline(WEIGHTS[0], prefetch)) as source:
        states.append(json.dumps(source.state))
        for step in range(24):
            if step in (7, 8, 15):
                source.set_weights(WEIGHTS[step % 4], 4 * step + 4)
                states[-1] = json.dumps(source.state)
            batch, state = next(source)
            batches.append(batch)
            states.append(json.dumps(state))
    for step, text in enumerate(states[:-1]):
        with closing(pipeline([1.0, 0.0, 0.0], 2 - prefetch)) as resumed:
            resumed.set_state(json.loads(text))
            assert json.dumps(resumed.state) == text
            for expected, after in zip(batches[step : step + 6], states[step + 1 :], strict=False):
                batch, state = next(resumed)
                for found, array in zip(batch, expected, strict=True):
                    np.testing.assert_array_equal(found, array)
                if len(json.loads(after)["schedule"]["log"]) > len(state["schedule"]["log"]):
                    break  # the first run was given new weights here
                assert json.dumps(state) == after


def test_weights_given_but_not_yet_in_force_are_part_of_the_state() -> None:
    with closing(pipeline(WEIGHTS[0])) as source, closing(pipeline(WEIGHTS[1])) as resumed:
        next(source)
        source.set_weights(WEIGHTS[2], 40)
        resumed.set_state(json.loads(json.dumps(source.state)))
        np.testing.assert_array_equal(take(resumed, 15), take(source, 15))


def test_epochs_count_what_was_delivered_not_what_was_prefetched() -> None:
    with closing(pipeline([0.25, 0.25, 0.5], 3)) as source:
        assert source.epochs().tolist() == [0, 0, 0]
        for _ in range(7):
            next(source)
        np.testing.assert_allclose(source.epochs(), [7 / 60, 7 / 25, 14 / 90])


def test_a_limit_of_epochs_holds_when_weights_are_kept_within_it() -> None:
    commanded, limits = np.asarray([0.2, 0.6, 0.2]), [0.0, 2.0, 0.0]
    with closing(pipeline(commanded.tolist())) as source:
        [warning] = source.shortages(commanded, 1000)
        assert "domain d1: 25 rows are too few for 60.0% of 1,000" in warning
        for step in range(32):
            if step % 4 == 0:
                kept = source.within_epochs(commanded, 4 * step, 16, limits)
                source.set_weights(kept, 4 * step)
            next(source)
        assert source.epochs()[1] <= 2.0
        assert source.epochs()[1] >= 1.8  # and it is not left unused
        np.testing.assert_allclose(kept, [0.5, 0.0, 0.5], atol=0.1)


def test_weights_must_start_at_a_batch_that_is_to_come() -> None:
    with closing(pipeline(WEIGHTS[0])) as source:
        for _ in range(3):
            next(source)
        for row in (8, 13, 14):
            with pytest.raises(ValueError, match="must be a multiple of 4 rows"):
                source.set_weights(WEIGHTS[1], row)
        source.set_weights(WEIGHTS[1], 12)


def test_a_foreign_state_is_refused() -> None:
    with closing(pipeline(WEIGHTS[0])) as source:
        next(source)
        good = source.state
        source.set_weights(WEIGHTS[1], 8)
        for bad, message in (
            ({}, "not the state of a pipeline"),
            ({**good, "seed": 1}, "seed"),
            ({**good, "domains": [["d0", 60]]}, "domains"),
            ({**good, "next_row": 6}, "row 6"),
            ({**good, "schedule": {}}, "row schedule"),
        ):
            with pytest.raises(ValueError, match=message):
                source.set_state(bad)
        assert source.state["next_row"] == 4


def test_bad_arguments_are_refused() -> None:
    for options in ({"rows_per_step": 0}, {"seed": -1}, {"prefetch": -1}):
        with pytest.raises(ValueError, match="must be at least"):
            pipeline(WEIGHTS[0], **options)
    with pytest.raises(ValueError, match="2 weights given for 3 domains"):
        pipeline([0.5, 0.5])
    with pytest.raises(ValueError, match="one row length"):
        MixturePipeline([], [1.0], rows_per_step=1, seed=0, prefetch=0)
