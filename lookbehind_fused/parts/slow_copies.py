"""The slow weights of ``Lookahead``: copies of parameters that last from step to step, in flat buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..buckets import flat_layout, flat_view
from ..shards import shards
from ..tensors import ROUNDED, compute_dtype, layout, trained


class SlowCopies:
    """The slow weights of the parameters of one device and dtype, in one flat buffer (``buckets``)."""

    def __init__(self, params: list[Tensor]) -> None:
        first = params[0]
        self.params, self.shards = params, shards(params)
        self.dtype, self.rounds = compute_dtype(first.dtype), first.dtype in ROUNDED
        self.table, size = flat_layout(self.shards, self.dtype, [0] * len(params))
        self.layouts = [layout(p) for p in self.shards]
        self.slow = torch.empty(size, dtype=self.dtype, device=first.device)
        self.views = self._views_of(self.slow)
        self.done = torch.zeros(1, dtype=torch.int32, device=first.device)
        copy_all(self.shards, self.views)

    def _views_of(self, buffer: Tensor) -> list[Tensor]:
        return [
            flat_view(buffer, self.table, row, shape, strides)
            for row, (shape, _, _, strides) in enumerate(self.layouts)
        ]

    def are_of_now(self) -> bool:
        """Whether the parameters still have the dtypes, devices and strides that the buffer was laid out for."""
        return [layout(p) for p in shards(self.params)] == self.layouts

    @torch.no_grad()
    def keep(self, where: Tensor | None = None) -> None:
        """The slow weights are the parameters as they are now; or are so ``where``, 0-dim bool, says it. Where
        parameters are the rounded image of the slow weights already, these stay unrounded.
        """
        self.shards = shards(self.params)
        if not self.rounds and where is None:
            copy_all(self.shards, self.views)
            return
        for p, slow in zip(self.shards, self.views, strict=True):
            kept = p.to(self.dtype)
            if self.rounds:
                kept = torch.where(slow.to(p.dtype) == p, slow, kept)
            slow.copy_(kept if where is None else torch.where(where.to(slow.device), kept, slow))

    @torch.no_grad()
    def interpolate(self, alpha: float, where: bool | Tensor = True) -> None:
        """``params = slow = slow + alpha * (params - slow)`` of those that are trained; or so ``where``, 0-dim bool,
        says it. One call writes everything, and 1 to ``done``, so that an interrupt comes before or after.
        """
        known = zip(self.params, self.shards, self.views, strict=True)
        moved = [(here, w) for p, here, w in known if moves(p)]
        if not moved:
            return
        params, slow = [here for here, _ in moved], [w for _, w in moved]
        new = [*torch._foreach_lerp(slow, [p.to(self.dtype) for p in params], alpha)]
        new_params = new
        if isinstance(where, Tensor):
            where = where.to(self.slow.device)
            new_params = [torch.where(where, w.to(p.dtype), p) for p, w in zip(params, new, strict=True)]
            new = [torch.where(where, w, old) for w, old in zip(new, slow, strict=True)]
        torch._foreach_copy_([*slow, *params, self.done], [*new, *new_params, torch.ones_like(self.done)])


@torch.no_grad()
def copy_all(sources: list[Tensor], targets: list[Tensor]) -> None:
    """Each target becomes what its source is."""
    torch._foreach_copy_(targets, sources)


def moves(p: Tensor) -> bool:
    """Whether a step may move it."""
    return p.is_floating_point() and trained(p)


def copies_of(tensors: Sequence[Tensor]) -> list[SlowCopies]:
    """Those of all tensors that a step may move, as these are now."""
    members: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for p in tensors:
        if moves(p):
            members.setdefault((p.device, p.dtype), []).append(p)
    return [SlowCopies(params) for params in members.values()]
