"""Nats per domain: sums in float64, and the cache of what never changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from ddk_jax.losses.sums import DomainSums
from ddk_jax.training.evaluate import DomainNats, cached, measure
from ddk_jax.training.state import Batch

KEY = {"teacher": "abc", "rows": 8, "dtype": ["float32", None], "shape": (2, 3)}
RESULT = DomainNats(np.array([1.5, 2.25, 1 / 3]), np.array([10.0, 20.0, 30.0]))


def measured(*results: tuple[list[float], list[float]]) -> DomainNats:
    """`measure` over batches for which the step returns these totals and counts."""
    arrays: list[Any] = [[np.asarray(x, np.float32) for x in result] for result in results]
    queue = [DomainSums(total, count) for total, count in arrays]
    empty = Batch(*[cast(Any, np.zeros(0, np.int32))] * 4)
    num_domains = len(results[0][0]) if results else 2
    return measure(lambda params, batch: queue.pop(0), None, [empty] * len(queue), num_domains)


def test_means_over_all_batches() -> None:
    found = measured(([8.0, 0.0, 3.0], [4, 0, 1]), ([0.0, 0.0, 9.0], [0, 0, 2]))
    np.testing.assert_array_equal(found.nats, [2.0, np.nan, 4.0])
    np.testing.assert_array_equal(found.tokens, [4, 0, 3])
    assert found.nats.dtype == found.tokens.dtype == np.float64


def test_no_batches_mean_no_measurement() -> None:
    found = measured()
    assert np.all(np.isnan(found.nats))
    np.testing.assert_array_equal(found.tokens, [0, 0])


def test_batches_are_added_in_float64() -> None:
    # In float32, 2^24 + 1 = 2^24: the small batches would be lost.
    found = measured(([2.0**24], [2.0**24]), *[([1.0], [1.0])] * 50)
    assert found.tokens[0] == 2**24 + 50
    assert found.nats[0] == 1.0


class Computation:
    """Counts its calls."""

    def __init__(self, result: DomainNats = RESULT) -> None:
        self.calls, self.result = 0, result

    def __call__(self) -> DomainNats:
        self.calls += 1
        return self.result


def same(found: DomainNats, expected: DomainNats) -> None:
    for got, want in zip(found, expected, strict=True):
        assert got.dtype == np.float64
        np.testing.assert_array_equal(got, want)


def test_a_second_call_reads_what_the_first_stored(tmp_path: Path) -> None:
    compute, directory = Computation(), tmp_path / "not" / "there"
    for _ in range(3):
        same(cached(directory, KEY, compute), RESULT)
    assert compute.calls == 1
    (stored,) = directory.iterdir()  # and no temporary file
    assert json.loads(stored.read_text())["nats"] == RESULT.nats.tolist()


@pytest.mark.parametrize(
    "change", [{"teacher": "abd"}, {"rows": 9}, {"dtype": ["bfloat16", None]}, {"new": 1}]
)
def test_another_key_is_another_result(tmp_path: Path, change: dict[str, Any]) -> None:
    cached(tmp_path, KEY, Computation())
    other = Computation(DomainNats(np.array([4.0]), np.array([2.0])))
    same(cached(tmp_path, {**KEY, **change}, other), other.result)
    assert other.calls == 1
    same(cached(tmp_path, KEY, other), RESULT)


def test_two_keys_with_one_digest_are_told_apart(tmp_path: Path) -> None:
    cached(tmp_path, KEY, Computation())
    (stored,) = tmp_path.iterdir()
    stored.write_text(stored.read_text().replace("abc", "xyz"))
    compute = Computation()
    cached(tmp_path, KEY, compute)
    assert compute.calls == 1


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b"{}",
        b'{"key": {}}',
        b"\xff\xfe",
        b'{"key": KEY, "nats": [1.0]}',
        b'{"key": KEY, "nats": ["x"], "tokens": [1.0]}',
        b'{"key": KEY, "nats": [[1.0], 2.0], "tokens": [1.0, 2.0]}',
    ],
)
def test_a_torn_or_foreign_file_is_measured_again(tmp_path: Path, content: bytes) -> None:
    cached(tmp_path, KEY, Computation())
    (stored,) = tmp_path.iterdir()
    stored.write_bytes(content.replace(b"KEY", json.dumps(KEY).encode()))
    compute = Computation()
    same(cached(tmp_path, KEY, compute), RESULT)
    same(cached(tmp_path, KEY, compute), RESULT)  # it was replaced by a good one
    assert compute.calls == 1


def test_a_truncated_file_is_measured_again(tmp_path: Path) -> None:
    cached(tmp_path, KEY, Computation())
    (stored,) = tmp_path.iterdir()
    whole = stored.read_bytes()
    for size in range(0, len(whole), 7):
        stored.write_bytes(whole[:size])
        compute = Computation()
        same(cached(tmp_path, KEY, compute), RESULT)
        assert compute.calls == 1


def test_what_was_not_measured_is_not_stored(tmp_path: Path) -> None:
    compute = Computation(DomainNats(np.array([1.0, np.nan]), np.array([3.0, 0.0])))
    for _ in range(2):
        same(cached(tmp_path, KEY, compute), compute.result)
    assert compute.calls == 2
    assert not list(tmp_path.iterdir())
