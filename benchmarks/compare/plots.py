"""The pictures of the comparison."""

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.compare.claims import Measured
from benchmarks.compare.report import Report
from benchmarks.methods import METHODS
from benchmarks.style import FAINT, HEAD, INK, STYLE, canvas

SHOWN = {
    "SAM": ("sgd", "sgd-longer", "sam", "multistep", "lookahead-sam", "lookbehind", "lookbehind-adaptive", "sam-free"),
    "ASAM": ("sgd", "asam", "multistep-asam", "lookahead-asam", "lookbehind-asam", "lookbehind-adaptive-asam"),
}
"""What the panels of lines show; all rows would be too many."""


def draw(report: Report) -> dict[str, bytes]:
    """PNGs by file name."""
    pictures = {}
    with rc_context(STYLE):
        for name, make in (
            ("compare-accuracy.png", _accuracy),
            ("compare-evaluations.png", _evaluations),
            ("compare-sharpness.png", _sharpness),
            ("compare-noise.png", _noise),
            ("compare-sensitivity.png", _sensitivity),
        ):
            figure = make(report)
            figure.text(0.012, 0.012, _note(report), size=7, color=FAINT, va="bottom")
            with io.BytesIO() as file:
                figure.savefig(file, format="png", dpi=200, facecolor="white")
                pictures[name] = file.getvalue()
    return pictures


def _note(report: Report) -> str:
    s = report.settings
    name = {"fashion-mnist": "Fashion-MNIST averaged over 2x2 pixels", "digits": "handwritten digits"}[s.data]
    seeds = "one seed" if s.seeds == 1 else f"{s.seeds} seeds"
    return (
        f"{name}: {s.training:,} training images, {s.label_noise:.0%} of their labels wrong; {s.epochs} epochs; "
        f"{seeds}; torch {report.environment['torch']}"
    )


