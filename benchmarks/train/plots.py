"""The picture of a run: loss, test accuracy and alpha against steps."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from benchmarks.checkpoint import Checkpoint, Record
from benchmarks.files import replacing
from benchmarks.methods import METHODS, label
from benchmarks.style import HEAD, STYLE

COLOURS = {name: method.colour for name, method in METHODS.items()}


def draw(path: Path, checkpoint: Checkpoint) -> None:
    """Writes the picture of a run as PNG."""
    with rc_context(STYLE):
        # in the palette's order, so that the methods of interest lie on top
        records = {method: checkpoint.records[method] for method in COLOURS if method in checkpoint.records}
        figure = _figure(checkpoint.settings, records)
        with replacing(path) as file:
            figure.savefig(file, format="png", dpi=200, facecolor="white")


def _figure(settings: dict[str, Any], records: dict[str, Record]) -> Figure:
    figure = Figure(figsize=(10, 5.6), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08, rect=(0, 0, 1, 0.865))
    figure.text(0.012, 0.975, _title(settings), size=13, weight="bold", va="top")
    figure.text(0.012, 0.918, _subtitle(settings), size=9, color="#5A5A5A", va="top")

    # SAM's alpha is 1 by definition, and SGD has none.
    lookbehind = {method: record for method, record in records.items() if method.startswith("lookbehind")}
    grid = figure.add_gridspec(2, 2, width_ratios=(1.25, 1))
    _draw_loss(figure.add_subplot(grid[:, 0]), settings, records)
    _draw_accuracy(figure.add_subplot(grid[0, 1] if lookbehind else grid[:, 1]), records)
    if lookbehind:
        _draw_alpha(figure.add_subplot(grid[1, 1]), lookbehind)

    steps = max(len(record.loss) for record in records.values())
    for axes in figure.axes:
        axes.set_xlim(0, 1.01 * steps)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.tick_params(axis="y", which="minor", length=0)
        if axes.get_subplotspec().is_last_row():
            axes.set_xlabel("outer steps")
        else:
            axes.tick_params(labelbottom=False)
    return figure


def _draw_loss(axes: Axes, settings: dict[str, Any], records: dict[str, Record]) -> None:
    axes.set_title("Training loss", **HEAD)
    axes.set_ylabel("cross entropy (nats)")
    for method, record in records.items():
        loss = np.maximum(record.loss, 1e-12)  # every value has a logarithm; NaN stays NaN, a gap in the line
        _draw(axes, loss, np.exp(_smooth(np.log(loss))), COLOURS[method], _label(method, settings))
    smoothed = np.concatenate([line.get_ydata() for line in axes.get_lines()[1::2]])
    smoothed = smoothed[np.isfinite(smoothed)]
    if smoothed.size and smoothed.max() > 10 * smoothed.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    legend = axes.legend(frameon=False, loc="upper right", handlelength=1.4, labelspacing=0.6)
    for line in legend.get_lines():
        line.set_linewidth(3)


def _draw_accuracy(axes: Axes, records: dict[str, Record]) -> None:
    """One value an epoch; the last one is marked and written out."""
    axes.set_title("Test accuracy", **HEAD)
    axes.set_ylabel("correct (%)")
    for method, record in records.items():
        accuracy = 100 * np.asarray(record.accuracy)
        steps = record.steps_per_epoch * np.arange(1, len(accuracy) + 1)
        axes.plot(steps, accuracy, color=COLOURS[method], linewidth=1.5, alpha=0.9)
        axes.plot(steps[-1:], accuracy[-1:], "o", color=COLOURS[method], markersize=4.5, clip_on=False, zorder=5)
    last = {method: 100 * record.accuracy[-1] for method, record in records.items()}
    low, high = axes.get_ylim()
    heights = _spread(np.array(list(last.values())), gap=0.08 * (high - low))
    for (method, value), height in zip(last.items(), heights, strict=True):
        axes.annotate(
            f"{value:.1f}",
            (1.015, height),
            xycoords=("axes fraction", "data"),
            color=COLOURS[method],
            size=8.5,
            weight="bold",
            va="center",
            annotation_clip=False,
        )


def _draw_alpha(axes: Axes, records: dict[str, Record]) -> None:
    axes.set_title("Slow step size", **HEAD)
    axes.set_ylabel("α")
    axes.margins(y=0.12)
    for method, record in records.items():
        alpha = np.asarray(record.alpha)
        _draw(axes, alpha, _smooth(alpha), COLOURS[method])


def _draw(axes: Axes, values: np.ndarray, smoothed: np.ndarray, colour: str, label: str | None = None) -> None:
    """Each step's value as a veil, and the smoothed line over it."""
    steps = np.arange(1, len(values) + 1)
    axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.22)
    axes.plot(steps, smoothed, color=colour, linewidth=1.8, label=label)


def _spread(values: np.ndarray, gap: float) -> np.ndarray:
    """Heights for labels of `values`, in their order: close ones pushed apart, evenly up and down, to `gap`."""
    order = np.argsort(values, kind="stable")
    heights = values[order].astype(float)
    for _ in range(100):
        overlap = np.maximum(0, gap - np.diff(heights)) / 2
        heights[1:] += overlap
        heights[:-1] -= overlap
    return heights[np.argsort(order, kind="stable")]


def _smooth(values: np.ndarray) -> np.ndarray:
    """A centred Gaussian mean whose width follows the length of the run; at the ends it uses what is there."""
    radius = max(1, len(values) // 20)
    kernel = np.exp(-0.5 * np.linspace(-2.5, 2.5, 2 * radius + 1) ** 2)
    weight = np.convolve(np.ones(len(values)), kernel)[radius:-radius]
    return np.convolve(values, kernel)[radius:-radius] / weight


def _label(method: str, settings: dict[str, Any]) -> str:
    alpha = f", α = {settings['alpha']:g}" if "alpha" in METHODS[method].uses else ""
    return label(method, settings["asam"]) + alpha


def _title(settings: dict[str, Any]) -> str:
    names = {"digits": "handwritten digits", "fashion-mnist": "Fashion-MNIST", "cifar10": "CIFAR-10"}
    return f"A small residual network on {names[settings['data']]}"


def _subtitle(settings: dict[str, Any]) -> str:
    parts = [
        f"k = {settings['k']}",
        f"ρ = {settings['rho']:g}",
        f"SGD with learning rate {settings['lr']:g}, momentum {settings['momentum']:g}",
        f"batches of {settings['batch_size']}",
        f"{settings['epochs']} epochs",
        f"seed {settings['seed']}",
    ]
    if settings["label_noise"]:
        parts.insert(0, f"{settings['label_noise']:.0%} of the training labels wrong")
    return "   ·   ".join(parts)
