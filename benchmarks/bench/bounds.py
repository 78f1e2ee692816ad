"""DESIGN's table of bounds (section 7), each with what was measured and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.bench.host import BEFORE, MOST
from benchmarks.bench.settings import Settings
from benchmarks.bench.shapes import TITLES
from benchmarks.bench.timing import exponent
from benchmarks.spread import Spread, ratios

HOLDS, FAILS, MISSING = "holds", "FAILS", "not measured"
Measurements = list[dict[str, Any]]


@dataclass(frozen=True)
class Bound:
    """A line of the table."""

    what: str
    bound: str
    measured: str = ""
    verdict: str = MISSING


COPIES = [(Settings(k=1), 1), (Settings(), 2), (Settings(k=5, alpha="adaptive"), 3)]
"""Float32 copies of the model beside the base optimizer's state."""
OWN_WORK = {"small": 15, "1000x256": 28, "resnet34": 3.7}
"""How many times as long as native others take, at least: naive and the public code."""
SAM = {"small": 8, "1000x256": 20, "resnet34": 2.5, "flat-1e4": 1.5}
"""The same of the single-file port and the pair."""
COMPILED = 1.3
MISSING_GRADIENT = 1.15
CALLS = {1: 40, 50: 60}
"""Of own Python functions in a warm step, by the number of groups."""
WHOLE_STEP = {2: 1.3, 5: 1.6, 10: 1.75}
"""naive / native, by k."""
LAUNCHES = {("1x256", 1), ("10000x256", 1), ("1000x256", 50)}
"""Sets of tensors and numbers of groups that launches are counted for."""


def check(measurements: Measurements) -> list[Bound]:
    """All lines; what was not measured says so."""
    table = [_evaluations(measurements), _launches(measurements), _groups(measurements)]
    table += [_calls(measurements, groups, most) for groups, most in CALLS.items()]
    table.append(_traffic(measurements))
    own = {m["set"]: m for m in measurements if m["group"] == "own"}
    for contender, title in (("naive", "naive"), ("public", "public code")):
        for set_name, least in OWN_WORK.items():
            what = f"own work, {title} / native: {TITLES[set_name]}"
            table.append(_ratio(what, least, own.get(set_name), contender))
    for set_name in OWN_WORK:
        what = f"own work, compiled / native: {TITLES[set_name]}"
        table.append(_ratio(what, COMPILED, own.get(set_name), "compiled"))
    table.append(_foreach(measurements))
    pairs = {m["set"]: m for m in measurements if m["group"] == "sam"}
    for set_name, least in SAM.items():
        table.append(_sam(f"as SAM, single-file port / native: {TITLES[set_name]}", least, pairs.get(set_name)))
    table.append(_missing(measurements))
    bandwidth = {m["set"]: m for m in measurements if m["group"] == "bandwidth"}
    for set_name, size in (("resnet34", "21 M"), ("flat-2e8", "200 M")):
        table.append(_bandwidth(f"bandwidth at {size} parameters / best of copy_ and add", bandwidth.get(set_name)))
    for images in ("digits", "fashion-mnist"):
        trained = {m["k"]: m for m in measurements if m["group"] == "training" and m["images"] == images}
        for k, least in WHOLE_STEP.items():
            table.append(_ratio(f"whole step, naive / native: k = {k}, {images}", least, trained.get(k), "naive"))
    table += [_memory(measurements, settings, copies) for settings, copies in COPIES]
    table += [_linear(measurements, "elements", 1e7), _linear(measurements, "tensors", 100)]
    table.append(_overhead(measurements))
    table += [_host(measurements, tensors, most) for tensors, most in MOST.items()]
    return table


def bytes_per_parameter(settings: Settings) -> int:
    """What DESIGN's section 3 allows a float32 step of SGD with momentum: fast_1 is not kept but derived from the slow
    weights and the momentum, unless an adaptive alpha needs it after inner step 2.
    """
    k = settings.k
    reductions = (2 if settings.asam else 1) * k
    between = 7 * (k - 1)
    last = 5 if k == 1 else 6
    if settings.adaptive:
        last = (6 if k == 2 else 7) + 3
    keeps_first = k == 1 or (settings.adaptive and k > 2)
    unkept = 0 if keeps_first else 2 if k == 2 else 1
    return 4 * (reductions + 4 + between + last - unkept)


def bandwidth(m: Mapping[str, Any]) -> dict[str, list[float]]:
    """Bytes a second of each round, by contender."""
    moved = {"native": bytes_per_parameter(Settings(**m["settings"])), "copy": 8, "add": 12}
    return {name: [moved[name] * m["elements"] / s for s in seconds] for name, seconds in m["seconds"].items()}


