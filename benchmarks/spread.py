"""Median and quartiles of what was measured round after round."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)

    def show(self, unit: str = "", digits: int = 2) -> str:
        """The median, and in brackets the quartiles."""
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f} to {self.high:.{digits}f})"


def ratios(above: Sequence[float], below: Sequence[float]) -> Spread:
    """Of the ratios of each round."""
    return Spread.of([a / b for a, b in zip(above, below, strict=True)])
