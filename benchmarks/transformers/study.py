"""What a job of this folder has to say of itself, and what is done with it: all runs, then the report."""

import math
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.store import Store
from benchmarks.transformers import plan
from benchmarks.transformers.plan import Result, Run, Settings
from benchmarks.transformers.training import Task, train
from benchmarks.workers import run_plan


class Study(ABC):
    """A job: small enough to be sent to a process, which then loads the data by itself."""

    name: ClassVar[str]
    """Of its folders and of its module here."""
    title: ClassVar[str]
    base: ClassVar[str]
    """What the base optimizer is called."""
    measure: ClassVar[str]
    """What a score is, with its unit, in a table's head."""
    unit: ClassVar[str]
    """Of a difference of scores, as `shown`."""
    scale: ClassVar[float]
    """What a score is multiplied by to be shown."""
    claim: ClassVar[str]
    """Of the paper, in its words' sense."""

    settings: Settings

    @abstractmethod
    def fingerprint(self) -> str:
        """SHA-256, in hex, of all that is trained and tested on."""

    @abstractmethod
    def task(self, run: Run, folder: Path) -> Task:
        """What the run trains, from its first weights. `folder`: where `prepare` has left its files."""

    @abstractmethod
    def score(self, task: Task, run: Run) -> float:
        """Of the trained model: on validation data for tuning, on test data for final runs; the larger the better."""

    @abstractmethod
    def references(self) -> dict[str, float]:
        """Scores on test data of what was not trained, by what it is."""

    @abstractmethod
    def setting(self) -> str:
        """The data, the model and its training in a few sentences."""

    @abstractmethod
    def trial(self) -> Task:
        """What a run of the base trains, without what `prepare` leaves: to time an evaluation with."""

    def preparation(self, folder: Path) -> int:
        """Gradient evaluations that `prepare` takes, as if from its beginning."""
        return 0

    def prepare(self, folder: Path) -> None:  # noqa: B027 # most have nothing to prepare
        """Whatever all runs need: nothing, or what is there already, or from its own checkpoint."""


def run_all(study: Study, folder: Store, jobs: int) -> None:
    """Every run that is missing, in `jobs` processes of one thread each."""
    torch.set_num_threads(1)
    settings, done = study.settings, folder.done

    def known() -> list[Run]:
        return plan.plan(settings, plan.answer(settings, done))

    def guessed() -> list[Run]:
        return plan.plan(settings, plan.guess(settings, plan.answer(settings, done)))

    if all(run.name in done for run in known()):
        return
    each, seconds = _measured(study.trial())

    def cost(run: Run) -> int:
        return run.cost(settings) * each

    left = sum(cost(run) for run in guessed() if run.name not in done) + study.preparation(folder.folder)
    print(
        f"{study.name}: {left:,.0f} gradient evaluations are to be done, {1000 * seconds:.0f} ms each: "
        f"about {left * seconds / jobs / 60:.0f} minutes on {jobs} idle cores",
        file=sys.stderr,
        flush=True,
    )
    study.prepare(folder.folder)
    run_plan(partial(perform, study, folder.folder), folder, known, cost, jobs, study.name, guessed=guessed)


def _measured(task: Task) -> tuple[int, float]:
    """Minibatches of a run, and the CPU seconds of an evaluation: the median of some."""
    took = []
    for number in range(8):
        begun = time.process_time()
        task.loss(number * task.minibatches // 8).backward()
        took.append(time.process_time() - begun)
    return task.minibatches, statistics.median(took)


def perform(study: Study, folder: Path, run: Run) -> Result:
    """Trains and scores, from the run's checkpoint if there is one.

    Returns plain values for JSON: None is a number that was not finite.
    """
    torch.set_num_threads(1)
    task = study.task(run, folder)
    record = train(task, run, study.settings, folder / f"{run.name}.pt")
    last = record.loss[-max(1, len(record.loss) // 10) :]
    return {
        "run": asdict(run),
        "score": study.score(task, run),
        "loss": _finite(statistics.fmean(last)),
        "alpha": _finite(statistics.fmean(record.alpha)) if record.alpha else None,
        "evaluations": record.evaluations,
        "seconds": record.seconds,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def plain_settings(study: Study) -> Mapping[str, Any]:
    """For the folder and for the report's JSON."""
    return asdict(study.settings)
