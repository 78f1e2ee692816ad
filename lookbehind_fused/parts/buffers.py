"""Buffers of the model, such as BatchNorm's running statistics: perturbed evaluations are not to take part in them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..open_step import Part
from ..program import Evaluation
from ..tensors import shown


class Copy(NamedTuple):
    """A buffer and its value: of which module, by which name, the tensor that it is, and a copy of that."""

    module: nn.Module
    name: str
    buffer: Tensor | None
    value: Tensor | None


class BuffersAtSlow(Part):
    """All buffers of a model are those that the evaluations at the slow weights have left.

    Buffers that a forward pass writes into are written back, those that it replaces are put back. One that it registers
    stays. Takes a copy of all buffers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.at_first: list[Copy] | None = None
        self.kept: list[Copy] = []

    def begin(self) -> None:
        """Copy the buffers as they are; once, also where a step begins again behind its first evaluation."""
        if self.at_first is None:
            self.at_first = self.kept = self._copies()

    def use(self, evaluation: Evaluation) -> None:
        """Keep what an evaluation at the slow weights has made of them; undo what a perturbed one has."""
        if evaluation.perturbed:
            put_back(self.kept)
        else:
            self.kept = self._copies()

    def commit(self) -> None:
        """They are what the evaluations at the slow weights have left."""
        put_back(self.kept)
        happens = self.happens
        if isinstance(happens, Tensor):
            with torch.no_grad():
                for module, name, _, value in self.at_first or ():
                    now = module._buffers.get(name)
                    if now is not None and value is not None:
                        now.copy_(torch.where(happens.to(now.device), now, value))

    def rollback(self) -> None:
        """They are what they were at first."""
        put_back(self.at_first or [])

    @torch.no_grad()
    def _copies(self) -> list[Copy]:
        return [
            Copy(module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in self.model.modules()
            for name, buffer in module._buffers.items()
        ]


@torch.no_grad()
def put_back(copies: list[Copy]) -> None:
    """Every buffer is the tensor that it was, with the value that it had."""
    for module, name, buffer, value in copies:
        if name in module._buffers and module._buffers[name] is not buffer:
            module._buffers[name] = buffer
        if buffer is not None and value is not None:
            buffer.detach().copy_(value)


@contextmanager
def buffers_at_slow(model: nn.Module) -> Iterator[None]:
    """Within the block the buffers of a model may change; afterwards they are what they were before it, whatever
    happens. For evaluations at perturbed weights, so that only those at the slow weights take part in running
    statistics, vectors of a spectral norm, counters, moving averages of codebooks::

        loss_fn(model(inputs), targets).backward()
        optimizer.first_step(zero_grad=True)
        with buffers_at_slow(model):
            loss_fn(model(inputs), targets).backward()
        optimizer.second_step(zero_grad=True)

    One block inside another does the same as one. ``Lookbehind(..., buffers_at_slow=model)`` does it by itself.

    Args:
        model: any module; all its buffers are copied and put back.

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


running_stats_at_slow = buffers_at_slow
"""The name that it had when it knew of BatchNorm alone."""


def check_model(model: nn.Module) -> None:
    """Refuse anything but a module.

    Raises:
        TypeError: naming the argument, what was expected and what came.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"buffers_at_slow: expected a torch.nn.Module, got {shown(model)}")
