"""The public code's algorithm as a lean loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from benchmarks.bench.settings import Settings


class Naive:
    """The public code's algorithm with as few copies and loops as per-parameter torch ops allow: 2k gradients, and
    copies around the base's step into memory that is kept. ``Public`` has those of the code itself.

    A step keeps five copies of the model: epsilon, slow, fast, backup and momentum.
    """

    def __init__(self, params: Sequence[Tensor], settings: Settings) -> None:
        self.params, self.settings = list(params), settings
        self.base = torch.optim.SGD(
            self.params, lr=settings.lr, momentum=settings.momentum, weight_decay=settings.weight_decay, foreach=False
        )
        self.state = {p: {"slow": p.detach().clone(), "fast": p.detach().clone()} for p in self.params}

    def evaluations(self) -> Iterator[int]:
        """One outer step of 2k gradients."""
        for i in range(self.settings.k):
            yield 2 * i
            self.ascent_step()
            yield 2 * i + 1
            self.descent_step(i)

    @torch.no_grad()
    def ascent_step(self) -> None:
        """Perturb the weights by a kept epsilon tensor for each parameter."""
        rho, eta, asam = self.settings.rho, self.settings.eta, self.settings.asam
        norms = []
        for p in self.params:
            if p.grad is None:
                continue
            epsilon = self.state[p].get("epsilon")
            if epsilon is None:
                epsilon = self.state[p]["epsilon"] = torch.clone(p).detach()
            if asam:
                epsilon.copy_(p)
                epsilon.abs_().add_(eta)
                p.grad.mul_(epsilon)
            norms.append(torch.norm(p.grad, p=2))
        norm = torch.norm(torch.stack(norms), p=2) + 1e-16
        for p in self.params:
            if p.grad is None:
                continue
            epsilon = self.state[p]["epsilon"]
            if asam:
                p.grad.mul_(epsilon)
            epsilon.copy_(p.grad)
            epsilon.mul_(rho / norm)
            p.add_(epsilon)
        self.base.zero_grad()

    @torch.no_grad()
    def descent_step(self, i: int) -> None:
        """Run the base optimizer on the fast weights; the last inner step interpolates, the others restore."""
        for p in self.params:
            state = self.state[p]
            if "backup" not in state:
                state["backup"] = torch.empty_like(p)
            state["backup"].copy_(p)
            p.copy_(state["fast"])
        self.base.step()
        self.base.zero_grad()
        last = i == self.settings.k - 1
        for p in self.params:
            state = self.state[p]
            if not last:
                state["fast"].copy_(p)
                if i == 0 and self.settings.adaptive:
                    state["first"] = p - state["slow"]
                p.copy_(state["backup"])
                continue
            alpha = self.settings.static_alpha
            if self.settings.adaptive:
                displacement = p - state["slow"]
                cosine = torch.nn.functional.cosine_similarity(state["first"].flatten(), displacement.flatten(), dim=0)
                alpha = (cosine + 1) / 2
                p.mul_(alpha).add_(state["slow"] * (1 - alpha))
            else:
                p.mul_(alpha).add_(state["slow"], alpha=1 - alpha)
            state["slow"].copy_(p)
            state["fast"].copy_(p)
