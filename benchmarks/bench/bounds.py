"""DESIGN's table of bounds (section 7), each with what was measured and a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.bench.settings import Settings
from benchmarks.bench.shapes import TITLES
from benchmarks.bench.timing import Spread, exponent, ratios

HOLDS, FAILS, MISSING = "holds", "FAILS", "not measured"
Measurements = list[dict[str, Any]]


@dataclass(frozen=True)
class Bound:
    """A line of the table."""

    what: str
    bound: str
    measured: str = ""
    verdict: str = MISSING


def check(measurements: Measurements) -> list[Bound]:
    """All lines; what was not measured says so."""
    table = [_evaluations(measurements), _launches(measurements), _traffic(measurements)]
    own = {m["set"]: m for m in measurements if m["group"] == "own"}
    for set_name, least in (("small", 25), ("1000x256", 60), ("resnet34", 3.3)):
        table.append(_ratio(f"own work, naive / native: {TITLES[set_name]}", least, own.get(set_name), "naive"))
    for set_name in ("small", "1000x256", "resnet34"):
        table.append(_ratio(f"own work, compiled / native: {TITLES[set_name]}", 1.3, own.get(set_name), "compiled"))
    bandwidth = {m["set"]: m for m in measurements if m["group"] == "bandwidth"}
    for set_name, size in (("resnet34", "21 M"), ("flat-2e8", "200 M")):
        table.append(_bandwidth(f"bandwidth at {size} parameters / best of copy_ and add", bandwidth.get(set_name)))
    for images in ("digits", "fashion-mnist"):
        trained = {m["k"]: m for m in measurements if m["group"] == "training" and m["images"] == images}
        for k, least in ((2, 1.3), (5, 1.6), (10, 1.75)):
            table.append(_ratio(f"whole step, naive / native: k = {k}, {images}", least, trained.get(k), "naive"))
    table.append(_memory(measurements))
    table += [_linear(measurements, "elements", 1e7), _linear(measurements, "tensors", 100)]
    table.append(_overhead(measurements))
    return table


def bytes_per_parameter(settings: Settings, dtype_size: int = 4) -> int:
    """What DESIGN's section 3 allows a step, for SGD with momentum."""
    k = settings.k
    reductions = (2 if settings.asam else 1) * k
    between = 7 * (k - 1)
    last = 5 if k == 1 else 6
    if settings.adaptive:
        last = (6 if k == 2 else 7) + 3
    return dtype_size * (reductions + 4 + between + last)


def bytes_moved(settings: Settings) -> int:
    """What the passes move in a float32 step of SGD with momentum: less than they may, as fast_1 is not kept but
    derived from the slow weights and the momentum, unless an adaptive alpha needs it after inner step 2.
    """
    if settings.k == 1 or (settings.adaptive and settings.k > 2):
        return bytes_per_parameter(settings)
    return bytes_per_parameter(settings) - (8 if settings.k == 2 else 4)


def bandwidth(m: Mapping[str, Any]) -> dict[str, list[float]]:
    """Bytes a second of each round, by contender."""
    moved = {"native": bytes_moved(Settings(**m["settings"])), "copy": 8, "add": 12}
    return {name: [moved[name] * m["elements"] / s for s in seconds] for name, seconds in m["seconds"].items()}


def _verdict(holds: bool) -> str:
    return HOLDS if holds else FAILS


def _show(spread: Spread, unit: str = "", digits: int = 2) -> str:
    return f"{spread.median:.{digits}f}{unit} ({spread.low:.{digits}f} to {spread.high:.{digits}f})"


def _ratio(what: str, least: float, m: Mapping[str, Any] | None, above: str) -> Bound:
    bound = f"at least {least:g}"
    if m is None or above not in m["seconds"]:
        return Bound(what, bound)
    spread = ratios(m["seconds"][above], m["seconds"]["native"])
    return Bound(what, bound, _show(spread), _verdict(spread.median >= least))


def _bandwidth(what: str, m: Mapping[str, Any] | None) -> Bound:
    if m is None:
        return Bound(what, "at least 0.8")
    found = bandwidth(m)
    best = [max(pair) for pair in zip(found["copy"], found["add"], strict=True)]
    spread = ratios(found["native"], best)
    absolute = f", {Spread.of(found['native']).median / 1e9:.1f} GB/s"
    return Bound(what, "at least 0.8", _show(spread) + absolute, _verdict(spread.median >= 0.8))


def _evaluations(measurements: Measurements) -> Bound:
    what, bound = "gradient evaluations a step", "k + 1, same trajectory as the 2k form"
    for m in measurements:
        if m["group"] == "evaluations":
            found = m["evaluations"]["k + 1"]
            text = f"{found:g} for k = {m['k']}, largest difference {m['difference']:.1g}"
            return Bound(what, bound, text, _verdict(found == m["k"] + 1 and m["difference"] <= 1e-6))
    return Bound(what, bound)


