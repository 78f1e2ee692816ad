"""What a job found: a page of Markdown, its numbers as JSON, a picture."""

import math
import statistics
from dataclasses import dataclass
from typing import Any

from benchmarks import tables
from benchmarks.files import replacing
from benchmarks.paired import OPEN, Interval, differences
from benchmarks.store import Store, write_json
from benchmarks.transformers import picture, plan
from benchmarks.transformers.plan import Answers, Result, Row
from benchmarks.transformers.study import Study, plain_settings

PAIRS = (
    ("lookbehind-sam", "base"),
    ("lookbehind-sam", "longer"),
    ("lookbehind-sam", "sam"),
    ("adaptive-sam", "sam"),
    ("adaptive-sam", "lookbehind-sam"),
    ("lookbehind-asam", "base"),
    ("lookbehind-asam", "longer"),
    ("lookbehind-asam", "asam"),
    ("adaptive-asam", "asam"),
    ("adaptive-asam", "lookbehind-asam"),
    ("sam", "base"),
    ("sam", "longer"),
    ("asam", "base"),
    ("asam", "longer"),
)
"""Rows that are compared: is the first above the second?"""
CLAIMED = (("lookbehind-sam", "sam"), ("lookbehind-asam", "asam"))
"""Of these the paper's claim consists."""


@dataclass(frozen=True)
class Finding:
    """One comparison of two rows, seed by seed."""

    first: str
    second: str
    differences: tuple[float, ...]
    interval: Interval


def write(folder: Any, study: Study, runs: Store, command: str) -> str:
    """Writes the report into `folder` and returns its tables as text. All runs have to be there."""
    answers = plan.answer(study.settings, runs.done)
    rows = {row.key: row for row in plan.rows(study.settings, answers, study.base)}
    results = {key: [runs.done[run.name] for run in row.runs] for key, row in rows.items()}
    scores = {key: tuple(study.scale * result["score"] for result in of_row) for key, of_row in results.items()}
    found = [_finding(scores, *pair) for pair in PAIRS]
    references = {name: study.scale * score for name, score in study.references().items()}
    environment = {**runs.environment, "command": command}

    table = _table(study, rows, results, scores)
    lines = [
        f"# {study.title}",
        _paragraph(f"""
            Made by `{command}`. {study.setting()} {_seeds(study)} Versions: torch {environment["torch"]}, Python
            {environment["python"]}, commit {environment["commit"]}; one thread a run on
            {environment["processor"]}."""),
        "\n".join(tables.markdown(*table)),
        _paragraph(f"""
            {study.measure} is that of the test data, mean and 95 % interval over the seeds (Student's t); the loss is
            the mean of the last tenth of the training, at the weights that a step begins with. Not trained:
            {", ".join(f"{name} {score:.1f}" for name, score in references.items())}."""),
        f"![{study.title}]({study.name}.png)",
        "## What held",
        _paragraph(f"The paper's claim: {study.claim} {verdict(found, rows)}"),
        "\n".join(tables.markdown(*_claims(study, rows, found))),
        _paragraph("""
            Differences are paired by seed, with the 95 % interval of their mean (Student's t). "Holds": the whole
            interval is above 0; "does not hold": all of it is below; otherwise so few seeds do not resolve it. The
            intervals are not corrected for how many there are."""),
        "## How each was tuned",
        _paragraph(f"""
            By {study.measure} on validation data, with {len(study.settings.tuning_seeds)} seed(s) that no final run
            uses; no test data is looked at. To thin the grids, the base alone chooses the learning rate, which all
            take, and Lookbehind with the adaptive alpha takes the rho and the k that Lookbehind has chosen with the
            static one."""),
        "\n".join(tables.markdown(*_tuning(study, rows, answers, runs))),
        "## What it cost",
        _cost(runs),
    ]
    with replacing(folder / f"{study.name}.png") as file:
        file.write(picture.draw(study, rows, scores, references, environment))
    numbers = {
        "environment": environment,
        "data": runs.data,
        "settings": plain_settings(study),
        "references": references,
        "chosen": answers,
        "rows": {key: {"label": row.label, "runs": results[key]} for key, row in rows.items()},
        "differences": [_plain(finding) for finding in found],
        "tuning": [result for result in runs.done.values() if result["run"]["purpose"] == "tune"],
    }
    write_json(folder / f"{study.name}.json", numbers, indent=1)
    with replacing(folder / "README.md") as file:
        file.write(("\n\n".join(lines) + "\n").encode())
    return tables.aligned(*table) + "\n\n" + tables.aligned(*_claims(study, rows, found))


