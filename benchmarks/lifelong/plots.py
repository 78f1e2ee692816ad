"""The picture of the report: what is remembered while tasks come and go, and what is forgotten in the end."""

import io

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from benchmarks.lifelong.experiment import WAYS
from benchmarks.lifelong.report import Report, Row
from benchmarks.lifelong.streams import STREAMS
from benchmarks.methods import METHODS
from benchmarks.style import FAINT, HEAD, STYLE, canvas

TITLES = {"plain": "Without a memory", "replay": "With episodic replay", "cmaml": "Over C-MAML"}


def draw(report: Report) -> bytes:
    """A PNG."""
    s = report.settings
    with rc_context(STYLE):
        figure = canvas(
            10, 6.6, "Lifelong learning: what is remembered, and what is forgotten",
            "Above: accuracy on all tasks so far, mean of the seeds and their range; below: each seed at the end",
            legend=False,
        )  # fmt: skip
        axes = figure.subplots(2, 3, sharex="row", sharey="row")
        for column, way in enumerate(WAYS):
            rows = [row for row in report.rows if row.way == way]
            axes[0, column].set_title(TITLES[way], **HEAD)
            for row in rows:
                _course(axes[0, column], row)
                axes[1, column].plot(
                    100 * np.array(row.forgetting), 100 * np.array(row.accuracy), "o", color=_colour(row),
                    markersize=5, markeredgewidth=0, alpha=0.8,
                )  # fmt: skip
            axes[0, column].set_xlabel("tasks learnt")
            axes[1, column].set_xlabel("forgetting (points)")
            axes[0, column].legend(frameon=False, fontsize=7.5)
            axes[0, column].xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0, 0].set_ylabel("correct (%)")
        axes[1, 0].set_ylabel("average accuracy (%)")
        seeds = "one seed" if report.seeds == 1 else f"{report.seeds} seeds"
        note = f"{STREAMS[s.stream].label}; {s.training} images a task, {s.epochs} epochs; {seeds}; torch " + str(
            report.environment["torch"]
        )
        figure.text(0.012, 0.012, note, size=7, color=FAINT, va="bottom")
        with io.BytesIO() as file:
            figure.savefig(file, format="png", dpi=160, facecolor="white")
            return file.getvalue()


def _course(axes: Axes, row: Row) -> None:
    """The mean over seeds over a veil from the least to the largest."""
    values = 100 * np.array(row.course)
    tasks = np.arange(1, values.shape[1] + 1)
    axes.fill_between(tasks, values.min(0), values.max(0), color=_colour(row), alpha=0.12, linewidth=0)
    axes.plot(tasks, values.mean(0), color=_colour(row), linewidth=1.6, label=row.label.split(" with ")[0])


def _colour(row: Row) -> str:
    return METHODS[row.method].colour
