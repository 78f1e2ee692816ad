"""The form of the popular single-file port of SAM and of the optimizer collections."""

from __future__ import annotations

import numbers
from collections.abc import Callable, Generator
from contextlib import closing
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from ..arguments import check_bool, is_number, wrong
from ..family import SAM, refuse
from ..program import Evaluation
from ..tensors import shown, tensors_of


class SingleFileSAM(SAM):
    """SAM (Foret et al. 2021) in the form of the popular single-file port and of the optimizer collections::

        optimizer = SingleFileSAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)

        loss_fn(model(inputs), targets).backward()
        optimizer.first_step(zero_grad=True)
        loss_fn(model(inputs), targets).backward()
        optimizer.second_step(zero_grad=True)

    It differs from ``lookbehind_fused.SAM`` by ``step`` and by ``eta``: ASAM's scaling is T = |w| there.

    Args:
        params, base_optimizer, rho: those of ``Lookbehind``; groups may have their own ``rho`` and ``adaptive``.
        adaptive: ASAM's scaling of the ascent (Kwon et al. 2021).
        eta: ASAM's stabilizer.
        use_gc: centralise the gradient of each ascent (Yong et al. 2020): of tensors with two or more dimensions the
            mean over all dimensions but the first is taken away. ``.grad`` is then another tensor; the one that was
            there is not written to. The norm is that of the centralised gradients, so that the perturbation has length
            rho; where it is taken before they are centralised, as in one collection, the perturbation is shorter.
        perturb_eps: what is added to the norm elsewhere, in [0, 1e-8]. The kernels add 1e-16 whatever is given, which
            at a norm of one changes the ascent by 1e-8 of itself at most; more is refused.
        model: as for ``Lookbehind``. num_data: for callers that give it to every optimizer of a collection; without
            meaning here.
        **settings: ``backend``, ``max_grad_norm``, ``nonfinite``, ``scaler``, ``closure`` and ``loss_scale`` of
            ``Lookbehind``, and arguments of the class ``base_optimizer`` (``lr``, ``foreach``, ...).

    Raises:
        TypeError, ValueError: as ``Lookbehind``.
    """

    def __init__(
        self,
        params: ParamsT | None,
        base_optimizer: type[Optimizer] | Optimizer,
        rho: float = 0.05,
        adaptive: bool = False,
        *,
        eta: float = 0.0,
        use_gc: bool = False,
        perturb_eps: float = 1e-12,
        model: nn.Module | None = None,
        num_data: int | None = None,
        **settings: Any,
    ) -> None:
        check_bool("use_gc", use_gc)
        if not (is_number(perturb_eps) and 0 <= perturb_eps <= 1e-8):
            raise wrong("perturb_eps", "a number in [0, 1e-8]", perturb_eps, (numbers.Real,))
        refuse(self, settings, "microbatches", "ascent_gradient", "ascent_fraction")
        self.use_gc = use_gc
        base: Any = base_optimizer  # of either kind
        super().__init__(params, base, rho, adaptive, eta=eta, model=model, **settings)

    @property
    def optimizer(self) -> Optimizer:
        """The base optimizer."""
        return self.base_optimizer

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Ascend with the gradients that are there, clear them, call ``closure`` at the perturbed weights, and descend.

        Args:
            closure: runs forward and backward; called once. The gradients that it leaves are not cleared. None:
                ``optimizer.closure``.

        Returns:
            What the closure returned.

        Raises:
            TypeError: there is no closure.
            RuntimeError: there are no gradients before or after it, or a step is open already.

        Whatever is raised, the weights and the base optimizer's state are as they were before.
        """
        if "found_inf" in self.__dict__:
            self.require_scaler(self)
        closure = self.closure if closure is None else closure
        if not callable(closure):
            raise TypeError(
                "closure: expected a function that runs forward and backward, since the gradient at the perturbed "
                f"weights is missing; got {shown(closure)} (without one: first_step() and second_step())"
            )
        self.require_closed("a new step")
        try:
            self.ascent_step()
            self.zero_grad()
            with torch.enable_grad():
                value = closure()
            self.descent_step()
        finally:
            self.abort_step()  # what has not come to its end
        return value

    step.__dict__["hooked"] = True  # torch is not to run the step hooks too, which the two halves do

    def ascent_step(self) -> None:
        """As ``Lookbehind.ascent_step``, with the gradients centralised first under ``use_gc``."""
        self._centralise()
        super().ascent_step()

    def evaluations(self, *, apply: bool = True) -> Generator[Evaluation, None, None]:
        """As ``Lookbehind.evaluations``, with the gradients of an ascent centralised first under ``use_gc``."""
        with closing(super().evaluations(apply=apply)) as evaluations:
            for evaluation in evaluations:
                yield evaluation
                if evaluation.ascends:
                    self._centralise()

    def apply(self, evaluation: Evaluation) -> None:
        """As ``Lookbehind.apply``; not with ``use_gc``, which replaces gradients."""
        if self.use_gc:
            raise RuntimeError("apply(): expected use_gc=False, got True; use evaluations() without apply=False")
        super().apply(evaluation)

    @torch.no_grad()
    def _centralise(self) -> None:
        for p in tensors_of(self.param_groups) if self.use_gc else ():
            if p.grad is not None and p.grad.ndim > 1 and p.grad.layout == torch.strided:
                p.grad = p.grad - p.grad.mean(dim=tuple(range(1, p.grad.ndim)), keepdim=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "use_gc": self.use_gc}
