"""The optimizer's own work: a step with gradients given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench.contenders import ALL, Fused
from benchmarks.bench.memory import Passes
from benchmarks.bench.settings import Settings
from benchmarks.bench.timing import Clock, Segments


class OwnWork:
    """One outer step of a contender with gradients given: calling it returns its ``Segments``.

    The clock stands while gradients are put in place; clearing them is the optimizer's work. A gradient may be None.
    """

    def __init__(
        self, contender: Any, params: Sequence[Tensor], grads: Sequence[Tensor | None], writes_grads: bool = False
    ) -> None:
        self.contender, self.params, self.grads = contender, params, grads
        self.lent = [g.clone() for g in grads] if writes_grads else grads

    def provide(self) -> None:
        """A fresh gradient for each parameter, at the cost of an assignment unless the contender writes into it."""
        for p, lent, g in zip(self.params, self.lent, self.grads, strict=True):
            if lent is not g:
                lent.copy_(g)
            p.grad = lent

    def __call__(self) -> Segments:
        """One step."""
        segments, now = [], Clock.read
        start = now()
        for _ in self.contender.evaluations():
            segments.append(now() - start)
            self.provide()
            start = now()
        segments.append(now() - start)
        return segments


def fresh(shapes: Sequence[tuple[int, ...]], seed: int, scale: float) -> list[Tensor]:
    """The same values for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).mul_(scale) for shape in shapes]


def own_work(names: Sequence[str], shapes: Sequence[tuple[int, ...]], settings: Settings) -> dict[str, OwnWork]:
    """The contenders on tensors of their own, with the same gradients."""
    torch._dynamo.reset()
    grads = fresh(shapes, seed=1, scale=0.01)
    work = {}
    for contender in names:
        params = [p.requires_grad_() for p in fresh(shapes, seed=2, scale=0.05)]
        work[contender] = OwnWork(
            ALL[contender](params, settings),
            params,
            grads,
            writes_grads=contender in ("naive", "public") and settings.asam,
        )
    return work


def native_work(
    shapes: Sequence[tuple[int, ...]], settings: Settings, groups: int = 1, without: int | None = None
) -> OwnWork:
    """Native with its tensors dealt out to groups, each with a learning rate of its own; tensor ``without`` never has a
    gradient.
    """
    params = [p.requires_grad_() for p in fresh(shapes, seed=2, scale=0.05)]
    grads = [g if i != without else None for i, g in enumerate(fresh(shapes, seed=1, scale=0.01))]
    dealt = [{"params": params[g::groups], "lr": settings.lr * (1 + g / groups)} for g in range(groups)]
    return OwnWork(Fused(dealt, settings), params, grads)


def check_equal_work(work: dict[str, OwnWork]) -> None:
    """After two steps all contenders have the same weights, to float32's rounding."""
    for run in work.values():
        run()
        run()
    native = work["native"].params
    for contender, run in work.items():
        if contender == "native":
            continue
        for i, (p, expected) in enumerate(zip(run.params, native, strict=True)):
            error = float((p - expected).detach().abs().max() / expected.detach().abs().max())
            if not error < 1e-4:
                raise RuntimeError(f"{contender} does not do the same work as native: tensor {i} is {error:.1e} off")


def check_equal_bits(work: dict[str, OwnWork]) -> float:
    """After two steps of ``PAIRS`` the weights of both are the same to the last bit.

    Perturbed weights are compared to float32's rounding of the largest one: where the norm is summed in another order,
    all perturbations differ by one factor. With gradients given that does not reach the weights.

    Returns:
        By how much perturbed weights differed, as a part of the largest.
    """
    (one, a), (other, b) = work.items()
    error = 0.0
    for _ in range(2):
        for _ in zip(a.contender.evaluations(), b.contender.evaluations(), strict=True):
            for p, q in zip(a.params, b.params, strict=True):
                error = max(error, float((p - q).detach().abs().max() / q.detach().abs().max()))
            a.provide()
            b.provide()
        different = sum(not torch.equal(p, q) for p, q in zip(a.params, b.params, strict=True))
        if different:
            raise RuntimeError(f"{one} and {other}: {different} of {len(a.params)} tensors are not the same bits")
    if not error < 1e-6:
        raise RuntimeError(f"{one} and {other}: perturbed weights are {error:.1e} apart")
    return error


def passes_of_a_step(settings: Settings, size: int) -> list[tuple[str, float]]:
    """Name and bytes per parameter of each pass of native's second step on one tensor of ``size`` elements."""
    run = own_work(["native"], [(size,)], settings)["native"]
    run()  # the first step has no momentum to read
    with Passes(size) as passes:
        for _ in run.contender.evaluations():
            for g in run.grads:
                g.normal_()  # with the same gradient every time alpha* would be 1, and the last pass change nothing
            run.provide()
    return [(name, (read + written) / size) for name, read, written in passes.found]
