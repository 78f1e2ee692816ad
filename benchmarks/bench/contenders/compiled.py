"""The foreach step under ``torch.compile``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.bench.contenders.foreach import Tensors, clear, copies
from benchmarks.bench.settings import Settings


class Compiled:
    """The phases of the step as foreach code for ``torch.compile``, which fuses them: one graph a phase.

    Hyperparameters are 0-dim tensors, so that a schedule recompiles nothing. A list longer than ``CHUNK`` goes through
    the graph piece by piece, as the compile time grows faster than the list.
    """

    CHUNK = 160

    def __init__(self, params: Tensors, settings: Settings) -> None:
        self.params, self.settings = list(params), settings
        self.slow, self.momentum = copies(params), copies(params)
        self.fast = copies(params) if settings.k > 1 else []
        self.first = copies(params) if settings.adaptive and settings.k > 2 else []
        names = ("rho", "eta", "lr", "momentum", "weight_decay", "static_alpha")
        self.hyper = [torch.tensor(getattr(settings, name), dtype=torch.float64) for name in names]
        pieces = -(-len(self.params) // self.CHUNK)
        size = -(-len(self.params) // pieces)
        self.pieces = [slice(start, start + size) for start in range(0, len(self.params), size)]

    def evaluations(self) -> Iterator[int]:
        """One outer step of k + 1 gradients."""
        for index in range(self.settings.k + 1):
            clear(self.params)
            yield index
            self.use_gradients(index)

    @torch.no_grad()
    def use_gradients(self, index: int) -> None:
        """What follows evaluation ``index``: one graph, one more for an adaptive alpha, and for the norm of pieces."""
        s, k = self.settings, self.settings.k
        grads = [p.grad for p in self.params]
        norm = self.norm(grads) if index < k and len(self.pieces) > 1 else None
        first = self.first or self.fast
        source = self.slow if index == 1 else first if index == 2 else self.fast
        target = first if index == 1 else self.fast
        sums = []
        for at in self.pieces:
            params, g, slow, momentum = self.params[at], grads[at], self.slow[at], self.momentum[at]
            if index == 0:
                _ascend_first(params, g, slow, norm, self.hyper, s.asam)
            elif index < k:
                _descend_ascend(params, g, source[at], target[at], momentum, norm, self.hyper, s.asam)
            elif s.adaptive:
                sums.append(_descend_align(params, g, source[at], first[at], slow, momentum, self.hyper))
            else:
                _descend_interpolate(params, g, source[at], slow, momentum, self.hyper)
        if sums:
            alphas = torch.cat(sums)
            if s.scope == "global":
                alphas = alphas.sum(0, keepdim=True).expand_as(alphas)
            for at in self.pieces:
                _interpolate(self.params[at], self.slow[at], alphas[at])

    def norm(self, grads: Tensors) -> Tensor:
        """||T g|| over all pieces."""
        parts = [_sq_norm(self.params[at], grads[at], self.hyper, self.settings.asam) for at in self.pieces]
        return torch.stack(parts).sum().sqrt()


def compiled(phase):
    """One graph, for exactly these shapes."""
    return torch.compile(phase, fullgraph=True, dynamic=False)


def _sum_of_squares(params, grads, hyper, asam):
    if asam:
        grads = torch._foreach_mul(torch._foreach_add(torch._foreach_abs(params), hyper[1]), grads)
    return torch.stack([g.square().sum() for g in grads]).sum()


_sq_norm = compiled(_sum_of_squares)


def _ascend(params, grads, norm, hyper, asam):
    if norm is None:
        norm = _sum_of_squares(params, grads, hyper, asam).sqrt()
    step = hyper[0] / (norm + 1e-16)
    if asam:
        scaling = torch._foreach_add(torch._foreach_abs(params), hyper[1])
        grads = torch._foreach_mul(torch._foreach_mul(grads, scaling), scaling)
    torch._foreach_add_(params, torch._foreach_mul(grads, step))


def _descend(source, grads, momentum, hyper):
    _, _, lr, mu, weight_decay, _ = hyper
    grads = torch._foreach_add(grads, torch._foreach_mul(source, weight_decay))
    torch._foreach_mul_(momentum, mu)
    torch._foreach_add_(momentum, grads)
    return torch._foreach_sub(source, torch._foreach_mul(momentum, lr))


@compiled
def _ascend_first(params, grads, slow, norm, hyper, asam):
    torch._foreach_copy_(slow, params)
    _ascend(params, grads, norm, hyper, asam)


@compiled
def _descend_ascend(params, grads, source, target, momentum, norm, hyper, asam):
    torch._foreach_copy_(target, _descend(source, grads, momentum, hyper))
    _ascend(params, grads, norm, hyper, asam)


@compiled
def _descend_interpolate(params, grads, source, slow, momentum, hyper):
    moved = torch._foreach_sub(_descend(source, grads, momentum, hyper), slow)
    torch._foreach_copy_(params, torch._foreach_add(slow, torch._foreach_mul(moved, hyper[5])))


@compiled
def _descend_align(params, grads, source, first, slow, momentum, hyper):
    """Leaves fast_k in ``params``; returns <a, b>, <a, a>, <b, b> of each tensor, shape (tensors, 3)."""
    last = _descend(source, grads, momentum, hyper)
    a, b = torch._foreach_sub(first, slow), torch._foreach_sub(last, slow)
    torch._foreach_copy_(params, last)
    return torch.stack(
        [torch.stack([(x * y).sum(), x.square().sum(), y.square().sum()]) for x, y in zip(a, b, strict=True)]
    )


@compiled
def _interpolate(params, slow, sums):
    dot, a, b = sums.unbind(1)
    norms = a.sqrt() * b.sqrt()
    alphas = (torch.where(norms > 0, dot / norms, 0.0).clamp(-1, 1) + 1) / 2
    for p, s, alpha in zip(params, slow, alphas.unbind(), strict=True):
        p.copy_(s + alpha * (p - s))
