"""What the comparison found, as Markdown, JSON and plots."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.compare import experiment
from benchmarks.compare.claims import OPEN, Claim, Measured, judge
from benchmarks.compare.experiment import Answers, Done, Row, Run, Settings

CHOICE_OF_SETTING = """
    The setting was chosen beforehand as one in which SGD overfits and SAM can help, so it says nothing about others.
    Four were tried with one seed, SGD and a few radii of SAM (in the first one Lookbehind-SAM too, once), judged by
    the right labels of training images that are used for nothing here: 4,000 images, 30% wrong labels, width 8;
    2,000, 30%, width 16; 2,000, 20%, width 12; and 2,000, 20%, width 8, which was taken: SGD overfits there, as it
    hardly does in the first one, and the best radius of SAM lies inside the grid.
"""


@dataclass(frozen=True)
class Report:
    """All that is written down."""

    settings: Settings
    answers: Answers
    measured: dict[str, Measured]
    """By the row's key."""
    sensitivity: dict[str, dict[float, tuple[float, ...]]]
    """SAM and Lookbehind: for each rho the validation accuracy of each seed."""
    tuning: dict[str, list[tuple[dict[str, Any], float]]]
    """For each question its candidates and their mean validation accuracy."""
    claims: tuple[Claim, ...]
    environment: Mapping[str, Any]


def make(settings: Settings, done: Done, environment: Mapping[str, Any]) -> Report:
    """The report on the finished runs, all of which have to be there."""
    answers = experiment.answer(settings, done)
    measured = {row.key: _measured(row, done) for row in experiment.rows(settings, answers)}
    sensitivity = {
        method: {rho: tuple(done[run.name]["accuracy"] for run in runs) for rho, runs in by_rho.items()}
        for method, by_rho in experiment.sensitivity(settings, answers).items()
    }
    tuning = {
        key: [(own, experiment.mean_accuracy(runs, done)) for own, runs in candidates]
        for key, candidates in experiment.questions(settings, answers).items()
    }
    claims = judge(settings, measured, sensitivity)
    return Report(settings, answers, measured, sensitivity, tuning, claims, environment)


def _measured(row: Row, done: Done) -> Measured:
    results = [done[run.name] for run in row.runs]

    def each(name: str) -> tuple[Any, ...]:
        return tuple(_numbers(result[name]) for result in results)

    noise = tuple(tuple(statistics.fmean(samples) for samples in of_seed) for of_seed in each("noise"))
    return Measured(
        row, results[0]["evaluations"], each("accuracy"), each("training_accuracy"), each("sam_sharpness"),
        each("asam_sharpness"), noise,
    )  # fmt: skip


def _numbers(value: Any) -> Any:
    """JSON's null back to NaN, and its lists to tuples."""
    if isinstance(value, list):
        return tuple(_numbers(entry) for entry in value)
    return math.nan if value is None else value


# ---- text ------------------------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """The table and the claims, for a terminal."""
    return "\n".join(_table(report)) + "\n\n" + "\n".join(_claims(report))


def markdown(report: Report) -> str:
    """compare.md."""
    settings, environment = report.settings, report.environment
    names = {"fashion-mnist": "Fashion-MNIST averaged over 2x2 pixels", "digits": "8x8 handwritten digits"}
    lines = [
        "# Comparison of the methods",
        _paragraph(f"""
            Made by `{environment["command"]}`: {names[settings.data]}, {settings.training:,} training images of which
            {settings.label_noise:.0%} have a wrong label, a residual network of width {settings.width},
            {settings.epochs} epochs of {settings.training // settings.batch_size} outer steps with
            {settings.batch_size} images for every method (in one row SGD runs as many times longer as Lookbehind-SAM
            takes gradients). The base is SGD with momentum 0.9, weight decay 5e-4 and a cosine schedule;
            {_seeds(settings)}, which decide{"s" * (settings.seeds == 1)} weights, order and label noise, the same for
            every row. Versions: torch {environment["torch"]}, Python {environment["python"]}, one thread a run on
            {environment["processor"]}."""),
        *([_paragraph(CHOICE_OF_SETTING)] if settings.data == "fashion-mnist" else []),
        "\n".join(_table(report)),
        _paragraph(f"""
            Evaluations: gradients of a minibatch, over the whole run. Accuracy: on the test images, whose labels are
            right; mean ± standard deviation over the seeds, and their range. Training: accuracy on the training images
            as they are labelled. Sharpness: by how many nats one ascent raises the loss of a minibatch of training
            images, mean over the seeds; in SAM's ball of radius {_middle(settings.sam_radii):g}, in ASAM's of
            {_middle(settings.asam_radii):g}. Under noise: accuracy with every weight multiplied by
            1 + level × N(0, 1) and BatchNorm's statistics estimated anew, mean over the levels
            {_list(settings.noise_levels[1:])} and {settings.noise_samples} draws of each, on the first 1,000 test
            images. BatchNorm's statistics are estimated anew on the training images before every measure, since
            sharpness-aware steps update its running averages at perturbed weights too."""),
        "## What held",
        "\n".join(_claims(report)),
        _paragraph("""
            A comparison holds if every seed's difference has the claimed sign and their mean exceeds their standard
            deviation; it does not hold if the same is true of the opposite sign; otherwise the seeds do not resolve
            it. A claim holds if all its comparisons do, and does not hold if one of them does not. Closeness holds if
            every seed's difference is within a percentage point, and does not if all differences are larger, of one
            sign, and their mean exceeds their standard deviation."""),
        "## How each was tuned",
        _paragraph(f"""
            By accuracy on {settings.validation:,} further training images with the same fraction of wrong labels, which
            is what somebody has who has such data; no test image is used. The learning rate is chosen for SGD, rho for
            SAM and for ASAM, with {_seeds(settings)}; each method uses the rho of its ball. k and alpha are chosen with
            one seed, over SAM; the methods over ASAM take the same, the adaptive alpha takes Lookbehind's k, free
            ascent its k and alpha. There are ten classes: a run with an accuracy near 10 % has learnt nothing."""),
        "\n".join(_tuning(report)),
    ]
    return "\n\n".join(lines) + "\n"


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _seeds(settings: Settings) -> str:
    return "one seed" if settings.seeds == 1 else f"{settings.seeds} seeds"