def _launches(measurements: Measurements) -> Bound:
    what, bound = "launches per gradient evaluation and bucket", "at most 2, for 1 tensor or 10,000"
    counts = [n for m in measurements if m["group"] == "launches" for each in m["launches"].values() for n in each]
    sets = {m["set"] for m in measurements if m["group"] == "launches"}
    if sets != {"1x256", "10000x256"}:
        return Bound(what, bound)
    return Bound(what, bound, f"{min(counts)} to {max(counts)}", _verdict(min(counts) > 0 and max(counts) <= 2))


def _traffic(measurements: Measurements) -> Bound:
    what, bound = "bytes per parameter and step", "DESIGN section 3: 76 for k = 2, static"
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


def allowed_copies(settings: Settings) -> int:
    """Float32 copies of the model that DESIGN's section 3 allows beside the base optimizer's state."""
    return 1 + (settings.k >= 2) + (settings.adaptive and settings.k >= 3)


def _memory(measurements: Measurements) -> Bound:
    what, bound = "extra memory, in copies of the model", "slow, fast; first for adaptive and k >= 3"
    found = [m for m in measurements if m["group"] == "memory"]
    if not found:
        return Bound(what, bound)
    texts, holds = [], True
    for m in found:
        settings, native = Settings(**m["settings"]), m["copies"]["native"]
        extra, allowed = native["state"] - native["base"], allowed_copies(settings)
        highest = native["peak"] - native["base"]
        holds = holds and max(extra, highest) <= allowed + 0.02
        alpha = "adaptive" if settings.adaptive else "static"
        texts.append(f"{extra:.2f} of {allowed} (peak {highest:.2f}) for k = {settings.k} {alpha}")
    return Bound(what, bound, "; ".join(texts), _verdict(holds))


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


def _overhead(measurements: Measurements) -> Bound:
    what, bound = "Python and dispatch of a whole step, 110 tensors, k = 2", "under 150 microseconds"
    for m in measurements:
        if m["group"] == "overhead":
            spread = Spread.of([1e6 * s for s in m["seconds"]["native"]])
            measured = _show(spread, " µs", 0)
            if "ops" in m["seconds"]:
                measured += f"; {1e6 * Spread.of(m['seconds']['ops']).median:.0f} of it the ops and gradients alone"
            return Bound(what, bound, measured, _verdict(spread.median < 150))
    return Bound(what, bound)


# ---- tables ----------------------------------------------------------------------------------------------------------


def as_text(table: Iterable[Bound]) -> str:
    """For a terminal."""
    rows = [("bound", "wanted", "measured: median (quartiles)", "verdict")]
    rows += [(b.what, b.bound, b.measured, b.verdict) for b in table]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def as_markdown(table: Iterable[Bound], measurements: Measurements, environment: Mapping[str, Any]) -> bytes:
    """The bounds, and below them what the optimizer's own work took."""
    e = environment
    policy = e["OMP_WAIT_POLICY"] or "not set"
    lines = [
        "# Benchmark results",
        "",
        f"{e['processor']}, {e['cores']} cores ({e['instructions']}), {e['threads']} threads, "
        f"OMP_WAIT_POLICY {policy}, load average {e['load_before']} before the run, torch {e['torch']}, "
        f"Python {e['python']}, {e['system']}; "
        f"float32, SGD with momentum and weight decay. Made by `{e['command']}` in {e['minutes']} minutes. Ratios are "
        "taken within each round of all contenders; median, and in brackets the quartiles.",
        "",
        *_grid(("bound", "wanted", "measured", "verdict"), [(b.what, b.bound, b.measured, b.verdict) for b in table]),
        "",
        "## The optimizer's own work, milliseconds a step",
        "",
    ]
    names = ("naive", "foreach", "compiled", "native")
    rows = []
    for m in measurements:
        if m["group"] in ("own", "variations"):
            s = Settings(**m["settings"])
            what = f"{'ASAM' if s.asam else 'SAM'}, {'adaptive' if s.adaptive else 'static'}, k = {s.k}"
            times = [_milliseconds(m["seconds"].get(name)) for name in names]
            rows.append((TITLES.get(m["set"], m["set"]), what, *times))
    return "\n".join([*lines, *_grid(("tensors", "settings", *names), rows), ""]).encode()


def _milliseconds(seconds: list[float] | None) -> str:
    return f"{1e3 * Spread.of(seconds).median:.4g}" if seconds else ""


def _grid(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (header, ("---",) * len(header), *rows)]
