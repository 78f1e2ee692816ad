"""Gradients that are there when a step begins: somebody's are never lost in silence, the last step's are no matter."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import SAM
from lookbehind_fused.compat import LookbehindSAM, SingleFileSAM
from tests.conftest import assert_same_state
from tests.kernels.mutants import ROOT
from tests.twin import BASES, METHODS

FORMS = ["step", "evaluations"]
WAYS_OUT = r"(?s)gradients: expected none, or the last step's.*zero_grad\(\).*all microbatches.*optimizer\.closure = "


class Problem:
    """A loss of three tensors, one of which a second loss does not reach."""

    def __init__(self, method: str, base: str, backend: str, **options: Any) -> None:
        generator = torch.Generator().manual_seed(3)
        self.params = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in ((4, 3), (5,), ())]
        make, settings = BASES[base]
        self.optimizer = METHODS[method](self.params, make, rho=0.1, backend=backend, **settings, **options)

    def backward(self, *_: Any) -> Tensor:
        loss = sum((p - 0.3).square().sum() for p in self.params)
        loss.backward()
        return loss

    def part(self) -> Tensor:
        loss = self.params[0].pow(3).sum() + self.params[2].sin()
        loss.backward()
        return loss

    def step(self, form: str, evaluate: Callable[..., Tensor] | None = None) -> None:
        evaluate = evaluate or self.backward
        if form == "step":
            self.optimizer.step(evaluate)
        else:
            for _ in self.optimizer.evaluations():
                evaluate()

    def clearing(self, set_to_none: bool) -> Callable[..., Tensor]:
        """A closure in the form that LBFGS has."""

        def closure(*_: Any) -> Tensor:
            self.optimizer.zero_grad(set_to_none=set_to_none)
            return self.backward()

        return closure

    def state(self) -> Any:
        return copy.deepcopy([[p.detach() for p in self.params], self.optimizer.state_dict()])


@pytest.mark.sample(40)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trained", [0, 2])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_accumulated_gradients_are_not_lost(backend: str, method: str, base: str, trained: int, form: str) -> None:
    """They are refused, with weights, state and the gradients as they were; afterwards any way out goes on."""
    problem = Problem(method, base, backend)
    for _ in range(trained):
        problem.step(form)
    problem.optimizer.zero_grad()
    problem.part()
    grads = [p.grad for p in problem.params]
    kept = copy.deepcopy([None if g is None else g.clone() for g in grads])
    before = problem.state()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=WAYS_OUT):
            problem.step(form)
        assert_same_state(problem.state(), before)
        assert problem.optimizer.evaluation is None
        assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
        assert_same_state([None if p.grad is None else p.grad for p in problem.params], kept)
    twin = Problem(method, base, backend)
    for _ in range(trained):
        twin.step(form)
    problem.optimizer.zero_grad()
    for each in (problem, twin):
        each.step(form)
        each.step(form)
    assert_same_state(problem.state(), twin.state())


@pytest.mark.sample(40)
@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_closure_that_clears_loses_nothing(
    backend: str, method: str, base: str, form: str, set_to_none: bool
) -> None:
    """The same as where there was nothing to clear, to the last bit; whatever the gradients were, also NaN."""
    for strange in (1.0, torch.nan):
        problem, twin = (Problem(method, base, backend) for _ in range(2))
        for _ in range(2):
            for p in problem.params:
                p.grad = torch.full_like(p, strange)
            problem.step(form, problem.clearing(set_to_none))
            twin.step(form)
        assert_same_state(problem.state(), twin.state())


@pytest.mark.sample(20)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("base", BASES)
def test_what_a_step_left_is_no_matter(backend: str, base: str, form: str) -> None:
    """Complete, undone, aborted, by halves, of the base itself; cleared to 0; or in a copy that has none."""
    problem = Problem("lookbehind", base, backend)
    problem.step(form)
    assert problem.params[0].grad is not None
    problem.step(form)

    def fails(*_: Any) -> Tensor:
        problem.backward()
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        problem.step(form, fails)
    problem.step(form)
    problem.optimizer.zero_grad()
    problem.backward()
    problem.optimizer.ascent_step()
    problem.optimizer.abort_step()
    problem.step(form)
    problem.optimizer.zero_grad()
    problem.backward()
    problem.optimizer.base_optimizer.step()
    problem.step(form)
    problem.optimizer.zero_grad(set_to_none=False)
    problem.step(form)
    problem.params = problem.params  # the same tensors in a new optimizer
    problem.optimizer = METHODS["sam"](problem.params, torch.optim.SGD, lr=0.1, backend=backend)
    problem.step(form)
    other = copy.deepcopy(problem)
    other.step(form)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_added_to_a_leftover_is_not_lost(backend: str, form: str) -> None:
    """The same tensor with more in it; and one of 300 tensors, wherever it is."""
    problem = Problem("sam", "momentum", backend)
    problem.step(form)
    problem.part()
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        problem.step(form)
    params = [nn.Parameter(torch.ones(256, 128)) for _ in range(300)]
    problem.params = params
    problem.optimizer = SAM(params, torch.optim.SGD, lr=0.1, backend=backend)
    for touched in (0, 1, 150, 299):
        problem.optimizer.zero_grad()
        problem.step(form)
        params[touched].square().sum().backward()
        with pytest.raises(RuntimeError, match=f"parameter {touched} "):
            problem.step(form)


@pytest.mark.parametrize("form", FORMS)
def test_a_closure_that_raises_leaves_the_gradients(backend: str, form: str) -> None:
    """Those that were there before, and no NaN."""
    problem = Problem("lookbehind", "Adam", backend)
    problem.part()
    grads = [p.grad for p in problem.params]

    def fails(*_: Any) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        problem.step(form, fails)
    assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
    if form == "evaluations":
        for _ in problem.optimizer.evaluations():
            break
        assert all(p.grad is g for p, g in zip(problem.params, grads, strict=True))
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        problem.step(form)


@pytest.mark.parametrize("base", BASES)
def test_compat_forms_take_them_as_they_do(backend: str, base: str) -> None:
    """Backward, then ``step(closure)``, as users of the single-file form call it: evaluation 0 is what is there."""
    make, settings = BASES[base]
    results = []
    for by_step in (True, False):
        problem = Problem("sam", base, backend)
        optimizer = SingleFileSAM(problem.params, make, rho=0.1, backend=backend, **settings)
        for _ in range(2):
            problem.backward()
            if by_step:
                optimizer.step(problem.backward)
                optimizer.zero_grad()
            else:
                optimizer.first_step(zero_grad=True)
                problem.backward()
                optimizer.second_step(zero_grad=True)
        results.append([p.detach().clone() for p in problem.params])
    assert_same_state(*results)
    model = nn.Linear(3, 2)
    base_optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    authors = LookbehindSAM(base_optimizer, model, k_steps=1, rho=0.1, alpha=0.5)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        authors.ascent_step()
        model(torch.ones(1, 3)).sum().backward()
        authors.descent_step()


def test_adversaries_take_turns(backend: str) -> None:
    """Either loss reaches the tensors of both: each clears its own, as the message says."""
    torch.manual_seed(0)
    makes, judges = nn.Linear(3, 3), nn.Linear(3, 1)
    optimizers = [SAM(m.parameters(), torch.optim.SGD, lr=0.01, backend=backend) for m in (makes, judges)]

    def closure(sign: float) -> Callable[[], Tensor]:
        def evaluate() -> Tensor:
            loss = sign * judges(makes(torch.ones(2, 3))).mean()
            loss.backward()
            return loss

        return evaluate

    optimizers[0].step(closure(1.0))
    with pytest.raises(RuntimeError, match=WAYS_OUT):
        optimizers[1].step(closure(-1.0))
    for _ in range(2):
        for optimizer, sign in zip(optimizers, (1.0, -1.0), strict=True):
            optimizer.zero_grad()
            optimizer.step(closure(sign))


def test_the_script_of_a_trainer_that_accumulates() -> None:
    """As Lightning does it: half of the batch before the closure."""
    code = (
        "import torch; from torch import nn; from lookbehind_fused import SAM\n"
        "p = nn.Parameter(torch.zeros(2)); opt = SAM([p], torch.optim.SGD, lr=1.0, rho=0.0)\n"
        "def backward(batch): loss = (p * batch).sum() / 2; loss.backward(); return loss\n"
        "backward(torch.tensor([1.0, 0.0]))\n"
        "opt.step(lambda: backward(torch.tensor([0.0, 1.0])))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "zero_grad()" in done.stderr
