"""The step by hand with ``torch._foreach_*``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.bench.settings import Settings

Tensors = Sequence[Tensor]


def copies(params: Tensors) -> list[Tensor]:
    """Memory of each tensor's own, zeroed, so that no page is touched for the first time while the clock runs."""
    return [torch.zeros_like(p, requires_grad=False) for p in params]


def clear(params: Tensors) -> None:
    """Drop the gradients."""
    for p in params:
        p.grad = None


class Foreach:
    """The k + 1 form by hand with ``torch._foreach_*``: gradients reused, no copy that can be avoided."""

    def __init__(self, params: Tensors, settings: Settings) -> None:
        self.params, self.settings = list(params), settings
        self.slow, self.momentum = copies(params), copies(params)
        self.fast = copies(params) if settings.k > 1 else []
        self.first = copies(params) if settings.adaptive and settings.k > 2 else []

    def evaluations(self) -> Iterator[int]:
        """One outer step of k + 1 gradients."""
        for index in range(self.settings.k + 1):
            clear(self.params)
            yield index
            self.use_gradients(index)

    @torch.no_grad()
    def use_gradients(self, index: int) -> None:
        """What follows evaluation ``index``."""
        k = self.settings.k
        grads = [p.grad for p in self.params]
        if index == 0:
            torch._foreach_copy_(self.slow, self.params)
        if index > 0:
            self.descend(index, grads)
        if index < k:
            self.ascend(grads)
        elif self.settings.adaptive:
            self.interpolate_adaptively()
        else:
            self.interpolate()

    def ascend(self, grads: Tensors) -> None:
        """p += rho T^2 g / ||T g||."""
        if self.settings.asam:
            scaling = torch._foreach_abs(self.params)
            torch._foreach_add_(scaling, self.settings.eta)
            grads = torch._foreach_mul(scaling, grads)
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        if self.settings.asam:
            torch._foreach_mul_(grads, scaling)
        self.move(grads, norm)

    def move(self, grads: Tensors, norm: Tensor) -> None:
        """p += rho g / norm. The number is read by the host, which on a GPU waits for it."""
        torch._foreach_add_(self.params, grads, alpha=self.settings.rho / (float(norm) + 1e-16))

    def descend(self, index: int, grads: Tensors) -> None:
        """SGD on the fast weights. At the last inner step it leaves fast_k in ``fast`` (k = 1: in the parameters)."""
        s = self.settings
        fast = self.fast
        if index == 1:
            torch._foreach_copy_(self.first or self.fast or self.params, self.slow)
            fast = self.first or self.fast or self.params
        elif index == 2 and self.first:
            torch._foreach_copy_(self.fast, self.first)
        elif index == s.k and s.adaptive and not self.first:  # k = 2: fast_1 stays in ``fast``
            torch._foreach_copy_(self.params, self.fast)
            fast = self.params
        torch._foreach_mul_(self.momentum, s.momentum)
        torch._foreach_add_(self.momentum, grads)
        torch._foreach_add_(self.momentum, fast, alpha=s.weight_decay)
        torch._foreach_add_(fast, self.momentum, alpha=-s.lr)

    def interpolate(self) -> None:
        """p = slow + alpha (fast - slow)."""
        alpha = self.settings.static_alpha
        if self.fast:
            torch._foreach_copy_(self.params, self.slow)
            torch._foreach_lerp_(self.params, self.fast, alpha)
        elif alpha != 1:
            torch._foreach_lerp_(self.params, self.slow, 1 - alpha)

    def interpolate_adaptively(self) -> None:
        """The same with alpha* = (cos(fast_1 - slow, fast_k - slow) + 1) / 2."""
        first = torch._foreach_sub(self.first or self.fast, self.slow)
        last = torch._foreach_sub(self.fast if self.first else self.params, self.slow)
        dots = torch.stack([torch.dot(a.view(-1), b.view(-1)) for a, b in zip(first, last, strict=True)])
        a, b = torch.stack(torch._foreach_norm(first)), torch.stack(torch._foreach_norm(last))
        torch._foreach_copy_(self.params, self.slow)
        if self.settings.scope == "global":
            alpha = ((dots.sum() / (a.norm() * b.norm())).clamp(-1, 1) + 1) / 2
            torch._foreach_add_(self.params, last, alpha=float(alpha))
        else:
            alpha = ((torch.nan_to_num(dots / (a * b))).clamp(-1, 1) + 1) / 2
            torch._foreach_mul_(last, alpha.tolist())
            torch._foreach_add_(self.params, last)


class ForeachOnDevice(Foreach):
    """The same for GPUs, with a norm that stays there: no wait, at the cost of one more walk over the gradients. For a
    static alpha.
    """

    def move(self, grads: Tensors, norm: Tensor) -> None:
        """p += rho g / norm."""
        torch._foreach_add_(self.params, torch._foreach_mul(grads, self.settings.rho / (norm + 1e-16)))
