"""What a run leaves for people and programs to read: a table, CSV and JSON."""

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.checkpoint import Checkpoint, Record
from benchmarks.files import replacing

HISTORY = "history.csv"
SUMMARY = "summary.csv"
RESULTS = "results.json"
NOISE_LEVEL = 0.2
"""Of the column "accuracy, noise": each weight is multiplied by 1 + 0.2 N(0, 1)."""


@dataclass(frozen=True)
class Row:
    """One method's line of the table."""

    method: str
    test_accuracy: float
    """A fraction, after the last epoch."""
    final_loss: float
    """Mean training loss over the steps of the last epoch."""
    gradient_evaluations: float
    seconds: float
    seconds_per_evaluation: float
    sharpness: float | None
    """In nats, of the final weights; None until they are there."""
    noise_accuracy: float | None
    """A fraction: with noise in the final weights."""


def summarize(checkpoint: Checkpoint) -> list[Row]:
    """The table's lines, of the methods that have finished at least one epoch."""
    rows = []
    for method, record in checkpoint.records.items():
        if not record.accuracy:
            continue
        end = len(record.accuracy) * record.steps_per_epoch
        last = record.loss[end - record.steps_per_epoch : end]
        rows.append(
            Row(
                method,
                record.accuracy[-1],
                sum(last) / len(last),
                record.evaluations,
                record.seconds,
                record.seconds / record.evaluations,
                record.sharpness,
                record.noise_accuracy,
            )
        )
    return rows


def format_table(rows: list[Row]) -> str:
    """The table as text, its columns aligned."""
    header = (
        *("method", "test accuracy", "final loss", "gradient evaluations", "seconds", "seconds/evaluation"),
        *("sharpness", "accuracy, noise"),
    )
    cells = [
        (
            row.method,
            f"{row.test_accuracy:.2%}",
            f"{row.final_loss:.4g}",
            f"{row.gradient_evaluations:,.10g}",
            f"{row.seconds:.1f}",
            f"{row.seconds_per_evaluation:.5f}",
            "" if row.sharpness is None else f"{row.sharpness:.4g}",
            "" if row.noise_accuracy is None else f"{row.noise_accuracy:.2%}",
        )
        for row in rows
    ]
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    lines = []
    for first, *others in (header, ["-" * width for width in widths], *cells):
        rest = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join((first.ljust(widths[0]), *rest)))
    return "\n".join(lines)


def write(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes history.csv (a line a step), summary.csv (the table) and results.json (settings, versions, table)."""
    rows = summarize(checkpoint)
    _write_csv(
        folder / HISTORY, ("method", "epoch", "step", "loss", "alpha", "test_accuracy"), _history(checkpoint.records)
    )
    _write_csv(folder / SUMMARY, Row.__annotations__, (vars(row).values() for row in rows))
    summary = [{name: _json_value(value) for name, value in vars(row).items()} for row in rows]
    content = {"settings": checkpoint.settings, "environment": checkpoint.environment, "summary": summary}
    with replacing(folder / RESULTS) as file:
        file.write((json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _history(records: dict[str, Record]) -> Any:
    """One row a step; the test accuracy stands at the last step of an epoch, alpha is empty for SGD."""
    for method, record in records.items():
        for step, loss in enumerate(record.loss, 1):
            epochs_done, step_in_epoch = divmod(step, record.steps_per_epoch)
            accuracy = record.accuracy[epochs_done - 1] if step_in_epoch == 0 else ""
            alpha = record.alpha[step - 1] if record.alpha else ""
            yield method, epochs_done + (step_in_epoch > 0), step, loss, alpha, accuracy


def _write_csv(path: Path, header: Any, rows: Any) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    with replacing(path) as file:
        file.write(text.getvalue().encode())


def _json_value(value: Any) -> Any:
    """JSON has no NaN: a diverged run's loss is null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
