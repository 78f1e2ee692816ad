"""A method becomes a program: the gradients that an outer step evaluates, what each is used for, and which calls of
passes follow it.

A method is one function that goes through its own algorithm with a ``Trace``, which notes what it is told. ``lower``
turns the ``Program`` into the calls of a bucket: it alone decides which pass computes what, and where old and new
values stand. Which buffers a bucket has is the union of the names in its calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from .kernels.contract import Flag


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
    """

    index: int
    inner_step: int
    perturbed: bool
    ascends: bool = False
    descends: bool = False
    microbatch: int = 0
    microbatches: int = 1
    closes: bool = False

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


class Use(NamedTuple):
    """What an evaluation's gradient is used for.

    Attributes:
        verb: "ascend", "descend", "gather" (into a mean) or "home" (back to the slow weights).
        mean: the mean that the gradient is gathered into, or that a descent takes in the gradient's place.
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
    """

    evaluations: tuple[Evaluation, ...]
    uses: tuple[tuple[Use, ...], ...]
    recalls: bool
    descents: int
    means: tuple[str, ...]
    gathered: int

    @property
    def slots(self) -> int:
        """How many gradients and means have a norm."""
        return len(self.evaluations) + len(self.means)


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


# ---- calls -----------------------------------------------------------------------------------------------------------


class Traits(NamedTuple):
    """What the calls of a bucket depend on beside the program.

    Attributes:
        states: names of the base's buffers.
        derives: an update follows from the weights and the state that it leaves, so fast_1 need not be kept for k = 2.
        own_step: the base optimizer runs its own ``step()``.
        rounded: the parameters are of 16 bits, the rounded image of ``perturbed``.
        adaptive: alpha is adaptive.
        needs_norms: descents clip or skip. skips: a gradient that is not finite undoes the step.
        alone: there is one bucket, so that a pass that ascends finds the norm itself.
    """

    states: tuple[str, ...]
    derives: bool
    own_step: bool
    rounded: bool
    adaptive: bool
    needs_norms: bool
    skips: bool
    alone: bool


class Call(NamedTuple):
    """A pass over each bucket, or something between buckets.

    Attributes:
        op: a pass of ``kernels.schema``; "copy" (of the whole buffer ``source`` to ``target``), "keep" (the weights, in
            ``slow`` and ``perturbed``) and "load" (the weights, from ``slow``); or, between buckets, "share_squares",
            "share_sums", "judge" (are all gradients of the step finite?), "own_step".
        mean: "" for the evaluation's own gradient, or the name of the mean in its place.
        slot: of the gradient's norm. fills: the pass is to find that norm first.
        buffers: by argument, the name of the buffer, or of those, that the pass reads or writes there.
        flags: beside the bucket's own.
        gathers: the pass adds a gradient to a mean, as SGD would (``Bucket.mean_hyper``).
        cell: of ``Bucket.done``, which says whether the pass has run, as far as that has to be known; -1 for none.
        final: it writes what the outer step leaves.
    """

    op: str
    mean: str = ""
    slot: int = 0
    fills: bool = False
    buffers: Mapping[str, str | tuple[str, ...]] = {}
    flags: int = 0
    gathers: bool = False
    cell: int = -1
    final: bool = False


Calls = tuple[tuple[Call, ...], ...]
"""For each evaluation those that follow it."""

KEPT, DESCENDED = range(2)  # cells of Bucket.done
BETWEEN = ("share_squares", "share_sums", "judge", "own_step")


def working(name: str) -> str:
    """The buffer in which the inner steps advance the base's state ``name``."""
    return "working " + name


@lru_cache(maxsize=256)
def lower(program: Program, traits: Traits) -> Calls:
    """The calls of a bucket. Their ops and order depend on nothing that buckets of one optimizer differ in."""
    lowering = _Lowering(program, traits)
    return tuple(
        lowering.after(evaluation, uses)
        for evaluation, uses in zip(program.evaluations, program.uses, strict=True)
    )  # fmt: skip


def buffers_of(calls: Calls) -> set[str]:
    """The names of all buffers that there have to be."""
    named = [name for of_one in calls for call in of_one for name in call.buffers.values()]
    return {one for name in named for one in ((name,) if isinstance(name, str) else name)}


