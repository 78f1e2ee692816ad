"""Free ascent: the gradients of a step's last evaluation, kept for the first ascent of the next step."""

from __future__ import annotations

from collections.abc import Container, Sequence

import torch
from torch import Tensor

from ..open_step import Part
from ..shards import any_sharded, placed_like, shards
from ..tensors import layout


class PreviousGradients(Part):
    """Copies of the last gradients.

    Attributes:
        kept: by parameter; empty before the first step.
        params: the parameters of the step that is open.
    """

    def __init__(self, kept: dict[Tensor, Tensor]) -> None:
        self.kept = kept
        self.params: Sequence[Tensor] = ()

    def of_now(self, late: Container[int] = ()) -> dict[Tensor, Tensor]:
        """Those of parameters that are still trained, where and in which dtype these are now.

        Args:
            late: identities of parameters that are trained whether or not they require a gradient between two steps.
        """
        kept = {p: g for p, g in self.kept.items() if p.requires_grad or id(p) in late}
        return {p: g.to(p.device, p.dtype) for p, g in kept.items()}

    @torch.no_grad()
    def commit(self) -> None:
        """Keep a copy of the gradients that are there."""
        grads = {p: p.grad for p in self.params if p.grad is not None}
        if any_sharded(grads):
            grads = {p: placed_like(g, p) for p, g in grads.items()}
        kept = {}
        for p, g in grads.items():
            old = self.kept.get(p)
            kept[p] = torch.empty_like(g) if old is None or layout(old) != layout(g) else old
        happens = self.happens
        if isinstance(happens, Tensor):  # else they would be used by the next step
            where = [
                torch.where(happens.to(g.device), g, torch.zeros_like(g) if self.kept.get(p) is None else old)
                for p, g, old in zip(grads, shards(grads.values()), shards(kept.values()), strict=True)
            ]
            grads = dict(zip(grads, where, strict=True))
        if grads:
            torch._foreach_copy_(shards(kept.values()), shards(grads.values()))
        self.kept = kept
