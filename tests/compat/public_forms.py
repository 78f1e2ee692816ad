"""What public implementations of SAM and Lookbehind-SAM do, as plain loops with nothing from ``lookbehind_fused``.

Written from a description of their behaviour, to be read beside the papers; the single-file port is the one that
``benchmarks`` times. ``tests/compat/test_compat.py`` runs one and the same training script with these classes and with
those of ``lookbehind_fused.compat``.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from benchmarks.bench.single_file import SingleFileSAM

__all__ = ["ASAM", "SAM", "Lookbehind_ASAM", "Lookbehind_SAM", "SingleFileSAM"]


class _AuthorsForm:
    """An ascent by the gradients that are there, a descent of the weights that it perturbed."""

    scales_weights = False

    def __init__(self, optimizer: Optimizer, model: nn.Module, rho: float = 0.5, eta: float = 0.01) -> None:
        self.optimizer, self.model, self.rho, self.eta = optimizer, model, rho, eta
        self.state: dict[Tensor, dict[str, Tensor]] = defaultdict(dict)
        self.scheduler: Any = None

    def set_scheduler(self, scheduler: Any) -> None:
        self.scheduler = scheduler

    def scaling(self, name: str, p: Tensor) -> Tensor:
        return p.abs() + self.eta if self.scales_weights and "weight" in name else torch.ones_like(p)

    def with_gradients(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.model.named_parameters() if p.grad is not None]

    @torch.no_grad()
    def ascent_step(self) -> None:
        scaled = [(self.scaling(name, p) * p.grad).norm(p=2) for name, p in self.with_gradients()]
        length = torch.stack(scaled).norm(p=2) + 1e-16
        for name, p in self.with_gradients():
            eps = self.rho * self.scaling(name, p) ** 2 * p.grad / length
            self.state[p]["eps"] = eps
            p.add_(eps)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def descent_step(self) -> None:
        for _, p in self.with_gradients():
            p.sub_(self.state[p]["eps"])
        self.optimizer.step()
        self.optimizer.zero_grad()


class SAM(_AuthorsForm):
    scales_weights = False


class ASAM(_AuthorsForm):
    scales_weights = True


class _LookbehindForm(_AuthorsForm):
    """k ascents, each followed by a descent of the fast weights, then an interpolation."""

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        rho: float = 0.5,
        eta: float = 0.01,
        k_steps: int = 5,
        alpha: float = 0.5,
    ) -> None:
        super().__init__(optimizer, model, rho, eta)
        self.k_steps, self.alpha, self.k = k_steps, alpha, 0
        self.tmp_alphas: list[Tensor] = []
        for p in model.parameters():
            self.state[p]["cached_slow_params"] = p.detach().clone()

    def get_current_k(self) -> int:
        return self.k

    @torch.no_grad()
    def ascent_step(self) -> None:
        if self.k == 0:
            for p in self.model.parameters():
                self.state[p]["cached_slow_params"] = p.clone()
                self.state[p]["cached_params"] = p.clone()
        super().ascent_step()

    @torch.no_grad()
    def descent_step(self) -> None:
        perturbed = {p: p.clone() for p in self.model.parameters()}
        for p in perturbed:
            p.copy_(self.state[p]["cached_params"])
        self.optimizer.step()
        for p in perturbed:
            self.state[p]["cached_params"] = p.clone()
            if self.k == 0:
                self.state[p]["first"] = p.clone()
            p.copy_(perturbed[p])
        self.k += 1
        if self.k == self.k_steps:
            self.interpolate()
            self.k = 0
        self.optimizer.zero_grad()

    def interpolate(self) -> None:
        self.tmp_alphas = []
        for p in self.model.parameters():
            slow, fast = self.state[p]["cached_slow_params"], self.state[p]["cached_params"]
            alpha = self.alpha
            if alpha == -1:
                a, b = (self.state[p]["first"] - slow).flatten(), (fast - slow).flatten()
                alpha = (torch.dot(a, b) / (a.norm() * b.norm()) + 1) / 2
                self.tmp_alphas.append(alpha)
            p.copy_(alpha * fast + (1 - alpha) * slow)
            self.state[p]["cached_slow_params"] = p.clone()

    @torch.no_grad()
    def _backup_and_load_slow_cache(self) -> None:
        for p in self.model.parameters():
            self.state[p]["backup"] = p.clone()
            p.copy_(self.state[p]["cached_slow_params"])

    @torch.no_grad()
    def _clear_and_load_backup(self) -> None:
        for p in self.model.parameters():
            p.copy_(self.state[p].pop("backup"))


class Lookbehind_SAM(_LookbehindForm):
    scales_weights = False


class Lookbehind_ASAM(_LookbehindForm):
    scales_weights = True
