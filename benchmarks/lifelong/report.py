"""What the runs found, as text, Markdown and JSON; which claims hold."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks import tables
from benchmarks.lifelong import experiment
from benchmarks.lifelong.experiment import ROWS, SETTINGS, WAYS, Done, Options, Settings
from benchmarks.lifelong.streams import STREAMS
from benchmarks.paired import FAILS, HOLDS, OPEN, Interval, differences

ABSENT = """
    The appendix with the paper's own text of algorithms 3 and 4 and its table 6 was not at hand. Lookahead-C-MAML and
    Lookbehind-C-MAML are Lookahead (Zhang et al. 2019) and Lookbehind around C-MAML (Gupta et al. 2020, arXiv
    2007.13904, algorithm 1 with constant learning rates, first order, and its public code for when the memory is
    drawn from and offered to); the grids are this project's, alpha and k as the authors' public README has them.
"""

WIDER = """
    Learning rates from 0.003 to 0.5 and rho from 0.02 to 0.2 were looked at first, for SGD and SAM on the rotations'
    validation images of that seed, and these grids are what they were narrowed to.
"""


@dataclass(frozen=True)
class Row:
    """A line of the table; each tuple has an entry for every seed."""

    way: str
    method: str
    label: str
    own: Options
    accuracy: tuple[float, ...]
    forgetting: tuple[float, ...]
    tables: tuple[Any, ...]
    """Of each seed: after each task the accuracy on all tasks so far."""
    examples: int
    seconds: float
    """Of the processor, the mean of a run."""

    @property
    def learnt(self) -> tuple[float, ...]:
        """Of each seed: the accuracy on a task just after it was learnt, the mean over tasks."""
        return tuple(statistics.fmean(row[-1] for row in table) for table in self.tables)

    @property
    def course(self) -> tuple[tuple[float, ...], ...]:
        """Of each seed: after each task the mean accuracy on the tasks so far."""
        return tuple(tuple(statistics.fmean(row) for row in table) for table in self.tables)


@dataclass(frozen=True)
class Finding:
    """A comparison of two rows: differences of the seeds, positive where it is as claimed."""

    text: str
    differences: tuple[float, ...]

    @property
    def interval(self) -> Interval:
        """Of the mean difference."""
        return Interval.of(self.differences)

    @property
    def verdict(self) -> str:
        """By the 95 % interval."""
        return self.interval.verdict


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the comparisons that it consists of."""

    text: str
    findings: tuple[Finding, ...]

    @property
    def verdict(self) -> str:
        """It holds if all of its comparisons do, and does not if one of them does not."""
        verdicts = {finding.verdict for finding in self.findings}
        return FAILS if FAILS in verdicts else OPEN if OPEN in verdicts else HOLDS


@dataclass(frozen=True)
class Report:
    """All that is written down."""

    settings: Settings
    seeds: int
    rows: tuple[Row, ...]
    tuning: dict[str, list[tuple[Options, float, float]]]
    """By row: each trial's options, average accuracy and forgetting on validation images."""
    claims: tuple[Claim, ...]
    seconds: float
    """Of the processor, of all runs together."""
    environment: Mapping[str, Any]


def make(settings: Settings, seeds: int, done: Done, environment: Mapping[str, Any]) -> Report:
    """The report on the finished runs, all of which have to be there."""
    chosen = experiment.answers(settings, done)
    rows = []
    trials = {}
    for way, method in ROWS:
        own = chosen[way, method]
        results = [done[run.name] for run in experiment.finals(seeds, way, method, own)]
        accuracy, forgetting, course = (
            tuple(result[name] for result in results) for name in ("accuracy", "forgetting", "table")
        )  # fmt: skip
        seconds = statistics.fmean(result["seconds"] for result in results)
        label = experiment.label(way, method)
        rows.append(
            Row(way, method, label, own, accuracy, forgetting, course, results[0]["examples"], seconds)
        )  # fmt: skip
        trials[label] = [
            (options, done[run.name]["accuracy"], done[run.name]["forgetting"])
            for options, run in experiment.tuning(settings, way, method)
        ]
    needed = experiment.plan(settings, seeds, done)
    seconds = math.fsum(done[run.name]["seconds"] for run in needed)
    return Report(settings, seeds, tuple(rows), trials, judge(rows), seconds, environment)


