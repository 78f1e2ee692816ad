"""What a GPU takes for the optimizer's own work: beside other contenders, copies, and what was predicted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.bench import predictions
from benchmarks.bench.shapes import SETS
from benchmarks.models import ResidualNetwork
from benchmarks.spread import Spread, ratios
from lookbehind_fused import graphs
from lookbehind_fused.kernels import SCHEMAS
from tests.gpu.flow import Work, fused
from tests.gpu.machine import here
from tests.gpu.passes import arguments, bound

Shapes = list[tuple[int, ...]]

BYTES = {
    "reduce_sq_norm": 4, "ascend": 16, "descend": 20, "descend_ascend": 28, "descend_interpolate": 24,
    "descend_align": 28, "interpolate": 12,
}  # fmt: skip
"""What a pass moves for each parameter: float32, momentum, nothing derived (DESIGN section 3)."""
BOUND = 0.9
"""What a step over ``LARGE`` parameters reaches of the better one of copy and add, at the least (DESIGN section 7)."""
LARGE = 200_000_000
CAPTURED = 1.1
"""A captured step of a network takes so many times what a graph of its evaluations alone does, at the most."""


def sets() -> dict[str, Shapes]:
    """The shapes that own work is measured over."""
    chosen = {name: SETS[name] for name in ("small", "1000x256", "resnet34", "vit-b16")}
    return {**chosen, "flat 2e8": [(LARGE,)]}


def shortened(shapes: Shapes) -> Shapes:
    """What a dry run takes of them: as many tensors, few elements."""
    if not here.dry:
        return shapes
    return [tuple(min(n, 5) for n in shape) for shape in shapes[:120]]


def in_turn(runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    """Seconds of each run, in rounds in which every one has its turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    turn, repeats = here.chosen(0.03, 0.02, 0.001), {}
    for name, run in runs.items():
        here.seconds(run, 3)  # compiles, allocates
        repeats[name] = max(1, min(100, int(turn / here.seconds(run, 1))))
    for _ in range(here.chosen(9, 5, 2)):
        for name, run in runs.items():
            seconds[name].append(here.seconds(run, repeats[name]))
    return seconds


def copies(elements: int) -> dict[str, Callable[[], Any]]:
    """What bandwidth is compared with: a copy, and a sum of two."""
    x, y = (torch.ones(elements, device=here.device) for _ in range(2))
    return {"copy": lambda: y.copy_(x), "add": lambda: torch.add(x, y, out=y)}


def own_work(shapes: Shapes, backends: Sequence[str]) -> str:
    """Ratios of device time, contenders in turn."""
    import torch._inductor.config

    from benchmarks.bench.contenders import ALL
    from benchmarks.bench.settings import Settings

    torch._inductor.config.loop_ordering_after_fusion = False  # torch 2.11 fails over the compiled peer with it
    settings, elements = Settings(), sum(torch.Size(s).numel() for s in shapes)
    names = ["naive", "foreach", "foreach on the device"]
    if len(shapes) < 200 and not here.quick:
        names.append("compiled")
    if elements > 1e8:
        names = ["foreach", "foreach on the device"]
    if here.dry:
        here.stand_in("nothing compiled")
        torch.compiler.set_stance("force_eager")
    shapes = shortened(shapes)
    works = {name: Work(shapes, lambda params, name=name: ALL[name](params, settings)) for name in names}
    for backend in backends:
        works[backend] = Work(shapes, lambda params, backend=backend: fused(params, backend, k=2))
    seconds = in_turn({name: work.step for name, work in works.items()})
    parts = [
        f"{name} / {backend} {ratios(seconds[name], seconds[backend]).show()}" for backend in backends for name in names
    ]
    return "; ".join(parts)


def bandwidth(backend: str, elements: int) -> str:
    """Of each pass by itself over one tensor, and of a whole step, k = 2: the part of the better one of copy and add.

    Raises:
        AssertionError: over ``LARGE`` elements the step has less than ``BOUND``.
    """
    judged, elements = elements == LARGE and not here.dry, here.size(elements)
    moved = {"copy": 8, "add": 12, **BYTES, "a whole step": predictions.BYTES}
    seconds: dict[str, list[float]] = {}
    beside = copies(elements)
    for name in [*SCHEMAS, "a whole step"]:  # one at a time: together they would fill a GPU of 24 GB
        found = in_turn({**beside, name: walk(backend, name, elements)})
        best = [max(8 / copy, 12 / add) for copy, add in zip(found["copy"], found["add"], strict=True)]
        seconds[name] = [moved[name] / s / b for s, b in zip(found[name], best, strict=True)]
    parts = [f"{name} {Spread.of(values).show()}" for name, values in seconds.items()]
    for name in beside:
        parts.append(f"{name} alone {moved[name] * elements / statistics.median(found[name]) / 1e12:.2f} TB/s")
    if judged:
        parts.append(f"the step's bound: {BOUND}")
    if judged and not Spread.of(seconds["a whole step"]).median >= BOUND:
        raise AssertionError(f"expected a whole step at {BOUND} or more: {'; '.join(parts)}")
    return "; ".join(parts)


