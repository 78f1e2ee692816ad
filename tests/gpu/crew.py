"""Processes that run checks side by side.

A check that fails may leave a GPU's context unusable, and one that hangs never comes back: its process is ended, and
the next check has a new one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from tests.gpu.rows import BAD, FAILED, NO_TIME, Row

MOST = 8  # processes: they share the GPU's memory too


class Worker:
    """A process that reads names and writes rows, as ``tests.gpu.worker``."""

    def __init__(self, command: Sequence[str]) -> None:
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, name: str, seconds: float) -> Row | None:
        """The row of a check: a failure, if the process ends. None, if it does not come within so many seconds."""
        start = time.perf_counter()
        try:
            print(name, file=self.process.stdin, flush=True)
            ready, _, _ = select.select([self.process.stdout], [], [], seconds)
            line = self.process.stdout.readline() if ready else ""
        except OSError:
            ready, line = True, ""
        if line:
            return Row(*json.loads(line))
        if not ready:
            return None
        found = f"its process has ended with code {self.process.wait()}"
        return Row(name, FAILED, time.perf_counter() - start, found)

    def end(self) -> None:
        """Whatever it is doing."""
        self.process.kill()
        with contextlib.suppress(OSError), self.process:  # closes its pipes
            pass


class Crew:
    """Runs checks and says each row as it ends.

    Args:
        command: of a process.
        say: called with each row, never twice at once.
        longest: seconds that a check may take.
    """

    def __init__(self, command: Sequence[str], say: Callable[[Row], None], longest: float) -> None:
        self.command, self.say, self.longest = list(command), say, longest
        self.workers: set[Worker] = set()
        self.lock = threading.Lock()
        self.stopped = False

    def run(self, names: Sequence[str], count: int, until: float, *more: str) -> None:
        """All of the checks, in this order, on so many processes.

        Args:
            until: of ``time.monotonic()``: what has not ended by then has no time.
            more: options of these processes.
        """
        left = list(reversed(names))
        threads = [
            threading.Thread(target=self._work, args=(left, until, [*self.command, *more]))
            for _ in range(min(count, len(names)))
        ]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                thread.join()
        except BaseException:  # an interrupt: nothing runs on
            with self.lock:
                self.stopped = True
                for worker in self.workers:
                    worker.end()
            raise

    def _work(self, left: list[str], until: float, command: list[str]) -> None:
        worker = None
        while True:
            with self.lock:
                if self.stopped or not left:
                    break
                name, time_left = left.pop(), until - time.monotonic()
                if time_left > 0 and worker is None:
                    worker = Worker(command)
                    self.workers.add(worker)
            seconds = min(self.longest, time_left)
            row = worker.run(name, seconds) if seconds > 0 else Row(name, NO_TIME, 0.0, "not begun")
            if row is None:
                row = Row(
                    name, NO_TIME if time_left < self.longest else FAILED, seconds, f"no end after {seconds:.0f} s"
                )
            with self.lock:
                if not self.stopped:
                    self.say(row)
                if row.verdict in BAD and worker is not None:
                    self.workers.discard(worker)
                    worker.end()
                    worker = None
        if worker is not None:
            with self.lock:
                self.workers.discard(worker)
            worker.end()


def cores() -> int:
    """As many processes as this host has cores for."""
    return min(MOST, len(os.sched_getaffinity(0)))
