"""The pictures of the comparison."""

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.compare.claims import Measured
from benchmarks.compare.experiment import TUNED, key_of
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
            ("compare-training.png", _training),
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
    return (
        f"{name}: {s.training:,} training images, {s.label_noise:.0%} of their labels wrong; {s.epochs} epochs; "
        f"{len(s.seeds)} seeds; torch {report.environment['torch']}"
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
            1.01, place, f"{accuracy.mean():.1f} %   {m.evaluations:,.0f}", transform=axes.get_yaxis_transform(),
            va="center", size=8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [m.row.label for m in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("correct (%)")
    _horizontal(axes)
    return figure


def _evaluations(report: Report) -> Figure:
    """Mean accuracy against what it cost, also of who trains longer."""
    figure = canvas(
        11, 6.0, "Accuracy against gradient evaluations",
        "Mean of the seeds, and their range; circles: as many epochs; triangles: trained until Lookbehind's cost. "
        "Those of the same cost stand beside each other", legend=False,
    )  # fmt: skip
    first = None
    for column, asam in enumerate((False, True)):
        axes = first = figure.add_subplot(1, 2, column + 1, sharey=first)
        axes.set_title(f"Methods over {'ASAM' if asam else 'SAM'}", **HEAD)
        keys = [key_of(method, over) for method, over in TUNED if over == asam or method in ("sgd", "lookahead")]
        keys += [f"{key}-longer" for key in keys if f"{key}-longer" in report.measured]
        rows = {key: report.measured[key] for key in keys}
        costs = [m.evaluations for m in rows.values()]
        place = {
            key: m.evaluations * 1.04 ** (_before(rows, key) - (costs.count(m.evaluations) - 1) / 2)
            for key, m in rows.items()
        }  # fmt: skip
        for key, m in rows.items():
            accuracy, longer = 100 * np.array(m.accuracy), key.endswith("-longer")
            axes.plot([place[key]] * 2, [accuracy.min(), accuracy.max()], color=_colour(m), linewidth=1.2, alpha=0.6)
            axes.plot(
                place[key], accuracy.mean(), "^" if longer else "o", color=_colour(m), markersize=7, linestyle="",
                label=None if longer else m.row.label, zorder=3,
            )  # fmt: skip
            if longer:
                before = key.removesuffix("-longer")
                axes.plot(
                    [place[before], place[key]], [100 * np.mean(rows[before].accuracy), accuracy.mean()],
                    color=_colour(m), linestyle=":", linewidth=1.2,
                )  # fmt: skip
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(_apart(costs)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("gradient evaluations a run")
        axes.set_ylabel("" if asam else "correct (%)")
        axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False, fontsize=7.5, ncols=2)
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
                axes.legend(frameon=False, fontsize=7.5, loc="upper left", handlelength=3)
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
        axes.legend(frameon=False, fontsize=7.5, loc="lower left", handlelength=3)
    return figure


def _sensitivity(report: Report) -> Figure:
    """Validation accuracy against rho, loss against sharpness over rho, and accuracy against k and alpha."""
    figure = canvas(
        13, 4.3, "Sensitivity to rho, k and alpha",
        "Tuning seeds, validation images some of whose labels are wrong too; no test image is used here", legend=False,
    )  # fmt: skip
    rho, loss, *others = (figure.add_subplot(1, 4, place) for place in (1, 2, 3, 4))
    rho.set_title("rho", **HEAD)
    loss.set_title("Loss and sharpness over rho", **HEAD)
    for varied, by_value in report.explored.items():
        if varied.startswith("rho "):
            method = METHODS[varied.removeprefix("rho ")]
            x = [float(value) for value in by_value]
            values = 100 * np.array([explored.accuracy for explored in by_value.values()]).T
            _line(rho, x, values, method.colour, method.label)
            means = [(np.mean(explored.sharpness), np.mean(explored.loss)) for explored in by_value.values()]
            loss.plot(*zip(*means, strict=True), "o-", color=method.colour, markersize=4, label=method.label)
    rho.set_xscale("log")
    rho.xaxis.set_major_locator(FixedLocator(report.settings.sensitivity_rhos))
    rho.xaxis.set_minor_locator(NullLocator())
    rho.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    rho.set_xlabel("rho")
    rho.set_ylabel("correct (%)")
    rho.legend(frameon=False, fontsize=8)
    radii = report.settings.sam_radii
    loss.set_xlabel(f"sharpness at radius {radii[len(radii) // 2]:g} (nats)")
    loss.set_ylabel("training loss (nats)")
    shades = ("#F4A582", "#D55E00", "#7F2704", INK)
    for axes, method in zip(others, ("lookbehind", "lookahead-sam"), strict=True):
        axes.set_title(f"{METHODS[method].label}: k and alpha", **HEAD)
        of_k: dict[str, list[tuple[float, float]]] = {}
        for value, explored in report.explored[f"k, alpha {method}"].items():
            k, alpha = value.split(", ")
            of_k.setdefault(k, []).append((float(alpha), 100 * np.mean(explored.accuracy)))
        for (k, entries), shade in zip(of_k.items(), shades, strict=False):
            axes.plot(*zip(*entries, strict=True), "o-", color=shade, markersize=5, label=f"k = {k}")
        axes.set_xlabel("alpha")
        axes.legend(frameon=False, fontsize=8)
    return figure


def _training(report: Report) -> Figure:
    """Accuracy and adaptive alpha during training, and accuracy where stages are switched."""
    figure = canvas(
        12, 4.3, "During training", "Mean of the seeds, and their range; accuracy on the first 1,000 test images",
        legend=False,
    )  # fmt: skip
    accuracy, alpha, stages = (figure.add_subplot(1, 3, place) for place in (1, 2, 3))
    accuracy.set_title("Convergence", **HEAD)
    for key in ("sgd", "sam", "multistep", "lookahead-sam", "lookbehind"):
        m = report.measured[key]
        history = np.array(m.history)
        shares = np.arange(1, history.shape[1] + 1) / history.shape[1]
        _line(accuracy, 100 * shares, 100 * history[:, :, 1], _colour(m), m.row.label)
    accuracy.set_ylabel("correct (%)")
    accuracy.legend(frameon=False, fontsize=7.5, loc="lower right")

    alpha.set_title("Adaptive alpha", **HEAD)
    for key, colour in (("lookbehind-adaptive", "#009E73"), ("lookbehind-adaptive-asam", "#882255")):
        m = report.measured[key]
        values = np.array(m.alpha_history)
        shares = np.arange(1, values.shape[1] + 1) / values.shape[1]
        _line(alpha, 100 * shares, values, colour, m.row.label)
    alpha.legend(frameon=False, fontsize=7.5)
    for axes in (accuracy, alpha):
        axes.set_xlabel("epochs done (%)")

    stages.set_title("Switched stages", **HEAD)
    shares = 100 * np.array(report.settings.shares)
    kinds = (("last", "Lookbehind first, SAM last", "#D55E00"), ("first", "SAM first, Lookbehind last", "#0072B2"))
    for kind, label, colour in kinds:
        rows = [report.measured[f"{kind}-sam-{share:g}"].accuracy for share in report.settings.shares]
        _line(stages, shares, 100 * np.array(rows).T, colour, label)
    for key in ("sam", "lookbehind"):
        m = report.measured[key]
        stages.axhline(100 * np.mean(m.accuracy), color=_colour(m), linestyle="--", linewidth=1)
    stages.set_xlabel("epochs that are SAM's (%)")
    stages.legend(frameon=False, fontsize=7.5)
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
        style = "--" if key.endswith("-longer") else "-"
        _line(axes, x, np.array(measure(m)), _colour(m), m.row.label, style)


def _line(axes: Axes, x: Sequence[float], values: np.ndarray, colour: str, label: str, style: str = "-") -> None:
    """The mean over seeds, values of shape (seeds, len(x)), over a veil from the least to the largest."""
    axes.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
    axes.plot(x, values.mean(0), "o", linestyle=style, color=colour, markersize=3.5, linewidth=1.6, label=label)


def _before(rows: dict[str, Measured], key: str) -> int:
    """How many rows of the same cost stand before this one."""
    same = [other for other, m in rows.items() if m.evaluations == rows[key].evaluations]
    return same.index(key)


def _apart(values: Sequence[float]) -> list[float]:
    """In order, without those whose labels would touch the one before, on a logarithmic axis."""
    kept: list[float] = []
    for value in sorted(set(values)):
        if not kept or value > 1.25 * kept[-1]:
            kept.append(value)
    return kept


def _colour(m: Measured) -> str:
    return METHODS[m.row.method].colour


def _horizontal(axes: Axes) -> None:
    axes.grid(True, axis="x")
    axes.grid(False, axis="y")
    axes.tick_params(axis="y", length=0)
