"""What buckets tell one another, on all devices and ranks: sums of squares, alignment sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .shards import Ranks


class Norms:
    """The sums of all buckets, in device memory; row b of each tensor is written by bucket b.

    Args:
        devices: of each bucket. slots: how many gradients and means of a step have a norm.
        ranks: adds up over ranks, where tensors are sharded.

    Attributes:
        squares: per device, for each slot float64 of shape (buckets, 2): the sums of squares of T g and of g.
        sums: per device, float64 of shape (buckets, 3): the alignment sums.
    """

    def __init__(self, devices: Sequence[torch.device], slots: int, ranks: Ranks | None = None) -> None:
        self.devices, self.slots, self.ranks = devices, slots, ranks
        shape = (slots, len(devices), 2)
        self._all = {d: torch.zeros(shape, dtype=torch.float64, device=d) for d in set(devices)}
        self.squares = {device: squares.unbind() for device, squares in self._all.items()}
        self._sum = {d: torch.zeros(shape[1:], dtype=torch.float64, device=d) for d in set(devices)}
        self.sums = {d: torch.zeros(shape[1], 3, dtype=torch.float64, device=d) for d in set(devices)}

    @property
    def tensors(self) -> list[Tensor]:
        """All memory that steps leave figures in."""
        return [*self._all.values(), *self.sums.values()]

    def share_squares(self, slot: int) -> None:
        """Give every device, of every rank, every bucket's sums of squares of a slot."""
        self._share({device: squares[slot] for device, squares in self.squares.items()})

    def total(self, first: int, end: int) -> list[Tensor]:
        """The sums over the slots from ``first`` on, up to ``end``, for ``judge``: on each device one tensor."""
        for device, squares in self._all.items():
            torch.sum(squares[first:end], 0, out=self._sum[device])
        return [*self._sum.values()]

    def judge(self, slot: int, loss_scale: float | Tensor) -> None:
        """Let a slot's norm be finite only if the last ``total`` is, and what the loss was scaled by."""
        for device, squares in self._all.items():
            squares[slot].add_(self._sum[device], alpha=0)
            if isinstance(loss_scale, Tensor):
                squares[slot].add_(loss_scale.detach().reshape(()).to(device, non_blocking=True), alpha=0)

    def share_sums(self, by_tensor: Sequence[Tensor] | None) -> None:
        """Give every device, of every rank, every bucket's alignment sums.

        Args:
            by_tensor: of each bucket a row for each tensor, where these are what its next pass reads.
        """
        if by_tensor is None:
            self._share(self.sums)
        elif self.ranks is not None:
            self.ranks.add_up(by_tensor, hands_on=False)  # tensors that take no part have NaN

    def _share(self, rows: Mapping[torch.device, Tensor]) -> None:
        if self.ranks is not None:
            self.ranks.add_up([rows[owner][number] for number, owner in enumerate(self.devices)])
        for number, owner in enumerate(self.devices if len(rows) > 1 else ()):
            for device in rows.keys() - {owner}:
                rows[device][number].copy_(rows[owner][number], non_blocking=True)