def judge(rows: Sequence[Row]) -> tuple[Claim, ...]:
    """Every claim, from the rows."""
    by_key = {(row.way, row.method): row for row in rows}
    claims = []
    for way, others in (
        ("plain", ("sgd", "sam", "multistep")),
        ("replay", ("sgd", "sam", "multistep")),
        ("cmaml", ("sgd", "lookahead", "sam")),
    ):
        ours = by_key[way, "lookbehind"]
        for measure, word, sign in (("accuracy", "above", 1), ("forgetting", "below", -1)):
            findings = []
            for other in (by_key[way, method] for method in others):
                a, b = getattr(ours, measure), getattr(other, measure)
                name = f"{'average accuracy' if sign > 0 else 'forgetting'}: {ours.label} {word} {other.label}"
                findings.append(Finding(name, differences(a, b) if sign > 0 else differences(b, a)))
            verb = "learns better" if sign > 0 else "forgets less"
            claims.append(Claim(f"{ours.label} {verb} than the others{WAYS[way]}", tuple(findings)))
    return tuple(claims)


# ---- text ------------------------------------------------------------------------------------------------------------


def text(report: Report) -> str:
    """The table and the claims, for a terminal."""
    return tables.aligned(*_table(report)) + "\n\n" + tables.aligned(*_claims(report, mark=False))


def markdown(report: Report) -> str:
    """report.md."""
    s, environment = report.settings, report.environment
    tasks = STREAMS[s.stream].tasks
    lines = [
        "# Lifelong learning",
        _paragraph(f"""
            Made by `{environment["command"]}`: {STREAMS[s.stream].label}, {tasks} tasks, {s.training} training images
            and {s.test} test images each, {s.epochs} epochs a task with {s.batch_size} images a step; a network with
            a head for each task, whose number is given. SGD without momentum at a constant learning rate is the base.
            With replay a step sees {s.replay} examples of a reservoir of {s.memory} beside the minibatch, and so does
            C-MAML's meta loss; each image is offered to it once, in the task's first epoch.
            {_seeds(report.seeds)}, the same images, weights and orders for every row."""),
        _paragraph(ABSENT),
        "\n".join(tables.markdown(*_table(report))),
        _paragraph("""
            Average accuracy: on the test images of all tasks after the last one. Forgetting: what was lost of the best
            accuracy on each task but the last, the mean (Chaudhry et al. 2018). Learnt: accuracy on a task just after
            it was learnt. Mean ± standard deviation over the seeds. Examples: images whose gradient was computed in a
            run. Seconds: of the processor, in the steps of a run."""),
        "![Average accuracy and forgetting](lifelong.png)",
        "## What held",
        _paragraph("""
            The paper claims improved learning and less catastrophic forgetting for Lookbehind in lifelong learning
            (abstract). A comparison holds if the 95 % confidence interval of the mean paired difference (Student's t)
            is above 0, and does not hold if it is below; otherwise the seeds do not resolve it. A claim holds if all
            its comparisons do, and does not hold if one of them does not."""),
        "\n".join(tables.markdown(*_claims(report, mark=True))),
        "## How each was tuned",
        _paragraph(f"""
            {s.trials} trials for every row, on the first {min(s.tuning_tasks, tasks)} tasks with another seed, by
            average accuracy on {s.validation} further training images a task; no test image is used. The full grids
            (learning rates {_list(s.lrs)}; rho {_list(s.rhos)}; k {_list(s.ks)}, for Lookahead {_list(s.lookahead_ks)};
            alpha {_list(s.alphas)}; C-MAML's inner learning rates {_list(s.inner_lrs)}) are thinned by a rule: every
            learning rate equally often, each further value dealt from a shuffled deck that has all of them equally
            often. {WIDER if s.stream in SETTINGS else ""}"""),
        "\n".join(tables.markdown(*_tuning(report))),
        "## What it was made with",
        _paragraph(f"""
            Commit {environment["commit"]}; torch {environment["torch"]}, Python {environment["python"]}, one thread on
            {environment["processor"]}. All runs took {report.seconds / 60:.0f} minutes of the processor in their steps.
            Seeds, settings, every table of accuracies and the data's SHA-256 are in `lifelong.json`."""),
    ]
    return "\n\n".join(lines) + "\n"


