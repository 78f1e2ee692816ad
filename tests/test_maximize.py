"""Maximizing -f is minimizing f: the ascent goes the other way too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import ASAM, Lookbehind, MultistepSAM
from tests.conftest import assert_equal, drive

BASES = {
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "Adam": (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.01}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.05, "amsgrad": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 0.05}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.05}),
}
METHODS: dict[str, Any] = {
    "lookbehind": lambda p, b, **o: Lookbehind(p, b, rho=0.3, k=2, alpha="adaptive", max_grad_norm=1.0, **o),
    "asam": lambda p, b, **o: ASAM(p, b, rho=0.3, **o),
    "means": lambda p, b, **o: MultistepSAM(p, b, rho=0.3, k=3, average=True, **o),
    "2k": lambda p, b, **o: Lookbehind(p, b, rho=0.3, k=3, alpha=0.4, reuse_gradient=False, **o),
}


@pytest.mark.parametrize("form", ["step", "evaluations"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("base", BASES)
def test_maximizing_the_negative_is_minimizing(backend: str, base: str, method: str, form: str) -> None:
    """To the bit; one of two groups, then both."""
    make, settings = BASES[base]
    for groups in ([True, True], [True, False]):
        found = []
        for maximizes in ([False, False], groups):
            params = [nn.Parameter(torch.linspace(-1, 1, n, dtype=torch.float64)) for n in (5, 7)]
            own = [{"params": [p], "maximize": m} for p, m in zip(params, maximizes, strict=True)]
            optimizer = METHODS[method](own, make, backend=backend, **settings)

            def evaluate(index: int, params: Any = params, maximizes: Any = maximizes) -> Tensor:
                for n, (p, negative) in enumerate(zip(params, maximizes, strict=True)):
                    g = (0.5 + n) * p.detach() + torch.cos(torch.arange(p.numel(), dtype=p.dtype) + index)
                    p.grad = -g if negative else g
                return torch.zeros(())

            for _ in range(3):
                drive(optimizer, form, evaluate, optimizer.k)
            found.append([p.detach() for p in params])
        for i, (a, b) in enumerate(zip(*found, strict=True)):
            assert_equal(f"tensor {i}", b, a)


def test_switched_between_two_steps(backend: str) -> None:
    for base in ("nesterov", "RMSprop"):
        make, settings = BASES[base]
        found = []
        for negative in (False, True):
            p = nn.Parameter(torch.linspace(-1, 1, 5, dtype=torch.float64))
            optimizer = Lookbehind([p], make, rho=0.3, k=2, backend=backend, **settings)
            for step in range(4):
                turned = negative and step >= 2
                optimizer.param_groups[0]["maximize"] = turned
                for _ in optimizer.evaluations():
                    g = p.detach() + 1.0
                    p.grad = -g if turned else g
            found.append(p.detach())
        assert_equal(base, found[1], found[0])
