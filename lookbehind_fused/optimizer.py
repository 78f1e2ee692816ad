"""Lookbehind: the outer step as a loop over gradient evaluations."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, overload

from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from . import elsewhere, kernels
from .arguments import (
    ASCENT,
    GROUP_DEFAULTS,
    Keys,
    build_base,
    check_closure,
    check_group,
    check_loss_scale,
    check_stats,
    own_by_key,
)
from .diagnostics import figures
from .forms import Forms
from .parts.buffers import check_model
from .parts.local_ascents import LocalAscents
from .parts.scaling import check_scaler
from .program import Program, lookbehind
from .report import described, memory_of
from .tensors import check_added, check_parameters, params_and_names

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .signatures import OfLookbehind


class Lookbehind(Forms):
    """Lookbehind-SAM and Lookbehind-ASAM over a torch optimizer (Mordido et al., ICML 2024, algorithm 1).

    One outer step takes k ascent steps "behind" the weights and moves ``fast`` weights with the gradients found there,
    then interpolates (slow, fast and perturbed weights are the paper's phi_t, phi_{t,i}, phi'_{t,i})::

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
            ``base_optimizer`` is an instance. Dense real tensors of float64, float32, bfloat16 or float16, or DTensors
            of such, as FSDP2 (``fully_shard``) and tensor parallelism make them (``lookbehind_fused.shards``): every
            rank then takes the same steps, in the same order. A group may have its own ``rho``, ``adaptive`` and
            ``eta``; its ``adaptive`` may be a list of bools, one for each of its parameters (``weight_scaling`` makes
            such a group from a module).
        base_optimizer: a torch optimizer class, built with ``base_kwargs``, or an instance, whose groups are shared.
            ``SGD``, ``Adam`` and ``AdamW`` are rules of the kernels; any other runs its own ``step()`` on the fast
            weights.
        rho: radius of one ascent step, >= 0, in units of the weights (adaptive: of the scaled weights). None, here and
            for adaptive and eta: what the groups of an instance already have, else 0.05, False, 0.01.
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
            minibatch at hand, but the stale ascent of AsyncSAM (Jo, Lim, Lee 2025, arXiv 2503.11147) with a delay of
            one step; the first step of all does not ascend before its first evaluation. Takes a copy of the gradients
            from step to step; ``ascent_step()`` and ``descent_step()`` have no meaning with it. In this project's
            comparison (benchmarks/results/compare.md) it gains a part of what SAM gains for k = 1, nothing for k = 2.
        microbatches: m > 1: m-SAM (Foret et al. 2021, section 3). Each of m equal parts of the minibatch ascends by its
            own gradients; the i-th descent uses the mean of the gradients that they have found at their i-th points.
            m (k + 1) evaluations of a part each; the closure is called with the ``Evaluation``, whose ``part(batch)``
            is its microbatch. Takes k more copies of the model. A tensor that an evaluation does not reach counts with
            a gradient of 0 there.
        max_grad_norm: the descent multiplies its gradient by ``min(1, max_grad_norm / (||g||_2 + 1e-6))``, the norm
            running over all parameters (as ``torch.nn.utils.clip_grad_norm_``); None does not clip. The ascent has no
            use for it.
        nonfinite: ``"propagate"``, or ``"skip"``: where the norm of a gradient is inf or NaN at any evaluation, the
            whole outer step is undone: weights, the base's state, ``buffers_at_slow``, ``Lookahead``'s count. ``.grad``
            is then None and ``diagnostics["skipped"]`` 1. On CPUs, and for bases that run their own step, the
            evaluations that remain are not run. On GPUs it is decided without a wait, and ``.grad`` is None after every
            step. Costs a pass over the gradients at evaluation k, two small launches on GPUs, ``fast`` for k = 2.
        scaler: the ``torch.amp.GradScaler`` by which the closure scales its losses. Its scale is read at the start of a
            step and holds for it: the descent and ``max_grad_norm`` see gradients divided by it, the ascent is free of
            it. A gradient that overflows at any evaluation undoes the whole outer step, as ``nonfinite="skip"`` does;
            the scaler hears of it, once a step, and ``scaler.update()`` is due after each. A disabled scaler is none.
            Whether ``scaler.step(optimizer, closure)`` or ``optimizer.step(closure)`` is written makes no difference;
            ``scaler.unscale_(optimizer)`` is for given gradients alone (``closure``).
        loss_scale: what the loss is multiplied by before backward where no scaler does it: a number > 0, or a tensor of
            one element, which is read where it is, at the start of a step.
        closure: runs forward and backward for the evaluations after the first, where ``step()`` is called without one:
            evaluation 0 is then the gradients that are there. In a loop that accumulates it runs all microbatches of
            the step. It may be set at any time: ``optimizer.closure = function``.
        same_randomness: every evaluation of a step begins with torch's random states, of the CPU and the devices, with
            which evaluation 0 has begun: dropout masks and torch's augmentation inside the closure are the same ones,
            so that a reused gradient is exactly the one that would be evaluated again. Not with given gradients.
        ascents: under DistributedDataParallel. ``"synced"``: every gradient is the mean over ranks. ``"local"``: each
            rank ascends with its own gradient, and descends with the mean of what ranks have found at their points:
            m-sharpness with the ranks' minibatches as its parts (``microbatches``). ``model`` is then the
            DistributedDataParallel module, which averages the last gradient of a step alone; the means of those
            between are reduced while the next evaluation runs (``parts.local_ascents``). Takes a copy of the model for
            k > 1; with ``step(closure)`` and ``evaluations()`` only.
        ascent_fraction: in (0, 1]. Less than 1: a gradient that is for an ascent alone is one of the first part of the
            minibatch (Bahri, Mobahi, Tay 2021, arXiv 2110.08529, who take a quarter; K-SAM, arXiv 2210.12864, and ESAM,
            arXiv 2110.03141, choose examples by their losses instead): of n examples ``ascent_fraction`` * n, rounded
            to the nearest whole number (a half to the even one), at least one. The closure is called with the
            ``Evaluation``, whose ``part(batch)`` is that part, or the whole batch where the gradient is descended with;
            the loss returned, and the buffers of ``buffers_at_slow``, are those of the part. In gradients of a whole
            minibatch SAM then costs 1 + ``ascent_fraction`` a step, Lookbehind k + ``ascent_fraction``: its later
            ascents follow the gradients of its descents. Without that reuse all k ascents are by parts, at
            k (1 + ``ascent_fraction``), along another trajectory; ``MultistepSAM`` costs 1 + k ``ascent_fraction``,
            and k + ``ascent_fraction`` with ``average``. The fewer the examples, the larger the best rho (docs). Not
            with ``microbatches``, ``ascent_gradient="previous"``, given gradients, or ``ascent_step()``, whose caller
            takes a part of the minibatch itself.
        buffers_at_slow: the model, or None: its buffers (BatchNorm's running statistics and whatever else a forward
            pass changes) are those of the evaluations at the slow weights; what perturbed ones have done to them is
            undone (``lookbehind_fused.buffers_at_slow``). ``running_stats_at_slow`` is the name that it had.
        model: the module whose parameters are optimized, or None. Where FSDP2 keeps gathered weights
            (``set_reshard_after_backward(False)``), those of this module are let go whenever parameters have been
            written, so that the next forward pass sees what was; without it those of every module that has one of the
            parameters. ``register_weights_hook`` is for other caches.
        backend: ``"auto"`` (the fastest that there is for the device), ``"native"`` (C++, for CPUs), ``"triton"`` (for
            GPUs), ``"cuda"`` (compiled, for CUDA GPUs) or ``"reference"`` (plain PyTorch).
        **base_kwargs: arguments of the class ``base_optimizer``. Where that has a rho or eta of its own (Adadelta,
            LARS), those of the ascent are ``ascent_rho`` and ``ascent_eta``, here and in groups; ``rho`` and ``eta`` in
            groups are the base's.

    For bf16 and fp16 parameters the slow, fast and perturbed weights and the base's state are kept in float32 during
    the step; the parameters are their rounded image.

    Raises:
        TypeError: an argument has a type that cannot mean anything here.
        ValueError: an argument or a parameter is not acceptable; the message names it, what was expected and what came.
    """

    GROUP: ClassVar[dict[str, Any]] = GROUP_DEFAULTS
    """What a parameter group has, where nothing else is given, beside the base optimizer's own settings."""

    @overload
    def __init__(
        self,
        params: ParamsT,
        base_optimizer: type[Optimizer],
        *,
        rho: float | None = ...,
        k: int = ...,
        alpha: float | str = ...,
        alpha_scope: str = ...,
        rho_scope: str = ...,
        adaptive: bool | None = ...,
        eta: float | None = ...,
        reuse_gradient: bool = ...,
        ascent_gradient: str = ...,
        microbatches: int = ...,
        max_grad_norm: float | None = ...,
        nonfinite: str = ...,
        scaler: GradScaler | None = ...,
        loss_scale: float | Tensor = ...,
        closure: Callable[..., Any] | None = ...,
        same_randomness: bool = ...,
        ascents: str = ...,
        ascent_fraction: float = ...,
        buffers_at_slow: nn.Module | None = ...,
        model: nn.Module | None = ...,
        backend: str = ...,
        **base_kwargs: Any,
    ) -> None: ...

    @overload
    def __init__(self, params: ParamsT | None, base_optimizer: Optimizer, **settings: Unpack[OfLookbehind]) -> None: ...

    def __init__(
        self,
        params: ParamsT | None,
        base_optimizer: type[Optimizer] | Optimizer,
        *,
        rho: float | None = None,
        k: int = 2,
        alpha: float | str = 0.5,
        alpha_scope: str = "global",
        rho_scope: str = "step",
        adaptive: bool | None = None,
        eta: float | None = None,
        reuse_gradient: bool = True,
        ascent_gradient: str = "current",
        microbatches: int = 1,
        max_grad_norm: float | None = None,
        nonfinite: str = "propagate",
        scaler: GradScaler | None = None,
        loss_scale: float | Tensor = 1.0,
        closure: Callable[..., Any] | None = None,
        same_randomness: bool = False,
        ascents: str = "synced",
        ascent_fraction: float = 1.0,
        buffers_at_slow: nn.Module | None = None,
        model: nn.Module | None = None,
        backend: str = "auto",
        **base_kwargs: Any,
    ) -> None:
        own = {"rho": rho, "adaptive": adaptive, "eta": eta}
        own = {name: value for name, value in own.items() if value is not None}
        by_key = {key: base_kwargs.pop(key) for key in ASCENT if key in base_kwargs}
        check_group({**self.GROUP, **own})
        settings = {
            **{"k": k, "alpha": alpha, "alpha_scope": alpha_scope, "rho_scope": rho_scope},
            **{"max_grad_norm": max_grad_norm, "nonfinite": nonfinite, "microbatches": microbatches},
            **{"ascent_gradient": ascent_gradient, "reuse_gradient": reuse_gradient},
            **{"same_randomness": same_randomness, "ascents": ascents, "ascent_fraction": ascent_fraction},
        }
        settings |= {name: getattr(self, name) for name in self.SETTINGS if name not in settings}
        self.check_settings(settings)
        if "grad_scale" in base_kwargs:
            warnings.warn("grad_scale: loss_scale is its name now", DeprecationWarning, stacklevel=2)
            loss_scale = base_kwargs.pop("grad_scale")
        check_loss_scale(loss_scale)
        check_scaler(scaler)
        check_closure(closure)
        if "running_stats_at_slow" in base_kwargs:
            old_name = base_kwargs.pop("running_stats_at_slow")
            if None not in (buffers_at_slow, old_name):
                raise TypeError("running_stats_at_slow: expected buffers_at_slow alone, which it is an old name of")
            buffers_at_slow = old_name if buffers_at_slow is None else buffers_at_slow
        if buffers_at_slow is not None:
            check_model(buffers_at_slow)
        check_stats(buffers_at_slow, ascent_gradient)
        elsewhere.check_model(model)
        if ascents == "local":
            LocalAscents(model)
        kernels.resolve(backend)
        base = build_base(type(self), params, base_optimizer, base_kwargs)
        keys = Keys.of(base)
        own = own_by_key(keys, own, by_key, type(base).__name__)
        defaults = {**keys.named(self.GROUP), **own}
        check_group(defaults, keys=keys)
        check_parameters(*params_and_names(base.param_groups))
        if base is not base_optimizer:  # groups of its own keep their settings
            own = {}
        for number, group in enumerate(base.param_groups):
            check_group({**defaults, **group, **own}, f"param_groups[{number}]", keys)
        # From here on nothing fails: an instance handed in is changed only if everything about it is acceptable.
        for group in base.param_groups:
            group.update({**{name: group.get(name, value) for name, value in defaults.items()}, **own})
        self.__setstate__(
            {
                "base_optimizer": base,
                "defaults": {**base.defaults, **defaults},
                **settings,
                "loss_scale": loss_scale,
                "_scaler": scaler,
                "buffers_at_slow": buffers_at_slow,
                "model": model,
                "backend": backend,
            }
        )
        self.closure = closure

    @property
    def running_stats_at_slow(self) -> nn.Module | None:
        """An old name of ``buffers_at_slow``."""
        return self.buffers_at_slow

    @running_stats_at_slow.setter
    def running_stats_at_slow(self, value: nn.Module | None) -> None:
        self.buffers_at_slow = value

    # ---- one optimizer with its base ----

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base optimizer's own parameter groups."""
        return self.base_optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base_optimizer.param_groups = value

    @property
    def state(self) -> defaultdict[Tensor, Any]:
        """The base optimizer's own state."""
        return self.base_optimizer.state

    @state.setter
    def state(self, value: defaultdict[Tensor, Any]) -> None:
        self.require_closed("state")
        self.base_optimizer.state = value

    def __repr__(self) -> str:
        return described(self)

    def memory(self) -> dict[str, int]:
        """Bytes that the optimizer holds now, of this rank, by what they are for; empty before the first step.

        ``slow``, ``fast``, ``first``, ``perturbed``: flat buffers of the size of the parameters, as far as steps need
        them; ``state``: the base optimizer's own, which it would have by itself too; ``working state``: what inner
        steps advance in its place; ``means``: of gradients (microbatches, ``average``, local ascents); ``previous
        gradients`` (``ascent_gradient="previous"``); ``tables``: addresses, numbers and sums. Without parameters and
        gradients, and without what parts of a step copy while it is open: buffers of the model (``buffers_at_slow``),
        the state of a base that runs its own ``step()``.
        """
        return memory_of(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base optimizer; its own ``rho``, ``adaptive`` and ``eta`` are optional.

        Raises:
            RuntimeError: an outer step is open.
            ValueError: as for the constructor; the groups are as before.
        """
        self.require_closed("add_param_group()")
        if not isinstance(param_group, dict):
            raise TypeError(f"param_group: expected a dict, got {type(param_group).__name__}")
        keys = Keys.of(self.base_optimizer)
        own = {key: param_group.get(key, self.defaults[key]) for key in keys}
        where = f"param_groups[{len(self.param_groups)}]"
        check_group({**own, keys.adaptive: False}, where, keys)
        self.base_optimizer.add_param_group(param_group)
        try:
            check_group({**own, "params": self.param_groups[-1]["params"]}, where, keys)
            check_added(self.param_groups)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self.param_groups[-1].update(own)

    def program(self, reuse_gradient: bool) -> Program:
        """What one outer step does. A method of the family is another such function of its settings (``SETTINGS``)."""
        return lookbehind(self.k, reuse_gradient, self.microbatches, self.ascent_gradient == "previous")

    @property
    def diagnostics(self) -> dict[str, Tensor]:
        """Figures of the last outer step, as tensors on the parameters' device; reading them waits for nothing.

        ``grad_norm``: 0-dim float64, the L2 norm of the gradient of evaluation 0, over all parameters, divided by what
        the loss was scaled by: at the slow weights; with microbatches that of the first, with ``ascent_fraction`` that
        of the part; with ``ascent_gradient="previous"`` that of the gradient which the step ascended with first, 0 if
        there was none. ``skipped``: 0-dim int64, 1 if the step was undone (``nonfinite``, ``scaler``), else 0.
        ``alpha``: 0-dim float64, the slow step size; with an adaptive alpha of scope "tensor" of shape (parameters,),
        in the order of the parameter groups, NaN for a parameter that took no part; an adaptive one is NaN where the
        step was undone. Empty if there was no step or it was abandoned.
        """
        last = self._now.last
        return {} if last is None else figures(last, sum(len(group["params"]) for group in self.param_groups))
