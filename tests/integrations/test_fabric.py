"""Fabric needs nothing but the two forms that any loop has: a closure, or ``optimizer.closure`` and given gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

pytest.importorskip("lightning", reason="lightning is not installed: make trainers")

from lightning.fabric import Fabric
from lightning.fabric.plugins.precision import MixedPrecision

from lookbehind_fused import SAM, LambdaSchedule
from tests.integrations.plain import (
    SETTINGS,
    STEPS,
    STEPS_PER_EPOCH,
    Model,
    Plain,
    assert_same_losses,
    assert_same_weights,
    make_optimizer,
    make_scheduler,
    microbatches,
    scalers,
)

pytestmark = [pytest.mark.filterwarnings("ignore:::lightning"), pytest.mark.xdist_group("lightning")]


class Run:
    """Fabric's loop. ``clip``: by Fabric inside the closure; with a scaler, by the optimizer."""

    def __init__(
        self, accumulation: int, clip: float | None = None, schedule: bool = False,
        scaler: torch.amp.GradScaler | None = None,
    ) -> None:  # fmt: skip
        self.dtype = torch.float64 if scaler is None else torch.float32
        plugins = [] if scaler is None else [MixedPrecision("16-mixed", "cpu", scaler=scaler)]
        self.fabric = Fabric(accelerator="cpu", devices=1, plugins=plugins)
        model = Model(self.dtype)
        self.evaluations = lambda: model.evaluations
        optimizer = make_optimizer(model, scaler=scaler, max_grad_norm=None if scaler is None else clip)
        self.schedule = make_scheduler(optimizer) if schedule else None
        self.model, self.optimizer = self.fabric.setup(model, optimizer)
        self.accumulation, self.clip, self.scaler, self.losses = accumulation, clip, scaler, []

    def train(self, steps: range) -> None:
        fabric, optimizer = self.fabric, self.optimizer
        epoch = microbatches(self.accumulation, self.dtype)
        for step in steps:
            first = step % STEPS_PER_EPOCH * self.accumulation

            def closure(first: int = first) -> None:
                for inputs, targets in epoch[first : first + self.accumulation]:
                    loss = cross_entropy(self.model(inputs), targets)
                    if optimizer.evaluation is None or optimizer.evaluation.index == 0:
                        self.losses.append(loss.item())
                    fabric.backward(loss / self.accumulation)
                if self.clip is not None and self.scaler is None:
                    fabric.clip_gradients(self.model, optimizer, max_norm=self.clip)

            if self.scaler is None:
                optimizer.step(closure)
            else:  # Fabric would hand the closure to the scaler as a keyword, which torch refuses
                optimizer.closure = closure
                closure()
                if self.clip is not None:
                    fabric.clip_gradients(self.model, optimizer, max_norm=self.clip, error_if_nonfinite=False)
                optimizer.step()
                optimizer.zero_grad()
            if self.schedule is not None:
                self.schedule.step()


@pytest.mark.filterwarnings("ignore:Detected call of")  # a scheduler's, where the first step overflows
@pytest.mark.parametrize(("accumulation", "clip", "schedule"), SETTINGS)
@pytest.mark.parametrize("precision", ["32", "16"])
def test_fabric(accumulation: int, clip: float | None, schedule: bool, precision: str) -> None:
    """Equal to the plain loop; k + 1 evaluations a microbatch."""
    theirs, ours = scalers(precision)
    plain = Plain(accumulation, clip, schedule, theirs)
    run = Run(accumulation, clip, schedule, ours)
    run.train(range(STEPS))
    assert_same_weights(run.model, plain.model)
    assert_same_losses(run.losses, plain.losses)
    assert run.evaluations() == plain.model.evaluations
    assert precision == "32" or plain.overflows >= 3


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_it_goes_on_from_a_checkpoint_in_mid_epoch(accumulation: int, tmp_path: Path) -> None:
    def state(run: Run) -> dict[str, Any]:
        return {"model": run.model, "optimizer": run.optimizer, "schedule": run.schedule}

    plain = Plain(accumulation, 0.5, schedule=True)
    run, resumed = Run(accumulation, 0.5, True), Run(accumulation, 0.5, True)
    run.train(range(7))
    run.fabric.save(tmp_path / "state", state(run))
    torch.load(tmp_path / "state", weights_only=True)
    resumed.fabric.load(tmp_path / "state", state(resumed))
    resumed.train(range(7, STEPS))
    assert_same_weights(resumed.model, plain.model)


def test_fabrics_wrapper_is_the_optimizer() -> None:
    """Settings, the forms of a step and what they refuse."""
    fabric, model = Fabric(accelerator="cpu", devices=1), Model()
    inside = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1)
    model, wrapper = fabric.setup(model, inside)
    assert wrapper is not inside
    wrapper.max_grad_norm, wrapper.closure = 2.0, len
    assert (inside.max_grad_norm, inside.closure) == (2.0, len)
    wrapper.closure = None
    LambdaSchedule(wrapper, rho=lambda step: 3.0)
    assert inside.param_groups[0]["rho"] == pytest.approx(0.3)
    with pytest.raises(TypeError, match="^scaler: expected a torch.amp.GradScaler"):
        wrapper.scaler = 3

    def evaluate() -> None:
        wrapper.zero_grad()
        fabric.backward(model(torch.ones(2, 6, dtype=torch.float64)).square().sum())

    before = [p.detach().clone() for p in model.parameters()]
    evaluate()
    wrapper.first_step()
    assert inside.evaluation.index == 1
    with pytest.raises(RuntimeError, match="expected no open step"):
        wrapper.state_dict()
    evaluate()
    wrapper.second_step()
    assert inside.evaluation is None
    assert not any(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))
    assert len(wrapper.state_dict()["param_groups"]) == 1


def test_a_closure_under_a_scaler_is_refused() -> None:
    run = Run(1, scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="^Closure use is not currently supported"):
        run.optimizer.step(lambda: None)
