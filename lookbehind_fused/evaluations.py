"""Which gradients one outer step evaluates, in which order, and what each of them is used for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

MEAN = "mean "
"""What the names of means begin with, which are the names of their buffers."""


@dataclass(frozen=True)
class Evaluation:
    """One gradient evaluation of an outer step.

    Attributes:
        index: 0, 1, ... in the order of evaluation. With ``ascent_gradient="previous"`` the first is 1.
        inner_step: 1 to k: the inner step whose minibatch is to be used, where the minibatch is switched.
        descends: the base optimizer uses this gradient.
        ascends: the next ascent uses this gradient.
        perturbed: whether the model's weights are perturbed; at evaluation 0 they are the slow weights.
        first, second, last, odd: of an evaluation that descends, whether it is number 1, 2, the last, an odd one of
            those in the step (as booleans: an int that takes several values in compiled code becomes a symbol there).
        gathers: this gradient is part of a mean that a descent uses.
        mean: name of that mean, or of the mean that takes this gradient's place.
        microbatch, microbatches: which part of the minibatch is to be evaluated, from 0, and how many there are.
        returns: after it the weights are the slow ones again, for the next microbatch.
        closes: the outer step is complete after it.
        then: the descents that follow it, each with a mean in the gradient's place.
    """

    index: int
    inner_step: int
    descends: bool
    ascends: bool
    perturbed: bool
    first: bool = False
    second: bool = False
    last: bool = False
    odd: bool = False
    gathers: bool = False
    mean: str = ""
    microbatch: int = 0
    microbatches: int = 1
    returns: bool = False
    closes: bool = False
    then: tuple[Evaluation, ...] = ()

    def part(self, batch: Tensor) -> Tensor:
        """This evaluation's microbatch: of n examples along the first dimension of ``batch`` the ``microbatch``-th
        n / ``microbatches``.

        Raises:
            ValueError: the number of microbatches does not divide n.
        """
        size, rest = divmod(len(batch), self.microbatches)
        if rest:
            raise ValueError(
                f"microbatches: expected a number that divides the batch, got {self.microbatches} for a batch of "
                f"{len(batch)}"
            )
        return batch[self.microbatch * size : (self.microbatch + 1) * size]


class StepPlan(NamedTuple):
    """The evaluations of an outer step in their order; how often the base optimizer descends in it; the names of the
    means that it descends with, and of how many gradients each is the mean.
    """

    evaluations: tuple[Evaluation, ...]
    descents: int
    means: tuple[str, ...] = ()
    gathered: int = 1

    @property
    def norms(self) -> int:
        """How many gradients and means have a norm."""
        return len(self.evaluations) + len(self.means)


class Use(NamedTuple):
    """What an evaluation is used for: the inner step that it belongs to, whether a descent uses its gradient, and
    whether the next ascent does.
    """

    inner_step: int
    descends: bool
    ascends: bool


@lru_cache
def lookbehind(k: int, reuse_gradient: bool, microbatches: int = 1) -> StepPlan:
    """k ascents, each followed by a descent (Mordido et al. 2024, algorithm 1). In the 2k form each inner step
    evaluates its gradient for the ascent again.

    Several microbatches (m-sharpness: Foret et al. 2021, section 3) each ascend from the slow weights by gradients of
    their own; the i-th descent uses the mean of their i-th gradients. The ascent does not depend on the descents, which
    therefore wait for the last microbatch.
    """
    uses = [Use(1, descends=False, ascends=True)]
    for i in range(1, k + 1):
        uses.append(Use(i, descends=True, ascends=reuse_gradient and i < k))
        if not reuse_gradient and i < k:
            uses.append(Use(i + 1, descends=False, ascends=True))
    return plan(uses, range(k), microbatches) if microbatches > 1 else plan(uses)


@lru_cache
def multistep(k: int, average: bool) -> StepPlan:
    """k ascents, then a single descent with the last gradient, or with the mean of those behind (Kim et al. 2023)."""
    uses = [Use(1, descends=False, ascends=True)]
    uses += [Use(i, descends=average or i == k, ascends=i < k) for i in range(1, k + 1)]
    return plan(uses, [0] * k) if average else plan(uses)


def plan(uses: Sequence[Use], mean_of: Sequence[int] | None = None, microbatches: int = 1) -> StepPlan:
    """The plan of a method, from what each of its evaluations is used for.

    Args:
        uses: in the order of evaluation. Evaluation 0 is at the slow weights; each other one is where the ascents
            before it have led.
        mean_of: None lets every descent follow its evaluation at once. Or for each use by a descent the number, from
            0, of the mean that it is part of: then the descents follow the last evaluation, one with each mean.
        microbatches: how many times ``uses`` is gone through, each time from the slow weights with another microbatch;
            the means are over all of them.
    """
    return _with_gradients(uses) if mean_of is None else _with_means(uses, mean_of, microbatches)


def _with_gradients(uses: Sequence[Use]) -> StepPlan:
    descents = sum(use.descends for use in uses)
    number, found = 0, []
    for index, use in enumerate(uses):
        closes = index + 1 == len(uses)
        evaluation = Evaluation(index, use.inner_step, False, use.ascends, perturbed=index > 0, closes=closes)
        if use.descends:
            number += 1
            evaluation = _descent(evaluation, number, descents)
        found.append(evaluation)
    return StepPlan(tuple(found), descents)


def _with_means(uses: Sequence[Use], mean_of: Sequence[int], microbatches: int) -> StepPlan:
    found: list[Evaluation] = []
    for microbatch in range(microbatches):
        numbers = iter(mean_of)
        found += [
            Evaluation(
                *(microbatch * len(uses) + position, use.inner_step, False, use.ascends),
                perturbed=position > 0,
                gathers=use.descends,
                mean=MEAN + str(next(numbers)) if use.descends else "",
                microbatch=microbatch,
                microbatches=microbatches,
                returns=position + 1 == len(uses),
            )
            for position, use in enumerate(uses)
        ]
    end = replace(found.pop(), returns=False, closes=True)
    means = tuple(MEAN + str(number) for number in range(max(mean_of) + 1))
    then = [
        _descent(replace(end, index=end.index + number, gathers=False, mean=mean), number, len(means))
        for number, mean in enumerate(means, 1)
    ]
    found.append(replace(end, then=tuple(then)))
    return StepPlan(tuple(found), len(means), means, len(mean_of) * microbatches // len(means))


def _descent(evaluation: Evaluation, number: int, descents: int) -> Evaluation:
    """The ``number``-th descent of a step."""
    positions = {"first": number == 1, "second": number == 2, "last": number == descents, "odd": number % 2 == 1}
    return replace(evaluation, descends=True, **positions)