def _accuracy(report: Report) -> Figure:
    """One line a row: each seed and the mean."""
    rows = list(reversed(report.measured.values()))
    figure = canvas(
        9, 1.4 + 0.3 * len(rows), "Accuracy on the test images",
        "Points: seeds; bar: their mean; on the right: gradients a run", legend=False,
    )  # fmt: skip
    axes = figure.add_subplot()
    for place, m in enumerate(rows):
        accuracy = 100 * np.array(m.accuracy)
        axes.plot([accuracy.min(), accuracy.max()], [place, place], color=_colour(m), linewidth=2.5, alpha=0.3)
        axes.plot(
            accuracy, [place] * len(accuracy), "o", color=_colour(m), markersize=4.5, markeredgewidth=0, alpha=0.8
        )
        axes.plot([accuracy.mean()] * 2, [place - 0.32, place + 0.32], color=_colour(m), linewidth=2.2)
        axes.text(
            1.01, place, f"{accuracy.mean():.1f} %   {m.evaluations:,}", transform=axes.get_yaxis_transform(),
            va="center", size=8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [m.row.label for m in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("correct (%)")
    _horizontal(axes)
    return figure


def _evaluations(report: Report) -> Figure:
    """Mean accuracy against what it cost."""
    figure = canvas(
        9, 5.0, "Accuracy against gradient evaluations",
        "Mean of the seeds, and their range; those of the same cost stand beside each other", legend=False,
    )  # fmt: skip
    axes = figure.add_subplot()
    of_cost: dict[int, list[Measured]] = {}
    for m in report.measured.values():
        of_cost.setdefault(m.evaluations, []).append(m)
    for m in report.measured.values():
        accuracy = 100 * np.array(m.accuracy)
        beside = of_cost[m.evaluations]
        x = m.evaluations * 1.035 ** (beside.index(m) - (len(beside) - 1) / 2)
        axes.plot([x] * 2, [accuracy.min(), accuracy.max()], color=_colour(m), linewidth=1.2, alpha=0.6)
        axes.plot(
            x, accuracy.mean(), _marker(m), color=_colour(m), markersize=7.5, linestyle="",
            label=m.row.label, zorder=3,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(of_cost)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.set_xlabel("gradient evaluations a run")
    axes.set_ylabel("correct (%)")
    axes.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=8)
    return figure


def _sharpness(report: Report) -> Figure:
    """m-sharpness against radius: both balls, of the methods over each."""
    settings = report.settings
    figure = canvas(
        10, 7.2, "Sharpness of the final weights",
        "What one ascent adds to the loss of a minibatch of training images; mean of the seeds, and their range",
        legend=False,
    )  # fmt: skip
    for row, (family, keys) in enumerate(SHOWN.items()):
        balls = (("SAM", settings.sam_radii, "sam_sharpness"), ("ASAM", settings.asam_radii, "asam_sharpness"))
        for column, (ball, radii, name) in enumerate(balls):
            axes = figure.add_subplot(2, 2, 2 * row + column + 1)
            axes.set_title(f"Methods over {family}, {ball}'s ball", **HEAD)
            _lines(axes, report, keys, radii, lambda m, name=name: getattr(m, name))
            axes.set_xlabel("radius")
            axes.set_ylabel("nats" if column == 0 else "")
            if column == 0:
                axes.legend(frameon=False, fontsize=7.5, loc="upper left")
    return figure


def _noise(report: Report) -> Figure:
    """Accuracy against the level of noise in the weights."""
    figure = canvas(
        10, 4.3, "Robustness to noise in the weights",
        "Accuracy on test images, every weight multiplied by 1 + level × N(0, 1); mean of the seeds, and their range",
        legend=False,
    )  # fmt: skip
    for column, (family, keys) in enumerate(SHOWN.items()):
        axes = figure.add_subplot(1, 2, column + 1)
        axes.set_title(f"Methods over {family}", **HEAD)
        _lines(axes, report, keys, report.settings.noise_levels, lambda m: 100 * np.array(m.noise))
        axes.set_xlabel("level of noise")
        axes.set_ylabel("correct (%)" if column == 0 else "")
        axes.legend(frameon=False, fontsize=7.5, loc="lower left")
    return figure


def _sensitivity(report: Report) -> Figure:
    """Validation accuracy against rho, and Lookbehind's against k and alpha."""
    figure = canvas(
        10, 4.3, "Sensitivity to rho, k and alpha",
        "Accuracy on validation images, some of whose labels are wrong too; no test image is used here", legend=False,
    )  # fmt: skip
    left, right = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    chosen = report.answers["lookbehind"]
    left.set_title("rho: mean of the seeds, and their range", **HEAD)
    for method, by_rho in report.sensitivity.items():
        label = f"Lookbehind-SAM, k = {chosen['k']}, α = {chosen['alpha']:g}" if method == "lookbehind" else "SAM"
        values = 100 * np.array(list(by_rho.values())).T
        _line(left, list(by_rho), values, METHODS[method].colour, label)
    rhos = report.settings.sam_rhos
    left.set_xscale("log")
    left.xaxis.set_major_locator(FixedLocator(rhos))
    left.xaxis.set_minor_locator(NullLocator())
    left.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    left.set_xlabel("rho")
    left.set_ylabel("correct (%)")
    left.legend(frameon=False, fontsize=8)

    right.set_title("k and alpha of Lookbehind-SAM: seed 0", **HEAD)
    entries = {(own["k"], own["alpha"]): 100 * accuracy for own, accuracy in report.tuning["lookbehind"]}
    shades = ("#F4A582", "#D55E00", "#7F2704", INK)
    for k, shade in zip(report.settings.ks, shades, strict=False):
        alphas = report.settings.alphas
        right.plot(alphas, [entries[k, alpha] for alpha in alphas], "o-", color=shade, markersize=5, label=f"k = {k}")
    right.plot(
        chosen["alpha"], entries[chosen["k"], chosen["alpha"]], "o", markersize=11, markerfacecolor="none",
        markeredgecolor=INK, label="chosen", linestyle="",
    )  # fmt: skip
    right.xaxis.set_major_locator(FixedLocator(report.settings.alphas))
    right.set_xlabel("alpha")
    right.legend(frameon=False, fontsize=8)
    return figure


def _lines(
    axes: Axes,
    report: Report,
    keys: Sequence[str],
    x: Sequence[float],
    measure: Callable[[Measured], Sequence[Sequence[float]]],
) -> None:
    for key in keys:
        m = report.measured[key]
        style = "--" if key == "sgd-longer" else "-"
        _line(axes, x, np.array(measure(m)), _colour(m), m.row.label, style)


def _line(axes: Axes, x: Sequence[float], values: np.ndarray, colour: str, label: str, style: str = "-") -> None:
    """The mean over seeds, values of shape (seeds, len(x)), over a veil from the least to the largest."""
    axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.plot(x, values.mean(0), "o", linestyle=style, color=colour, markersize=3.5, linewidth=1.6, label=label)


def _colour(m: Measured) -> str:
    return METHODS[m.row.method].colour


def _marker(m: Measured) -> str:
    return "s" if m.row.asam else "^" if m.row.key == "sgd-longer" else "o"


def _horizontal(axes: Axes) -> None:
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
