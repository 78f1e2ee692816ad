"""Buffers of the model, such as BatchNorm's running statistics: perturbed evaluations are not to take part in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..open_step import Part
from ..program import Evaluation

Copies = list[tuple[Tensor, Tensor]]


class BuffersAtSlow(Part):
    """The buffers of every ``_BatchNorm`` in a model, classes derived from it included, are those that the evaluations
    at the slow weights have left.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.at_first: Copies = []
        self.kept: Copies = []

    def begin(self) -> None:
        """Copy the buffers as they are."""
        self.at_first = self.kept = self._copies()

    def use(self, evaluation: Evaluation) -> None:
        """Keep what an evaluation at the slow weights has made of them; undo what a perturbed one has."""
        if evaluation.perturbed:
            _put_back(self.kept)
        else:
            self.kept = self._copies()

    def commit(self) -> None:
        """They are what the evaluations at the slow weights have left."""
        _put_back(self.kept)

    def rollback(self) -> None:
        """They are what they were at first."""
        _put_back(self.at_first)

    @torch.no_grad()
    def _copies(self) -> Copies:
        layers = [module for module in self.model.modules() if isinstance(module, _BatchNorm)]
        return [(buffer, buffer.clone()) for layer in layers for buffer in layer.buffers(recurse=False)]


@torch.no_grad()
def _put_back(copies: Copies) -> None:
    for buffer, value in copies:
        buffer.copy_(value)


@contextmanager
def running_stats_at_slow(model: nn.Module) -> Iterator[None]:
    """Within the block BatchNorm's running statistics may change; afterwards they are what they were before it,
    whatever happens. For evaluations at perturbed weights, so that only those at the slow weights take part::

        loss_fn(model(inputs), targets).backward()
        optimizer.first_step(zero_grad=True)
        with running_stats_at_slow(model):
            loss_fn(model(inputs), targets).backward()
        optimizer.second_step(zero_grad=True)

    One block inside another does the same as one. ``Lookbehind(..., running_stats_at_slow=model)`` does it by itself.

    Args:
        model: any module; the buffers of every ``_BatchNorm`` in it, also of classes derived from it, are put back.

    Raises:
        TypeError: ``model`` is not a module.
    """
    check_model(model)
    buffers = BuffersAtSlow(model)
    buffers.begin()
    try:
        yield
    finally:
        buffers.rollback()


def check_model(model: nn.Module) -> None:
    """Refuse anything but a module.

    Raises:
        TypeError: naming the argument, what was expected and what came.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"running_stats_at_slow: expected a torch.nn.Module, got {model!r}")
