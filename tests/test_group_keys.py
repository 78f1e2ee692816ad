"""A base optimizer with a setting called rho or eta keeps it: those of the ascent have keys of their own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lookbehind_fused import ASAM, SAM, Lookbehind
from lookbehind_fused.compat import ASAM as AuthorsASAM
from lookbehind_fused.schedules import LambdaSchedule
from tests.algorithm1 import algorithm1
from tests.conftest import assert_close, assert_same_state


class Layerwise(Optimizer):
    """SGD at a rate for each tensor, with LARS's coefficient ``eta`` (You et al. 2017, equation 6) and a ``rho`` that
    averages the rates.
    """

    def __init__(self, params: Any, lr: float = 0.1, eta: float = 0.3, rho: float = 0.5) -> None:
        super().__init__(params, {"lr": lr, "eta": eta, "rho": rho})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    rate = group["eta"] * p.norm() / p.grad.norm()
                    state = self.state[p]
                    state["rate"] = group["rho"] * state.get("rate", rate) + (1 - group["rho"]) * rate
                    p.sub_(group["lr"] * state["rate"] * p.grad)


BASES: dict[str, tuple[type[Optimizer], dict[str, Any], tuple[str, ...]]] = {
    "Adadelta": (torch.optim.Adadelta, {"lr": 0.7, "rho": 0.6}, ("rho",)),
    "Layerwise": (Layerwise, {"eta": 0.4, "rho": 0.3}, ("rho", "eta")),
}


def gradient(w: Tensor) -> Tensor:
    return 0.3 * w + torch.linspace(-1, 1, w.numel(), dtype=w.dtype).view_as(w)


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.linspace(0.5, 2, n, dtype=torch.float64)) for n in (3, 5)]


def key(base: str, name: str) -> str:
    return f"ascent_{name}" if name in BASES[base][2] else name


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_both_are_what_they_are_said_to_be(backend: str, base: str, adaptive: bool) -> None:
    """Against Algorithm 1 over the base alone, also after a change, a copy and a round trip of the state."""
    make, settings, _ = BASES[base]
    params, others = parameters(), parameters()
    given = {key(base, "rho"): 0.2, key(base, "eta"): 0.05}
    optimizer = Lookbehind(None, make(params, **settings), k=2, alpha=0.5, adaptive=adaptive, backend=backend, **given)
    other = make(others, **settings)
    assert {name: optimizer.param_groups[0][name] for name in settings} == settings

    def backward() -> Tensor:
        for p in params:
            p.grad = gradient(p.detach())
        return torch.zeros(())

    def of_base(fast: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            for q, w, g in zip(others, fast, grads, strict=True):
                q.copy_(w)
                q.grad = g.clone()
        other.step()
        return [q.detach().clone() for q in others]

    rho = 0.2
    for step in range(4):
        if step == 1:
            rho = optimizer.param_groups[0][key(base, "rho")] = 0.4
            other.param_groups[0]["rho"] = optimizer.param_groups[0]["rho"] = 0.25
        if step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if step == 3:
            optimizer, params = copy.deepcopy((optimizer, params))
        optimizer.step(backward)
        outcome = algorithm1(
            others,
            lambda points, index: [gradient(w) for w in points],
            of_base,
            k=2,
            alpha=0.5,
            scope="global",
            reuse=True,
            max_grad_norm=None,
            rho=[rho] * 2,
            adaptive=[adaptive] * 2,
            eta=[0.05] * 2,
        )
        with torch.no_grad():
            for q, w in zip(others, outcome.params, strict=True):
                q.copy_(w)
        for p, q in zip(params, others, strict=True):
            assert_close(f"step {step}", p, q, 1e-12)


@pytest.mark.parametrize("base", BASES)
def test_the_other_name_is_refused(base: str) -> None:
    """In words that name the one to use; the instance is as it was."""
    make, settings, colliding = BASES[base]
    instance = make(parameters(), **settings)
    before = {name: value for name, value in instance.param_groups[0].items() if name != "params"}
    for name in colliding:
        for given in (instance, make):
            params = None if given is instance else parameters()
            with pytest.raises(
                TypeError, match=f"{name}: expected ascent_{name}.*{make.__name__} has a setting {name}"
            ):
                Lookbehind(params, given, **{name: 0.1})
    with pytest.raises(TypeError, match="ascent_adaptive: expected adaptive"):
        Lookbehind(None, instance, ascent_adaptive=True)
    with pytest.raises(TypeError, match="ascent_rho: expected rho"):
        Lookbehind(parameters(), torch.optim.SGD, ascent_rho=0.1, lr=0.1)
    with pytest.raises(ValueError, match="ascent_rho: expected a finite number >= 0, got -1"):
        Lookbehind(None, instance, ascent_rho=-1)
    assert {name: value for name, value in instance.param_groups[0].items() if name != "params"} == before


@pytest.mark.parametrize("base", BASES)
def test_defaults_groups_and_the_family(backend: str, base: str) -> None:
    """Of classes and instances, of groups of their own and added ones; schedules and the authors' form reach ours."""
    make, settings, _ = BASES[base]
    rho, eta = key(base, "rho"), key(base, "eta")
    params = parameters()
    optimizer = ASAM([{"params": params[:1], rho: 0.1}], make, backend=backend)
    assert optimizer.param_groups[0][rho] == 0.1
    assert optimizer.param_groups[0][eta] == 0.01
    optimizer.add_param_group({"params": params[1:]})
    assert optimizer.param_groups[1][rho] == 0.5
    with pytest.raises(ValueError, match=rf"param_groups\[2\]\['{rho}'\]"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], rho: -0.1})
    for name in BASES[base][2]:
        assert optimizer.param_groups[0][name] == make(parameters()).param_groups[0][name]
    schedule = LambdaSchedule(optimizer, rho=lambda step: 1 / (1 + step))
    schedule.step()
    assert [group[rho] for group in optimizer.param_groups] == [0.05, 0.25]
    sam = SAM(None, make(parameters(), **settings), backend=backend, **{rho: 0.3})
    assert (sam.param_groups[0][rho], sam.defaults[rho]) == (0.3, 0.3)
    model = nn.Linear(2, 2)
    authors = AuthorsASAM(make(model.parameters(), **settings), model, rho=0.3, eta=0.2)
    assert (authors.param_groups[0][rho], authors.param_groups[0][eta], authors.rho, authors.eta) == (
        0.3,
        0.2,
        0.3,
        0.2,
    )
    for name in BASES[base][2]:
        assert authors.param_groups[0][name] == settings[name]
    plain = make(parameters(), **settings)
    loaded = SAM(None, make(parameters()), backend=backend, **{rho: 0.3})
    loaded.load_state_dict(plain.state_dict())
    assert loaded.param_groups[0][rho] == 0.3
    for name in BASES[base][2]:
        assert loaded.param_groups[0][name] == settings[name]
    assert_same_state(loaded.state_dict()["state"], plain.state_dict()["state"])
