"""The paper's comparison: every method tuned alike, three seeds, on real images with wrong labels.

`python -m benchmarks.compare --help` explains the options.
"""

import argparse
import json
import os
import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare import experiment, report
from benchmarks.compare.experiment import DIGITS, FASHION_MNIST, QUICK, Done, Result, Run, Settings
from benchmarks.compare.workers import run_missing
from benchmarks.files import UserError, replacing
from benchmarks.options import Parser, count

RESULTS = Path("benchmarks/results")
SETTINGS = "settings.json"
TABLE = "compare.md"
NUMBERS = "compare.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison and returns the exit code: 0, 2 after a mistake of the caller, 130 after Ctrl-C."""
    chosen = build_parser().parse_args(argv)
    try:
        compare(chosen, shlex.join(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        say(f"benchmarks.compare: {error}")
        return 2
    except OSError as error:
        say(f"benchmarks.compare: {error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; the same command goes on with the runs that are missing")
        return 130
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The parser behind `python -m benchmarks.compare --help`."""
    parser = Parser(prog="benchmarks.compare", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--data", choices=("fashion-mnist", "digits"),
        help="default: fashion-mnist where Debian's package has put it, else digits",
    )  # fmt: skip
    add("--seeds", type=count, metavar="N", help="runs of every row (default: 3)")
    add("--jobs", type=count, default=os.cpu_count(), metavar="N", help="worker processes (default: one a core)")
    add(
        "--quick", action="store_true",
        help="a few steps on digits with one seed: a trial of the program, which says nothing about the methods",
    )  # fmt: skip
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
    for path in (folder, results):
        if path.exists() and not path.is_dir():
            raise UserError(f"{path}: not a folder")
    environment = open_folder(folder, settings)
    done = finished(folder)

    def keep(run: Run, result: Result) -> None:
        done[run.name] = result
        _write_json(folder / f"{run.name}.json", result)

    run_missing(settings, done, chosen.jobs, keep)
    command = f"python -m benchmarks.compare {arguments}".strip()
    results.mkdir(parents=True, exist_ok=True)
    print(write(results, settings, done, {**environment, "command": command}), flush=True)
    say(f"everything is in {results}, the finished runs in {folder}")


def write(folder: Path, settings: Settings, done: Done, environment: Mapping[str, Any]) -> str:
    """Writes numbers, table and pictures into `folder` and returns the table as text."""
    from benchmarks.compare import plots  # takes a second, and a mistake should not have to wait for it

    found = report.make(settings, done, environment)
    for name, content in plots.draw(found).items():
        with replacing(folder / name) as file:
            file.write(content)
    numbers = json.dumps(report.numbers(found), indent=1, allow_nan=False, ensure_ascii=False)
    with replacing(folder / NUMBERS) as file:
        file.write((numbers + "\n").encode())
    with replacing(folder / TABLE) as file:
        file.write(report.markdown(found).encode())
    return report.text(found)


def settings_of(chosen: argparse.Namespace) -> Settings:
    """The settings that the options ask for."""
    if chosen.quick and chosen.data == "fashion-mnist":
        raise UserError("--quick: takes digits, not --data fashion-mnist")
    name = chosen.data or experiment.default_data()
    settings = QUICK if chosen.quick else FASHION_MNIST if name == "fashion-mnist" else DIGITS
    return settings if chosen.seeds is None else replace(settings, seeds=chosen.seeds)


# ---- the folder ------------------------------------------------------------------------------------------------------


def open_folder(folder: Path, settings: Settings) -> dict[str, Any]:
    """Makes the folder of a new comparison, or checks that the one that is there has these settings and this data.

    Returns the versions that it was begun with.
    """
    wanted = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "data": experiment.load(settings).fingerprint(),
        "environment": environment(),
    }
    path = folder / SETTINGS
    if not path.exists():
        if folder.exists() and any(folder.glob("*.json")):
            raise UserError(f"{folder}: holds JSON files, but no {SETTINGS}; name another --output")
        folder.mkdir(parents=True, exist_ok=True)
        _write_json(path, wanted)
        return wanted["environment"]
    there = _read_json(path)
    if there.keys() != wanted.keys() or there["settings"].keys() != wanted["settings"].keys():
        raise UserError(f"{path}: written by another version of this program; name another --output")
    for name, value in wanted["settings"].items():
        if there["settings"][name] != value:
            raise UserError(
                f"{path}: this comparison has {name} {there['settings'][name]}, not {value}; name another --output"
            )
    if there["data"] != wanted["data"]:
        raise UserError(f"{path}: this comparison was begun on other data than there is now; name another --output")
    for name, now in wanted["environment"].items():
        if (then := there["environment"].get(name)) != now:
            say(f"note: {name} was {then} and is {now}: the rest may differ in its last bits")
    return there["environment"]


def finished(folder: Path) -> dict[str, Result]:
    """The results in the folder, by the name of the run."""
    found = {path.stem: _read_json(path) for path in sorted(folder.glob("*-*.json"))}
    for name, result in found.items():
        try:
            fits = Run(**result["run"]).name == name and isinstance(result["accuracy"], float)
        except (KeyError, TypeError):
            fits = False
        if not fits:
            raise UserError(f"{folder / name}.json: not the result of this run; remove it to run it again")
    return found


def environment() -> dict[str, Any]:
    """What the last bits of a result may depend on, beside the settings."""
    return {
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def _read_json(path: Path) -> Any:
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, dict):
            raise ValueError
    except ValueError as error:
        raise UserError(f"{path}: not a file of this program, or a damaged one") from error
    return content


def _write_json(path: Path, content: Any) -> None:
    with replacing(path) as file:
        file.write((json.dumps(content, allow_nan=False) + "\n").encode())


def say(line: str) -> None:
    """Progress and mistakes go to stderr; stdout is for the table."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
