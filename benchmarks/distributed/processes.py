"""The processes of a run: started, listened to, ended."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from benchmarks.distributed.plan import Measured, Plan
from benchmarks.files import UserError


def run(plan: Plan, ranks: int, advance: Callable[[], object]) -> dict[str, dict[str, Measured]]:
    """What so many processes measure together, by link and name; ``advance`` is called after each round.

    Whatever ends this ends the processes.

    Raises:
        UserError: a process was ended. RuntimeError: one has failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.distributed.rank"])
    processes, connections = [], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for rank in range(ranks):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, plan, Path(folder), rank, ranks), daemon=True)
                processes.append(process)
                process.start()
                theirs.close()
                connections.append(ours)
            return _joined(_listen(connections, advance))
        finally:
            for process in processes:
                if process.pid is not None:
                    process.kill()  # whatever it waits for
                    process.join()


def _work(*arguments: Any) -> None:
    from benchmarks.distributed import rank  # torch, which the parent does without

    rank.work(*arguments)


def _listen(connections: list[Connection], advance: Callable[[], object]) -> list[Any]:
    found: dict[Connection, Any] = {}
    while len(found) < len(connections):
        messages = []
        for connection in wait([c for c in connections if c not in found]):
            try:
                messages.append((connection, *connection.recv()))
            except EOFError:  # said first: where one process has ended, the others fail too
                raise UserError(f"rank {connections.index(connection)}: its process was ended") from None
        for connection, result, problem in messages:
            if problem:
                raise RuntimeError(f"rank {connections.index(connection)}: {problem}")
            if result == 1:
                advance()
            else:
                found[connection] = result
    return [found[connection] for connection in connections]


def _joined(found: list[Any]) -> dict[str, dict[str, Measured]]:
    """Of all ranks: the longest time of each round, and the counts, which are the same."""
    joined: dict[str, dict[str, Measured]] = {}
    for link, by_name in found[0].items():
        joined[link] = {}
        for name in by_name:
            rounds = [*zip(*(of_rank[link][name] for of_rank in found), strict=True)]
            counts = {turn[1:] for turns in rounds for turn in turns}
            if len(counts) > 1:
                raise RuntimeError(f"{name}: expected the same collectives and bytes in each round, got {counts}")
            joined[link][name] = Measured([max(turn[0] for turn in turns) for turns in rounds], *counts.pop())
    return joined
