"""The picture: accuracy against gradients and CPU time, and over rho."""

import io

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.fractions.report import SGD, Report
from benchmarks.fractions.study import CONTROLS, Way, relative_time
from benchmarks.style import FAINT, HEAD, STYLE, canvas

LOOKS = {
    "sgd": ("#7F7F7F", "SGD, also for longer"),
    "sam": ("#0072B2", "SAM, ascents on all or a part"),
    "free": ("#CC79A7", "free ascent, also for longer"),
    "second": ("#A6761D", "SAM at every second step"),
    "early": ("#E69F00", "SAM, then SGD"),
    "late": ("#262626", "SGD, then SAM"),
    "lookbehind": ("#D55E00", "Lookbehind-SAM"),
    "lookbehind-early": ("#F0A58F", "Lookbehind-SAM, then SGD"),
    "other": ("#999933", "on a quarter of another minibatch"),
    "random": ("#44AA99", "in a random direction"),
}
"""Colour and name of each kind."""


def draw(report: Report) -> bytes:
    """A PNG."""
    s = report.settings
    with rc_context(STYLE):
        figure = canvas(
            11, 5.0, "What an ascent may cost",
            f"Handwritten digits, {s.label_noise:.0%} of the training labels wrong; mean of {len(s.seeds)} seeds, and "
            "their range; each at the rho that other seeds chose",
        )  # fmt: skip
        gradients, time, rho = (figure.add_subplot(1, 3, place) for place in (1, 2, 3))
        _draw_costs(gradients, report, {way: report.cost(way) for way in report.best})
        _draw_costs(time, report, {way: relative_time(s, way, report.times) for way in report.best})
        _draw_rho(rho, report)
        for axes, title, label in (
            (gradients, "Against gradients", "gradients over SGD's"),
            (time, "Against time", "CPU time over SGD's"),
            (rho, "Over rho", "rho"),
        ):
            axes.set_title(title, **HEAD)
            axes.set_xlabel(label)
        gradients.set_ylabel("test images correct (%)")
        handles, labels = gradients.get_legend_handles_labels()
        figure.legend(
            handles, labels, loc="lower center", bbox_to_anchor=(0.54, 0.012), ncol=5, frameon=False, fontsize=7.5
        )
        figure.text(0.012, 0.012, f"torch {report.environment['torch']}", size=7, color=FAINT, va="bottom")
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=200, facecolor="white")
            return file.getvalue()


def _draw_costs(axes: Axes, report: Report, costs: dict[Way, float | None]) -> None:
    """Ways of one kind are joined by a line."""
    for kind, (colour, name) in LOOKS.items():
        some = [way for way in report.best if way.kind == kind and costs[way] is not None]
        if not some:
            continue
        x, accuracy = [costs[way] for way in some], 100 * np.array([report.at_best(way) for way in some])
        axes.errorbar(
            x, accuracy.mean(1), (accuracy.mean(1) - accuracy.min(1), accuracy.max(1) - accuracy.mean(1)),
            fmt="s-" if kind in CONTROLS else "o-", color=colour, markersize=5, linewidth=1.5, elinewidth=0.8,
            label=name,
        )  # fmt: skip
    axes.set_xlim(left=0.75)


def _draw_rho(axes: Axes, report: Report) -> None:
    shades = iter(np.linspace(1, 0.35, len(report.settings.fractions)))
    for way, by_rho in report.accuracy.items():
        if way.kind not in ("sam", "free", "lookbehind") or way.longer != 1:
            continue
        means = [100 * np.mean(x) for x in by_rho.values()]
        alpha = next(shades) if way.kind == "sam" else 1
        axes.plot(list(by_rho), means, "o-", color=LOOKS[way.kind][0], alpha=alpha, markersize=4, linewidth=1.5)
        if way.kind == "sam":
            name = "SAM" if way.fraction == 1 else f"1/{1 / way.fraction:g}"
            axes.annotate(name, (list(by_rho)[-1], means[-1]), (4, 0), textcoords="offset points", size=7, va="center")
    axes.axhline(100 * np.mean(report.at_best(SGD)), color=LOOKS["sgd"][0], linewidth=1.2, linestyle="--")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(report.settings.rhos))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
