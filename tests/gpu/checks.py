"""The table of all checks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch

from benchmarks.bench import predictions
from lookbehind_fused.kernels import BACKENDS, Flag, native
from tests.gpu import flow, passes, speed, steps, undone
from tests.gpu.machine import Absent, here

DTYPES = ("float32", "bfloat16", "float16", "float64")
OURS = ("triton", "cuda")


class Check(NamedTuple):
    """One row.

    Attributes:
        name: what is checked.
        action: what it found; raises what is wrong, or ``Absent``.
        measures: it judges no figure, or judges a speed: it runs alone, after all others.
    """

    name: str
    action: Callable[[], str]
    measures: bool = False


def checks(backends: Sequence[str]) -> list[Check]:
    """All of these backends, those first that take longest: kernels are compiled in them."""
    every = [check for backend in backends for check in of_passes(backend)]
    every += [check for backend in backends for check in of_steps(backend)]
    every.append(Check("analysis finds on the GPU what it finds on the CPU", steps.analysed))
    if "cuda" in backends:
        for tool in ("memcheck", "racecheck", "synccheck"):
            every.append(Check(f"cuda: compute-sanitizer finds nothing: {tool}", partial(passes.sanitized, tool)))
    return [*every, *of_speed(backends)]


def ours() -> list[str]:
    """The GPU backends that there are."""
    return [backend for backend in OURS if not BACKENDS[backend].why_not()]


def of_passes(backend: str) -> Iterator[Check]:
    for dtype in DTYPES:
        for names, what in ((passes.ADD_UP, "passes that add up"), (passes.OTHERS, "all other passes")):
            yield Check(
                f"{backend}: {what}, every rule, against the reference in float64: {dtype}",
                partial(passes.table, dtype, backend, names, here.chosen(1, 11, 23)),
            )
    for name, flags, what in (
        ("reduce_sq_norm", 0, "a norm"),
        ("descend_align", 0, "an adaptive alpha's sums"),
        ("descend_align", Flag.PER_TENSOR, "sums of each tensor"),
    ):
        yield Check(
            f"{backend}: the last of thousands of blocks adds up what they hand over: {what}",
            partial(passes.handed_over, backend, name, flags),
        )


def of_steps(backend: str) -> Iterator[Check]:
    for dtype in ("float32", "float64"):
        yield Check(
            f"{backend}: whole steps against the reference on the CPU in float64: {dtype}",
            partial(steps.whole_steps, backend, dtype),
        )
    for what, action in {
        "captured steps, between them eager ones, other lrs, overflows": flow.captured_steps,
        "a network's backward passes, gradients at other addresses each time": steps.backward_passes,
        "a gradient that is not finite undoes the step, without a wait": undone.undone,
        "a scaler's overflow undoes the step, also under Lookahead, without a wait": undone.scaled,
        "a model that is moved to the GPU and back between steps": steps.moved,
        "the same bits from run to run": steps.same_bits,
        "a step never waits for the device": flow.no_synchronisation,
        "a step that the caller captures replays as it ran": flow.graph_capture,
        "steps on streams of their own": flow.side_streams,
        "torch.compile around the passes": flow.compiled,
        "launches per gradient evaluation": flow.launches,
        "gradients that are lazy views, or far from the moments": steps.gradients,
    }.items():
        yield Check(f"{backend}: {what}", partial(action, backend))


def of_speed(backends: Sequence[str]) -> Iterator[Check]:
    for backend in backends:
        for elements in (25_000_000, speed.LARGE):
            name = f"{backend}: bandwidth of each pass over {elements // 10**6} M, of copy or add"
            yield Check(name, partial(speed.bandwidth, backend, elements), measures=True)
        for title in predictions.MODELS:
            name = f"{backend}: seconds of a step against the prediction, {title}"
            yield Check(name, partial(speed.against_the_prediction, backend, title), measures=True)
        name = f"{backend}: a captured step of ResNet-18, k = 2, batch 128, bfloat16"
        yield Check(name, partial(speed.captured_network, backend), measures=True)
    sets = speed.sets()
    for name in here.chosen(tuple(sets), ("small", "resnet34", "flat 2e8"), tuple(sets)):
        yield Check(f"own work, {name}", partial(speed.own_work, sets[name], backends), measures=True)


# ---- before all others -----------------------------------------------------------------------------------------------


def built(build_failed: bool) -> Iterator[Check]:
    """Native code, without which the rest says little of this library, and backends that are not there."""
    yield Check("native code is built and loads", partial(there, "native", build_failed))
    if torch.version.cuda and not here.dry:
        yield Check("cuda: its kernels are in the library", partial(there, "cuda"))
    for backend in OURS:
        if reason := BACKENDS[backend].why_not():
            yield Check(f"{backend}: everything", partial(absent, reason))


def there(backend: str, build_failed: bool = False) -> str:
    if build_failed:  # a library that loads is an older one
        raise RuntimeError("its build has failed, as said above")
    if reason := BACKENDS[backend].why_not():
        raise RuntimeError(reason)
    return native.LIBRARY.name


def absent(reason: str) -> str:
    raise Absent(reason)
