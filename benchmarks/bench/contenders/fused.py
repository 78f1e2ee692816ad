"""This library's optimizer, and its ops alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.bench.contenders.foreach import Tensors, clear
from benchmarks.bench.settings import Settings
from lookbehind_fused import SAM, Lookbehind
from lookbehind_fused.kernels import native

NATIVE = "native"
"""The backend under test."""


class Fused(Lookbehind):
    """``Lookbehind`` with one of its backends."""

    def __init__(self, params: Tensors, settings: Settings, backend: str = NATIVE) -> None:
        super().__init__(
            params,
            torch.optim.SGD,
            rho=settings.rho,
            k=settings.k,
            alpha=settings.alpha,
            alpha_scope=settings.scope,
            adaptive=settings.asam,
            eta=settings.eta,
            backend=backend,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )


class Pair:
    """``SAM`` in the pair form, with which scripts for the single-file port run as they are."""

    def __init__(self, params: Tensors, settings: Settings) -> None:
        self.optimizer = SAM(
            params,
            torch.optim.SGD,
            rho=settings.rho,
            adaptive=settings.asam,
            eta=settings.eta,
            backend=NATIVE,
            lr=settings.lr,
            momentum=settings.momentum,
            weight_decay=settings.weight_decay,
        )

    def evaluations(self) -> Iterator[int]:
        """One step of two gradients."""
        yield 0
        self.optimizer.first_step(zero_grad=True)
        yield 1
        self.optimizer.second_step(zero_grad=True)


class OpsAlone(Fused):
    """What a step of native costs at the least: the ops that it calls, and around them nothing but clearing and reading
    gradients and bumping version counters. It takes nothing into account that may have changed since the second step,
    which it repeats, and leaves nothing to be restored. For a static alpha: then each evaluation has one op.
    """

    def __init__(self, params: Tensors, settings: Settings) -> None:
        assert not settings.adaptive
        super().__init__(params, settings)
        self.held, self.steps, self.calls = list(params), 0, []

    def evaluations(self) -> Iterator[int]:
        """One outer step: the first two as native takes them."""
        self.steps += 1
        if self.steps <= 2:
            self.calls.clear()
            with self._recorded():
                yield from super().evaluations()
            return
        for run in self.calls:
            clear(self.held)
            yield 0
            with torch.no_grad():
                run([p.grad for p in self.held])

    @contextmanager
    def _recorded(self) -> Iterator[None]:
        """Keep the calls, in their order."""
        bind = native.bind

        def noted(*arguments: Any) -> Any:
            run = bind(*arguments)
            return lambda grads: (run(grads), self.calls.append(run))

        with patch.object(native, "bind", noted):
            yield
