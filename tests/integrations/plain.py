"""What every trainer is held to: one problem, and the plain loop over it, ``step(closure)`` on whole batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lookbehind_fused import Lookbehind
from tests.conftest import assert_close

STEPS, STEPS_PER_EPOCH, SAMPLES = 20, 10, 4
"""Outer steps of a run, and of one epoch; samples of a microbatch."""

GAMMA = 0.9
"""By which a scheduler multiplies the learning rate after each step."""


SETTINGS = [(1, None, False), (2, None, True), (4, 0.5, True), (1, 0.5, False)]
"""Of loops that have all of them: accumulation, clipping, whether there is a scheduler."""


def scalers(precision: str) -> list[Any]:
    """For the plain loop and the trainer's: None, or under "16" scalers of their own that overflow at first."""
    if precision == "32":
        return [None, None]
    return [torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3) for _ in range(2)]


class Model(nn.Module):
    """Two layers; counts its forward passes in training."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.layers = nn.Sequential(nn.Linear(6, 8, dtype=dtype), nn.Tanh(), nn.Linear(8, 3, dtype=dtype))
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=dtype) / 2
        self.evaluations = 0

    def forward(self, inputs: Tensor) -> Tensor:
        self.evaluations += self.training
        return self.layers(inputs)


def data(accumulation: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Inputs and targets of an epoch, in the order in which they are seen."""
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(STEPS_PER_EPOCH * accumulation * SAMPLES, 6, generator=generator, dtype=dtype)
    return inputs, torch.randint(3, (len(inputs),), generator=generator)


def microbatches(accumulation: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    """Those of an epoch."""
    return list(zip(*(tensor.split(SAMPLES) for tensor in data(accumulation, dtype)), strict=True))


def make_optimizer(model: nn.Module, **settings: Any) -> Lookbehind:
    """The optimizer under test; k = 2."""
    return Lookbehind(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, rho=0.1, k=2, alpha=0.6, **settings)


def make_scheduler(optimizer: Any) -> torch.optim.lr_scheduler.LRScheduler:
    """Another learning rate after each step."""
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=GAMMA)


class Plain:
    """The plain loop.

    Attributes:
        losses: of each microbatch at evaluation 0.
        overflows: how many steps a scaler undid.
    """

    def __init__(
        self,
        accumulation: int = 1,
        clip: float | None = None,
        schedule: bool = False,
        scaler: torch.amp.GradScaler | None = None,
        steps: int = STEPS,
    ) -> None:
        dtype = torch.float64 if scaler is None else torch.float32
        self.model, self.losses, self.overflows = Model(dtype), [], 0
        optimizer = make_optimizer(self.model, max_grad_norm=clip, scaler=scaler)
        scheduler = make_scheduler(optimizer)
        epoch = microbatches(accumulation, dtype)
        for step in range(steps):
            first = step % STEPS_PER_EPOCH * accumulation
            batch = epoch[first : first + accumulation]

            def closure(batch: list[tuple[Tensor, Tensor]] = batch) -> None:
                for inputs, targets in batch:
                    with torch.autocast("cpu", torch.float16, enabled=scaler is not None):
                        loss = cross_entropy(self.model(inputs), targets)
                    if optimizer.evaluation.index == 0:
                        self.losses.append(loss.item())
                    loss = loss / accumulation
                    (loss if scaler is None else scaler.scale(loss)).backward()

            if scaler is None:
                optimizer.step(closure)
            else:
                scaler.step(optimizer, closure)
                scaler.update()
                self.overflows += int(optimizer.diagnostics["skipped"])
            if schedule:
                scheduler.step()


def assert_same_weights(actual: nn.Module, expected: nn.Module) -> None:
    """To 1e-6, of the largest weight of each tensor."""
    for (name, p), q in zip(actual.named_parameters(), expected.parameters(), strict=True):
        assert_close(name, p.detach(), q.detach(), 1e-6)


def assert_same_losses(actual: list[float], expected: list[float]) -> None:
    """To 1e-6."""
    assert_close("losses", torch.tensor(actual, dtype=torch.float64), torch.tensor(expected, dtype=torch.float64), 1e-6)
