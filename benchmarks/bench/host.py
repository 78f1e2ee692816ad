"""The host's share of a step on a GPU backend: all of Python and its dispatch, with launches that do nothing.

No GPU is needed: tensors of the CPU are taken for a GPU's. Gradients are given, at other addresses each time, as after
a backward pass. What is left out is the launch itself (``predictions`` says what it costs).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from lookbehind_fused import Lookbehind, open_step
from lookbehind_fused.kernels import cuda

MOST = {161: 300e-6, 1000: 1.6e-3}
"""Seconds of a step of three evaluations, at the most, by the number of tensors."""
BEFORE = {161: (643e-6, 1073e-6), 1000: (3.3e-3, 4.8e-3)}
"""What was measured before there was this benchmark, least and most."""


@contextmanager
def launches_do_nothing() -> Iterator[None]:
    """The CUDA backend takes CPU tensors, and nothing is decided on the host."""
    with (
        patch.object(cuda, "unavailable", None),
        patch.object(cuda, "serves", lambda device: True),
        patch.object(cuda, "_prepare", lambda *given: lambda: None),
        patch.object(open_step, "on_host", lambda buckets, own_step: False),
    ):
        yield


def host_times(tensors: int, steps: int = 60, **settings: Any) -> list[float]:
    """Seconds of each of so many steps, k = 2 unless the settings say so, over so many tensors of 256 elements."""
    params = [torch.nn.Parameter(torch.randn(256)) for _ in range(tensors)]
    given = [[torch.randn(256) for _ in params] for _ in range(4)]
    found, turn = [], 0
    with launches_do_nothing():
        optimizer = Lookbehind(params, torch.optim.SGD, lr=0.1, momentum=0.9, backend="cuda", **settings)
        for _ in range(10 + steps):
            evaluations, seconds = iter(optimizer.evaluations()), 0.0
            while True:
                start = time.perf_counter()
                evaluation = next(evaluations, None)
                seconds += time.perf_counter() - start
                if evaluation is None:
                    break
                turn += 1
                for p, g in zip(params, given[turn % 4], strict=True):
                    p.grad = g
            found.append(seconds)
    return found[10:]
