"""What a trainer wraps around an optimizer acts on the optimizer; none of its state comes to lie on the wrapper."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import SAM, LambdaSchedule, Lookahead, Lookbehind, compat
from lookbehind_fused.wrappers import unwrapped


class Wrapper:
    """As those of Lightning and Fabric: it takes on the class of the optimizer and reads from it what it has not."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._strategy: Any = None
        self.__class__ = type("Wrapped" + type(optimizer).__name__, (type(self), type(optimizer)), {})

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step() if closure is None else self._optimizer.step(closure)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


METHODS: dict[str, Callable[..., Any]] = {
    "lookbehind": lambda p, **o: Lookbehind(p, torch.optim.SGD, lr=0.1, momentum=0.9, **o),
    "sam": lambda p, **o: SAM(p, torch.optim.Adam, lr=0.1, **o),
    "unfused": lambda p, **o: SAM(p, torch.optim.RMSprop, lr=0.1, **o),
    "single-file": lambda p, **o: compat.SingleFileSAM(p, torch.optim.SGD, lr=0.1, **o),
    "lookahead": lambda p, **o: Lookahead(SAM(p, torch.optim.SGD, lr=0.1, **o), k=3),
}


class Job:
    def __init__(self, method: str, backend: str) -> None:
        self.p = nn.Parameter(torch.linspace(-1, 1, 7))
        self.optimizer = METHODS[method]([self.p], rho=0.1, backend=backend)
        self.wrapper: Any = Wrapper(self.optimizer)
        self.calls = 0

    def closure(self) -> Tensor:
        self.calls += 1
        loss = self.p.sin().sum()
        loss.backward()
        return loss.detach()


@pytest.fixture(params=METHODS)
def job(request: pytest.FixtureRequest, backend: str) -> Job:
    return Job(request.param, backend)


def test_nothing_of_a_step_lies_on_the_wrapper(job: Job) -> None:
    """Also where its own method runs with the wrapper as self; and a step that is open there is open here."""
    before = job.p.detach().clone()
    job.closure()
    job.wrapper.ascent_step()
    assert not torch.equal(job.p.detach(), before)
    for saves in (job.wrapper, job.optimizer):
        with pytest.raises(RuntimeError, match=r"^state_dict\(\): expected no open step"):
            saves.state_dict()
    job.wrapper.zero_grad()
    job.closure()
    job.optimizer.descent_step()
    if not isinstance(job.optimizer, Lookbehind) or job.optimizer.k == 1:
        assert job.wrapper.evaluation is None
        assert job.wrapper.diagnostics
    job.wrapper.abort_step()
    assert vars(job.wrapper).keys() == {"_optimizer", "_strategy"}
    job.wrapper._strategy = "its own"
    assert "_strategy" not in vars(job.optimizer)


def test_settings_act_on_the_optimizer(job: Job) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    inner = job.optimizer.optimizer if isinstance(job.optimizer, Lookahead) else job.optimizer
    for name, value in {
        "closure": job.closure,
        "scaler": scaler,
        "loss_scale": 2.0,
        "max_grad_norm": 3.0,
        "nonfinite": "skip",
        "buffers_at_slow": nn.BatchNorm1d(3),
    }.items():
        setattr(job.wrapper, name, value)
        assert getattr(inner, name) == value
    job.wrapper.k = 5
    job.wrapper.alpha = 0.25
    assert (job.optimizer.k, job.optimizer.alpha) == (5, 0.25)
    assert inner is job.optimizer or inner.k == 1
    with pytest.raises(TypeError, match="^closure: expected a function"):
        job.wrapper.closure = 1
    assert vars(job.wrapper).keys() == {"_optimizer", "_strategy"}


def test_settings_that_are_set_through_it_are_those_of_the_next_step(backend: str) -> None:
    job = Job("lookbehind", backend)
    job.wrapper.k = 4
    job.wrapper.step(job.closure)
    assert job.calls == 5
    job.wrapper.closure = job.closure
    job.p.grad = None
    job.closure()
    job.wrapper.step()
    assert job.calls == 10


def test_schedules_act_on_the_optimizer(job: Job) -> None:
    schedule = LambdaSchedule(job.wrapper, rho=lambda step: 1.0 + step, alpha=lambda step: 0.5)
    schedule.step()
    assert unwrapped(job.wrapper) is job.optimizer
    assert job.optimizer.param_groups[0]["rho"] == pytest.approx(0.2)
    assert job.optimizer.alpha == 0.5
    assert vars(job.wrapper).keys() == {"_optimizer", "_strategy"}


@pytest.mark.parametrize("over", ["wrapper", "optimizer"])
def test_learning_rates_are_scheduled_through_it(job: Job, over: str) -> None:
    """torch's schedulers replace ``step`` where they are, and look whether there was one."""
    scheduler = torch.optim.lr_scheduler.StepLR(getattr(job, over), 1, 0.5)
    for _ in range(2):
        job.p.grad = None
        if isinstance(unwrapped(job.wrapper), compat.SingleFileSAM):
            job.closure()
        job.wrapper.step(job.closure)
        scheduler.step()
    assert job.optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
