"""Hooks for whoever keeps weights elsewhere: called after every write, so that no evaluation sees those of before."""

import copy

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import SAM, Lookahead, Lookbehind
from tests.conftest import assert_equal
from tests.twin import BASES, METHODS, values


class Cached:
    """Tensors of which somebody keeps a copy until he is told to look again."""

    def __init__(self, method: str, base: str, backend: str) -> None:
        make, of_base = BASES[base]
        self.params = [nn.Parameter(values(5, seed=i).clone()) for i in range(2)]
        self.optimizer = METHODS[method](None, make(self.params, **of_base), backend=backend)
        self.kept: list[Tensor] | None = None
        self.handle = self.optimizer.register_weights_hook(self.forget)
        self.calls = 0

    def forget(self) -> None:
        self.kept = None
        self.calls += 1

    def evaluate(self) -> Tensor:
        if self.kept is None:
            self.kept = [p.detach().clone() for p in self.params]
        for i, (p, w) in enumerate(zip(self.params, self.kept, strict=True)):
            assert_equal(f"what is seen of tensor {i}", w, p.detach())
            p.grad = w - values(5, seed=10 + i)
        return torch.zeros(())


@pytest.mark.parametrize("base", ["momentum", "RMSprop"])
@pytest.mark.parametrize("method", METHODS)
def test_every_write_is_told(backend: str, method: str, base: str) -> None:
    cached = Cached(method, base, backend)
    for _ in range(3):
        cached.optimizer.step(cached.evaluate)
        cached.evaluate()
        cached.optimizer.zero_grad()
    assert cached.calls >= 3


def test_a_step_that_fails_is_told(backend: str) -> None:
    cached = Cached("lookbehind", "momentum", backend)

    def fails() -> Tensor:
        cached.evaluate()
        if cached.optimizer.evaluation.index == 2:
            raise KeyError
        return torch.zeros(())

    with pytest.raises(KeyError):
        cached.optimizer.step(fails)
    cached.evaluate()


def test_slow_weights_are_told(backend: str) -> None:
    for over in (SAM, lambda params, base, backend, **settings: base(params, **settings)):
        cached = Cached("sam", "momentum", backend)
        cached.handle.remove()
        cached.optimizer = Lookahead(over(cached.params, torch.optim.SGD, lr=0.1, backend=backend), k=3)
        cached.optimizer.register_weights_hook(cached.forget)
        for _ in range(2):
            cached.kept = None
            cached.optimizer.step(cached.evaluate)
        cached.kept = None
        cached.evaluate()
        with cached.optimizer.slow_weights():
            cached.evaluate()
        cached.evaluate()


def test_hooks_are_functions_and_are_removed(backend: str) -> None:
    cached = Cached("lookbehind", "momentum", backend)
    with pytest.raises(TypeError, match="hook: expected a function without arguments, got 3"):
        cached.optimizer.register_weights_hook(3)
    cached.handle.remove()
    calls = cached.calls

    def evaluate() -> Tensor:
        cached.kept = None
        return cached.evaluate()

    cached.optimizer.step(evaluate)
    assert cached.calls == calls


def test_the_model_is_a_module_and_is_copied(backend: str) -> None:
    model = nn.Linear(3, 2)
    optimizer = Lookbehind(model.parameters(), torch.optim.SGD, lr=0.1, model=model, backend=backend)
    for wrong in (3, [model]):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module or None, got"):
            optimizer.model = wrong
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module or None, got"):
            SAM(model.parameters(), torch.optim.SGD, lr=0.1, model=wrong, backend=backend)
    assert optimizer.model is model
    other, of_other = copy.deepcopy([model, optimizer])
    assert of_other.model is other
    assert all(p is q for p, q in zip(of_other.param_groups[0]["params"], other.parameters(), strict=True))
