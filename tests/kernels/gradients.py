"""Gradients that kernels are to take for what they are: ``python -m tests.kernels.gradients triton cpu``.

Lazy views, whose memory holds other numbers, gradients that are far from the moments before them, and large ones.
"""

import itertools
import math
import sys

import torch
from torch import nn

from lookbehind_fused import Lookbehind


def lazy_views(backend: str, device: str = "cpu") -> None:
    """Negated and conjugate views give the bits of their values.

    Raises:
        AssertionError: they do not.
    """
    found = []
    for kind in ("plain", "negated", "conjugate"):
        p = nn.Parameter(torch.full((400,), 0.7, device=device))
        optimizer = Lookbehind([p], torch.optim.SGD, lr=0.05, momentum=0.9, rho=0.3, k=2, backend=backend)
        for _ in range(2):
            for _ in optimizer.evaluations():
                g = torch.linspace(-1.0, 1.0, 400, device=device) + p.detach()
                views = {"plain": g, "negated": torch._neg_view(-g), "conjugate": torch.complex(g, -g).conj().imag}
                p.grad = views[kind]
        found.append(p.detach())
    for other in found[1:]:
        assert torch.equal(other, found[0]), f"{backend}: {float((other - found[0]).abs().max())}"


def far_apart(backend: str, device: str = "cpu") -> None:
    """Adam's moments between numbers of very different size, for beta1 on either side of 1/2: to float32's precision of
    the smaller one where that is what is left (torch's lerp goes from the nearer end).

    Raises:
        AssertionError: a moment is another.
    """
    for beta1, expected in ((0.0, 1e-4), (0.25, 2500.000075), (0.5, 5000.00005), (0.9, 9000.00001)):
        p = nn.Parameter(torch.ones(300, device=device))
        optimizer = Lookbehind(
            [p], torch.optim.Adam, lr=1e-6, betas=(beta1, 0.99), rho=0.0, k=1, alpha=1.0, backend=backend
        )
        for g in (1e4 / (1 - beta1), 1e-4):  # the first leaves a moment of 1e4
            for _ in optimizer.evaluations():
                p.grad = torch.full_like(p, g)
        moment = optimizer.state[p]["exp_avg"].double()
        error = float((moment - expected).abs().max()) / expected
        assert error < 1e-6, f"{backend}: beta1 {beta1}: {moment[0].item()}, expected {expected}"


def large(backend: str, device: str = "cpu") -> None:
    """What is finite has a finite norm, also where its square is no float32: nothing is skipped, the ascent has its
    radius, the descent is clipped.

    Raises:
        AssertionError: one of these is not so.
    """
    # A bfloat16 beside 0.75 is rounded by up to 0.004, a whole unit in Triton's interpreter; most move 0.1 or more.
    dtypes, sizes = {torch.float32: 1e-5, torch.bfloat16: 3e-2}, (1e15, 1e19, 1e25, 1e37)
    for (dtype, precision), size, adaptive in itertools.product(dtypes.items(), sizes, (False, True)):
        slopes = torch.linspace(-1, 1, 3000, dtype=torch.float64, device=device)
        slopes[1500:] *= 2.0**-60  # whose squares are lost beside the others
        g = (slopes * size).to(dtype)
        p = nn.Parameter(torch.full((3000,), 0.75, dtype=dtype, device=device))
        optimizer = Lookbehind(
            [p], torch.optim.SGD, lr=1.0, k=1, alpha=1.0, rho=8.0, adaptive=adaptive, max_grad_norm=4.0,
            nonfinite="skip", backend=backend,
        )  # fmt: skip
        moved = []
        for _ in optimizer.evaluations():
            moved.append(float((p.detach().double() - 0.75).norm()))
            p.grad = g.clone()
        moved.append(float((p.detach().double() - 0.75).norm()))
        what = f"{backend}: {dtype}, {size}, {'ASAM' if adaptive else 'SAM'}"
        assert optimizer.diagnostics["skipped"] == 0, what
        norm = float(optimizer.diagnostics["grad_norm"])
        assert math.isclose(norm, float(g.double().norm()), rel_tol=1e-6), what
        expected = [0.0, 8.0 * (0.75 + 0.01 if adaptive else 1.0), 4.0]  # ASAM's T is the same for all weights
        for found, right in zip(moved, expected, strict=True):
            assert math.isclose(found, right, rel_tol=precision), f"{what}: {moved}, expected {expected}"


if __name__ == "__main__":
    for check in (lazy_views, far_apart, large):
        check(*sys.argv[1:])
    print("taken for what they are")
