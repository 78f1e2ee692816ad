"""Whatever has a gradient is trained, as with torch.optim: also what requires one inside the closure alone."""

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import Lookbehind
from tests.conftest import assert_same_state, drive
from tests.twin import BASES, METHODS, WITHOUT_PAIRS


@pytest.mark.sample(60)
@pytest.mark.parametrize("clears", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["step", "evaluations", "pairs"])
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_on_inside_the_closure_is_on(
    backend: str, method: str, base: str, form: str, dtype: torch.dtype, clears: bool
) -> None:
    """The same bits as where it stays on, step after step, whether gradients are cleared in between or not."""
    if form == "pairs" and method in WITHOUT_PAIRS:
        pytest.skip("it has no such pairs")
    make, settings = BASES[base]
    found = []
    for toggled in (False, True):
        generator = torch.Generator().manual_seed(0)
        params = [nn.Parameter(torch.randn(3, generator=generator).to(dtype)) for _ in range(3)]
        optimizer = METHODS[method](params, make, rho=0.1, backend=backend, **settings)
        adapters = params[1:] if toggled else []

        def backward(params: list[Tensor] = params, adapters: list[Tensor] = adapters) -> Tensor:
            for p in adapters:
                p.requires_grad_(True)
            loss = (params[0] * params[1] - params[2]).square().sum()
            loss.backward()
            for p in adapters:
                p.requires_grad_(False)
            return loss

        for p in adapters:
            p.requires_grad_(False)
        for _ in range(4):
            drive(optimizer, form, lambda index: backward(), getattr(optimizer, "optimizer", optimizer).k)
            if clears:
                optimizer.zero_grad()
        found.append([[p.detach() for p in params], optimizer.state_dict()["state"]])
        assert all(p.requires_grad for p in params if not any(p is q for q in adapters))
    assert_same_state(*found)


def test_what_never_has_a_gradient_stays(backend: str) -> None:
    """And is not looked at again: a frozen tensor has no state."""
    p, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = Lookbehind([p, frozen], torch.optim.Adam, lr=0.1, backend=backend)
    for _ in range(3):
        optimizer.step(lambda: (p.square().sum(), p.square().sum().backward())[0])
    assert torch.equal(frozen, torch.ones(2))
    assert frozen not in optimizer.state


def test_frozen_for_good_is_frozen(backend: str) -> None:
    """Once no closure switches it on any more, neither weights nor state of it move."""
    p, adapter = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2), requires_grad=False)
    optimizer = Lookbehind([p, adapter], torch.optim.Adam, lr=0.1, k=2, backend=backend)

    def backward(on: bool) -> Tensor:
        adapter.requires_grad_(on)
        loss = (p * adapter).square().sum()
        loss.backward()
        adapter.requires_grad_(False)
        return loss

    optimizer.step(lambda: backward(True))
    assert not torch.equal(adapter, torch.ones(2))
    before, state = adapter.clone(), {key: value.clone() for key, value in optimizer.state[adapter].items()}
    optimizer.zero_grad()
    for _ in range(2):
        optimizer.step(lambda: backward(False))
    assert torch.equal(adapter, before)
    assert_same_state(dict(optimizer.state[adapter]), state)
