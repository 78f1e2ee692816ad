"""The loop: how steps are prepared, driven and settled, whatever form they are asked for in."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator
from operator import attrgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from .arguments import Settings, check_loss_scale, check_stats
from .checkpoint import Saved
from .elsewhere import Elsewhere
from .leftovers import Leftovers, Lent, note_when_stepped
from .open_step import DONE, NOW, OPEN, REMEDY, Now, OpenStep, Part
from .parts.buffers import BuffersAtSlow
from .parts.local_ascents import LocalAscents
from .parts.own_step import OwnStep
from .parts.previous import PreviousGradients
from .parts.scaling import Report, Scaling, scale_of
from .prepare import Prepared
from .program import Evaluation, Program, on_a_part, over_ranks
from .randomness import Replay
from .rules import NO_RULE

TRIES = 10  # at settling a step, each of which an interrupt may end


class Loop(Saved):
    """What ``Lookbehind`` has to run its steps with."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "base_optimizer" not in state:
            return
        self._previous = PreviousGradients(state.get("previous", {}))
        self._leftovers = Leftovers()
        note_when_stepped(self.base_optimizer)
        self._elsewhere = Elsewhere(state.get("model"))
        self._prepared = Prepared(self.base_optimizer, self.defaults, self._elsewhere)
        self._read_settings = attrgetter(*self.SETTINGS)
        self._checked: tuple[Any, ...] | None = None  # the settings that were found acceptable
        self._scale_checked: float | Tensor | None = None
        self._programs: dict[bool, Program] = {}
        self._local: LocalAscents | None = None
        self._now = Now()
        self._closure: Callable[..., Any] | None = None
        self._report = Report()
        if self._scaler is not None:  # which has no scale before it is asked for one, and as a copy none again
            scale_of(self._scaler, self._device())
        self._around: ref[Any] | None = None  # Lookahead

    def program(self, reuse_gradient: bool) -> Program:
        """What one outer step does."""
        raise NotImplementedError

    @property
    def _opt_called(self) -> bool:
        """Whether there was a step, which LR schedulers look for on the optimizer that they are given."""
        return getattr(self.base_optimizer, "_opt_called", False)

    @_opt_called.setter
    def _opt_called(self, value: bool) -> None:
        self.base_optimizer._opt_called = value  # type: ignore[attr-defined]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As ``torch.optim`` does, but gradients that are to be None are not looked at before."""
        if not set_to_none:
            super().zero_grad(set_to_none=False)
            return
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    def require_closed(self, what: str) -> None:
        """Refuse to do ``what`` while the weights are perturbed.

        Raises:
            RuntimeError: an outer step is open.
        """
        if self._now.open is not None:
            raise RuntimeError(
                f"{what}: expected no open step, but the weights are those of an evaluation; complete the step, or "
                "restore them with abort_step()"
            )

    def _device(self) -> torch.device:
        """That of the first parameter."""
        first: Tensor = next(p for group in self.param_groups for p in group["params"])
        return first.device

    def _check(self) -> None:
        """Refuse a step that cannot begin, before anything else happens.

        Raises:
            RuntimeError: a step is open.
            TypeError, ValueError: a setting has become what it cannot be.
        """
        if self._now.open is not None:
            self.require_closed("a new step")
        settings = self._read_settings(self)
        if settings != self._checked:
            self._checked = None
            self.check_settings(self.settings())
            self._programs = {reuse: on_a_part(self.program(reuse), self.ascent_fraction) for reuse in (True, False)}
            self._settings = Settings(*settings[: len(Settings._fields)])
            self._local = None
            if self.ascents == "local":
                self._local = LocalAscents(self.model)
                self._programs = {r: over_ranks(program, self._local.ranks) for r, program in self._programs.items()}
            self._settings_scaled = self._settings._replace(nonfinite="skip")
            self._checked = settings
        if "grad_scale" in self.__dict__ and "found_inf" not in self.__dict__:  # else a GradScaler has written it
            warnings.warn("grad_scale: loss_scale is its name now", DeprecationWarning, stacklevel=4)
            self.loss_scale = self.__dict__.pop("grad_scale")
        if self.loss_scale is not self._scale_checked:
            check_loss_scale(self.loss_scale)
            self._scale_checked = self.loss_scale
        if self.buffers_at_slow is not None:
            check_stats(self.buffers_at_slow, self.ascent_gradient)

    def _prepare(self, reuse_gradient: bool, by_halves: bool = False) -> OpenStep:
        """A step that has not begun. Nothing that could not be prepared again is written."""
        self._check()
        program, settings, prepared = self._programs[reuse_gradient], self._settings, self._prepared
        scale, scaler, parts = self.loss_scale, self._scaler, list[Part]()
        around = None if self._around is None else self._around()
        if scaler is not None and scaler.is_enabled():
            scaling = Scaling(scaler, self._device(), self._report, (self, around))
            settings, scale = self._settings_scaled, scaling.scale * scale
            parts.append(scaling)
        prepared.for_step(program, settings, scale, self.backend)
        if self.buffers_at_slow is not None:
            parts.append(BuffersAtSlow(self.buffers_at_slow))
        if program.recalls:
            self._previous.params = prepared.tensors
            parts.append(self._previous)
        if around is not None:
            parts.append(around.part())
        local = self._local
        if local is not None:
            local.follow(prepared, program, settings)
            parts.append(local)
        own_step = None
        if prepared.rule is NO_RULE:
            own_step = OwnStep(self.base_optimizer, settings, scale)
            parts.append(own_step)
        buckets, norms = prepared.buckets, prepared.norms
        return OpenStep(program, settings, scale, buckets, norms, parts, self._elsewhere, own_step, local, by_halves)

    @torch.no_grad()
    def _begin(self, step: OpenStep, uses: bool) -> None:
        now, first = self._now, id(self._prepared.tensors[0])
        other = NOW.get(first, now)
        if other is not now and other.open is not None:
            raise RuntimeError(
                f"{self._prepared.names[0]}: expected no open step of another optimizer over it; complete that one, or "
                "restore the weights with its abort_step()"
            )
        NOW[first] = now
        now.open = step
        step.begin()
        if not uses:
            for bucket in step.buckets:
                bucket.keep_slow()
        if step.program.recalls:
            step.recall(self._previous.of_now(self._prepared.late))

    def _evaluate(self, step: OpenStep, uses: bool = True, given: bool = False) -> Generator[Evaluation, None, None]:
        """The evaluations of a step that has not begun; ``uses``: what follows each is done here. ``given``: the
        gradients of the first are there.
        """
        tensors = self._prepared.tensors
        others = () if given else self._leftovers.others(tensors)
        lent = Lent(others) if others else None
        replay = Replay({bucket.device for bucket in step.buckets}) if step.settings.same_randomness else None
        may_skip = uses and not given
        try:
            try:
                self._begin(step, uses)
                for evaluation in step.program.evaluations[step.position :]:
                    if not given:
                        for p in tensors:
                            p.grad = None
                        if lent is not None:
                            lent.lend()
                        if replay is not None:
                            replay.at(evaluation)
                        yield evaluation
                        if lent is not None:
                            if may_skip and lent.is_all_there_is(tensors):
                                self._skip(step)
                                return
                            lent.require_cleared(self._prepared.names, tensors)
                            lent = None
                        if self._now.open is not step:
                            raise RuntimeError(
                                f"evaluation {evaluation.index}: expected an open step, but abort_step() ended it"
                            )
                    if self._prepared.untrained and uses and evaluation.index == int(step.program.recalls):
                        self._take_in(step)
                    with torch.no_grad():
                        if uses and not step.use(may_skip):
                            self._skip(step)
                            return
                        if not uses:
                            step.applied(evaluation)
                    given = may_skip = False
                    if step.broken and uses:  # what remains could change nothing
                        break
                with torch.no_grad():
                    step.commit()
                self._closed(step)
            except BaseException:
                self._settle(step)
                raise
        finally:
            if lent is not None:
                lent.give_back()
            if self._now.open is step:  # an interrupt came while another was settled
                self._settle(step)

    @torch.no_grad()
    def _take_in(self, step: OpenStep) -> None:
        """Tensors that were not trained when the step was prepared, and have a gradient at its first evaluation, are
        trained from then on: an adapter whose ``requires_grad`` is on only inside the closure.
        """
        prepared = self._prepared
        if not prepared.notes_trained():
            return
        step.rewind()
        prepared.for_step(step.program, step.settings, step.loss_scale, self.backend)
        step.restart(prepared.buckets, prepared.norms)
        if step.program.recalls:
            self._previous.params = prepared.tensors
            step.recall(self._previous.of_now(self._prepared.late))

    def _skip(self, step: OpenStep) -> None:
        """The first evaluation has left no gradients, as where a trainer skips a minibatch: there is no step."""
        warnings.warn(
            f"evaluation 0 has left no gradients on the optimizer's parameters: the step was skipped; {REMEDY}",
            stacklevel=4,
        )
        for part in step.parts:
            part.happens = True  # nothing was found that is not finite
        self._settle(step)

    @torch.no_grad()
    def _use_half(self, step: OpenStep) -> None:
        if step is not self._now.open:
            self._begin(step, uses=True)
        step.use()
        if step.position == len(step.program.evaluations):
            step.commit()
            self._closed(step)

    def _half_step(self, name: str, other: str, *, ascends: bool) -> None:
        step = self._now.open
        if step is None or step.phase != OPEN or not step.by_halves:
            now = "no step is open" if step is None else "step(closure) or evaluations() is running"
            raise RuntimeError(f"{name}: expected after {other}, but {now}")
        if step.due.ascends != ascends:
            raise RuntimeError(
                f"{name}: expected {other} next, at inner step {step.due.inner_step} of {self.k}; abort_step() "
                "abandons the step"
            )
        self._guarded(step, self._use_half, step)

    def _guarded(self, step: OpenStep, do: Callable[..., Any], *arguments: Any) -> Any:
        """Do something within a step; whatever is raised settles it."""
        try:
            try:
                return do(*arguments)
            except BaseException:
                self._settle(step)
                raise
        except BaseException:  # an interrupt that came while another was settled
            self._settle(step)
            raise

    def _settle(self, step: OpenStep) -> None:
        """Undo or complete a step if it is still open, whatever else comes in between."""
        interrupt: BaseException | None = None
        for _ in range(TRIES):
            if self._now.open is not step:
                break
            try:
                step.settle()
                self._closed(step)
            except BaseException as error:
                interrupt = error
        if interrupt is not None:
            raise interrupt

    def _closed(self, step: OpenStep) -> None:
        """A step has been undone or completed."""
        now = self._now
        now.last, step.parts, step.own_step, step.local = None, (), None, None  # some refer to what refers to this
        if step.broken or (step.skips and not step.judged_here):  # gradients that are not finite are nobody's
            for p in self._prepared.tensors:
                p.grad = None
        if step.broken:
            now.last = step
        if step.phase == DONE:
            if step.published:
                self._prepared.see_state()
            if not step.program.recalls and self._previous.kept:
                self._previous.kept = {}
            now.last = step
            self.base_optimizer._opt_called = True  # type: ignore[attr-defined]
        self._leftovers.note(self._prepared.tensors)
        now.open = None

    # ---- hooks: torch runs them around step(); the other forms of a step run them here ----

    def _prepare_with_hooks(self, reuse_gradient: bool, by_halves: bool = False) -> OpenStep:
        """As ``_prepare``; hooks do not run for a step that is refused, and may change what it is to be."""
        step = self._prepare(reuse_gradient, by_halves)
        hooks = [*_global_optimizer_pre_hooks.values(), *self._optimizer_step_pre_hooks.values()]
        for hook in hooks:
            hook(self, (), {})
        return self._prepare(reuse_gradient, by_halves) if hooks else step

    def _run_post_hooks(self) -> None:
        for hook in [*self._optimizer_step_post_hooks.values(), *_global_optimizer_post_hooks.values()]:
            hook(self, (), {})
