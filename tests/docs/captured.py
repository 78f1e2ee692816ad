"""Captured steps of a page on a machine without a GPU: the double of ``tests.kernels.graphed``, which sees no backward
pass, is shown each call of the closure as one thing. The passes are native's (``tests.gpu.machine``).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction

from lookbehind_fused import Lookbehind, graphs
from tests.docs.pages import own
from tests.gpu.machine import here
from tests.kernels import graphed


class Double(graphed.Double):
    """Notes in which graph the closure runs."""

    capturing: graphed.Tape | None = None

    def capture(self, run: Callable[[], Any]) -> Any:
        Double.capturing = self.tape
        try:
            return super().capture(run)
        finally:
            Double.capturing = None


def use_double() -> None:
    """From now on steps are captured by the double, on the Python of a GPU's backend."""
    here.begin(dry=True, quick=True)
    graphs.Graph = Double  # type: ignore[misc]
    capture = Lookbehind.graphed

    def of_whole_closures(optimizer: Any, closure: Callable[..., Any], *args: Any) -> graphs.GraphedStep:
        params = [p for group in optimizer.param_groups for p in group["params"]]

        def evaluated() -> list[Tensor]:
            for p in params:
                p.grad = None
            with torch.enable_grad():
                loss = closure()
            return [loss.detach(), *(p.grad for p in params)]

        def noted() -> Tensor:
            with DisableTorchFunction():
                results = evaluated()
            if Double.capturing is not None:
                Double.capturing.entries.append((evaluated, results))
            return results[0]

        return capture(optimizer, noted, *args)

    Lookbehind.graphed = of_whole_closures  # type: ignore[method-assign]


def check_double() -> None:
    """Steps that are replayed and steps that are not end at the same bits.

    Raises:
        AssertionError: they do not.
    """
    ends = []
    for is_captured in (True, False):
        names = own(Path())
        model, x, y = names["model"].eval(), names["inputs"].clone(), names["targets"].clone()
        optimizer = Lookbehind(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, k=2, backend="triton")

        def closure(model: nn.Module = model, x: Tensor = x, y: Tensor = y) -> Tensor:
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

        step = optimizer.graphed(closure) if is_captured else partial(optimizer.step, closure)
        losses = []
        for inputs, targets in names["loader"]:
            x.copy_(inputs)
            y.copy_(targets)
            losses.append(step().clone())
        ends.append([*losses, *(p.detach() for p in model.parameters())])
    assert all(map(torch.equal, *ends)), "steps that are replayed are not those that they replace"
    assert not torch.equal(ends[0][0], ends[0][1])
