"""The loop of timm's train.py and torchvision's references, in lines of our own: backward, clipping, ``step()`` without
a closure; with mixed precision through an object that has the scaler.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_

from tests.integrations.plain import (
    SETTINGS,
    STEPS,
    Model,
    Plain,
    assert_same_losses,
    assert_same_weights,
    make_optimizer,
    make_scheduler,
    microbatches,
    scalers,
)


class Scaler:
    """What such loops call instead of backward and step."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self.scaler = scaler

    def __call__(self, loss: Tensor, optimizer: Any, clip: float | None, parameters: Any, update: bool) -> None:
        self.scaler.scale(loss).backward()
        if update:
            if clip is not None:
                self.scaler.unscale_(optimizer)
                clip_grad_norm_(parameters, clip)
            self.scaler.step(optimizer)
            self.scaler.update()


class Run:
    """Two epochs of that loop; what it is given for our optimizer is its ``closure``, ``scaler``, ``max_grad_norm``."""

    def __init__(
        self, accumulation: int, clip: float | None = None, schedule: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:  # fmt: skip
        self.dtype = torch.float64 if scaler is None else torch.float32
        self.model, self.scaler, self.clip = Model(self.dtype), scaler, clip
        self.optimizer = make_optimizer(
            self.model, scaler=scaler, max_grad_norm=clip, closure=lambda: self.evaluate_again()
        )
        self.scheduler = make_scheduler(self.optimizer) if schedule else None
        self.accumulation, self.step, self.losses = accumulation, 0, []
        self.microbatches: list[Any] = []

    def loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.float16, enabled=self.scaler is not None):
            return cross_entropy(self.model(inputs), targets)

    def evaluate_again(self) -> None:
        """The one line more: all microbatches of the step."""
        for inputs, targets in self.microbatches:
            loss = self.loss(inputs, targets) / self.accumulation
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def train(self, steps: int) -> None:
        loss_scaler = None if self.scaler is None else Scaler(self.scaler)
        epoch = microbatches(self.accumulation, self.dtype)
        for _ in range(steps * self.accumulation):
            index = self.step % len(epoch)
            update = (index + 1) % self.accumulation == 0
            self.microbatches.append(epoch[index])
            loss = self.loss(*epoch[index])
            self.losses.append(loss.item())
            loss = loss / self.accumulation
            if loss_scaler is not None:
                loss_scaler(loss, self.optimizer, self.clip, self.model.parameters(), update)
            else:
                loss.backward()
                if update:
                    if self.clip is not None:
                        clip_grad_norm_(self.model.parameters(), self.clip)
                    self.optimizer.step()
            if update:
                self.optimizer.zero_grad()
                self.microbatches.clear()
                if self.scheduler is not None:
                    self.scheduler.step()
            self.step += 1


@pytest.mark.filterwarnings("ignore:Detected call of")  # a scheduler's, where the first step overflows
@pytest.mark.parametrize(("accumulation", "clip", "schedule"), SETTINGS)
@pytest.mark.parametrize("precision", ["32", "16"])
def test_the_loop(accumulation: int, clip: float | None, schedule: bool, precision: str) -> None:
    """Equal to the plain loop; k + 1 evaluations a microbatch."""
    theirs, ours = scalers(precision)
    plain = Plain(accumulation, clip, schedule, theirs)
    run = Run(accumulation, clip, schedule, ours)
    run.train(STEPS)
    assert_same_weights(run.model, plain.model)
    assert_same_losses(run.losses, plain.losses)
    assert run.model.evaluations == plain.model.evaluations
    assert precision == "32" or plain.overflows >= 3


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_it_goes_on_from_a_checkpoint_in_mid_epoch(accumulation: int, tmp_path: Path) -> None:
    plain = Plain(accumulation, 0.5, schedule=True)
    run, resumed = Run(accumulation, 0.5, True), Run(accumulation, 0.5, True)
    run.train(7)
    parts = ("model", "optimizer", "scheduler")
    torch.save({name: getattr(run, name).state_dict() for name in parts}, tmp_path / "state")
    for name, state in torch.load(tmp_path / "state", weights_only=True).items():
        getattr(resumed, name).load_state_dict(state)
    resumed.step = run.step
    resumed.train(STEPS - 7)
    assert_same_weights(resumed.model, plain.model)
