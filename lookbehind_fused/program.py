"""A method becomes a program: the gradients that an outer step evaluates, and what each is used for.

A method is one function that goes through its own algorithm with a ``Trace``, which notes what it is told.
``lowering.lower`` turns the ``Program`` into calls of passes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from .batches import Batch, examples_from, examples_in


@dataclass(frozen=True)
class Evaluation:
    """One gradient evaluation of an outer step.

    Attributes:
        index: 0, 1, ... in the order of evaluation. With ``ascent_gradient="previous"`` the first is 1.
        inner_step: 1 to k: the inner step whose minibatch is to be used, where the minibatch is switched.
        perturbed: whether the model's weights are perturbed; at evaluation 0 they are the slow weights.
        ascends, descends: the next ascent, the base optimizer uses this gradient itself.
        microbatch, microbatches: which part of the minibatch is to be evaluated, from 0, and how many there are.
        closes: the outer step is complete after it.
        fraction: how much of the minibatch is to be evaluated, from its first example on (``on_a_part``).
    """

    index: int
    inner_step: int
    perturbed: bool
    ascends: bool = False
    descends: bool = False
    microbatch: int = 0
    microbatches: int = 1
    closes: bool = False
    fraction: float = 1

    def part(self, batch: Batch) -> Batch:
        """What of a minibatch this evaluation is to see, of n examples: its microbatch, the ``microbatch``-th
        n / ``microbatches``; or the first ``fraction`` * n, rounded to the nearest whole number (a half to the even
        one) and at least one. The minibatch itself where a step takes no parts.

        Args:
            batch: a tensor with the examples along its first dimension, or a tuple, a list or a mapping of such, as
                loaders give them, in each other as may be; what comes back is of the same kinds. A list of plain values
                has one for each example; a plain value by itself and a tensor without a dimension are for all of them.

        Raises:
            TypeError: something in the batch is none of these.
            ValueError: it has no tensor, or not all of one length; the number of microbatches does not divide n.
        """
        if self.fraction == 1 and self.microbatches == 1:
            return batch
        n = examples_in(batch)
        if self.fraction < 1:
            return examples_from(batch, slice(max(1, round(self.fraction * n))))
        size, rest = divmod(n, self.microbatches)
        if rest:
            raise ValueError(
                f"microbatches: expected a number that divides the batch, got {self.microbatches} for a batch of {n}"
            )
        return examples_from(batch, slice(self.microbatch * size, (self.microbatch + 1) * size))


class Use(NamedTuple):
    """What an evaluation's gradient is used for.

    Attributes:
        verb: "ascend", "descend", "gather" (into a mean), "send" (that mean, to become one over ranks) or "home" (back
            to the slow weights).
        mean: that which is gathered into or sent, or which a descent takes in the gradient's place.
    """

    verb: str
    mean: str = ""


class Program(NamedTuple):
    """What one outer step does.

    Attributes:
        evaluations: in their order. uses: of each.
        recalls: evaluation 0 does not take place: its gradient is the last one of the step before.
        descents: how often the base optimizer descends.
        means: the names of means, which are those of their buffers. gathered: of how many gradients each is the mean.
        over_ranks: descents are with means over ranks: then every tensor takes part, whatever this rank reaches.
    """

    evaluations: tuple[Evaluation, ...]
    uses: tuple[tuple[Use, ...], ...]
    recalls: bool
    descents: int
    means: tuple[str, ...]
    gathered: int
    over_ranks: bool = False

    @property
    def slots(self) -> int:
        """How many gradients and means have a norm."""
        return len(self.evaluations) + len(self.means)


SENT = "sent"  # the mean over ranks of the gradient of one evaluation


class Trace:
    """Notes what a method does."""

    def __init__(self) -> None:
        self._evaluations: list[Evaluation] = []
        self._uses: list[list[Use]] = []
        self._recalls = False
        self._perturbed = False

    def evaluate(self, inner_step: int, microbatch: int = 0) -> None:
        """Evaluate the gradient where the weights are now; what follows uses this one."""
        evaluation = Evaluation(len(self._evaluations), inner_step, self._perturbed, microbatch=microbatch)
        self._evaluations.append(evaluation)
        self._uses.append([])

    def recall(self) -> None:
        """Take the last gradient of the step before in the place of evaluation 0."""
        self.evaluate(1)
        self._recalls = True

    def ascend(self) -> None:
        """perturbed += rho * T^2 g / (||T g|| + 1e-16)."""
        self._uses[-1].append(Use("ascend"))
        self._perturbed = True

    def descend(self, mean: str = "") -> None:
        """fast = base_optimizer(fast, g), or with a mean in the place of g."""
        self._uses[-1].append(Use("descend", mean))

    def gather(self, mean: str) -> None:
        """Let the gradient be part of a mean; each mean is one of the same number of gradients."""
        self._uses[-1].append(Use("gather", mean))

    def home(self) -> None:
        """perturbed = slow."""
        self._uses[-1].append(Use("home"))
        self._perturbed = False

    def program(self) -> Program:
        """What has been noted."""
        microbatches = 1 + max(evaluation.microbatch for evaluation in self._evaluations)
        last = len(self._evaluations) - 1
        evaluations = tuple(
            replace(
                evaluation,
                ascends=Use("ascend") in uses,
                descends=Use("descend") in uses,
                microbatches=microbatches,
                closes=evaluation.index == last,
            )
            for evaluation, uses in zip(self._evaluations, self._uses, strict=True)
        )
        uses = [use for of_one in self._uses for use in of_one]
        gathered = [use.mean for use in uses if use.verb == "gather"]
        means = tuple(dict.fromkeys(gathered))
        descents = sum(use.verb == "descend" for use in uses)
        size = len(gathered) // len(means) if means else 1
        return Program(evaluations, tuple(map(tuple, self._uses)), self._recalls, descents, means, size)


def on_a_part(program: Program, fraction: float) -> Program:
    """The same program on a part of the minibatch where a gradient is for an ascent alone (Bahri, Mobahi, Tay 2021,
    arXiv 2110.08529). Gradients that a descent or a mean takes are of the whole.

    Raises:
        ValueError: there is no such gradient.
    """
    if fraction == 1:
        return program
    alone = [uses == (Use("ascend"),) for uses in program.uses]
    if program.recalls or not any(alone):
        raise ValueError(
            "ascent_fraction: expected 1.0 for a method none of whose gradients is for an ascent alone, got "
            f"{fraction!r}"
        )
    evaluations = [
        replace(evaluation, fraction=fraction) if ascends else evaluation
        for evaluation, ascends in zip(program.evaluations, alone, strict=True)
    ]
    return program._replace(evaluations=tuple(evaluations))


# ---- methods ---------------------------------------------------------------------------------------------------------


def lookbehind(k: int, reuse_gradient: bool = True, microbatches: int = 1, recalls: bool = False) -> Program:
    """k ascents, each followed by a descent (Mordido et al. 2024, algorithm 1), with the gradient of the descent or
    (2k form) with one of its own. With microbatches (m-sharpness: Foret et al. 2021, section 3) each ascends from the
    slow weights, and the i-th descent uses the mean of their i-th gradients. ``recalls``: the first ascent is free.
    """
    trace = Trace()
    for microbatch in range(microbatches):
        if microbatch:
            trace.home()
        if recalls:
            trace.recall()
        else:
            trace.evaluate(1, microbatch)
        trace.ascend()
        for i in range(1, k + 1):
            trace.evaluate(i, microbatch)
            if microbatches == 1:
                trace.descend()
            else:
                trace.gather(f"mean {i}")
            if i < k:
                if not reuse_gradient:
                    trace.evaluate(i + 1, microbatch)
                trace.ascend()
    if microbatches > 1:
        for i in range(1, k + 1):
            trace.descend(f"mean {i}")
    return trace.program()


def multistep(k: int, average: bool = False) -> Program:
    """k ascents, then a single descent with the last gradient, or with the mean of those behind (Kim et al. 2023)."""
    trace = Trace()
    trace.evaluate(1)
    trace.ascend()
    for i in range(1, k + 1):
        trace.evaluate(i)
        if average:
            trace.gather("mean")
        if i < k:
            trace.ascend()
    trace.descend("mean" if average else "")
    return trace.program()


def over_ranks(program: Program, ranks: int) -> Program:
    """The same method with means over ranks in its descents, while each rank ascends with gradients of its own.

    A mean is sent when the last gradient of this rank has been gathered, and used as late as may be: after the
    evaluation of the next one, or at the end. No ascent depends on a descent. The last gradient of a step follows no
    ascent: where it is descended with as it is, whoever averages gradients anyway has it.
    """
    uses = [[*of_one] for of_one in program.uses]
    gathers = {use.mean: index for index, of_one in enumerate(uses) for use in of_one if use.verb == "gather"}
    for mean, index in gathers.items():  # the last one of each
        place = uses[index].index(Use("gather", mean)) + 1
        place += uses[index][place : place + 1] == [Use("ascend")]  # the pass that gathers ascends, too
        uses[index].insert(place, Use("send", mean))
    waiting: list[Use] = []
    for of_one in uses[:-1]:
        if Use("descend") in of_one:
            rest = [use for use in of_one if use != Use("descend")]
            place = int(rest[:1] == [Use("ascend")])
            of_one[:] = [*waiting, Use("gather", SENT), *rest[:place], Use("send", SENT), *rest[place:]]
            waiting = [Use("descend", SENT)]
    uses[-1][:0] = waiting
    means = (*program.means, *((SENT,) if waiting else ()))
    return program._replace(
        uses=tuple(map(tuple, uses)), means=means, gathered=program.gathered * ranks, over_ranks=True
    )
