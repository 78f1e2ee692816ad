"""The pictures of the benchmark suite."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.bench.bounds import OWN_WORK, WHOLE_STEP, bandwidth, scaling
from benchmarks.bench.settings import Settings
from benchmarks.bench.shapes import TITLES
from benchmarks.methods import METHODS
from benchmarks.spread import Spread, ratios
from benchmarks.style import FAINT, HEAD, INK, STYLE, canvas

COLOURS = {
    "naive": METHODS["sgd"].colour,
    "foreach": METHODS["sam"].colour,
    "compiled": METHODS["lookbehind-adaptive"].colour,
    "native": METHODS["lookbehind"].colour,
}
LABELS = {
    "naive": "naive: torch ops by parameter, 2k",
    "foreach": "torch._foreach, k + 1",
    "compiled": "the same, compiled",
    "native": "lookbehind_fused, k + 1",
}


def draw(results: Mapping[str, Any]) -> dict[str, bytes]:
    """PNGs by file name; a picture without data is left out."""
    measurements, note = results["measurements"], _note(results["environment"])
    pictures = {}
    with rc_context(STYLE):
        for name, make in (
            ("own-work.png", _own_work),
            ("variations.png", _variations),
            ("scaling.png", _scaling),
            ("training.png", _training),
            ("memory.png", _bandwidth_and_memory),
        ):
            figure = make(measurements)
            if figure is not None:
                figure.text(0.012, 0.012, note, size=7, color=FAINT, va="bottom")
                with io.BytesIO() as file:
                    figure.savefig(file, format="png", dpi=200, facecolor="white")
                    pictures[name] = file.getvalue()
    return pictures


def _note(e: Mapping[str, Any]) -> str:
    return (
        f"{e['processor']}, {e['cores']} cores, {e['threads']} threads, torch {e['torch']}, float32, SGD with momentum "
        "and weight decay. Median of rounds in which all take turns; bars: quartiles."
    )


def _own_work(measurements: Sequence[Mapping[str, Any]]) -> Figure | None:
    """How many times as long as native the others take, set by set."""
    sets = [m for m in measurements if m["group"] == "own"]
    if not sets:
        return None
    figure = canvas(
        9,
        1.6 + 0.86 * len(sets),
        "The optimizer's own work, gradients given",
        "k = 2, SAM, static α: times as long as lookbehind_fused",
    )
    axes = figure.add_subplot()
    others = ("naive", "foreach", "compiled")
    for row, m in enumerate(reversed(sets)):
        native = 1e3 * Spread.of(m["seconds"]["native"]).median
        for place, name in enumerate(name for name in others if name in m["seconds"]):
            spread = ratios(m["seconds"][name], m["seconds"]["native"])
            _bar(axes, row + 0.27 - 0.27 * place, spread, COLOURS[name])
        if m["set"] in OWN_WORK:
            axes.plot(OWN_WORK[m["set"]], row + 0.45, "v", color=INK, markersize=5.5)
        axes.text(
            -0.012, row - 0.2, f"lookbehind_fused: {_figure(native)} ms", transform=axes.get_yaxis_transform(),
            ha="right", va="center", size=7.5, color=COLOURS["native"],
        )  # fmt: skip
    axes.set_yticks(range(len(sets)), [TITLES[m["set"]] for m in reversed(sets)])
    axes.set_ylim(-0.5, len(sets) - 0.5)
    _ratio_axis(axes, left=0.8)
    axes.axvline(1, color=COLOURS["native"], linewidth=1.8)
    _legend(figure, [*(name for name in others if any(name in m["seconds"] for m in sets)), "native"], bound=True)
    return figure


def _bar(axes: Axes, at: float, spread: Spread, colour: str) -> None:
    axes.barh(at, spread.median - 1, left=1, height=0.24, color=colour)
    axes.plot([spread.low, spread.high], [at, at], color=INK, linewidth=0.9, solid_capstyle="butt")
    text = f"{_figure(spread.median)}×"
    axes.annotate(text, (spread.high, at), (7, 0), textcoords="offset points", va="center", size=8, zorder=7).set_bbox(
        {"facecolor": "white", "edgecolor": "none", "pad": 1}
    )


def _ratio_axis(axes: Axes, left: float) -> None:
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(left, low), high * 1.25)
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)


def _variations(measurements: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Times of a step for other k, ASAM and adaptive alpha."""
    chosen = [m for m in measurements if m["group"] in ("own", "variations") and m["set"] in ("small", "resnet34")]
    if not any(m["group"] == "variations" for m in chosen):
        return None
    figure = canvas(10, 4.4, "Other settings of the step", "The optimizer's own work, gradients given")
    names = [name for name in COLOURS if any(name in m["seconds"] for m in chosen)]
    for column, set_name in enumerate(("small", "resnet34")):
        axes = figure.add_subplot(1, 2, column + 1)
        axes.set_title(TITLES[set_name], **HEAD)
        rows = sorted((m for m in chosen if m["set"] == set_name), key=_order, reverse=True)
        for row, m in enumerate(rows):
            spreads = {name: Spread.of([1e3 * s for s in m["seconds"][name]]) for name in names if name in m["seconds"]}
            medians = [spread.median for spread in spreads.values()]
            axes.plot([min(medians), max(medians)], [row, row], color="#DDDDDD", linewidth=2.5, zorder=1)
            for name, spread in spreads.items():
                axes.plot([spread.low, spread.high], [row, row], color=COLOURS[name], linewidth=1.2, zorder=2)
                axes.plot(spread.median, row, "o", color=COLOURS[name], markersize=6.5, zorder=3)
        axes.set_yticks(range(len(rows)), [_settings(m) for m in rows])
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_xlabel("milliseconds")
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    _legend(figure, names)
    return figure


