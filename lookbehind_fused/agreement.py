"""What ranks that take a step together have to agree on: found out by a few numbers that ride in an all-reduce."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any
from zlib import crc32

import torch
from torch import Tensor


class Agreement:
    """Compares what this rank says with what the others say.

    Of each word a number is added up, and its square: where the sums of both over n ranks are s and q, all have said
    the same if and only if s^2 = n q.

    Args:
        devices: on which the numbers are to be.

    Attributes:
        numbers: by device, float64, as many on every rank that says as many words.
    """

    def __init__(self, devices: Iterable[torch.device]) -> None:
        self.numbers = {device: torch.zeros(0, dtype=torch.float64, device=device) for device in devices}
        self._words: dict[str, str] = {}
        self._is_new = True  # whether what this rank says has not been compared yet
        self._heard: list[tuple[int, Tensor, Any]] = []  # sums that have not been compared yet

    def say(self, words: Mapping[str, Any]) -> None:
        """What all ranks have to agree on, from now on: by what it is called, what this rank has."""
        self._words = {name: str(value) for name, value in words.items()}
        numbers = [crc32(text.encode()) % 2**20 for text in self._words.values()]  # squares of which add up exactly
        values = torch.tensor([x for n in numbers for x in (n, n * n)], dtype=torch.float64, device="cpu")
        self.numbers = {device: values.to(device) for device in self.numbers}
        self._is_new = True

    def hear(self, ranks: int, sums: Tensor) -> None:
        """The sums of ``numbers`` over so many ranks."""
        self._heard.append((ranks, *_on_its_way(sums)))

    def compare_if_due(self) -> None:
        """Compare at once where nothing has to be waited for, or where this rank has said something new.

        Raises:
            RuntimeError: ranks have said different things.
        """
        if self._is_new or all(event is None for *_, event in self._heard):
            self._is_new = False
            self.compare()

    def compare(self) -> None:
        """Compare all that was heard, and has not been compared.

        Raises:
            RuntimeError: ranks have said different things.
        """
        heard, self._heard = self._heard, []
        for ranks, numbers, event in heard:
            if event is not None:
                event.synchronize()
            values = [*map(int, numbers.tolist())]
            for (name, mine), s, q in zip(self._words.items(), values[::2], values[1::2], strict=True):
                if s * s != ranks * q:
                    raise RuntimeError(
                        f"{name}: expected the same on all {ranks} ranks that share parameters, but they differ; rank "
                        f"{torch.distributed.get_rank()} has {mine[:500]}"
                    )


def _on_its_way(x: Tensor) -> tuple[Tensor, Any]:
    """A copy on the host, and what says that it has arrived."""
    if x.device.type == "cpu":
        return x.clone(), None
    copy = torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
    event = torch.Event(x.device)
    event.record()
    return copy, event
