"""Settings are saved and come back; those given explicitly hold; torch's distributed checkpoints work as with torch."""

import copy
import io
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from lookbehind_fused import ASAM, SAM, Lookahead, Lookbehind, MultistepSAM
from tests.conftest import assert_equal, assert_same_state
from tests.twin import values

BASES: dict[str, Callable[..., Optimizer]] = {
    "SGD": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.8, weight_decay=0.02),
    "Adam": partial(torch.optim.Adam, lr=0.02, weight_decay=0.02),
    "AdamW": partial(torch.optim.AdamW, lr=0.02, amsgrad=True),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.01, momentum=0.5),
}


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def closure(model: nn.Module, t: int) -> Callable[..., Tensor]:
    """A step's evaluation, of its microbatch where it is given one."""

    def evaluate(evaluation: Any = None) -> Tensor:
        inputs = values(4, 3, seed=t)
        loss = model(inputs if evaluation is None else evaluation.part(inputs)).square().mean()
        loss.backward()
        return loss.detach()

    return evaluate


def train(optimizer: Any, model: nn.Module, steps: range) -> None:
    for t in steps:
        optimizer.step(closure(model, t))


def plainly(optimizer: Optimizer, model: nn.Module, steps: range) -> None:
    """The same with an optimizer that takes the gradients that are there."""
    for t in steps:
        optimizer.zero_grad()
        closure(model, t)()
        optimizer.step()


def assert_same_weights(what: str, ours: nn.Module, theirs: nn.Module) -> None:
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert_equal(f"{what}: {name}", p.detach(), q.detach())


# ---- ways of a checkpoint --------------------------------------------------------------------------------------------


def by_dict(source: Optimizer, model: nn.Module, target: Optimizer, other: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def by_file(source: Optimizer, model: nn.Module, target: Optimizer, other: nn.Module) -> None:
    """Nothing in it needs more than ``weights_only``."""
    file = io.BytesIO()
    torch.save(source.state_dict(), file)
    file.seek(0)
    target.load_state_dict(torch.load(file, weights_only=True))


def by_dcp(source: Optimizer, model: nn.Module, target: Optimizer, other: nn.Module) -> None:
    set_optimizer_state_dict(other, target, copy.deepcopy(get_optimizer_state_dict(model, source)))


def by_flat_dcp(source: Optimizer, model: nn.Module, target: Optimizer, other: nn.Module) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = copy.deepcopy(get_optimizer_state_dict(model, source, options=options))
    set_optimizer_state_dict(other, target, saved, options=options)


WAYS = [by_dict, by_file, by_dcp]


# ---- settings --------------------------------------------------------------------------------------------------------

# saved from, and loaded into an optimizer with: what differs is to be that of the first
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "k": ({"k": 3}, {"k": 1}),
    "alpha": ({"alpha": 0.8}, {"alpha": "adaptive"}),
    "adaptive alpha by tensor": (
        {"k": 3, "alpha": "adaptive", "alpha_scope": "tensor"},
        {"k": 2, "alpha": 0.3, "alpha_scope": "global"},
    ),
    "rho_scope": ({"rho_scope": "total", "k": 3}, {"rho_scope": "step", "k": 3}),
    "max_grad_norm": ({"max_grad_norm": 0.05}, {"max_grad_norm": None}),
    "no max_grad_norm": ({"max_grad_norm": None}, {"max_grad_norm": 0.05}),
    "nonfinite": ({"nonfinite": "skip"}, {"nonfinite": "propagate"}),
    "microbatches": ({"microbatches": 2}, {"microbatches": 1}),
    "one microbatch": ({"microbatches": 1}, {"microbatches": 4}),
    "reuse_gradient": ({"reuse_gradient": False}, {"reuse_gradient": True}),
    "ascent_fraction": ({"ascent_fraction": 0.5, "k": 2}, {"ascent_fraction": 1.0, "k": 1}),
    "whole ascents": ({"ascent_fraction": 1.0}, {"ascent_fraction": 0.25}),
    "ascent_gradient": ({"ascent_gradient": "previous"}, {"ascent_gradient": "current"}),
    "rho, adaptive, eta": ({"rho": 0.3, "adaptive": True, "eta": 0.2}, {"rho": 0.01, "adaptive": False, "eta": 0.05}),
}
ATTRIBUTES = ["k", "alpha", "alpha_scope", "rho_scope", "max_grad_norm", "nonfinite", "microbatches"]
ATTRIBUTES += ["ascent_gradient", "reuse_gradient", "ascent_fraction"]


