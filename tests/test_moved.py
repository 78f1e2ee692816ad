"""A model that is given another dtype or other memory between two steps goes on there with its state, as with
torch.optim.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import SAM, Lookbehind
from tests.conftest import assert_same_state, drive, error
from tests.twin import BASES, METHODS, WITHOUT_PAIRS, Twin, scaled_apart, two_groups

WAYS: dict[str, list[torch.dtype]] = {  # the dtype of each step
    "double": [torch.float32] * 2 + [torch.float64] * 4,
    "float": [torch.float64] * 2 + [torch.float32] * 4,
    "there and back": [torch.float32] * 2 + [torch.float64] * 2 + [torch.float32] * 2,
}


@pytest.mark.sample(40)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("base", [base for base in BASES if base != "RMSprop"])  # torch's own fails there
@pytest.mark.parametrize("method", METHODS)
def test_another_dtype_between_steps(backend: str, method: str, base: str, way: str, form: str) -> None:
    """To float32's precision what float64 gives all along: neither weights nor state begin anew."""
    if form == "pairs" and method in WITHOUT_PAIRS:
        pytest.skip("it has no such pairs")
    make, settings = BASES[base]
    found = []
    for dtypes in ([torch.float64] * 6, WAYS[way]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtypes[0])
        optimizer = METHODS[method](model.parameters(), make, rho=0.1, backend=backend, **settings)

        def closure(*_: Any, model: nn.Module = model) -> Tensor:
            inputs = torch.linspace(-1, 1, 12, dtype=torch.float64).view(4, 3).to(model[0].weight)
            loss = 0.1 * (model(inputs) - 1).square().mean()
            loss.backward()
            return loss

        for dtype in dtypes:
            model.to(dtype)
            drive(optimizer, form, lambda index: closure(), getattr(optimizer, "optimizer", optimizer).k)
            assert {p.dtype for p in model.parameters()} == {dtype}
        found.append([copy.deepcopy(p.detach()) for p in model.parameters()])
    for p, q in zip(*found, strict=True):
        assert error(q, p) < 3e-5  # Adam's steps of lr, with moments of the size of float32's rounding, are not far off


@pytest.mark.sample(12)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("shape", [(5,), (1,), (), (2, 3), (0,), (2, 0)])
@pytest.mark.parametrize("base", [base for base in BASES if base != "RMSprop"])
def test_another_dtype_of_one_tensor(backend: str, base: str, shape: tuple[int, ...], form: str) -> None:
    """Alone: all go on, to the precision that it has for a while."""
    twin = Twin(backend, base, shapes=[(4,), shape], form=form)
    p, q = twin.params[1], twin.theirs[1]
    for dtype in (torch.float64, torch.float32, torch.float32, torch.float64):
        nn.ParameterList([p]).to(dtype)
        drive(twin.optimizer, form, twin.evaluate, 2)
        twin.paper()
        twin.steps += 1
        for a, b in zip(twin.params, twin.theirs, strict=True):
            assert error(a, b) < 3e-5
        assert p.dtype == dtype
        assert set(twin.optimizer.state.get(p) or {}) == {k for k, v in twin.other.state[q].items() if v is not None}


@pytest.mark.parametrize("base", ["momentum", "Adam", "RMSprop"])
def test_to_16_bits(backend: str, base: str) -> None:
    """State goes on in float32, from which weights of 16 bits are rounded: they stay within a few roundings of those
    that were float32 all along. Gradients are a formula of the step.
    """
    make, settings = BASES[base]
    found = []
    for low in (False, True):
        p = nn.Parameter(torch.linspace(0.5, 2, 50))
        optimizer = Lookbehind([p], make, k=2, rho=0.1, backend=backend, **settings)
        for step in range(6):
            if low and step == 3:
                p.data = p.data.bfloat16()
                p.grad = None
            for evaluation in optimizer.evaluations():
                p.grad = torch.linspace(-1, 1, 50).to(p) * 0.125 * (1 + step + evaluation.index)
        found.append(p.detach().float())
        kept = [value for value in optimizer.state[p].values() if isinstance(value, Tensor) and value.numel() > 1]
        assert kept
        assert {value.dtype for value in kept} == {torch.float32}
    assert p.dtype == torch.bfloat16
    start = torch.linspace(0.5, 2, 50)
    assert float((found[0] - start).abs().max()) > 0.05
    # three times rounded: the weights themselves once, gradients to 2^-9 of theirs, of which lr makes less
    assert error(found[1], found[0]) < 2 * torch.finfo(torch.bfloat16).eps


# ---- other memory ----------------------------------------------------------------------------------------------------


def emptied_and_loaded(model: nn.Module) -> None:
    saved = copy.deepcopy(model.state_dict())
    model.to_empty(device="cpu")
    model.load_state_dict(saved)


def swapped(model: nn.Module) -> None:
    """As torch may do it in a later version: other tensors, in the same objects."""
    model.zero_grad()
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(True)
    model._apply(torch.clone)
    torch.__future__.set_swap_module_params_on_conversion(before)


def flattened(model: nn.Module) -> None:
    """All side by side in one memory, none at its beginning."""
    buffer = torch.full((3 + sum(p.numel() for p in model.parameters()),), torch.nan, dtype=torch.float64)
    start = 3
    for p in model.parameters():
        p.data = buffer[start : start + p.numel()].view_as(p).copy_(p.data)
        start += p.numel()


