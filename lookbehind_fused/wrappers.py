"""What trainers wrap around an optimizer acts on the optimizer.

The wrappers of Lightning and Fabric take on the optimizer's class, so that its methods run with the wrapper as
``self``. What such a wrapper does not have itself, it reads from the optimizer; here what is set goes there too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

INSIDE = "_optimizer"
"""Under which these wrappers have the optimizer."""


class Wrappable(Optimizer):
    """An optimizer none of whose attributes comes to lie on a wrapper around it."""

    if not TYPE_CHECKING:  # for whom any name could then be set

        def __setattr__(self, name: str, value: Any) -> None:
            if self._is_inside(name):
                setattr(self.__dict__[INSIDE], name, value)
            else:
                super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if self._is_inside(name):
            delattr(self.__dict__[INSIDE], name)
        else:
            super().__delattr__(name)

    def _is_inside(self, name: str) -> bool:
        """Whether this is a wrapper and it is not of its own: what it has, and methods, which LR schedulers replace."""
        own = self.__dict__
        return INSIDE in own and name not in own and not callable(getattr(type(self), name, None))


def unwrapped(optimizer: Any) -> Any:
    """The optimizer that the wrappers of Lightning, Fabric or Accelerate are around, or else what was given."""
    while True:
        own = vars(optimizer) if isinstance(optimizer, Optimizer) else {}
        if INSIDE in own:
            optimizer = own[INSIDE]
        elif any(kind.__name__ == "AcceleratedOptimizer" for kind in type(optimizer).__mro__):
            optimizer = own["optimizer"]
        else:
            return optimizer
