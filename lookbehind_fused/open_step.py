"""The open step: begin, use, commit, rollback, over buckets and whoever else takes part.

A step is in one of four phases. IDLE: nothing has been written. OPEN: all can be undone. CLOSING: the last passes have
begun, all can be done again. DONE. The phase is one attribute, so that going from OPEN to CLOSING is one bytecode.
Undoing and doing again may themselves be repeated. So an interrupt at any bytecode finds the old values or leaves the
new ones: ``settle`` does whichever is due.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .arguments import Settings
from .buckets import Bucket, Gathered
from .elsewhere import Elsewhere
from .kernels.contract import Flag
from .kernels.reference import finite
from .lowering import BETWEEN, DESCENDED, KEPT
from .norms import Norms
from .program import Evaluation, Program
from .shards import whole

IDLE, OPEN, CLOSING, DONE = range(4)
REMEDY = "call loss.backward() at each evaluation, with a loss of the model whose parameters these are"
TRIES = 3  # at the last calls, which fail by themselves, or because a signal's handler raises in between

PartType = TypeVar("PartType", bound="Part")


class Part:
    """Whoever has something to put back. Each verb may be called again after an interrupt.

    Attributes:
        happens: None, or whether the step that ends has only gradients that are finite, where that is asked for
            (``nonfinite="skip"``): a bool where it is known here, else on the device, 0-dim bool. A step that is
            committed is then to leave what was there before it, unless it happens.
    """

    happens: Tensor | bool | None = None

    def begin(self) -> None:
        """The step begins; may refuse it, in which case it writes nothing."""

    def use(self, evaluation: Evaluation) -> None:
        """The gradients of an evaluation are about to be used; may refuse them."""

    def commit(self) -> None:
        """The step happens: from now on it is done again, not undone."""

    def rollback(self) -> None:
        """The step does not happen: all is to be what it was before ``begin``."""


def on_host(buckets: Sequence[Bucket], own_step: Any) -> bool:
    """Whether the host knows of a gradient that is not finite without a wait, or waits anyway."""
    return own_step is not None or all(bucket.device.type == "cpu" for bucket in buckets)


class OpenStep:
    """One outer step.

    Args:
        program: what it evaluates and what follows. settings, loss_scale: what it was prepared with.
        buckets, norms: what it moves.
        parts: who else takes part; ``own_step`` too, where the base optimizer runs its own (``parts.own_step``), and
            ``local``, where ascents follow this rank's own gradients (``parts.local_ascents``).
        elsewhere: who is told when parameters have been written.
        by_halves: it is driven by ``ascent_step()`` and ``descent_step()``.
    """

    def __init__(
        self, program: Program, settings: Settings, loss_scale: float | Tensor, buckets: list[Bucket], norms: Norms,
        parts: Sequence[Part], elsewhere: Elsewhere, own_step: Any = None, local: Any = None, by_halves: bool = False,
    ) -> None:  # fmt: skip
        self.program, self.settings, self.loss_scale = program, settings, loss_scale
        self.buckets, self.norms = buckets, norms
        self.parts, self.elsewhere, self.own_step, self.local = parts, elsewhere, own_step, local
        self.by_halves = by_halves
        self.opened = False  # whether its buckets have been opened already
        self.phase = IDLE
        self.position = int(program.recalls)  # of the evaluation that is due
        self.final: tuple[int, Sequence[Gathered]] | None = (
            None  # the first of the last calls, while they run, and its gradients
        )
        self.published = False  # whether state has appeared in the base's
        self.given_unscaled = False  # whether the gradients of evaluation 0 were given, free of the loss's scale
        self.skips = bool(buckets[0].flags & Flag.SKIPS)
        self.judged_here = self.skips and on_host(buckets, own_step)
        self.broken = False  # whether there was a gradient that is not finite, where that is known here

    @property
    def due(self) -> Evaluation:
        """The evaluation whose gradient is used next; the last one, where the step has only to be completed."""
        evaluations = self.program.evaluations
        return evaluations[min(self.position, len(evaluations) - 1)]

    def begin(self) -> None:
        """Nothing is written yet but what ``rollback`` can undo."""
        if not self.opened:
            for bucket in self.buckets:
                bucket.open()
        self.phase = OPEN
        for part in self.parts:
            part.begin()

    def rewind(self) -> None:
        """Every tensor is again where it was."""
        for bucket in self.buckets:
            bucket.rollback()
        self.elsewhere.written()

    def restart(self, buckets: list[Bucket], norms: Norms) -> None:
        """Go on with other buckets, where nothing has moved: more tensors take part than when it began."""
        for bucket in buckets:
            bucket.open()
        self.norms, self.buckets = norms, buckets
        self.judged_here = self.skips and on_host(buckets, self.own_step)
        for part in self.parts:
            part.begin()

    def recall(self, previous: Mapping[Tensor, Tensor]) -> None:
        """The calls after evaluation 0, with gradients that have been kept in the place of new ones."""
        if previous:
            self._run(0, [bucket.gather(0, previous) for bucket in self.buckets])
        else:
            for squares in self.norms.squares.values():
                squares[0].zero_()

    def use(self, may_skip: bool = False) -> bool:
        """The calls that follow the evaluation that is due, with the gradients that are there.

        Args:
            may_skip: where there is none, do nothing.

        Returns:
            Whether there is one.

        Raises:
            RuntimeError: there is none, or one that a pass cannot take, or a parameter was moved.
        """
        evaluation = self.program.evaluations[self.position]
        gathered, reached = [], False
        for bucket in self.buckets:
            if evaluation.closes:  # passes reach parameters by address, in memory that is kept until then
                bucket.require_unmoved()
            gathered.append(bucket.gather(evaluation.index))
            reached |= bucket.reached
        if not reached and may_skip:
            return False
        if not reached:
            raise RuntimeError(
                f"evaluation {evaluation.index}: expected a backward that gives parameters their gradients, but none "
                f"has one; {REMEDY}"
            )
        if evaluation.closes and len(gathered) > 1:  # a bucket is not to be refused after another has written
            self._check(gathered)
        for part in self.parts:
            part.use(evaluation)
        self._run(evaluation.index, gathered)
        self.position += 1
        if self.judged_here and self.local is None and not evaluation.closes:  # of the last, ``commit`` sees
            self.broken |= not finite(self.norms.squares[self.buckets[0].device][evaluation.index])
        return True

    def apply(self, evaluation: Evaluation) -> None:
        """As ``use``, in a form that compiles: all gradients have to be there, and only tensors are written."""
        gathered = [(b.bound[evaluation.index], [p.grad for p in b.params]) for b in self.buckets]
        for place, call in enumerate(self.buckets[0].calls[evaluation.index]):
            if call.op in BETWEEN:
                self._between(call, gathered)
            else:
                for bound, grads in gathered:
                    bound[place](grads)

    def check_applicable(self) -> None:
        """Refuse what ``apply`` cannot be given.

        Raises:
            RuntimeError: a gradient is missing, a parameter was moved, or is sharded, or ascents are local.
        """
        if self.local is not None:
            raise RuntimeError("apply(): expected ascents='synced', got 'local'; leave it out")
        for bucket in self.buckets:
            if bucket.sharded:
                raise RuntimeError(f"apply(): expected plain tensors, got a DTensor: {bucket.names[0]}; leave it out")
            bucket.require_unmoved()
            for p, name in zip(bucket.params, bucket.names, strict=True):
                if p.grad is None:
                    raise RuntimeError(f"{name}: expected a gradient at every evaluation of apply(), got none")

    def applied(self, evaluation: Evaluation) -> None:
        """After ``apply``."""
        self.elsewhere.written()
        self.check_applicable()
        if evaluation.closes:
            self.phase = CLOSING
        for part in self.parts:
            part.use(evaluation)
        self.position += 1

    def _run(self, index: int, gathered: Sequence[Gathered]) -> None:
        """Every bucket finishes a call before any begins the next."""
        calls = self.buckets[0].calls[index]
        try:
            for place, call in enumerate(calls):
                if call.final and self.phase == OPEN:
                    self.final = place, gathered
                    self.phase = CLOSING
                if call.op in BETWEEN:
                    self._between(call, gathered)
                else:
                    for bound, grads in gathered:
                        bound[place](grads)
        except Exception:
            self._check(gathered)
            raise
        finally:
            self.elsewhere.written()
        self.final = None

    def _check(self, gathered: Sequence[Gathered]) -> None:
        for bucket, (_, grads) in zip(self.buckets, gathered, strict=True):
            bucket.check(grads)

    def _between(self, call: Any, gathered: Sequence[Gathered]) -> None:
        if call.op == "own_step":
            self._check(gathered)  # copies of them would be lent
            self.own_step.run(call, [grads for _, grads in gathered], self.buckets)
        elif call.op == "share_squares":
            self.norms.share_squares(call.slot)
        elif call.op == "send":
            self.local.send(call.mean, [bucket.buffers[call.mean] for bucket in self.buckets])
        elif call.op == "receive":
            self.local.receive(call.mean)
        elif call.op == "judge":
            totals = self.norms.total(int(self.program.recalls), len(self.program.evaluations))
            if self.local is not None:
                self.local.add_up(totals)
            self.norms.judge(call.slot, self.loss_scale)
        else:
            per_tensor = self.settings.alpha_scope == "tensor"
            self.norms.share_sums([bucket.sums for bucket in self.buckets] if per_tensor else None)

    def commit(self) -> None:
        """All calls have run: the step happens, or, where gradients are not finite and so it was asked for, not."""
        self.broken = self.broken or (self.judged_here and not self.happens())
        if self.broken:
            for part in self.parts:
                part.happens = False
            self.phase = OPEN
            self.settle()
            return
        verdict = self.happens() if self.parts and self.skips and not self.judged_here else None
        for part in self.parts:
            part.happens = verdict
        for bucket in self.buckets:
            self.published |= bucket.commit()
        for part in self.parts:
            part.commit()
        self.phase = DONE

    @torch.no_grad()
    def settle(self) -> None:
        """Undo the step, or complete it where the last calls have begun, unless one of these cannot be.

        Raises:
            Exception: of what cannot be completed, where state that cannot be undone has been written: the step stays
                open, to be settled when the cause has gone.
        """
        for left in reversed(range(TRIES if self.phase == CLOSING else 0)):
            try:
                self._run_final(by_reference=not left)
                self.commit()
                return
            except Exception:  # of the call itself, or of the handler of a signal
                if not left and any(bucket.state_names and bucket.done[DESCENDED] for bucket in self.buckets):
                    raise
        if self.phase in (OPEN, CLOSING):
            for part in reversed(self.parts):
                part.rollback()
            self.rewind()
            self.phase = IDLE

    def _run_final(self, by_reference: bool) -> None:
        """Run the last calls again, if they have not all run. With several descents none of them reads what it writes,
        nor what a later one does; with a single one, which moves the state in place, it notes that it has run.
        ``by_reference``: on the reference backend, where that of the bucket has failed.
        """
        if self.final is None:
            return
        start, gathered = self.final
        for place, call in enumerate(self.buckets[0].calls[-1][start:], start):
            if call.op in BETWEEN:
                self._between(call, gathered)
                continue
            for bucket, (bound, grads) in zip(self.buckets, gathered, strict=True):
                if self.program.descents > 1 or not bucket.done[call.cell]:
                    (bucket.by_reference(place) if by_reference else bound[place])(grads)
        self.elsewhere.written()
        self.final = None

    # ---- what others may see ----

    def part_of(self, kind: type[PartType]) -> PartType | None:
        """Its part of a kind, if it has one."""
        return next((part for part in self.parts if isinstance(part, kind)), None)

    def happens(self) -> Tensor:
        """Of a step that skips, after its last evaluation: 0-dim bool, on the device, whether gradients were finite."""
        bucket = self.buckets[0]
        slot = next(call.slot for call in bucket.calls[-1] if call.op == "judge")
        return finite(self.norms.squares[bucket.device][slot])

    def slow_weights(self) -> dict[Tensor, Tensor]:
        """Of each tensor that has been moved its slow weights: views of the buckets' memory."""
        kept = [bucket for bucket in self.buckets if bucket.done[KEPT]]
        return {b.params[row]: whole(b.view("slow", row), b.params[row]) for b in kept for row in b.joined}

    @property
    def runs_base(self) -> bool:
        """Whether the base's own ``step()`` is running, on the memory that it is lent."""
        return self.own_step is not None and bool(self.own_step.lent)


class Now:
    """Where an optimizer is. An object of its own, which is the same one also for a trainer's wrapper of the optimizer.

    Attributes:
        open: the outer step that is open. last: the last one, if it is complete or was undone for its gradients.
    """

    open: OpenStep | None = None
    last: OpenStep | None = None


NOW: WeakValueDictionary[int, Now] = WeakValueDictionary()
"""Of each optimizer, by the identity of its first parameter: of two over one model, the one that began a step last."""