def transposed(model: nn.Module) -> None:
    """The last dimension of each is the outermost one in memory."""
    for p in model.parameters():
        if p.dim() > 1:
            p.data = p.data.t().clone(memory_format=torch.contiguous_format).t()
            p.grad = None


PLACES: dict[str, Callable[[nn.Module], Any]] = {
    "to its device": lambda model: model.to("cpu"),
    "applied": lambda model: model._apply(torch.clone),
    "to shared memory": lambda model: model.share_memory(),
    "to_empty, load_state_dict": emptied_and_loaded,
    "swapped": swapped,
    "one by one": lambda model: [setattr(p, "data", p.data.clone()) for p in [*model.parameters()][1:]],
    "flattened": flattened,
    "transposed": transposed,
}


@pytest.mark.sample(40)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_other_memory_between_steps(backend: str, method: str, base: str, place: str, form: str) -> None:
    """The same values in another place: weights and state as if nothing had moved, to the last bit, but for sums in
    another order.
    """
    if form == "pairs" and method in WITHOUT_PAIRS:
        pytest.skip("it has no such pairs")
    make, settings = BASES[base]
    found, moved = [], False
    for moves in (lambda model: None, PLACES[place]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
        optimizer = METHODS[method](model.parameters(), make, rho=0.1, backend=backend, **settings)

        def evaluate(index: int, model: nn.Module = model) -> Tensor:
            for number, p in enumerate(model.parameters()):
                p.grad = (0.3 + 0.1 * number) * p.detach() + torch.linspace(-1, 1 + index, p.numel()).view_as(p)
            return torch.zeros(())

        for step in range(6):
            if step in (2, 4):  # between two rounds of Lookahead
                addresses = [p.data_ptr() for p in model.parameters()]
                moves(model)
                moved |= [p.data_ptr() for p in model.parameters()] != addresses
            drive(optimizer, form, evaluate, getattr(optimizer, "optimizer", optimizer).k)
        found.append([[p.detach() for p in model.parameters()], optimizer.state_dict()["state"]])
    assert moved == (place != "to its device")
    if place != "transposed":
        assert_same_state(found[1], found[0])
    for p, q in zip(found[0][0], found[1][0], strict=True):
        assert error(q, p) < 1e-13


@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("groups", [two_groups, scaled_apart], ids=["one bucket", "several"])
@pytest.mark.parametrize("base", BASES)
def test_a_parameter_without_memory_is_refused(backend: str, base: str, groups: Callable, form: str) -> None:
    """By name, before the others move; with its memory it goes on."""
    twin = Twin(backend, base, groups=groups, form=form)
    twin.step()
    twin.step()
    twin.optimizer.zero_grad()
    p, without = twin.params[2], nn.Parameter(torch.empty((), dtype=torch.float64, device="meta"))
    before = copy.deepcopy([[p.detach() for p in twin.params], twin.optimizer.state_dict()["state"]])
    torch.utils.swap_tensors(p, without)
    with pytest.raises(ValueError, match=r"^parameter 2 .*: expected a tensor with memory, not on the meta device"):
        drive(twin.optimizer, form, twin.evaluate, twin.optimizer.k)
    torch.utils.swap_tensors(p, without)
    assert_same_state([[p.detach() for p in twin.params], twin.optimizer.state_dict()["state"]], before)
    twin.optimizer.zero_grad()
    twin.step()
    twin.step()


def test_a_model_that_has_got_other_parameters(backend: str) -> None:
    """Those of before have no gradients any more: steps are skipped, and say so, where torch would do nothing."""
    for replaces in (
        lambda model: nn.init.zeros_(model.to("meta").to_empty(device="cpu").bias),
        lambda model: model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True),
    ):
        model = nn.Linear(3, 2)
        optimizer = Lookbehind(model.parameters(), torch.optim.Adam, lr=0.1, backend=backend)

        def closure(model: nn.Module = model) -> Tensor:
            model.zero_grad()
            loss = model(torch.ones(1, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        params = [*model.parameters()]
        before = [copy.deepcopy(p.detach()) for p in params]
        replaces(model)
        assert not any(p is q for p in params for q in model.parameters())
        with pytest.warns(UserWarning, match="no gradients on the optimizer's parameters: the step was skipped"):
            optimizer.step(closure)
        assert_same_state([p.detach() for p in params], before)
        optimizer.param_groups[0]["params"] = [*model.parameters()]
        nn.init.ones_(model.weight)
        optimizer.step(closure)
        assert not torch.equal(model.weight, torch.ones(2, 3))


def test_another_shape_is_refused(backend: str) -> None:
    """By name, before anything moves."""
    p = nn.Parameter(torch.ones(3))
    optimizer = SAM([p], torch.optim.SGD, lr=0.1, momentum=0.9, backend=backend)

    def closure() -> Tensor:
        loss = p.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    optimizer.zero_grad()
    p.data = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"parameter 0 .* was replaced between two steps: expected shape \(3,\)"):
        optimizer.step(closure)
    assert torch.equal(p.detach(), torch.ones(4))
