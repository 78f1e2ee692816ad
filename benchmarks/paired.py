"""Differences of two methods that ran with the same seeds: means, 95 % intervals, and what they say."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

HOLDS, FAILS, OPEN = "holds", "does not hold", "not resolved"


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Interval":
        """Student's t interval of the mean of independent values.

        Infinite for a single one, NaN where one of them is not finite.
        """
        mean = statistics.fmean(values)
        if not math.isfinite(mean):
            return cls(math.nan, math.nan, math.nan)
        if len(values) == 1:
            return cls(mean, -math.inf, math.inf)
        half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
        return cls(mean, mean - half, mean + half)

    @property
    def verdict(self) -> str:
        """Of the claim that the mean is above 0: it holds if the whole interval is, and fails if all of it is below."""
        return HOLDS if self.low > 0 else FAILS if self.high < 0 else OPEN

    def within(self, tolerance: float) -> str:
        """Of the claim that the mean is within `tolerance` of 0, tested with the same interval."""
        if -tolerance <= self.low and self.high <= tolerance:
            return HOLDS
        return FAILS if self.low > tolerance or self.high < -tolerance else OPEN

    def show(self, scale: float = 1.0, digits: int = 2, sign: bool = False) -> str:
        """`1.23 (0.50 to 1.96)`; with `sign` a plus where it is due."""
        form = f"{'+' * sign}.{digits}f"
        return f"{scale * self.mean:{form}} ({scale * self.low:{form}} to {scale * self.high:{form}})"


def differences(larger: Sequence[float], smaller: Sequence[float]) -> tuple[float, ...]:
    """Of each seed."""
    return tuple(x - y for x, y in zip(larger, smaller, strict=True))
