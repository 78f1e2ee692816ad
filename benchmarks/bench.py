"""The benchmark suite: measures, prints DESIGN's table of bounds with verdicts, and writes JSON, Markdown and plots.

`python -m benchmarks.bench --help` explains the options.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # nothing from the profiler between the lines of the bar

from benchmarks.files import UserError, replacing

RESULTS = Path("benchmarks/results")
GROUPS = {
    "own": "the optimizer's own work: naive, foreach, compiled, native",
    "variations": "the same for other k, ASAM, adaptive alpha",
    "scaling": "the same for sizes from 1e4 to 2e8 and 1 to 10,000 tensors",
    "overhead": "a step of 110 tensors of one element",
    "training": "whole training steps on real images",
    "bandwidth": "a step's bytes over its time, against copy_ and add",
    "memory": "state and peak, in copies of the model",
    "traffic": "bytes that the passes read and write",
    "launches": "passes a gradient evaluation",
    "evaluations": "gradient evaluations a step",
}


class Plan:
    """How long to measure."""

    def __init__(self, quick: bool) -> None:
        self.quick = quick
        self.rounds = 5 if quick else 11
        self.block_seconds = 0.05 if quick else 0.15
        # to compile takes longer than to measure
        self.contenders = ("naive", "foreach", "native") if quick else ("naive", "foreach", "compiled", "native")

    def shorter(self) -> "Plan":
        """For what is shown but has no bound."""
        plan = Plan(self.quick)
        plan.rounds = 5 if self.quick else 7
        plan.block_seconds = self.block_seconds / 2
        return plan


class Suite:
    """A pytest plugin: chooses the cases, shows progress, gathers what they found."""

    def __init__(self, quick: bool, only: Sequence[str]) -> None:
        self.plan, self.only = Plan(quick), only
        self.found: list[dict[str, Any]] = []
        self.problems: list[str] = []
        self.skipped: list[str] = []

    def pytest_configure(self, config: Any) -> None:
        """Declare the mark of the cases that a quick run leaves out."""
        config.addinivalue_line("markers", "full: not with --quick")

    def pytest_collection_modifyitems(self, config: Any, items: list[Any]) -> None:
        """Keep the chosen groups, and what fits the kind of run."""
        items[:] = [
            item
            for item in items
            if _group(item) in self.only and not (self.plan.quick and item.get_closest_marker("full"))
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the suite; 0 if all was measured, 1 if a case failed, 2 after a mistake of the caller, 130 on Ctrl-C."""
    chosen = parse(argv)
    try:
        return run(chosen, list(sys.argv[1:] if argv is None else argv))
    except UserError as error:
        warn(str(error))
        return 2
    except OSError as error:
        warn(f"{error.filename or 'a file'}: {error.strerror or error}")
        return 2
    except KeyboardInterrupt:
        warn("interrupted, nothing written")
        return 130


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    groups = "\n".join(f"  {name:12} {what}" for name, what in GROUPS.items())
    parser = argparse.ArgumentParser(
        prog="benchmarks.bench",
        description="Measures the optimizer against DESIGN's bounds; all contenders take turns in one process.",
        epilog=f"groups:\n{groups}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, shorter, nothing large, little compiled")
    parser.add_argument("--only", metavar="G,G", help="groups to measure (default: all)")
    parser.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: 2, or the cores there are)")
    parser.add_argument(
        "--output", type=Path, metavar="DIR",
        help=f"folder for results.json, table.md and the plots (default: {RESULTS}; with --quick or --only nothing is "
        "written unless a folder is given)",
    )  # fmt: skip
    parser.add_argument("--redraw", action="store_true", help="measure nothing: draw from DIR's results.json")
    chosen = parser.parse_args(argv)
    chosen.groups = chosen.only.split(",") if chosen.only else list(GROUPS)
    for group in chosen.groups:
        if group not in GROUPS:
            parser.exit(2, f"{parser.prog}: --only: expected some of {', '.join(GROUPS)}, got {group!r}\n")
    if chosen.threads is not None and chosen.threads < 1:
        parser.exit(2, f"{parser.prog}: --threads: expected at least 1, got {chosen.threads}\n")
    return chosen


def run(chosen: argparse.Namespace, argv: list[str]) -> int:
    """Measure, or load what was measured, and report."""
    output = chosen.output or (RESULTS if not (chosen.quick or chosen.only) or chosen.redraw else None)
    if chosen.redraw:
        results, suite = load(output / "results.json"), None
    else:
        if output:
            output.mkdir(parents=True, exist_ok=True)
        results, suite = measure(chosen, argv)

    from benchmarks import bounds

    table = bounds.check(results["measurements"])
    print(bounds.as_text(table), flush=True)
    if output:
        from benchmarks import bench_plots

        results["bounds"] = [vars(bound) for bound in table]
        write(output / "results.json", to_json(results))
        write(output / "table.md", bounds.as_markdown(table, results["measurements"], results["environment"]))
        for name, figure in bench_plots.draw(results).items():
            write(output / name, figure)
        print(f"everything is in {output}", file=sys.stderr)
    for line in (suite.skipped + suite.problems) if suite else ():
        warn(line)
    return 1 if suite and suite.problems else 0


def measure(chosen: argparse.Namespace, argv: list[str]) -> tuple[dict[str, Any], Suite]:
    """Run the chosen cases under pytest-benchmark."""
    import pytest
    import torch

    from lookbehind_fused import kernels

    try:
        kernels.resolve("native", torch.device("cpu"))
    except (RuntimeError, ValueError) as error:
        raise UserError(str(error)) from error
    torch.set_num_threads(chosen.threads or min(2, os.cpu_count() or 1))
    suite = Suite(chosen.quick, chosen.groups)
    load = os.getloadavg()[0]
    if load > 0.5:
        warn(f"load average {load:.1f}: other programs share the cores, and what is measured now proves nothing")

    class Fixtures:
        """Fixtures of the cases."""

        @pytest.fixture
        def plan(self) -> Plan:
            return suite.plan

        @pytest.fixture(autouse=True)
        def _gather(self, request: Any, benchmark: Any) -> Any:
            yield
            suite.gather(request.node, benchmark)

    cases = Path(__file__).with_name("cases.py")
    arguments = [str(cases), f"--rootdir={cases.parents[1]}", "-c", os.devnull, "-s", "-q", "-p", "no:cacheprovider"]
    arguments += ["-o", "python_functions=bench_*", "-o", "python_files=cases.py", "-W", "ignore"]
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


def processor() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def load(path: Path) -> dict[str, Any]:
    """What an earlier run has written."""
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def write(path: Path, content: bytes) -> None:
    """The whole file or the old one."""
    with replacing(path) as file:
        file.write(content)


def to_json(results: dict[str, Any]) -> bytes:
    """Numbers to five digits, which is more than there is to know."""

    def short(value: Any) -> Any:
        if isinstance(value, float):
            return float(f"{value:.5g}")
        if isinstance(value, dict):
            return {key: short(v) for key, v in value.items()}
        return [short(v) for v in value] if isinstance(value, (list, tuple)) else value

    lines = ",\n  ".join(json.dumps(short(m), allow_nan=False) for m in results["measurements"])
    rest = {key: short(value) for key, value in results.items() if key != "measurements"}
    head = json.dumps(rest, indent=1, allow_nan=False, ensure_ascii=False).rstrip("}\n")
    return f'{head},\n "measurements": [\n  {lines}\n ]\n}}\n'.encode()


if __name__ == "__main__":
    sys.exit(main())