def _verdict(holds: bool) -> str:
    return HOLDS if holds else FAILS


def _ratio(what: str, least: float, m: Mapping[str, Any] | None, above: str) -> Bound:
    bound = f"at least {least:g}"
    if m is None or above not in m["seconds"]:
        return Bound(what, bound)
    spread = ratios(m["seconds"][above], m["seconds"]["native"])
    return Bound(what, bound, spread.show(), _verdict(spread.median >= least))


def _bandwidth(what: str, m: Mapping[str, Any] | None) -> Bound:
    if m is None:
        return Bound(what, "at least 0.8")
    found = bandwidth(m)
    best = [max(pair) for pair in zip(found["copy"], found["add"], strict=True)]
    spread = ratios(found["native"], best)
    absolute = f", {Spread.of(found['native']).median / 1e9:.1f} GB/s"
    return Bound(what, "at least 0.8", spread.show() + absolute, _verdict(spread.median >= 0.8))


def _evaluations(measurements: Measurements) -> Bound:
    what, bound = "gradient evaluations a step", "k + 1, same trajectory as the 2k form"
    for m in measurements:
        if m["group"] == "evaluations":
            found = m["evaluations"]["k + 1"]
            text = f"{found:g} for k = {m['k']}, largest difference {m['difference']:.1g}"
            return Bound(what, bound, text, _verdict(found == m["k"] + 1 and m["difference"] <= 1e-6))
    return Bound(what, bound)


def _launches(measurements: Measurements) -> Bound:
    what, bound = "launches per gradient evaluation and bucket", "at most 2, for any number of tensors and groups"
    counts = [n for m in measurements if m["group"] == "launches" for each in m["launches"].values() for n in each]
    if {(m["set"], m.get("groups", 1)) for m in measurements if m["group"] == "launches"} != LAUNCHES:
        return Bound(what, bound)
    return Bound(what, bound, f"{min(counts)} to {max(counts)}", _verdict(min(counts) > 0 and max(counts) <= 2))


def _groups(measurements: Measurements) -> Bound:
    what, bound = "fifty groups, their own lr, against one: 1,000 tensors of 256", "as many launches a step"
    for m in measurements:
        if m["group"] == "groups":
            one, fifty = m["launches"]["one"], m["launches"]["fifty"]
            time = ratios(m["seconds"]["fifty"], m["seconds"]["one"]).show()
            return Bound(what, bound, f"{fifty} and {one}; {time} times the time", _verdict(fifty == one))
    return Bound(what, bound)


def _calls(measurements: Measurements, groups: int, most: int) -> Bound:
    what = f"own Python calls in a warm step(closure), {groups} group{'s' * (groups > 1)}, k = 2"
    bound = f"at most {most}"
    for m in measurements:
        if m["group"] == "calls" and m["groups"] == groups:
            calls = dict(m["calls"])
            found = calls.pop("step(closure)")
            others = ", ".join(f"{form} {count}" for form, count in calls.items())
            return Bound(what, bound, f"{found}; {others}", _verdict(found <= most))
    return Bound(what, bound)


def _foreach(measurements: Measurements) -> Bound:
    """Over everything that both were measured in: own work, other settings, other sizes."""
    what, bound = "own work, foreach / native: wherever native is slowest", "at least 1"
    timed = [m for m in measurements if {"foreach", "native"} <= m.get("seconds", {}).keys() and "elements" in m]
    if "flat-1e4" not in {m["set"] for m in timed}:  # where native leads by the least
        return Bound(what, bound)
    found = [(ratios(m["seconds"]["foreach"], m["seconds"]["native"]), m["case"]) for m in timed]
    spread, case = min(found, key=lambda entry: entry[0].median)
    return Bound(what, bound, f"{spread.show()} at {case}, of {len(found)}", _verdict(spread.median >= 1))


def _sam(what: str, least: float, m: Mapping[str, Any] | None) -> Bound:
    bound = f"at least {least:g}"
    if m is None:
        return Bound(what, bound)
    spread = ratios(m["seconds"]["port"], m["seconds"]["pair"])
    return Bound(what, bound, f"{spread.show()}, weights bit-equal", _verdict(spread.median >= least))


def _missing(measurements: Measurements) -> Bound:
    what, bound = "time with one gradient of 1,000 missing / none", f"at most {MISSING_GRADIENT:g}"
    for m in measurements:
        if m["group"] == "missing":
            spread = ratios(m["seconds"]["missing"], m["seconds"]["all"])
            return Bound(what, bound, spread.show(), _verdict(spread.median <= MISSING_GRADIENT))
    return Bound(what, bound)


