"""What public code does, at the cost that it has there: this project's own transcriptions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.bench.settings import Settings
from benchmarks.bench.single_file import SingleFileSAM


class Public:
    """Lookbehind as its authors' code takes a step: 2k gradients; loops over groups and their tensors, one after the
    other; copies in a dict for each parameter, one of them asked for anew at every descent.

    ``Naive`` is the same algorithm with as few copies and loops as per-parameter ops allow. For ASAM all tensors count
    as ``weight``.
    """

    def __init__(self, params: Sequence[Tensor], settings: Settings) -> None:
        self.named = [(f"{i}.weight", p) for i, p in enumerate(params)]
        self.settings = settings
        self.optimizer = self.base = torch.optim.SGD(
            list(params), lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay
        )
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        for p in self.params():
            for name in ("slow", "fast"):
                self.state[p][name] = torch.zeros_like(p.data)
                self.state[p][name].copy_(p.data)

    def params(self) -> Iterator[Tensor]:
        """Of all groups."""
        for group in self.optimizer.param_groups:
            yield from group["params"]

    def evaluations(self) -> Iterator[int]:
        """One outer step of 2k gradients."""
        for i in range(self.settings.k):
            yield 2 * i
            self.ascent_step()
            yield 2 * i + 1
            self.descent_step(i)

    @torch.no_grad()
    def ascent_step(self) -> None:
        """Perturb the weights by an epsilon that is kept."""
        scales = self.settings.asam
        norms = []
        for name, p in self.named:
            if p.grad is None:
                continue
            if scales and "weight" in name:
                scaling = self.epsilon(p)
                scaling[...] = p[...]
                scaling.abs_().add_(self.settings.eta)
                p.grad.mul_(scaling)
            norms.append(torch.norm(p.grad, p=2))
        length = torch.norm(torch.stack(norms), p=2) + 1e-16
        for name, p in self.named:
            if p.grad is None:
                continue
            epsilon = self.epsilon(p)
            if scales and "weight" in name:
                p.grad.mul_(epsilon)
            epsilon[...] = p.grad[...]
            epsilon.mul_(self.settings.rho / length)
            p.add_(epsilon)
        self.optimizer.zero_grad()

    def epsilon(self, p: Tensor) -> Tensor:
        """Memory of a parameter's perturbation."""
        epsilon = self.state[p].get("epsilon")
        if epsilon is None:
            epsilon = self.state[p]["epsilon"] = torch.clone(p).detach()
        return epsilon

    @torch.no_grad()
    def descent_step(self, i: int) -> None:
        """A step of the base from the fast weights, then back to the perturbed ones, or at the end between slow and
        fast.
        """
        for p in self.params():
            state = self.state[p]
            state["backup"] = torch.zeros_like(p.data)
            state["backup"].copy_(p.data)
            p.data.copy_(state["fast"])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if i == 0 and self.settings.adaptive:
            for p in self.params():
                self.state[p]["first"] = torch.zeros_like(p.data)
                self.state[p]["first"].copy_(p.data)
        for p in self.params():
            self.state[p]["fast"].copy_(p.data)
        for p in self.params():
            p.data.copy_(self.state[p]["backup"])
            del self.state[p]["backup"]
        if i == self.settings.k - 1:
            self.interpolate()

    def interpolate(self) -> None:
        """New slow weights, an adaptive alpha for each tensor."""
        for p in self.params():
            state = self.state[p]
            p.data.copy_(state["fast"])
            alpha = self.settings.static_alpha
            if self.settings.adaptive:
                cosine = torch.nn.CosineSimilarity(dim=0)
                first, last = state["first"] - state["slow"], p.data - state["slow"]
                alpha = ((cosine(first.flatten(), last.flatten()) + 1) / 2).item()
            p.data.mul_(alpha).add_(state["slow"], alpha=1 - alpha)
            state["fast"].copy_(p.data)
            state["slow"].copy_(p.data)


class Port:
    """SAM by the single-file port, in the pair form."""

    def __init__(self, params: Sequence[Tensor], settings: Settings) -> None:
        self.optimizer = SingleFileSAM(
            params,
            torch.optim.SGD,
            rho=settings.rho,
            adaptive=settings.asam,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )

    def evaluations(self) -> Iterator[int]:
        """One step of two gradients."""
        yield 0
        self.optimizer.first_step(zero_grad=True)
        yield 1
        self.optimizer.second_step(zero_grad=True)
