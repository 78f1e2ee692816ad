"""What tests of comparisons share: their folders, their processes, and mistakes of their callers."""

import json
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest


def results_of(folder: Path) -> dict[str, dict]:
    """Every result in the folder, without the time that it took."""
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*-*.json")}
    for result in found.values():
        assert result.pop("seconds") > 0
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def refused(main: Callable, program: str, capfd: pytest.CaptureFixture[str], *argv: str) -> str:
    """Runs with a mistake in it: exit code 2, nothing on stdout; returns the one line on stderr."""
    capfd.readouterr()
    try:
        code = main(list(argv))
    except SystemExit as error:  # how argparse ends
        code = error.code
    output = capfd.readouterr()
    assert code == 2
    assert output.out == ""
    assert output.err.startswith(f"{program}: ")
    assert output.err.count("\n") == 1
    return output.err


def wait_for_results(folder: Path, process: subprocess.Popen, count: int) -> None:
    while len(list(folder.glob("*-*.json"))) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)


def descendants(pid: int) -> set[int]:
    try:
        children = {int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()}
    except FileNotFoundError:
        return set()
    return children.union(*map(descendants, children))


def wait_until_gone(pids: set[int]) -> None:
    end = time.monotonic() + 300
    while any(Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes() for pid in pids):
        assert time.monotonic() < end, "workers outlive their parent"
        time.sleep(0.05)