class _Lowering:
    """Goes through a program and notes the calls."""

    def __init__(self, program: Program, traits: Traits) -> None:
        self.program, self.traits = program, traits
        self.aligns = traits.adaptive and program.descents > 1  # with one descent fast_1 is fast_k: alpha* = 1
        self.keeps_first = self.aligns and (program.descents > 2 or traits.own_step)
        self.derives = traits.derives and program.descents > 1 and not self.keeps_first
        self.perturbed = {"perturbed": "perturbed"} if traits.rounded else {}
        self.descents = 0

    def after(self, evaluation: Evaluation, uses: tuple[Use, ...]) -> tuple[Call, ...]:
        """The calls after an evaluation."""
        self.evaluation, self.calls = evaluation, []
        rest = [*uses]
        while rest:
            use = rest.pop(0)
            if use.verb == "home":
                self.calls.append(Call("load", buffers={"slow": "slow", **self.perturbed}))
            elif use.verb == "ascend":
                self._ascend()
            else:
                # One pass does both, since both use the same gradient.
                ascends = rest[:1] == [Use("ascend")] and (use.verb == "gather" or not use.mean)
                if ascends:
                    rest.pop(0)
                (self._gather if use.verb == "gather" else self._descend)(use.mean, ascends)
        return tuple(self.calls)

    def _norm(self, needed: bool, fills: bool, mean: str, slot: int) -> bool:
        """Have the norm found, if needed; whether the pass that needs it is to find it itself."""
        if needed and fills and self.traits.alone:
            return True
        if needed:
            where = self.perturbed if self.evaluation.perturbed else {}
            self.calls.append(Call("reduce_sq_norm", mean, slot, buffers=where))
            self._share(Call("share_squares", slot=slot))
        if self.traits.skips and self.descents == self.program.descents:
            self.calls.append(Call("judge", slot=slot))
        return False

    def _share(self, call: Call) -> None:
        if not self.traits.alone:
            self.calls.append(call)

    def _ascend(self) -> None:
        slot, perturbed = self.evaluation.index, self.evaluation.perturbed
        fills = self._norm(True, True, "", slot)
        buffers = self.perturbed if perturbed else {**self.perturbed, "slow": "slow"}
        self.calls.append(Call("ascend", "", slot, fills, buffers, cell=-1 if perturbed else KEPT))

    def _gather(self, mean: str, ascends: bool) -> None:
        slot = self.evaluation.index
        if not self.evaluation.perturbed:  # the pass below does not
            self.calls.append(Call("keep", buffers={"slow": "slow", **self.perturbed}, cell=KEPT))
        fills = self._norm(ascends or self.traits.needs_norms, ascends, "", slot)
        buffers = {"fast": mean, "steps": "no steps", **(self.perturbed if ascends else {})}
        self.calls.append(Call(_descends(ascends), "", slot, fills, buffers, gathers=True))

    def _descend(self, mean: str, ascends: bool) -> None:
        self.descents += 1
        slot = len(self.program.evaluations) + self.program.means.index(mean) if mean else self.evaluation.index
        if self.traits.own_step:
            self._own_step(mean, ascends, slot)
        else:
            fills = self._norm(ascends or self.traits.needs_norms, ascends, mean, slot)
            if self.descents < self.program.descents:
                self._inner_descent(mean, ascends, slot, fills)
        if self.descents == self.program.descents:
            self._last_descent(mean, slot)

    def _own_step(self, mean: str, ascends: bool, slot: int) -> None:
        first = self.descents == 1
        if ascends:  # before the base may spoil the gradient
            self._ascend()
        else:
            self._norm(self.traits.needs_norms, False, mean, slot)
        if first:
            self.calls.append(Call("copy", buffers={"target": "fast", "source": "slow"}))
        self.calls.append(Call("own_step", mean, slot, buffers={"fast": "fast"}))
        if first and self.keeps_first:
            self.calls.append(Call("copy", buffers={"target": "first", "source": "fast"}))

    def _inner_descent(self, mean: str, ascends: bool, slot: int, fills: bool) -> None:
        source, target = self._source(), "fast"
        if self.descents == 1:
            target = "" if self.derives else "first" if self.keeps_first else "fast"
        buffers = {**self._state(), **(self.perturbed if ascends else {})}
        if target:
            buffers["fast"] = target
        if source != target:
            buffers["fast_from"] = source
        self.calls.append(Call(_descends(ascends), mean, slot, fills, buffers, self._flags()))

    def _last_descent(self, mean: str, slot: int) -> None:
        buffers = {**self._state(), "slow": "slow", "fast": self._source()}
        flags = self._flags()
        op = "descend_align" if self.aligns else "descend_interpolate"
        if self.aligns:
            buffers |= {"sums": "sums", **self.perturbed, **({"first": "first"} if self.keeps_first else {})}
        self.calls.append(Call(op, mean, slot, False, buffers, flags, cell=DESCENDED, final=True))
        if not self.aligns:
            return
        self._share(Call("share_sums", final=True))
        buffers = {"slow": "slow", "sums": "sums", **self.perturbed}
        self.calls.append(Call("interpolate", buffers=buffers, final=True))

    def _source(self) -> str:
        """Where a descent reads the fast weights."""
        if self.traits.own_step:
            return "fast"
        if self.descents == 1:
            return "slow"
        if self.descents == 2 and (self.derives or self.keeps_first):
            return "slow" if self.derives else "first"
        return "fast"

    def _flags(self) -> int:
        return int(Flag.DERIVES) if self.derives and self.descents == 2 else 0

    def _state(self) -> dict[str, str | tuple[str, ...]]:
        """The base's state is read by the first descent and written by the last; the others advance a copy of it."""
        number, first, last = self.descents, self.descents == 1, self.descents == self.program.descents
        own, between = self.traits.states, tuple(map(working, self.traits.states))
        buffers: dict[str, str | tuple[str, ...]] = {
            "state": own if last else between,
            "steps": "steps" if last else f"working steps {number % 2}",
        }
        if not (first and last):
            buffers["steps_from"] = "steps" if first else f"working steps {(number - 1) % 2}"
        if first != last:
            buffers["state_from"] = own if first else between
        return buffers


def _descends(ascends: bool) -> str:
    return "descend_ascend" if ascends else "descend"
