"""Everything that only a GPU can show: `make gpu-check`. Without a GPU it says so in a line and exits 0.

Prints each row as it ends, with its seconds; 1 if a check failed or had no time. Dtypes and backends run as processes
side by side, what measures speed alone at the end.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.gpu import rows
from tests.gpu.checks import Check, built, checks, ours
from tests.gpu.crew import Crew, cores
from tests.gpu.machine import here
from tests.gpu.rows import Row

# Seconds of all, and of them those that are left for what measures; of one check.
WHOLE, QUICK, DRY, LONGEST = (600, 240), (240, 80), (3600, 1800), 300


def main(argv: Sequence[str] | None = None) -> int:
    """0 if there is no GPU or every check passes."""
    parser = argparse.ArgumentParser(prog="tests.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="parts of names: only checks that have one of them in theirs")
    parser.add_argument("--quick", action="store_true", help="a sample of everything, in four minutes instead of ten")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU: whether the checks' code runs, no more")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the rows as Markdown")
    parser.add_argument("--build-failed", action="store_true", help="say first that building native code has failed")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available() and not chosen.dry_run:
        print("gpu-check: this machine has no GPU that PyTorch can use; nothing was checked")
        return 0
    begin = time.monotonic()
    here.begin(chosen.dry_run, chosen.quick)
    title = ", ".join([
        "a dry run on the CPU" if here.dry else torch.cuda.get_device_name(),
        f"torch {torch.__version__}",
        *([f"CUDA {torch.version.cuda}"] if torch.version.cuda else []),
        f"Python {sys.version.split()[0]}",
    ])  # fmt: skip
    print(title, flush=True)
    every = checks(ours())
    wanted = [check for check in every if not chosen.names or any(part in check.name for part in chosen.names)]
    if not wanted:
        print(f"gpu-check: no check has any of {chosen.names} in its name", file=sys.stderr)
        return 2
    found = ran(wanted, begin, chosen.build_failed)
    if chosen.table:
        order = {check.name: number for number, check in enumerate(every)}
        written = sorted(found, key=lambda row: order.get(row.name, -1))
        chosen.table.write_text(rows.table(title, written), encoding="utf-8")
    counts = {verdict: sum(row.verdict == verdict for row in found) for verdict in sorted({r.verdict for r in found})}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    print(f"{len(found)} checks in {time.monotonic() - begin:.0f} s: {said}")
    return int(any(row.verdict in rows.BAD for row in found))


def ran(wanted: Sequence[Check], begin: float, build_failed: bool) -> list[Row]:
    """All rows, printed as they end."""
    found: list[Row] = []

    def say(row: Row) -> None:
        found.append(row)
        print(row.line(), flush=True)
        print(row.trace, end="", file=sys.stderr, flush=True)

    for check in built(build_failed):
        say(rows.run(check))
    budget, alone = here.chosen(WHOLE, QUICK, DRY)
    options = ["--dry-run"] * here.dry + ["--quick"] * here.quick
    crew = Crew([sys.executable, "-m", "tests.gpu.worker", *options], say, LONGEST)
    crew.run([check.name for check in wanted if not check.measures], cores(), begin + budget - alone)
    crew.run([check.name for check in wanted if check.measures], 1, begin + budget, "--alone")
    return found


if __name__ == "__main__":
    sys.exit(main())
