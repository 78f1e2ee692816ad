"""Steps that do not happen: gradients that are not finite, and a scaler's overflow."""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from lookbehind_fused import Lookahead, Lookbehind, MultistepSAM
from tests.gpu.machine import here
from tests.gpu.steps import BASES


def undone(backend: str) -> str:
    """Three steps of which the second is broken are the first and the third, to the last bit."""
    ways = list(itertools.product(BASES, (1, 2, 3), (0.6, "adaptive"), (torch.float32, torch.bfloat16), (False, True)))
    ways = ways[:: here.chosen(1, 5, 7)]
    for base, k, alpha, dtype, average in ways:
        for broken in range(k + 1):
            found = []
            for steps in ((0, 1, 2), (0, 2)):
                norm = nn.BatchNorm1d(3).to(here.device)
                params = [nn.Parameter(torch.linspace(-1, 1, n, device=here.device).to(dtype)) for n in (5, 3000)]
                settings = {"backend": backend, "nonfinite": "skip", "buffers_at_slow": norm, "rho": 0.1, **base[1]}
                if average:
                    optimizer = MultistepSAM(params, base[0], k=k, average=True, **settings)
                else:
                    optimizer = Lookbehind(params, base[0], k=k, alpha=alpha, **settings)
                for step in steps:
                    slopes = [torch.linspace(step - 1, 2, p.numel(), device=here.device).to(dtype) for p in params]
                    inputs = torch.arange(12.0, device=here.device).view(4, 3) * (step + 1)
                    with here.no_waits() if step == 1 else nullcontext():
                        for evaluation in optimizer.evaluations():
                            norm(inputs * (1 + evaluation.index))
                            for p, slope in zip(params, slopes, strict=True):
                                p.grad = 0.3 * p.detach() + slope * (1 + evaluation.index)
                            if step == 1 and evaluation.index == broken:
                                params[1].grad[-1].fill_(float("nan"))
                        skipped = optimizer.diagnostics["skipped"]
                    if int(skipped) != (step == 1) or params[0].grad is not None:
                        raise AssertionError(f"step {step}, broken at {broken}: skipped {int(skipped)}")
                state = [value for entry in optimizer.state.values() for value in entry.values()]
                found.append([*params, *state, *norm.buffers()])
            for i, (a, b) in enumerate(zip(*found, strict=True)):
                if not torch.equal(a, b):
                    raise AssertionError(
                        f"{base[0].__name__}, k {k}, alpha {alpha}, {dtype}, broken {broken}: tensor {i}"
                    )
    return f"{len(ways)} settings, each evaluation of them"


def scaled(backend: str) -> str:
    """Four steps of which the second overflows are the other three, to the last bit; the scale is halved once."""
    ways = list(itertools.product(BASES, (1, 2, 3), (None, 2)))[:: here.chosen(1, 5, 7)]
    for base, k, inner_steps in ways:
        for broken in range(k + 1):
            found = []
            for steps in ((0, 1, 2, 3), (0, 2, 3)):
                params = [nn.Parameter(torch.linspace(-1, 1, n, device=here.device)) for n in (5, 3000)]
                scaler = torch.amp.GradScaler(here.device, init_scale=2.0**10, growth_interval=100)
                optimizer: Any = Lookbehind(params, base[0], k=k, rho=0.1, scaler=scaler, backend=backend, **base[1])
                if inner_steps:
                    optimizer = Lookahead(optimizer, inner_steps, 0.3)
                for step in steps:
                    overflows = [step == 1 and index == broken for index in range(k + 1)]

                    def closure(
                        params: Any = params, scaler: Any = scaler, step: int = step, overflows: Any = overflows
                    ) -> None:
                        loss = sum((0.15 * p.square() + (1 + step) * p).sum() for p in params)
                        scaler.scale(loss * float("inf") if overflows.pop(0) else loss).backward()

                    with here.no_waits() if step in (1, 2) else nullcontext():
                        scaler.step(optimizer, closure)
                        scaler.update()
                if scaler.get_scale() != (512 if 1 in steps else 1024):
                    raise AssertionError(f"{base[0].__name__}, k {k}, overflow at {broken}: {scaler.get_scale()}")
                state = [value for entry in optimizer.state.values() for value in entry.values()]
                found.append([*params, *state, torch.tensor(getattr(optimizer, "inner_step", 0))])
            for i, (a, b) in enumerate(zip(*found, strict=True)):
                if not torch.equal(a, b):
                    raise AssertionError(f"{base[0].__name__}, k {k}, overflow at {broken}, {inner_steps}: tensor {i}")
    return f"{len(ways)} settings, each evaluation of them"
