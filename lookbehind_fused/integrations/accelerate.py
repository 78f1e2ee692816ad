"""Accelerate: ``optimizer = connect(accelerator.prepare(optimizer))``."""

from __future__ import annotations

from typing import Any

from accelerate.optimizer import AcceleratedOptimizer

OWN = ("scaler", "optimizer", "step", "zero_grad", "gradient_state", "accelerator_state", "device_placement")
"""What Accelerate's wrapper keeps of its own."""


class Connected(AcceleratedOptimizer):
    """What ``accelerator.prepare`` wraps around ``Lookbehind``, one with what is inside: attributes that are not
    Accelerate's (``k``, ``closure``, ``evaluation``, ...) are read and set there.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or "optimizer" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        return getattr(self.optimizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_") or name in OWN or hasattr(AcceleratedOptimizer, name):
            super().__setattr__(name, value)
        else:
            setattr(self.optimizer, name, value)


def connect(accelerated: Any) -> Any:
    """Connect the optimizer that ``accelerator.prepare`` has returned with the one inside.

    That gets Accelerate's scaler. Settings are set through the wrapper. ``step_was_skipped``, by which Accelerate's
    schedulers stay where they are, is true for every step that was undone, be it at a later evaluation; with
    ``nonfinite="skip"`` or a scaler each step then waits for the device.

    Args:
        accelerated: ``AcceleratedOptimizer`` around ``Lookbehind`` or a method of the family, or ``Lookahead`` over
            one. Around anything else it is left alone.

    Returns:
        The same object.
    """
    inside = accelerated.optimizer
    if isinstance(accelerated, Connected) or not hasattr(inside, "closure"):
        return accelerated
    accelerated.__class__ = Connected
    if accelerated.scaler is not None:
        inside.scaler = accelerated.scaler

    def tell(optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        may_be_undone = optimizer.scaler is not None or optimizer.nonfinite == "skip"
        skipped = may_be_undone and bool(optimizer.diagnostics.get("skipped", True))
        accelerated._accelerate_step_called = not skipped  # which Accelerate looks at where there is a scaler
        accelerated._is_overflow = skipped

    inside.register_step_post_hook(tell)
    return accelerated
