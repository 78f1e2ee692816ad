"""The picture of the main job's comparison: accuracy against gradient evaluations, sharpness and rho."""

import io

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.methods import METHODS
from benchmarks.style import FAINT, HEAD, STYLE, canvas
from benchmarks.train.report import Report, Shown, label, scaled


def draw(report: Report) -> bytes:
    """A PNG."""
    s = report.settings
    with rc_context(STYLE):
        figure = canvas(
            11, 4.4, f"Handwritten digits, {s.label_noise:.0%} of the training labels wrong",
            f"Mean of {len(s.seeds)} seeds, and their range; every method at the best of the same three rhos, chosen "
            f"with other seeds{''.join(f'; {words}' for words in scaled(s))}", legend=False,
        )  # fmt: skip
        training, sharpness, rho = (figure.add_subplot(1, 3, place) for place in (1, 2, 3))
        _draw_training(training, report)
        _draw_sharpness(sharpness, report)
        _draw_rho(rho, report)
        for axes in (sharpness, rho):
            axes.set_ylim(training.get_ylim())
        handles, labels = training.get_legend_handles_labels()
        sharpness.legend(handles, labels, frameon=False, fontsize=8, loc="lower left")
        figure.text(0.012, 0.012, f"torch {report.environment['torch']}", size=7, color=FAINT, va="bottom")
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=200, facecolor="white")
            return file.getvalue()


def _draw_training(axes: Axes, report: Report) -> None:
    axes.set_title("During training", **HEAD)
    axes.set_xlabel("gradient evaluations")
    axes.set_ylabel("test images correct (%)")
    for method, shown in report.best.items():
        history = np.array(shown.history)
        at, accuracy = history[0, :, 0], 100 * history[:, :, 1]
        axes.fill_between(at, accuracy.min(0), accuracy.max(0), color=_colour(method), alpha=0.12, linewidth=0)
        axes.plot(at, accuracy.mean(0), color=_colour(method), linewidth=1.8, label=label(report, method))
        axes.plot(at[-1], accuracy.mean(0)[-1], "o", color=_colour(method), markersize=5)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def _draw_sharpness(axes: Axes, report: Report) -> None:
    axes.set_title("At the end, against sharpness", **HEAD)
    axes.set_xlabel(f"nats that an ascent of {report.settings.sam_radii[0]:g} adds to the loss")
    for method, shown in report.best.items():
        accuracy = 100 * np.array(shown.accuracy)
        axes.plot(shown.sharpness, accuracy, "o", color=_colour(method), markersize=4, alpha=0.4, markeredgewidth=0)
        axes.plot(np.mean(shown.sharpness), accuracy.mean(), "o", color=_colour(method), markersize=8)
    axes.set_xlim(left=0)


def _draw_rho(axes: Axes, report: Report) -> None:
    axes.set_title("At the end, against rho", **HEAD)
    axes.set_xlabel("rho")
    for method, by_rho in report.over_rho.items():
        _draw_line(axes, list(by_rho), list(by_rho.values()), _colour(method))
    axes.axhline(100 * np.mean(report.best["sgd"].accuracy), color=_colour("sgd"), linewidth=1.2, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted({rho for by_rho in report.over_rho.values() for rho in by_rho})))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_line(axes: Axes, x: list[float], shown: list[Shown], colour: str) -> None:
    values = 100 * np.array([of_rho.accuracy for of_rho in shown])
    axes.fill_between(x, values.min(1), values.max(1), color=colour, alpha=0.12, linewidth=0)
    axes.plot(x, values.mean(1), "o-", color=colour, markersize=4, linewidth=1.8)


def _colour(method: str) -> str:
    return METHODS[method].colour