@pytest.mark.sample(24)
@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_come_back(backend: str, name: str, way: Callable[..., None]) -> None:
    """Into an optimizer that was built with others, before its first step and after one; then the same bits follow."""
    mine, its = SETTINGS[name]
    for base, steps in (("momentum", 0), ("Adam", 1)):
        model = network()
        source = Lookbehind(None, BASES[base](model.parameters()), backend=backend, **mine)
        train(source, model, range(2))
        other = copy.deepcopy(model)
        target = Lookbehind(None, BASES[base](other.parameters()), backend=backend, **its)
        train(target, other, range(7, 7 + steps))
        other.load_state_dict(model.state_dict())
        for p in other.parameters():
            p.grad = None
        way(source, model, target, other)
        assert_same_weights("loading", other, model)
        for attribute in ATTRIBUTES:
            found, expected = getattr(target, attribute), getattr(source, attribute)
            assert (type(found), found) == (type(expected), expected), attribute
        for group, expected in zip(target.param_groups, source.param_groups, strict=True):
            assert {k: group[k] for k in ("rho", "adaptive", "eta")} == {
                k: expected[k] for k in ("rho", "adaptive", "eta")
            }
        if way is by_dcp and "previous" in mine.values():
            continue  # it keeps no gradients: the next step does not ascend before its first evaluation
        for t in (2, 3):
            train(source, model, range(t, t + 1))
            train(target, other, range(t, t + 1))
            assert_same_weights(f"step {t}", other, model)
        assert_same_state(target.state_dict(), source.state_dict())


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("average", [True, False])
def test_the_mean_of_multistep_comes_back(backend: str, average: bool, way: Callable[..., None]) -> None:
    model = network()
    source = MultistepSAM(None, BASES["momentum"](model.parameters()), k=3, average=average, rho=0.3, backend=backend)
    train(source, model, range(2))
    other = copy.deepcopy(model)
    target = MultistepSAM(None, BASES["momentum"](other.parameters()), k=2, average=not average, backend=backend)
    for p in other.parameters():
        p.grad = None
    way(source, model, target, other)
    assert (target.k, target.average) == (3, average)
    train(source, model, range(2, 4))
    train(target, other, range(2, 4))
    assert_same_weights("two steps", other, model)


def test_settings_that_were_set_later_are_saved(backend: str) -> None:
    """What is saved is what the next step would have used."""
    model = network()
    source = Lookbehind(None, BASES["Adam"](model.parameters()), backend=backend)
    train(source, model, range(1))
    source.k, source.alpha, source.max_grad_norm = 3, 0.9, 0.1
    other = copy.deepcopy(model)
    target = Lookbehind(None, BASES["Adam"](other.parameters()), backend=backend)
    target.load_state_dict(source.state_dict())
    assert (target.k, target.alpha, target.max_grad_norm) == (3, 0.9, 0.1)
    train(source, model, range(1, 3))
    train(target, other, range(1, 3))
    assert_same_weights("two steps", other, model)


# ---- given explicitly, or left to the groups -------------------------------------------------------------------------


def base_with(**own: Any) -> tuple[list[nn.Parameter], Optimizer]:
    """A base whose first group has settings of its own."""
    params = [nn.Parameter(values(*shape, seed=n).clone()) for n, shape in enumerate([(5,), (2, 3)])]
    return params, torch.optim.SGD([{"params": params[:1], **own}, {"params": params[1:]}], lr=0.1)