def _order(m: Mapping[str, Any]) -> tuple[Any, ...]:
    s = Settings(**m["settings"])
    return s.adaptive, s.asam, s.k


def _settings(m: Mapping[str, Any]) -> str:
    s = Settings(**m["settings"])
    return f"{'ASAM' if s.asam else 'SAM'}, {'adaptive' if s.adaptive else 'static'} α, k = {s.k}"


def _scaling(measurements: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Time of a step against size and against the number of tensors."""
    if not any(m["group"] == "scaling" for m in measurements):
        return None
    figure = canvas(10, 4.6, "Cost against size and number of tensors", "Own work, k = 2, SAM, static α")
    names = []
    panels = (("elements", "One tensor", "parameters"), ("tensors", "Tensors of 256 parameters", "tensors"))
    for column, (axis, title, label) in enumerate(panels):
        axes = figure.add_subplot(1, 2, column + 1)
        axes.set_title(title, **HEAD)
        for name in COLOURS:
            points = scaling(measurements, axis, name)
            if points:
                names.append(name)
                x, y = zip(*points, strict=True)
                axes.plot(x, 1e3 * np.array(y), "o-", color=COLOURS[name], markersize=4.5, linewidth=1.8)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_count))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_major_locator(FixedLocator([10**n for n in range(9)]))
        for side in (axes.xaxis, axes.yaxis):
            side.set_minor_locator(NullLocator())
            side.set_minor_formatter(NullFormatter())
        axes.set_xlabel(label)
        axes.set_ylabel("milliseconds a step" if column == 0 else "")
    _legend(figure, [name for name in COLOURS if name in names])
    return figure


def _count(value: float, _: int) -> str:
    for unit, letter in ((1e6, " M"), (1e3, " k")):
        if value >= unit:
            return f"{value / unit:g}{letter}"
    return f"{value:g}"


def _training(measurements: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Whole steps: naive over native."""
    steps = [m for m in measurements if m["group"] == "training"]
    if not steps:
        return None
    titles = {"digits": "digits", "fashion-mnist": "Fashion-MNIST"}
    figure = canvas(
        9, 1.5 + 0.4 * len(steps), "Whole training steps on real images",
        "Forward, backward and optimizer of a small residual network: naive (2k) over lookbehind_fused (k + 1)",
        legend=False,
    )  # fmt: skip
    axes = figure.add_subplot()
    rows = list(reversed(steps))
    for row, m in enumerate(rows):
        spread = ratios(m["seconds"]["naive"], m["seconds"]["native"])
        axes.barh(row, spread.median, height=0.62, color=COLOURS["native"])
        axes.plot([spread.low, spread.high], [row, row], color=INK, linewidth=0.9, solid_capstyle="butt")
        axes.annotate(
            f"{spread.median:.2f}×", (spread.high, row), (4, 0), textcoords="offset points", va="center", size=8.5
        )
        axes.plot([WHOLE_STEP[m["k"]]] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=1.6)
        saved = 2 * m["k"] / (m["k"] + 1)
        axes.plot([saved] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=1.2, linestyle=(0, (1.5, 1.5)))
    axes.set_yticks(range(len(rows)), [f"{titles[m['images']]}, k = {m['k']}" for m in rows])
    axes.set_xlim(0, max(2.2, axes.get_xlim()[1]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlabel("solid: the bound; dashed: 2k / (k + 1), what the gradients alone save", size=8)
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
    return figure


def _bandwidth_and_memory(measurements: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Bandwidth against copy and add; copies of the model held and at the peak."""
    speeds = [m for m in measurements if m["group"] == "bandwidth"]
    held = [m for m in measurements if m["group"] == "memory" and Settings(**m["settings"]) == Settings()]
    if not speeds or not held:
        return None
    figure = canvas(10, 3.9, "Bandwidth and memory", "k = 2, SAM, static α", legend=False)
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    left.set_title("Achieved bandwidth, GB/s", **HEAD)
    kinds = {"copy": ("copy_", "#BFBFBF"), "add": ("add(out=)", "#7F7F7F"), "native": ("a step", COLOURS["native"])}
    ticks, labels = [], []
    for group, m in enumerate(speeds):
        for place, (name, values) in enumerate((name, bandwidth(m)[name]) for name in kinds):
            spread, at = Spread.of([v / 1e9 for v in values]), 4 * group + place
            left.bar(at, spread.median, width=0.86, color=kinds[name][1])
            left.plot([at, at], [spread.low, spread.high], color=INK, linewidth=0.9)
            left.annotate(
                f"{spread.median:.0f}", (at, 0), (0, 5), textcoords="offset points", ha="center", color="white",
                weight="bold",
            )  # fmt: skip
            ticks.append(at)
            labels.append(kinds[name][0])
        left.text(4 * group + 1, -0.15, _count(round(m["elements"], -5), 0) + " parameters", ha="center", va="top",
                  transform=left.get_xaxis_transform(), weight="bold", size=8.5)  # fmt: skip
    left.set_xticks(ticks, labels)
    left.tick_params(axis="x", length=0)

    right.set_title("Memory beside weights and gradients", **HEAD)
    copies = held[0]["copies"]
    names = list(reversed([name for name in COLOURS if name in copies]))
    for row, name in enumerate(names):
        state, base, peak = (copies[name][key] for key in ("state", "base", "peak"))
        right.barh(row, peak, height=0.62, color=COLOURS[name], alpha=0.25)
        right.barh(row, state, height=0.62, color=COLOURS[name])
        right.barh(row, base, height=0.62, color="none", edgecolor="white", hatch="////", linewidth=0)
        right.annotate(
            f"{state:.1f}" + (f", peak {peak:.1f}" if peak > state + 0.05 else ""), (max(state, peak), row), (4, 0),
            textcoords="offset points", va="center", size=8,
        )  # fmt: skip
    right.set_yticks(range(len(names)), names)
    right.set_xlim(0, 1.25 * max(copy["peak"] for copy in copies.values()))
    right.set_xlabel("copies of the model; hatched: momentum; pale: peak within a step", size=8)
    right.grid(True, axis="x")
    right.grid(False, axis="y")
    right.tick_params(axis="y", length=0)
    return figure


def _legend(figure: Figure, names: Sequence[str], bound: bool = False) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="s", linestyle="", markersize=8, color=COLOURS[name]) for name in names]
    labels = [LABELS[name] for name in names]
    if bound:
        handles.append(Line2D([], [], marker="v", linestyle="", markersize=5.5, color=INK))
        labels.append("bound of naive")
    figure.legend(
        handles, labels, loc="lower center", ncols=len(labels),
        bbox_to_anchor=(0.5, 0.22 / figure.get_figheight()), frameon=False,
        fontsize=8, handletextpad=0.3, columnspacing=1.4,
    )  # fmt: skip


def _figure(value: float) -> str:
    """Three digits."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
