"""Mixed precision: a ``torch.amp.GradScaler`` in an outer step.

The scale is read when the step is prepared, and holds for it. A gradient that is not finite at any evaluation undoes
the step; the scaler learns of it as it does of anybody's gradients, by ``unscale_``, from gradients made for that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from ..open_step import Part
from ..program import Evaluation


class Report:
    """What a scaler is told of: as much of an optimizer as ``GradScaler.unscale_`` looks at.

    Attributes:
        param_groups: with one parameter, 0-dim, whose gradient is 0, or inf where one of a step was not finite.
    """

    def __init__(self) -> None:
        self.param_groups: list[dict[str, list[Tensor]]] = []

    def to(self, scaler: GradScaler, happens: bool | Tensor, device: torch.device) -> None:
        """Tell the scaler whether a step happens; once, whatever interrupt came in between."""
        if is_unscaled(scaler, self):
            return
        if not isinstance(happens, Tensor):
            happens = torch.full((), happens, dtype=torch.bool, device=device)
        told = torch.zeros((), dtype=torch.float32, device=happens.device)
        told.grad = torch.where(happens, told, torch.inf)
        self.param_groups = [{"params": [told]}]
        scaler.unscale_(self)  # type: ignore[arg-type]


class Scaling(Part):
    """The scaler in a step, to which it says how the step ended.

    Args:
        report: the optimizer's own.
        known_as: the optimizer, and what is around it: what a caller may hand to the scaler.

    Attributes:
        scale: 0-dim, on ``device``: that of this step.
        unscaled_before: whether the gradients that were there when the step began had been unscaled.
    """

    def __init__(
        self, scaler: GradScaler, device: torch.device, report: Report, known_as: Sequence[Optimizer | None]
    ) -> None:
        self.scaler, self.report, self.known_as = scaler, report, known_as
        self.scale = scale_of(scaler, device)

    def begin(self) -> None:
        """Refuse a second step for one scale."""
        if is_unscaled(self.scaler, self.report):
            raise RuntimeError("scaler: expected scaler.update() after each step, but there was none since the last")
        self.unscaled_before = self.is_unscaled()

    def use(self, evaluation: Evaluation) -> None:
        """Refuse gradients that have been unscaled after others were not: these are unscaled again by the kernels."""
        if self.is_unscaled() and not self.unscaled_before:
            raise RuntimeError(
                f"evaluation {evaluation.index}: expected gradients as scaler.scale(loss) gives them, since they are "
                "unscaled by the step, but scaler.unscale_() was called within it; clip by max_grad_norm"
            )

    def commit(self) -> None:
        """Tell the scaler of a step that happens, if its gradients are finite."""
        self.report.to(self.scaler, True if self.happens is None else self.happens, self.scale.device)

    def rollback(self) -> None:
        """Tell the scaler of a step that ended as it was to, undone for its gradients or for want of any."""
        if self.happens is not None:
            self.report.to(self.scaler, self.happens, self.scale.device)

    def is_unscaled(self) -> bool:
        """Whether the optimizer's gradients have been unscaled since the last ``update()``."""
        return any(is_unscaled(self.scaler, optimizer) for optimizer in self.known_as)


def check_scaler(scaler: Any) -> None:
    """Refuse anything but a gradient scaler and None.

    Raises:
        TypeError: naming the argument, what was expected and what came.
    """
    if scaler is not None and not isinstance(scaler, GradScaler):
        raise TypeError(f"scaler: expected a torch.amp.GradScaler or None, got {scaler!r}")


def scale_of(scaler: GradScaler, device: torch.device) -> Tensor:
    """Its scale as it is now, 0-dim float32, without a wait. A scaler that has none yet makes it by being asked."""
    return scaler.scale(torch.ones((), dtype=torch.float32, device=device))


def is_stepping(scaler: GradScaler) -> bool:
    """Whether it has been handed an optimizer since its last ``update()``, as when its ``step()`` calls."""
    return bool(scaler._per_optimizer_states)


def is_unscaled(scaler: GradScaler, optimizer: Any) -> bool:
    """Whether ``unscale_`` was called on an optimizer since the last ``update()``. Nothing public says so."""
    states = scaler._per_optimizer_states
    return id(optimizer) in states and states[id(optimizer)]["stage"] is OptState.UNSCALED
