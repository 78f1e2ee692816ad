"""What the comparison found, as Markdown and JSON."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import tables
from benchmarks.compare import experiment
from benchmarks.compare.claims import OPEN, Claim, Measured, judge
from benchmarks.compare.experiment import Answers, Row, Settings
from benchmarks.compare.search import Options
from benchmarks.methods import METHODS
from benchmarks.paired import Interval
from benchmarks.runs import Done, mean_accuracy, numbers
from benchmarks.store import Store


@dataclass(frozen=True)
class Explored:
    """Runs around what was chosen; each tuple has an entry for every tuning seed."""

    accuracy: tuple[float, ...]
    """On validation images, some of whose labels are wrong."""
    loss: tuple[float, ...]
    """Training loss, nats, the mean over the last epoch."""
    sharpness: tuple[float, ...]
    """At the middle one of SAM's radii."""


@dataclass(frozen=True)
class Report:
    """All that is written down."""

    settings: Settings
    answers: Answers
    measured: dict[str, Measured]
    """By the row's key."""
    explored: dict[str, dict[str, Explored]]
    """By what is varied, and by its value."""
    tuning: dict[str, list[tuple[Options, float, float | None]]]
    """By key, for each point: accuracy with the first tuning seed; of finalists the mean over all."""
    claims: tuple[Claim, ...]
    seconds: float
    """Of training, of all runs together, each on one core."""
    environment: Mapping[str, Any]
    data: str


def make(settings: Settings, store: Store, command: str) -> Report:
    """The report on the finished runs, all of which have to be there."""
    done = store.done
    answers = experiment.answer(settings, done)
    measured = {row.key: _measured(row, done) for row in experiment.rows(settings, answers)}
    middle = len(settings.sam_radii) // 2
    explored = {
        varied: {
            value: Explored(
                numbers([done[run.name]["accuracy"] for run in runs]),
                numbers([done[run.name]["loss"] for run in runs]),
                numbers([done[run.name]["sam_sharpness"][middle] for run in runs]),
            )
            for value, runs in by_value.items()
        }
        for varied, by_value in experiment.sensitivity(settings, answers).items()
    }
    over_rho = {
        varied.removeprefix("rho "): [x.accuracy for x in by_value.values()]
        for varied, by_value in explored.items() if varied.startswith("rho ")
    }  # fmt: skip
    tuning = {experiment.key_of(*which): _tuning(settings, *which, done) for which in experiment.TUNED}
    claims = judge(settings, measured, over_rho)
    seconds = math.fsum(done[run.name]["seconds"] for run in experiment.plan(settings, done))
    environment = {**store.environment, "command": command}
    return Report(settings, answers, measured, explored, tuning, claims, seconds, environment, store.data)


def _measured(row: Row, done: Done) -> Measured:
    results = [done[run.name] for run in row.runs]

    def each(name: str) -> tuple[Any, ...]:
        return tuple(numbers(result[name]) for result in results)

    noise = tuple(tuple(statistics.fmean(samples) for samples in of_seed) for of_seed in each("noise"))
    return Measured(
        row, results[0]["evaluations"], each("accuracy"), each("training_accuracy"), each("sam_sharpness"),
        each("asam_sharpness"), noise, each("history"), each("alpha"),
    )  # fmt: skip


def _tuning(settings: Settings, method: str, asam: bool, done: Done) -> list[tuple[Options, float, float | None]]:
    again = {run.name: runs for _, runs in experiment.finalists(settings, method, asam, done) for run in runs[:1]}
    return [
        (own, done[run.name]["accuracy"], mean_accuracy(again[run.name], done) if run.name in again else None)
        for own, run in experiment.trials(settings, method, asam, settings.tuning_seeds[0])
    ]


# ---- text ------------------------------------------------------------------------------------------------------------


PICTURES = {
    "accuracy": "Accuracy on the test images: each seed and the mean",
    "evaluations": "Accuracy on the test images against gradients a run",
    "sharpness": "Sharpness against radius",
    "noise": "Accuracy against noise in the weights",
    "sensitivity": "Validation accuracy, loss and sharpness around what was chosen",
    "training": "During training: accuracy, the adaptive alpha, switched stages",
}
"""What those that `plots` draws show, by their names."""


def text(report: Report) -> str:
    """The table and the claims, for a terminal."""
    return "\n\n".join("\n".join(tables.markdown(*table)) for table in (_table(report), _claims(report)))


