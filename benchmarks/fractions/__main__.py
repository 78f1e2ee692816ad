"""What an ascent may cost: by a part of the minibatch, by the step before's gradient, at some steps only.

`python -m benchmarks.fractions --help` explains the options.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.command import check_folders, ended, say
from benchmarks.files import replacing
from benchmarks.fractions import study
from benchmarks.options import Parser, count
from benchmarks.store import write_json

RESULTS = Path("benchmarks/results")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit code: 0, 2 after a mistake of the caller, 130 after Ctrl-C."""
    chosen = build_parser().parse_args(argv)
    arguments = shlex.join(sys.argv[1:] if argv is None else argv)
    goes_on = "the same command goes on with the runs that are missing"
    return ended("benchmarks.fractions", lambda: compare(chosen, arguments), goes_on)


def build_parser() -> argparse.ArgumentParser:
    """The parser behind `python -m benchmarks.fractions --help`."""
    parser = Parser(prog="benchmarks.fractions", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--jobs", type=count, default=os.cpu_count(), metavar="N", help="worker processes (default: one a core)")
    add("--rounds", type=count, default=40, metavar="N", help="of the time of a step (default: 40)")
    add(
        "--quick", action="store_true",
        help="a few steps with two seeds: a trial of the program, which says nothing about the methods",
    )  # fmt: skip
    add(
        "--output", type=Path, metavar="DIR",
        help="folder of the finished runs; those that are there are not repeated (default: runs/fractions)",
    )  # fmt: skip
    add(
        "--results", type=Path, metavar="DIR",
        help=f"folder of table, numbers and picture (default: {RESULTS}; with --quick that of --output)",
    )  # fmt: skip
    return parser


def compare(chosen: argparse.Namespace, arguments: str) -> None:
    """All runs that are missing, the times, then the report."""
    from benchmarks.fractions import picture, report  # takes seconds, and a mistake should not have to wait for it

    settings = study.QUICK if chosen.quick else study.SHOWN
    folder = chosen.output or Path("runs/fractions-quick" if chosen.quick else "runs/fractions")
    results = chosen.results or (folder if chosen.quick else RESULTS)
    check_folders(folder, results)
    store = study.run(settings, folder, chosen.jobs)
    times = study.times(settings, chosen.rounds)
    found = report.make(settings, store, times, f"python -m benchmarks.fractions {arguments}".strip())
    results.mkdir(parents=True, exist_ok=True)
    with replacing(results / "fractions.png") as file:
        file.write(picture.draw(found))
    write_json(results / "fractions.json", report.plain(found), indent=1)
    with replacing(results / "fractions.md") as file:
        file.write(report.markdown(found).encode())
    print(report.text(found), flush=True)
    say(f"everything is in {results}, the finished runs in {folder}")


if __name__ == "__main__":
    sys.exit(main())
