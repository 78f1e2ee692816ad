"""The measurements, run by pytest-benchmark under ``python -m benchmarks.bench``; ``make test`` collects none of them.

One round of a benchmark is one turn of every contender, so that pytest-benchmark's own figures are of whole rounds;
what each contender took is in ``extra_info`` and becomes the results. ``plan`` comes from ``suite``.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks import data
from benchmarks.bench import memory
from benchmarks.bench.contenders import CONTENDERS, Fused
from benchmarks.bench.own_work import OwnWork, check_equal_work, fresh, own_work, passes_of_a_step
from benchmarks.bench.settings import Settings
from benchmarks.bench.shapes import SETS, elements
from benchmarks.bench.timing import Interleaved, timed
from benchmarks.files import UserError
from benchmarks.models import ResidualNetwork

full = pytest.mark.full  # not with --quick
ALL = tuple(CONTENDERS)
EAGER = ("naive", "foreach", "native")
BASELINE = Settings()
VARIATIONS = [
    Settings(k=1),
    Settings(k=5),
    Settings(k=10),
    Settings(asam=True),
    Settings(alpha="adaptive"),
    Settings(k=5, alpha="adaptive"),
    Settings(asam=True, alpha="adaptive"),
]


def name(settings: Settings) -> str:
    """Such as ``k5-asam-adaptive``."""
    return f"k{settings.k}-{'asam' if settings.asam else 'sam'}-{'adaptive' if settings.adaptive else 'static'}"


def measure(benchmark: Any, interleaved: Interleaved, rounds: int, **facts: Any) -> None:
    """Run the rounds and leave what was found in ``extra_info``."""
    with torch._dynamo.config.patch(error_on_recompile=True):
        benchmark.pedantic(interleaved.round, rounds=rounds, iterations=1)
    benchmark.extra_info.update(
        facts, seconds=interleaved.seconds, segments=interleaved.segments, steps=interleaved.steps
    )


def measure_own_work(benchmark: Any, plan: Any, set_name: str, names: Sequence[str], settings: Settings) -> None:
    """Time the optimizer's own work on one parameter set."""
    shapes = SETS[set_name]
    names = [contender for contender in names if contender in plan.contenders or contender not in CONTENDERS]
    work = own_work(names, shapes, settings)
    check_equal_work(work)
    measure(
        benchmark,
        Interleaved(work, plan.block_seconds),
        plan.rounds,
        set=set_name,
        tensors=len(shapes),
        elements=elements(shapes),
        settings=asdict(settings),
    )


# ---- (a) the optimizer's own work ------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_name", ["small", "1000x256", "resnet34", pytest.param("vit-b16", marks=full)])
def bench_own(benchmark, plan, set_name):
    """The baseline: k = 2, SAM, static alpha."""
    measure_own_work(benchmark, plan, set_name, ALL, BASELINE)


@full
@pytest.mark.parametrize("settings", VARIATIONS, ids=name)
@pytest.mark.parametrize("set_name", ["small", "resnet34"])
def bench_variations(benchmark, plan, set_name, settings):
    """Other k, ASAM, adaptive alpha. Compiled takes part three times, as every time it compiles for a while."""
    names = ALL if set_name == "small" and settings in (VARIATIONS[1], VARIATIONS[3], VARIATIONS[4]) else EAGER
    measure_own_work(benchmark, plan.shorter(), set_name, names, settings)


@pytest.mark.parametrize(
    ("set_name", "names"),
    [
        *((set_name, ALL) for set_name in ("flat-1e4", "flat-1e5", "flat-1e6", "flat-1e7")),
        pytest.param("flat-1e8", EAGER, marks=full),
        pytest.param("flat-2e8", ("native",), marks=full),
        *((set_name, ALL) for set_name in ("1x256", "10x256", "100x256")),
        *((set_name, EAGER) for set_name in ("1000x256", "10000x256")),
    ],
)
def bench_scaling(benchmark, plan, set_name, names):
    """Cost against size and tensor count."""
    needs_memory(24 * len(names) * elements(SETS[set_name]))
    measure_own_work(benchmark, plan.shorter(), set_name, names, BASELINE)


def bench_overhead(benchmark, plan):
    """110 tensors of one element each: what is left is Python, dispatch, and the kernels' own preparations."""
    measure_own_work(benchmark, plan.shorter(), "110x1", (*EAGER, "ops"), BASELINE)


# ---- (b) whole training steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, pytest.param(5, marks=full), pytest.param(10, marks=full)])
@pytest.mark.parametrize("images", ["digits", pytest.param("fashion-mnist", marks=full)])
def bench_training(benchmark, plan, images, k):
    """Forward, backward and optimizer of the main job's network on real images: naive 2k against native k + 1."""
    steps = training_steps(images, Settings(k=k, lr=0.01))
    interleaved = Interleaved({contender: timed(step) for contender, step in steps.items()}, 2 * plan.block_seconds)
    measure(benchmark, interleaved, plan.rounds, images=images, k=k)


