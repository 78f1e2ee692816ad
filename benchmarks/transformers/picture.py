"""The picture of a job: a line for each row, its seeds, their mean and its interval."""

import io
from collections.abc import Mapping
from typing import Any

from matplotlib import rc_context

from benchmarks.methods import METHODS
from benchmarks.paired import Interval
from benchmarks.style import FAINT, STYLE, canvas
from benchmarks.transformers.plan import Row
from benchmarks.transformers.study import Study


def draw(
    study: Study,
    rows: Mapping[str, Row],
    scores: Mapping[str, tuple[float, ...]],
    references: Mapping[str, float],
    environment: Mapping[str, Any],
) -> bytes:
    """A PNG. `scores` and `references` as they are shown."""
    with rc_context(STYLE), io.BytesIO() as file:
        subtitle = "Points: seeds; bar: their mean; line: its 95 % interval; on the right: gradients for each minibatch"
        figure = canvas(9, 1.6 + 0.32 * len(rows), study.title, subtitle, legend=False)
        axes = figure.add_subplot()
        for place, row in enumerate(reversed(rows.values())):
            run = row.runs[0]
            colour = METHODS["sgd" if run.method == "base" else run.method].colour
            interval = Interval.of(scores[row.key])
            marker = "s" if run.asam else "o"
            axes.plot(scores[row.key], [place] * len(row.runs), marker, color=colour, markersize=4.5, alpha=0.7)
            axes.plot([interval.mean] * 2, [place - 0.3, place + 0.3], color=colour, linewidth=2.2)
            if len(row.runs) > 1:
                axes.plot([interval.low, interval.high], [place, place], color=colour, linewidth=2.5, alpha=0.3)
            axes.text(
                1.01, place, f"{interval.mean:.1f}   {run.cost(study.settings)}",
                transform=axes.get_yaxis_transform(), va="center", size=8,
            )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row.label for row in reversed(rows.values())])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel(study.measure)
        axes.grid(True, axis="x")
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
        note = "; ".join(f"{name}: {score:.1f}" for name, score in references.items())
        note += f"; torch {environment['torch']}, Python {environment['python']}"
        figure.text(0.012, 0.012, note, size=7, color=FAINT, va="bottom")
        figure.savefig(file, format="png", dpi=200, facecolor="white")
        return file.getvalue()
