"""A base optimizer without a rule of the kernels: its own ``step()`` on its own parameters, lent the fast weights.

For the time of the call a parameter's memory is that of its fast weights, and ``.grad`` is the real gradient where the
base is to use just that, else a copy that is lent. Then each gets its own back, whatever happens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..arguments import Settings
from ..buckets import Bucket
from ..kernels.contract import Hyper
from ..kernels.reference import finite, gradient_scale
from ..lowering import Call
from ..open_step import Part
from ..shards import shard, shards, swap, whole


class Lent(NamedTuple):
    """What a parameter is lent, and what it has of its own.

    Attributes:
        here: what of it is on this rank (``shards``): of a DTensor, whose own ``.data`` leads nowhere, its shard.
        memory, grad: its own. other: a tensor of the fast weights' dtype, where that is another than the parameter's.
    """

    param: Tensor
    here: Tensor
    memory: Tensor
    grad: Tensor | None
    other: Tensor | None


Copies = dict[str, tuple[Any, Any]]
"""Each value beside a copy of it."""


class OwnStep(Part):
    """Runs ``base.step()``; has copies of the base's state and settings to put back.

    State that a base keeps elsewhere than in its ``state``, or in that of an optimizer among its attributes, cannot be
    put back.
    """

    def __init__(self, base: Optimizer, settings: Settings, loss_scale: float | Tensor) -> None:
        self.base, self.settings = base, settings
        self.unscales = isinstance(loss_scale, Tensor) or loss_scale != 1
        self.before: list[tuple[Optimizer, dict[Tensor, Copies], list[Copies]]] = []
        self.lent: list[Lent] = []

    def run(self, call: Call, gathered: Sequence[Sequence[Tensor | None]], buckets: list[Bucket]) -> None:
        """One step of the base on the fast weights of the tensors that have a gradient.

        Args:
            call: whose ``mean`` may take the gradients' place, and whose ``slot`` has their norm.
            gathered: for each bucket the gradients of its tensors that take part.
        """
        if not self.before:
            self.before = [
                (
                    optimizer,
                    {p: _with_copies(entry) for p, entry in optimizer.state.items()},
                    [_with_copies(group) for group in optimizer.param_groups],
                )
                for optimizer in _with_inner(self.base)
            ]
        squares = buckets[0].norms.squares[buckets[0].device][call.slot]
        if self.settings.skips and not finite(squares):
            return
        lending = []
        for bucket, grads in zip(buckets, gathered, strict=True):
            squares = bucket.norms.squares[bucket.device][call.slot]
            unscale = bucket.hyper[0, Hyper.UNSCALE] if self.unscales else None
            scale = gradient_scale(squares, self.settings.max_grad_norm, unscale)
            for row, grad in zip(bucket.joined, grads, strict=True):
                if call.mean:
                    grad = bucket.view(call.mean, row)
                if grad is not None:
                    grad = grad.to(bucket.buffer_dtype)
                    grad = grad if scale is None else grad * scale.to(grad.device, grad.dtype)
                    lending.append((bucket.params[row], bucket.shards[row], bucket.view("fast", row), grad))
        self._step(lending)

    def _step(self, lending: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
        self.lent = [
            Lent(p, here, here.data, p.grad, nn.Parameter(whole(fast, p)) if p.dtype != fast.dtype else None)
            for p, here, fast, _ in lending
        ]
        try:
            for (p, here, fast, grad), lent in zip(lending, self.lent, strict=True):
                if lent.other is not None:  # p.data of another dtype would drop the accumulator that DDP's hooks are on
                    lent.other.grad = whole(grad, p)
                    self._widen_state(p, fast.dtype)
                    swap(p, lent.other)
                    continue
                here.data = fast
                if p.grad is None or (p.grad if here is p else shard(p.grad)) is not grad:
                    p.grad = whole(grad, p)
            with torch.enable_grad():
                self.base.step()
        finally:
            self._give_back()

    def _widen_state(self, p: Tensor, dtype: torch.dtype) -> None:
        """State that a constructor has made in 16 bits."""
        for optimizer in _with_inner(self.base):
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.dtype == p.dtype:
                    optimizer.state[p][key] = value.to(dtype)

    def _give_back(self) -> None:
        for p, here, memory, grad, other in self.lent:
            if other is not None:
                if p.dtype != memory.dtype:
                    swap(p, other)
            elif here.data_ptr() != memory.data_ptr():
                here.data = memory
            if p.grad is not grad:
                p.grad = grad
        self.lent = []

    def commit(self) -> None:
        """The base keeps what it has."""
        self.before = []

    def rollback(self) -> None:
        """The base gets its memory, state and settings back."""
        self._give_back()
        for optimizer, state, groups in self.before:
            for p in [p for p in optimizer.state if p not in state]:
                del optimizer.state[p]
            for p, entry in state.items():
                _put_back(optimizer.state[p], entry)
            for group, entry in zip(optimizer.param_groups, groups, strict=True):
                _put_back(group, entry)
        self.before = []


def _with_inner(base: Optimizer) -> list[Optimizer]:
    """The base, and optimizers among its attributes."""
    return [base, *(value for value in vars(base).values() if isinstance(value, Optimizer))]


def _with_copies(entry: Mapping[str, Any]) -> Copies:
    """Each value beside a copy of it; the list of parameters is left out."""
    return {
        key: (value, value.detach().clone() if isinstance(value, Tensor) else deepcopy(value))
        for key, value in entry.items()
        if key != "params"
    }


def _put_back(entry: dict[str, Any], before: Mapping[str, tuple[Any, Any]]) -> None:
    """The inverse of ``_with_copies``: tensors are the same objects as before, with the values that they had."""
    for key in entry.keys() - before.keys() - {"params"}:
        del entry[key]
    for key, (value, copy) in before.items():
        entry[key] = value.copy_(copy) if isinstance(value, Tensor) else copy


def require_no_other_hold(base: Optimizer, params: Sequence[Tensor]) -> None:
    """Refuse a base that holds on to the memory of its parameters, which for the time of its ``step()`` have another.

    Raises:
        ValueError: an attribute or the state of the base has another tensor in the memory of a parameter.
    """
    known = {id(shard(p)) for p in params} | {id(shard(p.grad)) for p in params if p.grad is not None}
    memory = {p.untyped_storage().data_ptr() for p in shards(params) if p.numel()}
    for optimizer in _with_inner(base):
        for name, value in vars(optimizer).items():
            for x in map(shard, _tensors_in(value, set())):
                if id(x) not in known and x.layout == torch.strided and x.untyped_storage().data_ptr() in memory:
                    raise ValueError(
                        f"base_optimizer: expected one that reaches its parameters' memory through them alone, got "
                        f"{type(base).__name__}, whose {name!r} has other tensors there, so that it would miss the "
                        "fast weights (ZeroRedundancyOptimizer: parameters_as_bucket_view=False)"
                    )


def _tensors_in(value: Any, seen: set[tuple[int, int]], depth: int = 4) -> Iterator[Tensor]:
    """``seen``: containers that have been looked into, so that a group that stands beside each of its tensors is looked
    into once.
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (Mapping, list, tuple, set)) and depth and (id(value), depth) not in seen:
        seen.add((id(value), depth))
        for entry in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors_in(entry, seen, depth - 1)