def training_steps(images: str, settings: Settings, batch_size: int = 64) -> dict[str, Callable[[], None]]:
    """For naive and native: what takes one outer step on the next batch."""
    try:
        dataset = data.load(images, limit=2048)
    except UserError as error:
        pytest.skip(str(error))
    batches = list(zip(dataset.train_images.split(batch_size), dataset.train_labels.split(batch_size), strict=True))
    if len(batches[-1][1]) < batch_size:
        batches.pop()
    torch.manual_seed(0)
    network = ResidualNetwork(dataset.train_images.shape[1], data.CLASSES)

    def make(contender: str) -> Callable[[], None]:
        model, coming = copy.deepcopy(network), cycle(batches)
        optimizer = CONTENDERS[contender](list(model.parameters()), settings)

        def step() -> None:
            inputs, targets = next(coming)
            for _ in optimizer.evaluations():
                F.cross_entropy(model(inputs), targets).backward()

        return step

    return {contender: make(contender) for contender in ("naive", "native")}


# ---- (c) bandwidth ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("set_name", ["resnet34", pytest.param("flat-2e8", marks=full)])
def bench_bandwidth(benchmark, plan, set_name):
    """A step's bytes over its time, against ``copy_`` and ``add`` of flat tensors with as many elements."""
    shapes = SETS[set_name]
    n = elements(shapes)
    needs_memory(36 * n)
    x, y, z = torch.ones(n), torch.ones(n), torch.ones(n)
    contenders = {
        **own_work(["native"], shapes, BASELINE),
        "copy": timed(lambda: y.copy_(x)),
        "add": timed(lambda: torch.add(x, y, out=z)),
    }
    facts = {"set": set_name, "elements": n, "settings": asdict(BASELINE)}
    measure(benchmark, Interleaved(contenders, plan.block_seconds), plan.rounds, **facts)


def needs_memory(wanted: int) -> None:
    """Leave the measurement out where the machine has not this many bytes to spare."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    if wanted > 0.9 * available:
        pytest.skip(f"needs {wanted / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")


# ---- (d) memory, traffic, launches, evaluations: nothing here depends on the clock -----------------------------------


@pytest.mark.parametrize(
    "settings",
    [BASELINE, pytest.param(Settings(k=1), marks=full), pytest.param(Settings(k=5, alpha="adaptive"), marks=full)],
    ids=name,
)
def bench_memory(benchmark, plan, settings):
    """State held between two steps and the peak from construction through two steps, in copies of the model."""
    shapes = SETS["resnet34"]
    model_bytes = 4 * elements(shapes)
    found = {}

    def measure_all() -> None:
        for contender in plan.contenders if settings is BASELINE else EAGER:
            if contender == "compiled":
                own_work([contender], SETS["10x256"], settings)["compiled"]()  # imports the compiler
            params = [p.requires_grad_() for p in fresh(shapes, seed=2, scale=0.05)]
            grads = fresh(shapes, seed=1, scale=0.01)

            def two_steps(contender=contender, params=params, grads=grads) -> Any:
                run = OwnWork(CONTENDERS[contender](params, settings), params, grads, writes_grads=False)
                run()
                run()
                return run

            highest = memory.peak(two_steps)
            run = two_steps()
            given = [*params, *grads]
            base = getattr(run.contender, "base_optimizer", None) or getattr(run.contender, "base", None)
            published = getattr(base, "state", None) or {"momentum": getattr(run.contender, "momentum", [])}
            found[contender] = {
                "state": memory.held(run.contender, given) / model_bytes,
                "base": memory.held(dict(published), given) / model_bytes,
                "peak": highest / model_bytes,
            }

    torch._dynamo.reset()
    benchmark.pedantic(measure_all, rounds=1, iterations=1)
    benchmark.extra_info.update(settings=asdict(settings), copies=found)


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


@pytest.mark.parametrize("set_name", ["1x256", "10000x256"])
def bench_launches(benchmark, set_name):
    """Passes launched for each gradient evaluation."""
    counts = {}

    def count() -> None:
        for settings in (BASELINE, Settings(k=5, asam=True), Settings(k=3, alpha="adaptive")):
            run = own_work(["native"], SETS[set_name], settings)["native"]
            run()
            with memory.Passes() as passes:
                at = []
                for _ in run.contender.evaluations():
                    at.append(len(passes.found))
                    run.provide()
            ends = [*at[1:], len(passes.found)]
            counts[name(settings)] = [end - start for start, end in zip(at, ends, strict=True)]

    benchmark.pedantic(count, rounds=1, iterations=1)
    benchmark.extra_info.update(set=set_name, launches=counts)


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
