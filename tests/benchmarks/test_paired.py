"""Paired differences: intervals as a table of Student's t has them, and what they say."""

import math

import pytest

from benchmarks.paired import FAILS, HOLDS, OPEN, Interval, differences


def test_the_interval_is_students():
    """Five values: t(0.975, 4) = 2.776, standard deviation sqrt(2.5), so 2.776 * sqrt(2.5 / 5) = 1.963 on each side."""
    interval = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3
    assert (interval.low, interval.high) == pytest.approx((3 - 1.9632, 3 + 1.9632), abs=1e-4)
    assert interval.show(100, 0, sign=True) == "+300 (+104 to +496)"


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.01, 0.02, 0.03), OPEN),  # of one sign, but t(0.975, 2) = 4.3
        ((0.02, 0.021, 0.022), HOLDS),
        ((-0.02, -0.021, -0.022), FAILS),
        ((0.01, 0.02, -0.01, 0.01, 0.02), OPEN),
        ((0.0, 0.0, 0.0), OPEN),
        ((0.5,), OPEN),
        ((0.01, math.nan, 0.01), OPEN),
    ],
)
def test_verdict(values, verdict):
    assert Interval.of(values).verdict == verdict


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ((0.001, -0.001, 0.0), HOLDS),
        ((0.02, 0.021, 0.022), FAILS),
        ((-0.02, -0.021, -0.022), FAILS),
        ((0.0, 0.012, 0.0), OPEN),
        ((0.001,), OPEN),
        ((0.0, math.nan), OPEN),
    ],
)
def test_closeness(values, verdict):
    assert Interval.of(values).within(0.01) == verdict


def test_differences_are_of_the_same_seed():
    assert differences((3.0, 5.0), (1.0, 4.0)) == (2.0, 1.0)
    with pytest.raises(ValueError, match="shorter"):
        differences((1.0, 2.0), (1.0,))
