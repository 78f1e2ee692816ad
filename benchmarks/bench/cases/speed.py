"""The time of the optimizer's own work, gradients given."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from benchmarks.bench import memory
from benchmarks.bench.cases.common import (
    BASELINE,
    EAGER,
    EVERYONE,
    VARIATIONS,
    full,
    measure,
    measure_own_work,
    name,
    needs_memory,
)
from benchmarks.bench.contenders import PAIRS
from benchmarks.bench.host import MOST, host_times
from benchmarks.bench.own_work import check_equal_bits, native_work, own_work
from benchmarks.bench.settings import Settings
from benchmarks.bench.shapes import SETS, elements
from benchmarks.bench.timing import Interleaved

WITHOUT_PUBLIC = tuple(contender for contender in EVERYONE if contender != "public")


@pytest.mark.parametrize("set_name", ["small", "1000x256", "resnet34", pytest.param("vit-b16", marks=full)])
def bench_own(benchmark, plan, set_name):
    """The baseline: k = 2, SAM, static alpha."""
    measure_own_work(benchmark, plan, set_name, EVERYONE, BASELINE)


@full
@pytest.mark.parametrize("settings", VARIATIONS, ids=name)
@pytest.mark.parametrize("set_name", ["small", "resnet34"])
def bench_variations(benchmark, plan, set_name, settings):
    """Other k, ASAM, adaptive alpha. Compiled takes part three times, as every time it compiles for a while."""
    compiles = set_name == "small" and settings in (VARIATIONS[1], VARIATIONS[3], VARIATIONS[4])
    names = WITHOUT_PUBLIC if compiles else EAGER
    measure_own_work(benchmark, plan.shorter(), set_name, names, settings)


@pytest.mark.parametrize("tensors", [*MOST])
def bench_host(benchmark, plan, tensors):
    """Python and its dispatch on a GPU backend."""
    seconds = benchmark.pedantic(host_times, args=(tensors, 20 if plan.quick else 60), rounds=1, iterations=1)
    benchmark.extra_info.update(tensors=tensors, seconds={"native": seconds})


SIZES = {
    **dict.fromkeys(("flat-1e4", "flat-1e5", "flat-1e6", "flat-1e7"), WITHOUT_PUBLIC),
    **{"flat-1e8": EAGER, "flat-2e8": ("native",)},
    **dict.fromkeys(("1x256", "10x256", "100x256"), WITHOUT_PUBLIC),
    **dict.fromkeys(("1000x256", "10000x256"), EAGER),
}


@pytest.mark.parametrize(
    "set_name", [pytest.param(name, marks=full if name in ("flat-1e8", "flat-2e8") else ()) for name in SIZES]
)
def bench_scaling(benchmark, plan, set_name):
    """Cost against size and tensor count."""
    names = SIZES[set_name]
    needs_memory(24 * len(names) * elements(SETS[set_name]))
    measure_own_work(benchmark, plan.shorter(), set_name, names, BASELINE)


def bench_overhead(benchmark, plan):
    """110 tensors of one element each: what is left is Python, dispatch, and the kernels' own preparations."""
    measure_own_work(benchmark, plan.shorter(), "110x1", (*EAGER, "ops"), BASELINE)


@pytest.mark.parametrize("set_name", ["small", "1000x256", "resnet34", "flat-1e4"])
def bench_sam(benchmark, plan, set_name):
    """SAM in the pair form: the popular single-file port against native, which leaves the same bits."""
    settings = Settings(k=1, alpha=1.0)
    shapes = SETS[set_name]
    work = own_work(list(PAIRS), shapes, settings)
    error = check_equal_bits(work)
    facts = {"set": set_name, "tensors": len(shapes), "elements": elements(shapes), "settings": asdict(settings)}
    interleaved = Interleaved(work, plan.block_seconds)
    measure(benchmark, interleaved, plan.rounds, **facts, perturbed_error=error)


def bench_missing(benchmark, plan):
    """One tensor without a gradient among 1,000, step after step, against none."""
    shapes = SETS["1000x256"]
    work = {"all": native_work(shapes, BASELINE), "missing": native_work(shapes, BASELINE, without=500)}
    measure(benchmark, Interleaved(work, plan.block_seconds), plan.rounds, set="1000x256")


def bench_groups(benchmark, plan):
    """Fifty groups with learning rates of their own against one: launches and time."""
    shapes = SETS["1000x256"]
    work = {"one": native_work(shapes, BASELINE), "fifty": native_work(shapes, BASELINE, groups=50)}
    launches = {}
    for which, run in work.items():
        run()
        with memory.Passes() as passes:
            run()
        launches[which] = len(passes.found)
    measure(benchmark, Interleaved(work, plan.block_seconds), plan.rounds, set="1000x256", launches=launches)
