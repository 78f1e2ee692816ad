"""SAM as the popular single-file port has it: this project's own transcription of what it does, op for op.

``tests/compat`` holds ``lookbehind_fused.compat`` to it, ``contenders`` times it. It shares nothing with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class SingleFileSAM(Optimizer):
    """SAM as an optimizer around a class of optimizers, with two halves of a step and a form that takes a closure.

    ``use_gc`` is of another port: gradients of two dimensions and more are centralised before the ascent.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: type[Optimizer],
        rho: float = 0.05,
        adaptive: bool = False,
        use_gc: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(params, {"rho": rho, "adaptive": adaptive, **kwargs})
        self.use_gc = use_gc
        self.base_optimizer = base_optimizer(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        """Keep a clone of each weight and climb."""
        if self.use_gc:
            self.centralise()
        length = self.length() + 1e-12
        for group in self.param_groups:
            scale = group["rho"] / length
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["old"] = p.data.clone()
                climbed = (torch.pow(p, 2) if group["adaptive"] else 1.0) * p.grad * scale.to(p)
                p.add_(climbed)
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        """Back to the clones, and a step of the base optimizer from there."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                p.data = self.state[p]["old"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any]) -> Any:
        """Both halves, and the closure between them."""
        self.first_step(zero_grad=True)
        with torch.enable_grad():
            value = closure()
        self.second_step()
        return value

    def length(self) -> Tensor:
        """||T g|| over all groups."""
        device = self.param_groups[0]["params"][0].device
        norms = [
            ((torch.abs(p) if group["adaptive"] else 1.0) * p.grad).norm(p=2).to(device)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        return torch.norm(torch.stack(norms), p=2)

    def centralise(self) -> None:
        """Subtract from each gradient its mean over all dimensions but the first."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None and p.grad.ndim > 1:
                    p.grad.sub_(p.grad.mean(dim=tuple(range(1, p.grad.ndim)), keepdim=True))
