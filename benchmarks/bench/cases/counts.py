"""What is counted: memory, traffic, launches, calls, evaluations. Nothing here depends on the clock."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import data
from benchmarks.bench import memory
from benchmarks.bench.calls import own_calls
from benchmarks.bench.cases.common import BASELINE, EAGER, VARIATIONS, full, name
from benchmarks.bench.contenders import CONTENDERS, Fused
from benchmarks.bench.own_work import OwnWork, fresh, native_work, own_work, passes_of_a_step
from benchmarks.bench.settings import Settings
from benchmarks.bench.shapes import SETS, elements
from benchmarks.models import ResidualNetwork


@pytest.mark.parametrize(
    "settings",
    [BASELINE, pytest.param(Settings(k=1), marks=full), pytest.param(Settings(k=5, alpha="adaptive"), marks=full)],
    ids=name,
)
def bench_memory(benchmark, plan, settings):
    """What there is between two steps, beside weights and gradients, and the peak from construction through two steps,
    in copies of the model; ``base``: what of it is the base optimizer's.
    """
    shapes = SETS["resnet34"]
    model_bytes = 4 * elements(shapes)
    found = {}

    def measure_all() -> None:
        for contender in plan.contenders if settings is BASELINE else EAGER:
            if contender == "compiled":
                own_work([contender], SETS["10x256"], settings)["compiled"]()  # imports the compiler
            params = [p.requires_grad_() for p in fresh(shapes, seed=2, scale=0.05)]
            grads = fresh(shapes, seed=1, scale=0.01)

            def two_steps(contender=contender, params=params, grads=grads) -> OwnWork:
                run = OwnWork(CONTENDERS[contender](params, settings), params, grads)
                run()
                run()
                return run

            kept, peak = memory.allocated(two_steps)
            base = memory.published(base_state(two_steps().contender))
            found[contender] = {"state": kept / model_bytes, "base": base / model_bytes, "peak": peak / model_bytes}

    torch._dynamo.reset()
    benchmark.pedantic(measure_all, rounds=1, iterations=1)
    benchmark.extra_info.update(settings=asdict(settings), copies=found)


def base_state(contender: Any) -> Mapping[Any, Mapping[str, Any]]:
    """The state of a contender's base optimizer."""
    state = getattr(getattr(contender, "base", contender), "state", None)
    return {None: dict(enumerate(contender.momentum))} if state is None else state


@pytest.mark.parametrize(
    "settings",
    [BASELINE, *(Settings(k=k) for k in (1, 5)), *VARIATIONS[3:6]],
    ids=name,
)
def bench_traffic(benchmark, settings):
    """Bytes per parameter that each pass reads and writes, found by poisoning its arguments."""
    size = 4096
    found = benchmark.pedantic(passes_of_a_step, args=(settings, size), rounds=1, iterations=1)
    benchmark.extra_info.update(settings=asdict(settings), passes=found)


@pytest.mark.parametrize(("set_name", "groups"), [("1x256", 1), ("10000x256", 1), ("1000x256", 50)])
def bench_launches(benchmark, set_name, groups):
    """Passes launched for each gradient evaluation."""
    counts = {}

    def count() -> None:
        for settings in (BASELINE, Settings(k=5, asam=True), Settings(k=3, alpha="adaptive")):
            run = native_work(SETS[set_name], settings, groups)
            run()
            with memory.Passes() as passes:
                at = []
                for _ in run.contender.evaluations():
                    at.append(len(passes.found))
                    run.provide()
            ends = [*at[1:], len(passes.found)]
            counts[name(settings)] = [end - start for start, end in zip(at, ends, strict=True)]

    benchmark.pedantic(count, rounds=1, iterations=1)
    benchmark.extra_info.update(set=set_name, groups=groups, launches=counts)


@pytest.mark.parametrize("groups", [1, 50])
def bench_calls(benchmark, groups):
    """The package's own Python functions that a warm step enters, in each of its forms."""
    counts = {}

    def count() -> None:
        run = native_work(SETS["100x256"], BASELINE, groups)
        optimizer = run.contender

        def closure() -> float:
            run.provide()
            return 0.0

        def pairs() -> None:
            for _ in range(BASELINE.k):
                run.provide()
                optimizer.ascent_step()
                run.provide()
                optimizer.descent_step()

        forms = {"step(closure)": lambda: optimizer.step(closure), "evaluations()": run, "pairs": pairs}
        for form, step in forms.items():
            step()
            step()
            counts[form] = own_calls(step)

    benchmark.pedantic(count, rounds=1, iterations=1)
    benchmark.extra_info.update(groups=groups, calls=counts)


def bench_evaluations(benchmark):
    """Gradient evaluations of a step, and how far the weights are from those of the 2k form after three steps."""
    dataset = data.load("digits", limit=256)
    torch.manual_seed(0)
    network = ResidualNetwork(1, data.CLASSES)
    evaluations, weights = {}, {}

    def train() -> None:
        for form, reuse in (("k + 1", True), ("2k", False)):
            model = copy.deepcopy(network)
            optimizer = Fused(list(model.parameters()), Settings(k=5, lr=0.01))
            optimizer.reuse_gradient = reuse
            evaluations[form] = 0
            for step in range(3):
                part = slice(64 * step, 64 * step + 64)
                for _ in optimizer.evaluations():
                    F.cross_entropy(model(dataset.train_images[part]), dataset.train_labels[part]).backward()
                    evaluations[form] += 1
            weights[form] = torch.cat([p.detach().flatten() for p in model.parameters()])

    benchmark.pedantic(train, rounds=1, iterations=1)
    difference = float((weights["k + 1"] - weights["2k"]).abs().max() / weights["2k"].abs().max())
    benchmark.extra_info.update(
        k=5, evaluations={form: n / 3 for form, n in evaluations.items()}, difference=difference
    )
