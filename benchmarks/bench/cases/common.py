"""What the cases share."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.bench.contenders import CONTENDERS
from benchmarks.bench.own_work import check_equal_work, own_work
from benchmarks.bench.settings import Settings
from benchmarks.bench.shapes import SETS, elements
from benchmarks.bench.timing import Interleaved

full = pytest.mark.full  # not with --quick
EVERYONE = tuple(CONTENDERS)
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


def needs_memory(wanted: int) -> None:
    """Leave the measurement out where the machine has not this many bytes to spare."""
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else ():
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    if wanted > 0.9 * available:
        pytest.skip(f"needs {wanted / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available")
