"""Lookbehind: the outer step as a loop over gradient evaluations."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from copy import copy, deepcopy
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from . import evaluations, kernels
from .arguments import (
    GIVEN,
    Settings,
    adaptive_by_tensor,
    check_grad_scale,
    check_group,
    check_parameters,
    check_settings,
    given_settings,
    layout,
    name_of,
)
from .base import GROUP_DEFAULTS, OwnStep, keep_when_loading, rule_of
from .buckets import Bucket, Gathered, Scalars
from .evaluations import Evaluation, StepPlan
from .kernels.reference import adaptive_alpha, finite, total_norm
from .running_stats import RunningStats, check_model

# Attributes of an open step and of what is rebuilt when needed: neither copied nor pickled.
TRANSIENT = {
    "_buckets": None,
    "_scalars": None,
    "_own_step": None,
    "_remaining": None,
    "_settings": None,
    "_tensors": None,
    "_state_ids": None,
    "_stats": None,
    "_lookahead": None,
}


class Lookbehind(Optimizer):
    r"""Lookbehind-SAM and Lookbehind-ASAM over a torch optimizer (Mordido et al., ICML 2024, algorithm 1).

    One outer step takes k ascent steps "behind" the weights and moves ``fast`` weights with the gradients found there,
    then interpolates (slow, fast and perturbed weights are the paper's :math:`\phi_t, \phi_{t,i}, \phi'_{t,i}`)::

        slow = fast = perturbed = params;  g = grad(perturbed)
        for i in 1..k:
            perturbed += rho * T^2 g / (||T g||_2 + 1e-16)       # T = 1, or |perturbed| + eta (adaptive)
            g = grad(perturbed)
            fast = base_optimizer(fast, g)
        params = slow + alpha * (fast - slow)

    The gradient that moved ``fast`` is the one that the next ascent needs, so a step costs k + 1 evaluations instead of
    2k, with the same trajectory wherever the forward pass is deterministic. With dropout the reused gradient carries
    the mask that it was computed with; BatchNorm's running buffers are updated k + 1 times instead of 2k.

    Example::

        optimizer = Lookbehind(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, k=2, alpha=0.5)

        def closure():
            loss = loss_fn(model(inputs), targets)
            loss.backward()
            return loss

        loss = optimizer.step(closure)

    Args:
        params: parameters, ``named_parameters()`` or parameter groups, as for any torch optimizer; None where
            ``base_optimizer`` is an instance. Dense real tensors of float64, float32, bfloat16 or float16. A group may
            have its own ``rho``, ``adaptive`` and ``eta``; its ``adaptive`` may be a list of bools, one for each of its
            parameters (``weight_scaling`` makes such a group from a module).
        base_optimizer: a torch optimizer class, built with ``base_kwargs``, or an instance, whose groups are shared.
            ``SGD``, ``Adam`` and ``AdamW`` are rules of the kernels; any other runs its own ``step()`` on the fast
            weights.
        rho: radius of one ascent step, >= 0, in units of the weights (adaptive: of the scaled weights).
        k: inner steps, >= 1. With ``k=1, alpha=1`` this is SAM (Foret et al. 2021).
        alpha: slow step size in (0, 1], or ``"adaptive"``: (cos(fast_1 - slow, fast_k - slow) + 1) / 2.
        alpha_scope: ``"global"``, one alpha* for the whole weight vector as the paper writes it, or ``"tensor"``, one
            for each parameter as the authors' code computes it. Without meaning for a static alpha.
        rho_scope: ``"step"``: rho is the radius of each ascent step; ``"total"``: each of the k has the radius rho / k,
            so that the perturbed weights stay within rho of the slow ones (with ``alpha=1`` the variant "stay within
            rho" of the paper, which does not interpolate).
        adaptive: ASAM's scaling T of the ascent (Kwon et al. 2021).
        eta: ASAM's stabilizer, >= 0; not the learning rate.
        reuse_gradient: False evaluates 2k gradients; needed where the minibatch is switched inside the step.
        ascent_gradient: ``"previous"`` ascends first with the gradient of the last descent, that of the step before,
            and then with that of each inner step, whatever the minibatch: every minibatch costs one evaluation, k a
            step, as with k steps of SGD. That is not the paper's algorithm, whose ascent follows the gradient of the
            minibatch at hand; the first step of all does not ascend before its first evaluation. Takes a copy of the
            gradients from step to step; ``ascent_step()`` and ``descent_step()`` have no meaning with it. In this
            project's comparison (README) it gains a part of what SAM gains for k = 1, and nothing for k = 2.
        microbatches: m > 1: m-SAM (Foret et al. 2021, section 3). Each of m equal parts of the minibatch ascends by its
            own gradients; the i-th descent uses the mean of the gradients that they have found at their i-th points.
            m (k + 1) evaluations of a part each; the closure is called with the ``Evaluation``, whose ``part(batch)``
            is its microbatch. Takes k more copies of the model. A tensor that an evaluation does not reach counts with
            a gradient of 0 there.
        max_grad_norm: the descent multiplies its gradient by ``min(1, max_grad_norm / (||g||_2 + 1e-6))``, the norm
            running over all parameters (as ``torch.nn.utils.clip_grad_norm_``); None does not clip. The ascent has no
            use for it.
        nonfinite: ``"propagate"``, or ``"skip"``: where the norm of a gradient is inf or NaN, the descent and the
            ascent of that evaluation move nothing, neither weights nor state; ``diagnostics["skipped"]`` counts them.
            With microbatches it counts as 0 in the mean, and the descent goes on with that.
            It is decided where the tensors are, without a wait (but for base optimizers that run their own step), and
            costs a pass over the gradients at evaluation k and a buffer of fast weights for k = 2.
        grad_scale: what the loss was multiplied by before backward: a number > 0, or a tensor of one element, which is
            read where it is, at the start of a step. The descent and ``max_grad_norm`` see the gradient divided by it;
            the ascent is free of it.
        running_stats_at_slow: the model, or None: BatchNorm's running statistics are those of the evaluations at the
            slow weights; what perturbed ones have done to them is undone (``running_stats.running_stats_at_slow``).
        backend: ``"auto"`` (the fastest that there is for the device), ``"native"`` (C++, for CPUs), ``"triton"`` (for
            GPUs), ``"cuda"`` (compiled, for CUDA GPUs) or ``"reference"`` (plain PyTorch).
        **base_kwargs: arguments of the class ``base_optimizer``.

    For bf16 and fp16 parameters the slow, fast and perturbed weights and the base's state are kept in float32 during
    the step; the parameters are their rounded image.

    Raises:
        TypeError: an argument has a type that cannot mean anything here.
        ValueError: an argument or a parameter is not acceptable; the message names it, what was expected and what came.
    """

    def __init__(
        self,
        params: ParamsT | None,
        base_optimizer: type[Optimizer] | Optimizer,
        *,
        rho: float = GROUP_DEFAULTS["rho"],
        k: int = 2,
        alpha: float | str = 0.5,
        alpha_scope: str = "global",
        rho_scope: str = "step",
        adaptive: bool = GROUP_DEFAULTS["adaptive"],
        eta: float = GROUP_DEFAULTS["eta"],
        reuse_gradient: bool = True,
        ascent_gradient: str = "current",
        microbatches: int = 1,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
        grad_scale: float | Tensor = 1.0,
        running_stats_at_slow: nn.Module | None = None,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        group_defaults = {"rho": rho, "adaptive": adaptive, "eta": eta}
        check_group(group_defaults)
        given = {
            **{"k": k, "alpha": alpha, "alpha_scope": alpha_scope, "rho_scope": rho_scope},
            **{"max_grad_norm": max_grad_norm, "nonfinite": nonfinite, "microbatches": microbatches},
            **{"ascent_gradient": ascent_gradient, "reuse_gradient": reuse_gradient},
        }
        check_settings(**given)
        check_grad_scale(grad_scale)
        if running_stats_at_slow is not None:
            check_model(running_stats_at_slow)
        _check_stats(running_stats_at_slow, ascent_gradient)
        kernels.resolve(backend)
        base = _build_base(params, base_optimizer, base_kwargs)
        check_parameters(*params_and_names(base.param_groups))
        for number, group in enumerate(base.param_groups):
            check_group({**group_defaults, **group}, f"param_groups[{number}]")
        # From here on nothing fails: an instance handed in is changed only if everything about it is acceptable.
        for group in base.param_groups:
            for key, value in group_defaults.items():
                group.setdefault(key, value)
        self.__setstate__(
            {
                "base_optimizer": base,
                "defaults": {**base.defaults, **group_defaults},
                **given,
                "grad_scale": grad_scale,
                "running_stats_at_slow": running_stats_at_slow,
                "backend": backend,
                "_previous": {},
            }
        )

    # GradScaler then says so when it calls step(), which raises: unscaled behind our back the gradients would be wrong.
    _step_supports_amp_scaling = True

    # ---- one optimizer with its base ----

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base optimizer's own parameter groups."""
        return self.base_optimizer.param_groups

    @property
    def state(self) -> dict[Tensor, Any]:  # type: ignore[override]
        """The base optimizer's own state."""
        return self.base_optimizer.state

    def __repr__(self) -> str:
        settings = ", ".join(
            f"{name}={getattr(self, name)!r}" for name in ("k", "alpha", "alpha_scope", "reuse_gradient")
        )
        base = type(self.base_optimizer).__name__
        return super().__repr__().replace("(", f"({base}, {settings}", 1)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its own ``rho``, ``adaptive`` and ``eta`` are optional.

        Raises:
            RuntimeError: an outer step is open.
            ValueError: as for the constructor; the groups are as before.
        """
        self.require_closed("add_param_group()")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: expected a dict, got {type(param_group).__name__}")
        own = {name: param_group.get(name, self.defaults[name]) for name in GROUP_DEFAULTS}
        where = f"param_groups[{len(self.param_groups)}]"
        check_group({**own, "adaptive": False}, where)
        self.base_optimizer.add_param_group(param_group)
        try:
            check_group({**own, "params": self.param_groups[-1]["params"]}, where)
            check_parameters(*params_and_names(self.param_groups))
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.param_groups[-1].update(own)

    # ---- the outer step, in three forms ----

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

        Whatever is raised, by the closure or here, the weights and the base optimizer's state are as they were before
        (but for an interrupt by a signal in the middle of a pass).
        """
        self._refuse_grad_scaler()
        if not callable(closure):
            raise TypeError(
                "closure: expected a function that runs forward and backward and returns the loss, since a step takes "
                f"several gradients; got {closure!r} (loops that call backward themselves: evaluations())"
            )
        if self.microbatches != 1:
            _check_takes_evaluation(closure, self.microbatches)
        losses = []
        with closing(self._outer_step()) as evaluations:
            for evaluation in evaluations:
                with torch.enable_grad():
                    value = closure(evaluation) if evaluation.microbatches > 1 else closure()
                if value is None:
                    raise TypeError(
                        f"closure: expected the loss to be returned, got None at evaluation {evaluation.index}"
                    )
                if self.microbatches > 1 and not isinstance(value, (Tensor, numbers.Real)):
                    raise TypeError(
                        f"closure: expected a loss that a mean over microbatches can be taken of, got {value!r}"
                    )
                if not (losses and evaluation.perturbed):
                    losses.append(value)
        return losses[0] if len(losses) == 1 else sum(losses) / len(losses)

    def _refuse_grad_scaler(self) -> None:
        if self.__dict__.pop("found_inf", None) is not None:
            self.grad_scale = 1.0  # GradScaler has written its own into it
            raise RuntimeError(
                "GradScaler.step(): expected step(closure), since a scaler looks for non-finite gradients before the "
                'closure computes them; set grad_scale and nonfinite="skip", and scale the loss in the closure'
            )

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
        self._run_pre_hooks()
        yield from self._outer_step(apply)
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
        if self._remaining is None:
            raise RuntimeError("apply(): expected to be called within evaluations(apply=False), but no step is open")
        if not torch.compiler.is_compiling():  # compiled code reaches parameters as what they are
            for bucket in self._buckets:
                bucket.require_unmoved()
        with torch.no_grad():
            self._run_passes(evaluation, [bucket.gather() for bucket in self._buckets])

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
        if self._remaining is None:
            self._run_pre_hooks()
            self._begin(list(self._plan(reuse_gradient=False).evaluations))
        self._half_step("ascent_step()", "descent_step()", ascends=True)

    def descent_step(self) -> None:
        """Move the fast weights with the gradients that are there: the second half of an inner step of the 2k form.

        After the k-th the outer step is complete and the weights are no longer perturbed.

        Raises:
            RuntimeError: ``ascent_step()`` is due, there is no gradient, or a step of another form is open.
        """
        self._half_step("descent_step()", "ascent_step()", ascends=False)
        if self._remaining is None:
            self._run_post_hooks()

    @torch.no_grad()
    def abort_step(self) -> None:
        """Abandon the open outer step: weights and base state become what they were before it. No-op without one."""
        if self._remaining is None:
            return
        self._remaining = None
        self._completed = False
        for bucket in self._buckets:
            bucket.restore()
        self._own_step.restore()
        if self._stats is not None:
            self._stats.abandon()

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Figures of the last outer step, as tensors on the parameters' device; reading them waits for nothing.

        ``grad_norm``: 0-dim float64, the L2 norm of the gradient of evaluation 0, over all parameters, divided by
        ``grad_scale``: at the slow weights; with microbatches that of the first; with ``ascent_gradient="previous"``
        that of the gradient which the step ascended with first, 0 if there was none. ``skipped``: 0-dim int64, how many
        evaluations of the step were skipped (``nonfinite``). ``alpha``: 0-dim float64, the slow step size; with an
        adaptive alpha of scope "tensor" of shape (parameters,), in the order of the parameter groups, NaN for a
        parameter that took no part. Empty if there was no step or it was abandoned.
        """
        if not self._completed:
            return {}
        bucket = self._buckets[0]
        settings = bucket.settings
        sq_norms = self._scalars.sq_norms[bucket.device]
        grad_norm = total_norm(sq_norms[0], 1)
        if bucket.unscale is not None:
            grad_norm = grad_norm * bucket.unscale.to(bucket.device, non_blocking=True)
        skipped = torch.zeros((), dtype=torch.int64, device=bucket.device)
        if settings.skips:
            first = int(settings.ascent_gradient == "previous")  # its evaluation 0 was counted in the step before
            skipped = (~finite(torch.stack(sq_norms[first : self._evaluated]))).sum()
        if settings.alpha != "adaptive" or (settings.alpha_scope == "global" and not settings.aligns):
            alpha = torch.full((), settings.static_alpha, dtype=torch.float64, device=bucket.device)
        elif settings.alpha_scope == "global":
            alpha = adaptive_alpha(self._scalars.sums[bucket.device].sum(0))
        else:
            count = sum(len(group["params"]) for group in self.param_groups)
            alpha = torch.full((count,), float("nan"), dtype=torch.float64, device=bucket.device)
            for bucket in self._buckets:
                of_bucket = adaptive_alpha(bucket.sums) if settings.aligns else torch.ones(len(bucket.params)).double()
                alpha[bucket.indices] = of_bucket.to(alpha.device, non_blocking=True)
        return {"grad_norm": grad_norm, "alpha": alpha, "skipped": skipped}

    # ---- the loop ----

    def _plan(self, reuse_gradient: bool) -> StepPlan:
        """What one outer step evaluates."""
        return evaluations.lookbehind(self.k, reuse_gradient, self.microbatches)

    def _outer_step(self, apply: bool = True) -> Iterator[Evaluation]:
        plan = self._plan(self.reuse_gradient).evaluations
        this_step: list[Evaluation] = []
        self._begin(this_step)
        try:
            if not apply:
                for bucket in self._buckets:
                    bucket.keep_slow()
            if self.ascent_gradient == "previous":
                self._ascend_with_previous(plan[0])
                plan = plan[1:]
            for evaluation in plan:
                for p in self._tensors.tensors:
                    p.grad = None
                yield evaluation
                if self._remaining is not this_step:
                    raise RuntimeError(
                        f"evaluation {evaluation.index}: expected an open step, but abort_step() ended it"
                    )
                if apply:
                    self._use_gradients(evaluation)
                else:
                    self._record_applied(evaluation)
        finally:
            if self._remaining is this_step:
                self.abort_step()

    @torch.no_grad()
    def _ascend_with_previous(self, evaluation: Evaluation) -> None:
        """What follows evaluation 0, with the gradients of the step before in the place of new ones."""
        kept = self._previous.items()
        previous = {p: g if g.device == p.device else g.to(p.device) for p, g in kept if p.requires_grad}
        for bucket in self._buckets:
            self._scalars.sq_norms[bucket.device][evaluation.index].zero_()
        gathered = [bucket.gather(previous) for bucket in self._buckets]
        if any(of_bucket.rows for of_bucket in gathered):
            self._run_and_record(evaluation, gathered)

    def _half_step(self, name: str, other: str, *, ascends: bool) -> None:
        if not self._remaining:
            now = "no step is open" if self._remaining is None else "step(closure) or evaluations() is running"
            raise RuntimeError(f"{name}: expected after {other}, but {now}")
        evaluation = self._remaining[0]
        if evaluation.ascends != ascends:
            raise RuntimeError(
                f"{name}: expected {other} next, at inner step {evaluation.inner_step} of {self.k}; abort_step() "
                "abandons the step"
            )
        try:
            self._use_gradients(evaluation)
        except BaseException:
            self.abort_step()
            raise
        if self._remaining is not None:
            del self._remaining[0]

    def _begin(self, remaining: list[Evaluation]) -> None:
        """Open an outer step. ``remaining`` is what ascent_step() and descent_step() still have to do."""
        self.require_closed("a new step")
        if self._lookahead is not None:
            self._lookahead.before_step()
        self._prepare()
        self._remaining = remaining
        self._stats = RunningStats(self.running_stats_at_slow) if self.running_stats_at_slow is not None else None

    @torch.no_grad()
    def _use_gradients(self, evaluation: Evaluation) -> None:
        """What follows an evaluation: its norm, the descent and the ascent that use its gradient."""
        gathered = [bucket.collect(evaluation) for bucket in self._buckets]
        if not any([of_bucket.rows for of_bucket in gathered]):
            raise RuntimeError(
                f"evaluation {evaluation.index}: expected a backward that gives parameters their gradients, but none "
                "has one"
            )
        self._run_and_record(evaluation, gathered)

    def _run_and_record(self, evaluation: Evaluation, gathered: list[Gathered]) -> None:
        done: list[Bucket] = []
        if evaluation.closes and len(self._buckets) > 1:  # a bucket writes its state before the next one is refused
            for bucket, of_bucket in zip(self._buckets, gathered, strict=True):
                bucket.explain(of_bucket)
        try:
            self._run_passes(evaluation, gathered, done)
        except BaseException as error:
            for bucket, of_bucket in zip(self._buckets, gathered, strict=True):
                if bucket in done:
                    bucket.record(evaluation, of_bucket)
                elif isinstance(error, Exception):
                    bucket.explain(of_bucket)
            raise
        self._record(evaluation, gathered)

    def _record_applied(self, evaluation: Evaluation) -> None:
        gathered = [bucket.gather() for bucket in self._buckets]
        for bucket, of_bucket in zip(self._buckets, gathered, strict=True):
            for row in sorted(bucket.everyone - set(of_bucket.rows)):
                raise RuntimeError(f"{bucket.names[row]}: expected a gradient at every evaluation of apply(), got none")
        self._record(evaluation, gathered)

    def _record(self, evaluation: Evaluation, gathered: list[Gathered]) -> None:
        for bucket, of_bucket in zip(self._buckets, gathered, strict=True):
            bucket.record(evaluation, of_bucket)
        if self._stats is not None:
            (self._stats.restore if evaluation.perturbed else self._stats.keep)()
        if evaluation.closes:
            self._evaluated = evaluation.index + 1
            self._complete()

    def _run_passes(self, evaluation: Evaluation, gathered: list[Gathered], done: list[Bucket] | None = None) -> None:
        """The passes of an evaluation. Only tensors are written, so that it can be compiled; ``done`` gains the buckets
        whose perturbed weights have moved.
        """
        buckets, scalars, settings = self._buckets, self._scalars, self._settings
        own_step = evaluation.descends and self._own_step.needed
        pass_reduces = evaluation.ascends and scalars.alone and not own_step
        if (evaluation.ascends and not pass_reduces) or (settings.descents_need_norms and not evaluation.ascends):
            for bucket, of_bucket in zip(buckets, gathered, strict=True):
                bucket.reduce_sq_norm(evaluation, scalars, of_bucket)
            scalars.share_sq_norms(evaluation.index)
        if evaluation.gathers:
            for bucket, of_bucket in zip(buckets, gathered, strict=True):
                bucket.accumulate(evaluation, scalars, of_bucket)
                if done is not None:
                    done.append(bucket)
        if evaluation.returns:
            for bucket in buckets:
                bucket.return_to_slow()
        for descent in evaluation.then:
            self._run_passes(descent, [bucket.mean(descent.mean) for bucket in buckets])
        if evaluation.gathers:
            return
        if own_step:
            self._run_own_step(evaluation, gathered)
        if not evaluation.descends:
            use = Bucket.ascend
        elif evaluation.ascends:
            use = Bucket.descend_ascend
        elif not evaluation.last:
            use = Bucket.descend
        else:
            use = Bucket.descend_align if settings.aligns else Bucket.descend_interpolate
        for bucket, of_bucket in zip(buckets, gathered, strict=True):
            use(bucket, evaluation, scalars, of_bucket)
            if done is not None:
                done.append(bucket)
        if use is Bucket.descend_align:
            scalars.share_sums()
            for bucket, of_bucket in zip(buckets, gathered, strict=True):
                bucket.interpolate(scalars, of_bucket)

    def _run_own_step(self, evaluation: Evaluation, gathered: list[Gathered]) -> None:
        if evaluation.first:
            self._own_step.remember()
        pairs = list(zip(self._buckets, gathered, strict=True))
        staged = [bucket.stage(evaluation, self._scalars, of_bucket) for bucket, of_bucket in pairs]
        device = self._buckets[0].device
        if not self._settings.skips or bool(finite(self._scalars.sq_norms[device][evaluation.index])):
            self._own_step.step(chain.from_iterable(staged))
        for bucket, of_bucket in pairs:
            bucket.unstage(evaluation, of_bucket)

    def _complete(self) -> None:
        if self.ascent_gradient == "previous":
            self._keep_gradients()
        elif self._previous:
            self._previous = {}
        for bucket in self._buckets:
            bucket.close()
        self._own_step.forget()
        self._remaining = None
        self._completed = True
        self._opt_called = self.base_optimizer._opt_called = True  # LR schedulers look for it
        if self._lookahead is not None:
            self._lookahead.after_step()

    @torch.no_grad()
    def _keep_gradients(self) -> None:
        """For the next step, which ascends with those of this one."""
        grads = {p: p.grad for bucket in self._buckets for p in bucket.params if p.grad is not None}
        kept = {p: self._previous.get(p) for p in grads}
        for p, g in grads.items():
            if kept[p] is None or layout(kept[p]) != layout(g):
                kept[p] = torch.empty_like(g)
        torch._foreach_copy_([*kept.values()], [*grads.values()])
        self._previous = kept

    # ---- before a step ----

    def _prepare(self) -> None:
        """Bring buckets and settings up to date with everything that may have been changed between two steps."""
        settings = self._read_settings()
        base = self.base_optimizer
        if rule_of(base).name != "none" and (base._optimizer_step_pre_hooks or base._optimizer_step_post_hooks):
            raise RuntimeError(
                f"base_optimizer: its step() is never called, since {type(base).__name__} is fused, so its step hooks "
                "would not run; expected none, register them on Lookbehind"
            )
        tensors = list(chain.from_iterable([group["params"] for group in self.param_groups]))
        changed = self._tensors is None or not self._tensors.are(tensors, self.param_groups)
        if changed:
            for group in self.param_groups:
                for name in GROUP_DEFAULTS:
                    group.setdefault(name, self.defaults[name])
            for number, group in enumerate(self.param_groups):
                check_group(group, f"param_groups[{number}]")
            if not self._buckets_fit(tensors):
                self._build_buckets()
        if settings is not self._settings:
            norms = self._plan(reuse_gradient=False).norms
            if norms > self._scalars.evaluations:
                self._scalars, self._completed = Scalars(self._buckets, norms), False
        state_changed = self._ids_of_state() != self._state_ids
        for bucket in self._buckets:
            bucket.open(settings, self.grad_scale, state_changed, changed)
        if state_changed:
            self._state_ids = self._ids_of_state()
        self._settings = settings
        if changed:
            self._tensors = Seen(tensors, self.param_groups, self._buckets)

    def _read_settings(self) -> Settings:
        check_grad_scale(self.grad_scale)
        given = given_settings(self)
        if self._settings is None or given != self._settings[: len(GIVEN)]:
            check_settings(*given)
        if self.running_stats_at_slow is not None:
            _check_stats(self.running_stats_at_slow, self.ascent_gradient)
        plan = self._plan(self.reuse_gradient)
        settings = (*given, plan.descents, plan.means, plan.gathered)
        return self._settings if settings == self._settings else Settings(*settings)

    def _ids_of_state(self) -> list[int]:
        """The identity of every value in the base's state: what was replaced, loaded, added or removed shows here."""
        return [*map(id, chain.from_iterable(map(dict.values, self.base_optimizer.state.values())))]

    def _buckets_fit(self, tensors: list[Tensor]) -> bool:
        """Whether the buckets still hold the tensors that can have a gradient, in their groups and memory layouts, and
        whether their ascents are still to be scaled or not.
        """
        if self._buckets is None:
            return False
        same_layout = all([bucket.same_layout(tensors) for bucket in self._buckets])
        groups = {id(group) for group in self.param_groups}
        held = {id(p) for bucket in self._buckets for p in bucket.params if id(bucket.group) in groups}
        trained = {id(p) for p in tensors if self._takes_part(p)}
        adaptive = list(chain.from_iterable(map(adaptive_by_tensor, self.param_groups)))
        return (
            same_layout
            and trained <= held
            and all(id(bucket.group) in groups for bucket in self._buckets)
            and all(adaptive[index] == bucket.adaptive for bucket in self._buckets for index in bucket.indices)
        )

    def _takes_part(self, p: Tensor) -> bool:
        return p.requires_grad or p.grad is not None

    def _build_buckets(self) -> None:
        members: dict[tuple, list[tuple[int, str, Tensor]]] = {}
        params, names = params_and_names(self.param_groups)
        check_parameters(params, names)
        indexed = iter(zip(range(len(params)), names, params, strict=True))
        for number, group in enumerate(self.param_groups):
            for adaptive in adaptive_by_tensor(group):
                index, name, p = next(indexed)
                if self._takes_part(p):
                    members.setdefault((number, p.device, p.dtype, adaptive), []).append((index, name, p))
        if not members:
            raise RuntimeError("no parameter requires a gradient: expected at least one")
        rule = rule_of(self.base_optimizer)
        self._buckets = []
        for (number, device, _, adaptive), tensors in members.items():
            indices, of_bucket, held = map(list, zip(*tensors, strict=True))
            group, backend = self.param_groups[number], kernels.resolve(self.backend, device)
            position = len(self._buckets)
            self._buckets.append(
                Bucket(
                    *(position, indices, of_bucket, held, f"param_groups[{number}]"),
                    *(group, adaptive, self.base_optimizer, rule, backend),
                )
            )
        self._scalars = Scalars(self._buckets, self._plan(reuse_gradient=False).norms)
        self._own_step = OwnStep(self.base_optimizer)
        self._state_ids = None
        self._completed = False

    def require_closed(self, what: str) -> None:
        """Refuse to do ``what`` while the weights are perturbed.

        Raises:
            RuntimeError: an outer step is open.
        """
        if self._remaining is not None:
            raise RuntimeError(
                f"{what}: expected no open step, but the weights are those of an evaluation; complete the step, or "
                "restore them with abort_step()"
            )

    # ---- hooks: torch runs them around step(); the other forms of a step run them here ----

    def _run_pre_hooks(self) -> None:
        for hook in chain(_global_optimizer_pre_hooks.values(), self._optimizer_step_pre_hooks.values()):
            hook(self, (), {})

    def _run_post_hooks(self) -> None:
        for hook in chain(self._optimizer_step_post_hooks.values(), _global_optimizer_post_hooks.values()):
            hook(self, (), {})

    # ---- saving and loading ----

    def state_dict(self) -> dict[str, Any]:
        """What the base optimizer's ``state_dict()`` is, and under ``"lookbehind"`` what it belongs to.

        Raises:
            RuntimeError: an outer step is open, so that the weights are perturbed.
        """
        self.require_closed("state_dict()")
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            group["adaptive"] = copy(group["adaptive"])  # a list may be changed in place
        state_dict["lookbehind"] = {
            "k": self.k,
            "base_optimizer": type(self.base_optimizer).__name__,
            "shapes": [list(p.shape) for p in params_and_names(self.param_groups)[0]],
        }
        if self._previous:
            params, _ = params_and_names(self.param_groups)
            kept = [self._previous.get(p) for p in params]
            state_dict["lookbehind"]["previous"] = [None if g is None else g.clone() for g in kept]
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what ``state_dict()`` returned, or a state dict of the base optimizer alone.

        Raises:
            RuntimeError: an outer step is open.
            ValueError: it is of another k, model or base optimizer; nothing is changed.
        """
        self.require_closed("load_state_dict()")
        if not isinstance(state_dict, dict):
            raise ValueError(f"state_dict: expected a dict as state_dict() returns, got {state_dict!r}")
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        self._check_loadable(state_dict)
        self.base_optimizer.load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        params, _ = params_and_names(self.param_groups)
        previous = state_dict.get("lookbehind", {}).get("previous", [None] * len(params))
        pairs = [(p, g) for p, g in zip(params, previous, strict=True) if g is not None]
        self._previous = {p: g.detach().to(p.device, p.dtype, copy=True) for p, g in pairs}
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _check_loadable(self, state_dict: dict[str, Any]) -> None:
        for key, kind in (("state", dict), ("param_groups", list), ("lookbehind", dict)):
            value = state_dict.get(key, {} if key == "lookbehind" else None)
            if not isinstance(value, kind):
                raise ValueError(f"state_dict: expected a {kind.__name__} under {key!r}, got {value!r}")
        params, names = params_and_names(self.param_groups)
        saved = state_dict.get("lookbehind", {})
        expected = {"k": self.k, "base_optimizer": type(self.base_optimizer).__name__}
        for key, value in expected.items():
            if saved.get(key, value) != value:
                raise ValueError(f"state_dict: expected {key} {value!r}, got {saved[key]!r}")
        sizes = [len(group["params"]) for group in self.param_groups]
        saved_sizes = [len(group["params"]) for group in state_dict["param_groups"]]
        if saved_sizes != sizes:
            raise ValueError(f"state_dict: expected groups of {sizes} parameters, got {saved_sizes}")
        for name, p, shape in zip(names, params, saved.get("shapes", [p.shape for p in params]), strict=True):
            if tuple(shape) != tuple(p.shape):
                raise ValueError(f"state_dict: {name}: expected shape {tuple(p.shape)}, got {tuple(shape)}")
        previous = saved.get("previous", [None] * len(params))
        found, shapes = [None if g is None else tuple(g.shape) for g in previous], [tuple(p.shape) for p in params]
        if len(found) != len(shapes) or any(f not in (None, s) for f, s in zip(found, shapes, strict=True)):
            raise ValueError(f"state_dict: expected previous gradients of shapes {shapes}, got {found}")
        for number, group in enumerate(state_dict["param_groups"]):
            check_group({**self.param_groups[number], **group}, f"state_dict: param_groups[{number}]")
        self._check_loadable_state(state_dict, params, names)

    def _check_loadable_state(self, state_dict: dict[str, Any], params: list[Tensor], names: list[str]) -> None:
        rule = rule_of(self.base_optimizer)
        if rule.name == "none":
            return
        saved_groups = state_dict["param_groups"]
        ids = [(group, saved_id) for group in saved_groups for saved_id in group["params"]]
        for (group, saved_id), p, name in zip(ids, params, names, strict=True):
            try:
                rule.hyper(group)
                wanted = rule.state(group)
            except KeyError as missing:
                base = type(self.base_optimizer).__name__
                raise ValueError(
                    f"state_dict: expected param_groups of {base} with {missing}, got {sorted(group)}"
                ) from None
            entry = state_dict["state"].get(saved_id) or {}
            for key in wanted if entry else ():
                shape = tuple(entry[key].shape) if isinstance(entry.get(key), Tensor) else None
                if shape != tuple(p.shape) and not (key in entry and entry[key] is None):
                    came = f"shape {shape}" if shape is not None else f"the entries {sorted(entry)}"
                    raise ValueError(f"state_dict: {name}: expected {key!r} of shape {tuple(p.shape)}, got {came}")

    def __getstate__(self) -> dict[str, Any]:
        self.require_closed("copying or pickling the optimizer")
        kept = ("base_optimizer", "defaults", *GIVEN, "grad_scale", "running_stats_at_slow", "backend", "_previous")
        return {name: self.__dict__[name] for name in kept}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__({**state, **TRANSIENT, "_completed": False})
        keep_when_loading(self.base_optimizer)


class Seen:
    """What the parameters were when a step began: a quick check whether anything about them has changed since."""

    def __init__(self, tensors: list[Tensor], groups: list[dict[str, Any]], buckets: list[Bucket]) -> None:
        self.tensors = tensors
        self.ids = [*map(id, tensors)]
        self.groups = [*map(id, groups)]
        self.adaptive = deepcopy([group["adaptive"] for group in groups])  # a list may be changed in place
        self.addresses = [*map(Tensor.data_ptr, tensors)]
        self.strides = [*map(Tensor.stride, tensors)]
        held = {id(p) for bucket in buckets for p in bucket.params}
        self.others = [p for p in tensors if id(p) not in held]

    def are(self, tensors: list[Tensor], groups: list[dict[str, Any]]) -> bool:
        """Whether these are the same tensors at the same addresses, and none without a bucket has come to need one.

        The same address means the same dtype and device. Another shape shows in the strides, or else in the gradients.
        """
        return (
            [*map(id, tensors)] == self.ids
            and [*map(id, groups)] == self.groups
            and [group.get("adaptive") for group in groups] == self.adaptive
            and [*map(Tensor.data_ptr, tensors)] == self.addresses
            and [*map(Tensor.stride, tensors)] == self.strides
            and not any([p.requires_grad or p.grad is not None for p in self.others])
        )


# ---- arguments -------------------------------------------------------------------------------------------------------


def _check_takes_evaluation(closure: Callable[..., Any], microbatches: int) -> None:
    try:
        inspect.signature(closure).bind(None)
    except TypeError:
        raise TypeError(
            f"closure: expected a function of the Evaluation, since microbatches is {microbatches!r}: "
            f"evaluation.part(batch) is what it is to see; got {closure!r}, which does not take it"
        ) from None
    except ValueError:  # a builtin, of which nothing is known
        return


def _check_stats(model: nn.Module | None, ascent_gradient: str) -> None:
    if model is not None and ascent_gradient == "previous":
        raise ValueError(
            "running_stats_at_slow: expected None with ascent_gradient='previous', which evaluates nothing at the slow "
            f"weights, got {type(model).__name__}"
        )


def _build_base(params: ParamsT | None, base_optimizer: Any, base_kwargs: dict[str, Any]) -> Optimizer:
    if isinstance(base_optimizer, Optimizer):
        base = _given_base(params, base_optimizer, base_kwargs)
    elif isinstance(base_optimizer, type) and issubclass(base_optimizer, Optimizer) and base_optimizer is not Optimizer:
        if not isinstance(params, Iterable):
            raise TypeError(f"params: expected parameters, such as model.parameters(), got {params!r}")
        base = base_optimizer(params, **base_kwargs)
    else:
        raise TypeError(f"base_optimizer: expected a torch optimizer class or instance, got {base_optimizer!r}")
    name = type(base).__name__
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if isinstance(base, Lookbehind) or (closure is not None and closure.default is inspect.Parameter.empty):
        raise ValueError(f"base_optimizer: expected one whose step() needs no closure, got {name}")
    if any(group.get("differentiable") for group in base.param_groups):
        raise ValueError(f"base_optimizer: expected differentiable=False, got {name} with differentiable=True")
    return base


def _given_base(params: ParamsT | None, base: Optimizer, base_kwargs: dict[str, Any]) -> Optimizer:
    if base_kwargs:
        raise TypeError(
            f"{', '.join(base_kwargs)}: expected only with a class as base_optimizer, got an instance of "
            f"{type(base).__name__}"
        )
    if params is not None:
        given = [p for group in Optimizer(params, {}).param_groups for p in group["params"]]
        held = [p for group in base.param_groups for p in group["params"]]
        if [id(p) for p in given] != [id(p) for p in held]:
            raise ValueError(
                f"params: expected None or the {len(held)} parameters of the given base_optimizer, got {len(given)} "
                "others"
            )
    return base


def params_and_names(groups: list[dict[str, Any]]) -> tuple[list[Tensor], list[str]]:
    """All parameters of an optimizer in the order of its groups, and what each is called in messages."""
    params, names = [], []
    for group in groups:
        known = group.get("param_names") or [None] * len(group["params"])
        for p, name in zip(group["params"], known, strict=True):
            names.append(name_of(len(params), name, p))
            params.append(p)
    return params, names
