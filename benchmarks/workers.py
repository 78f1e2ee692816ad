"""Training runs in processes of their own, one core each."""

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Collection, Hashable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from tqdm import tqdm

from benchmarks.files import UserError
from benchmarks.store import Store

Progress = tuple[float, float, str]
"""What is done, of how much, and a few words."""


def run_plan(
    perform: Callable[[Any], Any],
    store: Store,
    plan: Callable[[], Sequence[Any]],
    cost: Callable[[Any], float],
    jobs: int,
    description: str,
    guessed: Callable[[], Sequence[Any]] | None = None,
) -> None:
    """Performs every run of a plan that the store has no result of, and keeps it there.

    Args:
        perform: see ``run_missing``.
        plan: the runs that are known to be needed, in their order; asked again after each result, since what is run
            next may follow from the results so far.
        cost: gradient evaluations of a run.
        jobs: how many processes, at least 1.
        description: stands before the bar.
        guessed: all runs by the best present guess, where ``plan`` does not know them yet.
    """

    def missing(under_way: Collection[Hashable]) -> Any:
        return next((run for run in plan() if run.name not in store.done and run not in under_way), None)

    def progress() -> Progress:
        runs = (guessed or plan)()
        there = [run for run in runs if run.name in store.done]
        words = f"{len(there)} of {'about ' * (guessed is not None)}{len(runs)} runs"
        return sum(map(cost, there)), sum(map(cost, runs)), words

    run_missing(perform, missing, store.keep, progress, jobs, description)


def run_missing(
    perform: Callable[[Any], Any],
    missing: Callable[[Collection[Hashable]], Any],
    keep: Callable[[Any, Any], None],
    progress: Callable[[], Progress],
    jobs: int,
    description: str,
) -> None:
    """Performs what is missing, each run in one of `jobs` processes, and gives every result to `keep`.

    Args:
        perform: called with a run in a worker; it is sent there once, so it has to be picklable, as runs and results.
        missing: called with the runs that are under way; returns the next one, or None if none can be known yet. What
            comes next may follow from the results so far.
        progress: what the bar shows, asked after each result.
        jobs: how many processes, at least 1.
        description: stands before the bar.

    Raises UserError where a run raises one, or where its process was ended; RuntimeError for anything else.
    """
    if missing(()) is None:
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(perform, "func", perform).__module__])
    processes, idle = [], []
    running: dict[Connection, Any] = {}
    try:
        for _ in range(jobs):
            ours, theirs = context.Pipe()
            processes.append(context.Process(target=work, args=(theirs, perform), daemon=True))
            processes[-1].start()
            theirs.close()
            idle.append(ours)
        with tqdm(desc=description, unit=" evaluation", disable=None, smoothing=0, unit_scale=True) as bar:
            bar.initial = progress()[0]  # what was there before took no time now
            while True:
                bar.n, bar.total, words = progress()
                bar.set_postfix_str(words)
                while idle and (run := missing(set(running.values()))) is not None:
                    try:
                        idle[-1].send(run)
                    except BrokenPipeError:
                        raise UserError(f"{run.name}: its process was ended; the same command goes on") from None
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
    finally:
        for process in processes:
            process.terminate()
            process.join()


def work(connection: Connection, perform: Callable[[Any], Any]) -> None:
    """A worker: performs what it is sent, one run after the other, until there is nobody to send more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            run = connection.recv()
        except EOFError:
            return
        try:
            connection.send((perform(run), None))
        except UserError as error:
            connection.send((None, error))
        except Exception:
            connection.send((None, traceback.format_exc()))


def _end_with_parent() -> None:
    """A parent that is killed takes its workers along, in the middle of a run."""
    multiprocessing.parent_process().join()
    os._exit(1)
