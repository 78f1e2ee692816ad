"""Which gradients one outer step evaluates, in which order, and what each of them is used for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple


@dataclass(frozen=True)
class Evaluation:
    """One gradient evaluation of an outer step.

    Attributes:
        index: 0, 1, ... in the order of evaluation.
        inner_step: 1 to k: the inner step whose minibatch is to be used, where the minibatch is switched.
        descends: the base optimizer uses this gradient.
        ascends: the next ascent uses this gradient.
        gathers: this gradient is part of the mean that the descent uses.
        perturbed: whether the model's weights are perturbed; at evaluation 0 they are the slow weights.
        first, second, last, odd: of an evaluation that descends, whether it is number 1, 2, the last, an odd one of
            those in the step (as booleans: an int that takes several values in compiled code becomes a symbol there).
    """

    index: int
    inner_step: int
    descends: bool
    ascends: bool
    gathers: bool
    perturbed: bool
    first: bool
    second: bool
    last: bool
    odd: bool


class StepPlan(NamedTuple):
    """The evaluations of an outer step in their order; how often the base optimizer descends in it, and whether with
    the mean of several gradients.
    """

    evaluations: tuple[Evaluation, ...]
    descents: int
    averages: bool


@lru_cache
def lookbehind(k: int, reuse_gradient: bool) -> StepPlan:
    """k ascents, each followed by a descent. In the 2k form each inner step evaluates its gradient for the ascent again
    (Mordido et al. 2024, algorithm 1).
    """
    uses = [(1, False, True)]
    for i in range(1, k + 1):
        uses.append((i, True, reuse_gradient and i < k))
        if not reuse_gradient and i < k:
            uses.append((i + 1, False, True))
    return _planned(uses)


@lru_cache
def multistep(k: int, average: bool) -> StepPlan:
    """k ascents, then a single descent with the last gradient, or with the mean of those behind (Kim et al. 2023)."""
    return _planned([(1, False, True), *((i, False, True) for i in range(1, k)), (k, True, False)], average)


@lru_cache
def with_mean(evaluation: Evaluation) -> Evaluation:
    """The descent of an evaluation that gathers, with the mean instead: its norm has a place of its own."""
    return replace(evaluation, index=evaluation.index + 1, gathers=False)


def _planned(uses: Sequence[tuple[int, bool, bool]], averages: bool = False) -> StepPlan:
    """From the inner step of each evaluation, whether it descends and whether it ascends."""
    descents = sum(descends for _, descends, _ in uses)
    number, found = 0, []
    for index, (inner_step, descends, ascends) in enumerate(uses):
        number += descends
        found.append(
            Evaluation(
                *(index, inner_step, descends, ascends, averages and index > 0),
                perturbed=index > 0,
                first=descends and number == 1,
                second=descends and number == 2,
                last=descends and number == descents,
                odd=descends and number % 2 == 1,
            )
        )
    return StepPlan(tuple(found), descents, averages)