def walk(backend: str, name: str, elements: int) -> Callable[[], Any]:
    """A pass, or a step, over so many elements."""
    if name == "a whole step":
        return Work([(elements,)], lambda params: fused(params, backend, k=2)).step
    given = arguments(name, [elements])
    run, grads = bound(backend, name, given), given.get("grads", [])
    return lambda: run(grads)


class Training:
    """ResNet-18 for images of 32x32, ten classes, with a minibatch of 128 and bfloat16 autocast."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        width, batch = here.chosen(64, 64, 4), here.chosen(128, 128, 4)
        self.model = ResidualNetwork(3, 10, width, depth=2, stages=4).to(here.device)
        self.params = [*self.model.parameters()]
        self.images = torch.randn(batch, 3, 32, 32, device=here.device)
        self.labels = torch.randint(10, (batch,), device=here.device)

    def closure(self) -> Tensor:
        with torch.autocast(here.device, torch.bfloat16, cache_enabled=False):
            loss = cross_entropy(self.model(self.images), self.labels)
        loss.backward()
        return loss.detach()

    def evaluations(self) -> None:
        """As many as a step with k = 2 has, and nothing else."""
        for _ in range(3):
            for p in self.params:
                p.grad = None
            self.closure()

    def step(self, contender: Any) -> None:
        """Of a contender of the benchmark."""
        for _ in contender.evaluations():
            self.closure()


def captured_network(backend: str) -> str:
    """A captured step of a network, over a graph of its evaluations alone; eager steps, and the authors' code.

    Raises:
        AssertionError: it takes more than ``CAPTURED`` times as long.
    """
    from benchmarks.bench.contenders import ALL
    from benchmarks.bench.settings import Settings

    alone, captured, eager, authors = (Training() for _ in range(4))
    graph, steps = graphs.Graph(torch.device(here.device), None), fused(captured.params, backend, k=2)
    runs: dict[str, Callable[[], Any]] = {"captured": lambda: steps.step(captured.closure), "alone": alone.evaluations}
    if here.dry:
        here.stand_in("nothing captured")
    else:
        runs["captured"] = steps.graphed(captured.closure)
        graph.warm_up(lambda: [alone.evaluations() for _ in range(3)])
        graph.capture(alone.evaluations)
        runs["alone"] = graph.replay
    of_eager, of_authors = fused(eager.params, backend, k=2), ALL["public"](authors.params, Settings())
    runs["eager"] = lambda: of_eager.step(eager.closure)
    runs["authors"] = lambda: authors.step(of_authors)
    seconds = in_turn(runs)
    over = ratios(seconds["captured"], seconds["alone"])
    parts = [
        f"captured / a graph of its evaluations alone {over.show()}, bound {CAPTURED}",
        f"the authors' loop, 2k gradients, eager / captured {ratios(seconds['authors'], seconds['captured']).show()}",
        f"the same / eager {ratios(seconds['authors'], seconds['eager']).show()}",
        f"captured {1e3 * statistics.median(seconds['captured']):.2f} ms",
    ]
    if not here.dry and not over.median <= CAPTURED:
        raise AssertionError(f"expected at most {CAPTURED}: {'; '.join(parts)}")
    return "; ".join(parts)


def against_the_prediction(backend: str, title: str) -> str:
    """A step's seconds, eager and captured, over what ``benchmarks.bench.predictions`` says of this GPU: by the
    bandwidth that its vendor states or, of a GPU that is not in that table, by the one that a copy reaches.
    """
    from benchmarks.bench.host import host_times

    parameters, tensors = predictions.MODELS[title]
    name = "" if here.dry else torch.cuda.get_device_name()
    stated = predictions.BANDWIDTH.get(predictions.DEVICES.get(name, ""))
    size = here.size(parameters // tensors)
    works = [Work([(size,)] * tensors, lambda params: fused(params, backend, k=2)) for _ in range(2)]
    eager, captured = works
    if here.dry:
        here.stand_in("a double of CUDA's graphs")

    def closure() -> Tensor:
        captured.give()
        return captured.grads[0]

    runs = {"eager": eager.step, "captured": captured.optimizer.graphed(closure), **copies(size * tensors)}
    seconds = {name: statistics.median(found) for name, found in in_turn(runs).items()}
    copied = 8 * size * tensors / seconds["copy"]
    host = statistics.median(host_times(tensors, steps=here.chosen(60, 30, 3)))
    expected = predictions.predicted(size * tensors, stated or copied / predictions.SHARE, host)
    parts = [
        f"{kind} {1e3 * seconds[kind]:.3f} ms, predicted {1e3 * value:.3f}, measured / predicted "
        f"{seconds[kind] / value:.2f}"
        for kind, value in (("eager", expected.eager), ("captured", expected.captured))
    ]
    by = f"{stated / 1e12:.2f} TB/s that are stated" if stated else f"the {copied / 1e12:.2f} TB/s of a copy"
    return f"{'; '.join(parts)}; by {by}, host {1e6 * host:.0f} us"
