"""What a check found: how it is run, told from one process to another, printed, and written as Markdown."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterable
from typing import NamedTuple

import torch

from benchmarks.tables import markdown
from tests.gpu.checks import Check
from tests.gpu.machine import Absent, here

HOLDS, MEASURED, RAN, ABSENT, FAILED, NO_TIME = "holds", "measured", "ran", "absent", "FAILED", "no time"
BAD = (FAILED, NO_TIME)


class Row(NamedTuple):
    """One check's.

    Attributes:
        found: what is to be read of it. trace: of a check that failed.
    """

    name: str
    verdict: str
    seconds: float = 0.0
    found: str = ""
    trace: str = ""

    def line(self) -> str:
        """For a terminal."""
        return f"{self.verdict:8}  {self.seconds:6.1f} s  {self.name}: {self.found}"

    def json(self) -> str:
        """A line, from which ``Row(*json.loads(line))`` makes it again."""
        return json.dumps(self)


def run(check: Check) -> Row:
    """Run a check in this process."""
    here.instead.clear()
    torch.manual_seed(0)  # the same numbers after whatever other checks
    start, trace = time.perf_counter(), ""
    try:
        found = check.action()
        verdict = RAN if here.dry else MEASURED if check.measures else HOLDS
    except Absent as error:
        verdict, found = ABSENT, str(error)
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        verdict, found, trace = FAILED, f"{type(error).__name__}: {first[:300]}", traceback.format_exc()
    if here.instead:
        found += f" (dry: {', '.join(here.instead)})"
    return Row(check.name, verdict, time.perf_counter() - start, found, trace)


def table(title: str, rows: Iterable[Row]) -> str:
    """Markdown, for the documentation."""
    lines = markdown(
        ("checked", "verdict", "seconds", "found"),
        [
            (row.name, row.verdict, f"{row.seconds:.1f}", " ".join(row.found.split()).replace("|", "\\|"))
            for row in rows
        ],
    )
    return "\n".join([title, "", *lines, ""])
