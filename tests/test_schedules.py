"""Schedules of rho and alpha."""

import copy
from typing import Any

import pytest
import torch

from lookbehind_fused import SAM, LambdaSchedule, Lookahead, Lookbehind
from tests.algorithm1 import Formulas, algorithm1, sgd
from tests.conftest import assert_close, assert_same_state
from tests.test_family import Problem

NAN = float("nan")


def test_a_schedule_is_the_settings_step_by_step(backend: str) -> None:
    """Against the transcription of Algorithm 1 with rho and alpha of each step; two groups with a rho of their own."""
    problem, oracle = Problem(), Problem()
    groups = [{"params": problem.params[:1]}, {"params": problem.params[1:], "rho": 0.4}]
    optimizer = Lookbehind(groups, torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.2, k=2, backend=backend)
    schedule = LambdaSchedule(
        optimizer, rho=lambda step: 1 / (1 + step), alpha=lambda step: "adaptive" if step == 2 else 0.9 - 0.1 * step
    )
    weights = [p.detach().clone() for p in problem.params]
    base = Formulas(sgd, {"lr": 0.1, "momentum": 0.9}, 3)
    for step in range(4):
        optimizer.step(problem.evaluate)
        schedule.step()
        alpha = "adaptive" if step == 2 else 0.9 - 0.1 * step
        rho = [initial / (1 + step) for initial in (0.2, 0.4, 0.4)]
        weights = algorithm1(weights, lambda w, _: oracle.gradient(w), base, k=2, rho=rho, alpha=alpha).params
        for i, (p, w) in enumerate(zip(problem.params, weights, strict=True)):
            assert_close(f"step {step}, tensor {i}", p.detach(), w, 1e-12)


def test_it_goes_on_from_its_state_dict() -> None:
    def make() -> tuple[Lookbehind, LambdaSchedule]:
        optimizer = SAM(Problem().params, torch.optim.SGD, lr=0.1, rho=0.2)
        return optimizer, LambdaSchedule(optimizer, rho=lambda step: 1 + step)

    optimizer, schedule = make()
    schedule.step()
    schedule.step()
    other, second = make()
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state_dict(schedule.state_dict())
    second.step()
    assert other.param_groups[0]["rho"] == pytest.approx(0.8)
    with pytest.raises(ValueError, match="^state_dict: expected initial_rho of 1 groups"):
        second.load_state_dict({"steps": 1, "initial_rho": [0.1, 0.2]})


def test_it_reaches_through_lookahead() -> None:
    inner = SAM(Problem().params, torch.optim.SGD, lr=0.1, rho=0.2)
    optimizer = Lookahead(inner)
    schedule = LambdaSchedule(optimizer, rho=lambda step: 1 + step, alpha=lambda step: 0.5 - 0.1 * step)
    schedule.step()
    assert inner.param_groups[0]["rho"] == 0.4
    assert optimizer.alpha == 0.4
    assert inner.alpha == 1.0
    with pytest.raises(TypeError, match=r"^schedule at step 0: alpha: expected a number in \(0, 1\], got 'adaptive'"):
        LambdaSchedule(optimizer, alpha=lambda step: "adaptive")


@pytest.mark.parametrize(
    ("functions", "error", "message"),
    [
        (
            {"rho": lambda step: NAN if step else 1.0},
            ValueError,
            "schedule at step 1: rho: expected a finite number >= 0",
        ),
        (
            {"rho": lambda step: 1 - 2 * step},
            ValueError,
            "schedule at step 1: rho: expected a finite number >= 0, got -0.2",
        ),
        ({"alpha": lambda step: NAN if step else 1.0}, ValueError, "schedule at step 1: alpha: expected a number in"),
        ({"alpha": lambda step: None if step else 1.0}, TypeError, "schedule at step 1: alpha: expected a number in"),
        (
            {"rho": lambda step: 1 + step, "alpha": lambda step: 0.5 - step},
            ValueError,
            r"schedule at step 1: alpha: expected a number in \(0, 1\] or \"adaptive\", got -0.5",
        ),
    ],
)
def test_a_schedule_that_goes_wrong_changes_nothing(
    backend: str, functions: dict[str, Any], error: type[Exception], message: str
) -> None:
    problem = Problem()
    optimizer = Lookbehind(problem.params, torch.optim.SGD, lr=0.1, rho=0.2, backend=backend)
    schedule = LambdaSchedule(optimizer, **functions)
    optimizer.step(problem.evaluate)
    weights, alpha = [p.detach().clone() for p in problem.params], optimizer.alpha
    state = copy.deepcopy(optimizer.state_dict())
    for _ in range(2):
        with pytest.raises(error, match=f"^{message}"):
            schedule.step()
    assert schedule.steps == 0
    assert optimizer.alpha == alpha
    assert_same_state(optimizer.state_dict(), state)
    assert all(torch.equal(p, w) for p, w in zip(problem.params, weights, strict=True))
    optimizer.step(problem.evaluate)


def test_what_it_does_not_take() -> None:
    problem = Problem()
    with pytest.raises(
        TypeError, match="^optimizer: expected Lookbehind or a method of the family, got an instance of SGD"
    ):
        LambdaSchedule(torch.optim.SGD(problem.params, lr=0.1))
    optimizer = SAM(problem.params, torch.optim.SGD, lr=0.1)
    with pytest.raises(TypeError, match="^rho: expected a function of the number of steps, or None, got 0.5"):
        LambdaSchedule(optimizer, rho=0.5)
    schedule = LambdaSchedule(optimizer)
    optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)]})
    with pytest.raises(RuntimeError, match="^param_groups: expected the 1 groups that there were"):
        schedule.step()


def test_it_is_one_of_torchs_schedulers() -> None:
    problem = Problem()
    optimizer = SAM(problem.params, torch.optim.SGD, lr=0.1, rho=0.2)
    schedule = LambdaSchedule(optimizer, rho=lambda step: 1 + step)
    assert isinstance(schedule, torch.optim.lr_scheduler.LRScheduler)
    assert "step" not in vars(optimizer)
    other = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    both = torch.optim.lr_scheduler.ChainedScheduler([other, schedule], optimizer)
    optimizer.step(problem.evaluate)
    both.step()
    assert (optimizer.param_groups[0]["rho"], optimizer.param_groups[0]["lr"]) == (0.4, 0.05)
    assert schedule.get_last_lr() == both.get_last_lr() == [0.05]
    schedule.step(4)
    assert schedule.last_epoch == schedule.steps == 4
    assert optimizer.param_groups[0]["rho"] == pytest.approx(1.0)
