"""Schedules of rho and alpha, beside torch's of the learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from .arguments import Keys, check_fraction, check_group
from .lookahead import Lookahead
from .optimizer import Lookbehind
from .tensors import shown
from .wrappers import unwrapped


class LambdaSchedule(LRScheduler):
    """rho and alpha as functions of how often ``step()`` was called, as ``LambdaLR`` has it for the learning rate::

        schedule = LambdaSchedule(optimizer, rho=lambda step: min(1.0, step / 1000), alpha=lambda step: 0.5)
        ...
        optimizer.step(closure)
        schedule.step()

    Args:
        optimizer: ``Lookbehind`` or any method of the family, or ``Lookahead`` over one.
        rho: the factor of every group's own rho, which is what it has at the beginning; None leaves it alone.
        alpha: the slow step size, in (0, 1] or "adaptive" (of ``Lookahead``, where it is given that, in (0, 1]); None
            leaves it alone.

    The values for 0 are set at once, the later ones by ``step()``; new values compile nothing again. It is one of
    torch's ``LRScheduler``, which trainers ask for, and leaves learning rates and ``optimizer.step`` alone. What
    trainers wrap around the optimizer will do for ``optimizer``.

    Raises:
        TypeError: ``optimizer`` has no rho, or a schedule is not a function.
        ValueError: a schedule gave what rho or alpha cannot be; nothing is changed.
    """

    optimizer: Lookbehind | Lookahead

    def __init__(
        self,
        optimizer: Lookbehind | Lookahead,
        rho: Callable[[int], float] | None = None,
        alpha: Callable[[int], float | str] | None = None,
    ) -> None:
        optimizer = unwrapped(optimizer)
        method = unwrapped(optimizer.optimizer) if isinstance(optimizer, Lookahead) else optimizer
        if not isinstance(method, Lookbehind):
            raise TypeError(
                f"optimizer: expected Lookbehind or a method of the family, got {shown(optimizer)}; give it "
                "the one that is built around that"
            )
        for name, function in (("rho", rho), ("alpha", alpha)):
            if function is not None and not callable(function):
                raise TypeError(f"{name}: expected a function of the number of steps, or None, got {shown(function)}")
        self.optimizer, self.method, self.rho, self.alpha = optimizer, method, rho, alpha
        self.keys = Keys.of(method.base_optimizer)
        self.initial_rho = [group[self.keys.rho] for group in method.param_groups]
        self.steps = 0
        self._step_count = 1  # Accelerate counts it up
        self._set(0)

    def step(self, epoch: int | None = None) -> None:
        """Set the values for one step more, or for the step ``epoch``.

        Raises:
            ValueError: a schedule gave what rho or alpha cannot be; nothing is changed.
            RuntimeError: there are other parameter groups than at the beginning.
        """
        steps = self.steps + 1 if epoch is None else epoch
        self._set(steps)
        self.steps = steps

    @property
    def last_epoch(self) -> int:  # type: ignore[override]
        """How many steps there were, as torch's schedulers call it."""
        return self.steps

    def get_last_lr(self) -> list[float | Tensor]:
        """The learning rates of the groups, which others set."""
        return [group["lr"] for group in self.optimizer.param_groups]

    get_lr = get_last_lr

    def _set(self, steps: int) -> None:
        groups = self.optimizer.param_groups
        if len(groups) != len(self.initial_rho):
            raise RuntimeError(
                f"param_groups: expected the {len(self.initial_rho)} groups that there were when LambdaSchedule was "
                f"made, got {len(groups)}"
            )
        rhos = [group[self.keys.rho] for group in groups]
        alpha: Any = self.optimizer.alpha
        try:
            if self.rho is not None:
                factor = self.rho(steps)
                rhos = [factor * initial for initial in self.initial_rho]
            for rho, group in zip(rhos, groups, strict=True):
                check_group({**group, self.keys.rho: rho}, keys=self.keys)
            if self.alpha is not None:
                alpha = self.alpha(steps)
            if self.optimizer is not self.method:
                check_fraction("alpha", alpha)
            else:
                self.method.check_settings({**self.method.settings(), "alpha": alpha})
        except (TypeError, ValueError) as error:
            raise type(error)(f"schedule at step {steps}: {error}") from error
        for rho, group in zip(rhos, groups, strict=True):
            group[self.keys.rho] = rho
        self.optimizer.alpha = alpha

    def state_dict(self) -> dict[str, Any]:
        """How many steps there were and every group's rho at the beginning; not the functions."""
        return {"steps": self.steps, "initial_rho": list(self.initial_rho)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what ``state_dict()`` returned: rho and alpha are those of that step.

        Raises:
            ValueError: it is of another number of groups, or as ``step()``; nothing is changed.
        """
        before, initial = self.initial_rho, list(state_dict["initial_rho"])
        if len(initial) != len(before):
            raise ValueError(f"state_dict: expected initial_rho of {len(before)} groups, got {initial}")
        self.initial_rho = initial
        try:
            self._set(state_dict["steps"])
        except BaseException:
            self.initial_rho = before
            raise
        self.steps = state_dict["steps"]
