"""Steps without the host: no waits, few launches, captured as graphs, on streams of their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from lookbehind_fused import Lookbehind, graphs
from tests.gpu.machine import here
from tests.kernels import graphed


class Work:
    """An optimizer on the GPU with gradients given, always the same tensors."""

    def __init__(self, shapes: list[tuple[int, ...]], make: Callable[[list[nn.Parameter]], Any]) -> None:
        self.params = [nn.Parameter(torch.randn(s, device=here.device) * 0.05) for s in shapes]
        self.grads = [torch.randn(s, device=here.device) * 0.01 for s in shapes]
        self.optimizer = make(self.params)

    def step(self) -> None:
        for _ in self.optimizer.evaluations():
            self.give()

    def give(self) -> None:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g


def fused(params: list[nn.Parameter], backend: str, **settings: Any) -> Lookbehind:
    return Lookbehind(params, torch.optim.SGD, lr=1e-3, momentum=0.9, backend=backend, **settings)


def twins(backend: str, **settings: Any) -> tuple[Work, Work]:
    """Two that begin alike."""
    one, other = (Work([(300, 200), (77,)], lambda params: fused(params, backend, **settings)) for _ in range(2))
    for theirs, ours in zip([*other.params, *other.grads], [*one.params, *one.grads], strict=True):
        theirs.data.copy_(ours.data)
    return one, other


def assert_same_weights(one: Work, other: Work) -> None:
    for a, b in zip(one.params, other.params, strict=True):
        if not torch.equal(a, b):
            raise AssertionError(f"weights differ by {float((a - b).detach().abs().max()):.1e}")


def no_synchronisation(backend: str) -> str:
    for settings in ({"k": 2}, {"k": 3, "alpha": "adaptive"}, {"k": 2, "max_grad_norm": 1.0}):
        work = Work([(300, 200), (77,)], lambda params, settings=settings: fused(params, backend, **settings))
        work.step()
        work.step()
        with here.no_waits():
            work.step()
            work.grads = [g * 1.5 for g in work.grads]  # at other addresses
            work.step()
    return "static, adaptive, clipped; gradients that stay and that move"


def graph_capture(backend: str) -> str:
    captured, eager = twins(backend, k=2)
    graph = graphs.Graph(torch.device(here.device), None)
    if here.dry:
        here.stand_in("a double of CUDA's graphs")
    graph.warm_up(lambda: [captured.step() for _ in range(3)])
    graph.capture(captured.step)
    for _ in range(4):
        graph.replay()
    for _ in range(7):  # what is captured is not run
        eager.step()
    assert_same_weights(captured, eager)
    return "3 steps, then 4 replays, as 7 steps"


def captured_steps(backend: str) -> str:
    if here.dry:
        here.stand_in("a double of CUDA's graphs, without backward passes")
    return graphed.on_gpu(backend, here.device, backward=not here.dry)


def side_streams(backend: str) -> str:
    """Each step on a stream of its own, held up there before its gradients are made: what ran on another stream would
    use gradients that are not there yet.
    """
    steps = 6
    for settings in ({"k": 2}, {"k": 3, "alpha": "adaptive"}):
        aside, usual = twins(backend, **settings)
        for step in range(steps):
            with here.side_stream():
                here.hold_up()
                for evaluation in aside.optimizer.evaluations():
                    here.hold_up()
                    for p, g in zip(aside.params, aside.grads, strict=True):
                        p.grad = g * (1 + step + evaluation.index)
            for evaluation in usual.optimizer.evaluations():
                for p, g in zip(usual.params, usual.grads, strict=True):
                    p.grad = g * (1 + step + evaluation.index)
        here.synchronize()
        assert_same_weights(aside, usual)
    return f"{steps} steps on as many streams, static and adaptive"


def compiled(backend: str) -> str:
    """The passes under ``torch.compile`` without a graph break, with another lr in each step: the eager bits."""
    steps, graphs_made = 6, 0
    for settings in ({"k": 2}, {"k": 3, "alpha": "adaptive", "max_grad_norm": 1.0}):
        ours, theirs = twins(backend, **settings)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        apply = torch.compile(ours.optimizer.apply, fullgraph=True)
        for step in range(steps):
            for work in (ours, theirs):
                work.optimizer.param_groups[0]["lr"] = 1e-3 * (1 + step)
                for evaluation in work.optimizer.evaluations(apply=work is theirs):
                    for p, g in zip(work.params, work.grads, strict=True):
                        p.grad = g * (1 + step + evaluation.index)
                    if work is ours:
                        apply(evaluation)
        assert_same_weights(ours, theirs)
        made = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if made != settings["k"] + 1:
            raise AssertionError(
                f"{settings}: expected a graph for each of {settings['k'] + 1} evaluations, got {made}"
            )
        graphs_made += made
    return f"{steps} steps with as many lrs, static and adaptive: {graphs_made} graphs, the eager bits"


def launches(backend: str) -> str:
    found = []
    for count in (1, here.chosen(10_000, 10_000, 500)):
        work = Work([(16,)] * count, lambda params: fused(params, backend, k=2))
        work.step()
        work.step()
        kernels = here.kernels(work.step)
        found.append(f"{len(kernels)} for {count:,} tensors")
        if not 0 < len(kernels) <= 2 * 3:
            raise AssertionError(f"{count} tensors: {len(kernels)} for 3 evaluations: {kernels[:12]}")
    return f"in a step of 3 evaluations {', '.join(found)}"
