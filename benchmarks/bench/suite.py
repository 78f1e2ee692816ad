"""One run of the suite: which cases, how long each is measured, on what machine."""

import contextlib
import io
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # nothing from the profiler between the lines of the bar

from benchmarks.bench.timing import Clock
from benchmarks.files import UserError
from benchmarks.machine import processor

# In this order: what compiles comes last. It leaves a heap in which the tensors of all later cases lie far apart.
GROUPS = {
    "sam": "SAM by halves, gradients given: the single-file port, native",
    "missing": "a step of 1,000 tensors with one gradient missing",
    "groups": "the same with fifty groups",
    "overhead": "a step of 110 tensors of one element",
    "host": "the host's share of a step on a GPU, with launches that do nothing",
    "bandwidth": "a step's bytes over its time, against copy_ and add",
    "training": "whole training steps on real images",
    "traffic": "bytes that the passes read and write",
    "launches": "passes a gradient evaluation",
    "calls": "calls of own Python functions in a warm step",
    "evaluations": "gradient evaluations a step",
    "own": "the optimizer's own work: naive, public, foreach, compiled, native",
    "memory": "state and peak, in copies of the model",
    "variations": "own work for other k, ASAM, adaptive alpha",
    "scaling": "own work for sizes from 1e4 to 2e8 and 1 to 10,000 tensors",
}


class Plan:
    """How long to measure."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.rounds = 5 if quick else 11
        self.block_seconds = 0.05 if quick else 0.15
        everyone = ("naive", "public", "foreach", "compiled", "native")
        # to compile takes longer than to measure
        self.contenders = tuple(name for name in everyone if not (quick and name == "compiled"))

    def shorter(self) -> "Plan":
        """For what is shown but has no bound."""
        plan = Plan(self.quick)
        plan.rounds = 5 if self.quick else 7
        plan.block_seconds = self.block_seconds / 2
        return plan


class Suite:
    """A pytest plugin: chooses the cases, shows progress, gathers what they found.

    Args:
        quick: leave out what is marked ``full``.
        only: (group, part of the case's name): cases that fit one of these.
    """

    def __init__(self, quick: bool, only: Sequence[tuple[str, str]]) -> None:
        self.plan, self.only = Plan(quick), only
        self.found: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.skipped: list[str] = []

    def pytest_configure(self, config: Any) -> None:
        """Declare the mark of the cases that a quick run leaves out."""
        config.addinivalue_line("markers", "full: not with --quick")

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep the chosen groups, in their order, and what fits the kind of run."""
        items[:] = [
            item
            for item in sorted(items, key=lambda item: [*GROUPS].index(_group(item)))
            if any(_group(item) == group and part in item.name for group, part in self.only)
            and not (self.plan.quick and item.get_closest_marker("full"))
        ]

    def pytest_collection_finish(self, session: Any) -> None:
        """Start the bar."""
        from tqdm import tqdm

        self.bar = tqdm(total=len(session.items), unit=" case", file=sys.stderr, disable=None, smoothing=0)

    def pytest_runtest_logstart(self, nodeid: str, location: Any) -> None:
        """Show what is being measured."""
        self.bar.set_description(nodeid.split("bench_")[-1])
        self.start = time.perf_counter()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Note what went wrong and what was left out."""
        case = report.nodeid.split("bench_")[-1]
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            reason = crash.message if crash else str(report.longrepr)
            self.problems.append(f"{case}: {reason.strip().splitlines()[0]}")
        elif report.skipped:
            self.skipped.append(f"{case}: {report.longrepr[2].removeprefix('Skipped: ')}")
        if report.when == "teardown":
            self.bar.update()
            if self.bar.disable:  # no terminal: a line a case
                print(f"{case}: {time.perf_counter() - self.start:.1f} s", file=sys.stderr, flush=True)

    def pytest_collectreport(self, report: Any) -> None:
        """Note what could not even be collected."""
        if report.failed:
            self.problems.append(str(report.longrepr).strip().splitlines()[-1])

    def gather(self, item: Any, benchmark: Any) -> None:
        """Keep what a case left in ``extra_info``."""
        if benchmark.extra_info:
            self.found.append({"group": _group(item), "case": item.name.removeprefix("bench_"), **benchmark.extra_info})


def _group(item: Any) -> str:
    return item.originalname.removeprefix("bench_")


def measure(
    only: Sequence[tuple[str, str]], quick: bool, threads: int | None, cpu_time: bool, argv: list[str]
) -> tuple[dict[str, Any], Suite]:
    """Run cases under pytest-benchmark.

    Args:
        only, quick: which (``Suite``).
        threads: of torch; None: two, or the cores there are.
        cpu_time: take a thread's own time, with one thread.
        argv: noted with the results.
    """
    import pytest
    import torch

    from lookbehind_fused import kernels

    try:
        kernels.resolve("native", torch.device("cpu"))
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    torch.set_num_threads(1 if cpu_time else threads or min(2, os.cpu_count() or 1))
    Clock.read = time.thread_time if cpu_time else time.perf_counter
    suite = Suite(quick, only)
    load = os.getloadavg()[0]
    if load > 0.5 and not cpu_time:
        warn(
            f"load average {load:.1f}: other programs share the cores, and what is measured now proves nothing; "
            "--cpu-time says more"
        )

    class Fixtures:
        """Fixtures of the cases."""

        @pytest.fixture
        def plan(self) -> Plan:
            return suite.plan

        @pytest.fixture(autouse=True)
        def _gather(self, request: Any, benchmark: Any) -> Any:
            yield
            suite.gather(request.node, benchmark)

    cases = Path(__file__).with_name("cases")
    arguments = [str(cases), f"--rootdir={cases.parents[2]}", "-c", os.devnull, "-s", "-q", "-p", "no:cacheprovider"]
    arguments += ["-o", "python_functions=bench_*", "-o", "python_files=*.py", "-W", "ignore"]
    arguments += ["--benchmark-quiet", "--benchmark-disable-gc", "--noconftest"]
    start = time.perf_counter()
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        code = pytest.main(arguments, plugins=[suite, Fixtures()])
    if hasattr(suite, "bar"):
        suite.bar.close()
    if code == pytest.ExitCode.INTERRUPTED and not suite.problems:
        raise KeyboardInterrupt
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED) and not suite.problems:
        suite.problems.append(f"pytest ended with {code}: {log.getvalue().strip().splitlines()[-1:]}")
    results = {"environment": environment(argv, load, time.perf_counter() - start), "measurements": suite.found}
    return results, suite


def environment(argv: list[str], load: float, seconds: float) -> dict[str, Any]:
    """Machine, versions and command, without names of hosts and folders."""
    import torch

    threads = torch.get_num_threads()
    return {
        "command": shlex.join(["python", "-m", "benchmarks.bench", *argv]),
        "processor": processor(),
        "cores": os.cpu_count(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": threads,
        "clock": "the thread's own time" if Clock.read is time.thread_time else "wall",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY"),
        "load_before": round(load, 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "system": f"{platform.system()} {platform.machine()}",
        "minutes": round(seconds / 60, 1),
    }


def warn(line: str) -> None:
    """A line for people."""
    print(f"benchmarks.bench: {line}", file=sys.stderr, flush=True)
