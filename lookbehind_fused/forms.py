"""The forms of a step: with a closure, as a loop in the caller's hands, in pairs for trainers that own everything."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .arguments import check_takes_evaluation
from .loop import Loop
from .program import Evaluation


class Forms(Loop):
    """What runs the steps of ``Lookbehind``."""

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One outer step: k + 1 evaluations of ``closure`` (2k with ``reuse_gradient=False``).

        Args:
            closure: runs forward and backward and returns the loss. Gradients are cleared before each call. With
                microbatches it is given the ``Evaluation``.

        Returns:
            What the closure returned at evaluation 0: the loss at the unperturbed weights. With microbatches the mean
            over them; with ``ascent_gradient="previous"``, which has no such evaluation, that of its first.

        Raises:
            TypeError: there is no closure, it returned None, or it does not take the ``Evaluation`` that says which
                microbatch it is to see.
            RuntimeError: it ran no backward, or a step is open already.

        Whatever is raised, by the closure or here, also by the handler of a signal at any moment: the weights and the
        base optimizer's state are as they were before, or, where the last pass had begun, as they are after the step.
        """
        if "found_inf" in self.__dict__:
            self._refuse_grad_scaler()
        if closure is None and self._creates_state():
            return self.base_optimizer.step()
        if not callable(closure):
            raise TypeError(
                "closure: expected a function that runs forward and backward and returns the loss, since a step takes "
                f"several gradients; got {closure!r} (loops that call backward themselves: evaluations())"
            )
        if self.microbatches != 1:
            check_takes_evaluation(closure, self.microbatches)
        losses: list[Any] = []
        step = self._prepare(self.reuse_gradient)
        evaluations = self._evaluate(step)
        try:
            try:
                for evaluation in evaluations:
                    with torch.enable_grad():
                        value = closure(evaluation) if evaluation.microbatches > 1 else closure()
                    if value is None or (evaluation.microbatches > 1 and not isinstance(value, (Tensor, numbers.Real))):
                        raise _wrong_loss(value, evaluation)
                    if not (losses and evaluation.perturbed):
                        losses.append(value)
            finally:
                evaluations.close()
        finally:
            if self._open is step:  # an interrupt came while another was settled
                self._settle(step)
        return losses[0] if len(losses) == 1 else sum(losses) / len(losses)

    def _refuse_grad_scaler(self) -> None:
        if self.__dict__.pop("found_inf", None) is None:
            return
        self.grad_scale = 1.0  # GradScaler has written its own into it
        raise RuntimeError(
            "GradScaler.step(): expected step(closure), since a scaler looks for non-finite gradients before the "
            'closure computes them; set grad_scale and nonfinite="skip", and scale the loss in the closure'
        )

    def _creates_state(self) -> bool:
        """Whether this is how ``torch.distributed.checkpoint`` has an optimizer create its state: a step without a
        closure, with gradients of 0 and a learning rate of 0.
        """
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        still = all(group.get("lr", 0) == 0 for group in self.param_groups)
        return bool(grads) and still and self._open is None and not any(bool(g.any()) for g in grads)

    def evaluations(self, *, apply: bool = True) -> Iterator[Evaluation]:
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
        if self._open is None:
            raise RuntimeError("apply(): expected to be called within evaluations(apply=False), but no step is open")
        if not torch.compiler.is_compiling():  # compiled code reaches parameters as what they are
            self._open.check_applicable()
        with torch.no_grad():
            self._open.apply(evaluation)

    def ascent_step(self) -> None:
        """Ascend with the gradients that are there: the first half of an inner step of the 2k form.

        k pairs of ``ascent_step()`` and ``descent_step()``, each after a backward of its own, are one outer step; with
        microbatches so many for each of them in turn.
        Clearing gradients in between is up to the caller. Between the two the weights are perturbed: ``abort_step()``
        restores them.

        Raises:
            RuntimeError: ``descent_step()`` is due, there is no gradient, or a step of another form is open.
        """
        if self.ascent_gradient == "previous":
            raise RuntimeError(
                "ascent_step(): expected ascent_gradient='current', since it uses the gradients that are there, got "
                "'previous'; use step(closure) or evaluations()"
            )
        if self._open is None:
            step = self._prepare_with_hooks(reuse_gradient=False, by_halves=True)
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
        if self._open is None:
            self._run_post_hooks()

    def abort_step(self) -> None:
        """Abandon the open outer step: weights and base state become what they were before it. No-op without one."""
        if self._open is not None:
            self._settle(self._open)

    @property
    def evaluation(self) -> Evaluation | None:
        """The evaluation whose gradient the open step uses next; None between two steps."""
        return None if self._open is None else self._open.due

    def slow_weights(self) -> dict[Tensor, Tensor]:
        """Of each parameter that the open step has moved its slow weights, in the parameter's shape, in float32
        (float64 for float64 parameters): to be read only. Empty between two steps, where parameters are the slow ones.
        """
        return {} if self._open is None else self._open.slow_weights()


def _wrong_loss(value: Any, evaluation: Evaluation) -> TypeError:
    if value is None:
        return TypeError(f"closure: expected the loss to be returned, got None at evaluation {evaluation.index}")
    return TypeError(f"closure: expected a loss that a mean over microbatches can be taken of, got {value!r}")