def _traffic(measurements: Measurements) -> Bound:
    what, bound = "bytes per parameter and step", "DESIGN section 3: 68 for k = 2, static"
    steps = [
        (traffic(m), bytes_per_parameter(Settings(**m["settings"])), m) for m in measurements if m["group"] == "traffic"
    ]
    if not steps:
        return Bound(what, bound)
    above = [f"{found:g} instead of {allowed} ({m['case']})" for found, allowed, m in steps if found > allowed]
    baseline = [found for found, _, m in steps if Settings(**m["settings"]) == Settings()] or [float("nan")]
    text = "; ".join(above) or f"{baseline[0]:g} for k = 2, static; {len(steps)} settings, none above it"
    return Bound(what, bound, text, _verdict(not above))


def traffic(m: Mapping[str, Any]) -> float:
    """Bytes per parameter of a step.

    Poisoning shows which arrays a pass reads, not how often: one that finds the norm itself before it ascends reads the
    gradient (ASAM: and the weights) once more than it shows.
    """
    settings, names = Settings(**m["settings"]), [name for name, _ in m["passes"]]
    ascents = sum(name in ("ascend", "descend_ascend") for name in names)
    unseen = ascents - names.count("reduce_sq_norm")
    return sum(moved for _, moved in m["passes"]) + unseen * (8 if settings.asam else 4)


def _memory(measurements: Measurements, settings: Settings, allowed: int) -> Bound:
    alpha = "adaptive" if settings.adaptive else "static"
    what, bound = f"copies of the model beside the base's state: k = {settings.k}, {alpha}", f"at most {allowed}"
    for m in measurements:
        if m["group"] == "memory" and Settings(**m["settings"]) == settings:
            native = m["copies"]["native"]
            extra, highest = native["state"] - native["base"], native["peak"] - native["base"]
            verdict = _verdict(max(extra, highest) <= allowed + 0.02)
            return Bound(what, bound, f"{extra:.2f}, at the peak of a step {highest:.2f}", verdict)
    return Bound(what, bound)


def _linear(measurements: Measurements, axis: str, start: float) -> Bound:
    what = {"elements": "cost against size", "tensors": "cost against tensor count"}[axis]
    bound = f"linear: exponent at most 1.1 from {start:,.0f} {axis}"
    points = [(size, seconds) for size, seconds in scaling(measurements, axis, "native") if size >= start]
    if len(points) < 2:
        return Bound(what, bound)
    b = exponent(*zip(*points, strict=True))
    text = f"{b:.2f}, {len(points)} sizes up to {points[-1][0]:,}"
    return Bound(what, bound, text, _verdict(b <= 1.1))


def scaling(measurements: Measurements, axis: str, contender: str) -> list[tuple[int, float]]:
    """(elements or tensors, median seconds), ascending; one flat tensor, or tensors of 256."""
    kind: Callable[[str], bool] = (
        (lambda name: name.startswith("flat-")) if axis == "elements" else (lambda name: name.endswith("x256"))
    )
    return sorted(
        (m[axis], Spread.of(m["seconds"][contender]).median)
        for m in measurements
        if m["group"] == "scaling" and kind(m["set"]) and contender in m["seconds"]
    )


def _host(measurements: Measurements, tensors: int, most: float) -> Bound:
    """The launches themselves are not in it (``host``)."""
    what = f"the host's share of a step on a GPU, launches that do nothing, {tensors:,} tensors, k = 2"
    least, largest = (f"{1e6 * seconds:.0f}" for seconds in BEFORE[tensors])
    bound = f"at most {1e6 * most:.0f} µs; once {least} to {largest}"
    for m in measurements:
        if m["group"] == "host" and m["tensors"] == tensors:
            spread = Spread.of([1e6 * s for s in m["seconds"]["native"]])
            return Bound(what, bound, spread.show(" µs", 0), _verdict(spread.median <= 1e6 * most))
    return Bound(what, bound)


def _overhead(measurements: Measurements) -> Bound:
    what, bound = "Python and dispatch of a whole step, 110 tensors, k = 2", "under 150 microseconds"
    for m in measurements:
        if m["group"] == "overhead":
            spread = Spread.of([1e6 * s for s in m["seconds"]["native"]])
            measured = spread.show(" µs", 0)
            if "ops" in m["seconds"]:
                measured += f"; {1e6 * Spread.of(m['seconds']['ops']).median:.0f} of it the ops and gradients alone"
            return Bound(what, bound, measured, _verdict(spread.median < 150))
    return Bound(what, bound)