# the optimizer over a base, what its first group had, what the groups have afterwards
GIVEN: dict[str, tuple[Callable[..., Any], dict[str, Any], list[dict[str, Any]]]] = {
    "SAM rho": (partial(SAM, rho=0.5), {"rho": 0.05}, [{"rho": 0.5}, {"rho": 0.5}]),
    "SAM rho by position": (lambda _, base, **o: SAM(None, base, 0.5, **o), {"rho": 0.05}, [{"rho": 0.5}] * 2),
    "the default, given": (partial(SAM, rho=0.05), {"rho": 0.3}, [{"rho": 0.05}, {"rho": 0.05}]),
    "ASAM rho": (partial(ASAM, rho=0.7), {"rho": 0.05}, [{"rho": 0.7}, {"rho": 0.7}]),
    "Lookbehind": (
        partial(Lookbehind, rho=0.2, adaptive=True, eta=0.3),
        {"rho": 0.05, "adaptive": False, "eta": 0.01},
        [{"rho": 0.2, "adaptive": True, "eta": 0.3}] * 2,
    ),
    "not adaptive": (partial(Lookbehind, adaptive=False), {"adaptive": True}, [{"adaptive": False}] * 2),
    "MultistepSAM": (partial(MultistepSAM, rho=0.2), {"rho": 0.05}, [{"rho": 0.2}] * 2),
    "rho left": (SAM, {"rho": 0.3}, [{"rho": 0.3}, {"rho": 0.05}]),
    "ASAM rho left": (ASAM, {"rho": 0.3}, [{"rho": 0.3}, {"rho": 0.5}]),
    "only eta given": (
        partial(Lookbehind, eta=0.2),
        {"rho": 0.3, "adaptive": True, "eta": 0.1},
        [{"rho": 0.3, "adaptive": True, "eta": 0.2}, {"rho": 0.05, "adaptive": False, "eta": 0.2}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_holds_and_the_rest_is_the_groups_own(backend: str, name: str) -> None:
    """In the groups, and in the ascent: its length is rho where nothing is scaled."""
    make, own, expected = GIVEN[name]
    params, base = base_with(**own)
    optimizer = make(None, base, backend=backend)
    for group, entries in zip(optimizer.param_groups, expected, strict=True):
        assert {key: group[key] for key in entries} == entries
    if any(group["adaptive"] for group in optimizer.param_groups):
        return
    start = [p.detach().clone() for p in params]
    for evaluation in optimizer.evaluations():
        if evaluation.index == 1:
            for p, w, entries in zip(params, start, expected, strict=True):
                length = torch.linalg.vector_norm(p.detach() - w)
                torch.testing.assert_close(length, torch.tensor(entries.get("rho", 0.05) / 2**0.5, dtype=w.dtype))
        for p in params:  # of the same norm, so that each has half of the square
            p.grad = torch.full_like(p, p.numel() ** -0.5)


def test_wrapped_again_it_has_what_is_given_again(backend: str) -> None:
    """A base that was under another optimizer before, whose settings may stand in its groups."""
    params, base = base_with()
    Lookbehind(None, base, rho=0.3, k=5, alpha=0.2, max_grad_norm=0.1, microbatches=2, backend=backend)
    optimizer = Lookbehind(None, base, rho=0.1, k=3, alpha=0.9, max_grad_norm=None, microbatches=1, backend=backend)
    assert (optimizer.k, optimizer.alpha, optimizer.max_grad_norm, optimizer.microbatches) == (3, 0.9, None, 1)
    assert [group["rho"] for group in optimizer.param_groups] == [0.1, 0.1]
    sam = SAM(None, base, backend=backend)
    assert (sam.k, sam.alpha) == (1, 1.0)
    calls = 0

    def evaluate() -> Tensor:
        nonlocal calls
        calls += 1
        for p in params:
            p.grad = torch.ones_like(p)
        return torch.zeros(())

    sam.step(evaluate)
    assert calls == 2


# ---- distributed checkpoints, on a single process --------------------------------------------------------------------


@pytest.mark.parametrize("way", [by_dcp, by_flat_dcp], ids=lambda way: way.__name__)
@pytest.mark.parametrize("base", BASES)
def test_dcp_round_trip(backend: str, base: str, way: Callable[..., None]) -> None:
    """Into a new optimizer, and into one that has trained; the next steps have the same bits."""
    for steps in (0, 2):
        model = network()
        source = Lookbehind(None, BASES[base](model.parameters()), k=2, rho=0.3, backend=backend)
        train(source, model, range(3))
        other = network(seed=1)
        target = Lookbehind(None, BASES[base](other.parameters()), k=2, rho=0.3, backend=backend)
        train(target, other, range(10, 10 + steps))
        other.load_state_dict(model.state_dict())
        way(source, model, target, other)
        assert_same_weights("loading", other, model)
        train(source, model, range(3, 6))
        train(target, other, range(3, 6))
        assert_same_weights("three steps", other, model)
        found, expected = target.state_dict(), source.state_dict()
        for saved in (found, expected):  # torch leaves empty entries for a base without state
            saved["state"] = {p: entry for p, entry in saved["state"].items() if entry}
        assert_same_state(found, expected)


@pytest.mark.parametrize("base", BASES)
def test_dcp_from_a_plain_optimizer(backend: str, base: str) -> None:
    """It knows nothing of rho, adaptive and eta: those of the optimizer that it is loaded into come back."""
    model = network()
    plain = BASES[base](model.parameters())
    plainly(plain, model, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, plain))
    other = copy.deepcopy(model)
    for p in other.parameters():
        p.grad = None
    settings = {"k": 2, "rho": 0.3, "adaptive": True, "eta": 0.2, "backend": backend}
    target = Lookbehind(None, BASES[base](other.parameters()), **settings)
    set_optimizer_state_dict(other, target, saved)
    assert [target.param_groups[0][key] for key in ("rho", "adaptive", "eta")] == [0.3, True, 0.2]
    assert (target.k, target.alpha) == (2, 0.5)
    expected = Lookbehind(None, plain, **settings)
    expected.zero_grad()
    train(target, other, range(2, 4))
    train(expected, model, range(2, 4))
    assert_same_weights("two steps", other, model)


@pytest.mark.parametrize("base", BASES)
def test_dcp_to_a_plain_optimizer(backend: str, base: str) -> None:
    model = network()
    source = Lookbehind(None, BASES[base](model.parameters()), k=2, rho=0.3, backend=backend)
    train(source, model, range(2))
    saved = copy.deepcopy(get_optimizer_state_dict(model, source))
    ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
    for p in ours.parameters():
        p.grad = None
    target = BASES[base](ours.parameters())
    set_optimizer_state_dict(ours, target, saved)
    expected = BASES[base](theirs.parameters())
    expected.load_state_dict(source.base_optimizer.state_dict())
    plainly(target, ours, range(2, 4))
    plainly(expected, theirs, range(2, 4))
    assert_same_weights("two steps", ours, theirs)


@pytest.mark.parametrize("base", BASES)
def test_dcp_before_the_first_step(backend: str, base: str) -> None:
    """It makes state by a step with zero gradients and lr 0: the state that torch makes, and no weight moves."""
    model, theirs = network(), network()
    optimizer = Lookbehind(None, BASES[base](model.parameters()), rho=0.3, backend=backend)
    found = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    plain = BASES[base](theirs.parameters())
    expected = get_optimizer_state_dict(theirs, plain)
    assert_same_weights("saving", model, theirs)
    assert_same_state(found["state"], expected["state"])
    assert optimizer.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert all(p.grad is None for p in model.parameters())
    continued = Lookbehind(None, plain, rho=0.3, backend=backend)
    train(optimizer, model, range(2))
    train(continued, theirs, range(2))
    assert_same_weights("two steps", model, theirs)


def test_dcp_refuses_no_step_that_moves_something(backend: str) -> None:
    """``step(closure=None)`` is for DCP alone: gradients that are there would be lost, and a step needs several."""
    model = network()
    optimizer = Lookbehind(None, BASES["Adam"](model.parameters()), backend=backend)
    before = copy.deepcopy(model)
    closure(model, 0)()
    for call in (optimizer.step, partial(optimizer.step, None), partial(optimizer.step, closure=None)):
        with pytest.raises(TypeError, match="closure"):
            call()
    assert_same_weights("refused", model, before)
    assert not any(optimizer.state.values())


# ---- hooks -----------------------------------------------------------------------------------------------------------


def load_hooks(optimizer: Optimizer) -> int:
    names = ("_optimizer_load_state_dict_pre_hooks", "_optimizer_load_state_dict_post_hooks")
    names += ("_optimizer_state_dict_pre_hooks", "_optimizer_state_dict_post_hooks")
    return sum(len(getattr(optimizer, name)) for name in names)


def test_hooks_do_not_pile_up_on_a_base(backend: str) -> None:
    """However often it is wrapped, copied or loaded."""
    _, base = base_with()
    optimizer = Lookbehind(None, base, backend=backend)
    once = load_hooks(base)
    for make in (SAM, Lookbehind, MultistepSAM):
        optimizer = make(None, base, backend=backend)
        Lookahead(optimizer, k=2)
        optimizer.load_state_dict(optimizer.state_dict())
        assert load_hooks(base) == once
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        again = copy.deepcopy(copied)
        assert load_hooks(again.base_optimizer) <= once
        assert load_hooks(copied.base_optimizer) <= once