def _finding(scores: dict[str, tuple[float, ...]], first: str, second: str) -> Finding:
    found = differences(scores[first], scores[second])
    return Finding(first, second, found, Interval.of(found))


def verdict(found: list[Finding], rows: dict[str, Row]) -> str:
    """Of the paper's claim, in words."""
    said = []
    for finding in found:
        if (finding.first, finding.second) in CLAIMED:
            names = f"{rows[finding.first].label} above {rows[finding.second].label}"
            said.append(f"{names}: {finding.interval.verdict} here ({finding.interval.show(sign=True)}).")
    return " ".join(said)


def _paragraph(text: str) -> str:
    return " ".join(text.split())


def _seeds(study: Study) -> str:
    count = len(study.settings.seeds)
    return "One seed." if count == 1 else f"{count} seeds, the same for every row."


def _table(
    study: Study, rows: dict[str, Row], results: dict[str, list[Result]], scores: dict[str, tuple[float, ...]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    header = (
        "method",
        "lr",
        "rho",
        "k",
        "alpha",
        "gradients",
        "minutes",
        "loss",
        study.measure,
        "95 % interval",
        "range",
    )
    lines = []
    for key, row in rows.items():
        run, of_row = row.runs[0], results[key]
        interval = Interval.of(scores[key])
        alphas = [result["alpha"] for result in of_row if result["alpha"] is not None]
        adaptive = run.method == "lookbehind-adaptive"
        alpha = f"adaptive, {statistics.fmean(alphas):.2f}" if adaptive and alphas else _value(run.alpha)
        losses = [math.nan if result["loss"] is None else result["loss"] for result in of_row]
        between = f"{interval.low:.1f} to {interval.high:.1f}" if len(scores[key]) > 1 else ""
        lines.append(
            (
                row.label, f"{run.lr:g}", _value(run.rho), _value(run.k), alpha, f"{of_row[0]['evaluations']:,}",
                f"{statistics.fmean(result['seconds'] for result in of_row) / 60:.1f}",
                f"{statistics.fmean(losses):.3f}", f"{interval.mean:.1f}", between,
                f"{min(scores[key]):.1f} to {max(scores[key]):.1f}",
            )
        )  # fmt: skip
    return header, lines


def _claims(study: Study, rows: dict[str, Row], found: list[Finding]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    count = len(study.settings.seeds)
    header = ("is it above?", "verdict", f"difference, {study.unit} (95 % interval)", "each seed")
    lines = []
    for finding in found:
        said = finding.interval.verdict
        lines.append(
            (
                f"{rows[finding.first].label} above {rows[finding.second].label}",
                f"{said} with {count} seed{'s' * (count > 1)}" if said == OPEN else said,
                finding.interval.show(sign=True),
                ", ".join(f"{difference:+.2f}" for difference in finding.differences),
            )
        )
    return header, lines


def _tuning(
    study: Study, rows: dict[str, Row], answers: Answers, runs: Store
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    lines = []
    for key, candidates in plan.questions(study.settings, answers).items():
        cells = []
        for own, of_candidate in candidates:
            numbers = ", ".join(f"{name} {value:g}" for name, value in own.items())
            text = f"{numbers}: {study.scale * plan.mean_score(of_candidate, runs.done):.1f}"
            cells.append(f"**{text}**" if own == answers[key] else text)
        lines.append((rows[key].label, "; ".join(cells)))
    return ("for", f"candidates: {study.measure}, validation"), lines


def _cost(runs: Store) -> str:
    results = list(runs.done.values())
    evaluations = sum(result["evaluations"] for result in results)
    hours = sum(result["seconds"] for result in results) / 3600
    return (
        f"{len(results)} runs, {evaluations:,} gradient evaluations, {hours:.1f} hours of one core in training steps "
        "(by the clock: where other programs had the core, their time too)."
    )


def _plain(finding: Finding) -> dict[str, Any]:
    """JSON has no infinity, which is what an interval of one seed reaches to."""
    low, high = (x if math.isfinite(x) else None for x in (finding.interval.low, finding.interval.high))
    return {
        "first": finding.first,
        "second": finding.second,
        "differences": finding.differences,
        "mean": finding.interval.mean,
        "interval": [low, high],
        "verdict": finding.interval.verdict,
    }


def _value(value: float | None) -> str:
    return "" if value is None else f"{value:g}"
