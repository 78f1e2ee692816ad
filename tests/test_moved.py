"""A model that is given another dtype between two steps goes on there with its state, as with torch.optim."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import SAM, Lookbehind
from tests.conftest import drive, error
from tests.twin import BASES, METHODS, WITHOUT_PAIRS

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
