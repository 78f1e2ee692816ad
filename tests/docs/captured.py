"""Captured steps of a page on a machine without a GPU: the double of ``tests.kernels.graphed``, which sees no backward
pass, is shown each call of the closure as one thing. The passes are native's (``tests.gpu.machine``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunction

from lookbehind_fused import Lookbehind, graphs
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