def _table(report: Report) -> list[str]:
    settings = report.settings
    sam, asam = (len(radii) // 2 for radii in (settings.sam_radii, settings.asam_radii))
    header = (
        "method", "rho", "k", "alpha", "evaluations", "accuracy, %", "range", "training, %", "sharpness, SAM",
        "sharpness, ASAM", "under noise, %",
    )  # fmt: skip
    lines = ["| " + " | ".join(header) + " |", "|---|" + "--:|" * (len(header) - 1)]
    for m in report.measured.values():
        run = m.row.runs[0]
        alpha = "adaptive" if m.row.method.endswith("adaptive") else _value(run.alpha)
        cells = (
            m.row.label, _value(run.rho), _value(run.k), alpha, f"{m.evaluations:,}", _mean_std(m.accuracy),
            f"{100 * min(m.accuracy):.1f} to {100 * max(m.accuracy):.1f}",
            f"{100 * statistics.fmean(m.training_accuracy):.1f}",
            f"{statistics.fmean(of_seed[sam] for of_seed in m.sam_sharpness):.3f}",
            f"{statistics.fmean(of_seed[asam] for of_seed in m.asam_sharpness):.3f}",
            _mean_std(m.under_noise),
        )  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _claims(report: Report) -> list[str]:
    seeds = _seeds(report.settings)
    lines = ["| claim | verdict | mean difference ± std | each seed |", "|---|---|--:|--:|"]
    for number, claim in enumerate(report.claims, 1):
        lines.append(f"| **{number}. {claim.text}** | **{_verdict(claim.verdict, seeds)}** | | |")
        for finding in claim.findings:
            scale, form = (100, "+.2f") if finding.unit == "points" else (1, "+.4f")
            scaled = [scale * difference for difference in finding.differences]
            spread = f" ± {statistics.stdev(scaled):{form[1:]}}" if len(scaled) > 1 else ""
            lines.append(
                f"| {finding.text} | {_verdict(finding.verdict, seeds)} | {statistics.fmean(scaled):{form}}{spread} "
                f"{finding.unit} | {', '.join(f'{x:{form}}' for x in scaled)} |"
            )
    return lines


def _verdict(verdict: str, seeds: str) -> str:
    return f"{OPEN} with {seeds}" if verdict == OPEN else verdict


def _tuning(report: Report) -> list[str]:
    labels = {m.row.key: m.row.label for m in report.measured.values()}
    lines = ["| for | candidates: mean validation accuracy, % |", "|---|---|"]
    for key, candidates in report.tuning.items():
        chosen = report.answers[key]
        cells = []
        for own, accuracy in candidates:
            text = f"{', '.join(f'{name} {value:g}' for name, value in own.items())}: {100 * accuracy:.2f}"
            cells.append(f"**{text}**" if own == chosen else text)
        lines.append(f"| {labels.get(key, 'SGD')} | {'; '.join(cells)} |")
    return lines


def numbers(report: Report) -> dict[str, Any]:
    """compare.json: all of it, as plain values."""
    return _plain(
        {
            "environment": report.environment,
            "settings": asdict(report.settings),
            "chosen": report.answers,
            "tuning": {key: [{**own, "accuracy": a} for own, a in entries] for key, entries in report.tuning.items()},
            "sensitivity": report.sensitivity,
            "rows": {key: _plain_row(m) for key, m in report.measured.items()},
            "claims": [{**asdict(claim), "verdict": claim.verdict} for claim in report.claims],
        }
    )


def _plain_row(m: Measured) -> dict[str, Any]:
    run: Run = m.row.runs[0]
    settings = {name: getattr(run, name) for name in ("method", "asam", "lr", "epochs", "rho", "k", "alpha")}
    measures = {name: value for name, value in vars(m).items() if name != "row"}
    return {"label": m.row.label, **settings, **measures, "under_noise": m.under_noise}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no tuples; five digits are enough for everything here."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _middle(radii: Sequence[float]) -> float:
    return radii[len(radii) // 2]


def _mean_std(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _list(values: Sequence[float]) -> str:
    *most, last = (f"{value:g}" for value in values)
    return f"{', '.join(most)} and {last}" if most else last
