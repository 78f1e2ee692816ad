"""Steps over several processes on a slow link: what they send, what they wait for, and what a model says of it.

`python -m benchmarks.distributed --help` explains the options.
"""

import argparse
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from benchmarks.distributed import processes, report
from benchmarks.distributed.plan import Plan
from benchmarks.files import UserError, replacing
from benchmarks.machine import processor

RESULTS = Path("benchmarks/results")
RANKS = (2, 4)


def main(argv: Sequence[str] | None = None) -> int:
    """Measures; 0 if all was, 1 if a process failed, 2 after a mistake of the caller, 130 on Ctrl-C."""
    chosen = parse(argv)
    try:
        return run(chosen, list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        warn(str(error))
        return 2
    except RuntimeError as error:
        warn(str(error))
        return 1
    except OSError as error:
        warn(f"{error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        warn("interrupted, nothing written")
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmarks.distributed",
        description="Measures steps over several gloo processes on a link that is slowed down, and compares them with "
        "a model of their cost.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--quick", action="store_true", help="two processes, one link, evaluations of 12 ms, two rounds: shows that "
        "everything works; its times mean nothing",
    )  # fmt: skip
    parser.add_argument(
        "--ranks", metavar="N,N", help="numbers of processes (default: 2,4; with --quick 2)",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, metavar="N", help="in each of which all have a turn (default: 9)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder for distributed.md (default: {RESULTS}; where an option "
        "makes less or more of the run, nothing is written unless a folder is given)",
    )  # fmt: skip
    chosen = parser.parse_args(argv)
    chosen.whole = not (chosen.quick or chosen.ranks or chosen.rounds)
    try:
        chosen.ranks = [int(n) for n in chosen.ranks.split(",")] if chosen.ranks else RANKS[: 1 if chosen.quick else 2]
    except ValueError:
        parser.exit(2, f"{parser.prog}: --ranks: expected numbers with commas between them, got {chosen.ranks!r}\n")
    if min(chosen.ranks) < 2:
        parser.exit(2, f"{parser.prog}: --ranks: expected at least 2, got {min(chosen.ranks)}\n")
    if chosen.rounds is not None and chosen.rounds < 1:
        parser.exit(2, f"{parser.prog}: --rounds: expected at least 1, got {chosen.rounds}\n")
    return chosen


def run(chosen: argparse.Namespace, argv: list[str]) -> int:
    """Measure and report."""
    plan = Plan.of(chosen.quick, chosen.rounds)
    output = chosen.output or (RESULTS if chosen.whole else None)
    if output:
        output.mkdir(parents=True, exist_ok=True)
    start, load = time.perf_counter(), os.getloadavg()[0]
    found = {}
    total = len(chosen.ranks) * len(plan.links) * plan.rounds
    with tqdm(total=total, unit=" round", file=sys.stderr, disable=None, smoothing=0) as bar:

        def advance() -> None:
            bar.n += 1
            bar.refresh()
            if bar.disable:  # no terminal: a line a round
                print(f"{ranks} processes: {bar.n} of {total} rounds", file=sys.stderr, flush=True)

        for ranks in chosen.ranks:
            bar.set_description(f"{ranks} processes")
            found[ranks] = processes.run(plan, ranks, advance)
    environment = {
        "command": shlex.join(["python", "-m", "benchmarks.distributed", *argv]),
        "processor": processor(),
        "cores": os.cpu_count(),
        "load_before": round(load, 1),
        "load_after": round(os.getloadavg()[0], 1),
        "torch": version("torch"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "minutes": round((time.perf_counter() - start) / 60, 1),
    }
    tables = report.tables(plan, found)
    print(report.describe(plan), report.as_text(tables), sep="\n\n", flush=True)
    if output:
        with replacing(output / "distributed.md") as file:
            file.write(report.as_markdown(tables, plan, environment))
        print(f"written: {output / 'distributed.md'}", file=sys.stderr)
    return 0


def warn(line: str) -> None:
    """A line for people."""
    print(f"benchmarks.distributed: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
