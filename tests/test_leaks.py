"""Steps leave nothing behind: bytes that are in use do not grow with their number."""

import ctypes
import gc
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lookbehind_fused import Lookahead, Lookbehind
from tests.kernels.mutants import ROOT
from tests.sampling import sample
from tests.twin import BASES


class Memory(ctypes.Structure):
    """glibc's ``mallinfo2``."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks")),
        *((name, ctypes.c_size_t) for name in ("fsmblks", "uordblks", "fordblks", "keepcost")),
    ]


def in_use() -> int:
    """Bytes that have been allocated and not freed."""
    gc.collect()
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = Memory
    memory = ask()
    return memory.uordblks + memory.hblkhd


def grown(steps: int, backend: str, base: str, form: str, **options: Any) -> int:
    """Bytes in use after so many steps more than before them, a hundred steps having been taken already."""
    params = [nn.Parameter(torch.ones(n)) for n in (3, 70, 1)]
    grads = [torch.linspace(-1, 1, p.numel()) for p in params]
    make, settings = BASES[base]
    optimizer = Lookbehind(params, make, k=5, rho=1e-3, backend=backend, **options, **{**settings, "lr": 1e-5})
    if form == "lookahead":
        optimizer = Lookahead(optimizer, k=3)

    def evaluate(*_: Any) -> Tensor:
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return grads[0]

    def step(number: int) -> None:
        if form == "evaluations":
            for _ in optimizer.evaluations():
                evaluate()
        elif form == "missing":  # another tensor without a gradient each time
            optimizer.step(lambda: (evaluate(), setattr(params[number % 3], "grad", None))[0])
        elif form == "refused":
            for p in params:
                p.grad = torch.ones_like(p)
            try:
                optimizer.step(lambda: grads[0])
            except RuntimeError:
                optimizer.zero_grad()
        else:
            optimizer.step(evaluate)

    for number in range(100):
        step(number)
    before = in_use()
    for number in range(steps):
        step(number)
    return in_use() - before


CASES = [
    ("SGD", "step", {"alpha": "adaptive"}),
    ("momentum", "evaluations", {"max_grad_norm": 1.0, "adaptive": True}),
    ("Adam", "step", {"nonfinite": "skip"}),
    ("AdamW", "missing", {}),
    ("RMSprop", "step", {}),
    ("Lister", "refused", {}),
    ("momentum", "lookahead", {}),
    ("Adam", "refused", {"ascent_gradient": "previous"}),
]


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's mallinfo2")
@pytest.mark.parametrize("steps", [300, pytest.param(30_000, marks=pytest.mark.slow)])
def test_nothing_is_left(backend: str, steps: int) -> None:
    """In a process of its own, whose heap is its own: less than 16 bytes a step, where each of six passes leaked 48."""
    cases = CASES if backend == "native" else sample(CASES, 4) if steps < 30_000 else CASES[:1]
    code = (
        "from tests.test_leaks import grown\n"
        f"for base, form, options in {cases!r}:\n"
        f"    print(base, form, grown({steps}, {backend!r}, base, form, **options))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert len(rows) == len(cases)
    assert not [row for row in rows if int(row[2]) >= 16 * steps], done.stdout


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="needs glibc's mallinfo2")
def test_a_leak_would_be_seen() -> None:
    """Of what Python takes from the system, as every tensor does."""
    before, kept = in_use(), [bytes(600) + bytes([i % 256]) for i in range(1000)]
    assert in_use() - before > 600 * len(kept)
