"""The forms of a step: with a closure, as a loop in the caller's hands, in pairs for trainers that own everything."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Generator
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from .arguments import check_closure, check_int, check_takes_evaluation
from .elsewhere import check_model
from .graphs import GraphedStep
from .loop import Loop
from .open_step import OpenStep
from .parts.scaling import Scaling, check_scaler, is_stepping, scale_of
from .program import Evaluation
from .shards import any_of
from .tensors import shown


class Forms(Loop):
    """What runs the steps of ``Lookbehind``."""

    def step(self, closure: Callable[..., Any] | None = None) -> Any:
        """One outer step: k + 1 evaluations of ``closure`` (2k with ``reuse_gradient=False``).

        Args:
            closure: runs forward and backward and returns the loss. Gradients are cleared before each call. With
                microbatches or ``ascent_fraction`` it is given the ``Evaluation``. None: evaluation 0 is the gradients
                that are there, and ``optimizer.closure`` is called for the others.

        Returns:
            What the closure returned at evaluation 0: the loss at the unperturbed weights, with ``ascent_fraction`` of
            its part of the minibatch. With microbatches the mean over them; with ``ascent_gradient="previous"``, which
            has no such evaluation, that of its first. None where evaluation 0 was given.

        Raises:
            TypeError: there is no closure, or it does not take the ``Evaluation`` that says which part of the minibatch
                it is to see.
            ValueError: gradients cannot be given, since ``ascent_gradient``, ``ascents``, ``microbatches``,
                ``same_randomness`` or ``ascent_fraction`` needs another evaluation than theirs.
            RuntimeError: no gradients are there to be used, an evaluation after the first leaves none, a step is open
                already, a ``GradScaler`` calls that is not ``scaler``, or with a ``scaler`` gradients were given by
                another call than ``scaler.step(optimizer)``.

        Where the closure leaves no gradients at evaluation 0, as where a trainer skips a minibatch, the step is skipped
        with a warning. Whatever is raised, by the closure or here, also by the handler of a signal at any moment: the
        weights and the base optimizer's state are as they were before, or, where the last pass had begun, as they are
        after the step.
        """
        if "found_inf" in self.__dict__:
            self.require_scaler(self)
        if closure is None and self._creates_state():
            return self.base_optimizer.step()
        given = closure is None and self._closure is not None
        closure = self._closure if given else closure
        if not callable(closure):
            raise TypeError(
                "closure: expected a function that runs forward and backward and returns the loss, since a step takes "
                f"several gradients; got {shown(closure)} (loops that call backward themselves: evaluations(), or once "
                "for all optimizer.closure = a function that does it again)"
            )
        if not given and (self.microbatches != 1 or self.ascent_fraction != 1):
            check_takes_evaluation(closure, self.microbatches, self.ascent_fraction)
        step = self._prepare(self.reuse_gradient)
        if given:
            self._take_given(step)
        return self._run(step, closure, given)

    def _run(self, step: OpenStep, closure: Callable[..., Any], given: bool = False) -> Any:
        """A step that has not begun, with a closure; what ``step()`` returns. ``given``: the gradients of evaluation 0
        are there.
        """
        losses: list[Any] = []
        in_parts = self.microbatches > 1 or self.ascent_fraction < 1  # of the minibatch: it has to be told which
        evaluations = self._evaluate(step, given=given)
        try:
            try:
                for evaluation in evaluations:
                    with torch.enable_grad():
                        value = closure(evaluation) if in_parts else closure()
                    if evaluation.microbatches > 1 and not isinstance(value, (Tensor, numbers.Real, NoneType)):
                        raise TypeError(
                            f"closure: expected a loss that a mean over microbatches can be taken of, got "
                            f"{shown(value)}"
                        )
                    if not (losses and evaluation.perturbed):
                        losses.append(value)
            finally:
                evaluations.close()
        finally:
            if self._now.open is step:  # an interrupt came while another was settled
                self._settle(step)
        if given:
            return None
        if len(losses) == 1:
            return losses[0]
        return None if any(loss is None for loss in losses) else sum(losses) / len(losses)

    def _take_given(self, step: OpenStep) -> None:
        """Refuse gradients that are there for evaluation 0 where they cannot be that."""
        for name, value, usual in (
            ("ascent_gradient", self.ascent_gradient, "current"),
            ("ascents", self.ascents, "synced"),
            ("microbatches", self.microbatches, 1),
            ("same_randomness", self.same_randomness, False),
            ("ascent_fraction", self.ascent_fraction, 1.0),
        ):
            if value != usual:
                raise ValueError(
                    f"{name}: expected {usual!r} for a step() without a closure, whose evaluation 0 is the gradients "
                    f"that are there, got {value!r}; call step(closure)"
                )
        if self._leftovers.are_all_there_is(self._prepared.tensors):
            raise RuntimeError(
                "step(): expected gradients of evaluation 0 to be there, since no closure was given, but there are "
                "none but the last step's; call backward() before it, or step(closure)"
            )
        if self._scaler is not None and self._scaler.is_enabled() and not is_stepping(self._scaler):
            raise RuntimeError(
                "step(): expected to be called by scaler.step(optimizer), which looks at the gradients that are there, "
                "with the scaler that the optimizer was given; it was called by another, or by none"
            )
        self._note_scale(step)

    def _note_scale(self, step: OpenStep) -> None:
        """Whether the gradients that are there for evaluation 0 have been unscaled."""
        scaling = step.part_of(Scaling)
        step.given_unscaled = scaling is not None and scaling.is_unscaled()

    def graphed(self, closure: Callable[..., Any], num_warmup_iters: int = 3, pool: Any = None) -> GraphedStep:
        """Capture one outer step as a CUDA graph: its k + 1 forward and backward passes, and all passes that follow.

        What the closure reads are tensors that stay where they are, as with ``torch.cuda.make_graphed_callables``: the
        caller copies each minibatch into them. Example::

            inputs, targets = first_inputs.clone(), first_targets.clone()

            def closure():
                loss = loss_fn(model(inputs), targets)
                loss.backward()
                return loss

            step = optimizer.graphed(closure)
            for new_inputs, new_targets in loader:      # of the same shapes
                inputs.copy_(new_inputs)
                targets.copy_(new_targets)
                loss = step()

        Args:
            closure: as that of ``step()``. It must not wait for the device (``.item()``, ``.cpu()``, prints).
            num_warmup_iters: how many steps run before, >= 1, so that whatever is made or chosen at first use is there.
                These and the capture leave weights, state, the buffers of modules that run, ``.grad`` and torch's
                random states as they were, for which they take a copy of them.
            pool: memory to share with other graphs, as ``torch.cuda.graph`` takes it.

        Returns:
            A function without arguments that replays the step: ``GraphedStep``.

        Raises:
            TypeError: the closure is no function, or one that cannot be told its part of the minibatch.
            ValueError: parameters are not on one CUDA device, or a setting or the base optimizer cannot be captured.
            RuntimeError: a step is open, or the closure does what cannot be captured.
        """
        if not callable(closure):
            raise TypeError(f"closure: expected a function that runs forward and backward, got {shown(closure)}")
        check_int("num_warmup_iters", num_warmup_iters, 1)
        if self.microbatches != 1 or self.ascent_fraction != 1:
            check_takes_evaluation(closure, self.microbatches, self.ascent_fraction)
        return GraphedStep(self, closure, num_warmup_iters, pool)

    # ---- with a gradient scaler ----

    @property
    def closure(self) -> Callable[..., Any] | None:
        """What ``step()`` without a closure calls for the evaluations after the first; None or a function. Copies and
        pickles of the optimizer have none.
        """
        return self._closure

    @closure.setter
    def closure(self, value: Callable[..., Any] | None) -> None:
        check_closure(value)
        self._closure = value

    @property
    def scaler(self) -> GradScaler | None:
        """The ``torch.amp.GradScaler`` by which the closure scales its losses, or None."""
        return self._scaler

    @scaler.setter
    def scaler(self, value: GradScaler | None) -> None:
        self.require_closed("scaler")
        check_scaler(value)
        self._scaler = value
        if value is not None:
            scale_of(value, self._device())

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """What ``GradScaler.step`` asks for: whether the step looks at its gradients itself. With given ones it is to
        be an optimizer like others, whose gradients trainers unscale and clip.
        """
        return self._closure is None or self._scaler is None

    def require_scaler(self, marked: Optimizer) -> None:
        """Refuse to be called by a ``GradScaler`` that this optimizer does not know: gradients would be used scaled.

        Args:
            marked: on which the scaler has left its attributes.

        Raises:
            RuntimeError: ``scaler`` is None, disabled, or another.
        """
        own = self._scaler
        if own is None or not own.is_enabled() or not is_stepping(own):
            for name in ("grad_scale", "found_inf"):
                vars(marked).pop(name, None)
            came = "None" if own is None else "another" if own.is_enabled() else "one that is disabled"
            raise RuntimeError(
                f"scaler: expected the GradScaler whose step() calls this optimizer, got {came}; a step evaluates "
                "gradients of its own, which it has to unscale: Lookbehind(..., scaler=scaler) or optimizer.scaler = "
                "scaler"
            )

    # ---- weights that are kept elsewhere ----

    @property
    def model(self) -> nn.Module | None:
        """The module whose parameters are optimized, or None."""
        return self._elsewhere.model

    @model.setter
    def model(self, value: nn.Module | None) -> None:
        self.require_closed("model")
        check_model(value)
        self._elsewhere.model = value
        self._prepared.look_again()
        self._checked = None

    def register_weights_hook(self, hook: Callable[[], Any]) -> RemovableHandle:
        """Have ``hook()`` called whenever parameters have been written: after each pass of a step that moves them, also
        where a step is undone. For caches of weights that would otherwise be those of before. It is not to raise.

        Returns:
            What removes it: ``handle.remove()``.

        Raises:
            TypeError: it is not a function.
        """
        return self._elsewhere.register(hook)

    # ---- the state that checkpoints ask for ----

    def _creates_state(self) -> bool:
        """Whether this is how ``torch.distributed.checkpoint`` has an optimizer create its state: a step without a
        closure, with gradients of 0 and a learning rate of 0.
        """
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        still = all(group.get("lr", 0) == 0 for group in self.param_groups)
        return bool(grads) and still and self._now.open is None and not any(map(any_of, grads))

    def evaluations(self, *, apply: bool = True) -> Generator[Evaluation, None, None]:
        """One outer step with the loop in the caller's hands: run forward and backward once per iteration.

        Gradients are cleared before each iteration. Leaving the loop early, by ``break`` or by an exception, restores
        the weights and the base optimizer's state. Example, with another minibatch for each inner step::

            for evaluation in optimizer.evaluations():          # built with reuse_gradient=False
                inputs, targets = minibatches[evaluation.inner_step - 1]
                loss_fn(model(inputs), targets).backward()

        Args:
            apply: False leaves it to the caller to call ``apply(evaluation)`` after each backward, for instance within
                a compiled function.

        Yields:
            Evaluation: which evaluation this is.

        Raises:
            RuntimeError: an iteration ran no backward, or a step is open already.
        """
        yield from self._evaluate(self._prepare_with_hooks(self.reuse_gradient), apply)
        self._run_post_hooks()

    def apply(self, evaluation: Evaluation) -> None:
        """The passes that follow an evaluation, with the gradients that are there, in a form that compiles.

        It writes nothing but tensors, has no graph break under ``torch.compile(fullgraph=True)``, and takes everything
        that may be scheduled (lr, rho, alpha, ...) from tensors, so that new values do not compile again. Within
        ``evaluations(apply=False)``::

            @torch.compile(fullgraph=True)
            def evaluate(evaluation, inputs, targets):
                loss = loss_fn(model(inputs), targets)
                loss.backward()                      # in the graph if torch._dynamo.config.trace_autograd_ops is set
                optimizer.apply(evaluation)
                return loss.detach()

            for evaluation in optimizer.evaluations(apply=False):
                loss = evaluate(evaluation, inputs, targets)

        Every parameter that requires a gradient must have one at every evaluation, the base optimizer must be a rule of
        the kernels (SGD, Adam, AdamW), and to compile it the backend must have compiled ops, as "native" has. The
        last call writes the base's state: raise nothing between it and the end of the loop's body, for then the weights
        would be restored, but not that state.
        """
        if self._now.open is None:
            raise RuntimeError("apply(): expected to be called within evaluations(apply=False), but no step is open")
        if not torch.compiler.is_compiling():  # compiled code reaches parameters as what they are
            self._now.open.check_applicable()
        with torch.no_grad():
            self._now.open.apply(evaluation)

    def ascent_step(self) -> None:
        """Ascend with the gradients that are there: the first half of an inner step of the 2k form.

        k pairs of ``ascent_step()`` and ``descent_step()``, each after a backward of its own, are one outer step; with
        microbatches so many for each of them in turn. Whether an ascent's gradient is of the whole minibatch or of a
        part is up to the caller, so that ``ascent_fraction`` has no meaning here.
        Clearing gradients in between is up to the caller. Between the two the weights are perturbed: ``abort_step()``
        restores them.

        Raises:
            RuntimeError: ``descent_step()`` is due, there is no gradient, or a step of another form is open.
        """
        for name, value, usual in (
            ("ascent_gradient", self.ascent_gradient, "current"),
            ("ascents", self.ascents, "synced"),
            ("same_randomness", self.same_randomness, False),
            ("ascent_fraction", self.ascent_fraction, 1.0),
        ):
            if value != usual:
                raise RuntimeError(
                    f"ascent_step(): expected {name}={usual!r}, since it uses the gradients that are there, got "
                    f"{value!r}; use step(closure) or evaluations()"
                )
        if self._now.open is None:
            step = self._prepare_with_hooks(reuse_gradient=False, by_halves=True)
            self._note_scale(step)
            self._guarded(step, self._use_half, step)
        else:
            self._half_step("ascent_step()", "descent_step()", ascends=True)

    def descent_step(self) -> None:
        """Move the fast weights with the gradients that are there: the second half of an inner step of the 2k form.

        After the k-th the outer step is complete and the weights are no longer perturbed.

        Raises:
            RuntimeError: ``ascent_step()`` is due, there is no gradient, or a step of another form is open.
        """
        self._half_step("descent_step()", "ascent_step()", ascends=False)
        if self._now.open is None:
            self._run_post_hooks()

    def abort_step(self) -> None:
        """Abandon the open outer step, if there is one: it is undone, or completed where its last pass has begun."""
        if self._now.open is not None:
            self._settle(self._now.open)

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation whose gradient the open step uses next; None between two steps."""
        return None if self._now.open is None else self._now.open.due

    def slow_weights(self) -> dict[Tensor, Tensor]:
        """Of each parameter that the open step has moved its slow weights, in the parameter's shape, in float32
        (float64 for float64 parameters): to be read only. Empty between two steps, where parameters are the slow ones.
        """
        return {} if self._now.open is None else self._now.open.slow_weights()
