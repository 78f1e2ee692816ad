"""A program becomes calls of passes.

``lower`` turns a ``Program`` into the calls of a bucket: it alone decides which pass computes what, and where old and
new values stand. Which buffers a bucket has is the union of the names in its calls.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from .kernels.contract import Flag
from .program import Evaluation, Program, Use


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
        op: a pass of ``kernels.schema``; "copy" (of the whole buffer ``source`` to ``target``), "clear" (it is 0),
            "keep" (the weights, in ``slow`` and ``perturbed``) and "load" (the weights, from ``slow``); or, between
            buckets, "share_squares", "share_sums", "judge" (are all gradients of the step finite?), "send" and
            "receive" (the mean over ranks), "own_step".
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
BETWEEN = ("share_squares", "share_sums", "judge", "send", "receive", "own_step")


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
        self.sent: set[str] = set()  # means that are on their way
        self.used: set[str] = set()  # means that a descent has taken

    def after(self, evaluation: Evaluation, uses: tuple[Use, ...]) -> tuple[Call, ...]:
        """The calls after an evaluation."""
        self.evaluation, self.calls = evaluation, []
        rest = [*uses]
        while rest:
            use = rest.pop(0)
            if use.verb == "home":
                self.calls.append(Call("load", buffers={"slow": "slow", **self.perturbed}))
            elif use.verb == "send":
                self.calls.append(Call("send", use.mean))
                self.sent.add(use.mean)
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
        if mean in self.used:
            self.calls.append(Call("clear", buffers={"target": mean}))
            self.used.remove(mean)
        fills = self._norm(ascends or self.traits.needs_norms, ascends, "", slot)
        buffers = {"fast": mean, "steps": "no steps", **(self.perturbed if ascends else {})}
        self.calls.append(Call(_descends(ascends), "", slot, fills, buffers, gathers=True))

    def _descend(self, mean: str, ascends: bool) -> None:
        self.descents += 1
        if mean in self.sent:
            self.calls.append(Call("receive", mean))
            self.sent.remove(mean)
        if mean:
            self.used.add(mean)
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
