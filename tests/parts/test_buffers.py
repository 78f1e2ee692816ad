"""Buffers of the model: those of evaluations at the slow weights."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrizations import spectral_norm

from lookbehind_fused import SAM, Lookbehind, buffers_at_slow, running_stats_at_slow
from tests.conftest import assert_same_state


class OwnNorm(_BatchNorm):
    """Writes its statistics itself, whatever its flags say, and counts in a buffer of its own."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.register_buffer("calls", torch.zeros(()))

    def _check_input_dim(self, x: Tensor) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.running_mean.lerp_(x.detach().mean((0, 2, 3)), 0.3)
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)


class Renewed(nn.Module):
    """Custom code: buffers that a forward pass replaces by new tensors, fills for the first time, or counts with."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("codes", None)
        self.register_buffer("step", torch.zeros((), dtype=torch.int64), persistent=False)
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)
        self.codes = x.detach()[:2] if self.codes is None else 0.5 * (self.codes + x.detach()[:2])
        self.step.add_(1)
        return (x - self.mean.to(x)) * self.weight + self.codes.mean()


def network() -> nn.Module:
    torch.manual_seed(1)
    cumulative = nn.BatchNorm2d(4, momentum=None)
    return nn.Sequential(
        *(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), cumulative, nn.ReLU()),
        *(nn.Conv2d(4, 4, 3), OwnNorm(4), nn.Flatten(), nn.LazyLinear(3)),
        *(spectral_norm(nn.Linear(3, 3)), Renewed()),
    ).double()


INPUTS = torch.randn(8, 1, 9, 9, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def loss(model: nn.Module, inputs: Tensor = INPUTS) -> Tensor:
    return model(inputs).square().mean()


def make(model: nn.Module, backend: str, **settings: Any) -> Lookbehind:
    loss(model)  # the lazy layer
    settings = {"rho": 0.1, "k": 3, "buffers_at_slow": model, **settings}
    return Lookbehind(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend, **settings)


@pytest.mark.sample(6)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs", "apply"])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_only_evaluations_at_the_slow_weights_take_part(backend: str, form: str, microbatches: int) -> None:
    """As a forward pass at the slow weights leaves them, for each microbatch one."""
    model = network()
    optimizer = make(model, backend, microbatches=microbatches)
    for _ in range(2):
        expected = copy.deepcopy(model)
        for part in INPUTS.chunk(microbatches):
            loss(expected, part)
        if form == "step":

            def closure(*evaluation: Any) -> Tensor:
                value = loss(model, evaluation[0].part(INPUTS) if evaluation else INPUTS)
                value.backward()
                return value

            optimizer.step(closure)
        elif form == "pairs":
            for evaluation in optimizer.program(reuse_gradient=False).evaluations:
                optimizer.zero_grad()
                loss(model, evaluation.part(INPUTS)).backward()
                (optimizer.ascent_step if evaluation.ascends else optimizer.descent_step)()
        else:
            for evaluation in optimizer.evaluations(apply=form != "apply"):
                loss(model, evaluation.part(INPUTS)).backward()
                if form == "apply":
                    optimizer.apply(evaluation)
        assert_same_state(dict(model.named_buffers()), dict(expected.named_buffers()))


def test_without_it_they_take_part_k_plus_1_times(backend: str) -> None:
    model = network()
    optimizer = make(model, backend, buffers_at_slow=None)
    before = int(model[1].num_batches_tracked)
    for _ in optimizer.evaluations():
        loss(model).backward()
    assert int(model[1].num_batches_tracked) == before + 4


@pytest.mark.parametrize("after", range(4))
def test_a_step_that_fails_leaves_them_as_they_were(backend: str, after: int) -> None:
    model = network()
    optimizer = make(model, backend)
    before, calls = copy.deepcopy(model.state_dict()), []

    def closure() -> Tensor:
        calls.append(loss(model))
        calls[-1].backward()
        return calls[-1] if len(calls) <= after else 1 // 0

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert_same_state(dict(model.state_dict()), dict(before))


def test_the_block_by_itself() -> None:
    """Once, twice, around an exception, and without BatchNorm."""
    model = network()
    loss(model)
    before = copy.deepcopy(model.state_dict())
    with buffers_at_slow(model):
        loss(model)
        with buffers_at_slow(model):
            loss(model)
    assert_same_state(dict(model.state_dict()), dict(before))

    def fail() -> None:
        with buffers_at_slow(model):
            loss(model)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_same_state(dict(model.state_dict()), dict(before))
    with buffers_at_slow(nn.Linear(2, 2)):
        pass
    with pytest.raises(TypeError, match="^buffers_at_slow: expected a torch.nn.Module, got None"):
        buffers_at_slow(None).__enter__()


def test_copies_have_the_copied_model(backend: str) -> None:
    model = network()
    optimizer = make(model, backend)
    other, second = copy.deepcopy((model, optimizer))
    assert second.buffers_at_slow is other
    for m, o in ((model, optimizer), (other, second)):
        for _ in o.evaluations():
            loss(m).backward()
    assert_same_state(dict(other.state_dict()), dict(model.state_dict()))


def test_sam_takes_it_too(backend: str) -> None:
    model = network()
    loss(model)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, buffers_at_slow=model, backend=backend)
    expected = copy.deepcopy(model)
    loss(expected)
    loss(model).backward()
    optimizer.first_step(zero_grad=True)
    loss(model).backward()
    optimizer.second_step()
    assert_same_state(dict(model.named_buffers()), dict(expected.named_buffers()))


def test_the_old_name(backend: str) -> None:
    """Of the argument, the attribute and the block."""
    model = network()
    optimizer = make(model, backend, buffers_at_slow=None, running_stats_at_slow=model)
    assert optimizer.buffers_at_slow is optimizer.running_stats_at_slow is model
    optimizer.running_stats_at_slow = None
    assert optimizer.buffers_at_slow is None
    assert running_stats_at_slow is buffers_at_slow
    with pytest.raises(TypeError, match="^running_stats_at_slow: expected buffers_at_slow alone"):
        make(model, backend, running_stats_at_slow=model)
    with pytest.raises(TypeError, match="^buffers_at_slow: expected a torch.nn.Module"):
        make(model, backend, buffers_at_slow=None, running_stats_at_slow=3)


@pytest.mark.parametrize("after", range(4))
def test_a_tensor_that_joins_at_the_first_evaluation_changes_nothing(backend: str, after: int) -> None:
    """The step begins again with it, but the buffers are still those of before the step, or of the slow weights."""
    model = network()
    optimizer = make(model, backend)
    adapter = model[0].weight
    adapter.requires_grad_(False)
    before, calls = copy.deepcopy(model.state_dict()), []

    def closure() -> Tensor:
        adapter.requires_grad_(True)
        calls.append(loss(model))
        calls[-1].backward()
        adapter.requires_grad_(False)
        return calls[-1] if len(calls) <= after else 1 // 0

    with pytest.raises(ZeroDivisionError):
        optimizer.step(closure)
    assert_same_state(dict(model.state_dict()), dict(before))
    expected = copy.deepcopy(model)
    loss(expected)
    after += 100
    optimizer.step(closure)
    assert_same_state(dict(model.named_buffers()), dict(expected.named_buffers()))
    assert not torch.equal(adapter, expected[0].weight)
