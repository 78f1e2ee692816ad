"""The runs of the comparison in processes of their own."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from benchmarks.compare import experiment
from benchmarks.compare.experiment import Result, Run, Settings
from benchmarks.files import UserError


def run_missing(settings: Settings, done: dict[str, Result], jobs: int, keep: Callable[[Run, Result], None]) -> None:
    """Performs what is missing in `done`, each run in one of `jobs` processes, and gives every result to `keep`.

    What is run next follows from the results so far.
    """
    if missing(settings, done) is None:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.compare.experiment"])
    processes, idle = [], []
    running: dict[Connection, Run] = {}
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(theirs, settings), daemon=True))
            processes[-1].start()
            theirs.close()
            idle.append(ours)
        with tqdm(desc="comparison", unit=" evaluation", disable=None, smoothing=0, unit_scale=True) as bar:
            show_progress(bar, settings, done, begun=True)
            while True:
                while idle and (run := missing(settings, done, running.values())) is not None:
                    idle[-1].send(run)
                    running[idle.pop()] = run
                if not running:
                    return
                for connection in wait(list(running)):
                    run = running.pop(connection)
                    try:
                        result, problem = connection.recv()
                    except EOFError:
                        raise UserError(f"{run.name}: its process was ended; the same command goes on") from None
                    if problem:
                        raise problem if isinstance(problem, UserError) else RuntimeError(f"{run.name}: {problem}")
                    keep(run, result)
                    idle.append(connection)
                    show_progress(bar, settings, done)
    finally:
        for process in processes:
            process.terminate()
            process.join()


def missing(settings: Settings, done: dict[str, Result], running: Any = ()) -> Run | None:
    """The next run that has no result and is not under way; None if there is none that can be known yet."""
    under_way = set(running)
    plan = experiment.plan(settings, experiment.answer(settings, done))
    return next((run for run in plan if run.name not in done and run not in under_way), None)


def show_progress(bar: "tqdm[Any]", settings: Settings, done: dict[str, Result], begun: bool = False) -> None:
    """Gradient evaluations of the finished runs, among those of all runs by the best present guess."""
    guessed = experiment.guess(settings, experiment.answer(settings, done))
    plan = experiment.plan(settings, guessed)
    steps = settings.training // settings.batch_size
    bar.total = steps * sum(run.cost for run in plan)
    bar.n = steps * sum(run.cost for run in plan if run.name in done)
    if begun:
        bar.initial = bar.n  # what was there before took no time now
    bar.set_postfix_str(f"{sum(run.name in done for run in plan)} of about {len(plan)} runs")


def work(connection: Connection, settings: Settings) -> None:
    """A worker: performs what it is sent, one run after the other, until there is nobody to send more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            run = connection.recv()
        except EOFError:
            return
        try:
            connection.send((experiment.perform(settings, run), None))
        except UserError as error:
            connection.send((None, error))
        except Exception:
            connection.send((None, traceback.format_exc()))


def _end_with_parent() -> None:
    """A parent that is killed takes its workers along, in the middle of a run."""
    multiprocessing.parent_process().join()
    os._exit(1)
