"""Weights that are kept elsewhere than in parameters, and are to follow them: whoever writes parameters says so here.

Autocast keeps its casts while it is open. FSDP2 keeps the gathered weights from one forward pass to the next where it
is told not to reshard (``set_reshard_after_backward(False)``), and those of the root module after a forward pass
without a backward. A user may have caches of his own.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.utils.hooks import RemovableHandle

from .shards import is_sharded
from .tensors import shown


class Elsewhere:
    """Who keeps weights of an optimizer's parameters.

    Attributes:
        model: the module whose gathered weights are let go; None: all that have one of the parameters.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self.model = model
        self.hooks: OrderedDict[int, Callable[[], Any]] = OrderedDict()
        self._sharded: list[Tensor] = []
        self._gathering: list[Any] = []

    def follow(self, params: Sequence[Tensor], names: Sequence[str]) -> None:
        """Find the modules that gather weights from these parameters.

        Raises:
            ValueError: a DTensor is none of the model's parameters.
            RuntimeError: modules cannot be found without a model.
        """
        self._sharded = [p for p in params if is_sharded(p)]
        self._gathering = _gathering(self.model) if self._sharded else []
        self._let_go()  # from then on their parameters are the sharded ones
        own = {*map(id, self._sharded)}
        if self.model is None:
            self._gathering = [m for m in self._gathering if any(id(p) in own for p in m.parameters())]
        elif self._sharded:
            of_model = {*map(id, self.model.parameters())}
            for p, name in zip(params, names, strict=True):
                if id(p) in own and id(p) not in of_model:
                    raise ValueError(f"model: expected a module with every DTensor of the optimizer, but {name} is not")

    def written(self) -> None:
        """Parameters have been written: nobody is to see those of before."""
        torch.clear_autocast_cache()
        if self._sharded:
            increment_version(self._sharded)  # so far only their shards' versions say so
            self._let_go()
        if self.hooks:
            for hook in [*self.hooks.values()]:
                hook()

    def _let_go(self) -> None:
        for module in self._gathering:
            module.reshard()

    def register(self, hook: Callable[[], Any]) -> RemovableHandle:
        """Have ``hook()`` called by ``written()``.

        Raises:
            TypeError: it is not a function.
        """
        if not callable(hook):
            raise TypeError(f"hook: expected a function without arguments, got {shown(hook)}")
        handle = RemovableHandle(self.hooks)
        self.hooks[handle.id] = hook
        return handle


def _gathering(model: nn.Module | None) -> list[Any]:
    """The modules that FSDP2 gathers weights for: those of a model, or, by a table of its own, all that there are."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # there are none before it is imported
    if fsdp is None:
        return []
    if model is not None:
        return [m for m in model.modules() if isinstance(m, fsdp.FSDPModule)]
    try:
        from torch.distributed._composable_state import _module_state_mapping
    except ImportError as error:
        raise RuntimeError(
            "model: expected the module whose parameters are sharded, since this version of PyTorch does not tell "
            "which modules gather their weights"
        ) from error
    return [m for m in [*_module_state_mapping] if isinstance(m, fsdp.FSDPModule)]


def check_model(model: Any) -> None:
    """Refuse anything but a module and None.

    Raises:
        TypeError: naming the argument, what was expected and what came.
    """
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module or None, got {shown(model)}")
