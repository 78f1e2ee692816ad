"""The paper's comparison: every method tuned alike, five seeds, on real images with wrong labels.

`python -m benchmarks.compare --help` explains the options.
"""

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from benchmarks import runs
from benchmarks.command import check_folders, ended, say
from benchmarks.compare import experiment, report
from benchmarks.compare.experiment import DIGITS, FASHION_MNIST, QUICK, Settings
from benchmarks.files import UserError, replacing
from benchmarks.options import Parser, count
from benchmarks.store import Store, write_json
from benchmarks.workers import run_plan

RESULTS = Path("benchmarks/results")
TABLE = "compare.md"
NUMBERS = "compare.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit code: 0, 2 after a mistake of the caller, 130 after Ctrl-C."""
    chosen = build_parser().parse_args(argv)
    arguments = shlex.join(sys.argv[1:] if argv is None else argv)
    goes_on = "the same command goes on with the runs that are missing"
    return ended("benchmarks.compare", lambda: compare(chosen, arguments), goes_on)


def build_parser() -> argparse.ArgumentParser:
    """The parser behind `python -m benchmarks.compare --help`."""
    parser = Parser(prog="benchmarks.compare", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--data", choices=("fashion-mnist", "digits"),
        help="default: fashion-mnist where Debian's package has put it, else digits",
    )  # fmt: skip
    add("--seeds", type=count, metavar="N", help="runs of every row: the seeds 0 to N - 1 (default: 5)")
    add("--jobs", type=count, default=os.cpu_count(), metavar="N", help="worker processes (default: one a core)")
    add(
        "--quick", action="store_true",
        help="a few steps on digits with two seeds: a trial of the program, which says nothing about the methods",
    )  # fmt: skip
    add("--estimate", action="store_true", help="say how much there is to do, and do nothing")
    add(
        "--output", type=Path, metavar="DIR",
        help="folder of the finished runs; those that are there are not repeated (default: runs/compare)",
    )  # fmt: skip
    add(
        "--results", type=Path, metavar="DIR",
        help=f"folder of table, numbers and plots (default: {RESULTS}; with --quick that of --output)",
    )  # fmt: skip
    return parser


def compare(chosen: argparse.Namespace, arguments: str) -> None:
    """All runs that are missing, then the report."""
    settings = settings_of(chosen)
    folder = chosen.output or Path("runs/compare-quick" if chosen.quick else "runs/compare")
    results = chosen.results or (folder if chosen.quick else RESULTS)
    check_folders(folder, results)
    store = Store(folder, asdict(settings), runs.load(settings).fingerprint(), runs.Run)
    say(estimate(settings, store, chosen.jobs))
    if chosen.estimate:
        return
    perform_all(settings, store, chosen.jobs)
    found = report.make(settings, store, f"python -m benchmarks.compare {arguments}".strip())
    results.mkdir(parents=True, exist_ok=True)
    print(write(results, found), flush=True)
    say(f"everything is in {results}, the finished runs in {folder}")


def perform_all(settings: Settings, store: Store, jobs: int) -> None:
    """Every run that the store has no result of; what is run next follows from the results so far."""
    run_plan(
        partial(runs.perform, settings), store, lambda: experiment.plan(settings, store.done),
        lambda run: steps(settings) * run.cost, jobs, "comparison",
        guessed=lambda: experiment.plan(settings, store.done, guessed=True),
    )  # fmt: skip


def steps(settings: Settings) -> int:
    """Of an epoch."""
    return settings.training // settings.batch_size


def estimate(settings: Settings, store: Store, jobs: int) -> str:
    """One line: what is left to do, by the best present guess, and how long it takes at the speed of what is done."""
    plan = experiment.plan(settings, store.done, guessed=True)
    left = [run for run in plan if run.name not in store.done]
    evaluations = steps(settings) * sum(run.cost for run in left)
    text = f"about {len(left)} of {len(plan)} runs and {evaluations:,.0f} gradient evaluations to do"
    if not store.done:
        return text
    took = sum(result["seconds"] for result in store.done.values())
    speed = took / sum(result["evaluations"] for result in store.done.values())
    return (
        f"{text}: {evaluations * speed / jobs / 60:.0f} minutes of training with {jobs} processes, as fast as until now"
    )


def write(folder: Path, found: report.Report) -> str:
    """Writes numbers, table and pictures into `folder` and returns the table as text."""
    from benchmarks.compare import plots  # takes a second, and a mistake should not have to wait for it

    for name, content in plots.draw(found).items():
        with replacing(folder / name) as file:
            file.write(content)
    write_json(folder / NUMBERS, report.plain(found), indent=1)
    with replacing(folder / TABLE) as file:
        file.write(report.markdown(found).encode())
    return report.text(found)


def settings_of(chosen: argparse.Namespace) -> Settings:
    """The settings that the options ask for."""
    if chosen.quick and chosen.data == "fashion-mnist":
        raise UserError("--quick: takes digits, not --data fashion-mnist")
    name = chosen.data or experiment.default_data()
    settings = QUICK if chosen.quick else FASHION_MNIST if name == "fashion-mnist" else DIGITS
    return settings if chosen.seeds is None else replace(settings, seeds=tuple(range(chosen.seeds)))


if __name__ == "__main__":
    sys.exit(main())
