"""How things are timed: all contenders of one measurement in turn, in one process, round after round.

The machine may be shared. What slows it down for a while slows all contenders of a round, so a ratio is taken within
each round, and the median and the quartiles of these ratios are what is reported. Where other programs hold the cores
all the time, long steps are interrupted more often than short ones: there only a thread's own time says anything.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from time import perf_counter
from typing import Any


class Clock:
    """What everything is timed with.

    Attributes:
        read: seconds: of the wall, or of this thread alone (``time.thread_time``), which serves one thread.
    """

    read: Callable[[], float] = perf_counter


Segments = list[float]
"""Seconds of one step: what comes before evaluation 0, what follows it, what follows evaluation 1, ..."""


def timed(action: Callable[[], Any]) -> Callable[[], Segments]:
    """All of ``action`` as one segment."""

    def run() -> Segments:
        start = Clock.read()
        action()
        return [Clock.read() - start]

    return run


class Interleaved:
    """Rounds in which every contender has its turn: a few untimed seconds' share, then steps timed one by one.

    Args:
        contenders: by name, what runs one step and returns its segments.
        block_seconds: how long the turn of one contender is to take; at least one step.

    Attributes:
        seconds: by name, of each round the median time of a step.
        segments: by name, of each round the median of each segment.
        steps: by name, how many steps a turn times.
    """

    def __init__(self, contenders: Mapping[str, Callable[[], Segments]], block_seconds: float) -> None:
        self.contenders = dict(contenders)
        self.seconds: dict[str, list[float]] = {name: [] for name in contenders}
        self.segments: dict[str, list[Segments]] = {name: [] for name in contenders}
        self.steps = {name: self._steps(run, block_seconds) for name, run in self.contenders.items()}
        self.order = list(self.contenders)

    def _steps(self, run: Callable[[], Segments], block_seconds: float) -> int:
        run()  # allocates, compiles
        seconds = sum(run())
        if seconds < block_seconds:
            seconds = min(seconds, *(sum(run()) for _ in range(3)))
        return max(1, min(300, int(block_seconds / seconds)))

    def round(self) -> None:
        """One turn each, every round beginning with another contender."""
        for name in self.order:
            run, steps = self.contenders[name], self.steps[name]
            gc.collect()
            gc.disable()
            try:
                for _ in range(steps // 5 + (steps > 1)):
                    run()  # what the others left in the caches is not this one's
                times = [run() for _ in range(steps)]
            finally:
                gc.enable()
            self.seconds[name].append(statistics.median(map(sum, times)))
            self.segments[name].append([statistics.median(column) for column in zip(*times, strict=True)])
        self.order.append(self.order.pop(0))


def exponent(sizes: Iterable[float], seconds: Iterable[float]) -> float:
    """The b of seconds = a * size^b, by least squares between the logarithms."""
    slope, _ = statistics.linear_regression([math.log(n) for n in sizes], [math.log(s) for s in seconds])
    return slope