def _paragraph(words: str) -> str:
    return " ".join(words.split())


def _seeds(count: int) -> str:
    return "One seed" if count == 1 else f"{count} seeds"


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _mean_std(values: Sequence[float]) -> str:
    spread = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{spread}"


def _table(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = ("method", "lr", "inner lr", "rho", "k", "alpha", "average accuracy, %", "forgetting, %", "learnt, %",
              "examples", "seconds")  # fmt: skip
    lines = []
    for row in report.rows:
        options = (row.own.get(name) for name in ("lr", "inner_lr", "rho", "k", "alpha"))
        shown = ["" if value is None else f"{value:g}" for value in options]
        measured = map(_mean_std, (row.accuracy, row.forgetting, row.learnt))
        lines.append((row.label, *shown, *measured, f"{row.examples:,}", f"{row.seconds:.1f}"))
    return header, lines


def _claims(report: Report, mark: bool) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = ("claim", "verdict", "mean difference, points", "95 % interval")
    lines = []
    for number, claim in enumerate(report.claims, 1):
        cells = f"{number}. {claim.text}", claim.verdict
        lines.append((*(f"**{cell}**" if mark else cell for cell in cells), "", ""))
        for finding in claim.findings:
            found = finding.interval
            interval = f"{100 * found.low:+.2f} to {100 * found.high:+.2f}"
            shown = interval if len(finding.differences) > 1 else "needs two seeds"
            lines.append((finding.text, finding.verdict, f"{100 * found.mean:+.2f}", shown))
    return header, lines


def _tuning(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    lines = []
    for row in report.rows:
        cells = []
        for own, accuracy, _ in report.tuning[row.label]:
            name = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in own.items())
            cells.append(f"**{name}: {100 * accuracy:.1f}**" if own == row.own else f"{name}: {100 * accuracy:.1f}")
        lines.append((row.label, "; ".join(cells)))
    return ("for", "trials: average accuracy on validation images, %"), lines


def numbers(report: Report) -> dict[str, Any]:
    """lifelong.json: all of it, as plain values."""
    return {
        "environment": dict(report.environment),
        "settings": asdict(report.settings),
        "seeds": list(range(report.seeds)),
        "tuning_seed": experiment.TUNING_SEED,
        "rows": [
            {
                "label": row.label, "way": row.way, "method": row.method, "chosen": row.own,
                "accuracy": row.accuracy, "forgetting": row.forgetting, "learnt": row.learnt, "tables": row.tables,
                "examples": row.examples, "seconds": row.seconds,
            }
            for row in report.rows
        ],
        "tuning": {
            label: [{**own, "accuracy": accuracy, "forgetting": lost} for own, accuracy, lost in trials]
            for label, trials in report.tuning.items()
        },
        "claims": [
            {
                "claim": claim.text, "verdict": claim.verdict,
                "findings": [
                    {
                        "text": finding.text, "verdict": finding.verdict, "differences": finding.differences,
                        "interval": [finding.interval.low, finding.interval.high]
                        if len(finding.differences) > 1
                        else None,
                    }
                    for finding in claim.findings
                ],
            }
            for claim in report.claims
        ],
        "seconds": report.seconds,
    }  # fmt: skip
