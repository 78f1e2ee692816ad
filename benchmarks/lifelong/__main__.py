"""Lifelong learning: SGD, SAM, Multistep-SAM and Lookbehind, alone, with episodic replay and over C-MAML.

`python -m benchmarks.lifelong --help` explains the options.
"""

import argparse
import json
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks import options
from benchmarks.command import check_folders, ended, say
from benchmarks.files import replacing
from benchmarks.lifelong import experiment, report, streams
from benchmarks.lifelong.experiment import QUICK, SETTINGS, Done, Run, Settings
from benchmarks.lifelong.learning import Learning, perform
from benchmarks.store import Store

RESULTS = Path("benchmarks/results/lifelong")
CHECKPOINT = "checkpoint.pt"
SEEDS = 5


def main(argv: Sequence[str] | None = None) -> int:
    """Performs all runs and returns the exit code: 0, 2 after a mistake of the caller, 130 after Ctrl-C."""
    chosen = build_parser().parse_args(argv)
    arguments = shlex.join(sys.argv[1:] if argv is None else argv)
    goes_on = "the same command goes on from the last checkpoint"
    return ended("benchmarks.lifelong", lambda: lifelong(chosen, arguments), goes_on)


def build_parser() -> argparse.ArgumentParser:
    """The parser behind `python -m benchmarks.lifelong --help`."""
    parser = options.Parser(prog="benchmarks.lifelong", description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add(
        "--stream", choices=SETTINGS, default="rotations",
        help="rotations, permutations or pairs of classes of Fashion-MNIST; cifar100 and tiny-imagenet need --data-dir "
        "(default: rotations)",
    )  # fmt: skip
    add(
        "--data-dir", metavar="DIR",
        help="folder of the files (default: where Debian's package dataset-fashion-mnist puts them)",
    )  # fmt: skip
    add(
        "--seeds", type=options.count, default=None, metavar="N",
        help=f"final runs of every row (default: {SEEDS}); more can be added to a folder later",
    )  # fmt: skip
    add("--training", type=options.count, metavar="N", help="training images of a task (default: that of the stream)")
    add(
        "--quick", action="store_true",
        help="three small tasks of digits with two seeds: a trial of the program, which says nothing about the methods",
    )  # fmt: skip
    add(
        "--checkpoint-every", type=float, default=20.0, metavar="S",
        help="seconds between two checkpoints inside a run; one is written after an epoch of a task (default: 20)",
    )  # fmt: skip
    add(
        "--output", type=Path, metavar="DIR",
        help="folder of the finished runs; those that are there are not repeated (default: runs/lifelong-STREAM)",
    )  # fmt: skip
    add(
        "--results", type=Path, metavar="DIR",
        help=f"folder of table, numbers and picture (default: {RESULTS}; with --quick that of --output)",
    )  # fmt: skip
    return parser


def lifelong(chosen: argparse.Namespace, arguments: str) -> None:
    """All runs that are missing, then the report."""
    torch.set_num_threads(1)
    settings = QUICK if chosen.quick else SETTINGS[chosen.stream]
    if chosen.training is not None:
        settings = replace(settings, training=chosen.training)
    seeds = chosen.seeds or (2 if chosen.quick else SEEDS)
    folder = chosen.output or Path(f"runs/lifelong-{'quick' if chosen.quick else settings.stream}")
    results = chosen.results or (folder if chosen.quick else RESULTS)
    check_folders(folder, results)
    tasks = Tasks(settings, chosen.data_dir)
    store = Store(folder, asdict(settings), tasks.fingerprint(experiment.TUNING_SEED), Run)
    say(estimate(settings, seeds, store.done, tasks))
    run_missing(settings, seeds, store, tasks, chosen.checkpoint_every)
    data = {run_seed: tasks.fingerprint(run_seed) for run_seed in range(seeds)}
    environment = {
        **store.environment, "data": {"tuning": store.data, **{str(seed): sha for seed, sha in data.items()}},
        "command": f"python -m benchmarks.lifelong {arguments}".strip(),
    }  # fmt: skip
    results.mkdir(parents=True, exist_ok=True)
    print(write(results, settings, seeds, store.done, environment), flush=True)
    say(f"everything is in {results}, the finished runs in {folder}")


class Tasks:
    """The tasks of every run, made when they are needed; the last ones are kept."""

    def __init__(self, settings: Settings, folder: str | None) -> None:
        self.settings, self.folder = settings, folder
        self._last: tuple[Any, Any] = (None, None)

    def of(self, run: Run) -> list[streams.Dataset]:
        """What a run learns: the first tasks with validation images for tuning, else all of them."""
        return self._make(run.seed, experiment.tasks_of(self.settings, run), run.purpose == "tune")

    def fingerprint(self, seed: int) -> str:
        """SHA-256 of the final runs' data of a seed, or for the seed of tuning of the data of that."""
        tune = seed == experiment.TUNING_SEED
        run = Run("tune" if tune else "final", "plain", "sgd", seed, 1.0)
        return streams.fingerprint(self.of(run))

    def _make(self, seed: int, count: int, validate: bool) -> list[streams.Dataset]:
        key = seed, count, validate
        if self._last[0] != key:
            s = self.settings
            self._last = key, streams.make(s.stream, self.folder, s.sizes, seed, count, validate)
        return self._last[1]  # type: ignore[no-any-return]


def run_missing(settings: Settings, seeds: int, store: Store, tasks: Tasks, every: float) -> None:
    """Performs what has no result yet, one run after the other, and writes each result as it is there."""
    done = store.done
    costs = (experiment.passes(settings, run) for run in experiment.plan(settings, seeds, done) if run.name in done)
    with tqdm(desc="lifelong", unit=" pass", disable=None, smoothing=0, unit_scale=True, initial=sum(costs)) as bar:
        while run := next((run for run in experiment.plan(settings, seeds, done) if run.name not in done), None):
            _show(bar, settings, seeds, done)
            learning = Learning(settings, run, tasks.of(run))
            each = experiment.passes(settings, run) / (settings.epochs * len(learning.tasks))
            checkpoint = store.folder / CHECKPOINT
            store.keep(run, perform(learning, checkpoint, every, lambda each=each: bar.update(each)))
            checkpoint.unlink(missing_ok=True)
        _show(bar, settings, seeds, done)


def _show(bar: "tqdm[Any]", settings: Settings, seeds: int, done: Done) -> None:
    """Passes of the finished runs, among those of all runs by the best present guess."""
    plan = experiment.plan(settings, seeds, done, guess=True)
    passes = {run.name: experiment.passes(settings, run) for run in plan}
    bar.total = sum(passes.values())
    bar.n = sum(cost for name, cost in passes.items() if name in done)
    bar.set_postfix_str(f"{sum(name in done for name in passes)} of {len(passes)} runs")


def estimate(settings: Settings, seeds: int, done: Done, tasks: Tasks) -> str:
    """How many runs are missing and how long they take: a step of each kind is timed for that."""
    missing = [run for run in experiment.plan(settings, seeds, done, guess=True) if run.name not in done]
    if not missing:
        return "every run has its result"
    seconds = 0.0
    for way in experiment.WAYS:
        of_way = [run for run in missing if run.way == way]
        if of_way:
            own = experiment.candidates(settings, way, "sgd")[0]
            probe = Run("tune", way, "sgd", experiment.TUNING_SEED, **own)
            learning = Learning(settings, probe, tasks.of(probe))
            learning.epoch()  # what is done once is done in here
            start, first = time.process_time(), learning.seconds
            while time.process_time() - start < 0.3 and not learning.finished:
                learning.epoch()
            epochs = learning.epochs - 1
            per_pass = (learning.seconds - first) / epochs
            per_pass /= experiment.passes(settings, probe) / (settings.epochs * len(learning.tasks))
            seconds += per_pass * sum(experiment.passes(settings, run) for run in of_way)
    return f"{len(missing)} runs are missing: about {seconds / 60:.0f} minutes of one core"


def write(folder: Path, settings: Settings, seeds: int, done: Done, environment: Mapping[str, Any]) -> str:
    """Writes numbers, report and picture into `folder` and returns the tables as text."""
    from benchmarks.lifelong import plots  # takes a second, and a mistake should not have to wait for it

    found = report.make(settings, seeds, done, environment)
    numbers = json.dumps(report.numbers(found), indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    contents = {
        "lifelong.png": plots.draw(found),
        "lifelong.json": numbers.encode(),
        "report.md": report.markdown(found).encode(),
    }
    for name, content in contents.items():
        with replacing(folder / name) as file:
            file.write(content)
    return report.text(found)


if __name__ == "__main__":
    sys.exit(main())
