"""How often domains are gone through: forecasts, and limits that a schedule keeps."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ddk_jax.data.epochs import shortages, within_limits
from ddk_jax.errors import DataError
from ddk_jax.mixture.schedule import RowSchedule


def test_a_domain_that_is_too_small_is_named_with_its_epochs() -> None:
    weights, sizes = np.asarray([0.5, 0.5, 0.0]), np.asarray([10, 1000, 1])
    [warning] = shortages(["a", "b", "c"], weights, sizes, 1000)
    assert warning == (
        "domain a: 10 rows are too few for 50.0% of 1,000: it will be gone through 50.0 times"
    )


def test_what_a_domain_may_not_have_goes_to_the_others() -> None:
    weights, sizes = np.asarray([0.5, 0.3, 0.2]), np.asarray([101, 10_000, 10_000])
    limits = np.asarray([1.0, 0.0, 0.0])
    drawn = np.zeros(3, np.int64)
    given_ = within_limits(weights, drawn, sizes, limits, 1000)
    np.testing.assert_allclose(given_, [0.1, 0.54, 0.36])
    np.testing.assert_array_equal(within_limits(weights, drawn, sizes, 0 * limits, 1000), weights)
    none = within_limits(weights, np.asarray([101, 0, 0]), sizes, limits, 1000)
    np.testing.assert_allclose(none, [0.0, 0.6, 0.4])
    with pytest.raises(DataError, match="max_epochs"):
        within_limits(np.asarray([1.0, 0.0, 0.0]), drawn, sizes, limits, 1000)


@given(st.data(), st.integers(1, 5), st.integers(1, 50))
def test_a_schedule_under_limits_passes_none(data: st.DataObject, size: int, interval: int) -> None:
    numbers = st.lists(st.integers(1, 20), min_size=size, max_size=size)
    sizes = np.asarray(data.draw(numbers)) * 10
    limits = np.asarray(
        data.draw(st.lists(st.sampled_from([0.0, 0.5, 2.0]), min_size=size, max_size=size))
    )
    schedule = None
    for step in range(6):
        weights = np.asarray(data.draw(numbers), np.float64)
        weights /= weights.sum()
        drawn = schedule.counts(step * interval) if schedule else np.zeros(size, np.int64)
        try:
            weights = within_limits(weights, np.asarray(drawn), sizes, limits, interval)
        except DataError:
            assume(step > 0)
            break
        assert weights.sum() == pytest.approx(1.0) and (weights >= 0).all()
        weights /= weights.sum()
        if schedule is None:
            schedule = RowSchedule(weights)
        else:
            schedule.extend(step * interval, weights)
        drawn = schedule.counts((step + 1) * interval)
        limited = limits > 0
        assert (drawn[limited] <= (limits * sizes)[limited]).all()
