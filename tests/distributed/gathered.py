"""Weights that FSDP2 keeps gathered from one forward pass to the next: each evaluation sees what was written."""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lookbehind_fused import SAM, Lookahead, Lookbehind
from tests.distributed.table import make_model, mesh_of
from tests.twin import values

SETTINGS: dict[str, Any] = {"k": 2, "alpha": 0.4, "rho": 0.5, "lr": 0.1, "momentum": 0.8}


def sharded(reshards: bool, **policy: Any) -> FSDPModule:
    model, mesh = make_model(), mesh_of(2, names=("dp",))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh, **policy)
    model.set_reshard_after_backward(reshards)
    return model


def losses_of(model: nn.Module, optimizer: Any, looks: bool = False, steps: int = 3) -> list[float]:
    """At every evaluation of some steps. ``looks``: a forward pass without a backward follows each backward."""
    losses: list[float] = []

    def closure() -> Tensor:
        loss = (model(values(6, 3, seed=1)).double().squeeze(-1) - values(6, seed=2)).square().mean()
        loss.backward()
        losses.append(loss.item())
        if looks:
            with torch.no_grad():
                model(values(6, 3, seed=3))
        return loss.detach()

    for _ in range(steps):
        optimizer.step(closure)
    return losses


def as_one_process(reshards: bool, looks: bool, known: bool) -> None:
    """The loss at each evaluation, which the first ascent raises; ``known``: the optimizer is told of the model."""
    one = make_model()
    expected = losses_of(one, Lookbehind(one.parameters(), torch.optim.SGD, **SETTINGS))
    assert expected[1] > expected[0] + 0.1
    model = sharded(reshards)
    given = {"model": model} if known else {}
    found = losses_of(model, Lookbehind(model.parameters(), torch.optim.SGD, **given, **SETTINGS), looks)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 1e-12, f"{found}, {expected}"


def mixed_precision() -> None:
    """Weights are cast where they are gathered: the losses are those of 16 bits, and see the ascents."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    with_reshards, without = (
        losses_of(model, Lookbehind(model.parameters(), torch.optim.SGD, **SETTINGS))
        for model in (sharded(True, mp_policy=policy), sharded(False, mp_policy=policy))
    )
    assert without == with_reshards
    assert without[1] > without[0] + 0.1


def slow_weights_are_seen() -> None:
    """Those of Lookahead, over SAM and over an optimizer that knows of nothing."""
    for make in (SAM, lambda params, base, rho, **settings: base(params, **settings)):
        seen = []
        for model in (make_model(), sharded(False)):
            optimizer = Lookahead(make(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1), k=2, alpha=0.4)
            steps = 4 if make is SAM else 1  # a torch optimizer's own writes are seen by nobody
            losses = losses_of(model, optimizer, steps=steps)
            with optimizer.slow_weights(), torch.no_grad():
                losses.append(model(values(6, 3, seed=4)).sum().item())
            with torch.no_grad():
                losses.append(model(values(6, 3, seed=4)).sum().item())
            seen.append(losses)
        assert max(abs(a - b) for a, b in zip(*seen, strict=True)) < 1e-12, seen


def other_models_are_refused() -> None:
    """One that has not all of the DTensors, where it is given and where it is set."""
    model, other = sharded(True), sharded(True)
    optimizer = Lookbehind(model.parameters(), torch.optim.SGD, model=other, **SETTINGS)
    with pytest.raises(ValueError, match="model: expected a module with every DTensor .*, but parameter 0 .* is not"):
        losses_of(model, optimizer, steps=1)
    optimizer.model = model
    losses_of(model, optimizer, steps=1)
    optimizer.model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="model: expected a module with every DTensor"):
        losses_of(model, optimizer, steps=1)


def what_cannot_be_known_is_refused() -> None:
    """A PyTorch whose table is elsewhere: not without a model."""
    model = sharded(False)
    with mock.patch.dict(sys.modules, {"torch.distributed._composable_state": None}):
        optimizer = Lookbehind(model.parameters(), torch.optim.SGD, **SETTINGS)
        with pytest.raises(RuntimeError, match="model: expected the module whose parameters are sharded"):
            losses_of(model, optimizer, steps=1)
        optimizer.model = model
        losses = losses_of(model, optimizer, steps=1)
    assert losses[1] > losses[0]


def other_modules_stay_gathered() -> None:
    """Those that have none of the optimizer's parameters, from the second step on."""
    model, other = sharded(False), sharded(False)
    optimizer = Lookbehind(model.parameters(), torch.optim.SGD, **SETTINGS)
    losses_of(model, optimizer, steps=1)
    with torch.no_grad():
        other(values(2, 3, seed=1))
    assert not any(isinstance(p, DTensor) for p in other[4].parameters())
    losses_of(model, optimizer, steps=1)
    assert not any(isinstance(p, DTensor) for p in other[4].parameters())


CASES: dict[str, Callable[[], None]] = {
    "gathered": partial(as_one_process, True, False, False),
    "gathered-looks": partial(as_one_process, True, True, False),
    "gathered-kept": partial(as_one_process, False, False, False),
    "gathered-kept-model": partial(as_one_process, False, False, True),
    "gathered-kept-looks-model": partial(as_one_process, False, True, True),
    "gathered-bfloat16": mixed_precision,
    "gathered-slow": slow_weights_are_seen,
    "gathered-other": other_models_are_refused,
    "gathered-unknown": what_cannot_be_known_is_refused,
    "gathered-strangers": other_modules_stay_gathered,
}
