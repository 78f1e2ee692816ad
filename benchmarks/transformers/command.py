"""The command line of a job of this folder."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.command import check_folders, ended, say
from benchmarks.options import Parser, count
from benchmarks.store import Store
from benchmarks.transformers.plan import Run
from benchmarks.transformers.study import Study, plain_settings, run_all

RESULTS = Path("benchmarks/results")


def main(name: str, parser: Parser, make: Callable[[argparse.Namespace], Study], argv: Sequence[str] | None) -> int:
    """Runs the job and returns the exit code: 0, 2 after a mistake of the caller, 130 after Ctrl-C.

    Args:
        name: of the module that was called.
        parser: with the job's own options, to which the common ones are added.
        make: the job that the options ask for.
        argv: arguments, those of the process if None.
    """
    _add_options(parser, name.rpartition(".")[2])
    chosen = parser.parse_args(argv)
    goes_on = "the same command goes on from the last checkpoints"
    return ended(name, lambda: run(chosen, make(chosen), _command(name, parser, chosen)), goes_on)


def _add_options(parser: Parser, name: str) -> None:
    add = parser.add_argument
    add("--data-dir", metavar="DIR", help="folder of the data (default: where Debian's package puts it)")
    add("--seeds", type=count, metavar="N", help="final runs of every row")
    add("--jobs", type=count, default=os.cpu_count(), metavar="N", help="processes (default: one a core)")
    add(
        "--quick", action="store_true",
        help="a few steps of a tiny model: a trial of the program, which says nothing about the methods",
    )  # fmt: skip
    add(
        "--output", type=Path, metavar="DIR",
        help=f"folder of the runs, where the same command goes on (default: runs/{name})",
    )  # fmt: skip
    add(
        "--results", type=Path, metavar="DIR",
        help=f"folder of table, numbers and picture (default: {RESULTS / name}; with --quick that of --output)",
    )  # fmt: skip


def _command(name: str, parser: Parser, chosen: argparse.Namespace) -> str:
    """As one would type it, without what says where files are and how many processes there were."""
    words = ["python", "-m", name]
    for option in ("data", "seeds", "quick"):
        value = getattr(chosen, option, None)
        if value != parser.get_default(option):
            words += [f"--{option}"] if value is True else [f"--{option}", str(value)]
    return " ".join(words)


def run(chosen: argparse.Namespace, study: Study, command: str) -> None:
    """All runs that are missing, then the report."""
    if chosen.seeds is not None:
        study.settings = replace(study.settings, seeds=tuple(range(chosen.seeds)))
    path = chosen.output or Path("runs", study.name + "-quick" * chosen.quick)
    results = chosen.results or (path if chosen.quick else RESULTS / study.name)
    check_folders(path, results)
    folder = Store(path, plain_settings(study), study.fingerprint(), Run, "score")
    run_all(study, folder, chosen.jobs)

    from benchmarks.transformers import report  # pictures take a second, and a mistake should not wait for it

    results.mkdir(parents=True, exist_ok=True)
    print(report.write(results, study, folder, command), flush=True)
    say(f"everything is in {results}, the finished runs in {path}")