def markdown(report: Report) -> str:
    """compare.md."""
    s, e = report.settings, report.environment
    names = {"fashion-mnist": "Fashion-MNIST averaged over 2x2 pixels", "digits": "8x8 handwritten digits"}
    lines = [
        "# Comparison of the methods",
        _paragraph(f"""
            Made by `{e["command"]}` at commit {e["commit"]}: {names[s.data]}, {s.training:,} training images of which
            {s.label_noise:.0%} have a wrong label, a residual network of width {s.width}, {s.epochs} epochs of
            {s.training // s.batch_size} outer steps with {s.batch_size} images, but for the rows with "as many
            gradients", which train longer until they have taken as many as Lookbehind over the same ball. The base is
            SGD with momentum 0.9, weight decay 5e-4 and a cosine schedule. {len(s.seeds)} seeds decide weights,
            order and label noise, the same for every row; none of them was used in tuning. torch {e["torch"]}, Python
            {e["python"]}, one thread a run on {e["processor"]}; data (SHA-256) {report.data[:16]}... All runs trained
            for {report.seconds / 3600:.1f} hours of a core that other programs used too."""),
        "\n".join(tables.markdown(*_table(report))),
        _paragraph(f"""
            Evaluations: gradients of a minibatch (with microbatches: of one of them; one of a quarter counts as a
            quarter), over the whole run. Accuracy: on
            the test images, whose labels are right, with the 95 % interval of the mean over the seeds. Best after: the
            share of training after which accuracy (on the first 1,000 test images) was best. Training: accuracy on the
            training images as they are labelled. Sharpness: by how many nats one ascent raises the loss of a minibatch
            of training images; in SAM's ball of radius {s.sam_radii[len(s.sam_radii) // 2]:g}, in ASAM's of
            {s.asam_radii[len(s.asam_radii) // 2]:g}. Under noise: accuracy with every weight multiplied by
            1 + level × N(0, 1), mean over the levels {", ".join(f"{x:g}" for x in s.noise_levels[1:])} and
            {s.noise_samples} draws of each, on the first 1,000 test images. BatchNorm's statistics are estimated anew
            before every measure, since sharpness-aware steps update its running averages at perturbed weights too."""),
        *(f"![{words}](compare-{name}.png)" for name, words in PICTURES.items()),
        "## What held",
        "\n".join(tables.markdown(*_claims(report))),
        _paragraph("""
            Differences are paired by seed. A comparison holds if the whole 95 % interval of their mean (Student's t) is
            above 0, and does not hold if all of it is below; otherwise the seeds do not resolve it. A claim holds if
            all its comparisons do, and does not if one of them does not. Closeness holds if the interval is within a
            percentage point of 0, and does not if all of it is farther away. The intervals are not corrected for their
            number: of twenty comparisons without a difference one is expected to look resolved."""),
        "## How each was tuned",
        _paragraph(f"""
            By accuracy on {s.validation:,} further training images with the same fraction of wrong labels, which
            is what somebody has who has such data; no test image is used. Every method has {2**s.trials} trials,
            points of a scrambled Sobol sequence in the space of its own options: learning rate
            {_range(s.learning_rates)} and rho {_range(s.sam_rhos)} (ASAM {_range(s.asam_rhos)}; with ascents on a
            quarter {METHODS["sam-quarter"].rho_scale:g} times as large, by the rule of fractions.md), even in the
            logarithm; k of {_values(s.ks)} (Lookahead {_values(s.lookahead_ks)}); alpha {_range(s.alphas)}. They run
            with one seed, the best {s.finalists} with {len(s.tuning_seeds) - 1} more ({_values(s.tuning_seeds)}), and
            the best mean is chosen. So methods of fewer options are searched more densely. Rows with as many
            gradients, microbatches and switched stages take what was chosen for the method without them."""),
        "\n".join(tables.markdown(*_tuning_table(report))),
        "## Around what was chosen",
        _paragraph(f"""
            Accuracy on the validation images, %, mean over the seeds {_values(s.tuning_seeds)}; all other options as
            chosen. There are ten classes: an accuracy near 10 % means that a run has learnt nothing."""),
        "\n".join(tables.markdown(*_explored_table(report))),
    ]
    return "\n\n".join(lines) + "\n"


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _table(report: Report) -> tuple[tables.Row, list[tables.Row]]:
    sam, asam = (len(radii) // 2 for radii in (report.settings.sam_radii, report.settings.asam_radii))
    header = (
        "method", "lr", "rho", "k", "alpha", "evaluations", "accuracy, %", "best after", "training, %",
        "sharpness, SAM", "sharpness, ASAM", "under noise, %",
    )  # fmt: skip
    lines = []
    for m in report.measured.values():
        run = m.row.runs[0]
        alpha = "adaptive" if m.row.method.endswith("adaptive") else _value(run.alpha)
        lines.append(
            (
                m.row.label, _value(run.lr), _value(run.rho), _value(run.k), alpha, f"{m.evaluations:,.0f}",
                Interval.of(m.accuracy).show(100, 1), f"{statistics.fmean(m.best):.0%}",
                f"{100 * statistics.fmean(m.training_accuracy):.1f}",
                f"{statistics.fmean(of_seed[sam] for of_seed in m.sam_sharpness):.3f}",
                f"{statistics.fmean(of_seed[asam] for of_seed in m.asam_sharpness):.3f}",
                Interval.of(m.under_noise).show(100, 1),
            )
        )  # fmt: skip
    return header, lines


def _claims(report: Report) -> tuple[tables.Row, list[tables.Row]]:
    seeds = f"{len(report.settings.seeds)} seeds"
    lines: list[tables.Row] = []
    for number, claim in enumerate(report.claims, 1):
        source = f" ({claim.source})" if claim.source else ""
        lines.append((f"**{number}. {claim.text}{source}**", f"**{_verdict(claim.verdict, seeds)}**", ""))
        for finding in claim.findings:
            scale, digits = (100, 2) if finding.unit == "points" else (1, 4)
            difference = finding.interval.show(scale, digits, sign=True)
            lines.append((finding.text, _verdict(finding.verdict, seeds), f"{difference} {finding.unit}"))
    return ("claim", "verdict", "mean difference (95 % interval)"), lines


def _verdict(verdict: str, seeds: str) -> str:
    return f"{OPEN} with {seeds}" if verdict == OPEN else verdict


def _tuning_table(report: Report) -> tuple[tables.Row, list[tables.Row]]:
    lines = []
    for key, tried in report.tuning.items():
        cells = []
        for own, first, mean in tried:
            text = f"{', '.join(f'{name} {value:g}' for name, value in own.items())}: {100 * first:.1f}"
            text += f", {100 * mean:.1f}" if mean is not None else ""
            cells.append(f"**{text}**" if own == report.answers[key] else text)
        lines.append((report.measured[key].row.label, "; ".join(cells)))
    return ("for", "points: validation accuracy, %, with one seed; of finalists, the mean over all"), lines


def _explored_table(report: Report) -> tuple[tables.Row, list[tables.Row]]:
    lines = []
    for varied, by_value in report.explored.items():
        names, method = varied.rsplit(" ", 1)
        cells = [f"{value}: {100 * statistics.fmean(x.accuracy):.1f}" for value, x in by_value.items()]
        lines.append((f"{METHODS[method].label}: {names}", "; ".join(cells)))
    return ("varied", "accuracy by value"), lines


def plain(report: Report) -> dict[str, Any]:
    """compare.json: all of it, as plain values."""
    return _plain(
        {
            "environment": report.environment,
            "data": report.data,
            "settings": asdict(report.settings),
            "chosen": report.answers,
            "tuning": {
                key: [{**own, "accuracy": first, "mean": mean} for own, first, mean in tried]
                for key, tried in report.tuning.items()
            },
            "explored": {
                varied: {value: asdict(x) for value, x in of.items()} for varied, of in report.explored.items()
            },
            "rows": {key: _plain_row(m) for key, m in report.measured.items()},
            "seconds": report.seconds,
            "claims": [
                {
                    "source": claim.source, "text": claim.text, "verdict": claim.verdict,
                    "findings": [
                        {**asdict(f), "interval": asdict(f.interval), "verdict": f.verdict} for f in claim.findings
                    ],
                }
                for claim in report.claims
            ],
        }
    )  # fmt: skip


def _plain_row(m: Measured) -> dict[str, Any]:
    run = m.row.runs[0]
    names = ("method", "asam", "lr", "epochs", "rho", "k", "alpha", "microbatches", "sam_epochs")
    measures = {name: value for name, value in vars(m).items() if name != "row"}
    own = {name: getattr(run, name) for name in names}
    return {"label": m.row.label, **own, **measures, "under_noise": m.under_noise, "best": m.best}


def _plain(value: Any) -> Any:
    """JSON has no NaN and no tuples; five digits are enough for everything here."""
    if isinstance(value, Mapping):
        return {str(name): _plain(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:g}"


def _range(ends: tuple[float, float]) -> str:
    return f"from {ends[0]:g} to {ends[1]:g}"


def _values(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:g}" for value in values)
