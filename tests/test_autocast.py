"""Autocast around a step keeps its casts of weights while it is open: the same as autocast inside the closure."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import SAM, Lookahead, Lookbehind, MultistepSAM, analysis
from lookbehind_fused.compat import LookbehindSAM, SingleFileSAM
from tests.conftest import assert_same_state

INPUTS, TARGETS = (torch.randn(16, n, generator=torch.Generator().manual_seed(n)) for n in (4, 1))
BASES = {
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "Adam": (torch.optim.Adam, {"lr": 0.01}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.01}),
}


def autocast() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


class Problem:
    """A model whose losses and weights are noted."""

    def __init__(self, around: bool) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))
        self.around, self.losses = around, []

    def loss(self) -> Tensor:
        with nullcontext() if self.around else autocast():
            loss = (self.model(INPUTS).float() - TARGETS).square().mean()
        self.losses.append(loss.item())
        return loss

    def closure(self, *_: Any) -> Tensor:
        loss = self.loss()
        loss.backward()
        return loss


def one_step(optimizer: Any, problem: Problem, form: str) -> None:
    if form == "step":
        optimizer.step(problem.closure)
    elif form == "evaluations":
        for _ in optimizer.evaluations():
            problem.closure()
    else:
        for _ in range(getattr(optimizer, "k_steps", None) or optimizer.k):
            for half in (optimizer.ascent_step, optimizer.descent_step):
                for p in problem.model.parameters():
                    p.grad = None
                problem.closure()
                half()


MAKERS = {
    "sam": lambda p, b, **o: SAM(p.model.parameters(), b, rho=1.0, **o),
    "lookbehind": lambda p, b, **o: Lookbehind(p.model.parameters(), b, rho=0.5, k=3, alpha="adaptive", **o),
    "multistep": lambda p, b, **o: MultistepSAM(p.model.parameters(), b, rho=0.5, k=2, average=True, **o),
    "2k": lambda p, b, **o: Lookbehind(p.model.parameters(), b, rho=0.5, k=2, reuse_gradient=False, **o),
    "free": lambda p, b, **o: Lookbehind(p.model.parameters(), b, rho=0.5, k=2, ascent_gradient="previous", **o),
    "lookahead": lambda p, b, **o: Lookahead(SAM(p.model.parameters(), b, rho=1.0, **o), k=2),
}


@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", MAKERS)
def test_around_a_step_is_inside_the_closure(backend: str, method: str, base: str, form: str) -> None:
    if form == "pairs" and method in ("multistep", "free"):
        pytest.skip("it has no such pairs")
    seen = []
    for around in (False, True):
        problem, (make_base, settings) = Problem(around), BASES[base]
        optimizer = MAKERS[method](problem, make_base, backend=backend, **settings)
        with autocast() if around else nullcontext():
            for _ in range(2):
                one_step(optimizer.optimizer if form == "pairs" and method == "lookahead" else optimizer, problem, form)
            problem.loss()
            if method == "lookahead":
                with optimizer.slow_weights():
                    problem.loss()
                problem.loss()
        seen.append((problem.losses, [p.detach() for p in problem.model.parameters()]))
    assert seen[0][0] == seen[1][0]
    assert len(set(seen[0][0])) > 3, "the perturbed weights are seen"
    assert_same_state(seen[1][1], seen[0][1])


def test_an_undone_step_is_seen(backend: str) -> None:
    problem = Problem(around=True)
    optimizer = SAM(problem.model.parameters(), torch.optim.SGD, lr=0.1, rho=1.0, backend=backend)
    with autocast():
        problem.closure()
        optimizer.ascent_step()
        problem.loss()
        optimizer.abort_step()
        problem.loss()
    assert problem.losses[0] == problem.losses[2] != problem.losses[1]


@pytest.mark.parametrize("form", ["single-file", "authors"])
def test_the_forms_that_people_already_use(backend: str, form: str) -> None:
    seen = []
    for around in (False, True):
        problem = Problem(around)
        params = problem.model.parameters()
        if form == "single-file":
            optimizer: Any = SingleFileSAM(params, torch.optim.SGD, lr=0.1, rho=1.0, backend=backend)
        else:
            base = torch.optim.SGD(params, lr=0.1)
            optimizer = LookbehindSAM(base, problem.model, rho=0.5, k_steps=2, backend=backend)
        with autocast() if around else nullcontext():
            for _ in range(2):
                if form == "authors":
                    one_step(optimizer, problem, "pairs")
                    continue
                optimizer.zero_grad()
                problem.closure()
                optimizer.step(problem.closure)
        seen.append(problem.losses)
    assert seen[0] == seen[1]


def test_measurements() -> None:
    problem = Problem(around=True)
    loader, loss_fn = [(INPUTS, TARGETS)], lambda out, y: (out.float() - y).square().mean()
    plain = analysis.sharpness(problem.model, loss_fn, loader, radii=[1.0])
    with autocast():
        cast = analysis.sharpness(problem.model, loss_fn, loader, radii=[1.0])
    torch.testing.assert_close(cast, plain, rtol=0.02, atol=0.0)
    with autocast():
        problem.loss()
        analysis.sharpness(problem.model, loss_fn, loader, radii=[1.0])
        problem.loss()
    assert problem.losses[0] == problem.losses[1]
